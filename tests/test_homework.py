"""docs/homework.py: every blank makes its tests fail, and every solution makes them pass."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs import homework

ROOT = Path(__file__).resolve().parents[1]
NAMES = list(homework.NAMED)
RESULTS = """
import json, sys
from pathlib import Path
from docs import homework
sys.path[0] = "docs"                                   # as in the command: no module of ours is here before a fork
homework.LIMIT, exercise = int(sys.argv[1]), homework.NAMED[sys.argv[2]]
homework.break_it.warm_up()
for name in exercise.needs:
    homework.solve(homework.NAMED[name])
found = [homework.results(exercise, Path("log"))]
if sys.argv[3:]:
    homework.solve(exercise)
    found.append(homework.results(exercise, Path("log")))
print(json.dumps(found))
"""


def command(folder, *arguments):
    words = [sys.executable, str(folder / "docs/homework.py"), *arguments]
    return subprocess.run(words, capture_output=True, text=True)


def results(folder, name, *more, limit=homework.LIMIT):
    """The exercise's results in a homework, and with `more` those after its solution, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", RESULTS, str(limit), name, *more], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A homework, moved from where it was made."""
    top = tmp_path_factory.mktemp("homework")
    done = command(ROOT, str(top / "made"))
    assert done.returncode == 0, done.stderr
    return (top / "made").rename(top / "moved")


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "homework")


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_has_a_docstring_to_write_it_from_and_tests_that_exist_and_needs_earlier_ones_alone(name):
    exercise = homework.NAMED[name]
    assert ast.get_docstring(homework.found((ROOT / exercise.file).read_text(), exercise))
    tests = (ROOT / exercise.test_file).read_text()
    assert all(re.search(rf"^def {test}\(", tests, re.M) for test in exercise.tests.split())
    assert 10 <= len(NAMES) <= 12 and set(exercise.needs) <= set(NAMES[:NAMES.index(name)])


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_and_its_solution_change_the_one_function_alone(name):
    exercise = homework.NAMED[name]
    text = (ROOT / exercise.file).read_text()
    blank = homework.blanked(text, exercise)
    before, after = (homework.found(x, exercise) for x in (text, blank))
    assert [ast.unparse(x) for x in after.body[1:]] == [homework.WAITS]
    assert ast.unparse(before.args) == ast.unparse(after.args)
    assert ast.get_docstring(before, clean=False) == ast.get_docstring(after, clean=False)
    assert homework.restored(blank, text, exercise) == text != blank
    mine = blank.replace(homework.WAITS, "return (1 +\n2 +\n3)")
    assert homework.restored("# a note\n" + mine, text, exercise) == "# a note\n" + text


def test_no_file_of_the_homework_shows_a_line_of_a_solution(made):
    texts = {path: path.read_text(errors="ignore") for path in made.rglob("*") if path.is_file()}
    assert len(texts) > 100 and made / "docs/course.md" in texts
    for exercise in homework.EXERCISES:
        original = (ROOT / exercise.file).read_text()
        node = homework.found(original, exercise)
        body = [line.strip() for line in original.splitlines()[node.body[0].end_lineno:node.end_lineno]]
        longest = max((line for line in body if not line.startswith("raise")), key=len)
        assert not [path for path, text in texts.items() if longest in text], longest


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "give one of DIR"), (["tests"], "is there already"), (["--check"], "is no homework"),
    (["--solution", "ps"], "no exercise is named ps"), (["--solution", "pss"], "is no homework"),
    (["x", "--check"], "give one of DIR"), (["--chek"], "did you mean --check")])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, says):
    done = subprocess.run([sys.executable, "docs/homework.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_torn_file_of_solutions_is_one_line_and_exit_code_2(keep, copied):
    place = copied / homework.SOLUTIONS
    place.write_bytes(place.read_bytes()[:int(keep * place.stat().st_size)])
    done = command(copied, "--solution", "pss")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "is damaged: make the homework anew" in line


@pytest.mark.slow
def test_an_exercise_that_waits_scores_0_and_its_solution_scores_in_full(copied):
    waiting = command(copied, "--check", "pss")
    assert waiting.returncode == 1 and "0 of 2  " in waiting.stdout and "is not written yet" in waiting.stdout
    assert command(copied, "--solution", "pss").returncode == 0
    solved = command(copied, "--check", "pss")
    assert solved.returncode == 0 and "2 of 2\n1 of 1 exercises solved" in solved.stdout
    place = copied / "evaluation/measures.py"
    place.write_text(place.read_text() + "def broken(\n")
    broken = command(copied, "--check", "pss")
    assert broken.returncode == 1 and "0 of 2  evaluation/measures.py, line" in broken.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_blank_fails_all_its_tests_and_its_solution_alone_passes_them(name, copied):
    """But for what the exercise `needs`, all other functions are blank."""
    blank, solved = results(copied, name, "and its solution")
    assert blank.keys() == solved.keys() and set(blank.values()) == {"failed"} and set(solved.values()) == {"passed"}


@pytest.mark.slow
@pytest.mark.parametrize(("body", "word"), [("while True: pass", "hangs (over 20 s)"),
                                            ("import os; os.abort()", "crashes"), ("return 0.5", "failed")])
def test_an_answer_that_hangs_crashes_or_is_wrong_scores_nothing(body, word, copied):
    place = copied / "evaluation/measures.py"
    place.write_text(place.read_text().replace(homework.WAITS, body))
    assert set(results(copied, "pss", limit=20)[0].values()) == {word}
