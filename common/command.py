"""The command line: a user's mistake is told in one line, with what to do."""

import argparse
import difflib
import os
import sys

SYNONYMS = {                   # what other programs, or another of ours, call a flag
    "lr": "learning-rate", "beta": "kl-coef", "num-generations": "group-size",
    "epsilon": "clip-low", "epsilon-high": "clip-high", "output-dir": "out", "output": "out",
    "batch-size": "prompts", "max-steps": "steps", "max-completion-length": "max-new-tokens",
    "max-tokens": "max-new-tokens", "model-name-or-path": "model", "dataset": "task",
    "problems": "limit", "eval-problems": "limit", "entropy-coeff": "entropy-coef"}


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults that there are, and that the text does not tell itself."""

    def _get_help_string(self, action):
        none = action.default is None or action.default is False or action.default == []
        told = none or "default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, but a flag is written out, and a wrong one is told in one line, with the flag that
    was probably meant."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, formatter_class=Defaults, **more)

    def error(self, message: str):
        _, _, unknown = message.partition("unrecognized arguments: ")
        flag = unknown.split("=")[0].split(" ")[0].strip("-").replace("_", "-")
        flags = [name.strip("-") for name in self._option_string_actions]
        close = [name for name in [SYNONYMS.get(flag)] if name in flags]
        close += difflib.get_close_matches(flag, flags, 1)
        hint = f"did you mean --{close[0]}? " if close else ""
        self.exit(2, f"{self.prog}: {message}; {hint}--help lists the flags\n")


def positive(text: str) -> int:
    """The type of a flag that counts something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def note(text: str) -> None:
    """Says something on stderr. Under torchrun rank 0 alone does."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def one_line(error: Exception) -> str:
    """What a user is told of an error: the first line of its message."""
    text = f"missing {error}" if isinstance(error, KeyError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
