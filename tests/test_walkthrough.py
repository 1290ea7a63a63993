"""The walk-through, page and notebook: written by its generator, and what a fresh run of the step gives."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from docs import notebook

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ((ROOT / "docs" / f"walkthrough.{kind}").read_text(encoding="utf-8") for kind in ("md", "ipynb"))
CODE = [cell for cell in json.loads(NOTEBOOK)["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
OUTPUTS = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in CODE]
DECIMAL = r"[-+]?\d+\.\d+"
HINT = "docs/walkthrough.* is out of date; run: python docs/walkthrough.py"


def test_page_and_notebook_are_what_the_generator_writes_around_the_same_outputs():
    assert notebook.notebook(OUTPUTS) == NOTEBOOK, HINT
    assert notebook.page(OUTPUTS) == PAGE, HINT


def test_the_notebook_was_executed_from_top_to_bottom_and_every_cell_after_the_set_up_prints():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert [bool(output) for output in OUTPUTS] == [False, True, False, *[True] * (len(CODE) - 3)] and len(CODE) > 15


@pytest.mark.slow
def test_the_notebook_executed_anew_gives_its_outputs(embedded_path, monkeypatch):
    """Words, tokens and counts exactly; decimals within what another processor's order of summation changes."""
    monkeypatch.chdir(ROOT / "docs")                    # where Jupyter opens it
    monkeypatch.setattr(sys, "path", sys.path[:])
    for fresh, kept in zip(notebook.execute(SOURCES), OUTPUTS, strict=True):
        for new, old in zip(fresh.splitlines(), kept.splitlines(), strict=True):
            hint = f"{HINT}\nnow  {new}\npage {old}"
            assert re.sub(DECIMAL, "#", new) == re.sub(DECIMAL, "#", old), hint
            numbers = [[float(x) for x in re.findall(DECIMAL, line)] for line in (new, old)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.01, abs=2e-4), hint


# ----------------------------------------------------------------------------------------------------------------------
# The install cell


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder outside every clone, and a repository to clone from there."""
    source = tmp_path / "source"
    (source / "docs").mkdir(parents=True)
    (source / "docs" / "walkthrough.py").touch()
    (source / "requirements.txt").write_text("numpy\ntorch==0.1\nno-such-package==1.0\n"
                                             "no-such-package-either; sys_platform == 'nowhere'\n")
    for command in (["init", "-q"], ["add", "."],
                    ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=source, check=True)
    (tmp_path / "opened").mkdir()
    monkeypatch.chdir(tmp_path / "opened")
    monkeypatch.setattr(sys, "path", sys.path[:])
    return source


def test_the_install_cell_says_what_to_fill_in_outside_a_clone(elsewhere):
    with pytest.raises(SystemExit, match="address of the repository"):
        notebook.execute(SOURCES[:1])


def test_the_install_cell_clones_and_installs_only_what_is_missing(elsewhere, monkeypatch):
    """A torch that is there stays, though requirements.txt has another."""
    ran, really = [], subprocess.run

    def run(command, **more):
        ran.append(command)
        return really(command, **more) if command[0] == "git" else SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    notebook.execute([SOURCES[0].replace('"..."', repr(str(elsewhere)), 1)])
    assert Path.cwd() == elsewhere.parent / "opened" / "permix" and sys.path[0] == str(Path.cwd())
    assert [command[0] for command in ran] == ["git", sys.executable]
    assert ran[1][1:] == ["-m", "pip", "install", "-q", "no-such-package==1.0"]
    notebook.execute(SOURCES[:1])                       # now inside a clone: no address needed
    assert len(ran) == 3
