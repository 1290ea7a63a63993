"""The command line: a user's mistake is told in one line, with what to do."""

import argparse
import difflib
import os
import sys


class Parser(argparse.ArgumentParser):
    """argparse, but a flag is written out, and a wrong one is told in one line, with the flag that
    was probably meant."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str):
        _, _, unknown = message.partition("unrecognized arguments: ")
        flag = unknown.split("=")[0].split(" ")[0]
        close = difflib.get_close_matches(flag, self._option_string_actions, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        self.exit(2, f"{self.prog}: {message}; {hint}--help lists the flags\n")


def note(text: str) -> None:
    """Says something on stderr. Under torchrun rank 0 alone does."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def one_line(error: Exception) -> str:
    """What a user is told of an error: the first line of its message."""
    text = f"missing {error}" if isinstance(error, KeyError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
