"""verifier/gold.py: what is a gold answer? A number, an expression, a text, or unreadable.

It is read once and kept: all completions of a group share their gold. Golds come as data sets
write them: bare, in a box, behind `####`, as "The answer is 5.", as a letter with its value.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from verifier.extract import BOX, MAX_ANSWER, extract, stated
from verifier.parse import parse
from verifier.text import CIRCLED, UNITS, NotMath, TooBig, normalise, plain_text
from verifier.words import in_digits, whole_number

KINDS = ("number", "expression", "text", "unreadable")

COSTUME = re.compile(
    r"\\(?:text|mbox|textbf|mathrm|mathbf|textit|textrm|textnormal)\s*\{([^{}]*)\}")
CHOICE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice) )?(?:\(?([A-J])\)?|\(([a-j])\))")
CLOCK = re.compile(r"\d{1,2}(?::\d\d)? ?(?:[ap]\.? ?m\b\.?)|\d{1,2}:\d\d:\d\d", re.I)
_LETTER_AND_VALUE = re.compile(r"(?:\(([A-J])\)|([A-J])[).:](?=\s))[\s~.:]*(?=\S)(.+)", re.S)
_VERB = re.compile(
    r"\b(?:is|are|was|has|have|had|equals?|costs?|makes?|gets?|needs?|there)\b", re.I)
_LABEL = re.compile(
    r"\W{0,3}(?:(?:final |my )?(?:ans|results?|solutions?|value|total)\b\s*[:=]\W{0,3}"
    r"|(?:so|hence|thus|therefore|then)\b,? )", re.I)
# Words are no products: yes is not y*e*s. What is made of usual variables stays one: xy, abc.
_LISTED = re.compile(r",? and |, ?")
_LETTERS = re.compile(r"[A-Za-z]{2,}")
_VARIABLES = ("abcd", "xyzwt", "mnkpq", "pqrst", "uvw", "rh", "ABCDEF", "PQRST", "XYZ")


class Gold(NamedTuple):
    """A gold answer as it was read. `text` is its bare text; `tree` is None where it is words."""

    text: str
    tree: tuple | None = None
    letter: str = ""                                    # of a choice
    value: Gold | None = None                           # beside that letter
    problem: str = ""                                   # why it can't be read

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.problem:
            return "unreadable"
        tree = self.value.tree if self.value else self.tree
        if tree is None:
            return "text"
        return "number" if is_rational(tree) else "expression"


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> Gold:
    """A gold answer, read. Never raises: what can't be read has a `problem`."""
    end = gold[-MAX_ANSWER:]
    boxed = BOX.search(end) or "####" in end or "<answer>" in end
    try:
        if len(gold) > MAX_ANSWER and not boxed:
            raise TooBig(f"{len(gold)} characters")
        return _read((extract(end)[0] if boxed else gold).strip())
    except (TooBig, RecursionError, OverflowError, MemoryError) as error:
        return Gold(gold, problem=f"{type(error).__name__} {error}")


def _read(text: str) -> Gold:
    if not text:
        return Gold("", problem="empty gold")
    plain = bare(text)
    if choice := CHOICE.fullmatch(plain):
        return Gold(text, letter=(choice[1] or choice[2]).upper())
    both = _LETTER_AND_VALUE.fullmatch(COSTUME.sub(r"\1", re.sub(r"\\[ ,;:]|\\q?quad", " ", text)))
    if both and not re.search(r"\([A-Ja-j]\)", both[3]):
        value = _read(both[3].strip().strip("$").strip())
        if value.tree is not None or re.match(r"[A-Za-z\\]", value.text):
            return Gold(text, letter=both[1] or both[2], value=value)
    in_words = "" if "\\" in text else whole_number(text)   # \\text{two} stays a text
    if are_words(plain) and not in_words or CLOCK.fullmatch(words(text)):
        return Gold(text)
    if re.fullmatch("[A-Z]{2,}", text):                 # the segment AB
        return Gold(text)
    for digits in (in_digits(text), in_words):
        tree = tree_of(digits) if digits else None
        if tree is not None and tree[0] != "text" and not is_name(tree, text):
            return Gold(digits, tree)
    inner = _sentence_value(text)
    if inner and inner != text:
        value = _read(inner)
        if value.tree is not None or len(value.text) <= 40:
            return value
    return Gold(text)


def _sentence_value(text: str) -> str:
    """What a gold sentence states: "The answer is 5.", "Answer: 5", "He has 5 apples left."."""
    if value := stated(text):
        return value
    label = _LABEL.match(text)
    if label:
        return text[label.end() :].strip("* ")
    digits = in_digits(text)
    numbers = re.findall(r"\d[\d,./:]*", digits)
    if len(numbers) == 1 and len(text.split()) >= 4 and _VERB.search(text) and "\\" not in text:
        return extract(text)[0]
    return ""


def is_word(text: str) -> bool:
    """Is this a word, as yes, odd or Tom, and no product of variables, as xy and abc?"""
    if not _LETTERS.fullmatch(text) or text in ("pi", "infinity", "infty", "inf"):
        return False
    return not any(set(text) <= set(letters) for letters in _VARIABLES) and bool(
        re.search("[aeiouyAEIOUY]", text))


def is_name(tree, text: str) -> bool:
    """Tim Cook, x axis: words that would parse as letters with a unit; 0xFF; a date."""
    if re.fullmatch(r"0[xX][0-9A-Fa-f]+|\d{4}-\d\d?-\d\d?|\d\d?/\d\d?/\d{4}", text.strip(" .$")):
        return True
    return tree[0] == "unit" and not re.search(r"[\d\\]", text) and tree[2].split()[-1] not in UNITS


def are_words(text: str) -> bool:
    """A word, or a list of words: Tom; Ann and Bob."""
    return all(is_word(item) for item in _LISTED.split(text))


def tree_of(text: str) -> tuple | None:
    inner = COSTUME.fullmatch(text)
    try:
        return parse(inner[1] if inner and re.search(r"\d", inner[1]) else text)
    except NotMath:
        return None


def plain_tree(tree):
    """Without sign, unit and percent."""
    while tree[0] in ("neg", "unit", "percent"):
        tree = tree[1]
    return tree


def is_rational(tree) -> bool:
    """A number written out: integer, decimal, fraction, with sign, unit or percent."""
    tree = plain_tree(tree)
    return tree[0] == "num" or tree[0] == "div" and all(is_rational(side) for side in tree[1:])


def bare(text: str) -> str:
    return COSTUME.sub(r"\1", text[:300]).strip(" .$*\n")


def words(text: str) -> str:
    """A text answer in the form in which texts are compared."""
    return plain_text(re.sub(r"\\[,;:! ]|[$~]|\*\*|__|`", " ", COSTUME.sub(r" \1 ", text)))


def circled(text: str) -> list[str]:
    """The circled digits of a text, sorted."""
    return sorted(CIRCLED.findall(text))


# --------------------------------------------------------------------------------------------------
# Texts

DENIAL = re.compile(
    r"\b(?:or|not?|nor|neither|either|never|if|whether|may|might|doubt|but|false|wrong"
    r"|unlikely)\b|n't|cannot", re.I)
_SQUEEZED = [(re.compile(pattern), symbol) for pattern, symbol in [
    (r"\\operatorname\s*\{([^{}]*)\}", r"\1"), (r"≡", r"\\equiv "),
    (r"\\(?:mathbb|mathbf|mathcal)\s*\{?\s*([A-Za-z])\s*\}?", r"\\mathbb{\1}"),
    (r"\\pmod\s*(?:\{([^{}]*)\}|(\w))", r"mod\1\2"), (r"\\[bp]?mod(?![a-z])", "mod"),
    (r"\(\s*mod\s*([^()]*)\)", r"mod\1"), (r"\\(max|min|gcd|lcm|deg)(?![a-z])", r"\1"),
    (r"\{\s*([\w+*-])\s*\}", r"\1"), (r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", r"\1~"), (r"\s+", ""),
]]


def _squeezed(text: str) -> str:
    """A text of symbols without its layout: blanks, braces of one letter, spellings of mod."""
    text = normalise(COSTUME.sub(r"\1", text))
    for pattern, symbol in _SQUEEZED:
        text = pattern.sub(symbol, text)
    return text.rstrip(".")


def same_text(gold: str, found: str) -> bool:
    """The same words, or symbols; or a sentence that ends in "is <gold>" and denies nothing.

    A gold of symbols is compared without blanks, and its name (f(n) = ...) may be left out.
    """
    if len(found) > 2000:
        found = found[-2000:]
    goal, said = words(gold), words(found)
    if goal == said or _LISTED.split(goal) == _LISTED.split(said):
        return True
    if re.search(r"[^\w\s.,:'-]", bare(gold)):
        try:
            goals, answer = _squeezed(gold), _squeezed(found)
        except (NotMath, TooBig):
            return False
        name, _, value = goals.partition("=")
        named = re.fullmatch(r"[A-Za-z](?:_?\w)?(?:\([a-z]\))?", name)
        return answer == goals or bool(named) and value == answer
    sentence = re.split(r"[.!?]\s+|\n", said)[-1].strip()
    ending = rf"\b(?:is|are|was|be|on|it's) (?:the |an? )?{re.escape(goal)}"
    if sentence == goal:                                # Is 17 prime? Yes.
        return True
    end = re.search(ending + "$", sentence)
    if end and not DENIAL.search(sentence[: end.start()]):
        return True
    other = {"yes": "no|not", "no": "yes"}.get(goal)    # Yes, because 4 > 3.
    return bool(other and re.match(rf"{goal}[,.;:!]", said)
                and not re.search(rf"\b(?:{other}|but|maybe|wait|actually)\b|n't", said))
