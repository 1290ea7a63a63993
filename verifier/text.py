"""verifier/text.py: one spelling for what can be written in many.

All that depends on characters and not on structure: Unicode, LaTeX layout, thousands separators,
the words of units.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 2000  # of one expression; past it the expression is TooBig


class NotMath(ValueError):
    """The text is not a mathematical expression."""


class TooBig(ValueError):
    """The expression is longer, deeper or larger in value than the verifier agrees to compute."""


# --------------------------------------------------------------------------------------------------
# Normalisation: Unicode and LaTeX layout to one spelling

_UNICODE = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "—": " ", "⁄": "/", "∕": "/", "…": "...", "′": "'",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "’": "'",
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus ", "ℝ": r"\mathbb{R}",
    "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "θ": r"\theta ",
    "∨": r"\lor ", "∧": r"\land ", "⟨": r"\langle ", "⟩": r"\rangle ", "∶": ":", "∣": "|", "￥": "¥",
    "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u2060": "", "\u2062": "",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
}
CIRCLED = re.compile("[\u2460-\u24ff\u2776-\u2793]")  # the first and third statement: ①③
_SUPER, _SUB = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
_PLAIN = str.maketrans(_SUPER + _SUB, "0123456789+-n0123456789")
_LAYOUT = [(re.compile(a), b) for a, b in [
    (r"\\\\(?:\[[^\]]{0,9}\])?", r"\\cr "),
    (r"\\(?:left|right)(?![A-Za-z])\s*\.?", ""),
    (r"\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|limits|boldsymbol|nonumber|phantom|mathstrut)"
     r"(?![A-Za-z])", ""),
    (r"(?<=\d),\s*\\!\s*(?=\d{3})", ","), (r"\\!|\\[()\[\]]|\\hspace\{[^{}]{0,9}\}", ""),
    (r"(?<=\d)(?:\{,\}|\\[,; ]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
    (r"(?<=[A-Za-z])'+(?=\s*\()", r"_{prime}"),
    (r"\b(?:USD|US\$)\s*(?=\d)", r"\\$"), (r"\{,\}", ","),
    (r"\\(?:angle|triangle|measuredangle)(?![A-Za-z])", ""), (r"\s+(?:in )?base\s+(\w+)", r"_{\1}"),
    (r"\\[,;:> ]|~|\\q?quad(?![a-z])|\\thinspace|\\enspace", " "),
    (r"\\[dtc]frac", r"\\frac"), (r"\\(?:leqslant|leq)(?![a-z])", r"\\le "),
    (r"\\(?:geqslant|geq)(?![a-z])", r"\\ge "), (r"\\(?:neq|not\s*=)", r"\\ne "),
    (r"\\(?:lbrace)(?![a-z])", r"\\{"), (r"\\(?:rbrace)(?![a-z])", r"\\}"),
    (r"\\(?:lvert|rvert|vert|mid)(?![a-z])", "|"), (r"\\(?:tbinom|dbinom)", r"\\binom"),
    (r"\^\s*\{?\s*\\circ(?![a-z])\s*\}?|\\degree(?![a-z])", r"\\deg "),
    (r"\\overline\s*\{\s*([A-Z]{2})\s*\}", r"\1"),  # the segment AB
    (r"\\(overline|bar|vec|hat)\s*\{\s*([A-Za-z])\s*\}", r"\2_{\1}"),
    (r"(\d\.\d*)\\dot\s*(?:\{(\d)\}|(\d))", r"\1\\overline{\2\3}"),
    (r"\\%", "%"), (r"\\colon(?![a-z])", ":"),
    (r"\\(?:dots|ldots|cdots)(?![a-z])", "..."), (r"\\mathbb\s*\{?R\}?|\\Reals?(?![a-z])", r"\\R "),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "), (r"(?<=\d)\s+to\s+(?=\d)", ":"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)|(?<=\d)\s[xX]\s(?=\d)|(?<=\d)\s+times\s+(?=\d)", r"\\times "),
    (r"\\deg\s*(?:\\(?:text|mathrm)\s*\{\s*([CF])\s*\}|([CF])(?![A-Za-z]))", r"\\text{deg\1\2}"),
    (r"\\\{\s*[a-z]\s*(?:\\in\s*\\R\s*)?[:|](.*)\\\}$", r"\1"),
    (r"\\(?:varnothing)(?![a-z])", r"\\emptyset "), (r"\\(?:backslash)(?![a-z])", r"\\setminus "),
]]
_CASES = re.compile(r"\\begin\{cases\}([^&]*?)\\end\{cases\}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
                        r"|(?<![\d.,] )(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])(?! \d)")


def normalise(text: str) -> str:
    """One spelling for Unicode, LaTeX layout and thousands; raises TooBig past MAX_CHARS."""
    if len(text) > MAX_CHARS:
        raise TooBig(f"{len(text)} characters")
    if CIRCLED.search(text):
        raise NotMath("circled digits are names")
    fraction = re.compile(f"([{_SUPER}]+)⁄([{_SUB}]+)")
    text = fraction.sub(lambda m: rf"\frac{{{m[1]}}}{{{m[2]}}}".translate(_PLAIN), text)
    text = re.sub(f"[{_SUPER}]+", lambda m: "^{" + m[0].translate(_PLAIN) + "}", text)
    text = re.sub(f"[{_SUB}]+", lambda m: "_{" + m[0].translate(_PLAIN) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar_fraction, text)
    text = "".join(_UNICODE.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _LAYOUT:
        text = pattern.sub(replacement, text)
    text = _CASES.sub(_system, text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # pairs delimit mathematics, one is money
        text = re.sub(r"(?<!\\)\$", "", text)
    return _join_thousands(text).strip()


def _system(match: re.Match) -> str:
    """A system of equations as a list; a function by cases is left alone."""
    lines = match[1].removesuffix(r"\cr ").split(r"\cr")
    return ",".join(lines) if all("=" in line for line in lines) else match[0]


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


# --------------------------------------------------------------------------------------------------
# Words

_UNIT_NAMES = """cm centimeter centimetre|mm millimeter millimetre|m meter metre|
km kilometer kilometre|in inch inche|ft foot feet|yd yard|mi mile|mph|kph kmh|g gram gramme|
kg kilogram|mg milligram|lb pound|oz ounce|s sec second|min minute|h hr hour|day|week|month|
year yr|L l liter litre|ml mL milliliter millilitre|dollar usd buck USD|cent|euro eur|gbp|yen|
rupee|degree|rad radian|unit|ton|gallon gal|quart|pint|cup|sq|cu|Hz hertz|kHz|MHz|GHz|kJ|kW|Pa|kPa|
MB|GB|TB"""
UNITS = {w: g.split()[0] for g in _UNIT_NAMES.replace("\n", "").split("|") for w in g.split()}
UNITS.update({w + "s": u for w, u in UNITS.items() if len(w) > 1})
MULTIPLIERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
               "trillion": 10**12, "dozen": 12}
NO_FACTORS = set("""the and for not but are was has its yes can all so no of to in it if he she we
is do go us on or up one two six ten ans""".split())  # short words that are no product of letters
_FILLER = {"of", "the", "a", "total", "more", "left", "each", "exactly", "about", "is"}


def unit_name(text: str) -> str:
    """One spelling of a unit: "square inches", "in^2", "inches ^ { 2 }" are "in^2"; mph: "mi/h"."""
    text = re.sub(r"[{}\s.]+", " ", text.replace("^", " ^ ").replace("/", " / ")).strip()
    text = re.sub(r"\bin (?:total|all)\b", "", re.sub(r"\bper\b", "/", text))
    words = [word for word in map(_singular, text.split()) if word not in _FILLER]
    for power, names in (("2", ("square", "sq", "squared")), ("3", ("cubic", "cu", "cubed"))):
        if any(n in words for n in names):
            words = [w for w in words if w not in names] + ["^", power]
    name = "".join(w if w in "^/" or w.isdigit() else " " + w for w in words)
    return name.replace("/ ", "/").strip().replace("mph", "mi/h").replace("kph", "km/h")


def _singular(word: str) -> str:
    """The short name of a known unit; any other word in lower case, without a plural s."""
    lower = word.lower()
    return UNITS.get(word) or UNITS.get(lower) or re.sub("(?<=[a-z]{2})(?<!s)s$", "", lower)


def plain_text(text: str) -> str:
    """Lower case, no articles, no punctuation at the ends: so text answers are compared."""
    text = re.sub(r"[\s~]+", " ", text.lower()).strip(" .,;:!?'\"`*_()[]")
    return re.sub(r"^(?:the|an|a) (?=\w)", "", text)


def multiplies(word: str, gap: bool) -> bool:
    """Does `word`, after a value, multiply it (2xy), or is it a unit (5 cm)? So 5m, but 5 m."""
    if len(word) == 1:
        return not (gap and word in "mgshlL")
    if word.lower() in MULTIPLIERS:
        return True
    return len(word) <= 3 and word not in UNITS and not (gap and len(word) == 3)


def letters_of(word: str) -> str:
    """The letters of a short word that is a product, as abc. Raises NotMath for units and words."""
    if len(word) > 3 or word.lower() in NO_FACTORS or word.lower() in UNITS and len(word) > 1:
        raise NotMath(word)
    return word
