"""What is asked: problems with a gold answer, generated or loaded.

    arithmetic, facts            made from templates and a seed, in generators/
    svamp, gsm8k, math, math500  from the hub, through `datasets`
    reasoning-gym:NAME[,NAME]    of that package, with its own scorers; see common/gym.py
    FILE.jsonl                   lines with `question` (or `problem`) and `answer`
    FOLDER                       GSM8K's or MATH's as cloned, or a saved dataset; see
                                 generators/folders.py

In `arithmetic` the test holds other pairs of wording and numbers than the training, but mostly asks
for a sum that was trained in other words. In `facts` it does not: 7 + 5, 5 + 7, 12 - 5 and 12 - 7
are one fact, and held out as one. Its problems have levels, and training opens them one after
another (`batch`).

`columns` says what else the fields of a file or folder are called (--columns question=prompt).
In a file a line's `split` says where it goes. Without any, a file that is both trained and tested
on is split by a hash of its questions, 70 % to 30 %, so a question that occurs twice stays on one
side. Other files are used whole. GSM8K's gold follows `####`. Questions that occur twice, and golds
that the verifier can't read (no answer to them is correct), are told on stderr.

Left out: tasks without one verifiable answer, and multiple choice.

    python tasks.py --task facts --limit 5              prints problems and their answers
"""

import difflib
import itertools
import logging
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from common.command import Parser, note
from common.files import asked, of_split, split_of
from generators import gym
from generators.arithmetic import arithmetic
from generators.facts import facts
from generators.folders import renamed, rows_of
from verifier.extract import last_box
from verifier.verdict import gold_kind


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str                                         # the gold, as the verifier reads it
    id: str
    kind: str                                           # for tables: add, two-step, Algebra ...
    level: int = 0                                      # training begins with the lowest (`batch`)
    scorer: str = ""                                    # of its own, see verifier/scorer.py


# --------------------------------------------------------------------------------------------------
# The problems of a task

GENERATED = {"arithmetic": arithmetic, "facts": facts}
HUB = {                                                 # hub id, configuration, our split -> theirs
    "svamp": ("ChilleD/SVAMP", None, {"train": "train", "test": "test"}),
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math": ("EleutherAI/hendrycks_math", "*", {"train": "train", "test": "test"}),
    "math500": ("HuggingFaceH4/MATH-500", None, {"test": "test"}),
}


def load(task: str, split: str = "test", seed: int = 0, limit: int | None = None,
         whole: bool = False, columns: str | None = None) -> list[Problem]:
    """The problems of a task's split ("train", "test" or "all").

    Generated tasks give `limit` problems (default: 600 for training, else 200); the seed is theirs.
    whole: all lines of a file whose lines have no `split`. columns: see `renamed`; of a file or
    folder alone. Raises ValueError in one line.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: give train, test or all")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves no problem: give 1 or more")
    if task in GENERATED:
        rows = GENERATED[task](split, seed, limit or (600 if split == "train" else 200))
        return [Problem(*row) for row in rows]
    if task.startswith(gym.PREFIX):
        return [Problem(*row) for row in gym.problems(task, split, seed, limit)][:limit]
    if task in HUB:
        problems = from_hub(task, split)
        warn_of_golds([(f"{task}, problem {problem.id}", problem) for problem in problems])
    elif is_local(task):
        problems = from_rows(Path(task), rows_of(task), renamed(columns), split, whole)
    else:
        known = [*GENERATED, *HUB]
        close = difflib.get_close_matches(task, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown task {task!r}: give one of {', '.join(known)}, "
                         f"{gym.PREFIX}NAME, a .jsonl file or a folder{hint}")
    if not problems:
        raise ValueError(f"{task} has no problem in its {split} split; give each line a `split`, "
                         "train or test")
    return problems[:limit]


LEVEL_STEPS = 8                                         # training steps until the next level opens


def batch(problems: list[Problem], step: int, size: int, seed: int,
          rounds: int = 1) -> list[Problem]:
    """The `size` problems of training step `step`: a function of (seed, step), alike in every arm.

    Epochs are shuffled anew; a step may end one epoch and begin the next. Every LEVEL_STEPS steps
    the next level of problems opens too; most tasks have one level. rounds: how many of them a
    training step may take, where `step` counts rounds (dynamic sampling).
    """
    levels = sorted({problem.level for problem in problems})
    last = levels[min(step // (LEVEL_STEPS * rounds), len(levels) - 1)]
    problems = [problem for problem in problems if problem.level <= last]
    places = range(step * size, (step + 1) * size)
    orders = {}
    for epoch in {place // len(problems) for place in places}:
        orders[epoch] = random.Random(f"order {seed} {epoch}").sample(problems, len(problems))
    return [orders[place // len(problems)][place % len(problems)] for place in places]


# --------------------------------------------------------------------------------------------------
# How a problem is put to the model

# Solved examples for `few-shot`: of no dataset, with none of the numbers of the generated tasks.
EXAMPLES = (
    ("A kiosk opens with 120 newspapers and has 45 left at noon. How many newspapers did it sell?",
     "It sold 120 - 45 = 75 newspapers. The answer is 75."),
    ("What is 14 times 11?",
     "14 * 11 = 154. The answer is 154."),
    ("Three friends split a bill of 84 euros equally, and each adds a tip of 2 euros. "
     "How much does each pay?",
     "Each share is 84 / 3 = 28 euros, with the tip 28 + 2 = 30. The answer is 30."),
    ("What is the perimeter of a square with sides of 13 cm, in cm?",
     "4 * 13 = 52. The answer is 52."),
)
SOLVED = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in EXAMPLES)

PROMPTS = {                                             # plain will do: the verifier takes any form
    "plain": "{question}",
    "short": "{question}\nAnswer in one short sentence.",
    "cot": "{question}\nThink step by step, then give the final answer in \\boxed{{}}.",
    "few-shot": SOLVED + "Question: {question}\nAnswer:",
}


def put(problems: list[Problem], prompt: str) -> list[Problem]:
    """The problems with their question in one of PROMPTS."""
    return [replace(p, question=PROMPTS[prompt].format(question=p.question)) for p in problems]


# --------------------------------------------------------------------------------------------------
# Files


def check_columns(columns: str | None, *given: str) -> None:
    """Raises ValueError where --columns names what no file or folder among these tasks has."""
    if not columns:
        return
    names, local = renamed(columns), list(filter(is_local, dict.fromkeys(given)))
    if not local:
        raise ValueError(f"--columns is for a file or a folder, which {given[0]} is not: leave it "
                         "out")
    rows = itertools.chain.from_iterable(rows_of(task) for task in local)
    there = {str(column) for _, _, row in rows for column in row}
    if unknown := [column for column in names.values() if column not in there]:
        raise ValueError(f"{' or '.join(local)} has no column {unknown[0]!r}, which --columns "
                         f"names; there are {', '.join(sorted(there))}")


def from_rows(path: Path, rows: Iterable[tuple[int, str, dict]], names: dict[str, str], split: str,
              whole: bool) -> list[Problem]:
    """The problems of a file or folder, as for `load`; rows: (number, where, row), as `numbered`
    has them. Raises ValueError naming the row."""
    placed, splits, lines = [], [], defaultdict(list)
    for number, where, row in rows:
        missing = [column for field, column in names.items() if not {column, field} & row.keys()]
        if missing:
            raise ValueError(f"{where}: no column {missing[0]!r}, which --columns names; it has "
                             f"{', '.join(map(str, row))}")
        row = row | {field: row[column] for field, column in names.items() if column in row}
        problem = from_row(where, row, path.stem, number)
        placed.append((where, problem))
        splits.append(row.get("split"))
        if not isinstance(splits[-1], str | None):
            raise ValueError(f"{where}: `split` is {splits[-1]!r}; give train or test, in all "
                             "lines or in none")
        lines[asked(problem.question)].append((number, splits[-1]))
    if not placed:
        raise ValueError(f"{path} holds no problem; give lines with question and answer")
    if path.is_dir():                                   # another's: its mistakes are not refused
        placed, splits = without_tested(path, placed, splits)
        lines = {}
    warn_of_copies(path, [copies for copies in lines.values() if len(copies) > 1])
    check_ids(placed)
    if split != "all":
        own = of_split(path, placed, splits, split)
        if own is None and not whole:
            own = [line for line in placed if split_of(line[1].question) == split]
        placed = placed if own is None else own
    warn_of_golds(placed)
    return [problem for _, problem in placed]


def check_ids(placed: list[tuple[str, Problem]]) -> None:
    """Raises ValueError where two problems share a name, by which an evaluation counts votes."""
    first = {}
    for where, problem in placed:
        if (before := first.setdefault(problem.id, where)) is not where:
            raise ValueError(f"{where}: the `id` {problem.id[:60]!r} is also that of {before}; "
                             "give each its own, or leave `id` out of all")


def without_tested(path: Path, placed: list, splits: list) -> tuple[list, list]:
    """Both lists without rows that another has asked before, and without training rows that the
    test asks too: published sets have some."""
    rows = list(zip(placed, splits, strict=True))
    tested = {asked(problem.question) for (_, problem), own in rows if own == "test"}
    kept, trained = {}, 0
    for (where, problem), own in rows:
        key = asked(problem.question)
        if own == "train" and key in tested:
            trained += 1
        else:
            kept.setdefault(key, ((where, problem), own))
    if trained:
        note(f"warning: {path}: {trained} training questions are in its test too: left out")
    if copies := len(placed) - trained - len(kept):
        note(f"warning: {path}: {copies} questions repeat others: left out")
    return [row for row, _ in kept.values()], [own for _, own in kept.values()]


def usual(task: str) -> tuple[str, int]:
    """(the prompt, the longest answer in tokens) that a task is asked with where nobody says."""
    return ("plain", 32) if is_generated(task) else ("short", 48)


def is_generated(task: str) -> bool:
    return task in GENERATED or task.startswith(gym.PREFIX)


def is_local(task: str) -> bool:
    """Whether a task is a file, or a folder, of the user's."""
    named = is_generated(task) or task in HUB
    return not named and (task.endswith(".jsonl") or Path(task).is_dir())


def is_file_of(task: str, other: str | None) -> bool:
    """Whether two tasks are one file, or one folder."""
    return bool(other) and is_local(task) and Path(task).resolve() == Path(other).resolve()


def check_disjoint(train: list[Problem], test: list[Problem]) -> None:
    """Raises ValueError where a question is trained and tested on (P26)."""
    trained = {asked(problem.question) for problem in train}
    if both := [problem for problem in test if asked(problem.question) in trained]:
        raise ValueError(f"{len(both)} of the evaluation's {len(test)} questions are trained on, "
                         f"such as problem {both[0].id}: take them out of one of the files")


def from_row(where: str, row: dict, stem: str, number: int) -> Problem:
    question, answer = row.get("question") or row.get("problem"), row.get("answer")
    if answer is None and isinstance(solution := row.get("solution"), str):
        answer = last_box(solution)                     # MATH's gold
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: no `question` (or `problem`); give it one, remove the line, or "
                         "name its column (--columns question=COLUMN)")
    is_number = isinstance(answer, int) or isinstance(answer, float) and math.isfinite(answer)
    is_answer = isinstance(answer, str) or is_number and not isinstance(answer, bool)
    if not is_answer or gold_of(str(answer)).lower() in ("", "nan"):
        raise ValueError(f"{where}: no `answer`; give it the gold as text or a finite number, "
                         "remove the line, or name its column (--columns answer=COLUMN)")
    kind = str(row.get("kind") or row.get("type") or row.get("subject") or stem)
    names = (row.get("id"), row.get("unique_id"), number)
    if any(isinstance(name, dict | list) for name in names):
        raise ValueError(f"{where}: an `id` is text or a number; give it one, or leave `id` out")
    name = next(str(name) for name in names if name not in (None, ""))
    return Problem(question.strip(), gold_of(str(answer)), name, kind)


MAX_WARNINGS = 5                                        # of one kind


def warn_of_copies(path: Path, repeated: list[list[tuple]]) -> None:
    """repeated: for each question that occurs again, the (number, split) of its lines.

    Raises ValueError where one question is in two splits (P26).
    """
    for copies in repeated:
        numbers = ", ".join(str(number) for number, _ in copies)
        if len({split for _, split in copies}) > 1:
            raise ValueError(f"{path}, lines {numbers}: one question in two splits; keep it in one")
    for copies in repeated[:MAX_WARNINGS]:
        numbers = ", ".join(str(number) for number, _ in copies)
        note(f"warning: {path}, lines {numbers}: the same question")
    if len(repeated) > MAX_WARNINGS:
        note(f"warning: {path}: {len(repeated)} questions occur more than once")


def warn_of_golds(placed: list[tuple[str, Problem]]) -> None:
    """Says on stderr which golds can't be read. placed: (file and line, problem)."""
    found = [(where, problem.answer, gold_kind(problem.answer)) for where, problem in placed]
    unreadable = [line for line in found if line[2][0] == "unreadable"]
    for where, gold, (_, why) in unreadable[:MAX_WARNINGS]:
        note(f"warning: {where}: the gold {gold[:60]!r} can't be read ({why}); no answer is "
             "correct")


def counts(name: str, problems: list[Problem]) -> str:
    """How many problems there are, and what their golds are, in words."""
    kinds = Counter("judged by a scorer of its own" if problem.scorer
                    else gold_kind(problem.answer)[0] for problem in problems)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{name}: {len(problems)} problems, golds: {told}"


def gold_of(text: str) -> str:
    """GSM8K writes the solution, then `#### gold`; elsewhere the answer is the gold."""
    return text.rsplit("####", 1)[-1].strip()


# --------------------------------------------------------------------------------------------------
# The hub


def from_hub(task: str, split: str) -> list[Problem]:
    """Raises ValueError with what to do if the hub can't be reached or has no such split."""
    name, configuration, splits = HUB[task]
    if split not in splits:
        raise ValueError(f"task {task} has no {split} split; train on another task and evaluate "
                         "on this one")
    try:
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # retries hide our one line
        parts = datasets.get_dataset_config_names(name) if configuration == "*" else [configuration]
        loaded = [datasets.load_dataset(name, part, split=splits[split]) for part in parts]
    except ImportError as error:
        raise ValueError(f"task {task} needs a package: pip install {error.name}; or pass a file: "
                         "--task FILE.jsonl with question and answer") from error
    except Exception as error:                          # network, hub and parser raise their own
        raise ValueError(f"cannot fetch {name} from the hub ({type(error).__name__}); check the "
                         "network, or pass a file: --task FILE.jsonl with question and answer",
                         ) from error
    turns = itertools.zip_longest(*loaded)              # so the first n are of all parts
    rows = filter(None, itertools.chain.from_iterable(turns))
    return list(filter(None, (problem_of(task, row, i) for i, row in enumerate(rows))))


def problem_of(task: str, row: dict, index: int) -> Problem | None:
    """One row of a hub dataset as a Problem; None where MATH's solution has no final box."""
    if task == "svamp":
        question = f"{row['Body'].strip()} {row['Question'].strip()}"
        return Problem(question, str(row["Answer"]).removesuffix(".0"), row["ID"], row["Type"])
    if task == "gsm8k":
        return Problem(row["question"], gold_of(row["answer"]), str(index), task)
    if task == "math500":
        return Problem(row["problem"], row["answer"], row["unique_id"], row["subject"])
    answer = last_box(row["solution"])                  # MATH's gold
    return Problem(row["problem"], answer, str(index), row["type"]) if answer else None


# --------------------------------------------------------------------------------------------------
# Command line


def main() -> None:
    parser = Parser(description="Print problems of a task.")
    add = parser.add_argument
    add("--task", default="arithmetic",
        help=f"{', '.join([*GENERATED, *HUB])}, {gym.PREFIX}NAME, a file or a folder")
    add("--columns", help="of a file or folder: question=COLUMN,answer=COLUMN")
    add("--split", default="train", choices=["train", "test", "all"])
    add("--limit", type=int, default=10, help="how many")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    check_columns(args.columns, args.task)
    problems = load(args.task, args.split, args.seed, args.limit, columns=args.columns)
    note(counts(args.task, problems))
    for problem in problems:
        print(f"[{problem.kind}] {problem.question}  ->  {problem.answer}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        sys.exit(2)
