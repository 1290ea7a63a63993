"""The break-it lab: every pitfall of docs/pitfalls.md can be put back, and its test then fails."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs import break_it
from training.settings import settings

ROOT = Path(__file__).resolve().parents[1]
MISTAKES = break_it.read()
PITFALLS = [mistake for mistake in MISTAKES if mistake.pitfall]


def lab(*arguments):
    return subprocess.run([sys.executable, "docs/break_it.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.pitfall} {mistake.file}: {mistake.what}")
def test_each_mistake_fits_the_code_in_one_place_and_names_tests_that_exist(mistake):
    text = (ROOT / mistake.file).read_text()
    broken = mistake.broken(text)                       # raises unless there is one place
    assert broken != text
    compile(broken, mistake.file, "exec")
    tests = [word.partition("::") for word in mistake.tests.split() if word.startswith("tests/")]
    assert tests and all(f"def {name}" in (ROOT / file).read_text() for file, _, name in tests)


def test_every_pitfall_has_one_mistake_that_its_linked_test_must_notice():
    assert [mistake.pitfall for mistake in PITFALLS] == [f"P{i}" for i in range(1, 43)] == list(break_it.pitfalls())
    files = {mistake.pitfall: {word.partition("::")[0] for word in mistake.tests.split()} for mistake in PITFALLS}
    for name, (words, linked) in break_it.pitfalls().items():
        assert words.startswith(name) and "[test]" not in words
        assert files[name] & {link.partition("::")[0] for link in linked.split()}


@pytest.mark.parametrize("mistake", PITFALLS, ids=lambda mistake: mistake.pitfall)
def test_every_pitfall_names_metrics_that_a_run_has_or_why_no_curve_shows_it(mistake):
    assert bool(mistake.metrics) != bool(mistake.no_run) and (mistake.metrics or not mistake.flags)
    formats = (ROOT / "docs" / "formats.md").read_text().split("## metrics.jsonl")[1].split("\n## ")[0]
    assert all(f"\n| `{key}` |" in formats for key in mistake.metrics)
    settings(shlex.split(f"{break_it.TRAIN} {mistake.flags}"))


@pytest.mark.parametrize("arguments, says", [
    (["P43"], "there is no P43"), (["P8", "P9", "--run"], "one pitfall"), (["50", "--run"], "one pitfall"),
    (["--run"], "one pitfall"), (["P8", "--out", "x.png"], "go with --run"), (["P35", "--run"], "no CUDA graphs"),
    (["P8", "--run", "--steps", "0"], "at least 1"), (["P8", "--steps", "3"], "go with --run"),
    (["P8", "--run", "--out", "x.xyz"], "no .png"), (["P8", "--run", "--out", "docs"], "no .png"),
    (["P8", "--run", "--out", "/dev/null/x.png"], "cannot be made"), (["P8", "--rum"], "did you mean --run")])
def test_what_the_lab_cannot_do_is_one_line_and_exit_code_2(arguments, says):
    done = lab(*arguments)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and says in line and not done.stdout


@pytest.mark.parametrize("change, says", [("", "was its line edited here"), (None, "this is a homework")])
def test_a_copy_whose_lines_were_edited_and_a_homework_are_told_so_in_one_line(change, says, tmp_path):
    for name in ("docs/break_it.py", "docs/break_it.txt", "docs/pitfalls.md", "common/command.py", "grpo.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "grpo.py").write_text("")
    if change is None:
        (tmp_path / "docs/break_it.txt").unlink()
    done = subprocess.run([sys.executable, "docs/break_it.py", "P8"], cwd=tmp_path, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and says in line


def test_a_fork_takes_the_folders_own_modules_also_those_that_the_command_has_imported(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common/command.py").write_text("OURS = 1\n")
    (tmp_path / "test_a.py").write_text("def test_one():\n    from common.command import OURS\n    assert OURS\n")
    code = ("import sys; from pathlib import Path; from docs import break_it; import common.command\n"
            "sys.exit(break_it.run('test_a.py', Path(sys.argv[1]), Path(sys.argv[1], 'log')))")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_lab_shows_a_pitfall_its_diff_and_its_test_turning_red_and_touches_nothing():
    def state():
        return subprocess.check_output(["git", "status", "--porcelain"], cwd=ROOT)

    before, done = state(), lab("P8")
    assert done.returncode == 0 and state() == before
    said = done.stdout
    assert said.startswith("P8 Groups without variance.") and "[test]" not in said
    assert "\n--- a/grpo.py\n+++ b/grpo.py\n" in said and "\n-    return torch.where(informative(" in said
    assert "\nas it is: passed\n" in said and "\nwith the mistake: noticed by test_p8_" in said
    assert not done.stderr


def test_a_mistake_that_no_test_notices_is_alive_and_a_skipped_test_is_none(tmp_path, capsys):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "test_a.py").write_text("import os\nimport pytest\n\n\ndef test_one():\n    from a import x\n"
                                        "    assert x == int(os.environ.get('X', x))\n\n\n"
                                        "@pytest.mark.skip\ndef test_two():\n    assert False\n")
    alive = break_it.Mistake("", "a.py", "", "1", "2", "test_a.py", [], "", "")
    tests = "test_a.py", "test_a.py -k two", "X=1 test_a.py", "nothing.py"
    with capsys.disabled():                             # what a fork says goes to its log
        found = [break_it.verdict(dataclasses.replace(alive, tests=words), tmp_path) for words in tests]
    assert found[:2] == [("ALIVE", ""), ("ALIVE", "its tests are skipped here")]
    assert found[2:] == [("noticed", "by test_one"), ("broken", "pytest ended with 4")]
    assert (tmp_path / "a.py").read_text() == "x = 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_pitfalls_test_fails_once_it_is_put_back(part):
    names = [mistake.pitfall for mistake in PITFALLS][part::4]
    done = lab(*names)
    noticed = re.findall(r"^ *(P\d+) noticed .*   by (test_\w+)", done.stdout, re.M)     # neither hung nor crashed
    assert done.returncode == 0 and [name for name, _ in noticed] == names, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# --run


def rows(rewards, **more):
    return [{"step": i, "reward": reward, **more} for i, reward in enumerate(rewards)]


def test_the_reward_rises_where_its_last_third_is_above_the_noise_of_the_first():
    assert break_it.rises(rows([0.1, 0.2, 0.15, 0.3, 0.4, 0.3, 0.6, 0.7, 0.65]))
    assert not break_it.rises(rows([0.1, 0.6, 0.2, 0.3, 0.4, 0.3, 0.2, 0.7, 0.3]))
    assert not break_it.rises(rows([0.6, 0.7, 0.65, 0.3, 0.4, 0.3, 0.1, 0.2, 0.15]))
    assert not break_it.rises(rows([0.1, 0.9])) and not break_it.rises([])


def test_a_run_of_both_draws_and_prints_them_and_says_why_one_ended(tmp_path, monkeypatch, capsys):
    """train.py of the copy is called with the same flags, first without and then with the mistake."""
    (tmp_path / "grpo.py").write_text("good")
    rising = [0.1, 0.2, 0.7, 0.8, 0.8, 0.9]
    mistake, calls = break_it.Mistake("P8", "grpo.py", "what", "good", "bad", "", ["kl"], "--kl-coef 1", ""), []

    def trained(folder, flags):
        calls.append(((folder / "grpo.py").read_text(), flags))
        return (rows([0.3], kl=None), "train.py: no") if len(calls) > 1 else (rows(rising, kl=0.5), "")

    monkeypatch.setattr(break_it, "trained", trained)
    break_it.train_both(mistake, tmp_path, break_it.picture(tmp_path / "deep" / "P8.png"), 6)
    assert calls == [(text, f"{break_it.TRAIN} --steps 6 --kl-coef 1") for text in ("good", "bad")]
    said = capsys.readouterr().out
    assert "as it is: the reward rises\n" in said and "ended after 1 steps: train.py: no\n" in said
    assert re.search(r"^reward +0.15 +0.85 +0.3 +0.3$", said, re.M) and re.search(r"^kl +0.5 +0.5 +- +-$", said, re.M)
    assert (tmp_path / "deep" / "P8.png").stat().st_size > 5000


def test_what_the_copys_train_py_writes_is_read_and_its_last_words_are_kept(tmp_path):
    (tmp_path / "train.py").write_text("import pathlib, sys\nout = pathlib.Path(sys.argv[-1])\nout.mkdir()\n"
                                       "(out / 'metrics.jsonl').write_text('{\"reward\": NaN}\\n')\n"
                                       "print('first\\nlast', file=sys.stderr)\nsys.exit(int(sys.argv[1]))\n")
    (row,), last = break_it.trained(tmp_path, "2")
    assert row["reward"] != row["reward"] and last == "last" and break_it.trained(tmp_path, "0")[1] == ""
