"""generators/folders.py: the rows of a file or folder of problems, whose layout tells what it is.

    train.jsonl, test.jsonl            GSM8K, in grade_school_math/data/ of its clone
    train/SUBJECT/1.json, test/...     MATH, or in MATH/ of the folder; the gold is the last box
    dataset_dict.json, state.json      what `save_to_disk` of the package `datasets` wrote

All of a layout's splits are read; a row's `split` is that of its file. A split of another name
(validation) is neither trained nor tested on. In a dataset without splits the rows have none.
"""

from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from common.files import numbered, parsed

SPLITS = ("train", "test")
Rows = Iterator[tuple[int, str, dict]]


def renamed(columns: str | None) -> dict[str, str]:
    """What --columns says: {our field: the file's column}, from "question=prompt,answer=target".

    Raises ValueError for a field that no problem has, or that is named twice.
    """
    pairs = [pair.partition("=") for pair in columns.split(",")] if columns else []
    ours = ("question", "answer", "id", "kind", "split")
    for field, _, column in pairs:
        if field not in ours or not column:
            raise ValueError(f"--columns {columns}: write FIELD=COLUMN, separated by commas, where "
                             f"FIELD is one of {', '.join(ours)}")
    names = {field: column for field, _, column in pairs}
    if len(names) < len(pairs):
        raise ValueError(f"--columns {columns}: a field is named twice: name each once")
    return names


def rows_of(task: str) -> Rows:
    """(number, where, row) of each problem of a .jsonl file, or of a folder."""
    if task.endswith(".jsonl"):
        return numbered(Path(task), "question and answer")
    return folder_rows(Path(task))


def folder_rows(folder: Path) -> Rows:
    """(number, where, row) of each problem; where: what to call it in an error.

    Raises ValueError in one line for a folder of no known layout, or what cannot be read.
    """
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return saved_dataset(folder)
    for inner in ("", "data", "grade_school_math/data", "MATH"):
        for split in SPLITS:
            if (folder / inner / f"{split}.jsonl").is_file():
                return gsm8k(folder / inner)
            if next((folder / inner / split).glob("*/*.json"), None):
                return math(folder / inner)
    raise ValueError(f"{folder} is no folder of problems: give one with train.jsonl and test.jsonl "
                     "(as GSM8K's), train/SUBJECT/*.json (as MATH's), or one that "
                     "datasets.save_to_disk wrote")


def gsm8k(folder: Path) -> Rows:
    for split in SPLITS:
        if (folder / f"{split}.jsonl").is_file():
            rows = numbered(folder / f"{split}.jsonl", "question and answer")
            for number, where, row in rows:
                yield number, where, row | {"id": f"{split}-{number}", "split": split}


def math(folder: Path) -> Rows:
    """Subject by subject in turns, so that the first n problems are of all."""
    for split in SPLITS:
        subjects = [sorted(subject.glob("*.json"), key=lambda file: (len(file.stem), file.stem))
                    for subject in sorted((folder / split).glob("*/"))]
        for file in filter(None, chain.from_iterable(zip_longest(*subjects))):
            row = parsed(str(file), file.read_bytes(), "problem and solution")
            if "box" not in str(row.get("solution")):       # some have no gold
                continue
            name = f"{split}/{file.parent.name}/{file.stem}"
            yield 0, str(file), row | {"id": name, "split": split}


def saved_dataset(folder: Path) -> Rows:
    try:
        import datasets

        found = datasets.load_from_disk(str(folder))
    except ImportError as error:
        raise ValueError(f"task {folder} needs a package: pip install datasets") from error
    except Exception as error:                          # the package raises a dozen kinds
        raise ValueError(f"cannot read the dataset in {folder} ({type(error).__name__}): is it "
                         "whole, as save_to_disk wrote it?") from error
    parts = found if isinstance(found, dict) else {"": found}
    if not any(split in parts for split in ("", *SPLITS)):
        raise ValueError(f"{folder} has the splits {', '.join(parts)}, neither train nor test: "
                         "save it with one of them")
    for split in ("", *SPLITS):
        for number, row in enumerate(parts.get(split, ())):
            own = {"id": f"{split}-{number}", "split": split} if split else {"id": number}
            yield number, f"{folder}, {split} row {number}", row | own
