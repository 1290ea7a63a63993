"""Files: written whole or not at all, read line by line with the number of a wrong line.

A run may be killed at any moment. The old file is then still there, and nothing of the new one.
Only logs grow line by line: a torn last line is skipped (`rows`).
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """PERMIX_CACHE, or a folder in the user's cache."""
    return Path(os.environ.get("PERMIX_CACHE") or Path.home() / ".cache" / "permix-rlvr")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file beside its name, then renames it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path):
    """Yields an empty folder. It takes the target's place if the block ends well.

    Otherwise it is deleted, and the target stays as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for file in (*part.rglob("*"), part):
            if file.is_file():                          # a library may leave it to its owner alone
                file.chmod(part.stat().st_mode & 0o666)
            sync(file)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        part.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def digest(value) -> str:
    """12 hexadecimal digits that tell two values apart; of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def claim(folder: Path) -> ExitStack:
    """Nobody else's until the result is closed: an exclusive lock, which a killed process loses.

    ValueError where another process has the folder. A file system without locks gives none.
    """
    held = ExitStack()
    descriptor = os.open(folder, os.O_RDONLY)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise ValueError(f"another process works in {folder}: wait until it has ended, or stop "
                         "it") from error
    except OSError:
        pass
    return held


def append(file, row: dict) -> None:
    """One more line at the end of an open .jsonl file. It outlives this process, whatever comes."""
    file.write("\n" + json.dumps(row))                  # newline first: it also ends a torn line
    file.flush()


def rows(path: Path) -> Iterator[dict]:
    """The whole lines of a .jsonl file; none where there is no file."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():         # of bytes: U+2028 does not end a line
        try:
            yield json.loads(line)
        except ValueError:                              # empty, or torn by a kill
            continue


def numbered(path: Path, wanted: str) -> Iterator[tuple[int, str, dict]]:
    """(number, "file, line n", object) for each line of a user's .jsonl file that is not blank.

    Raises ValueError without a file, and at the first line that is not an object; it says to give
    one with `wanted`.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}: give the path of a .jsonl file with {wanted}")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):       # as in `rows`
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield number, where, parsed(where, line, wanted)


def personagym(folder: Path) -> Iterator[tuple[int, str, dict]]:
    """As `numbered`: PersonaGym's {"persona", "questions"} from its repository, or from the folder
    in it that has a <persona>.json each."""
    inner = folder / "questions" / "benchmark-v1"
    for number, file in enumerate(sorted((inner if inner.is_dir() else folder).glob("*.json"))):
        questions = parsed(str(file), file.read_bytes(), "questions by task")
        yield number, str(file), {"persona": file.stem, "questions": questions}


def parsed(where: str, text: bytes, wanted: str) -> dict:
    """An object of a user's file. Raises ValueError that begins with `where`."""
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:                 # as in "\ud800", which no tokenizer takes
        raise ValueError(f"{where}: half a character (a lone surrogate); remove it") from error
    except (ValueError, RecursionError) as error:       # broken JSON, not UTF-8, or too deep
        message = f"{where}: not JSON ({error}); give an object with {wanted}"
        raise ValueError(message) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object; give one with {wanted}")
    return row


def asked(question: str) -> str:
    """A question without case, blanks and the mark at its end: the same in two near-copies."""
    return "".join(question.casefold().split()).rstrip("?.:")


def split_of(question: str) -> str:
    """train (70 %) or test: a function of the question alone (P26)."""
    return "test" if zlib.crc32(asked(question).encode()) % 10 < 3 else "train"


def of_split(path: Path, lines: list, splits: list, split: str) -> list | None:
    """The lines of a user's file that name this `split`; None where no line names any.

    splits: each line's, or None. Raises ValueError where only some lines have one.
    """
    named = len(splits) - splits.count(None)
    if 0 < named < len(splits):                         # which may be trained on would be a guess
        raise ValueError(f"{path}: {named} of {len(splits)} lines have a `split`; "
                         "give one to all or to none")
    own = [line for line, part in zip(lines, splits, strict=True) if part == split]
    if named and not own:
        raise ValueError(f"{path}: no line has the `split` {split}; give it to some, or leave "
                         "`split` out of all")
    return own if named else None


def commit() -> str:
    """The git commit of this checkout, with "-dirty" where its files have been changed since.

    "" outside a checkout, or without git.
    """
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True)
        return done.stdout.strip()
    return ""
