"""The grade in a judge's reply: 1 to 5, or None where the reply does not say it clearly.

A judge writes more than a digit. It repeats the form ("Score (1-5): 4"), thinks aloud, or takes a
grade back. First all that is not a grade goes: thoughts, markdown, the scale, its legend. Then each
place that states a grade is found: after a label ("score", "I would give"), on a scale ("4 out of
5"), or alone on a line. Places that agree are the grade. Where they differ, the last one counts
only after words that take the others back. A range, a fraction or another scale is never rounded.

Left out: grades in other languages than English, and letters. They are asked for again.
"""

import re
import unicodedata

ONE = r"(?<=[:=])\s*one\b|^[^\w\n]*one\b(?=[^\w\n]*$)|\bone(?= out of 5\b)"  # and not "a good one"
DIGITS = {"zero": "0", "two": "2", "three": "3", "four": "4", "five": "5"}
THOUGHT = r"<(think|thinking|thought|reasoning|reflection)>.*?(?:</\1>|\Z)"
SCALE = (  # the form and not the grade, in this order
    r"\b1\s*([,/|]|or|\s)\s*2\W+3\W+4\W+(?:or\s+|and\s+)?5\b",          # 1, 2, 3, 4 or 5
    r"\b(?:on )?(?:an? |the )?(?:scale )?(?:of |from |between )?"        # on a scale of 1 to 5
    r"1\s*(?:-|to|and|through|\.\.+)\s*5(?: scale)?(?![\d/]|\.\d)",
    r"[(\[][^()\[\]\n]*\d\s*(?:=|is |means )[^()\[\]\n]*[)\]]",         # (1 = worst, 5 = best)
    r"[(\[]\s*1\b[^()\[\]\d\n]*\b5\b[^()\[\]\d\n]*[)\]]",              # (1 worst to 5 best)
    r"\b(?:from )?1\s*\([^()\n]*\)\s*(?:-|to)\s*5\s*\([^()\n]*\)",  # from 1 (worst) to 5 (best)
    r"[(\[]\s*(?:out of|of|max\.?|maximum|/)\s*5\s*[)\]]",              # (out of 5)
)
OTHER_SCALE = re.compile(r"\b(?:scale|range)\b[^.\n]{0,15}\d\s*(?:-|to)\s*\d"
                         r"|[(\[]\s*\d+\s*(?:-|to)\s*\d+\s*[)\]]", re.I)
LABEL = (r"\b(?:scor(?:e|es|ed|ing)|rat(?:e|ed|ing)|grad(?:e|ed|ing)|mark|verdict|judge?ment|"
         r"assessment|evaluation|(?:final|my) answer|gets?|deserves?|earns?|merits?|receives?|"
         r"i(?:'d| would|'ll| will| have to)? (?:say|give|assign|award|choose|go with|"
         r"settle on))\b")
NUMBER = r"(?<![\w.,/-])-?\d+(?:[.,]\d+)?(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?"
STATED = re.compile(
    rf"{LABEL}(?:[\s:=\-|>]*|[^\d.;!?\n]{{0,40}}?)(?P<labelled>{NUMBER})"
    rf"|(?P<scaled>{NUMBER}(?=\s*(?:stars?|points?)\b)|(?<![\w.,/])\d[\d.]*\s*(?:/|out of)\s*\d+)"
    r"|(?P<between>\bbetween \d and \d\b)"
    rf"|^(?:[^\w\n-]|- )*(?P<alone>{NUMBER})[^\w\n%+-]*$", re.I | re.M)
HEDGED = re.compile(r"[\s(,]*(?:(?:or|to|and|maybe|perhaps|possibly|if not|but|->|[-~/,&]|\.\.+)\s*"
                    r"(?:a |an |even |maybe |perhaps |possibly )*\d|and a half|[+%?])", re.I)
GOES_ON = re.compile(  # what may follow a grade; "3 facts" and "5 means" are no grades
    r"(?!\w|/)(?:\s*(?:stars?|points?)\b)?"
    r"(?:\W*$|\s*[.,;:!?)|\]]|\s*-(?!\w)|\s*\n|\s+[A-Z(]|\s+(?:because|since|as|for|and|but|so|"
    r"given|due|with|here|overall|on|in|this|that|it|the|from|while|though)\b)")
DENIED = re.compile(r"\b(?:not|never|cannot|no|neither|nor|without)\b|n't\b", re.I)
VAGUE = re.compile(r"\b(?:between|than|above|below|least|most|almost|nearly|around|about|roughly|"
                   r"approximately|up to|could|might|may|maybe|perhaps|possibly|either)\b|~|"
                   r"[<>]=?\s*$", re.I)
TAKEN_BACK = re.compile(r"\b(?:reflection|wait|actually|revis\w+|correct(?:ion|ed)|chang\w+|"
                        r"instead|reconsider\w*|sorry|second thought|hmm)\b", re.I)
SUMMED_UP = re.compile(r"\b(?:final|finally|therefore|thus|hence|so|overall|conclusion)\b", re.I)

RULE, HEAD = re.compile(r"[\s|:-]*-[\s|:-]*"), re.compile("(?:score|rating|grade)s?", re.I)


def score(reply):
    """The grade 1..5 that a reply states, or None: ask again."""
    text = plain(reply)
    if OTHER_SCALE.search(text):
        return None
    said, end, grades = None, 0, set()
    for found in STATED.finditer(text):
        grade = stated(text, found)
        if grade is None:
            continue
        since = text[end:found.end()]
        if TAKEN_BACK.search(since) or SUMMED_UP.search(since):
            grades = set()
        grades.add(grade)
        said, end = grade, found.end()
    if (regret := TAKEN_BACK.search(text, end)) and re.search(r"\d", text[regret.end():]):
        return None                                     # taken back, for what is not clear
    return said if len(grades) == 1 and said in range(1, 6) else None


def plain(reply):
    """A reply without thoughts, markup and the scale, number words as digits."""
    text = unicodedata.normalize("NFKC", reply).replace("\u2019", "'")
    text = re.sub(r"[\u2010-\u2015\u2212]", "-", text)
    text = re.sub(THOUGHT, "\n", text, flags=re.I | re.S)
    text = re.sub(r"\A.*</(?:think|thinking|thought|reasoning|reflection)>", "", text,
                  flags=re.I | re.S)                    # servers may swallow the opening tag
    text = re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:boxed|text|mathbf|textbf)\b", "", text)
    text = re.sub(r"<(score|rating|grade)>", r"\n\1: ", text, flags=re.I)
    text = re.sub(r"</?\w+>|<\|.*?\|>", "\n", text)
    text = re.sub(r"[*_`#$\"{}\\]", " ", text)
    text = re.sub(r"\bmax(?:imum)? score[\s:=]{1,5}\d+", " ", text, flags=re.I)
    text = re.sub(r"out of (?:an? |the )?(?:possible |maximum |max )?(?:of )?5\b", "out of 5", text)
    text = re.sub(rf"\b({'|'.join(DIGITS)})\b", lambda word: DIGITS[word[0].lower()], text,
                  flags=re.I)
    text = re.sub(ONE, " 1", text, flags=re.I | re.M)
    for form in SCALE:
        text = re.sub(form, " ", text, flags=re.I)
    return without_tables(text)


def without_tables(text):
    """Tables with a column of scores, a line a row: "Overall score: 4". A legend stays as it is."""
    lines = text.split("\n")
    for i in range(len(lines) - 2):
        if not ("|" in lines[i + 1] and RULE.fullmatch(lines[i + 1])):
            continue
        place = [n for n, cell in enumerate(cells(lines[i])) if HEAD.fullmatch(cell)]
        last = min(len(lines), i + 50)
        end = next((n for n in range(i + 2, last) if "|" not in lines[n]), last)
        if len(place) != 1 or place == [0] and end - i > 3:  # grades and what they mean
            continue
        for n in range(i + 2, end):
            row = cells(lines[n])
            if place[0] < len(row):
                lines[n] = f"{row[0] if place[0] else ''} score: {row[place[0]]}"
    return "\n".join(lines)


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def stated(text, found):
    """What a match of `STATED` says: a grade, 0 where it is unclear, None where it is no grade."""
    if found["between"]:
        return 0
    number = found["labelled"] or found["scaled"] or found["alone"]
    start = found.end() - len(number)
    sentence = re.split(r"[.;!?\n]", text[max(start - 300, 0):start])[-1]
    clause = sentence.split(",")[-1]
    if DENIED.search(clause) or re.search(r"\bif\b", sentence, re.I):
        return None
    whole = re.fullmatch(r"([1-5])(?:\.0+)?(?:\s*(?:/|out of)\s*5(?:\.0+)?)?", number, re.I)
    if VAGUE.search(clause) or HEDGED.match(text, found.end()):
        return 0
    if not GOES_ON.match(text, found.end()):
        return None
    return int(whole[1]) if whole else 0
