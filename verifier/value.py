"""verifier/value.py: are two scalar trees (parse.py) the same number, or function of variables?

From cheap to dear. Nothing is started that cannot be finished:
  1. exact rational arithmetic (exact.py). With variables, at random rational points: a wrong
     identity survives one with probability <= degree / 10^6 (Schwartz 1980, Zippel 1979).
  2. Otherwise numbers to 60, then to 400 digits, with every magnitude within 10^+-300. What still
     agrees is equal.
  3. Where points could not decide, sympy on a tree of our own (in a worker process only).
Points are seeded by the texts compared: verdicts are reproducible, yet an answer cannot know them.
"""

from __future__ import annotations

import math
import random
import threading
from fractions import Fraction

from verifier.exact import OPERATIONS, Inexact, base_value, exact
from verifier.text import NotMath, TooBig

MAX_DECADES = 300  # |log10| of any value met in numeric evaluation


class Undecided(ValueError):
    """Points could not decide: too few of them are in both domains."""

class Effort:
    """What one comparison may spend: evaluations of nodes, and, in a worker only, sympy."""

    def __init__(self, seed: int, deep: bool = False):
        self.rng, self.deep, self.left = random.Random(seed), deep, 1_000_000 if deep else 20_000

    def spend(self, nodes: int) -> None:
        self.left -= nodes
        if self.left < 0:
            raise Undecided("effort")


# --------------------------------------------------------------------------------------------------
# Numbers to many digits


def numeric(node, env: dict, mp):
    """A tree's value at mp's precision. Raises TooBig, ZeroDivisionError, NotMath (no number)."""
    op, *args = node
    if op == "num":
        value = mp.mpf(args[0].numerator) / args[0].denominator
    elif op == "sym":
        value = env[args[0]]
    elif op == "const":
        value = {"pi": mp.pi, "e": mp.e, "i": mp.j}.get(args[0])
        if value is None:
            raise NotMath(args[0])
        value = +value
    elif op == "base":
        value = mp.mpf(base_value(*args))
    elif op == "fn":
        value = _numeric_function(args[0], [numeric(a, env, mp) for a in args[1:]], mp)
    elif op == "pow":
        value = _numeric_power(numeric(args[0], env, mp), numeric(args[1], env, mp), args[1], mp)
    elif op == "factorial":
        value = mp.factorial(_bounded(numeric(args[0], env, mp), 150))
    elif op == "degree":
        value = numeric(args[0], env, mp) * mp.pi / 180
    elif op == "factorial2":
        value = mp.fac2(_bounded(numeric(args[0], env, mp), 150))
    elif op in ("add", "sub"):
        value = _numeric_sum(*[numeric(a, env, mp) for a in args], op, mp)
    elif op in ("mul", "div", "neg", "percent"):
        value = OPERATIONS[op](*[numeric(a, env, mp) for a in args])
    else:
        raise NotMath(op)
    if value and not -MAX_DECADES < mp.mag(value) * math.log10(2) < MAX_DECADES:
        raise TooBig("magnitude")
    return value


def _numeric_sum(a, b, op: str, mp):
    """a + b or a - b. What cancels to the last digits is 0: that is noise, and no value."""
    total = a + b if op == "add" else a - b
    return total if abs(total) > mp.mpf(10) ** (20 - mp.dps) * max(abs(a), abs(b)) else mp.mpf(0)


def _bounded(argument, limit: int):
    if not abs(argument) <= limit:
        raise TooBig("argument")
    return argument


def _is_real(z, mp) -> bool:
    return abs(mp.im(z)) <= mp.mpf(10) ** (20 - mp.dps) * max(1, abs(z))


def _numeric_power(base, exponent, tree, mp):
    if not base:
        return mp.mpf(0) if mp.re(exponent) > 0 else 1 / mp.mpf(0)
    _bounded(exponent * mp.log(base), MAX_DECADES * 3)
    if _is_real(base, mp) and mp.re(base) < 0:  # (-8)^{1/3} is -2, as in school
        try:
            q = exact(tree, {})
        except (Inexact, KeyError):
            return base**exponent
        if q.denominator % 2:
            return mp.power(-mp.re(base), exponent) * (-1 if q.numerator % 2 else 1)
    return base**exponent


def _numeric_function(name: str, args: list, mp):
    x = args[0]
    if name == "root":
        degree = args[1]
        if _is_real(x, mp) and mp.re(x) < 0:
            whole = int(mp.re(degree))
            if degree == whole and whole % 2:
                return -mp.root(-mp.re(x), whole)
        return x ** (1 / degree)
    if name in ("log", "ln"):
        if len(args) > 1:
            return mp.log(x) / mp.log(args[1])
        return mp.log(x) / (mp.log(10) if name == "log" else 1)
    if name in ("abs", "floor", "ceil", "exp"):
        function = {"abs": abs, "floor": mp.floor, "ceil": mp.ceil, "exp": mp.exp}[name]
        return function(_bounded(x, MAX_DECADES * 3))
    if name == "binom":
        return mp.binomial(_bounded(x, 150), _bounded(args[1], 150))
    if name in _TRIGONOMETRY and len(args) == 1:
        return getattr(mp, _TRIGONOMETRY[name])(_bounded(x, MAX_DECADES * 3))
    raise NotMath(name)


_TRIGONOMETRY = {n: n for n in "sin cos tan cot sec csc sinh cosh tanh".split()}
_TRIGONOMETRY.update(arcsin="asin", arccos="acos", arctan="atan")


# --------------------------------------------------------------------------------------------------
# Two scalars


def symbols(node) -> set[str]:
    if node[0] == "sym":
        return {node[1]}
    return set().union(*(symbols(a) for a in node[1:] if isinstance(a, tuple) and a))


def count(node, *ops) -> int:
    """Nodes of a tree: those with one of `ops`, or all of them."""
    inside = sum(count(a, *ops) for a in node[1:] if isinstance(a, tuple) and a)
    return inside + (not ops or node[0] in ops)


def scalars_equal(a, b, effort: Effort) -> bool:
    """Equal as numbers, or as functions of their variables. Raises TooBig, Undecided or NotMath."""
    if a == b:
        return True
    names, nodes = sorted(symbols(a) | symbols(b)), count(a) + count(b)
    try:
        return _equal_exactly(a, b, names, nodes, effort)
    except (Inexact, TooBig):
        pass
    try:
        return _equal_numerically(a, b, names, nodes, effort)
    except Undecided:
        if not effort.deep:
            raise
        return _equal_by_sympy(a, b)


def _equal_exactly(a, b, names, nodes, effort: Effort) -> bool:
    """Whether two trees have the same rational value (`exact`), with variables at random points.

    names: all variables of both; a point gives each a `_rational(effort.rng)`. False at the first
    point where the values differ. With variables, 4 points that agree mean True, and at most 12 are
    tried; without, there is one point, the empty one, and it decides. Each costs
    `effort.spend(nodes)`. A point where a side is undefined (ZeroDivisionError) decides nothing; if
    none decides, Inexact is raised. Inexact and TooBig of `exact` are not caught here: the caller
    then tries another way.
    """
    agreed = 0
    for _ in range(12 if names else 1):
        effort.spend(nodes)
        env = {name: _rational(effort.rng) for name in names}
        try:
            if exact(a, env) != exact(b, env):
                return False
        except ZeroDivisionError:
            continue
        agreed += 1
        if agreed >= 4 or not names:
            return True
    raise Inexact("undefined")


def _rational(rng: random.Random) -> Fraction:
    return Fraction(rng.randint(-9999, 9999) or 1, rng.randint(1, 99))


def _equal_numerically(a, b, names, nodes, effort: Effort) -> bool:
    """Points of several scales and both signs, then integers.

    A point counts where both sides are real, or everywhere if i is in use.
    """
    mp, agreed, refusal = _context(), 0, None
    only_real = bool(names) and ("const", "i") not in _leaves(a) | _leaves(b)
    for scale in (1, 10, -1, -10, 3, 100, -3, 30, Fraction(1, 10), 0, 0, 0) if names else (1,):
        point = {n: Fraction(effort.rng.randint(1, 9999), 10000) * scale for n in names}
        if not scale:  # (-1)^n is real at integers only
            point = {n: Fraction(effort.rng.randint(1, 30)) for n in names}
        try:
            verdict = _equal_at(a, b, point, mp, only_real, nodes, effort)
        except ZeroDivisionError:
            if not names:
                raise
            continue
        except TooBig as error:
            refusal = error
            continue
        if verdict is False:
            return False
        agreed += verdict is True
        if agreed >= 3 or (agreed and not names):
            return True
    raise refusal or Undecided("too few points")


def _equal_at(a, b, point, mp, only_real: bool, nodes: int, effort: Effort) -> bool | None:
    """Whether a = b at a point to 40, then to 380 digits; None outside the real domain.

    The digits are relative to max(1, |a|, |b|).
    """
    for digits in (60, 400):
        effort.spend(nodes * digits // 12)
        mp.dps = digits
        env = {n: mp.mpf(v.numerator) / v.denominator for n, v in point.items()}
        x, y = numeric(a, env, mp), numeric(b, env, mp)
        if only_real and not (_is_real(x, mp) and _is_real(y, mp)):
            return None
        tolerance = mp.mpf(10) ** (20 - digits) * max(1, abs(x), abs(y))
        if not abs(x - y) <= tolerance:  # "not <=": a NaN is not equal
            return False
    return True


def _leaves(node) -> set:
    if not any(isinstance(a, tuple) for a in node[1:]):
        return {node}
    return set().union(*(_leaves(a) for a in node[1:] if isinstance(a, tuple) and a))


_LOCAL = threading.local()


def _context():
    """An mpmath context of this thread's own: the global one's precision is shared state."""
    if not hasattr(_LOCAL, "mp"):
        from mpmath.ctx_mp import MPContext

        _LOCAL.mp = MPContext()
    return _LOCAL.mp


def _equal_by_sympy(a, b) -> bool:
    """sympy, on a tree of our own: nothing of the answer's text reaches it."""
    import sympy

    difference = sympy.simplify(_to_sympy(a, sympy) - _to_sympy(b, sympy))
    if difference == 0:
        return True
    if difference.is_zero is False or difference.is_number:
        return False
    raise Undecided("sympy")


def _to_sympy(node, sympy):
    op, *args = node
    if op == "num":
        return sympy.Rational(args[0].numerator, args[0].denominator)
    if op == "sym":
        return sympy.Symbol("v" + "".join(f"{ord(c):x}" for c in args[0]), real=True)
    if op == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}[args[0]]
    if op == "base":
        return sympy.Integer(base_value(*args))
    name, terms = (args[0], args[1:]) if op == "fn" else (op, args)
    values = [_to_sympy(t, sympy) for t in terms]
    if name in ("add", "sub", "mul", "div", "neg", "percent"):
        return OPERATIONS[name](*values)
    if name not in _SYMPY:
        raise Undecided(name)
    return getattr(sympy, _SYMPY[name])(*values)


_SYMPY = {"pow": "Pow", "root": "root", "factorial": "factorial", "factorial2": "factorial2",
          "abs": "Abs", "ln": "log", "floor": "floor", "ceil": "ceiling", "exp": "exp",
          "binom": "binomial", "arcsin": "asin", "arccos": "acos", "arctan": "atan",
          **{n: n for n in _TRIGONOMETRY if n[:3] != "arc"}}


def approximate(node) -> float:
    """The real part of a constant tree, to double precision."""
    try:
        return float(exact(node, {}))
    except (Inexact, KeyError):
        mp = _context()
        mp.dps = 20
        return float(mp.re(numeric(node, {}, mp)))
