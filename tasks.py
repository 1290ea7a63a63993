"""What is asked: problems with a gold answer, generated or loaded.

`arithmetic` is generated: a template, names, objects and numbers drawn from a seed. Train and test are disjoint by
construction: a hash of the template and its numbers (not of the names) decides the split, whatever the seed. But a
test problem may be another wording of a trained one.

`facts` is generated from the same templates, and holds out facts: 7 + 5, 5 + 7, 12 - 5 and 12 - 7 are one, and a hash
of it decides the split. So no test fact is seen in training, in any wording. Its problems have levels, and training
opens them one after another (`batch`).

Files are `.jsonl` with `question` (or `problem`) and `answer`; GSM8K's gold follows `####`. A line's `split` decides
where it goes; in a file without any, the first 70 % train and the last 30 % test. `svamp`, `gsm8k`, `math` and
`math500` come from the hub through `datasets`.

Left out: tasks without one verifiable answer, and multiple choice.
"""

import difflib
import itertools
import logging
import random
import sys
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from common.command import Parser
from common.files import numbered
from verifier.extract import last_box


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str                                         # the gold, as the verifier reads it
    id: str
    kind: str                                           # what it asks for, for tables: add, two-step, Algebra ...
    level: int = 0                                      # how hard it is; training begins with the lowest (`batch`)


# Solved examples for `few-shot`: written for this file, of no dataset, and with none of the numbers of TEMPLATES.
EXAMPLES = (
    ("A kiosk opens with 120 newspapers and has 45 left at noon. How many newspapers did it sell?",
     "It sold 120 - 45 = 75 newspapers. The answer is 75."),
    ("What is 14 times 11?", "14 * 11 = 154. The answer is 154."),
    ("Three friends split a bill of 84 euros equally, and each adds a tip of 2 euros. How much does each pay?",
     "Each share is 84 / 3 = 28 euros, with the tip 28 + 2 = 30. The answer is 30."),
    ("What is the perimeter of a square with sides of 13 cm, in cm?", "4 * 13 = 52. The answer is 52."),
)

# How a problem is put to the model. `plain` will do: the verifier takes the last number or box of an answer.
PROMPTS = {
    "plain": "{question}",
    "short": "{question}\nAnswer in one short sentence.",
    "cot": "{question}\nThink step by step, then give the final answer in \\boxed{{}}.",
    "few-shot": "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in EXAMPLES) + "Question: {question}\nAnswer:",
}


def format_question(problem: Problem, prompt: str = "plain") -> str:
    """The problem's question in one of PROMPTS."""
    return PROMPTS[prompt].format(question=problem.question)


def put(problems: list[Problem], prompt: str) -> list[Problem]:
    """The problems with their question in one of PROMPTS."""
    return [replace(problem, question=format_question(problem, prompt)) for problem in problems]


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic. {a} and {b} (and {c}) are numbers, {n} and {m} names, {o} objects.

NAMES = ("Ada Ben Clara David Emma Felix Grace Hugo Iris Jonas Kira Liam Mona Noah Olga Paul Quinn Rosa Sam Tessa "
         "Umar Vera Will Xenia Yusuf Zoe").split()
OBJECTS = ("apples pens books coins cards shells marbles stickers buttons cookies stamps balloons pencils candles "
           "beads oranges ribbons keys spoons feathers").split()

BARE, ONE = 4, 3                                        # how often a bare sum and a story are drawn, within a kind
KINDS = {"add": 3, "subtract": 3, "multiply": 3, "divide": 3, "two-step": 1}    # and the kinds

TEMPLATES = {
    "add": [
        (BARE, "What is {a} + {b}?"), (BARE, "Add {a} and {b}."), (BARE, "What is the sum of {a} and {b}?"),
        (BARE, "Calculate {a} plus {b}."),
        (ONE, "{n} has {a} {o} and buys {b} more. How many {o} does {n} have now?"),
        (ONE, "There are {a} {o} in a box and {b} {o} on the table. How many {o} are there in all?"),
        (ONE, "{n} found {a} {o} and {m} found {b} {o}. How many {o} did they find together?"),
        (ONE, "A shop sold {a} {o} on Monday and {b} {o} on Tuesday. How many {o} did it sell in total?"),
        (ONE, "{n} read {a} pages yesterday and {b} pages today. How many pages did {n} read?"),
        (ONE, "{n} is {a} years old. How old will {n} be in {b} years?"),
        (ONE, "A train has {a} passengers. At the next stop {b} more get on. How many passengers are on it now?")],
    "subtract": [
        (BARE, "What is {s} - {b}?"), (BARE, "Subtract {b} from {s}."), (BARE, "What is {s} minus {b}?"),
        (BARE, "What is the difference between {s} and {b}?"),
        (ONE, "{n} had {s} {o} and gave {b} of them to {m}. How many {o} does {n} have left?"),
        (ONE, "There were {s} {o} in a bowl. {n} took {b} of them. How many {o} remain?"),
        (ONE, "{n} has {s} {o} and {m} has {b} {o}. How many more {o} does {n} have than {m}?"),
        (ONE, "A book has {s} pages. {n} has read {b} of them. How many pages are left?"),
        (ONE, "{n} wants to collect {s} {o} and has {b} so far. How many more does {n} need?"),
        (ONE, "A bus carries {s} people and {b} of them get off. How many people stay on the bus?"),
        (ONE, "A rope is {s} metres long. {n} cuts off {b} metres. How many metres of rope are left?")],
    "multiply": [
        (BARE, "What is {p} times {q}?"), (BARE, "What is {p} * {q}?"), (BARE, "Multiply {p} by {q}."),
        (BARE, "What is the product of {p} and {q}?"),
        (ONE, "There are {p} boxes with {q} {o} in each. How many {o} are there?"),
        (ONE, "{n} buys {p} packs of {o}. Each pack holds {q}. How many {o} does {n} buy?"),
        (ONE, "A ticket costs {p} dollars. How many dollars do {q} tickets cost?"),
        (ONE, "{n} runs {p} miles every day. How many miles does {n} run in {q} days?"),
        (ONE, "A garden has {p} rows of {q} trees. How many trees are in the garden?"),
        (ONE, "{n} earns {p} dollars an hour. How many dollars does {n} earn in {q} hours?")],
    "divide": [
        (BARE, "What is {d} divided by {q}?"), (BARE, "What is {d} / {q}?"), (BARE, "Divide {d} by {q}."),
        (ONE, "{n} shares {d} {o} equally among {q} friends. How many {o} does each friend get?"),
        (ONE, "{d} {o} are packed into bags of {q}. How many bags are needed?"),
        (ONE, "{q} tickets cost {d} dollars in total. How many dollars does one ticket cost?"),
        (ONE, "{n} reads {q} pages a day. How many days does a book of {d} pages take?"),
        (ONE, "A baker puts {d} rolls on {q} trays, the same number on each. How many rolls are on a tray?")],
    "two-step": [
        (ONE, "{n} has {a} {o}, buys {b} more and then loses {c}. How many {o} does {n} have now?"),
        (BARE, "What is {a} + {b} - {c}?"), (BARE, "What is {p} * {q} + {c}?"),
        (ONE, "There are {p} boxes with {q} {o} each and {c} loose {o}. How many {o} are there in all?"),
        (ONE, "{n} bought {p} tickets for {q} dollars each and a drink for {c}. How many dollars did {n} spend?"),
        (ONE, "{n} had {s} {o}, gave away {b} and then found {c} more. How many {o} does {n} have now?"),
        (ONE, "{n} and {m} have {a} and {b} {o}. Together they give {c} away. How many {o} are left?"),
        (ONE, "A shop has {p} shelves with {q} books each. It sells {c} books. How many books are left?")],
}


def first_step(text: str, x: dict[str, int]) -> int:
    """What the first step of a two-step template comes to with the numbers x."""
    return x["p"] * x["q"] if "{p}" in text else x["s"] - x["b"] if "{s}" in text else x["a"] + x["b"]


def gold(kind: str, text: str, x: dict[str, int]) -> int:
    """The answer of a template with the numbers x."""
    if kind != "two-step":
        return {"add": x["a"] + x["b"], "subtract": x["a"], "multiply": x["p"] * x["q"], "divide": x["p"]}[kind]
    first = first_step(text, x)
    return first + x["c"] if any(word in text for word in ("+ {c}", "loose", "drink", "found")) else first - x["c"]


def arithmetic(split: str, seed: int, limit: int) -> list[Problem]:
    """`limit` distinct problems of a split ("train" | "test" | "all"), a function of (split, seed); a larger limit only
    adds to them. ValueError where the templates can't give as many."""
    choices = [(kind, text) for kind, rows in TEMPLATES.items() for _, text in rows]
    often = [KINDS[kind] * weight / sum(w for w, _ in rows) for kind, rows in TEMPLATES.items() for weight, _ in rows]
    draw = random.Random(f"arithmetic {split} {seed}")
    problems, seen, misses = [], set(), 0
    while len(problems) < limit:
        misses += 1
        if misses > 5000:                               # draws in a row that brought nothing new: they are used up
            raise ValueError(f"arithmetic has hardly more than {len(problems)} {split} problems; lower the limit")
        kind, text = draw.choices(choices, often)[0]
        x = {"a": draw.randint(2, 8), "b": draw.randint(2, 6), "p": draw.randint(2, 6), "q": draw.randint(2, 6)}
        x |= {"s": x["a"] + x["b"], "d": x["p"] * x["q"]}
        x["c"] = draw.randint(2, min(9, x["s"], x["d"]))
        key = numbered_template(text, x)
        here = "test" if zlib.crc32(key.encode()) % 5 == 0 else "train"
        if split not in ("all", here) or key in seen:
            continue
        seen.add(key)
        misses = 0
        problems.append(told(kind, text, x, draw))
    return problems


def numbered_template(text: str, x: dict[str, int]) -> str:
    """A template and the numbers that it uses: what makes a problem another one."""
    return text + "".join(f" {key}={x[key]}" for key in "absdpqc" if f"{{{key}}}" in text)


def told(kind: str, text: str, x: dict[str, int], draw: random.Random, level: int = 0) -> Problem:
    """The problem of a template and its numbers, with names and objects drawn."""
    n, m = draw.sample(NAMES, 2)
    question = text.format(**x, n=n, m=m, o=draw.choice(OBJECTS))
    name = f"{kind}-{zlib.crc32(numbered_template(text, x).encode()):08x}"
    return Problem(question, str(gold(kind, text, x)), name, kind, level)


# ----------------------------------------------------------------------------------------------------------------------
# Facts. What is held out is what two numbers make, not how it is asked for. The mix is such that the embedded model
# solves about 0.3 of it greedily, before any training: enough to learn from, and room above.

EASY, LARGE = {"+": 12, "*": 9}, {"+": 49, "*": 12}      # the largest number of an easy fact, and of any
LEVELS = (0, 0, 1, 0, 0, 0, 1, 0, 0, 2)                 # of ten problems: easy facts, larger numbers, two steps
FACT_KINDS = {"add": 4, "subtract": 1, "multiply": 6, "divide": 1}      # and the kinds of one step
LEFT_OUT = ("Add", "{n} is", "A train", "A ticket", "A garden")         # sums and products that it hardly ever solves
STORY = 1                                               # how often a story is drawn, to BARE of a bare sum
LEVEL_STEPS = 8                                         # training steps until the next level opens


def facts_of(text: str, x: dict[str, int]) -> list[tuple[str, int, int]]:
    """The facts that a template with the numbers x takes, one a step: ("+" or "*", smaller, larger number). A fact
    stands for its inverse too: 12 - 5 is ("+", 5, 7)."""
    sign, pair = ("*", (x["p"], x["q"])) if "{q}" in text else ("+", (x["a"], x["b"]))
    found = [(sign, *sorted(pair))]
    if "{c}" in text:                                   # the second step: first + c, or first - c
        smaller = min(first_step(text, x), gold("two-step", text, x))
        found.append(("+", *sorted((smaller, x["c"]))))
    return found


@cache
def side(fact: tuple[str, int, int]) -> str:
    """The split of a fact, whatever the seed; one in four is for the test."""
    return "test" if random.Random(f"held out {fact}").random() < 0.25 else "train"     # SHA-512: the same everywhere


def facts_fit(found: list[tuple[str, int, int]], level: int, split: str) -> bool:
    """Are these facts of the level, and all on one side, that of the split?"""
    within = all(2 <= small and large <= LARGE[sign] for sign, small, large in found)
    easy = all(large <= EASY[sign] for sign, _, large in found)
    sides = {side(fact) for fact in found}
    return within and (level == 2 or easy == (level == 0)) and len(sides) == 1 and split in ("all", *sides)


def facts(split: str, seed: int, limit: int) -> list[Problem]:
    """As `arithmetic`, but no fact of one split is in the other, in any wording; the levels are mixed as LEVELS says.
    ValueError where the templates can't give as many."""
    draw = random.Random(f"facts {split} {seed}")
    problems, seen = [], set()
    while len(problems) < limit:
        level = LEVELS[len(problems) % len(LEVELS)]
        for _ in range(5000):                           # else the level's problems are used up
            kind, text = wording(draw, level)
            x = numbers_of(draw, text, level, split)
            if numbered_template(text, x) not in seen:
                break
        else:
            raise ValueError(f"facts has hardly more than {len(problems)} {split} problems; lower the limit")
        seen.add(numbered_template(text, x))
        problems.append(told(kind, text, x, draw, level))
    return problems


def wording(draw: random.Random, level: int) -> tuple[str, str]:
    """The kind and the template of a problem of the level."""
    kind = draw.choices(list(FACT_KINDS), FACT_KINDS.values())[0] if level < 2 else "two-step"
    rows = [row for row in TEMPLATES[kind] if not row[1].startswith(LEFT_OUT)]
    _, text = draw.choices(rows, [BARE if weight == BARE else STORY for weight, _ in rows])[0]
    return kind, text


def numbers_of(draw: random.Random, text: str, level: int, split: str) -> dict[str, int]:
    """Numbers for a template, drawn again until its facts are of the level and the split."""
    top = LARGE if level == 1 else EASY
    while True:
        x = {key: draw.randint(2, top["+"]) for key in "abc"} | {key: draw.randint(2, top["*"]) for key in "pq"}
        x |= {"s": x["a"] + x["b"], "d": x["p"] * x["q"]}
        if facts_fit(facts_of(text, x), level, split):
            return x


# ----------------------------------------------------------------------------------------------------------------------
# Files and the hub


def gold_of(text: str) -> str:
    """GSM8K writes the solution, then `#### gold`; elsewhere the answer is the gold."""
    return text.rsplit("####", 1)[-1].strip()


def from_row(where: str, row: dict, stem: str, number: int) -> Problem:
    question, answer = row.get("question") or row.get("problem"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: no `question` (or `problem`); give it one, or remove the line")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not gold_of(str(answer)):
        raise ValueError(f"{where}: no `answer`; give it the gold as text or number, or remove the line")
    kind = str(row.get("kind") or row.get("type") or row.get("subject") or stem)
    name = str(next(x for x in (row.get("id"), row.get("unique_id"), number) if x not in (None, "")))
    return Problem(question.strip(), gold_of(str(answer)), name, kind)


def from_file(path: Path, split: str) -> list[Problem]:
    rows = [(from_row(where, row, path.stem, number), row.get("split"))
            for number, where, row in numbered(path, "question and answer")]
    if not rows:
        raise ValueError(f"{path} holds no problem; give lines with question and answer")
    if split == "all":
        return [problem for problem, _ in rows]
    named = sum(part is not None for _, part in rows)
    if 0 < named < len(rows):                           # which of the rest may be trained on would be a guess
        raise ValueError(f"{path}: {named} of {len(rows)} problems have a `split`; give one to all or to none")
    cut = len(rows) * 7 // 10
    return [p for i, (p, part) in enumerate(rows) if (part or ("train" if i < cut else "test")) == split]


HUB = {                                                 # task -> hub id, configuration, our split -> theirs
    "svamp": ("ChilleD/SVAMP", None, {"train": "train", "test": "test"}),
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math": ("EleutherAI/hendrycks_math", "*", {"train": "train", "test": "test"}),
    "math500": ("HuggingFaceH4/MATH-500", None, {"test": "test"}),
}


def from_hub(task: str, split: str) -> list[Problem]:
    """Raises ValueError with what to do where the hub can't be reached or the task has no such split."""
    name, configuration, splits = HUB[task]
    if split not in splits:
        raise ValueError(f"task {task} has no {split} split; train on another task and evaluate on this one")
    try:
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)            # its retries would hide our one line
        parts = datasets.get_dataset_config_names(name) if configuration == "*" else [configuration]
        loaded = [datasets.load_dataset(name, part, split=splits[split]) for part in parts]
    except ImportError as error:
        raise ValueError(f"task {task} needs a package: pip install {error.name}; or pass a file: --task FILE.jsonl "
                         "with question and answer") from error
    except Exception as error:                          # network, hub and parser each raise their own kinds
        raise ValueError(f"cannot fetch {name} from the hub ({type(error).__name__}); check the network, "
                         f"or pass a file: --task FILE.jsonl with question and answer") from error
    rows = [row for turn in itertools.zip_longest(*loaded) for row in turn if row]     # the first n: of all parts
    problems = [problem_of(task, row, i) for i, row in enumerate(rows)]
    return [problem for problem in problems if problem]


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


# ----------------------------------------------------------------------------------------------------------------------


GENERATED = {"arithmetic": arithmetic, "facts": facts}


def load(task: str, split: str = "test", seed: int = 0, limit: int | None = None) -> list[Problem]:
    """The problems of a task's split ("train" | "test" | "all"): `arithmetic`, `facts`, a hub task, or a .jsonl file.

    Generated tasks give `limit` problems (600 for training, 200 else). Raises ValueError in one line.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: give train, test or all")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves no problem: give 1 or more")
    if task in GENERATED:
        return GENERATED[task](split, seed, limit or (600 if split == "train" else 200))
    if task in HUB:
        problems = from_hub(task, split)
    elif task.endswith(".jsonl"):
        if not Path(task).is_file():
            raise ValueError(f"no file {task}: give the path of a .jsonl file with question and answer")
        problems = from_file(Path(task), split)
    else:
        known = [*GENERATED, *HUB]
        close = difflib.get_close_matches(task, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown task {task!r}: give one of {', '.join(known)} or a .jsonl file{hint}")
    if not problems:
        raise ValueError(f"{task} has no problem in its {split} split")
    return problems[:limit]


def batch(problems: list[Problem], step: int, size: int, seed: int, rounds: int = 1) -> list[Problem]:
    """The `size` problems of training step `step`: a function of (seed, step), the same for every arm.

    Epochs are shuffled anew; a step may end one epoch and open the next. Every LEVEL_STEPS steps the next level of
    problems is open too, and the stream is one of all that are open; most tasks have one level. rounds: that a
    training step may take, where `step` counts rounds (dynamic sampling).
    """
    levels = sorted({problem.level for problem in problems})
    last = levels[min(step // (LEVEL_STEPS * rounds), len(levels) - 1)]
    problems = [problem for problem in problems if problem.level <= last]

    def shuffled(epoch: int) -> list[Problem]:
        return random.Random(f"order {seed} {epoch}").sample(problems, len(problems))

    at = range(step * size, (step + 1) * size)
    orders = {epoch: shuffled(epoch) for epoch in {i // len(problems) for i in at}}
    return [orders[i // len(problems)][i % len(problems)] for i in at]


def main() -> None:
    p = Parser(description="Print problems of a task.")
    p.add_argument("--task", default="arithmetic", help="arithmetic, facts, svamp, gsm8k, math, math500 or a file")
    p.add_argument("--split", default="train", choices=["train", "test", "all"])
    p.add_argument("--limit", type=int, default=10, help="how many")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    for problem in load(args.task, args.split, args.seed, args.limit):
        print(f"[{problem.kind}] {problem.question}  ->  {problem.answer}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        sys.exit(2)
