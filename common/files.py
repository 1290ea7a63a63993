"""Files: written whole or not at all, read line by line with the line's number where one is wrong. And the one line
that a user's mistake is told in.

A run may be killed at any moment. What was there before is then still there; of what was being written there is
nothing, but for logs that grow by lines, whose torn last line is passed over (`rows`).
"""

import argparse
import difflib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a file beside its name, then renames it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def whole_folder(target: Path):
    """Yields an empty folder that takes the target's place when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        part.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def append(file, row: dict) -> None:
    """One more line at the end of an open .jsonl file, on disk before anything else happens."""
    file.write("\n" + json.dumps(row))                  # the newline comes first, so that it also ends a torn line
    file.flush()


def rows(path: Path) -> Iterator[dict]:
    """The whole lines of a .jsonl file; none where there is no file."""
    for line in path.read_bytes().splitlines() if path.exists() else ():        # of bytes: U+2028 ends no line
        try:
            yield json.loads(line)
        except ValueError:                              # not UTF-8 is one of them
            continue                                    # torn by a kill, or empty


def numbered(path: Path, wanted: str) -> Iterator[tuple[int, str, dict]]:
    """(number, "file, line n", object) of a user's .jsonl file for each line that is not blank; ValueError at the first
    that is no object, which says to give one with `wanted`."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):           # of bytes: U+2028 ends no line
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:                     # broken JSON, or not UTF-8
            raise ValueError(f"{where}: not JSON ({error}); give an object with {wanted}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not an object; give one with {wanted}")
        yield number, where, row


class Parser(argparse.ArgumentParser):
    """Wrong flags are one line too, with the flag that was probably meant."""

    def error(self, message: str):
        _, _, unknown = message.partition("unrecognized arguments: ")
        close = difflib.get_close_matches(unknown.split("=")[0].split(" ")[0], self._option_string_actions, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        self.exit(2, f"{self.prog}: {message}; {hint}--help lists the flags\n")


def one_line(error: Exception) -> str:
    """What a user is told of an error: the first line of its message."""
    text = f"missing {error}" if isinstance(error, KeyError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


def commit() -> str:
    """The git commit of this checkout, or "" outside one, or without git."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    return ""
