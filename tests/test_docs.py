"""The words against the code: links, files and commands that the documents name."""

import re
import shlex
from pathlib import Path

import pytest

from docs import mutants
from training import settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", ROOT / "benchmarks" / "README.md",
         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*.md"))]


def test_every_pitfall_links_a_test_that_exists():
    text = (ROOT / "docs" / "pitfalls.md").read_text()
    assert re.findall(r"^\*\*P(\d+) ", text, re.M) == [str(i) for i in range(1, 32)]
    links = re.findall(r"\[test\]\(\.\./(tests/\w+\.py)#(\w+)\)", text)
    assert len(links) >= 31
    for path, name in links:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), f"{path}: no {name}"


def test_every_relative_link_resolves():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_that_the_readme_lists_exists():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", row)]
    assert {path.name for path in ROOT.glob("*.py")} <= set(named) and len(named) > 20
    assert all((ROOT / name).exists() for name in named)


def test_every_flag_of_the_readmes_commands_exists():
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    sources["train.py"] += (ROOT / "training" / "settings.py").read_text()
    sources["rollout.py"] += (ROOT / "sampling" / "flags.py").read_text()
    commands = re.findall(r"^(?:python|torchrun .*?) ?(\w+\.py)(.*?)(?:#|$)", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) > 8
    for script, flags in commands:
        for flag in re.findall(r"--([a-z-]+)", flags):
            assert f'"--{flag}"' in sources[script] or f'("{flag}"' in sources[script], f"{script} --{flag}"


def test_every_training_command_of_the_pages_is_one_that_train_py_takes():
    """Read as the shell and train.py would, and not refused. docs/modify.md's flags come with its diffs."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "modify.md")
    commands = {flags for flags in re.findall(r"(?:python|\d) train\.py((?: --[^`\n]*)?)", text)
                if not any(word in flags for word in ("$", "--resume", "--help"))}
    assert len(commands) > 8
    for flags in commands:
        settings.settings(shlex.split(flags, comments=True))


def test_the_results_that_the_pages_show_are_those_that_were_measured():
    measured = (ROOT / "results" / "main" / "tables.md").read_text().splitlines()
    arms = [line for line in measured if re.match(r"\| [a-z+]+ \| \d", line)]
    assert len(arms) == 6
    for page in ("README.md", "results/README.md"):
        assert set(arms) <= set((ROOT / page).read_text().splitlines()), page
    for name in ("early", "ablations", "pushed", "anchors", "sanity"):
        measured += (ROOT / "results" / name / "tables.md").read_text().splitlines()
    shown = [line for line in (ROOT / "results" / "README.md").read_text().splitlines()
             if line.startswith("|") and not re.match(r"\| (learning rate|\de-\d)", line)]  # see test_results.py
    assert len(shown) > 20 and set(shown) <= set(measured)


def test_every_symbol_that_the_pages_name_exists():
    """`module.name` and `Class.method` in backticks, where the module is a file or the class stands in one."""
    folders = (".", "common", "evaluation", "generators", "kernels", "sampling", "training", "verifier", "weights")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    sources = {path.stem: path.read_text() for path in files}
    classes = {name: text for text in sources.values() for name in re.findall(r"^class (\w+)", text, re.M)}
    named = {match for page in PAGES for match in re.findall(r"`(\w+)\.(\w+)(?:\(\w*\))?`", page.read_text())}
    known = [(owner, name) for owner, name in named if owner in sources | classes and name not in ("py", "cpp", "html")]
    assert len(known) > 8
    for owner, name in known:
        text = (sources | classes)[owner]
        defined = rf"^ *(?:def|class) {name}\b|^ *(?:self\.)?{name}\b.*="
        assert re.search(defined, text, re.M), f"{owner}.{name}"


@pytest.mark.parametrize("mutant", mutants.read(), ids=lambda mutant: f"{mutant.file}: {mutant.what}")
def test_each_mistake_of_the_break_it_lab_fits_the_code_in_one_place_and_names_tests_that_exist(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1 and mutant.old != mutant.new
    assert mutant.tests and all((ROOT / word).is_file() for word in mutant.tests.split() if word.startswith("tests/"))
