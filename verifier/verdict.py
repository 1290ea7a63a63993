"""verifier/verdict.py: two texts, a gold answer and a completion -> a verdict, in this process.

The answer is taken out of the completion (extract.py) and compared with the gold: as text, as a
choice, as words, else as trees (parse.py, equal.py). Every step is bounded. What would take long or
could hang is `Undecided` here; workers.py looks at it once more, `deep`, where it can be killed.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from verifier.equal import same
from verifier.extract import BOX, MAX_ANSWER, extract
from verifier.parse import parse
from verifier.text import NotMath, TooBig, plain_text
from verifier.value import Effort, Undecided


class Verdict(NamedTuple):
    """`verdict`: correct, wrong or unverifiable; `rule`: how found and compared; `extracted`."""

    verdict: str
    rule: str
    extracted: str = ""


_COSTUME = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf|textit|textrm)\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-J])\)?|\(([a-j])\)")
_CHOSEN = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?([A-J])"
                     r"(?:\)|[.:](?=\s|$)|,?(?=\s+(?:because|since|as)\b)|$)", re.I)
_CHOSEN_LAST = re.compile(
    r"(?:\bis|\bbe|'s|\bchoose|\bpick|\bwith|\boption|\bchoice) \(?([A-J])\)?$")
_DENIAL = re.compile(r"\b(?:or|not?|nor|either|never|if|whether|may|might|doubt)\b|n't", re.I)
_TIME = re.compile(r"\d{1,2}:\d\d")
_CLOCK = re.compile(r"\d{1,2}(?::\d\d)?\s*(?:am|pm)|\d{1,2}:\d\d:\d\d", re.I)


def verify(gold: str, answer: str, deep: bool = False) -> Verdict:
    """Compare a completion (or a bare answer) with a gold answer, in this process. Never raises.

    Every step is bounded. `deep` allows what only a worker that can be killed should do: more
    evaluations, and sympy.
    """
    try:
        return judged(gold, answer, deep)
    except Undecided as error:
        return Verdict("unverifiable", f"undecided: {error}")


def judged(gold: str, answer: str, deep: bool) -> Verdict:
    """As verify; raises Undecided where a deep look might still tell."""
    end = gold[-MAX_ANSWER:]
    goal = extract(gold)[0] if BOX.search(end) or "####" in end else gold
    found, rule = extract(answer)
    if not goal.strip():
        return Verdict("unverifiable", "empty gold", found)
    if not found.strip():
        return Verdict("wrong", f"{rule}: no answer", found)
    try:
        right, how = _compare(goal.strip(), found.strip(), deep)
    except (TooBig, RecursionError, OverflowError, MemoryError) as error:
        return Verdict("unverifiable", f"{rule}: {type(error).__name__} {error}"[:100], found)
    return Verdict("correct" if right else "wrong", f"{rule}: {how}", found)


def _compare(gold: str, found: str, deep: bool) -> tuple[bool, str]:
    """(equal?, by what): as text, as a choice, as words, else as trees."""
    if gold == found:
        return True, "same text"
    found = found.strip("*_` \n")
    found = re.sub(r"^[A-Za-z][A-Za-z' ]{3,40}=(?!=)", "", found).strip()  # Total cost = 5
    choice = _CHOICE.fullmatch(_bare(gold))
    if choice:
        return _same_choice(choice[0].strip("()").upper(), _bare(found)), "choice"
    if _TIME.fullmatch(gold) and _TIME.fullmatch(found):
        return False, "time of day"  # 3:30 may be a ratio, but beside 1:10 both are times
    goal = _tree(gold)
    if goal is None or goal[0] == "text":
        return _same_text(gold, found), "text"
    if re.fullmatch("[A-Z]{2,}", gold) or _CLOCK.fullmatch(_words(gold)):
        return _same_text(gold, found), "text"
    tree = _tree(found.rstrip("."))
    if tree is None:
        return False, "not mathematics"
    if _is_rational(goal) and _left_to_do(tree):
        return False, "sum left to do"
    effort = Effort(zlib.crc32(f"{gold}\0{found}".encode("utf-8", "replace")), deep)
    try:
        return same(goal, tree, effort), tree[0]
    except (TooBig, Undecided):
        raise
    except (ValueError, ZeroDivisionError) as error:  # NotMath, a digit outside its base, 1/0
        return False, f"not comparable: {error}"[:80]


def _plain(tree):
    """Without sign, unit and percent."""
    while tree[0] in ("neg", "unit", "percent"):
        tree = tree[1]
    return tree


def _is_rational(tree) -> bool:
    """A number written out: integer, decimal, fraction, with sign, unit or percent."""
    tree = _plain(tree)
    return tree[0] == "num" or tree[0] == "div" and all(_is_rational(side) for side in tree[1:])


def _left_to_do(tree) -> bool:
    """Whether an answer is the exercise: 12 - 9, 6 * 8, 48 / 8, where the gold is a number.

    It is equal in value. But copying the question's numbers costs a policy nothing, and one that
    may do so learns no other answer. Forms of a number count: 5 + 1/2, fractions that are no whole
    number, 1 million, powers, roots. So does "8 + 3 = 11": the number stands beside the exercise.
    """
    tree = _plain(tree)
    if tree[0] == "rel":
        done = [side for side in tree[2:] if not _left_to_do(side)]
        return len(done) < len(tree[2:]) and not any(map(_is_rational, done))
    if tree[0] not in ("add", "sub", "mul", "div"):
        return False
    if not all(_is_rational(side) or _left_to_do(side) for side in tree[1:]):
        return False
    left, right = (side[1] if side[0] == "neg" else side for side in tree[1:])
    kinds = left[0], right[0]
    if tree[0] == "div" and kinds == ("num", "num"):
        return right[1] not in (0, 1) and left[1] != 0 and (left[1] / right[1]).denominator == 1
    if tree[0] == "add" and kinds == ("num", "div"):
        return _left_to_do(right)
    in_words = kinds == ("num", "num") and right[1] in (10**3, 10**6, 10**9, 10**12)  # 1 million
    return not (tree[0] == "mul" and in_words)


def _tree(text: str) -> tuple | None:
    inner = _COSTUME.fullmatch(text)
    try:
        return parse(inner[1] if inner and re.search(r"\d", inner[1]) else text)
    except NotMath:
        return None


def _bare(text: str) -> str:
    return _COSTUME.sub(r"\1", text[:300]).strip(" .$*\n")


def _words(text: str) -> str:
    """A text answer in the form in which texts are compared."""
    return plain_text(re.sub(r"\\[,;:! ]|[$~]", " ", _COSTUME.sub(r" \1 ", text)))


def _same_text(gold: str, found: str) -> bool:
    """The same words; or a sentence that ends in "is <gold>", with no "or" and no "not" in it."""
    if len(found) > 2000:
        return False
    goal, said = _words(gold), _words(found)
    if _CLOCK.fullmatch(goal):
        goal, said = (re.sub(r":00|[. ]", "", t) for t in (goal, said))
    ending = rf"\b(?:is|are|was|be|on|it's) (?:the |an? )?{re.escape(goal)}"
    return goal == said or bool(re.search(ending + "$", said)) and not _DENIAL.search(said)


def _same_choice(letter: str, found: str) -> bool:
    """(B), B, b, "B) 12", "Option B", "I say it's B" name choice B; "A or B" does not."""
    match = _CHOSEN.match(found) or not _DENIAL.search(found) and _CHOSEN_LAST.search(found)
    rest = found[match.end() :] if match else ""
    more = re.match(r"\s*(?:,|or\b|and\b|&|/)", rest)
    return bool(match) and match[1].upper() == letter and not more
