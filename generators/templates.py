"""generators/templates.py: small sums, bare ("What is 3 + 4?") or told as a story.

{a}, {b}, {c}, {p}, {q} are numbers, {s} = a + b, {d} = p * q; {n} and {m} are names, {o} objects.
"""

import random
import zlib

NAMES = """Ada Ben Clara David Emma Felix Grace Hugo Iris Jonas Kira Liam Mona Noah Olga Paul Quinn
Rosa Sam Tessa Umar Vera Will Xenia Yusuf Zoe""".split()
OBJECTS = """apples pens books coins cards shells marbles stickers buttons cookies stamps balloons
pencils candles beads oranges ribbons keys spoons feathers""".split()

BARE, ONE = 4, 3                                        # weights of a bare sum and of a story

TEMPLATES = {
    "add": [
        (BARE, "What is {a} + {b}?"),
        (BARE, "Add {a} and {b}."),
        (BARE, "What is the sum of {a} and {b}?"),
        (BARE, "Calculate {a} plus {b}."),
        (ONE, "{n} has {a} {o} and buys {b} more. How many {o} does {n} have now?"),
        (ONE, "There are {a} {o} in a box and {b} {o} on the table. "
              "How many {o} are there in all?"),
        (ONE, "{n} found {a} {o} and {m} found {b} {o}. How many {o} did they find together?"),
        (ONE, "A shop sold {a} {o} on Monday and {b} {o} on Tuesday. "
              "How many {o} did it sell in total?"),
        (ONE, "{n} read {a} pages yesterday and {b} pages today. How many pages did {n} read?"),
        (ONE, "{n} is {a} years old. How old will {n} be in {b} years?"),
        (ONE, "A train has {a} passengers. At the next stop {b} more get on. "
              "How many passengers are on it now?"),
    ],
    "subtract": [
        (BARE, "What is {s} - {b}?"),
        (BARE, "Subtract {b} from {s}."),
        (BARE, "What is {s} minus {b}?"),
        (BARE, "What is the difference between {s} and {b}?"),
        (ONE, "{n} had {s} {o} and gave {b} of them to {m}. How many {o} does {n} have left?"),
        (ONE, "There were {s} {o} in a bowl. {n} took {b} of them. How many {o} remain?"),
        (ONE, "{n} has {s} {o} and {m} has {b} {o}. How many more {o} does {n} have than {m}?"),
        (ONE, "A book has {s} pages. {n} has read {b} of them. How many pages are left?"),
        (ONE, "{n} wants to collect {s} {o} and has {b} so far. How many more does {n} need?"),
        (ONE, "A bus carries {s} people and {b} of them get off. How many people stay on the bus?"),
        (ONE, "A rope is {s} metres long. {n} cuts off {b} metres. "
              "How many metres of rope are left?"),
    ],
    "multiply": [
        (BARE, "What is {p} times {q}?"),
        (BARE, "What is {p} * {q}?"),
        (BARE, "Multiply {p} by {q}."),
        (BARE, "What is the product of {p} and {q}?"),
        (ONE, "There are {p} boxes with {q} {o} in each. How many {o} are there?"),
        (ONE, "{n} buys {p} packs of {o}. Each pack holds {q}. How many {o} does {n} buy?"),
        (ONE, "A ticket costs {p} dollars. How many dollars do {q} tickets cost?"),
        (ONE, "{n} runs {p} miles every day. How many miles does {n} run in {q} days?"),
        (ONE, "A garden has {p} rows of {q} trees. How many trees are in the garden?"),
        (ONE, "{n} earns {p} dollars an hour. How many dollars does {n} earn in {q} hours?"),
    ],
    "divide": [
        (BARE, "What is {d} divided by {q}?"),
        (BARE, "What is {d} / {q}?"),
        (BARE, "Divide {d} by {q}."),
        (ONE, "{n} shares {d} {o} equally among {q} friends. How many {o} does each friend get?"),
        (ONE, "{d} {o} are packed into bags of {q}. How many bags are needed?"),
        (ONE, "{q} tickets cost {d} dollars in total. How many dollars does one ticket cost?"),
        (ONE, "{n} reads {q} pages a day. How many days does a book of {d} pages take?"),
        (ONE, "A baker puts {d} rolls on {q} trays, the same number on each. "
              "How many rolls are on a tray?"),
    ],
    "two-step": [
        (ONE, "{n} has {a} {o}, buys {b} more and then loses {c}. How many {o} does {n} have now?"),
        (BARE, "What is {a} + {b} - {c}?"),
        (BARE, "What is {p} * {q} + {c}?"),
        (ONE, "There are {p} boxes with {q} {o} each and {c} loose {o}. "
              "How many {o} are there in all?"),
        (ONE, "{n} bought {p} tickets for {q} dollars each and a drink for {c}. "
              "How many dollars did {n} spend?"),
        (ONE, "{n} had {s} {o}, gave away {b} and then found {c} more. "
              "How many {o} does {n} have now?"),
        (ONE, "{n} and {m} have {a} and {b} {o}. Together they give {c} away. "
              "How many {o} are left?"),
        (ONE, "A shop has {p} shelves with {q} books each. It sells {c} books. "
              "How many books are left?"),
    ],
}


def first_step(text: str, x: dict[str, int]) -> int:
    """What the first step of a two-step template comes to with the numbers x."""
    if "{p}" in text:
        return x["p"] * x["q"]
    return x["s"] - x["b"] if "{s}" in text else x["a"] + x["b"]


def gold(kind: str, text: str, x: dict[str, int]) -> int:
    """The answer of a template with the numbers x."""
    if kind != "two-step":
        return {"add": x["s"], "subtract": x["a"], "multiply": x["d"], "divide": x["p"]}[kind]
    more = any(word in text for word in ("+ {c}", "loose", "drink", "found"))
    return first_step(text, x) + (x["c"] if more else -x["c"])


def numbered_template(text: str, x: dict[str, int]) -> str:
    """A template and the numbers that it uses: what makes a problem another one."""
    return text + "".join(f" {key}={x[key]}" for key in "absdpqc" if f"{{{key}}}" in text)


def told(kind: str, text: str, x: dict[str, int], draw: random.Random, level: int = 0) -> tuple:
    """The row of a template and its numbers, with names and objects drawn."""
    n, m = draw.sample(NAMES, 2)
    question = text.format(**x, n=n, m=m, o=draw.choice(OBJECTS))
    name = f"{kind}-{zlib.crc32(numbered_template(text, x).encode()):08x}"
    return question, str(gold(kind, text, x)), name, kind, level
