"""verifier/exact.py: the value of a tree (parse.py) as a rational number, if it is one.

Before every power, factorial and product its size is estimated: `TooBig` is raised, nothing hangs.
"""

from __future__ import annotations

import math
from fractions import Fraction

from verifier.text import NotMath, TooBig

MAX_BITS = 1 << 15  # of one exact integer; 2^30000 is compared exactly, 2^100000 is refused


class Inexact(ValueError):
    """The value is not a rational number, or not visibly so."""


def exact(node, env: dict[str, Fraction]) -> Fraction:
    """Value of a tree in the rationals. Raises Inexact, TooBig or ZeroDivisionError."""
    op, *args = node
    if op == "num":
        return args[0]
    if op == "sym":
        return env[args[0]]
    if op == "base":
        return Fraction(base_value(*args))
    if op == "fn":
        return _exact_function(args[0], [exact(a, env) for a in args[1:]])
    if op not in OPERATIONS:
        raise Inexact(op)
    return _sized(OPERATIONS[op](*[exact(a, env) for a in args]))


def _sized(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise TooBig("integer")
    return value


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    numerator = exponent.numerator
    if not base and numerator <= 0:
        raise ZeroDivisionError("0^0 and 0^-n are undefined")
    if abs(base) <= 1 and base.denominator == 1:
        numerator = 2 - numerator % 2  # 0, 1, -1: the parity is all that counts
    elif abs(numerator) * _bits(base) > MAX_BITS:
        raise TooBig("power")
    power = base**numerator
    if exponent.denominator == 1:
        return power
    return _exact_root(power, Fraction(exponent.denominator))


def _exact_root(value: Fraction, degree: Fraction) -> Fraction:
    """The real root of a perfect power; an odd root of a negative number is negative."""
    if degree.denominator != 1 or not 0 < degree <= 64 or (value < 0 and degree % 2 == 0):
        raise Inexact("root")
    parts = [integer_root(abs(p), int(degree)) for p in (value.numerator, value.denominator)]
    return Fraction(*parts) * (-1 if value < 0 else 1)


def integer_root(n: int, k: int) -> int:
    """The exact k-th root of n >= 0 by Newton's iteration; raises Inexact if there is none."""
    if n < 2:
        return n
    if k == 2:
        x = math.isqrt(n)
    else:
        x = 1 << -(-n.bit_length() // k)
        while (y := ((k - 1) * x + n // x ** (k - 1)) // k) < x:
            x = y
    return x if x**k == n else _inexact()


def _inexact(*_):
    raise Inexact


def _exact_factorial(n: Fraction, step: int = 1) -> Fraction:
    if n.denominator != 1 or n < 0:
        raise Inexact("factorial")
    if n > 2000:
        raise TooBig("factorial")
    return Fraction(math.prod(range(int(n), 0, -step)))


def _exact_binomial(n: Fraction, k: Fraction) -> Fraction:
    if n.denominator != 1 or k.denominator != 1 or n < 0:
        raise Inexact("binomial")
    if n > 2000:
        raise TooBig("binomial")
    return Fraction(math.comb(int(n), int(k)) if k >= 0 else 0)


def _exact_log(x: Fraction, base: Fraction | None = None) -> Fraction:
    """log_b x where it is a small fraction; base 10 where none is written."""
    base = Fraction(10) if base is None else base
    if x == 1 and base not in (0, 1):
        return Fraction(0)
    if x <= 0 or base <= 0 or base == 1:
        raise Inexact("log")
    guess = Fraction(math.log(x) / math.log(base)).limit_denominator(60)
    if max(abs(guess.numerator) * _bits(base), guess.denominator * _bits(x)) > MAX_BITS:
        raise Inexact("log")
    return guess if base**guess.numerator == x**guess.denominator else _inexact()


OPERATIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "neg": lambda a: -a, "percent": lambda a: a / 100,
    "pow": _exact_power, "factorial": _exact_factorial, "degree": _inexact,
    "factorial2": lambda n: _exact_factorial(n, 2),
}
_EXACT_FN = {
    "root": _exact_root, "abs": abs, "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)), "binom": _exact_binomial, "log": _exact_log,
}


def _exact_function(name: str, args: list[Fraction]) -> Fraction:
    if name not in _EXACT_FN:
        raise Inexact(name)
    try:
        return _sized(_EXACT_FN[name](*args))
    except TypeError as error:  # a wrong number of arguments
        raise NotMath(name) from error


def base_value(digits: str, base: str) -> int:
    if not base.isdigit() or not 2 <= int(base) <= 36:
        raise NotMath(f"base {base}")
    return int(digits, int(base))  # ValueError when a digit does not belong to the base
