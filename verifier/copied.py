"""verifier/copied.py: is an answer the exercise itself, or a sum left undone? (P33)

`12 - 9` is equal to 3. But copying the question's numbers costs a policy nothing, and one that is
paid for it learns no other answer. So an answer earns nothing where it
  is plain arithmetic on numbers (12 - 9, 48 / 8), and the gold is a number
  stands in the question, and is not in the gold's form: the 5! of "Evaluate 5!"
  is a fraction that can be reduced, where the question asks for lowest terms
  does what the question asks to be worked out (a root, a power ...), and the gold is a number
Usual final forms earn: 3/4, 2 sqrt 3, and 2^10 where the question has no power.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from verifier.gold import is_rational, plain_tree
from verifier.parse import parse
from verifier.text import NotMath, TooBig
from verifier.words import in_digits

_KINDS = {"pow": "power", "factorial": "factorial", "factorial2": "factorial", "pm": "pm"}
_FORMULA = re.compile(r"\$\$?(.{1,400}?)\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.S)
_RUN = re.compile(r"(?:[\d.+\-−–*/^()\[\]{}×÷·√π%!|=<>≤≥²³⁴⁵⁶⁷⁸⁹]|\\[a-zA-Z]+"
                  r"|\b(?:sqrt|log|ln|sin|cos|tan|x)(?![a-z])|\b[a-zA-Z]\b|(?<=\d)[a-zA-Z]\b|[ ])+")
_CONVERTS = re.compile(r"\b(?:decimal|percent|fraction|convert|express|write|simplif|reduce|lowest"
                       r"|round|rewrite)", re.I)
_REDUCES = re.compile(r"\b(?:simplif|simplest|reduced?\b|lowest terms)", re.I)
_SENTENCE = re.compile(r"[^.?!\n]*(?:\.(?=\d)[^.?!\n]*)*[.?!\n]?")
_ONE = ("num", 1)
MAX_QUESTION = 4000  # characters of a question that are looked at: its end


def without_question(text: str, question: str) -> str:
    """A completion without the sentences it copies from the question: their numbers answer nothing.

    Sentences of at least four words; those that state an answer (solved examples) are left.
    """
    for sentence in _sentences(question[-MAX_QUESTION:]):
        text = text.replace(sentence, " ")
    return text


@lru_cache(maxsize=1024)
def _sentences(question: str) -> tuple[str, ...]:
    sentences = [question, *_SENTENCE.findall(question)]
    cleaned = {sentence.strip() for sentence in sentences}
    return tuple(sorted((s for s in cleaned if len(s.split()) >= 4 and re.search(r"\d", s)
                         and not re.search(r"answer|(?<![<>])=", s, re.I)), key=len, reverse=True))


def is_copied(goal: tuple, tree: tuple, question: str) -> bool:
    """Whether an answer equal to `goal` leaves to be done what the question asks."""
    whole, goal, tree = tree, plain_tree(goal), plain_tree(tree)
    if tree[0] == "rel" and "=" in tree[1] and any(is_rational(side) for side in tree[2:]):
        return False                                    # 5! = 120
    value = plain_tree(tree[-1]) if tree[0] == "rel" and tree[1][-1] == "=" else tree
    if not question or _key(goal, strict=True) in (_key(tree, True), _key(value, True)):
        return False
    asked, kinds = _asked(question[-MAX_QUESTION:])
    for part in (whole, tree, value):
        if _key(part) in asked and (not _is_final(part) or _CONVERTS.search(question)):
            return True
    if _REDUCES.search(question) and _is_quotient(goal) and _is_quotient(value):
        return not _is_final(value)                     # 6/8, where the lowest terms were asked
    return is_rational(goal) and bool(_kinds(tree) & kinds)


def _is_final(tree) -> bool:
    """A number in a usual final form: 5, 0.75, a fraction in lowest terms."""
    if _is_quotient(tree):
        return (tree[1][1] / tree[2][1]).denominator == tree[2][1]
    return tree[0] in ("num", "sym", "const")


def _is_quotient(tree) -> bool:
    """One number over another: 6/8."""
    return tree[0] == "div" and tree[1][0] == tree[2][0] == "num" and tree[2][1] != 0


@lru_cache(maxsize=1024)
def _asked(question: str) -> tuple[frozenset, frozenset]:
    """(keys of all expressions in a question, kinds of operations in them)."""
    keys, kinds = set(), set()
    question = in_digits(question)
    formulas = [next(g for g in m.groups() if g) for m in _FORMULA.finditer(question)]
    rest = _FORMULA.sub(" ; ", question)
    runs = [m[0].strip(" .!-") + "!" * m[0].rstrip(" .").endswith("!") for m in _RUN.finditer(rest)]
    for text in [*formulas, *(run for run in runs if re.search(r"\d", run))]:
        for piece in {text, text.strip(" .?!,="), *re.split(r"[=?]", text),
                      *re.split(r"[=?<>≤≥]", text)}:            # also what stands between tags
            try:
                tree = parse(piece.strip(" .,").rstrip(" -"))
            except (NotMath, TooBig, RecursionError):
                continue
            kinds |= _kinds(tree)
            _collect(tree, keys)
    return frozenset(keys), frozenset(kinds)


def _collect(tree, keys: set) -> None:
    if tree[0] not in ("sym", "const", "text", "matrix"):
        keys.add(_key(tree))
    for part in tree[1:]:
        if _is_tree(part):
            _collect(part, keys)


def _key(tree, strict: bool = False) -> str:
    """A tree as a text that is the same for a + b and b + a, a * b and b * a; unless strict, also
    for x x and x^2, -(a - b) and b - a."""
    op, *args = tree
    if op in ("div", "pow") and args[1] == _ONE:        # + 0 and times 1 change nothing
        return _key(args[0], strict)
    if op == "pow" and args[0] == _ONE and not strict:
        return _key(_ONE)
    if op == "neg" and args[0][0] in ("add", "sub") and not strict:
        return f"a({','.join(sorted(_terms(args[0], '-')))})"
    if op == "rel" and tree[1] == ("=",):
        return f"=({','.join(sorted(_key(a, strict) for a in args[1:]))})"
    if op in ("add", "sub", "mul"):
        neutral = "num(1)" if op == "mul" else "num(0)"
        terms = sorted(t for t in _terms(tree, "", strict) if t.lstrip("-") != neutral)
        if op == "mul" and not strict:
            terms = sorted(t if n == 1 else f"pow({t},num({n}))" for t, n in Counter(terms).items())
        return terms[0] if len(terms) == 1 else f"{op[0].replace('s', 'a')}({','.join(terms)})"
    return f"{op}({','.join(_key(a, strict) if _is_tree(a) else str(a) for a in args)})"


def _terms(tree, sign: str = "", strict: bool = False) -> list[str]:
    """The operands of nested sums, or of nested products."""
    op = tree[0]
    if op in ("add", "sub"):
        flipped = {"": "-", "-": ""}[sign] if op == "sub" else sign
        return [t for part, s in ((tree[1], sign), (tree[2], flipped))
                for t in (_terms(part, s, strict) if part[0] in ("add", "sub") else
                          [_signed(part, s, strict)])]
    return [t for part in tree[1:]
            for t in (_terms(part, "", strict) if part[0] == "mul" else [_key(part, strict)])]


def _signed(part, sign: str, strict: bool) -> str:
    while part[0] == "neg" and not strict:
        part, sign = part[1], {"": "-", "-": ""}[sign]
    return sign + _key(part, strict)


def _is_tree(value) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], str)


def _kinds(tree) -> set[str]:
    """The kinds of operations in a tree beside plain arithmetic; powers of ten are notation."""
    op, *args = tree
    found = set()
    if op == "fn":
        found.add(args[0])
    elif op in _KINDS and not (op == "pow" and args[0] == ("num", 10)):
        found.add(_KINDS[op])
    for part in args:
        if _is_tree(part):
            found |= _kinds(part)
    return found


# --------------------------------------------------------------------------------------------------
# Plain arithmetic


def left_to_do(tree) -> bool:
    """Whether an answer is plain arithmetic on numbers: 12 - 9, 6 * 8, 48 / 8.

    Forms of a number count: 5 + 1/2, fractions that are no whole number, 3/3, powers, roots. So
    does "8 + 3 = 11": the number stands beside the exercise. |3 + 4| and (3 + 4)^1 do not.
    """
    tree = plain_tree(tree)
    if tree[0] == "rel":
        done = [side for side in tree[2:] if not left_to_do(side)]
        return len(done) < len(tree[2:]) and not any(map(is_rational, done))
    if tree[0] == "pow":                                # (3 + 4)^1; but 2^{10 - 1} is a form
        return left_to_do(tree[1])
    if tree[0] not in ("add", "sub", "mul", "div"):
        return any(_is_tree(side) and left_to_do(side) for side in tree[1:])
    if any(left_to_do(side) for side in tree[1:]):
        return True
    if any(side[0] == "pow" and side[2] == _ONE for side in tree[1:]):
        return True                                     # 3 * 4^1
    if not all(is_rational(side) or _is_dressed(side) for side in tree[1:]):
        return False
    left, right = (side[1] if side[0] == "neg" else side for side in tree[1:])
    kinds = left[0], right[0]
    if tree[0] == "div" and kinds == ("num", "num"):
        whole = right[1] not in (0, 1) and (left[1] / right[1]).denominator == 1
        return whole and left[1] not in (0, right[1])   # 3/3 is nobody's exercise
    if tree[0] == "add" and kinds == ("num", "div"):
        return left_to_do(right) or right[2] == _ONE
    return True


def _is_dressed(tree) -> bool:
    """|3|, or 3 in base 10."""
    return tree[0] == "base" or tree[:2] == ("fn", "abs") and is_rational(tree[2])
