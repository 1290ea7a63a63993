"""verifier/extract.py: what is the answer in a completion, and by which rule was it found?

In this order: the last complete \\boxed{} or \\fbox{}; the last `####` line; the concluding
statement ("the answer is ..."); else the last number or expression. Decisions (P25):
  the last complete box wins, wherever it stands; an empty last box is an empty answer: wrong
  a box that never closes is a truncated answer: wrong, unless a complete one exists
  a list where one value is asked ("3 or 4") stays a list, so it is wrong
  a copied placeholder is taken at its word
  a statement taken back ("The answer is 5. Wait, ...") does not count when a number follows it
Only the end of a completion is looked at, and every pattern takes about linear time in its length.
"""

from __future__ import annotations

import re

from verifier.parse import parse
from verifier.text import UNITS, NotMath, TooBig

MAX_ANSWER = 20_000  # characters of a completion that are looked at: its end
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_STATEMENT = re.compile(r"""
    \b(?:answers?|(?:correct|right|best)\ (?:option|choice))\b (?:\s+(?:to|for)\b[^.\n]{0,80}?)?
    \s*(?:\*\*|__)?\s*
    (?:is|are|was|be|would\ be|will\ be|should\ be|comes\ to|equals|:|=) (?:\s*(?:\*\*|__))?
    (?:\s*(?:simply|just|therefore|thus|equal\ to|:))*""", re.I | re.X)
_SOLUTIONS = re.compile(
    r"\b(?:solutions?|roots?|values?|results?|zeros|point)\b[^.\n=]{0,40}?\s(?:is|are|:)", re.I)
_RETRACTION = re.compile(
    r"\b(?:wait|actually|scratch that|correction|on second thought|hold on|oops)\b"
    r"|\?\s*(?:no|nay)\b", re.I)
_REJECTED = re.compile(                                 # 42 is wrong
    r"\W{0,3}(?:[a-z]+ )?(?:is|are|was)(?:n't| not| wrong| incorrect| too)\b", re.I)
_NEGATION = re.compile(r"\s*(?:not\b|n't)")
_NEGATED = re.compile(r"(?:\bnot|n't|\bnever|\brather than|\binstead of)"
                      r"\s*(?:just|be|equal|equal to)?\W{0,4}$", re.I)
_NUMBER = re.compile(r"""
    (?<![\w.^])
    (?:(?<![\w)\]]\ )[-−]\s?)? [$€£¥]? (?:(?<![\w)\]\d])[-−])?  # sign, currency; in 10-7 no sign
    (?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    (?:\s\d+\s?/\s?\d+(?![\d/]) | \s?/\s?\d+(?:\.\d+)? | :\d+ | [¼-¾⅐-⅞])?  # mixed, fraction
    (?:\s?\\?% | \s?° | \s(?:percent|degrees))? (?!\d)
    | [-−]?[¼-¾⅐-⅞]""", re.X)
_FORMULA = re.compile(r"""
    \$\$(.{1,400}?)\$\$ | (?<!\\)\$((?:\\.|[^$\n\\]){1,400})\$(?!\d)
    | \\\((.{1,400}?)\\\) | \\\[(.{1,400}?)\\\]
    """, re.S | re.X)
_REASON = re.compile(r",? (?:because|since|as|which|so|when|where|for|if|after|from|by)\b|\s\(")
_ASIDE = re.compile(r"\s\((?=[^()]*[A-Za-z]{3})[^()]*\)")  # 42 (forty-two)
_REMARK = re.compile(r",\s+(?!and\b|or\b)(?=[A-Za-z]{2,})")  # 42, matey
_TWO_WORDS = re.compile("[A-Za-z]{2,}[!,.]? [A-Za-z]{2,}")
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$|\*)|(?<=\S)[!?]")
_MATH_CHARACTERS = (r"(?:[\d.+\-−–*/^()\[\]{}=×÷·√π%$€£¥°±<>≤≥∞∪²³!|,]|\\[a-zA-Z]+"
                    r"|\b(?:sqrt|pi|sin|cos|tan|ln|log)\b"
                    r"|\b[a-zA-Z](?![a-zA-Z'’])|(?<!,)[ ])*")


def extract(text: str) -> tuple[str, str]:
    """(answer, rule) of a completion; rule: box, unclosed box, ####, statement, whole ..."""
    text = text[-MAX_ANSWER:]
    box = last_box(text)
    if box is not None:
        return box, "box"
    if BOX.search(text):
        return "", "unclosed box"
    line = _last_hash_line(text)
    if line:
        return line, "####"
    last_number = max((m.start() for m in _NUMBER.finditer(text)), default=-1)
    retractions = [m.end() for m in _RETRACTION.finditer(text) if m.end() <= last_number]
    tail = text[max(retractions, default=0) :]
    answer = _concluding_statement(tail)
    if answer:
        return answer, "statement"
    if len(text) <= 200 and not _TWO_WORDS.search(text) and is_math(text):
        return text, "whole"
    return last_expression(tail)


def last_box(text: str) -> str | None:
    """Content of the last complete \\boxed{} or \\fbox{}; None where there is none."""
    for match in list(BOX.finditer(text))[:-33:-1]:
        end = closing_brace(text, match.end())
        if end >= 0:
            return text[match.end() + 1 : end]
    return None


def closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, or -1; escaped braces do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    return -1


def is_math(text: str) -> bool:
    try:
        return parse(text.strip().rstrip(".")) is not None
    except (NotMath, TooBig, RecursionError):
        return False


def _last_hash_line(text: str) -> str:
    """What follows the last `####`, unless it is a heading ("#### Step 4") with text below it."""
    lines = [line.partition("####")[2].strip() for line in text.splitlines() if "####" in line]
    if not lines:
        return ""
    is_value = re.search(r"\d", lines[-1]) and not re.match(r"[A-Za-z]{3}", lines[-1])
    return lines[-1] if is_value or text.rstrip().endswith(lines[-1]) else ""


def _concluding_statement(text: str) -> str:
    """The value of the last "the answer is ...", else of the last "the solutions are ...".

    The latter only when no number comes after it.
    """
    statements = [m for m in _STATEMENT.finditer(text) if not _NEGATION.match(text, m.end())]
    if statements:
        return _stated_value(text[statements[-1].end() :])
    for match in list(_SOLUTIONS.finditer(text))[-1:]:
        answer = _stated_value(text[match.end() :])
        if answer and not _NUMBER.search(text, text.find(answer, match.end()) + len(answer)):
            return answer
    return ""


def _stated_value(rest: str) -> str:
    """The value after "the answer is": a formula, a clause that parses, else its only number."""
    rest = rest[:1000].lstrip(" \t*:_\n")
    formula = _FORMULA.match(rest)
    if formula and not re.match(r"\s*(?:or|and|,)\s", rest[formula.end() :]):
        value = next(g for g in formula.groups() if g)
        unit = re.match(r"\s?[A-Za-z°%]+(?:\^?[23²³]|/[a-z]+)?", rest[formula.end() :])
        return value + unit[0] if unit and is_math(value + unit[0]) else value
    sentence = _SENTENCE_END.split(_ASIDE.sub("", rest), maxsplit=1)[0]
    sentence = _REMARK.split(sentence, maxsplit=1)[0].strip(" *_`\"'")
    if re.match(r"\(?[A-Ja-j][).:](?:\s|$)", sentence):  # B) 42
        return sentence
    clause = _REASON.split(sentence, maxsplit=1)[0]
    for text in (sentence, clause):
        if is_math(text):
            return text
    numbers = list(_NUMBER.finditer(clause))
    if len(numbers) == 1:
        return numbers[0][0].strip()
    return not numbers and number_in_words(clause) or clause


def last_expression(text: str) -> tuple[str, str]:
    """The last number, with the formula or the `a or b` that it ends; the text if it has none."""
    formulas = list(_FORMULA.finditer(text))
    numbers = []
    for match in _NUMBER.finditer(text):
        negated = _NEGATED.search(text[max(0, match.start() - 30) : match.start()])
        if not negated and not _REJECTED.match(text, match.end()):
            numbers.append(match)
    if not numbers:
        if in_words := number_in_words(text):
            return in_words, "number in words"
        if formulas:
            return next(g for g in formulas[-1].groups() if g), "last formula"
        if _NUMBER.search(text) or len(text) > 200:
            return "", "no answer"
        return text.strip(), "whole text"
    last = numbers[-1]
    for formula in formulas:
        if formula.start() < last.start() and last.end() <= formula.end():
            return next(g for g in formula.groups() if g), "last formula"
    if len(numbers) > 1:
        before, joiner = text[: numbers[-2].start()][-20:], text[numbers[-2].end() : last.start()]
        if re.fullmatch(r"\s*(?:,\s*)?or\s+", joiner) or re.search(r"\bbetween \W?$", before):
            return text[numbers[-2].start() : last.end()], "last number"
    return _around(text, last), "last number"


def _around(text: str, number: re.Match) -> str:
    """The mathematical characters around a number where they parse, else it with a known unit."""
    left = text[max(0, number.start() - 200) : number.start()]
    right = text[number.end() : number.end() + 200]
    before, after = re.search(_MATH_CHARACTERS + "$", left)[0], re.match(_MATH_CHARACTERS, right)[0]
    closing = re.match(r"\s*[)\]}]", right)
    opening = re.search(r"[(\[][^()\[\]]*$|\\\{[^{}]*$", left) if closing else None
    bracket = opening[0] + number[0] + closing[0] if opening else ""  # (3, 5): a comma ends the run
    listed = re.search(r"(?:[\d.]+,)+$", left)  # 3,5 is no way to say 5
    if listed and not bracket:
        return listed[0] + number[0]
    for candidate in (before + number[0] + after, bracket, number[0] + after):
        candidate = candidate.strip().rstrip(".,!?:; ").lstrip(",.:; ")
        if re.search(r"[-+*/^=√π\\(\[<>≤≥±]", candidate) and is_math(candidate):
            return candidate
    unit = re.match(r"\s?([a-zA-Z]+)(?:/[a-z]+|\^?[23²³])?", right)
    return (number[0] + unit[0] if unit and unit[1] in UNITS else number[0]).strip()


_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_IN_WORDS = {word: n for n, word in enumerate(_SMALL)}
_IN_WORDS |= {word: 10 * n for n, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6}
_NUMBER_WORD = f"(?:{'|'.join([*_IN_WORDS, *_SCALES])})"
_SPELLED = re.compile(rf"\b{_NUMBER_WORD}(?:(?:[\s-]+|\s+and\s+){_NUMBER_WORD})*\b", re.I)
_NOT_WHOLE = re.compile(r"\s+(?:and|point|hal(?:f|ves)|quarters?|\w+(?:th|rd)s?\b)|-")


def number_in_words(text: str) -> str:
    """The last number in words, as digits: "forty-two doubloons" is 42.

    "" where there is none, and for "no one" and "two thirds".
    """
    matches = list(_SPELLED.finditer(text))
    if not matches or matches[-1][0].lower() == "one" or _NOT_WHOLE.match(text, matches[-1].end()):
        return ""
    if _NEGATED.search(text[: matches[-1].start()][-30:]):
        return ""
    total = part = 0
    for word in re.findall("[a-z]+", matches[-1][0].lower()):
        if word == "hundred":
            part = max(part, 1) * 100
        elif word in _SCALES:
            total, part = total + max(part, 1) * _SCALES[word], 0
        elif word != "and":
            part += _IN_WORDS[word]
    return str(total + part)
