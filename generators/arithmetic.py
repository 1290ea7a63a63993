"""generators/arithmetic.py: a template, names, objects and numbers, drawn from a seed.

Train and test are disjoint: a hash of the template and its numbers (not of the names) decides the
split, whatever the seed. But a test problem may be another wording of a trained one; facts.py
holds out more.
"""

import random
import zlib

from generators.templates import TEMPLATES, numbered_template, told

KINDS = {"add": 3, "subtract": 3, "multiply": 3, "divide": 3, "two-step": 1}    # their weights


def arithmetic(split: str, seed: int, limit: int) -> list[tuple]:
    """`limit` distinct problems of a split ("train", "test" or "all"): a function of (split, seed).

    A larger limit only adds to them. ValueError where the templates can't give as many.
    """
    choices, often = [], []
    for kind, rows in TEMPLATES.items():
        choices += [(kind, text) for _, text in rows]
        total = sum(weight for weight, _ in rows)
        often += [KINDS[kind] * weight / total for weight, _ in rows]
    draw = random.Random(f"arithmetic {split} {seed}")
    problems, seen, misses = [], set(), 0
    while len(problems) < limit:
        misses += 1
        if misses > 5000:                               # so many draws in a row were all known
            raise ValueError(f"arithmetic has hardly more than {len(problems)} {split} problems; "
                             "lower the limit (--eval-problems, or --limit)")
        kind, text = draw.choices(choices, often)[0]
        x = {key: draw.randint(2, 8 if key == "a" else 6) for key in "abpq"}
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
