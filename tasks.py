"""What is asked: problems with a gold answer, generated or loaded.

    arithmetic, facts            made from templates and a seed, in generators/
    svamp, gsm8k, math, math500  from the hub, through `datasets`
    FILE.jsonl                   lines with `question` (or `problem`) and `answer`

In `arithmetic` the test holds other numbers than the training, but may ask for a sum that was
trained in other words. In `facts` it does not: 7 + 5, 5 + 7, 12 - 5 and 12 - 7 are one fact, and
held out as one. Its problems have levels, and training opens them one after another (`batch`).

In a file a line's `split` says where it goes. Without any, the first 70 % train and the last 30 %
test. GSM8K's gold follows `####`. What the golds are (numbers, expressions, texts) is told on
stderr when they are loaded. So is a gold that the verifier can't read: no answer to it is correct.

Left out: tasks without one verifiable answer, and multiple choice.

    python tasks.py --task facts --limit 5              prints problems and their answers
"""

import difflib
import itertools
import logging
import random
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from common.command import Parser
from common.files import numbered
from generators.arithmetic import arithmetic
from generators.facts import facts
from verifier.extract import last_box
from verifier.verdict import gold_kind


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str                                         # the gold, as the verifier reads it
    id: str
    kind: str                                           # for tables: add, two-step, Algebra ...
    level: int = 0                                      # training begins with the lowest (`batch`)


# --------------------------------------------------------------------------------------------------
# The problems of a task

GENERATED = {"arithmetic": arithmetic, "facts": facts}
HUB = {                                                 # hub id, configuration, our split -> theirs
    "svamp": ("ChilleD/SVAMP", None, {"train": "train", "test": "test"}),
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math": ("EleutherAI/hendrycks_math", "*", {"train": "train", "test": "test"}),
    "math500": ("HuggingFaceH4/MATH-500", None, {"test": "test"}),
}


def load(task: str, split: str = "test", seed: int = 0, limit: int | None = None) -> list[Problem]:
    """The problems of a task's split ("train", "test" or "all").

    Generated tasks give `limit` problems (default: 600 for training, else 200); the seed is theirs.
    Raises ValueError in one line.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: give train, test or all")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves no problem: give 1 or more")
    if task in GENERATED:
        rows = GENERATED[task](split, seed, limit or (600 if split == "train" else 200))
        return [Problem(*row) for row in rows]
    if task in HUB:
        problems = from_hub(task, split)
        tell_golds(task, [(f"{task}, problem {problem.id}", problem) for problem in problems])
    elif task.endswith(".jsonl"):
        problems = from_file(Path(task), split)
    else:
        known = [*GENERATED, *HUB]
        close = difflib.get_close_matches(task, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown task {task!r}: give one of {', '.join(known)} or a .jsonl file"
                         f"{hint}")
    if not problems:
        raise ValueError(f"{task} has no problem in its {split} split")
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


def from_file(path: Path, split: str) -> list[Problem]:
    """The problems of a .jsonl file. Raises ValueError naming file and line."""
    if not path.is_file():
        raise ValueError(f"no file {path}: give the path of a .jsonl file with question and answer")
    placed, parts = [], []
    for number, where, row in numbered(path, "question and answer"):
        placed.append((where, from_row(where, row, path.stem, number)))
        parts.append(row.get("split"))
    if not placed:
        raise ValueError(f"{path} holds no problem; give lines with question and answer")
    placed = part_of(path, placed, parts, split)
    tell_golds(str(path), placed)
    return [problem for _, problem in placed]


def part_of(path: Path, placed: list, parts: list, split: str) -> list:
    """The lines of a split, by their `split`. Raises ValueError where only some lines have one."""
    if split == "all":
        return placed
    named = len(parts) - parts.count(None)
    if named == 0:
        cut = len(placed) * 7 // 10
        return placed[:cut] if split == "train" else placed[cut:]
    if named < len(parts):                              # which may be trained on would be a guess
        raise ValueError(f"{path}: {named} of {len(parts)} problems have a `split`; "
                         "give one to all or to none")
    return [line for line, part in zip(placed, parts, strict=True) if part == split]


def from_row(where: str, row: dict, stem: str, number: int) -> Problem:
    question, answer = row.get("question") or row.get("problem"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: no `question` (or `problem`); give it one, or remove the line")
    is_answer = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    if not is_answer or not gold_of(str(answer)):
        raise ValueError(f"{where}: no `answer`; give it the gold as text or number, "
                         "or remove the line")
    kind = str(row.get("kind") or row.get("type") or row.get("subject") or stem)
    names = (row.get("id"), row.get("unique_id"), number)
    name = next(str(name) for name in names if name not in (None, ""))
    return Problem(question.strip(), gold_of(str(answer)), name, kind)


MAX_WARNINGS = 5                                        # lines about golds; then their number


def tell_golds(name: str, placed: list[tuple[str, Problem]]) -> None:
    """Says on stderr how many golds are numbers, expressions and texts, and which are unreadable.

    placed: (file and line, problem).
    """
    kinds = Counter()
    for where, problem in placed:
        kind, why = gold_kind(problem.answer)
        kinds[kind] += 1
        if kind == "unreadable" and kinds[kind] <= MAX_WARNINGS:
            print(f"warning: {where}: the gold {problem.answer[:60]!r} can't be read ({why}); "
                  "no answer is correct", file=sys.stderr)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    if placed:
        print(f"{name}: {len(placed)} golds: {counts}", file=sys.stderr)


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
        return Problem(question, f"{float(row['Answer']):g}", row["ID"], row["Type"])
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
    add("--task", default="arithmetic", help=f"{', '.join([*GENERATED, *HUB])}, or a file")
    add("--split", default="train", choices=["train", "test", "all"])
    add("--limit", type=int, default=10, help="how many")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for problem in load(args.task, args.split, args.seed, args.limit):
        print(f"[{problem.kind}] {problem.question}  ->  {problem.answer}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        sys.exit(2)
