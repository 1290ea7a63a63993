"""verifier/relations.py: what an equation or an inequality says: a name and its value, an interval.

Trees in, trees out; nothing is compared here (equal.py does). An inequality is read as it is
written, up to a sign: -x > -1 is x < 1, but 2x > 4 is not yet x > 2: that is left to do.
"""

from __future__ import annotations

import math

from verifier.value import approximate, symbols

ORDER = {"<", "<=", ">", ">=", "!="}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
INF, MINUS_INF = ("const", "inf"), ("neg", ("const", "inf"))


def bounded_variables(node) -> set[str]:
    """The variables of an inequality or of a list of them."""
    if node[0] == "rel" and set(node[1]) <= ORDER:
        return symbols(node)
    if node[0] != "list":
        return set()
    return set().union(*(bounded_variables(item) for item in node[1:]))


def is_name(node) -> bool:
    """May this be the left side of `name = value`: x, AB, |AB|, f(x), V_1:V_2, \\text{Area}?"""
    if node[0] == "mul" and node[1][0] == "sym" and node[2][0] == "num":
        return node[1][1] in "fghFGHPpT"  # f(2)
    if node[:2] == ("mul", ("sym", "P")):
        return True  # P(X = 2)
    if node[:2] == ("fn", "abs"):
        return node[2][0] == "mul" and is_name(node[2])  # |AB| is a length; |x| = 1 is no value
    if node[0] in ("mul", "div", "pow", "tuple", "ratio"):
        parts = [a for a in node[1:] if isinstance(a, tuple)]
        return all(is_name(a) or a == ("neg", ("num", 1)) for a in parts)
    return node[0] in ("sym", "text", "const") and node != ("const", "inf")


def split(node):
    """An equation as (name or None, values that must all be the answer); None for anything else."""
    if node[0] != "rel" or not set(node[1]) <= {"=", "~", "in"}:
        return None
    parts, name = list(node[2:]), None
    if is_name(parts[0]):
        name = parts.pop(0)
    elif len(parts) == 2 and is_name(parts[1]):
        name = parts.pop()
    if name and name[:2] == ("fn", "abs"):
        name = name[2]
    if "~" in node[1][len(node) - 2 - len(parts):]:
        parts = parts[:1]
    return name, parts


def interval(node):
    """x > 2, 1 < x <= 3, x != 2 and x in S as sets; None for other relations."""
    ops, parts = node[1], node[2:]
    if ops == ("in",) and is_name(parts[0]):
        return parts[1]
    if len(ops) == 1 and parts[0][:2] == ("fn", "abs") and parts[0][2][0] == "sym":
        return absolute(ops[0], parts[1])
    if any(p[0] == "neg" and p[1][0] == "sym" for p in parts):  # -x > -1
        ops = tuple(FLIPPED.get(op, op) for op in ops)
        parts = [p[1] if p[0] == "neg" else ("neg", p) for p in parts]
    spots = [i for i, p in enumerate(parts) if _is_variable(p)]
    if len(spots) != 1 or any(symbols(p) for i, p in enumerate(parts) if i != spots[0]):
        return None
    if ops == ("!=",):
        value = parts[1 - spots[0]]
        return ("union", ("tuple", "(", ")", MINUS_INF, value), ("tuple", "(", ")", value, INF))
    if not (set(ops) <= {"<", "<="} or set(ops) <= {">", ">="}):
        return None
    if ops[0][0] == ">":
        ops, parts = [o.replace(">", "<") for o in reversed(ops)], parts[::-1]
    if len(parts) == 3 and _is_variable(parts[1]):
        ends = "[" if ops[0] == "<=" else "(", "]" if ops[1] == "<=" else ")"
        return ("tuple", *ends, parts[0], parts[2])
    if len(parts) != 2:
        return None
    if _is_variable(parts[0]):
        return ("tuple", "(", "]" if ops[0] == "<=" else ")", MINUS_INF, parts[1])
    return ("tuple", "[" if ops[0] == "<=" else "(", ")", parts[0], INF)


def _is_variable(node) -> bool:
    """x, or f(x): what an inequality may be about."""
    function = node[0] == "mul" and node[1][0] == node[2][0] == "sym" and node[1][1] in "fgh"
    return node[0] == "sym" or function


def absolute(op: str, bound):
    """|x| < a is (-a, a); |x| > a is everything else."""
    low = ("neg", bound)
    if op in ("<", "<="):
        return ("tuple", "[" if op == "<=" else "(", "]" if op == "<=" else ")", low, bound)
    if op in (">", ">="):
        outer = "]" if op == ">=" else ")", "[" if op == ">=" else "("
        left = ("tuple", "(", outer[0], MINUS_INF, low)
        return ("union", left, ("tuple", outer[1], ")", bound, INF))
    return None


def join_inequalities(node):
    """Inequalities: `x < 1 or x > 3` is a union; `x > 1, x < 3` overlap, so it is an interval."""
    inequalities = all(item[0] == "rel" and set(item[1]) <= ORDER for item in node[1:])
    if not inequalities or len(bounded_variables(node)) != 1:
        return node
    pieces = [interval(item) for item in node[1:]]
    if len(pieces) < 2 or any(p is None or p[0] == "union" for p in pieces):
        return node
    if len(pieces) == 2:
        low, high = sorted(pieces, key=lambda p: ends_at(p[3]))
        if low[4] != INF and high[3] == MINUS_INF:
            return node
        if low[3] == MINUS_INF and high[4] == INF and ends_at(high[3]) < ends_at(low[4]):
            return ("tuple", high[1], low[2], high[3], low[4])
    return ("union", *pieces)


def ends_at(node) -> float:
    if node in (INF, MINUS_INF):
        return math.inf if node == INF else -math.inf
    return approximate(node)
