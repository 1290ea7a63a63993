"""verifier/words.py: numbers in words, and the words beside a number (P39).

"minus 5" is -5, "2 million" is 2000000, "2 and a half" is 2.5, "7 dozen" is 84, "3 out of 4" is
3/4. Who sees only the digits pays for "minus 5" where 5 is right. One table holds all words.
`in_digits` rewrites what has digits in it, before an answer is looked for. Numbers wholly in words
("forty-two") are read by `number_in_words`, only where no digits answer.

Left out: number words of other languages than English, but for East Asian signs and scales.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ONES = {word: n for n, word in enumerate(_SMALL)} | {w: 10 * n for n, w in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
           "trillion": 10**12, "dozen": 12, "mil": 10**6, "mn": 10**6, "bn": 10**9}
_SCALES |= {word + "s": n for word, n in _SCALES.items() if len(word) > 3}
_SCALES |= {"百": 100, "千": 10**3, "万": 10**4, "萬": 10**4, "만": 10**4, "亿": 10**8,
            "億": 10**8, "억": 10**8}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
          "eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100,
          "thousandth": 1000}
_PLURAL_PARTS = {"halves": 2} | {word + "s": n for word, n in _PARTS.items() if word != "half"}
_SIGNS = {"minus", "negative", "负", "負", "零下"}
_ARTICLES = {"a", "an"}
_ALL = [*_ONES, *_SCALES, *_PARTS, *_PLURAL_PARTS, *_SIGNS, *_ARTICLES, "and", "point", "of"]
_ENGLISH = "|".join(sorted((w for w in _ALL if w.isascii()), key=len, reverse=True))
_OTHER = "|".join(w for w in _ALL if not w.isascii())

_WORD = re.compile(
    r"(?P<number>(?<![\w.^_\\/])(?:\d+[^\S\n])?\d+/\d+(?![\w/])"
    r"|(?<![A-Za-z0-9.^_\\])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?![\d^_]))"
    rf"|(?<![A-Za-z\\])(?:{_ENGLISH})(?![A-Za-z])|{_OTHER}", re.I)
_GAP = re.compile(r"[ \t]*(?:\n[ \t]*)?-?[ \t]*[$€£¥]?")
_BESIDE_DIGITS = re.compile(                            # worth a look at all?
    rf"\d[\s-]*(?:{'|'.join([*_SCALES, *_PARTS, *_PLURAL_PARTS])}"
    r"|and[\s-]+(?:an?|half|one|two|three|\d+/\d+))(?![a-z])"
    rf"|(?:{'|'.join(_SIGNS)})[\s-]*[$€£¥]?[\d.]|(?:point)\s+\d", re.I)

# Words that are a sign of arithmetic between two operands, or before or behind one. What they say
# is then left to do: "10 minus 5" is no way to say 5.
_LEFT = r"(?:(?<=[\d)\]}%])|(?<=\b[b-hj-zB-HJ-Z]))\s+"  # behind an operand
_RIGHT = r"\s+(?=[\d$(√π]|\\[a-z(]|[a-z]\b)"
_IN_TEXT = rf"(?<=\d)[\s~\\,;!]*\\(?:text|mathrm|mbox)\s*\{{\s*({'|'.join(_SCALES)})\b"
_SYMBOLS = [(re.compile(pattern, re.I), symbol) for pattern, symbol in [
    (_IN_TEXT, r" \1 \\text{"), (_LEFT + "plus" + _RIGHT, " + "), (_LEFT + "minus" + _RIGHT, " - "),
    (_LEFT + "(?:times|multiplied by)" + _RIGHT, r" \\times "),
    (_LEFT + "(?:divided by|over|out of)" + _RIGHT, " / "),
    (r"(?<![\w.])1 in (?=\d+\b)", "1/"),
    (r"(?<=\d)\s+per\s?cent\b", "%"), (r"(?<=\d) squared\b", "^2"),
    (r"(?<=\d) cubed\b", "^3"), (r"(?<=\d)\s+factorial\b", "!"),
    (r"(?<=\d)\s+(?:raised )?to the power(?: of)?\s+(?=\d)", "^"),
    (r"\b(?:the )?square root of (?=\d)", r"\\sqrt "),
    (r"\b(?:the )?cube root of (?=\d)", r"\\sqrt[3] "),
    (r"\b(?:twice|double) (?=\d)", r"2 \\times "), (r"\bhalf of (?=\d)", r"0.5 \\times "),
    (r"(?<=\d)\s?\\?% of (?=\$?\d)", r"% \\times "),
    (r"(?<=/[3-9])(?:rd|th)s?\b", ""),                  # 2/3rds
    (r"(\bratio\b[^.\n]{0,60}?\b\d+) to (?=\d)", r"\1:"),
    (r"(?<![\w.-])(\d+(?:\.\d+)?)((?:\s*°\s?[CF]?| degrees?(?: [CF]\w*)?)?)"
     r" (?:below|under) zero\b", r"-\1\2"),
    (r"\b(?:minus|negative)\s+(\*\*|\\\(|\$(?=[^$\n]{1,200}\$))\s*(?=[\d.\\(])", r"\1-"),
    (r"\\text\s*\{\s*(?:minus|negative)\s*\}\s*(?=[\d\\(])"
     r"|\b(?:minus|negative)\s+(?=[(√π]|\\[a-z])", "-"),
]]
_ARITHMETIC = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{\s*[a-z]|plus|minus|negative|times|multiplied|divided|\bover\b"
    r"|out of|\b1 in |per\s?cent|squared|cubed|factorial|to the power|% of|root of|twice|double"
    r"|half of|/\d(?:rd|th)"
    r"|(?:below|under) zero|\bratio\b", re.I)


def in_digits(text: str) -> str:
    """The text with the words beside its numbers worked into them; the rest is left as it is."""
    if _ARITHMETIC.search(text):
        for pattern, symbol in _SYMBOLS:
            text = pattern.sub(symbol, text)
    if not _BESIDE_DIGITS.search(text):
        return text
    out, place, before = [], 0, 0
    for value, start, end, words in _phrases(text):
        digits = any(isinstance(word, Fraction) for word in words)
        binary = words[0] in _SIGNS and text[before:start].isspace()   # ten minus 5
        before = end
        if digits and len(words) > 1 and not binary:
            money = re.search("[$€£¥]", text[start:end])
            out += [text[place:start], "-" * (value < 0), money[0] if money else "",
                    written(abs(value))]
            place = end
    return "".join([*out, text[place:]])


def written(value: Fraction) -> str:
    """5/2 as 2.5, 7/3 as 7/3."""
    for places in range(7):
        if (value * 10**places).denominator == 1:
            whole, rest = divmod(int(value * 10**places), 10**places)
            return f"{whole}.{rest:0{places}}" if places else str(whole)
    return f"{value.numerator}/{value.denominator}"


_AFTER = re.compile(r"-[a-z]|\s+(?:point|plus|minus|times|over|squared|cubed|factorial"
                    r"|divided|multiplied|percent|(?!month)\w+(?:th|rd|st)s?)\b", re.I)
_JOINED = re.compile(r"\s*(?:,|and|or|, and|, or)\s*", re.I)  # two and three
_BEFORE = re.compile(r"\b(?:plus|minus|times|over|divided by|multiplied by|half of|twice|double"
                     r"|root of|power of|between)\s+$|\w-$", re.I)


def number_in_words(text: str) -> str:
    """The last number wholly in words, as digits: "forty-two doubloons" is 42, "a half" is 0.5.

    "" where there is none, for "no one", where it is part of a sum ("ten minus five"), and for
    several parts ("two thirds"): the strict reading, as three quarters may be coins.
    """
    phrases = [p for p in _phrases(text) if not any(isinstance(word, Fraction) for word in p[3])]
    if not phrases or _says_no_number(phrases[-1][3]):
        return ""
    value, start, end, words = phrases[-1]
    between = text[phrases[-2][2] : start] if len(phrases) > 1 else "."
    summed = between.isspace() and words[0] in _SIGNS or _JOINED.fullmatch(between)
    if summed or _AFTER.match(text, end) or _BEFORE.search(text[max(0, start - 30) : start]):
        return ""
    return "-" * (value < 0) + written(abs(value))


_OPERATOR_BEFORE = re.compile(
    r"\b(?:(?:squares?|cubes?|roots?|negative|minus|opposite|inverse|reciprocal|percent|double"
    rf"|multiple|factorial|{'|'.join([*_PARTS, *_PLURAL_PARTS])}) of(?: the)?"
    rf"|(?:{'|'.join(_ONES)}) (?:times|plus"
    r"|minus|over|divided by|multiplied by)|(?:less|more|fewer|greater) than)\s+\W{0,2}$", re.I)
_OPERATOR_BEHIND = re.compile(r" (?:more|less|fewer) than [a-z]\b")


def is_operand(text: str, start: int, end: int) -> bool:
    """Is the number at text[start:end] part of a sum or bound in words? Then it is no answer.

    "the square of 5", "ten minus 5", "a third of 5", "less than 5", "5 more than x" don't say 5.
    """
    before = _OPERATOR_BEFORE.search(text[max(0, start - 40) : start])
    return bool(before or _OPERATOR_BEHIND.match(text, end))


def whole_number(text: str) -> str:
    """The digits of a text that is a number in words and a unit at most: "two hours" is "2 hours".

    "" for any other text, so for "two men and a boy".
    """
    if text.strip(" .").lower() == "one":
        return "1"
    phrases = [p for p in _phrases(text[:200]) if not any(isinstance(w, Fraction) for w in p[3])]
    if len(phrases) != 1 or phrases[0][1] > 0 or _says_no_number(phrases[0][3]):
        return ""
    value, _, end, _ = phrases[0]
    unit = re.fullmatch(r"(?: of)?(?: an?)?((?: [a-z]+){0,3})", text[end:].rstrip("."), re.I)
    return f"{'-' * (value < 0)}{written(abs(value))}{unit[1]}" if unit else ""


def _says_no_number(words: list) -> bool:
    return words == ["one"] or words[-1] in _PLURAL_PARTS and "and" not in words


# --------------------------------------------------------------------------------------------------
# Phrases


def _phrases(text: str) -> list[tuple[Fraction, int, int, list]]:
    """(value, start, end, words) of every number of the text, with the words that belong to it."""
    found, run = [], []
    for match in [*_WORD.finditer(text), None]:
        if run and (match is None or not _GAP.fullmatch(text, run[-1].end(), match.start())):
            found += _phrases_of(run)
            run = []
        if match:
            run.append(match)
    return found


def _phrases_of(run: list) -> list:
    """The phrases among neighbouring words. Each begins as early, and is as long, as it can be."""
    words = [_number(m[0]) if m["number"] else m[0].lower() for m in run]
    found, i = [], 0
    while i < len(words):
        value, end = _phrase(words, i)
        if value is not None:
            found.append((value, run[i].start(), run[end - 1].end(), words[i:end]))
        i = max(end, i + 1)
    return found


def _number(digits: str) -> Fraction:
    *whole, fraction = digits.replace(",", "").split()
    if re.search(r"/0+$", fraction):
        return Fraction(0)
    return Fraction(fraction) + int("".join(whole) or 0)


def _phrase(words: list, i: int) -> tuple[Fraction | None, int]:
    """(value, end) of the number that begins at place i; (None, i) where none does."""
    start, sign = i, 1
    if words[i] in _SIGNS:
        sign, i = -1, i + 1
    value, scale, i = _whole(words, i)
    if value is None:
        value, i = _part(words, i)
    elif words[i : i + 1] == ["point"]:
        value, i = _decimals(value, words, i)
    elif words[i : i + 1] == ["and"]:                   # 2 and a half, a million and a half
        part, end = _part(words, i + 1)
        if part is not None and part < 1:
            value, i = value + part * scale, end
    elif i < len(words) and value.denominator == 1:     # two thirds, 3 quarters
        share = (_PARTS if value == 1 else _PLURAL_PARTS).get(words[i], 0)
        if words[i] == "quarters" and value > 3:        # these are coins
            share = 0
        value, i = (value / share, i + 1) if share else (value, i)
    if value is None:
        return None, start
    if value.denominator > 1:                           # half a million, 2 and a half million
        value, i = _scaled(value, words, i)
    return sign * value, i


def _whole(words: list, i: int) -> tuple[Fraction | None, int, int]:
    """(value, its last scale, end) of digits or of number words: 2 million, two hundred and six."""
    total, part, scale, start = 0, None, 1, i
    if words[i : i + 1] and words[i] in _ARTICLES and words[i + 1 : i + 2] != []:
        if words[i + 1] not in _SCALES:                 # a dozen
            return None, 1, i
        part, i = Fraction(1), i + 1
    while i < len(words):
        word = words[i]
        follows = scale > 1 and words[i - 1] in _SCALES or part is None
        if isinstance(word, Fraction) and (part is None or part == 0 and word < scale > 100):
            part = word
        elif word in _SCALES and part is not None and (scale == 1 or part):
            scale = _SCALES[word]
            part *= scale
            if scale >= 1000:
                total, part = total + part, Fraction(0)
        elif word == "and" and scale > 12 and follows and words[i + 1 : i + 2] and \
                words[i + 1] in _ONES:
            pass
        elif word in _ONES and (follows or words[i - 1] == "and" and scale > 1
                                or words[i - 1] in _TENS and 0 < _ONES[word] < 10):
            part = (part or 0) + Fraction(_ONES[word])
        else:
            break
        i += 1
    value = None if part is None else total + part
    return (None, 1, start) if value is None else (value, scale, i)


def _part(words: list, i: int) -> tuple[Fraction | None, int]:
    """A fraction in words: half, a third, three quarters; or 1/2 behind "and"."""
    one = i < len(words) and words[i] in {"one", *_ARTICLES}
    first = words[i + one : i + one + 1]
    if first and (one or first == ["half"]) and first[0] in _PARTS:
        return Fraction(1, _PARTS[first[0]]), i + one + 1
    if first and isinstance(first[0], Fraction) and first[0].denominator > 1 and not one:
        return first[0], i + 1
    if len(words) > i + 1 and words[i] in _ONES and words[i + 1] in _PLURAL_PARTS:
        return Fraction(_ONES[words[i]], _PLURAL_PARTS[words[i + 1]]), i + 2
    return None, i


def _decimals(value: Fraction, words: list, i: int) -> tuple[Fraction, int]:
    """three point one four"""
    end, digits = i + 1, ""
    while end < len(words) and words[end] in _SMALL[:10]:
        digits, end = digits + str(_ONES[words[end]]), end + 1
    if not digits or value.denominator > 1:
        return value, i
    return value + Fraction(int(digits), 10 ** len(digits)), end


def _scaled(value: Fraction, words: list, i: int) -> tuple[Fraction, int]:
    """A scale behind a fraction: half (of) a million, 2 and a half million."""
    end = i
    while end < len(words) and words[end] in ("of", "a"):
        end += 1
    if end < len(words) and words[end] in _SCALES:
        return value * _SCALES[words[end]], end + 1
    return value, i
