"""generators/gym.py: problems of the `reasoning-gym` package, named as common/gym.py says.

A hash of the question decides the split, so whatever the seeds are, no question is trained and
tested on. Questions that occur again are left out.

Some problems depend on Python's hashes of texts, which differ in each process. So all are made in a
process of its own, with hashes that are always the same:

    python -m generators.gym TASK SPLIT SEED LIMIT        writes a line of JSON per problem
"""

import base64
import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path

from common.command import one_line
from common.files import asked, split_of
from common.gym import PREFIX, dataset, named

TRAINED = 600                                           # problems, where no `size` is given


def problems(task: str, split: str, seed: int, limit: int | None) -> list[tuple]:
    """(question, answer, id, kind, level, scorer) of each problem. split: train, test or all.

    Raises ValueError in one line.
    """
    if not find_spec("reasoning_gym"):
        raise ValueError(f"task {task} needs a package: pip install reasoning-gym")
    command = [sys.executable, "-m", "generators.gym", task, split, str(seed), str(limit or 0)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True,
                          env=os.environ | {"PYTHONHASHSEED": "0"})
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"{task} made no problems"])[-1])
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


# --------------------------------------------------------------------------------------------------
# In a process of its own


def entries(name: str, settings: dict, split: str, seed: int, count: int) -> list[tuple]:
    """Up to `count` rows of `problems` for one name: different questions of the split."""
    size, kept, rows = 8 * count + 100, json.dumps(settings), {}
    made = dataset(name, kept, seed * 100_003 % 2**31, size)
    for i in range(size):
        try:
            entry = made[i]
        except Exception as error:                      # of the package's own
            wrong = one_line(error)
            raise ValueError(f"{PREFIX}{name} makes no problem with its settings ({wrong})",
                             ) from error
        question, answer = str(entry["question"]).strip(), str(entry.get("answer") or "")
        key = asked(question)
        if not key or key in rows or split not in ("all", split_of(question)):
            continue
        scorer = json.dumps([name, kept, base64.b64encode(pickle.dumps(entry)).decode()])
        rows[key] = question, answer, f"{name}-{seed}-{i}", name, 0, scorer
        if len(rows) == count:
            break
    return list(rows.values())


def main() -> None:
    task, split, seed, limit = sys.argv[1:]
    parts, made = named(task), []
    for name, settings in parts:
        size = settings.pop("size", -(-TRAINED // len(parts)))
        if type(size) is not int or not 1 <= size <= 10**6:
            raise ValueError(f"{PREFIX}{name}: size must be from 1 to a million, not {size}")
        count = min(size, int(limit) or size) if split == "train" else int(limit) or 200
        made.append(entries(name, settings, split, int(seed), count))
        if not made[-1]:
            raise ValueError(f"{PREFIX}{name} has no question for the {split} split: its settings "
                             "leave hardly any")
    for row in filter(None, chain.from_iterable(zip_longest(*made))):   # the first n are of all
        print(json.dumps(row))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
