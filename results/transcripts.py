"""What a run leaves to be scored again: its answers and its metrics, gzipped for the repository.

    python results/transcripts.py results/NAME/ARM-seed0    # the answers as full rows, JSON lines

The rows of transcripts.jsonl say the same of a problem under every persona: its question, its gold.
So what all rows with one `id` share is kept once, and the rest by column, which gzip packs better
than rows: 0.4 kB a problem under 25 prompts. `read` makes the rows of it again. Nothing is lost, no
number is rounded.

Left out: token ids. An answer's text is what the verifier and every other reader see.
"""

import gzip
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import files  # noqa: E402

TRANSCRIPTS = "transcripts.jsonl"  # as evaluate.py writes it
KEPT = "transcripts.json.gz"
GRADED = ("personagym.jsonl", "judge.jsonl")  # with --personagym: the answers, the judge's replies
TRAINING = ("metrics.jsonl", "config.json")  # of a run folder


def compact(rows: list[dict]) -> list[dict]:
    """Rows that each have an `id` -> tables, one for each run of rows with the same fields:
    {"same": {id: the fields that all rows of an id share}, "columns": {field: a value a row}}."""
    tables = []
    for fields, group in itertools.groupby(rows, key=tuple):
        group = list(group)
        first = {row["id"]: row for row in reversed(group)}
        same = [k for k in fields if all(row[k] == first[row["id"]][k] for row in group)]
        rest = ["id", *(k for k in fields if k not in same)]
        tables.append({"same": {name: {k: row[k] for k in same} for name, row in first.items()},
                       "columns": {k: [row[k] for row in group] for k in rest}})
    return tables


def full(tables: list[dict]) -> list[dict]:
    """The rows that `compact` was given."""
    return [table["same"][values[0]] | dict(zip(table["columns"], values, strict=True))
            for table in tables for values in zip(*table["columns"].values(), strict=True)]


def write_gzip(path: Path, text: str) -> None:
    """The same text gives the same bytes: no name and no time in the header."""
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def keep(folder: Path, target: Path) -> None:
    """An evaluation's answers, from `folder` into the folder `target`, PersonaGym's with its grades."""
    tables = compact(list(files.rows(folder / TRANSCRIPTS)))
    write_gzip(target / KEPT, json.dumps(tables, separators=(",", ":")))
    for name in GRADED:
        if (folder / name).is_file():
            write_gzip(target / f"{name}.gz", (folder / name).read_text(encoding="utf-8"))


def keep_training(run: Path, target: Path) -> None:
    """A run folder's metrics and settings, gzipped into `target` as they are."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TRAINING:
        write_gzip(target / f"{name}.gz", (run / name).read_text(encoding="utf-8"))


def read(folder: Path) -> list[dict]:
    """The full rows of a kept folder's answers, as transcripts.jsonl of the evaluation had them.

    Greedy answers to problems come first, persona by persona, then sampled ones, then role-play
    (`kind` "roleplay"). FileNotFoundError where the folder keeps none.
    """
    return full(json.loads(gzip.decompress((Path(folder) / KEPT).read_bytes())))


if __name__ == "__main__":
    try:
        for row in read(Path(sys.argv[1])):
            print(json.dumps(row))
    except (IndexError, OSError) as error:
        print(f"results/transcripts.py: {error}; give a folder with {KEPT}", file=sys.stderr)
        sys.exit(2)
