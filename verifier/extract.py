"""verifier/extract.py: what is the answer in a completion, and by which rule was it found?

In this order: the last complete \\boxed{}, \\fbox{} or <answer> tag; the last `####` line; the
concluding statement ("the answer is ..."); else the last number or expression. Decisions (P25):
  the last complete box wins, wherever it stands; an empty last box is an empty answer: wrong
  boxes joined by "and", "or" or commas are one list: naming several values is no way to say one
  a box or tag that never closes is a truncated answer: wrong, unless a complete one exists
  what stands before </think> is no answer, if anything stands behind it
  a list where one value is asked ("3 or 4") stays a list, so it is wrong
  a copied placeholder is taken at its word
  a statement taken back ("The answer is 5. Wait, ...") does not count when a number follows it
Only the end of a completion is looked at, and every pattern takes about linear time in its length.
"""

from __future__ import annotations

import re

from verifier.parse import parse
from verifier.text import UNITS, NotMath, TooBig
from verifier.words import in_digits, is_operand, number_in_words, whole_number

MAX_ANSWER = 20_000  # characters of a completion that are looked at: its end
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\(?:boxed|fbox)(?![A-Za-z])\s*(?=[^\s{}$.,;:)])")
_BARE_BOX = re.compile(                                 # \\boxed 12, \\boxed\\frac12
    r"(?:[-+]?\d[\d,]*(?:\.\d+)?(?![\w^])|[A-Za-z](?![\w^])|[-+\\(\[\d][^\s$]*)")
_BOX_GOES_ON = re.compile(                              # $\\boxed 5 + 1$
    r"\s*(?:[-+*/^]|\\cdot|\\times)[^$\n]{1,100}(?=\$)")
_MINUS_BEFORE_BOX = re.compile(r"(?:[$=]|\\[(\[])\s*([-−]\s*)$")
_JOINT = re.compile(r"""
    [\s$]* (?: (?:,|;|&|\band\b|\bor\b|和|或|\\text\s*\{\s*(?:,|and|or)?\s*\}
                 |\\q?quad|\\[,; ]) [\s$]* ){1,6}
    (?P<label>(?:[A-Za-z]\w?|\\[a-z]+)(?:_\w)?\s*=)? [\s$]*""", re.X)
_JOINS = re.compile(r"[,;&和或]|\band\b|\bor\b")
_LABEL = re.compile(r"((?:\b[A-Za-z]\w?|\\[a-z]+)(?:_\w)?\s*=)[\s$]*$")
_TAG = re.compile(r"<(/?)(?:final[_ ])?answer>", re.I)
_STATEMENT = re.compile(r"""
    (?:\b(?:answers?|(?:correct|right|best)\ (?:option|choice))\b|答案|故选|答え|답|Ответ)
    (?:\s+(?:to|for)\b[^.\n]{0,80}?)?
    \s*(?:\*\*|__)?\s*
    (?:is|are|was|be|would\ be|will\ be|should\ be|comes\ to|equals|:|=|是|为|為|は|은|(?<=故选))
    (?:\s*(?:\*\*|__))?
    (?:\s*(?:simply|just|therefore|thus|equal\ to|:))*""", re.I | re.X)
_SOLUTIONS = re.compile(
    r"\b(?:solutions?|roots?|values?|results?|zeros|point|numbers|integers)\b"
    r"[^.\n=]{0,40}?\s(?:is|are|:)", re.I)
_RETRACTION = re.compile(
    r"\b(?:wait|actually|scratch that|correction|on second thought|hold on|oops)\b"
    r"|\?\s*(?:no|nay)\b", re.I)
_REJECTED = re.compile(                                 # 42 is wrong
    r"\W{0,3}(?:[a-z]+ )?(?:is|are|was)(?:n't| not| wrong| incorrect| too)\b", re.I)
_NEGATION = re.compile(r"\s*(?:not\b|n't)")
_DOUBTED = re.compile(r"(?:\bdo(?:n't| not) (?:think|believe)|\b(?:false|unlikely) that"
                      r"|\bI doubt)\b"
                      r"(?:(?!\b(?:but|yet|so|still|because|if|however|though|too|in)\b)"
                      r"[^.!?,;:\n…—(]){0,40}$", re.I)
_NEGATED = re.compile(r"(?:不是?|并非|\b(?:can)?not|n't|\bnever|\brather than|\binstead of)"
                      rf"\s*(?:just|be|equal|equal to)?\W{{0,4}}$|(?:^|[A-Za-z]{{2}}\s?)[≠≥≤]\s?$"
                      rf"|{_DOUBTED.pattern}", re.I)
_NUMBER = re.compile(r"""
    (?<![\w.^])
    (?:(?<![\w)\]]\ )[-−]\ ?)? [$€£¥]? (?:(?<![\w)\]\d])[-−])?  # sign, currency; in 10-7 no sign
    (?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,4}(?!\w))?|\.\d+)
    (?:\s\d+\s?/\s?\d+(?![\d/]) | \s?/\s?\d+(?:\.\d+)? | (?::|\s:\s)\d+ | [¼-¾⅐-⅞])?  # 1 1/2
    (?:\s?\\?% | \s?° | \s(?:percent|degrees))? (?!\d)
    | [-−]?[¼-¾⅐-⅞]""", re.X)
_FORMULA = re.compile(r"""
    \$\$(.{1,400}?)\$\$ | (?<!\\)\$((?:\\.|[^$\n\\]){1,400})\$(?!\d)
    | \\\((.{1,400}?)\\\) | \\\[(.{1,400}?)\\\]
    """, re.S | re.X)
_REASON = re.compile(r",? (?:because|since|as|which|so|when|where|for|if|after|from|by)\b|\s\(")
_ASIDE = re.compile(r"\s\((?=[^()]*[A-Za-z]{3})[^()]*\)")  # 42 (forty-two)
_REMARK = re.compile(r",\s+(?!and\b|or\b|\w+\s*=)(?=[A-Za-z]{2,})")  # 42, matey
_TWO_WORDS = re.compile("[A-Za-z]{2,}[!,.]? [A-Za-z]{2,}")
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$|\*)|(?<=\S)[!?]")
_MATH_CHARACTERS = (r"(?:[\d.+\-−–*/^()\[\]{}=×÷·√π%$€£¥°±<>≤≥∞∪²³!|,]|\\[a-zA-Z]+"
                    r"|\b(?:sqrt|pi|sin|cos|tan|ln|log)\b"
                    r"|(?:\b|(?<=\d))[a-zA-Z](?![a-zA-Z'’])|(?<!,)[ ])*")


def extract(text: str, in_words: bool = False) -> tuple[str, str]:
    """(answer, rule) of a completion; rule: box, answer tag, ####, statement, whole ...

    in_words: the answer asked for is a text. Then no number is looked for; the last resort is the
    whole text.
    """
    text = end_of(text)
    return _extract(text if in_words else in_digits(_spaced(text)), in_words)


def end_of(text: str) -> str:
    """The last MAX_ANSWER characters. The rest of a box that begins before them is no answer."""
    cut = len(text) - MAX_ANSWER
    if cut <= 0:
        return text
    begun = BOX.match(text, max(0, text.rfind(r"\boxed", 0, cut), text.rfind(r"\fbox", 0, cut)))
    if begun and text.startswith("{", begun.end()):
        end = closing_brace(text, begun.end())
        if end >= cut:
            return r"\boxed{}" + text[end + 1 :]
        if end < 0:
            return r"\boxed{" + text[cut:]
    return text[cut:]


def stated(text: str) -> str:
    """The value of the last "the answer is ..." in a text, or ""."""
    text = in_digits(_spaced(text[-MAX_ANSWER:]))
    return _concluding_statement(text) if _STATEMENT.search(text) else ""


def _extract(text: str, in_words: bool) -> tuple[str, str]:
    text = _after_thinking(text)
    box, place = _last_boxes(text)
    tagged, end = _last_tag(text)
    if end > place:
        return _extract(tagged, in_words)[0], "answer tag"
    if box is not None:
        return box, "box"
    if BOX.search(text):
        return "", "unclosed box"
    if _TAG.search(text):
        return "", "unclosed tag"
    line = _last_hash_line(text)
    if line:
        return _value_of_line(line), "####"
    if in_words:
        answer = _concluding_statement(text) if _STATEMENT.search(text) else ""
        return (answer, "statement") if answer else (text.strip(), "whole text")
    last_number = max((m.start() for m in _NUMBER.finditer(text)), default=-1)
    retractions = [m.end() for m in _RETRACTION.finditer(text) if m.end() <= last_number]
    tail = text[max(retractions, default=0) :]
    answer = _concluding_statement(tail)
    if answer:
        return answer, "statement"
    if len(text) <= 200 and re.match(r"\s*\(?[A-J][).:]\)?\s+\S[^\n]*$", text):
        return text.strip(), "option"
    if len(text) <= 200:
        number = whole_number(text.strip())
        if number and is_math(number):
            return number, "number in words"
        named = "=" in text and re.sub(r" (?:and|or) ", ", ", text)     # AB = 4 and CD = 5
        if not _TWO_WORDS.search(named or text) and is_math(text):
            return text, "whole"
    return last_expression(tail)


_EAST_ASIAN = re.compile("[\u3001-\u30ff\u3400-\u9fff\uac00-\ud7a3\uff01-\uff5e]")
_LETTER = "[\u3041-\u30fa\u30fc-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
_EDGE = re.compile(f"(?<={_LETTER})(?=[!-~])|(?<=[!-~])(?={_LETTER})")
_EITHER = re.compile(r"(?<=\d)\s?[个個つ本]?\s?(?:或者?|还是|か|또는)\s?(?=\d)")
_PUNCTUATION = str.maketrans({"。": ". ", "、": ", ", **{
    chr(code): chr(code - 0xFEE0) + " " * (code in (0xFF0C, 0xFF1A, 0xFF1B))
    for code in range(0xFF01, 0xFF5F)}})


def _spaced(text: str) -> str:
    """Blanks between Chinese, Japanese or Korean letters and all others; their commas as ours."""
    if not _EAST_ASIAN.search(text):
        return text
    return _EDGE.sub(" ", _EITHER.sub(" or ", text.translate(_PUNCTUATION)))


def _last_tag(text: str) -> tuple[str, int]:
    """(content, end) of the last complete <answer> tag; ("", -1) where there is none."""
    begun, found = None, ("", -1)
    for tag in _TAG.finditer(text):
        if not tag[1]:
            begun = tag.end()
        elif begun is not None:
            found, begun = (text[begun : tag.start()], tag.end()), None
    return found


def _after_thinking(text: str) -> str:
    """What follows the last </think>, if anything does."""
    tail = text.rpartition("</think>")[2]
    return tail if tail.strip() else text


def last_box(text: str) -> str | None:
    """Content of the last complete \\boxed{} or \\fbox{}; None where there is none.

    Boxes before it that are joined to it ("and", "or", commas) make one list with it.
    """
    return _last_boxes(text)[0]


def _last_boxes(text: str) -> tuple[str | None, int]:
    """(last_box, its place); (None, -1) where there is none."""
    boxes = []
    for match in list(BOX.finditer(text))[-32:]:
        if text.startswith("{", match.end()):
            end = closing_brace(text, match.end())
            if end >= 0:
                if boxes and match.start() < boxes[-1][1]:
                    boxes.pop()                         # a box in a box: the inner one counts
                boxes.append((match.start(), end + 1, text[match.end() + 1 : end]))
        elif bare := _BARE_BOX.match(text, match.end()):
            more = _BOX_GOES_ON.match(text, bare.end())
            content = bare[0].rstrip(".,;:!?)") + (more[0] if more else "")
            boxes.append((match.start(), bare.end(), content))
    if not boxes:
        return None, -1
    boxes = [_with_minus(text, *box) for box in boxes]
    items, (start, _, content) = [], boxes[-1]
    for before in boxes[-2::-1]:
        joint = _JOINT.fullmatch(text, before[1], start)
        if not joint or not _JOINS.search(joint[0]):
            break
        items.append((joint["label"] or "") + content)
        start, _, content = before
    label = _LABEL.search(text[max(0, start - 20) : start]) if items else None
    items.append((label[1] if label else "") + content)
    return ", ".join(reversed(items)), start


def _with_minus(text: str, start: int, end: int, content: str) -> tuple[int, int, str]:
    """A box with the minus before it, in a formula: $-\\boxed{5}$."""
    minus = _MINUS_BEFORE_BOX.search(text, max(0, start - 20), start)
    return (minus.start(1), end, f"-({content})") if minus else (start, end, content)


def closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, or -1; escaped braces do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    return -1


def is_math(text: str) -> bool:
    if _EAST_ASIAN.match(text.strip()):
        return False
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


def _value_of_line(line: str) -> str:
    """The value on a `####` line: it may stand in a statement, or have a remark behind it."""
    return _concluding_statement(line) or _stated_value(line)


def _concluding_statement(text: str) -> str:
    """The value of the last "the answer is ...", else of the last "the solutions are ...".

    The latter only when no number comes after it.
    """
    statements = [m for m in _STATEMENT.finditer(text) if not (
        _NEGATION.match(text, m.end()) or _DOUBTED.search(text[max(0, m.end() - 60) : m.end()]))]
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
    if whole_number(clause):
        return whole_number(clause)
    numbers = list(_NUMBER.finditer(clause))
    if len(numbers) == 1 and is_operand(clause, *numbers[0].span()):
        return clause
    if len(numbers) == 1 and not _is_denied(clause, numbers[0]):
        return _with_unit(clause, numbers[0])
    return not numbers and number_in_words(clause) or clause


_IN_EXPRESSIONS = re.compile(r"[-+*/^=√π²³!\\(\[<>≤≥±]|sqrt|log|ln|sin|cos|tan|pi")
_BOLD = re.compile(r"(?<![\w*)}\]])\*{1,3}(?=\S)([^*\n]{1,300})(?<=\S)\*{1,3}(?![\w*({\[])")


def last_expression(text: str) -> tuple[str, str]:
    """The last number, with the formula or the `a or b` that it ends; the text if it has none."""
    text = _BOLD.sub(r"\1", text)
    formulas = list(_FORMULA.finditer(text))
    numbers: list[re.Match] = []                        # the last two
    for match in reversed(list(_NUMBER.finditer(text))):
        if not _is_denied(text, match):
            numbers.insert(0, match)
        if len(numbers) == 2:
            break
    if not numbers:
        if in_words := number_in_words(text):
            return in_words, "number in words"
        if formulas:
            return next(g for g in formulas[-1].groups() if g), "last formula"
        if _NUMBER.search(text) or len(text) > 200:
            return "", "no answer"
        return text.strip(), "whole text"
    last = numbers[-1]
    if is_operand(text, *last.span()):
        return "", "sum in words"
    for formula in formulas:
        if formula.start() < last.start() and last.end() <= formula.end():
            return next(g for g in formula.groups() if g), "last formula"
    if len(numbers) > 1:
        before, joiner = text[: numbers[-2].start()][-20:], text[numbers[-2].end() : last.start()]
        if re.fullmatch(r"\s*(?:,\s*)?or\s+|~", joiner) or re.search(r"\bbetween \W?$", before):
            return text[numbers[-2].start() : last.end()], "last number"
    return _around(text, last), "last number"


def _is_denied(text: str, number: re.Match) -> bool:
    """not 42, 42 is wrong"""
    negated = _NEGATED.search(text[max(0, number.start() - 60) : number.start()])
    return bool(negated or _REJECTED.match(text, number.end()))


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
    unit = _UNIT.match(text, number.end())
    if unit and unit[2] in UNITS and before.rstrip().endswith("="):
        return _with_unit(text, number)                 # 10m - 5m = 5m
    for candidate in (before + number[0] + after, bracket, number[0] + after):
        candidate = candidate.strip("* ").rstrip(".,!?:;* ").lstrip(",.:;=* ")
        if _IN_EXPRESSIONS.search(candidate) and is_math(candidate):
            return candidate
    return _with_unit(text, number)


_UNIT = re.compile(r"(\s?)(?:(?:square|cubic|sq\.?|cu\.?) )?([a-zA-Z]+)"
                   r"((?:/[a-z]+|\ per\ [a-z]+|\^?[23²³])?)")


def _with_unit(text: str, number: re.Match) -> str:
    """A number with the unit behind it, and with letters that touch it: 42x and 3k are not 42, 3.

    Ordinals (5th), decades (1960s) and words (42apples) are their number.
    """
    unit = _UNIT.match(text, number.end())
    if not unit or unit[2] in ("st", "nd", "rd", "th", "s") and not unit[1]:
        return number[0].strip()
    if unit[2] in UNITS:
        return f"{number[0].strip()} {unit[0].strip()}"
    return (number[0] + ("" if unit[1] or len(unit[2]) > 3 else unit[2])).strip()
