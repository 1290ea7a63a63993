"""What a run leaves to be scored again: its answers and its metrics, gzipped for the repository.

    python results/transcripts.py results/NAME/ARM-seed0    # the answers as full rows, JSON lines

The rows of transcripts.jsonl say the same of a problem under every persona: its question, its gold.
So the first kept line holds what all rows with one `id` share, and the others the rest. `read`
puts them together again; nothing is lost, no number is rounded.

Left out: token ids. An answer's text is what the verifier and every other reader see.
"""

import gzip
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import files  # noqa: E402

TRANSCRIPTS = "transcripts.jsonl"
TRAINING = ("metrics.jsonl", "config.json")  # of a run folder


def compact(rows: list[dict]) -> str:
    """Rows that each have an `id` -> lines: {id: what its rows share}, then each row's rest."""
    shared = {}
    for row in rows:
        before = shared.get(row["id"], row)
        shared[row["id"]] = {k: v for k, v in before.items() if k in row and row[k] == v}
    rests = [{k: v for k, v in row.items() if k == "id" or k not in shared[row["id"]]}
             for row in rows]
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in (shared, *rests))


def write_gzip(path: Path, text: str) -> None:
    """The same text gives the same bytes: no name and no time in the header."""
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def keep(folder: Path, target: Path) -> None:
    """An evaluation's answers, from `folder` into the folder `target` as transcripts.jsonl.gz."""
    write_gzip(target / f"{TRANSCRIPTS}.gz", compact(list(files.rows(folder / TRANSCRIPTS))))


def keep_training(run: Path, target: Path) -> None:
    """A run folder's metrics and settings, gzipped into `target` as they are."""
    for name in TRAINING:
        write_gzip(target / f"{name}.gz", (run / name).read_text(encoding="utf-8"))


def read(folder: Path) -> list[dict]:
    """The full rows of a kept folder's answers, as transcripts.jsonl of the evaluation had them.

    Greedy answers to problems come first, persona by persona, then sampled ones, then role-play
    (`kind` "roleplay"). FileNotFoundError where the folder keeps none.
    """
    text = gzip.decompress((Path(folder) / f"{TRANSCRIPTS}.gz").read_bytes()).decode()
    shared, *rests = map(json.loads, text.splitlines())
    return [shared[row["id"]] | row for row in rests]


if __name__ == "__main__":
    try:
        for row in read(Path(sys.argv[1])):
            print(json.dumps(row))
    except (IndexError, OSError) as error:
        print(f"results/transcripts.py: {error}; give a folder with {TRANSCRIPTS}.gz",
              file=sys.stderr)
        sys.exit(2)
