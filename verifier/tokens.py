"""verifier/tokens.py: normalised text -> tokens, and a place among them to read from."""

from __future__ import annotations

import re

from verifier.text import MULTIPLIERS, NotMath, TooBig

MAX_TOKENS = 600  # of one expression; past them it is TooBig
_TEXT_COMMANDS = set("""text mbox textbf textit textrm mathrm mathbf operatorname hbox mathit mathsf
texttt mathtt textsf textnormal emph bold bf rm mathcal""".split())
FUNCTIONS = set("""sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt
abs asin acos atan""".split())
_WORDS = {"pi": r"\pi", "infinity": r"\infty", "infty": r"\infty", "inf": r"\infty",
          "oo": r"\infty", "or": ",", "and": ",", "cup": r"\cup", "union": r"\cup",
          "degrees": r"\deg", "degree": r"\deg", "deg": r"\deg", "percent": "%",
          "theta": r"\theta"}
_OPERATORS = {"**": "^", r"\cdot": "*", r"\times": "*", r"\div": "/", "<=": r"\le", ">=": r"\ge",
              "!=": r"\ne", r"\$": "$", r"\lt": "<", r"\gt": ">", ";": ",",
              r"\lor": ",", r"\land": ",", r"\vee": ",", r"\wedge": ","}
GREEK = set("""alpha beta gamma delta epsilon theta lambda mu phi varphi omega rho sigma tau zeta
eta kappa xi psi chi nu ell Delta Omega Phi Gamma""".split())
BASE_NAMES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
               "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
               "sixteen": "16"}
_TOKEN = re.compile(r"(?P<space>\s+)|(?P<num>(?:\d+\.(?=\\(?:overline|bar))|\d+(?:\.\d+)?|\.\d+)"
                    r"(?:[eE][+-]?\d{1,4}(?![\w.]))?)|(?P<cmd>\\[A-Za-z]+|\\.)"
                    r"|(?P<word>[A-Za-z]+)|(?P<text>[\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3]+)"
                    r"|(?P<op>\*\*|!!|<=|>=|!=|\.\.\.|.)", re.S)
Token = tuple[str, str, bool]  # kind, text, preceded by a space?


def tokenize(text: str) -> list[Token]:
    """Tokens of normalised text; a \\text{...} group becomes one token of kind "text"."""
    tokens: list[Token] = []
    pos, gap = 0, False
    while pos < len(text):
        match = _TOKEN.match(text, pos)
        kind, value, pos = match.lastgroup, match[0], match.end()
        if kind == "space":
            gap = True
            continue
        if kind == "cmd" and value[1:] in _TEXT_COMMANDS:
            kind, value, pos = _text_group(text, pos, value[1:])
            value = value.strip()
            if value.lower() in ("or", "and", ",", "and/or", ", and", ", or"):
                kind, value = "op", ","
        elif kind == "text" and value in ("和", "或"):
            kind, value = "op", ","
        elif kind == "cmd" and value[1:] in FUNCTIONS:
            kind, value = "fn", value[1:]
        elif kind == "word" and value in FUNCTIONS:
            kind = "fn"
        elif kind == "word" and value.lower() in _WORDS:
            kind, value = "op", _WORDS[value.lower()]
        elif kind in ("cmd", "op"):
            kind, value = "op", _OPERATORS.get(value, value)
        head, _, rest = value.partition(" ")
        if kind == "text" and head.lower() in MULTIPLIERS:  # 18 million people
            tokens.append(("word", head, gap))
            value = rest
        if value or kind != "text":
            tokens.append((kind, value, gap))
        gap = False
    if len(tokens) > MAX_TOKENS:
        raise TooBig(f"{len(tokens)} tokens")
    return tokens


def _text_group(text: str, pos: int, command: str) -> tuple[str, str, int]:
    """Read {...} after a text command. Words stay text; numbers and symbols are mathematics."""
    match = re.compile(r"\s*\{([^{}]*)\}").match(text, pos)
    if not match:
        return "text", "", pos
    inner = match[1].strip()
    if inner in FUNCTIONS:
        return "fn", inner, match.end()
    if re.fullmatch(r"\d+\.?\d*", inner):
        return "num", inner, match.end()
    letter = re.fullmatch("[A-Za-z]", inner) and command in ("mathbf", "mathit", "mathcal", "bold")
    if inner in ("e", "i") or letter:
        return "word", inner, match.end()
    return "text", inner, match.end()


class Tokens:
    """A place among the tokens of a text."""

    def __init__(self, text: str):
        self.tokens, self.i = tokenize(text), 0

    def peek(self, ahead: int = 0) -> str:
        """The next operator, or a kind in angle brackets ("<num>"), or "" at the end."""
        if self.i + ahead >= len(self.tokens):
            return ""
        kind, value, _ = self.tokens[self.i + ahead]
        return value if kind == "op" else f"<{kind}>"

    def value(self) -> str:
        """The text of the next token, which is taken."""
        if self.i >= len(self.tokens):
            raise NotMath("it ends early")
        self.i += 1
        return self.tokens[self.i - 1][1]

    def accept(self, *ops: str) -> bool:
        """Take the next token if it is one of `ops`."""
        if self.peek() in ops and self.peek():
            self.i += 1
            return True
        return False

    def expect(self, *ops: str) -> str:
        """Take the next token, which must be one of `ops`, or raise NotMath."""
        if self.peek() not in ops or not self.peek():
            raise NotMath(f"expected {ops}, found {self.peek() or 'the end'}")
        return self.value()
