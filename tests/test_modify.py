"""docs/modify.md: every diff of the page applies, is short, and passes the check printed below it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "modify.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
CRITIC, LONG = "A critic: PPO with a value head", 55  # the page says that this one is longer, and why
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def test_the_page_has_eight_diffs_each_with_a_check_below_it():
    assert len(SECTIONS) == 8
    assert all(re.fullmatch("diff (python|sh)", " ".join(kind for kind, _ in FENCE.findall(text)))
               for text in SECTIONS.values())


def test_the_table_counts_the_places_of_each_diff():
    rows = re.findall(r"^\| \[.*?\]\(#(.*?)\) \| (.*) \|$", PAGE, re.M)
    for title, (anchor, places) in zip(SECTIONS, rows, strict=True):
        assert anchor == re.sub(r"[^a-z ]", "", title.lower()).replace(" ", "-")
        files = re.split(r"^\+\+\+ b/", FENCE.findall(SECTIONS[title])[0][1], flags=re.M)[1:]
        counted = {text.split()[0]: len(re.findall(r"^@@", text, re.M)) for text in files}
        assert {name: int(n) for name, n in re.findall(r"`(.*?)` (\d)", places)} == counted


@pytest.fixture
def copy(tmp_path):
    """The code and data of this tree in a folder of its own."""
    for pattern in ("*.py", "data/*", "*/*.py", "*/*.cpp", "pyproject.toml"):
        for path in ROOT.glob(pattern):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_a_short_diff_applies_and_passes_its_check(title, copy):
    (_, diff), (kind, check) = FENCE.findall(SECTIONS[title])
    assert len(re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", diff, re.M)) <= (LONG if title == CRITIC else 20)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=copy, check=True)
    command = [sys.executable, "-c", check] if kind == "python" else \
        [sys.executable, *check.split()[1:], "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
