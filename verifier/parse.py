"""verifier/parse.py: text or LaTeX -> a small expression tree, by recursive descent.

The tree is made of plain tuples, ("add", a, b). Its leaves are ("num", Fraction), ("sym", "x"),
("const", "pi"), ("text", "east"). An answer is data: no `eval` is called here, nor sympy's parsers.
Left out: sums, integrals, limits and derivatives, which no final answer should need.
"""

from __future__ import annotations

import re
from fractions import Fraction

from verifier.text import MULTIPLIERS, NotMath, TooBig, letters_of, multiplies, normalise
from verifier.text import plain_text as plain
from verifier.tokens import BASE_NAMES, GREEK, Tokens

MAX_DEPTH = 40  # of brackets, signs and exponents; past it an expression is TooBig

_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in",
              r"\approx": "~"}
_CLOSERS = {"(": ")]", "[": ")]", r"\{": r"\}", "|": "|", r"\langle": r"\rangle",
            r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_MONEY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
_ATOMS = {r"\pi": ("const", "pi"), r"\infty": ("const", "inf"), r"\emptyset": ("set",),
          r"\R": ("tuple", "(", ")", ("neg", ("const", "inf")), ("const", "inf"))}
_FACTOR_STARTS = {"(", "[", "{", "<fn>", r"\frac", r"\binom", r"\langle", r"\lfloor", r"\lceil",
                  r"\begin", *_ATOMS}
_MATRICES = ("matrix", "pmatrix", "bmatrix", "smallmatrix", "array")
_POSTFIX = {"!": "factorial", "!!": "factorial2", "%": "percent", r"\deg": "degree"}
_BASED = re.compile(                                    # 101_2, (2A)_{16}
    r"\(?((?=[A-F]*\d)[0-9A-F]+|[A-F]{2,}(?=\)?_\{?\(?16))\)?_\{?\(?(\d+)\)?\}?", re.I)
_REMARK = re.compile(
    r"\b(?:or|and|not|than|less|least|most|but|if|plus|minus|maybe|wrong|half)\b|\d|[不非否或]", re.I)


class _Parser(Tokens):
    """`depth` bounds the recursion; `bars` counts open |: inside one, a | closes."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.bars = 0

    # -- statements --------------------------------------------------------------------------------

    def items(self, *ends: str) -> list:
        """Comma-separated relations up to one of `ends`."""
        items = []
        while self.peek() not in ends:
            items.append(self.relation())
            if not self.accept(","):
                break
            while self.accept(","):  # "2, 3, and 5"
                pass
        return items

    def relation(self):
        parts, ops = [self.union()], []
        while self.peek() in _RELATIONS:
            ops.append(_RELATIONS[self.value()])
            parts.append(self.union())
        return ("rel", tuple(ops), *parts) if ops else parts[0]

    def union(self):
        node = self.ratio()
        while self.peek() in (r"\cup", r"\setminus"):
            node = ("union" if self.value() == r"\cup" else "minus", node, self.ratio())
        return node

    def ratio(self):
        parts = [self.sum()]
        while self.accept(":"):
            parts.append(self.sum())
        return ("ratio", *parts) if len(parts) > 1 else parts[0]

    def sum(self):
        node = self.term()
        while self.peek() in ("+", "-", r"\pm", r"\mp"):
            op = {"+": "add", "-": "sub", r"\pm": "pm", r"\mp": "mp"}[self.value()]
            node = (op, node, self.term())
        unit = self.unit()
        return ("unit", node, unit) if unit else node

    def unit(self) -> str:
        """What follows a value: `\\text{ cm}^2`, `miles per hour`, `€`, or ""."""
        words = []
        while self._unit_goes_on(bool(words)):
            if self.peek() in ("<text>", "<word>") and _REMARK.search(self.tokens[self.i][1]):
                raise NotMath("a remark, not a unit")
            words.append(_MONEY.get(self.peek()) or self.tokens[self.i][1])
            self.i += 1
        return " ".join(words)

    def _unit_goes_on(self, begun: bool) -> bool:
        """Words and money; once begun also the powers and slashes between them."""
        nxt = self.peek()
        if nxt in ("<text>", "<word>") or (nxt in _MONEY and self.i > 0):
            return True
        if not begun:
            return False
        if nxt in ("/", "*", "-", "."):
            return self.peek(1) in ("<text>", "<word>") or (nxt == "." and not self.peek(1))
        return nxt in ("^", "}") or (nxt in ("<num>", "{") and self.tokens[self.i - 1][1] in "^{-")

    # -- arithmetic --------------------------------------------------------------------------------

    def term(self):
        node = self.unary()
        while True:
            if self.accept("*"):
                node = ("mul", node, self.unary())
            elif self.accept("/"):
                node = ("div", node, self.unary())
            elif self.starts_factor():
                node = ("mul", node, self.power())
            else:
                return node

    def starts_factor(self) -> bool:
        """May an implicit product go on here? Not with a number, nor with what must be a unit."""
        nxt = self.peek()
        if nxt == "<num>":
            return self.tokens[self.i - 1][1] in ("!", "!!")  # 2!3!
        if nxt == "<word>":
            return multiplies(self.tokens[self.i][1], self.tokens[self.i][2])
        if nxt == "|":
            return self.bars == 0
        return nxt in _FACTOR_STARTS or nxt[1:] in GREEK

    def unary(self):
        sign = {"-": "neg", "+": "pos", r"\pm": "pm", r"\mp": "mp"}.get(self.peek())
        if not sign:
            return self.power()
        self.i += 1
        self.depth += 1
        self.check_depth()
        if sign == "neg" and self.peek() == "-":
            raise NotMath("--41 is a line, no sign")
        node = self.unary()
        self.depth -= 1
        return (sign, node) if sign != "pos" else node

    def check_depth(self) -> None:
        if self.depth > MAX_DEPTH:
            raise TooBig(f"deeper than {MAX_DEPTH}")

    def power(self):
        base = self.postfix(self.primary())
        if not self.accept("^"):
            return base
        self.depth += 1
        self.check_depth()
        exponent = self.group() if self.peek() == "{" else self.unary_exponent()
        self.depth -= 1
        return self.postfix(("pow", base, exponent))

    def unary_exponent(self):
        if self.accept("-"):
            return ("neg", self.unary_exponent())
        return self.power()

    def postfix(self, node):
        while self.peek() in _POSTFIX:
            node = (_POSTFIX[self.value()], node)
        return node

    def group(self):
        """{...}, also as an argument, where a bare number gives up one digit only: \\frac12."""
        if self.accept("{"):
            node = self.relation()
            if self.peek() in (r"\choose", r"\over"):
                op = ("fn", "binom") if self.value() == r"\choose" else ("div",)
                node = (*op, node, self.relation())
            if self.accept(","):                        # {1, 2} without backslashes
                node = ("set", node, *self.items("}"))
            self.expect("}")
            return node
        if self.peek() == "<num>":
            kind, digits, gap = self.tokens[self.i]
            if len(digits) > 1 and digits.isdigit():
                self.tokens[self.i] = (kind, digits[1:], False)
                return ("num", Fraction(digits[0]))
        return self.primary()

    # -- leaves and brackets -----------------------------------------------------------------------

    def primary(self):
        self.depth += 1
        self.check_depth()
        try:
            return self._primary()
        finally:
            self.depth -= 1

    def _primary(self):
        nxt = self.peek()
        if nxt == "<num>":
            return self.number()
        if nxt == "<word>":
            return self.word()
        if nxt == "<fn>":
            return self.function()
        if nxt == "<text>":
            return ("text", plain(self.value()))
        if nxt == "{":
            return self.group()
        if nxt in _CLOSERS:
            return self.bracket()
        if nxt in _MONEY:
            symbol = self.value()
            return ("unit", self.power(), _MONEY[symbol])
        if nxt in _ATOMS:
            self.i += 1
            return _ATOMS[nxt]
        if nxt == r"\begin":
            return self.matrix()
        if nxt in (r"\frac", r"\binom"):
            self.i += 1
            top, bottom = self.group(), self.group()
            return ("div", top, bottom) if nxt == r"\frac" else ("fn", "binom", top, bottom)
        if nxt[1:] in GREEK:
            self.i += 1
            return self.subscript(nxt[1:])
        raise NotMath(f"unexpected {nxt or 'end'}")

    def number(self):
        digits = self.value()
        if "." in digits and self.peek() in (r"\overline", r"\bar"):
            return self.repeating(digits)
        if len(digits) > 1000:
            raise TooBig(f"{len(digits)} digits")
        node = ("num", Fraction(digits))
        if self.accept("_"):
            return ("base", digits, self.base_name())
        mixed = self._mixed_part() if digits.isdigit() else None
        return ("num", node[1] + mixed) if mixed is not None else node

    def base_name(self) -> str:
        braced, parened = self.accept("{"), self.accept("(")
        name = self.value()
        if parened:
            self.expect(")")
        if braced:
            self.expect("}")
        return BASE_NAMES.get(name.lower().strip("()"), name.strip("()"))

    def _mixed_part(self) -> Fraction | None:
        """The fraction of `1\\frac{4}{5}` or `1 4/5`, if a proper one of plain integers follows."""
        rest = self.tokens[self.i : self.i + 8]
        text = "".join(t[1] for t in rest)
        kinds = [t[0] for t in rest[:3]]
        match = re.match(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", text)
        if match:
            top, bottom = int(match[1] or match[2]), int(match[3] or match[4])
        elif kinds == ["num", "op", "num"] and rest[0][2] and rest[1][1] == "/":
            top, bottom = (int(t[1]) if t[1].isdigit() else 0 for t in (rest[0], rest[2]))
        else:
            return None
        if not 0 < top < bottom:
            raise NotMath("neither a mixed number nor clearly a product")
        if match:
            self.i += 1
            self.group(), self.group()
        else:
            self.i += 3
        return Fraction(top, bottom)

    def repeating(self, digits: str):
        self.i += 1
        self.expect("{")
        cycle = self.value()
        self.expect("}")
        places = len(digits.partition(".")[2])
        if not cycle.isdigit() or len(cycle) + places > 100:
            raise NotMath("repeating decimal")
        part = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**places)
        return ("num", Fraction(digits + "0") + part)

    def word(self):
        _, word, _ = self.tokens[self.i]
        if size := MULTIPLIERS.get(word.lower()):
            self.i += 1
            if size < 1000:
                return ("num", Fraction(size))          # else a notation, as 5 * 10^3
            return ("pow", ("num", Fraction(10)), ("num", Fraction(len(str(size)) - 1)))
        letters = [("word", letter, False) for letter in letters_of(word)]  # ba^2 is b a^2
        self.tokens[self.i : self.i + 1] = letters
        return self.subscript(self.value())

    def subscript(self, name: str):
        if not self.accept("_"):
            return ("const", name) if name in "ei" else ("sym", name)
        if self.accept("{"):
            parts = []
            while not self.accept("}"):
                parts.append(self.value())
            return ("sym", name + "_" + "".join(parts))
        return ("sym", name + "_" + self.value())

    def function(self):
        name = self.value()
        name = _ALIASES.get(name, name)
        if name == "sqrt":
            return self.root()
        power = base = None
        for _ in range(2):
            if self.accept("_"):
                base = self.log_base()
            elif self.accept("^"):
                power = self.group()
        node = ("fn", name, *self.arguments(), *([base] if base else []))
        if power == ("neg", ("num", Fraction(1))) and name in ("sin", "cos", "tan"):
            return ("fn", "arc" + name, *node[2:])
        return ("pow", node, power) if power else node

    def log_base(self):
        """The subscript of a log. In \\log_264 it is 2, one digit: else no argument is left."""
        if self.peek() == "<num>" and self.peek(1) not in ("", ",", ")", "+", "-", "=", "}"):
            return ("num", Fraction(self.value()))
        return self.group()

    def arguments(self) -> list:
        if self.peek() in ("(", "["):
            close = {"(": ")", "[": "]"}[self.value()]
            items = self.items(close)
            self.expect(close)
            if not items:
                raise NotMath("a function of nothing")
            return items
        if self.peek() == "{":
            return [self.group()]
        if self.peek() == "-":
            return [self.unary()]
        node = self.power()
        while self.peek() != "<fn>" and self.starts_factor() and self.peek() != "(":
            node = ("mul", node, self.power())
        return [node]

    def root(self):
        degree = ("num", Fraction(2))
        if self.accept("["):
            degree = self.relation()
            self.expect("]")
        if self.peek() == "{":
            return ("fn", "root", self.group(), degree)
        return ("fn", "root", self.primary(), degree)

    def bracket(self):
        opening = self.value()
        self.bars += opening == "|"
        closing = _CLOSERS[opening]
        ends = tuple(closing) if opening in "([" else (closing,)
        items = self.items(*ends, "")
        close = self.expect(*ends)
        self.bars -= opening == "|"
        if opening == r"\{":
            return ("set", *items)
        if opening in ("|", r"\lfloor", r"\lceil") and len(items) == 1:
            return ("fn", {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}[opening], items[0])
        grouped = (opening, close) in (("(", ")"), ("[", "]"))
        if len(items) == 1 and grouped and items[0][0] != "tuple":
            return items[0]
        if opening == r"\langle":
            opening, close = "(", ")"
        return ("tuple", opening, close, *items)

    def matrix(self):
        self.expect(r"\begin")
        name = self._environment()
        if name == "array" and self.peek() == "{":
            self._environment()
        rows = [[]]
        while not self.accept(r"\end"):
            if self.accept(r"\cr"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.relation())
        if self._environment() != name or name not in _MATRICES:
            raise NotMath(name)
        return ("matrix", *(tuple(row) for row in rows if row))

    def _environment(self) -> str:
        self.expect("{")
        parts = []
        while not self.accept("}"):
            parts.append(self.value())
        return "".join(parts)


def parse(text: str):
    """Text -> tree. Raises NotMath where it is not mathematics, TooBig if too long or deep."""
    text = normalise(text)
    based = _BASED.fullmatch(text)
    if based:
        return ("base", based[1], based[2])
    parser = _Parser(text)
    items = parser.items("")
    if not items or parser.i < len(parser.tokens):
        raise NotMath("trailing text")
    return items[0] if len(items) == 1 else ("list", *items)
