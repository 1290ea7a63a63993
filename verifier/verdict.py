"""verifier/verdict.py: two texts, a gold answer and a completion -> a verdict, in this process.

The answer is taken out of the completion (extract.py) and compared with the gold: as text, as a
choice, as words, else as trees (parse.py, equal.py). Every step is bounded. What would take long or
could hang is `Undecided` here; workers.py looks at it once more, `deep`, where it can be killed.
"""

from __future__ import annotations

import re
import zlib
from fractions import Fraction
from typing import NamedTuple

from verifier.copied import is_copied, left_to_do, without_question
from verifier.equal import same
from verifier.extract import end_of, extract, stated
from verifier.gold import (
    CLOCK,
    COSTUME,
    DENIAL,
    Gold,
    bare,
    circled,
    is_rational,
    read_gold,
    same_text,
    tree_of,
    words,
)
from verifier.text import CIRCLED, TooBig
from verifier.value import Effort, Undecided, symbols
from verifier.words import whole_number, written


class Verdict(NamedTuple):
    """`verdict`: correct, wrong or unverifiable; `rule`: how found and compared; `extracted`;
    `score`: from 0 to 1 where a task has a scorer of its own (scorer.py)."""

    verdict: str
    rule: str
    extracted: str = ""
    score: float | None = None


_CHOSEN = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?([A-J])"
                     r"(?:\)|[.:](?=\s|$)|,?(?=\s+(?:because|since|as|is (?:correct|right))\b)|$)",
                     re.I)
_CHOSEN_LAST = re.compile(
    r"(?:\bis|\bbe|'s|\bchoose|\bpick|\bwith|\boption|\bchoice) \(?([A-J])\)?$")
_MORE = re.compile(                                     # behind a letter: other letters, or a no
    r"\s*(?:,|or\b|and\b|&|/|is (?:wrong|incorrect|not (?:right|correct)|(?:right|correct) or\b))"
    r"|[\s.]*(?:[Nn]o\b,?\s*\(?[A-J]\b|(?:\(?[A-J][).]?\s*)+$)")
_LETTER_FIRST = re.compile(r"\(?([A-J])[).:]\)?\s*(?=\S)")
_TIME = re.compile(r"\d{1,2}:\d\d")


def verify(gold: str, answer: str, question: str = "", deep: bool = False) -> Verdict:
    """Compare a completion (or a bare answer) with a gold answer, in this process. Never raises.

    With the `question`, an answer that only copies it is wrong. Every step is bounded. `deep`
    allows what only a worker that can be killed should do: more evaluations, and sympy.
    """
    try:
        return judged(gold, answer, question, deep)
    except Undecided as error:
        return Verdict("unverifiable", f"undecided: {error}")


def judged(gold: str, answer: str, question: str, deep: bool) -> Verdict:
    """As verify; raises Undecided where a deep look might still tell."""
    goal = read_gold(gold)
    in_words = goal.tree is None and not goal.letter
    if question:
        answer = without_question(end_of(answer), question)
    found, rule = extract(answer, in_words)
    if goal.problem:
        return Verdict("unverifiable", goal.problem[:100], found)
    if not found.strip():
        return Verdict("wrong", f"{rule}: no answer", found)
    try:
        right, how = _compare(goal, found.strip(), question, deep)
    except (TooBig, RecursionError, OverflowError, MemoryError) as error:
        return Verdict("unverifiable", f"{rule}: {type(error).__name__} {error}"[:100], found)
    return Verdict("correct" if right else "wrong", f"{rule}: {how}", found)


def gold_kind(gold: str) -> tuple[str, str]:
    """(number, expression, text or unreadable; why it is unreadable, or "") of a gold answer.

    A gold that is no number must be right against itself in a box. Else no answer could be.
    """
    goal = read_gold(gold)
    if goal.kind in ("expression", "text"):
        itself = verify(gold, rf"\boxed{{{goal.text}}}")         # no file may hang its reader
        if itself.verdict != "correct":
            return "unreadable", "it does not match itself in a box"
    return goal.kind, goal.problem


def _compare(goal: Gold, found: str, question: str, deep: bool) -> tuple[bool, str]:
    """(equal?, by what): as text, as a choice, as words, else as trees."""
    if goal.text == found:
        return True, "same text"
    found = re.sub(r"^[*_`\s]{1,5}|[*_`\s]{1,5}$", "", found)
    found = re.sub(r"^[A-Za-z][A-Za-z' ]{3,40}=(?!=)", "", found).strip()  # Total cost = 5
    if goal.letter:
        return _same_choice(goal, found, question, deep), "choice"
    if CIRCLED.search(goal.text):
        return _same_circled(goal.text, found), "circled digits"
    clock = words(goal.text)
    if CLOCK.search(words(found)) and (CLOCK.fullmatch(clock) or _TIME.fullmatch(clock)):
        return _same_time(clock, words(found)), "time of day"
    if _TIME.fullmatch(goal.text) and _TIME.fullmatch(found):
        return False, "time of day"  # 3:30 may be a ratio, but beside 1:10 both are times
    if goal.tree is None:
        return same_text(goal.text, found), "text"
    tree = _tree_of_answer(found, goal)
    if tree is None:
        return False, "not mathematics"
    if is_rational(goal.tree) and left_to_do(tree):
        return False, "sum left to do"
    if is_copied(goal.tree, tree, question):
        return False, "copied from the question"
    effort = Effort(zlib.crc32(f"{goal.text}\0{found}".encode("utf-8", "replace")), deep)
    try:
        return same(goal.tree, tree, effort), tree[0]
    except (TooBig, Undecided):
        raise
    except (ValueError, ZeroDivisionError) as error:  # NotMath, a digit outside its base, 1/0
        return False, f"not comparable: {error}"[:80]


_THOUSANDS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_SHORT = re.compile(r"([-−]?\\?[$€£¥]?[-−]?)(\d[\d,]*(?:\.\d+)?)([kKMB])")
_SQUARE_METRES = re.compile(r"(?<=\d)m(?=(?:[²³]|\^\{?[23]\}?)\.?$)")  # 12m² beside a number
_SI = re.compile(r"(?<=\d)\s[NJWVA](?=\.?$)")         # 5 N, beside a number, is no product
_OPTION = re.compile(r"\(?[A-J](?:\)|[.:](?=\s))(?:\\[ ,;:]|[\s:~])*(?=\S)")


def _tree_of_answer(found: str, goal: Gold) -> tuple | None:
    """An answer's tree, without the letter of an option. For a gold without letters 3k is 3000."""
    found = _OPTION.sub("", re.sub(r"\\[a-z]+\s*\{\s*(\([A-J]\))\s*\}", r"\1", found), count=1)
    short = _SHORT.fullmatch(found.rstrip("."))
    if short and not symbols(goal.tree):
        found = short[1] + written(Fraction(short[2].replace(",", "")) * _THOUSANDS[short[3]])
    if not symbols(goal.tree):
        found = _SI.sub("", _SQUARE_METRES.sub(" m", found))
    plain = bare(found)
    in_words = "" if "\\" in found else whole_number(plain)  # \\text{zero} stays a text
    for text in (in_words, found.rstrip("."), stated(plain)):
        tree = tree_of(text) if text else None
        if tree:
            return tree
    return None


def _same_choice(goal: Gold, found: str, question: str, deep: bool) -> bool:
    """(B), B, b, "B) 12", "Option B", "I say it's B" name choice B; "A or B" does not.

    With a value beside the gold's letter either will do, but what is said of both must be right.
    """
    said = bare(COSTUME.sub(r"\1", re.sub(r"\\[ ,;:]|\\q?quad|~", " ", found)))
    match = _CHOSEN.match(said) or not DENIAL.search(said) and _CHOSEN_LAST.search(said)
    if goal.value is None:
        rest = said[match.end() :] if match else ""
        more = _MORE.match(rest)
        return bool(match) and match[1].upper() == goal.letter and not more
    first = _LETTER_FIRST.match(said)
    if first and first[1] == goal.letter:
        return _compare(goal.value, said[first.end() :].strip(), question, deep)[0]
    if match and not said[match.end() :].strip(" ."):
        return match[1].upper() == goal.letter
    return not first and _compare(goal.value, found, question, deep)[0]


def _same_circled(gold: str, found: str) -> bool:
    """The same circled digits in any order: ①③ is ③, ①. They are names of statements, no 13."""
    runs = [m for m in re.finditer(rf"{CIRCLED.pattern}(?:(?:\s|,|;|、|，|\\|and|和|\$)*"
                                   rf"{CIRCLED.pattern})*", found)]
    if not runs or re.search(r"[^\s,;、，$\\]", CIRCLED.sub("", re.sub("and|和", "", gold))):
        return words(gold) == words(found)
    before, after = found[: runs[-1].start()][-60:], found[runs[-1].end() :][:60]
    before = re.split("[.;。\n]", before)[-1]
    denied = re.search(r"\b(?:not|except|wrong|false|incorrect|or)\b|n't|错|不|或", before + after)
    return not denied and circled(runs[-1][0]) == circled(gold)


def _same_time(gold: str, found: str) -> bool:
    """The same time of day; am or pm must agree where both have it."""
    clocks = [m[0] for m in CLOCK.finditer(found)] or [found]
    times = []
    for text in (gold, clocks[-1]):
        text = re.sub(r"[.\s]", "", text.lower())
        half = text[-2:] if text[-2:] in ("am", "pm") else ""
        parts = [int(n) for n in re.findall(r"\d+", text)]
        times.append((half, (parts + [0, 0])[:3]))
    (half, time), (other_half, other) = times
    return time == other and (half == other_half or not half) and len(set(clocks)) == 1
