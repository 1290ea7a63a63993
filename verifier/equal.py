"""verifier/equal.py: are two trees (parse.py) the same answer, by this project's conventions?

Structure only; numbers and functions are left to value.py. For the conventions see `same`.
Left out: unit conversion (1 m is not 100 cm), solving equations, rounding (0.333 is not 1/3),
number bases converted.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

from verifier.relations import (
    FLIPPED,
    bounded_variables,
    ends_at,
    interval,
    join_inequalities,
    split,
)
from verifier.text import UNITS, NotMath, TooBig, unit_name
from verifier.value import Effort, approximate, base_value, count, scalars_equal, symbols


def same(gold, answer, effort: Effort) -> bool:
    """Whether `answer` is `gold` by the project's conventions. Raises TooBig, Undecided, NotMath.

    Units: missing or added is accepted, different is wrong; 50% is 0.5 or 50. Names: `x=5` is 5,
    `f(x)=2x` is 2x. Ordered: tuples, intervals, matrices. Unordered: sets, unions, plus-minus pairs
    and bare lists. Inequalities are intervals. A number in base b is only itself in base b.
    """
    bounded = [names for names in map(bounded_variables, (gold, answer)) if names]
    if len(bounded) == 2 and bounded[0] != bounded[1]:
        return False  # x > 2 is not y > 2
    gold, answer = canonical(gold), canonical(answer)
    if gold == answer:
        return True
    if "unit" in (gold[0], answer[0]):
        return _same_with_units(gold, answer, effort)
    if "percent" in (gold[0], answer[0]):
        return _same_percent(gold, answer, effort)
    if "rel" in (gold[0], answer[0]):
        return _same_relation(gold, answer, effort)
    if gold[0] in ("list", "set") or answer[0] in ("list", "set"):
        return _same_items(gold, answer, effort)
    if "union" in (gold[0], answer[0]) or "minus" in (gold[0], answer[0]):
        return _same_pieces(gold, answer, effort)
    if "ratio" in (gold[0], answer[0]):
        return _same_ratio(gold, answer, effort)
    if {gold[0], answer[0]} & {"tuple", "matrix", "base", "text"}:
        return _same_structure(gold, answer, effort)
    if ("const", "inf") in (gold, answer, gold[-1], answer[-1]):
        return False  # infinities are equal as trees or not at all
    return scalars_equal(gold, answer, effort)


def canonical(node):
    """Moves units outward, expands plus-minus. Inequalities become intervals, nested
    lists matrices."""
    op, *args = node
    if op == "degree":
        return ("unit", args[0], "degree")
    if op == "neg" and args[0][0] == "matrix":
        op, args = "mul", [args[0], ("num", Fraction(-1))]
    if op in ("mul", "div") and args[1][0] == "degree":  # 270/7 degrees
        return ("unit", (op, args[0], args[1][1]), "degree")
    if op == "neg" and args[0][0] in ("unit", "percent", "degree"):
        inner = canonical(args[0])
        return (inner[0], ("neg", inner[1]), *inner[2:])
    if op == "base" and args[1] == "10":
        return ("num", Fraction(args[0]))
    if op in ("list", "set"):
        items = [choice for item in args for choice in _choices(item)]
        return join_inequalities((op, *items)) if op == "list" else (op, *items)
    if op == "rel":
        return interval(node) or node
    square = ("tuple", "[", "]")
    if node[:3] == square and args[2:] and all(a[:3] == square for a in args[2:]):
        rows = [a[3:] for a in args[2:]]
        return ("matrix", *rows) if len({len(row) for row in rows}) == 1 else node
    if op in ("mul", "div") and "matrix" in (args[0][0], args[1][0]):
        matrix, scalar = args if args[0][0] == "matrix" else args[::-1]
        return ("matrix", *(tuple((op, entry, scalar) for entry in row) for row in matrix[1:]))
    if op != "union":
        variants = _choices(node)
        return ("list", *variants) if len(variants) > 1 else node
    return node


def _choices(node) -> list:
    """Every reading of a tree with plus-minus signs; beside a minus-plus the signs are linked."""
    slots = count(node, "pm", "mp")
    if not slots or node[0] == "rel":
        return [node]
    if slots > 4:
        raise TooBig("plus-minus signs")
    linked = count(node, "mp") > 0
    signs = [(s,) * slots for s in (1, -1)] if linked else itertools.product((1, -1), repeat=slots)
    return [_pick(node, list(choice)) for choice in signs]


def _pick(node, signs: list):
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] in ("pm", "mp"):
        sign = signs.pop() * (1 if node[0] == "pm" else -1)
        args = [_pick(a, signs) for a in node[1:]]
        if len(args) == 2:
            return ("add" if sign > 0 else "sub", *args)
        return args[0] if sign > 0 else ("neg", args[0])
    return tuple(_pick(a, signs) for a in node)


# -- units, percents, ratios -----------------------------------------------------------------------


def _same_with_units(gold, answer, effort) -> bool:
    letter = answer[2][1] if answer[0] == "mul" and answer[2][0] == "sym" else ""
    if gold[0] == "unit" and unit_name(gold[2]) == UNITS.get(letter):
        answer = ("unit", answer[1], letter)  # 12m, where metres were asked for
    units = [unit_name(n[2]) for n in (gold, answer) if n[0] == "unit"]
    if len(units) == 2 and units[0] != units[1] and "unit" not in [u.split("^")[0] for u in units]:
        return False
    return same(*(n[1] if n[0] == "unit" else n for n in (gold, answer)), effort)


def _same_percent(gold, answer, effort) -> bool:
    if gold[0] == answer[0]:
        return same(gold[1], answer[1], effort)
    percent, plain = (gold, answer) if gold[0] == "percent" else (answer, gold)
    if same(plain, ("div", percent[1], ("num", Fraction(100))), effort):
        return True
    if percent is answer and plain[0] == "num" and abs(plain[1]) <= 1:
        return False  # 0.5% for 0.5 is an error, 50% for 50 an added unit
    return same(plain, percent[1], effort)


def _same_ratio(gold, answer, effort) -> bool:
    if gold[0] != answer[0]:
        ratio, plain = (gold, answer) if gold[0] == "ratio" else (answer, gold)
        return len(ratio) == 3 and plain[0] == "div" and same(("div", *ratio[1:]), plain, effort)
    if len(gold) != len(answer) or ("num", 0) in gold + answer:
        return False
    pairs = zip(gold[2:], answer[2:], strict=True)
    return all(same(("div", g, gold[1]), ("div", a, answer[1]), effort) for g, a in pairs)


# -- relations -------------------------------------------------------------------------------------


def _same_relation(gold, answer, effort) -> bool:
    g, a = split(gold), split(answer)
    if g and a and len(gold) == len(answer) == 4 and (g[0] is None or a[0] is None or g[0] != a[0]):
        return (g[0] is None or bool(symbols(g[1][-1]))) and _same_curve(gold, answer, effort)
    if (gold[0] == "rel" and not g) or (answer[0] == "rel" and not a):
        return _same_inequality(gold, answer, effort)
    if (g and g[0] is None and symbols(gold)) or (a and a[0] is None and symbols(answer)):
        return False  # 2x = 10 is not 10
    if g and a and g[0] and a[0] and g[0] != a[0]:
        return False
    goal = g[1][-1] if g else gold
    return all(same(goal, value, effort) for value in (a[1] if a else [answer]))


def _same_inequality(gold, answer, effort) -> bool:
    if gold[0] != answer[0] or len(gold) != len(answer):
        return False
    if gold[1] != answer[1]:
        ops = tuple(FLIPPED.get(o, o) for o in reversed(answer[1]))
        answer = ("rel", ops, *reversed(answer[2:]))
    return gold[1] == answer[1] and _same_each(gold[2:], answer[2:], effort)


def _same_each(gold, answer, effort) -> bool:
    return all(same(g, a, effort) for g, a in zip(gold, answer, strict=True))


def _same_curve(gold, answer, effort) -> bool:
    """Two equations describe one curve if their residuals' quotient is a constant other than 0."""
    p, q = (("sub", n[2], n[3]) for n in (gold, answer))
    names = sorted(symbols(p) | symbols(q))
    env = {n: ("num", Fraction(effort.rng.randint(101, 999), 100)) for n in names}
    p0, q0 = _substitute(p, env), _substitute(q, env)
    zero = ("num", Fraction(0))
    if scalars_equal(p0, zero, effort) or scalars_equal(q0, zero, effort):
        return False
    return scalars_equal(("mul", p, q0), ("mul", q, p0), effort)


def _substitute(node, env):
    if node[0] == "sym":
        return env[node[1]]
    return tuple(_substitute(a, env) if isinstance(a, tuple) and a else a for a in node)


# -- intervals -------------------------------------------------------------------------------------


def _same_pieces(gold, answer, effort) -> bool:
    g, a = _merge(_pieces(gold)), _merge(_pieces(answer))
    if len(g) != len(a):
        return False
    return all(x[:2] == y[:2] and _same_each(x[2:], y[2:], effort)
               for x, y in zip(g, a, strict=True))


def _pieces(node) -> list:
    """A union (or difference with a finite set) as a list of (opening, closing, low, high)."""
    node = canonical(node)
    if node[0] == "union":
        return [piece for part in node[1:] for piece in _pieces(part)]
    if node[0] == "tuple" and len(node) == 5:
        return [node[1:]]
    if node[0] == "set":
        return [("[", "]", item, item) for item in node[1:]]
    if node[0] == "minus" and node[2][0] == "set":
        pieces = _pieces(node[1])
        for point in canonical(node[2])[1:]:
            pieces = [part for piece in pieces for part in _without_point(piece, point)]
        return pieces
    raise NotMath("not a set of numbers")


def _without_point(piece, point) -> list:
    opening, closing, low, high = piece
    if not ends_at(low) < ends_at(point) < ends_at(high):
        return [piece]
    return [(opening, ")", low, point), ("(", closing, point, high)]


def _merge(pieces: list) -> list:
    merged: list = []
    for piece in sorted(pieces, key=lambda p: (ends_at(p[2]), p[0] != "[")):
        opening, closing, low, high = piece
        if merged:
            last = merged[-1]
            gap = ends_at(low) - ends_at(last[3])
            if gap < 0 or (gap == 0 and (opening == "[" or last[1] == "]")):
                end, last_end = ends_at(high), ends_at(last[3])
                wider = end > last_end or (end == last_end and closing == "]")
                merged[-1] = (last[0], closing, last[2], high) if wider else last
                continue
        merged.append(piece)
    return merged


# -- collections -----------------------------------------------------------------------------------


def _same_items(gold, answer, effort) -> bool:
    if not {gold[0], answer[0]} <= {"list", "set"}:
        return False
    (g_kind, *g), (a_kind, *a) = (_without_name(n) for n in (gold, answer))
    if g_kind == "names" and a_kind != "names" and answer[0] == "list":
        return _same_without_labels(g, a, effort)
    if (g_kind == "names") != (a_kind == "names"):
        return False  # 1, 2 is not x=1, y=2
    if len(g) > 60 or len(a) > 60:
        raise TooBig("items")
    if "set" in (gold[0], answer[0]):
        g, a = _distinct(g, effort), _distinct(a, effort)
    if len(g) != len(a):
        return False
    if gold[0] == answer[0] == "list" and _is_sequence(gold[1:]):
        return _same_each(g, a, effort)
    for item in g:
        match = next((i for i, other in enumerate(a) if same(item, other, effort)), None)
        if match is None:
            return False
        a.pop(match)
    return True


def _same_without_labels(gold: list, answer: list, effort) -> bool:
    """AB=4, CD=5 is 4, 5, in this order; but x=1, y=2 is not 1, 2: unknowns must be named."""
    splits = [split(item) for item in gold]
    if len(gold) != len(answer) or None in splits or any(
            name is None or name[0] == "sym" and len(name[1]) == 1 for name, _ in splits):
        return False
    return _same_each([values[-1] for _, values in splits], answer, effort)


def _is_sequence(items) -> bool:
    """Do numbers go up and down? Then their order says something; sorted, they read as a set."""
    if len(items) < 3 or any(symbols(item) or item[0] not in ("num", "neg", "div")
                             for item in items):
        return False
    values = [approximate(item) for item in items]
    return values not in (sorted(values), sorted(values, reverse=True))


def _distinct(items: list, effort) -> list:
    kept: list = []
    for item in items:
        if not any(same(item, other, effort) for other in kept):
            kept.append(item)
    return kept


def _without_name(node):
    """x=1, x=2 is 1, 2; x=1, y=2 keeps its names."""
    splits = [split(item) for item in node[1:]]
    names = {s[0] for s in splits if s}
    if len(names) > 1:
        return ("names", *node[1:])
    if not names or None in names or splits[0] is None:
        return node
    items = [s[1][-1] if s else item for s, item in zip(splits, node[1:], strict=True)]
    return (node[0], *[choice for item in items for choice in _choices(item)])


def _same_structure(gold, answer, effort) -> bool:
    if gold[0] != answer[0] or len(gold) != len(answer):
        return False
    if gold[0] == "text":
        return gold[1] == answer[1]
    if gold[0] == "base":
        return gold[2] == answer[2] and base_value(*gold[1:]) == base_value(*answer[1:])
    if gold[0] == "tuple":
        return gold[1:3] == answer[1:3] and _same_each(gold[3:], answer[3:], effort)
    return all(len(g) == len(a) and _same_each(g, a, effort)
               for g, a in zip(gold[1:], answer[1:], strict=True))
