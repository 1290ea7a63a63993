"""verifier/text.py: one spelling for what can be written in many, then tokens.

Unicode, LaTeX layout, thousands separators, the words of units: all that depends on characters and not on structure.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS, MAX_TOKENS = 2000, 600  # of one expression; past them it is TooBig


class NotMath(ValueError):
    """The text is not a mathematical expression."""


class TooBig(ValueError):
    """The expression is longer, deeper or larger in value than the verifier agrees to compute."""


# ----------------------------------------------------------------------------------------------------------------------
# Normalisation: Unicode and LaTeX layout to one spelling

_UNICODE = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "—": " ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
    "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ",
    "°": r"^\circ ", "º": r"^\circ ", "≈": r"\approx ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "⁄": "/", "∕": "/",
    "∖": r"\setminus ", "θ": r"\theta ", "⟨": r"\langle ", "⟩": r"\rangle ", "…": "...", "′": "'", "’": "'",
    "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u2060": "", "\u2062": "", "∶": ":", "∣": "|",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "￥": "¥",
}  # fmt: skip
_SUPER, _SUB = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
_PLAIN = str.maketrans(_SUPER + _SUB, "0123456789+-n0123456789")
_LAYOUT = [(re.compile(a), b) for a, b in [
    (r"\\\\(?:\[[^\]]{0,9}\])?", r"\\cr "),
    (r"\\(?:left|right)(?![A-Za-z])\s*\.?", ""),
    (r"\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|limits|boldsymbol|nonumber|phantom|mathstrut)(?![A-Za-z])", ""),
    (r"(?<=\d),\s*\\!\s*(?=\d{3})", ","), (r"\\!|\\[()\[\]]|\\hspace\{[^{}]{0,9}\}", ""),
    (r"(?<=\d)(?:\{,\}|\\[,; ]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
    (r"(?<=[A-Za-z])'+(?=\s*\()", r"_{prime}"), (r"\b(?:USD|US\$)\s*(?=\d)", r"\\$"), (r"\{,\}", ","),
    (r"\\(?:angle|triangle|measuredangle)(?![A-Za-z])", ""), (r"\s+(?:in )?base\s+(\w+)", r"_{\1}"),
    (r"\\[,;:> ]|~|\\q?quad(?![a-z])|\\thinspace|\\enspace", " "),
    (r"\\[dtc]frac", r"\\frac"), (r"\\(?:leqslant|leq)(?![a-z])", r"\\le "), (r"\\(?:geqslant|geq)(?![a-z])", r"\\ge "),
    (r"\\(?:neq|not\s*=)", r"\\ne "), (r"\\(?:lbrace)(?![a-z])", r"\\{"), (r"\\(?:rbrace)(?![a-z])", r"\\}"),
    (r"\\(?:lvert|rvert|vert|mid)(?![a-z])", "|"), (r"\\(?:tbinom|dbinom)", r"\\binom"),
    (r"\^\s*\{?\s*\\circ(?![a-z])\s*\}?|\\degree(?![a-z])", r"\\deg "), (r"\\%", "%"), (r"\\colon(?![a-z])", ":"),
    (r"\\(?:dots|ldots|cdots)(?![a-z])", "..."), (r"\\mathbb\s*\{?R\}?|\\Reals?(?![a-z])", r"\\R "),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "), (r"(?<=\d)\s+to\s+(?=\d)", ":"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)|(?<=\d)\s[xX]\s(?=\d)|(?<=\d)\s+times\s+(?=\d)", r"\\times "),
    (r"\\deg\s*(?:\\(?:text|mathrm)\s*\{\s*([CF])\s*\}|([CF])(?![A-Za-z]))", r"\\text{deg\1\2}"),
    (r"\\\{\s*[a-z]\s*(?:\\in\s*\\R\s*)?[:|](.*)\\\}$", r"\1"),
    (r"\\(?:varnothing)(?![a-z])", r"\\emptyset "), (r"\\(?:backslash)(?![a-z])", r"\\setminus "),
]]  # fmt: skip
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
                        r"|(?<![\d.,] )(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])(?! \d)")  # fmt: skip


def normalise(text: str) -> str:
    """One spelling for Unicode, LaTeX layout and thousands separators; raises TooBig past MAX_CHARS."""
    if len(text) > MAX_CHARS:
        raise TooBig(f"{len(text)} characters")
    text = re.sub(f"([{_SUPER}]+)⁄([{_SUB}]+)", lambda m: rf"\frac{{{m[1]}}}{{{m[2]}}}".translate(_PLAIN), text)
    text = re.sub(f"[{_SUPER}]+", lambda m: "^{" + m[0].translate(_PLAIN) + "}", text)
    text = re.sub(f"[{_SUB}]+", lambda m: "_{" + m[0].translate(_PLAIN) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar_fraction, text)
    text = "".join(_UNICODE.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _LAYOUT:
        text = pattern.sub(replacement, text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # paired dollars delimit mathematics, a lone one is money
        text = re.sub(r"(?<!\\)\$", "", text)
    return _join_thousands(text).strip()


def _vulgar_fraction(match: re.Match) -> str:
    return r"\frac{" + unicodedata.normalize("NFKC", match[0]).replace("⁄", "}{") + "}"


def _join_thousands(text: str) -> str:
    """Join 1,000 outside brackets only: (12,102) is an interval and {1,234} a set."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(text + "\n"):
        opens, closes = c in "([{", c in ")]}"
        if (opens and depth == 0) or i == len(text):
            out.append(_THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text[start:i]))
            start = i
        depth = max(0, depth + opens - closes)
        if closes and depth == 0:
            out.append(text[start : i + 1])
            start = i + 1
    return "".join(out)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens

_TEXT_COMMANDS = set("""text mbox textbf textit textrm mathrm mathbf operatorname hbox mathit mathsf texttt mathtt
textsf emph bold bf rm mathcal""".split())
FUNCTIONS = set("""sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt abs
asin acos atan""".split())
_WORDS = {"pi": r"\pi", "infinity": r"\infty", "infty": r"\infty", "inf": r"\infty", "oo": r"\infty", "or": ",",
          "and": ",", "cup": r"\cup", "union": r"\cup", "degrees": r"\deg", "degree": r"\deg", "deg": r"\deg",
          "percent": "%", "theta": r"\theta"}  # fmt: skip
_OPERATORS = {"**": "^", r"\cdot": "*", r"\times": "*", r"\div": "/", "<=": r"\le", ">=": r"\ge", "!=": r"\ne",
              r"\$": "$", r"\lt": "<", r"\gt": ">", ";": ","}  # fmt: skip
_TOKEN = re.compile(r"(?P<space>\s+)|(?P<num>(?:\d+\.(?=\\(?:overline|bar))|\d+(?:\.\d+)?|\.\d+)"
                    r"(?:[eE][+-]?\d{1,4}(?![\w.]))?)|(?P<cmd>\\[A-Za-z]+|\\.)"
                    r"|(?P<word>[A-Za-z]+)|(?P<op>\*\*|!!|<=|>=|!=|\.\.\.|.)", re.S)  # fmt: skip
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
    """Read {...} after a text command: words stay text; numbers, symbols and functions are mathematics in costume."""
    match = re.compile(r"\s*\{([^{}]*)\}").match(text, pos)
    if not match:
        return "text", "", pos
    inner = match[1].strip()
    if inner in FUNCTIONS:
        return "fn", inner, match.end()
    if re.fullmatch(r"\d+\.?\d*", inner):
        return "num", inner, match.end()
    if inner in ("e", "i") or (re.fullmatch("[A-Za-z]", inner) and command in ("mathbf", "mathit", "mathcal", "bold")):
        return "word", inner, match.end()
    return "text", inner, match.end()


# ----------------------------------------------------------------------------------------------------------------------
# Words

_UNIT_NAMES = """cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre|in inch inche|
ft foot feet|yd yard|mi mile|mph|kph kmh|g gram gramme|kg kilogram|mg milligram|lb pound|oz ounce|s sec second|
min minute|h hr hour|day|week|month|year yr|L l liter litre|ml mL milliliter millilitre|dollar usd buck USD|cent|
euro eur|gbp|yen|rupee|degree|rad radian|unit|ton|gallon gal|quart|pint|cup|sq|cu"""
UNITS = {w: g.split()[0] for g in _UNIT_NAMES.replace("\n", "").split("|") for w in g.split()}
UNITS.update({w + "s": u for w, u in UNITS.items() if len(w) > 1})
MULTIPLIERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_FILLER = {"of", "the", "a", "total", "more", "left", "each", "exactly", "about", "is"}


def unit_name(text: str) -> str:
    """One spelling of a unit: "square inches", "in^2" and "inches ^ { 2 }" are "in^2"; mph is "mi/h"."""
    text = re.sub(r"[{}\s.]+", " ", text.replace("^", " ^ ").replace("/", " / ")).strip()
    text = re.sub(r"\bin (?:total|all)\b", "", re.sub(r"\bper\b", "/", text))
    singular = (UNITS.get(w) or UNITS.get(w.lower()) or re.sub("(?<=[a-z]{2})(?<!s)s$", "", w.lower())
                for w in text.split())  # fmt: skip
    words = [w for w in singular if w not in _FILLER]
    for power, names in (("2", ("square", "sq", "squared")), ("3", ("cubic", "cu", "cubed"))):
        if any(n in words for n in names):
            words = [w for w in words if w not in names] + ["^", power]
    return "".join(w if w in "^/" or w.isdigit() else " " + w for w in words).replace("/ ", "/").strip().replace(
        "mph", "mi/h").replace("kph", "km/h")


def plain_text(text: str) -> str:
    """Lower case, no articles, no punctuation at the ends: the form in which text answers are compared."""
    text = re.sub(r"[\s~]+", " ", text.lower()).strip(" .,;:!?'\"`*_()[]")
    return re.sub(r"^(?:the|an|a) (?=\w)", "", text)
