"""generators/facts.py: the same templates, but what is held out is a fact, in any wording.

A fact is what two numbers make: 7 + 5, 5 + 7, 12 - 5 and 12 - 7 are one. A hash of it decides the
split, so no fact of the test is seen in training. Problems have levels; training opens one after
another (tasks.batch). The embedded model solves about 0.3 of the mix greedily before any training:
enough to learn from, and room above.
"""

import random
from functools import cache

from generators.templates import BARE, TEMPLATES, first_step, gold, numbered_template, told

EASY, LARGE = {"+": 12, "*": 9}, {"+": 49, "*": 12}     # largest number of an easy fact, of any
LEVELS = (0, 0, 1, 0, 0, 0, 1, 0, 0, 2)                 # of ten: easy, larger numbers, two steps
KINDS = {"add": 4, "subtract": 1, "multiply": 6, "divide": 1}       # weights of those of one step
LEFT_OUT = ("Add", "{n} is", "A train", "A ticket", "A garden")     # hardly ever solved by it
STORY = 1                                               # weight of a story, beside BARE


def facts(split: str, seed: int, limit: int) -> list[tuple]:
    """As `arithmetic`, but no fact of one split is in the other; levels are mixed as in LEVELS.

    ValueError where the templates can't give as many.
    """
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
            raise ValueError(f"facts has hardly more than {len(problems)} {split} problems; "
                             "lower the limit (--eval-problems, or --limit)")
        seen.add(numbered_template(text, x))
        problems.append(told(kind, text, x, draw, level))
    return problems


def wording(draw: random.Random, level: int) -> tuple[str, str]:
    """The kind and the template of a problem of the level."""
    kind = draw.choices(list(KINDS), KINDS.values())[0] if level < 2 else "two-step"
    rows = [row for row in TEMPLATES[kind] if not row[1].startswith(LEFT_OUT)]
    _, text = draw.choices(rows, [BARE if weight == BARE else STORY for weight, _ in rows])[0]
    return kind, text


def numbers_of(draw: random.Random, text: str, level: int, split: str) -> dict[str, int]:
    """Numbers for a template, drawn again until its facts are of the level and the split."""
    top = LARGE if level == 1 else EASY
    while True:
        x = {key: draw.randint(2, top["+" if key in "abc" else "*"]) for key in "abcpq"}
        x |= {"s": x["a"] + x["b"], "d": x["p"] * x["q"]}
        if facts_fit(facts_of(text, x), level, split):
            return x


def facts_of(text: str, x: dict[str, int]) -> list[tuple[str, int, int]]:
    """The fact of each step of a template: ("+" or "*", smaller number, larger number).

    A fact stands for its inverse too: 12 - 5 is ("+", 5, 7).
    """
    sign, pair = ("*", (x["p"], x["q"])) if "{q}" in text else ("+", (x["a"], x["b"]))
    found = [(sign, *sorted(pair))]
    if "{c}" in text:                                   # the second step: first + c, or first - c
        smaller = min(first_step(text, x), gold("two-step", text, x))
        found.append(("+", *sorted((smaller, x["c"]))))
    return found


def facts_fit(found: list[tuple[str, int, int]], level: int, split: str) -> bool:
    """Are these facts of the level, and all on one side, that of the split?"""
    within = all(2 <= small and large <= LARGE[sign] for sign, small, large in found)
    easy = all(large <= EASY[sign] for sign, _, large in found)
    sides = {side(fact) for fact in found}
    right_level = level == 2 or easy == (level == 0)
    return within and right_level and len(sides) == 1 and split in ("all", *sides)


@cache
def side(fact: tuple[str, int, int]) -> str:
    """The split of a fact, whatever the seed; one in four is for the test."""
    draw = random.Random(f"held out {fact}")            # of a string: the same everywhere
    return "test" if draw.random() < 0.25 else "train"
