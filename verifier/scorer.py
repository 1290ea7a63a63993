"""verifier/scorer.py: an answer judged by the scorer of its task, of the `reasoning-gym` package.

A scorer gives 0 to 1, and some is given for what is nearly right. That is the reward; an answer is
`correct` from 1 on. Scorers are not ours, and some run `eval` on the answer. So they work in the
processes of workers.py alone, which are killed when late. There an answer may open no file to
write, and start nothing. What a scorer fails on earns 0.
"""

import base64
import json
import os
import pickle
import re

from common.gym import dataset
from verifier.extract import extract
from verifier.verdict import Verdict

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
UNIT = re.compile(r"(?<=\d)\s*\\?(?:%|[A-Za-z]+(?:/[a-z]+|\^?\{?[23]\}?)?)[\s.]*$")


def scored(scorer: str, text: str) -> Verdict:
    """What the package's scorer says of a completion. Never raises.

    It sees the answer that the verifier finds in the text: in a box or a tag, after "the answer
    is", else all of it; where the gold is a number, its only number.
    """
    name, settings, entry = json.loads(scorer)
    entry = pickle.loads(base64.b64decode(entry))       # which `entries` has made
    gold = str(entry.get("answer") or "")
    if NUMBER.fullmatch(gold):
        found, rule = extract(text)
        found = number_of(found, gold)
    else:
        found, rule = extract(text, in_words=True)
        found = found.strip("*_` ")
        if rule == "statement" and "\n" in gold:        # of which it would be one line
            found, rule = text.strip(), "whole text"
    try:
        score = float(dataset(name, settings, 0, 1).score_answer(found.strip(), entry))
    except (Exception, SystemExit) as error:
        return Verdict("wrong", f"{rule}: its scorer failed: {error}"[:100], found, 0.0)
    score = min(max(score, 0.0), 1.0) if score == score else 0.0
    return Verdict("correct" if score >= 1 else "wrong", f"{rule}: reasoning-gym", found, score)


def number_of(found: str, gold: str) -> str:
    """The only number of an answer (behind its last =), as scorers that compare texts want it; ""
    of several, or of one under a root, in a power or a fraction."""
    found = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", found).rpartition("=")[2]
    bare = UNIT.sub("", found)
    numbers = NUMBER.findall(bare)
    if len(numbers) != 1 or re.search(r"[/^√]|\\\w*(?:frac|sqrt)", bare):
        return "" if numbers else found.strip()
    whole, _, places = numbers[0].partition(".")
    return numbers[0] if places.strip("0") or "." in gold else whole


def guard(event: str, arguments: tuple) -> None:
    """An audit hook: an answer that a scorer runs may write no file, and start nothing."""
    kind, _, name = event.partition(".")
    started = kind in ("subprocess", "socket", "shutil", "ctypes", "signal", "pty", "webbrowser")
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (
        os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if started or writes or kind == "os" and name not in ("listdir", "scandir", "walk"):
        raise PermissionError(f"an answer may not do {event}")
