"""docs/course.md: eight sittings, whose commands run and whose exercises exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import rewards
from docs import homework
from evaluation import command as evaluation
from sampling import command as sampling
from training import settings

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "course.md").read_text()
SITTINGS = dict(re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", PAGE, re.M | re.S))
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
SMALL = {                                               # flags that make a command small; the last one counts
    "train.py": "--model {tiny} --dtype float32 --steps 1 --prompts 2 --group-size 2 --max-new-tokens 4",
    "evaluate.py": "--model {tiny} --dtype float32 --limit 2 --max-new-tokens 4",
    "rollout.py": "--model {tiny} --dtype float32 --max-new-tokens 4"}


def arguments(line):
    """(script, its arguments) of a command, patterns of files as the shell reads them."""
    script, *words = shlex.split(line.partition("python ")[2])
    return script, [path for word in words for path in (sorted(map(str, ROOT.glob(word))) if "*" in word else [word])]


@pytest.mark.parametrize("number", SITTINGS)
def test_a_sitting_has_an_idea_a_file_a_command_a_sweep_and_an_exercise_on_a_page(number):
    text = SITTINGS[number]
    parts = re.findall(r"^\*\*(Read|Look at|Sweep|Exercise)\*\*", text, re.M)
    assert parts == ["Read", "Look at", "Sweep", "Exercise"] and "```sh\npython" in text.replace("mkdir", "python")
    assert re.search(r"^    \S.*=", text, re.M), "no equation"
    assert 25 <= text.count("\n") <= 38
    assert re.search(r"\*\*Exercise\*\* `(\w+)`", text)[1] in homework.NAMED


def test_there_are_eight_sittings_and_each_exercise_belongs_to_one_with_its_file():
    assert list(SITTINGS) == [str(number) for number in range(1, 9)]
    for name, exercise in homework.NAMED.items():
        assert [n for n, text in SITTINGS.items() if f"`{name}`" in text and exercise.file in text], name


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_course_is_one_that_its_program_takes(line):
    if "python" not in line:
        return
    script, words = arguments(line)
    match script:
        case "train.py":
            settings.settings(words)
        case "evaluate.py":
            evaluation.check(args := evaluation.parse(words))
            assert all((ROOT / path).is_dir() or path.startswith("runs/") for path in args.compare or [])
        case "rollout.py":
            sampling.parser().parse_args(words)
        case "rewards.py":
            assert rewards.main(words) == 0
        case _:
            assert (ROOT / script).is_file() and (script == "docs/homework.py") == bool(words)


def test_every_flag_and_value_that_a_sweep_names_is_one_of_a_program():
    named = re.findall(r"`(--[a-z-]+)((?: [^`]+)?)`", PAGE)
    train, others = settings.parser(), [evaluation.parse([]), sampling.parser().parse_args([])]
    known = {name.replace("_", "-") for args in (train.parse_args([]), *others) for name in vars(args)}
    assert len(named) > 8
    assert not {flag for flag, _ in named} - {f"--{name}" for name in known} - {"--check", "--solution"}


@pytest.mark.slow
def test_all_commands_of_the_course_run_one_after_the_other_at_small_size(tiny_folder, tmp_path):
    for line in COMMANDS:
        command = re.sub(r"\bruns\b", str(tmp_path / "runs"), line).replace("python ", f"{sys.executable} ")
        script = line.partition("python ")[2].partition(" ")[0]
        if script in SMALL and "--compare" not in line:
            command += " " + SMALL[script].format(tiny=tiny_folder)
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
