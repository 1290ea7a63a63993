"""tasks.py: generated problems are right and disjoint, files are read or refused, the training order is fixed."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tasks
from generators import arithmetic, facts, templates
from training import settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"


def write(folder: Path, *rows) -> str:
    """A .jsonl of rows, each an object or a line as it is."""
    path = folder / "problems.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def shared(name: str) -> str:
    if not (SHARED / name).is_file():
        pytest.skip(f"no {SHARED / name}")
    return str(SHARED / name)


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_one_step_answers_follow_from_the_numbers_in_the_question():
    operation = {"add": lambda x, y: x + y, "subtract": lambda x, y: abs(x - y), "multiply": lambda x, y: x * y,
                 "divide": lambda x, y: max(x, y) / min(x, y)}
    problems = [p for p in tasks.load("arithmetic", "all", limit=2500) if p.kind != "two-step"]
    assert len(problems) > 1000
    for problem in problems:
        assert int(problem.answer) == operation[problem.kind](*numbers(problem.question)), problem


# How the numbers of each two-step template combine, in the order they are read.
TWO_STEP = {
    r"buys \d+ more and then loses": lambda x, y, z: x + y - z,
    r"What is \d+ \+ \d+ - ": lambda x, y, z: x + y - z,
    r"What is \d+ \* \d+ \+ ": lambda x, y, z: x * y + z,
    r"boxes with \d+ \w+ each and \d+ loose": lambda x, y, z: x * y + z,
    r"tickets for \d+ dollars each and a drink": lambda x, y, z: x * y + z,
    r"gave away \d+ and then found": lambda x, y, z: x - y + z,
    r"Together they give": lambda x, y, z: x + y - z,
    r"shelves with \d+ books each. It sells": lambda x, y, z: x * y - z,
}


def test_two_step_answers_follow_from_the_numbers_in_the_question():
    problems = [p for p in tasks.load("arithmetic", "all", limit=2500) if p.kind == "two-step"]
    seen = set()
    for problem in problems:
        [pattern] = [pattern for pattern in TWO_STEP if re.search(pattern, problem.question)]
        seen.add(pattern)
        assert int(problem.answer) == TWO_STEP[pattern](*numbers(problem.question)), problem
    assert seen == set(TWO_STEP)


def test_there_are_forty_templates_of_five_kinds_and_mostly_one_step_problems():
    assert sum(map(len, templates.TEMPLATES.values())) >= 40
    kinds = Counter(problem.kind for problem in tasks.load("arithmetic", "train"))
    assert set(kinds) == {"add", "subtract", "multiply", "divide", "two-step"}
    assert min(kinds.values()) > 60 and kinds["two-step"] < 100


def test_answers_are_small_and_not_negative():
    assert all(0 <= int(problem.answer) < 200 for problem in tasks.load("arithmetic", "all", limit=2000))


def test_no_brace_of_a_template_is_left_in_a_question():
    assert not [p for p in tasks.load("arithmetic", "all", limit=1500) if "{" in p.question or "}" in p.question]


def problem_without_names(problem) -> str:
    """What decides the split: the template and its numbers. Names and objects don't make a problem another one."""
    return re.sub("|".join(rf"\b{word}\b" for word in templates.NAMES + templates.OBJECTS), "_", problem.question)


def test_p26_train_and_test_problems_are_disjoint_whatever_the_seeds():
    train = {problem_without_names(p) for seed in (0, 1) for p in tasks.load("arithmetic", "train", seed, 2000)}
    test = {problem_without_names(p) for seed in (0, 1) for p in tasks.load("arithmetic", "test", seed, 600)}
    assert train and test and not train & test


def test_a_split_repeats_no_problem_and_no_id():
    problems = tasks.load("arithmetic", "train", limit=2000)
    assert len({problem_without_names(p) for p in problems}) == len({p.id for p in problems}) == 2000


def test_the_same_seed_gives_the_same_problems_in_another_process():
    code = "import tasks; print([p.question for p in tasks.load('arithmetic', 'train', 3, 40)])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"},
                         capture_output=True, text=True, check=True).stdout
    assert out.strip() == str([p.question for p in tasks.load("arithmetic", "train", 3, 40)])
    assert out.strip() != str([p.question for p in tasks.load("arithmetic", "train", 4, 40)])


def test_a_larger_limit_only_adds_problems():
    assert tasks.load("arithmetic", "test", limit=300)[:50] == tasks.load("arithmetic", "test", limit=50)


def test_more_problems_than_there_are_is_an_error_instead_of_an_endless_loop(monkeypatch):
    monkeypatch.setattr(arithmetic, "TEMPLATES", {"multiply": [(1, "What is {p} * {q}?")]})
    with pytest.raises(ValueError, match="hardly more than 25 all problems; lower the limit"):
        tasks.load("arithmetic", "all", limit=65)


@pytest.mark.parametrize("split, digest", [
    ("train", "a838eac45e48eca96d72c6a31bb886fc89b8be74a454563116ac88f0cc838050"),
    ("test", "7b60071f879d88cb6f398610febdd954e7bef862b9a5f11339526ef948794fc4")])
def test_the_problems_of_arithmetic_are_those_that_the_kept_results_were_measured_on(split, digest):
    lines = ["|".join((p.question, p.answer, p.id, p.kind)) for p in tasks.load("arithmetic", split, 0, 200)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


# ----------------------------------------------------------------------------------------------------------------------
# Facts


def fact(sign: str, x: int, y: int) -> tuple:
    """Independent of tasks.py: the numbers that are joined, of x + y, x - y, x * y or x / y."""
    small, large = {"+": (x, y), "-": (y, x - y), "*": (x, y), "/": (y, x // y)}[sign]
    return "+" if sign in "+-" else "*", min(small, large), max(small, large)


# The signs of the two steps of each two-step template; the numbers are taken in the order they are read.
STEPS = {r"buys \d+ more and then loses": "+-", r"What is \d+ \+ \d+ - ": "+-", r"What is \d+ \* \d+ \+ ": "*+",
         r"boxes with \d+ \w+ each and \d+ loose": "*+", r"tickets for \d+ dollars each and a drink": "*+",
         r"gave away \d+ and then found": "-+", r"Together they give": "+-",
         r"shelves with \d+ books each. It sells": "*-"}
APPLY = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "/": lambda x, y: x / y}


def solved(problem) -> tuple[float, set]:
    """(answer, facts) of a problem, from the numbers in its question alone."""
    x, y, *rest = numbers(problem.question)
    if problem.kind == "two-step":
        [signs] = [signs for pattern, signs in STEPS.items() if re.search(pattern, problem.question)]
        first = APPLY[signs[0]](x, y)
        return APPLY[signs[1]](first, *rest), {fact(signs[0], x, y), fact(signs[1], first, *rest)}
    sign = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}[problem.kind]
    x, y = (max(x, y), min(x, y)) if sign in "-/" else (x, y)
    return APPLY[sign](x, y), {fact(sign, x, y)}


@pytest.fixture(scope="module")
def every():
    """{split: problems that between them take every fact that `facts` can give}; larger numbers are drawn more often
    here, since there are more of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "LEVELS", (0, 1, 1, 1, 1, 1, 1, 1, 1, 2))
        return {"train": tasks.load("facts", "train", 0, 15_000), "test": tasks.load("facts", "test", 0, 5000)}


def test_no_fact_of_a_test_problem_stands_in_a_training_problem_in_any_wording(every):
    seen = {split: set().union(*(solved(p)[1] for p in problems)) for split, problems in every.items()}
    assert not seen["train"] & seen["test"]
    possible = {("+", x, y) for y in range(2, 50) for x in range(2, y + 1)}
    possible |= {("*", x, y) for y in range(2, 13) for x in range(2, y + 1)}
    assert seen["train"] | seen["test"] == possible and 0.2 < len(seen["test"]) / len(possible) < 0.3


def test_another_seed_holds_out_the_same_facts(every):
    trained = set().union(*(solved(p)[1] for p in every["train"]))
    assert not trained & set().union(*(solved(p)[1] for p in tasks.load("facts", "test", 5, 1000)))
    assert trained >= set().union(*(solved(p)[1] for p in tasks.load("facts", "train", 5, 1000)))


def test_golds_of_facts_follow_from_the_numbers_in_the_question(every):
    for problem in every["train"][:4000] + every["test"][:1000]:
        assert int(problem.answer) == solved(problem)[0], problem
        assert all(n <= 98 for n in numbers(problem.question)) or problem.kind == "divide", problem
        assert 2 <= int(problem.answer) <= 144 and max(numbers(problem.question)) <= 144, problem


def test_the_questions_of_facts_are_distinct_and_a_larger_limit_only_adds(every):
    for split, most in (("train", 3000), ("test", 1000)):
        problems = tasks.load("facts", split, 0, most)
        for some in (problems, every[split]):
            assert len({p.question for p in some}) == len({p.id for p in some}) == len(some)
        assert len(problems) == most and problems[:400] == tasks.load("facts", split, 0, 400)
        assert tasks.load("facts", split, 0, 400) != tasks.load("facts", split, 1, 400)
    assert len(tasks.load("facts", "train")) == 600 and len(tasks.load("facts", "all")) == 200


def test_the_levels_of_facts_are_easy_then_larger_numbers_then_two_steps(every):
    for problem in every["train"][:2000]:
        easy = all(large <= {"+": 12, "*": 9}[sign] for sign, _, large in solved(problem)[1])
        assert problem.level == (2 if problem.kind == "two-step" else 0 if easy else 1), problem
    asked = tasks.load("facts", "test", limit=200)
    assert Counter(p.level for p in asked) == {0: 140, 1: 40, 2: 20}
    assert len({(p.level, p.kind) for p in asked}) == 4 + 4 + 1


def test_more_facts_than_there_are_is_an_error_instead_of_an_endless_loop(monkeypatch):
    monkeypatch.setattr(facts, "LEVELS", (2,))
    monkeypatch.setitem(templates.TEMPLATES, "two-step", [(1, "What is {p} * {q} + {c}?")])
    with pytest.raises(ValueError, match=r"facts has hardly more than \d+ test problems; lower the limit"):
        tasks.load("facts", "test", limit=10_000)


def test_training_opens_one_level_after_another_the_same_for_every_arm():
    problems = tasks.load("facts", "train", limit=300)
    levels = [Counter(p.level for p in tasks.batch(problems, step, 12, seed=0)) for step in range(34)]
    assert all(set(seen) == {0} for seen in levels[:8]) and all(2 not in seen for seen in levels[:16])
    assert any(1 in seen for seen in levels[8:10]) and any(2 in seen for seen in levels[16:20])
    late = [p for step in range(16, 41) for p in tasks.batch(problems, step, 12, seed=0)]
    assert len(set(late)) > 0.6 * len(problems)


def test_facts_are_trained_on_with_the_settings_of_arithmetic():
    of_facts, of_sums = (vars(settings.settings(["--task", task])) for task in ("facts", "arithmetic"))
    assert of_facts | {"task": "arithmetic"} == of_sums and of_facts["prompts"] == 12


def test_with_several_rounds_a_step_a_level_opens_after_as_many_steps():
    problems = tasks.load("facts", "train", limit=300)
    for step in (7, 8, 15, 16):
        last = {max(p.level for p in tasks.batch(problems, 3 * step + turn, 200, 0, rounds=3)) for turn in range(3)}
        assert last == {max(p.level for p in tasks.batch(problems, step, 200, 0))}


def test_problems_that_are_all_of_a_high_level_are_open_from_the_first_step():
    problems = [p for p in tasks.load("facts", "train", limit=300) if p.level > 0]
    assert {p.level for p in tasks.batch(problems, 0, 40, seed=0)} == {1}


# ----------------------------------------------------------------------------------------------------------------------
# Files


ROWS = [{"question": f"Question {i}?", "answer": i} for i in range(200)]


def test_p26_a_file_without_splits_is_split_by_its_questions_whatever_their_order_and_company(tmp_path):
    train, test = (tasks.load(write(tmp_path, *ROWS), split) for split in ("train", "test"))
    assert sorted(int(p.answer) for p in train + test) == list(range(200)) and 45 < len(test) < 75
    copies = [{"question": f"  QUESTION{i} ", "answer": i} for i in range(200)]
    few = write(tmp_path, *ROWS[::-3], *copies)
    for split, before in (("train", train), ("test", test)):
        now = tasks.load(few, split)
        assert {p.answer for p in now} == {p.answer for p in before} and len(now) > len(before)


def test_a_file_that_is_not_trained_and_tested_on_is_used_whole_but_for_its_splits(tmp_path):
    for split in ("train", "test"):
        assert len(tasks.load(write(tmp_path, *ROWS), split, whole=True)) == 200
        assert len(tasks.load(write(tmp_path, *ROWS), split, whole=True, limit=4)) == 4
    assert len(tasks.load(write(tmp_path, ROWS[0] | {"split": "test"}, ROWS[1] | {"split": "train"}), whole=True)) == 1


@pytest.mark.parametrize("rank, warnings", [("0", 7), ("1", 0)])
def test_questions_that_occur_twice_are_named_by_their_lines_on_rank_0(tmp_path, capsys, monkeypatch, rank, warnings):
    monkeypatch.setenv("RANK", rank)
    path = write(tmp_path, *ROWS[:6], "", *ROWS[:6], {"question": "question  0", "answer": "(" * 300})
    tasks.load(path, "all")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == warnings
    if said:
        assert said[0] == f"warning: {path}, lines 1, 8, 14: the same question"
        assert said[5] == f"warning: {path}: 6 questions occur more than once"
        assert f"{path}, line 14: the gold" in said[6]


def test_p26_a_question_in_two_splits_is_refused(tmp_path):
    path = write(tmp_path, ROWS[0] | {"split": "train"}, {"question": "question 0", "answer": "0", "split": "test"})
    with pytest.raises(ValueError, match="lines 1, 2: one question in two splits"):
        tasks.load(path, "test")


def test_the_counts_say_what_the_golds_are(tmp_path):
    path = write(tmp_path, *ROWS[:2], {"question": "Who?", "answer": "Ann"})
    assert tasks.counts("mine", tasks.load(path, "all")) == "mine: 3 problems, golds: 2 number, 1 text"


def test_a_line_s_split_decides_where_it_goes(tmp_path):
    path = write(tmp_path, {"question": "a", "answer": "1", "split": "test"},
                 {"question": "b", "answer": "2", "split": "train"})
    assert tasks.load(path, "train")[0].question == "b" and tasks.load(path, "test")[0].question == "a"


def test_a_file_where_only_some_lines_have_a_split_is_refused(tmp_path):
    path = write(tmp_path, {"question": "a", "answer": "1", "split": "test"}, {"question": "b", "answer": "2"})
    with pytest.raises(ValueError, match="1 of 2 lines have a `split`"):
        tasks.load(path, "train")


def test_gold_id_and_kind_are_read_from_the_usual_fields(tmp_path):
    path = write(tmp_path, {"problem": "p", "answer": "5 * 3 = <<5*3=15>>15\n#### 15", "type": "Sum", "id": "x-1"},
                 "", {"question": "q", "answer": "\\frac{1}{2}", "subject": "Algebra", "unique_id": "u"},
                 {"question": "r\u2028s", "answer": 2.5})
    assert tasks.load(path, "all") == [tasks.Problem("p", "15", "x-1", "Sum"),
                                       tasks.Problem("q", "\\frac{1}{2}", "u", "Algebra"),
                                       tasks.Problem("r\u2028s", "2.5", "4", "problems")]


@pytest.mark.parametrize("bad, says", [
    ('{"question": "q"}', "no `answer`"), ('{"question": "q", "answer": null}', "no `answer`"),
    ('{"question": "q", "answer": " "}', "no `answer`"), ('{"question": "q", "answer": true}', "no `answer`"),
    ('{"question": "q", "answer": "so it is\\n#### "}', "no `answer`"), ('{"answer": "1"}', "no `question`"),
    ('{"question": "q", "answer": NaN}', "no `answer`"), ('{"question": "q", "answer": -Infinity}', "no `answer`"),
    ('{"question": "q", "answer": "NaN"}', "no `answer`"), ('{"question": "q", "answer": ["1"]}', "no `answer`"),
    ('{"question": " \\n", "answer": "1"}', "no `question`"), ("[" * 100_000, "not JSON"),
    ('{"question": "\\ud83d", "answer": "1"}', "half a character"),
    ('{"question": 5, "answer": "1"}', "no `question`"), ('["q", "1"]', "not an object"),
    ('{"question": "q", "ans', "not JSON"), ("\udcff", "not JSON"),
    ('{"question": "q", "answer": "1", "id": ["a"]}', "an `id` is text or a number"),
    ('{"question": "q", "answer": "1", "unique_id": {}}', "an `id` is text or a number"),
    ('{"question": "q", "answer": "1", "id": 1}', "the `id` '1' is also that of"),     # the first line's number
])
def test_a_bad_line_is_an_error_of_one_line_that_names_file_and_number(tmp_path, bad, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"question": "fine", "answer": "1"}\n\n' + bad.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {says}")) as error:
        tasks.load(str(path))
    assert "\n" not in str(error.value)


def test_an_empty_file_and_an_empty_split_are_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no problem"):
        tasks.load(write(tmp_path), "test")
    with pytest.raises(ValueError, match="no line has the `split` train; give it to some"):
        tasks.load(write(tmp_path, {"question": "q", "answer": "1", "split": "test"}), "train")


def test_svamp_is_read_whole():
    problems = tasks.load(shared("svamp.jsonl"), "all")
    assert len(problems) == 1000 and problems[0].kind == "Subtraction" and problems[0].answer == "51"


def test_gsm8k_s_golds_are_what_follows_the_hashes():
    golds = [p.answer for p in tasks.load(shared("gsm8k_train.jsonl"), "all")]
    assert len(golds) == 7473 and all(re.fullmatch(r"-?[\d,.]+", gold) for gold in golds)


# ----------------------------------------------------------------------------------------------------------------------
# The hub and the command line


def test_rows_of_the_hub_datasets_become_problems():
    row = {"Body": "Ann has 3 pens. ", "Question": "How many?", "Answer": "3.0", "ID": "chal-9", "Type": "Addition"}
    assert tasks.problem_of("svamp", row, 0) == tasks.Problem("Ann has 3 pens. How many?", "3", "chal-9", "Addition")
    for value, gold in (("1234567.0", "1234567"), (0.123456789, "0.123456789"), (12345678.0, "12345678")):
        assert tasks.problem_of("svamp", row | {"Answer": value}, 0).answer == gold     # every digit
    row = {"question": "q", "answer": "work\n#### 1,200"}
    assert tasks.problem_of("gsm8k", row, 7) == tasks.Problem("q", "1,200", "7", "gsm8k")
    row = {"problem": "p", "solution": "\\boxed{1}, so \\boxed{\\frac{1}{2}}.", "type": "Algebra", "level": "Level 1"}
    assert tasks.problem_of("math", row, 2) == tasks.Problem("p", "\\frac{1}{2}", "2", "Algebra")
    assert tasks.problem_of("math", row | {"solution": "no box"}, 2) is None
    row = {"problem": "p", "answer": "4", "unique_id": "test/1.json", "subject": "Geometry"}
    assert tasks.problem_of("math500", row, 0) == tasks.Problem("p", "4", "test/1.json", "Geometry")


def test_the_first_problems_of_a_dataset_in_parts_are_of_all_parts(monkeypatch):
    pytest.importorskip("datasets")
    parts = {"algebra": 3, "geometry": 1, "precalculus": 2}
    rows = {kind: [{"problem": f"{kind} {i}", "solution": "\\boxed{1}", "type": kind} for i in range(count)]
            for kind, count in parts.items()}
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda name: list(parts))
    monkeypatch.setattr("datasets.load_dataset", lambda name, part, split: rows[part])
    got = [problem.question for problem in tasks.load("math", "test")]
    assert got == ["algebra 0", "geometry 0", "precalculus 0", "algebra 1", "precalculus 1", "algebra 2"]


def test_math500_cannot_be_trained_on():
    with pytest.raises(ValueError, match="no train split"):
        tasks.load("math500", "train")


@pytest.mark.parametrize("flags, says", [
    (["--task", "svmp"], "did you mean svamp?"),
    (["--task", "nowhere.jsonl"], "no file nowhere.jsonl"), (["--limit", "0"], "give 1 or more"),
    (["--taks", "svamp"], "unrecognized arguments"),
])
def test_a_user_s_mistake_ends_in_one_line_and_exit_code_2(script, flags, says):
    done = script("tasks.py", *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr.strip().splitlines()[-1]
    assert len(done.stderr.strip().splitlines()) == 1 or "usage:" in done.stderr


def test_without_a_network_a_task_of_the_hub_ends_in_one_line_and_exit_code_2(tmp_path):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}        # nothing is cached there
    done = subprocess.run([sys.executable, "tasks.py", "--task", "svamp"], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "--task FILE.jsonl" in done.stderr


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        tasks.load("arithmetic", "dev")


def test_the_command_prints_problems_with_their_answers(script):
    out = script("tasks.py", "--limit", "3").stdout.splitlines()
    assert out == [f"[{p.kind}] {p.question}  ->  {p.answer}" for p in tasks.load("arithmetic", "train", 0, 3)]


# ----------------------------------------------------------------------------------------------------------------------
# How a problem is put, and in which order


def test_every_prompt_style_keeps_the_question_with_its_braces():
    problem = tasks.Problem("What is $\\frac{1}{2} + {x}$?", "1", "0", "k")
    asked = {style: tasks.put([problem], style)[0] for style in tasks.PROMPTS}
    assert all(problem.question in put.question and put.answer == "1" for put in asked.values())
    assert asked["plain"] == problem and "\\boxed{}" in asked["cot"].question


def test_an_epoch_of_batches_holds_every_problem_once_and_the_next_epoch_is_ordered_anew():
    problems = tasks.load("arithmetic", "train", limit=30)
    stream = [p for step in range(12) for p in tasks.batch(problems, step, 5, seed=0)]
    assert Counter(stream[:30]) == Counter(stream[30:]) == Counter(problems)
    assert stream[:30] != stream[30:]


def test_p20_a_batch_depends_on_the_seed_and_the_step_alone():
    problems = tasks.load("arithmetic", "train", limit=50)
    forward = [tasks.batch(problems, step, 8, seed=1) for step in range(20)]
    assert [tasks.batch(problems, step, 8, seed=1) for step in reversed(range(20))] == forward[::-1]
    assert forward[3] != tasks.batch(problems, 3, 8, seed=2)


def test_batches_of_another_size_cut_the_same_stream_even_across_epochs():
    problems = tasks.load("arithmetic", "train", limit=7)
    small = [p for step in range(12) for p in tasks.batch(problems, step, 2, seed=0)]
    large = [p for step in range(2) for p in tasks.batch(problems, step, 12, seed=0)]
    assert small == large


def test_an_id_of_zero_is_an_id(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"id": i, "question": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(3)))
    both = tasks.load(str(path), "train", 0) + tasks.load(str(path), "test", 0)
    assert sorted(problem.id for problem in both) == ["0", "1", "2"]
