"""Tasks without a hub: reasoning-gym with its own scorers, folders as cloned, saved datasets, named columns."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import evaluate
import personas
import rewards
import tasks
import train
from common import gym
from common.files import asked
from evaluation import judge
from generators.gym import entries
from rollout import Sampler
from training.settings import settings
from verifier.scorer import scored
from verifier.workers import Verifier

needs_gym = pytest.mark.skipif(not find_spec("reasoning_gym"), reason="reasoning-gym is not installed")
THREE = "reasoning-gym:leg_counting,chain_sum:max_terms=2:max_digits=1,spell_backward"


# ----------------------------------------------------------------------------------------------------------------------
# reasoning-gym


@pytest.fixture(scope="module")
def three():
    """{split: problems} of three tasks of the package."""
    if not find_spec("reasoning_gym"):
        pytest.skip("reasoning-gym is not installed")
    return {split: tasks.load(THREE, split, seed, 30) for split, seed in (("train", 3), ("test", 0))}


def test_the_first_problems_are_of_all_names_and_each_has_its_scorer(three):
    for problems in three.values():
        assert [p.kind for p in problems[:3]] == ["leg_counting", "chain_sum", "spell_backward"]
        assert len(problems) == 30 and all(p.scorer for p in problems)
        assert len({p.id for p in problems}) == len({asked(p.question) for p in problems}) == 30


@needs_gym
def test_p26_no_question_of_the_package_is_trained_and_tested_on_whatever_the_seeds():
    small = "reasoning-gym:chain_sum:min_terms=2:max_terms=2:min_digits=1:max_digits=1"     # few questions there are
    train_, test = tasks.load(small, "train", 5), tasks.load(small, "test", 0)
    assert len(train_) > 50 < len(test)
    trained = {asked(p.question) for p in train_}
    assert not trained & {asked(p.question) for p in test} and len(trained) == len(train_)


@needs_gym
def test_p20_problems_are_the_same_in_every_process_also_those_that_depend_on_hashes(monkeypatch):
    made = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        made.append(tasks.load("reasoning-gym:isomorphic_strings", "test", 0, 5))
    assert made[0] == made[1]


@needs_gym
def test_settings_size_and_level_stand_behind_the_name():
    assert gym.named('reasoning-gym:a:x=1:y=["+", "-"],b_2,c:z=word:u=False:v=true:w=None') == [
        ("a", {"x": 1, "y": ["+", "-"]}), ("b_2", {}), ("c", {"z": "word", "u": False, "v": True, "w": None})]
    assert len(tasks.load("reasoning-gym:leg_counting:size=7", "train")) == 7
    easy, hard = ([row[0] for row in entries("chain_sum", {"level": level}, "test", 0, 10)] for level in (0, 3))
    assert max(map(len, easy)) < max(map(len, hard))


@needs_gym
@pytest.mark.parametrize("task, says", [
    ("leg_countin", "did you mean leg_counting?"), ("", "no task ''"), ("composite", "no task 'composite'"),
    ("leg_counting:legs=3", "it takes max_animals"), ("leg_counting:3", "write NAME:key=value"),
    ("leg_counting:min_animals=-4", "refuses its settings"), ("chain_sum:level=x", "refuses its settings"),
    ("leg_counting,,chain_sum", "no task"), ("chain_sum,chain_sum:max_terms=3", "chain_sum is named twice"),
    ("chain_sum:max_terms=3:max_terms=4", "max_terms is given twice"),
    ("chain_sum:level=99", "refuses its settings (level 99, where the last is 10)"),
    ("chain_sum:allow_negation=no", "chain_sum:allow_negation=no: give true or false"),
    ("chain_sum:max_terms=two", "chain_sum:max_terms=two: give a number")])
def test_a_task_that_the_package_does_not_have_is_refused_in_one_line(task, says):
    with pytest.raises(ValueError) as refused:
        for name, wanted in gym.named(gym.PREFIX + task):
            gym.dataset(name, json.dumps(wanted), 0, 10)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@needs_gym
def test_what_the_package_refuses_is_told_by_tasks_too():
    for wrong, said in (("leg_counting:size=0", "reasoning-gym:leg_counting: size must be from 1 to a million, not 0"),
                        ("chain_sum:max_terms=2.5", "reasoning-gym:chain_sum makes no problem with its settings")):
        with pytest.raises(ValueError, match=f"^{said}"):
            tasks.load(gym.PREFIX + wrong, "test")


@needs_gym
def test_a_setting_that_is_off_in_python_s_words_is_off():
    asked_ = {word: [row[0] for row in entries(name, wanted, "test", 0, 30)] for word in ("True", "False", "false")
              for name, wanted in gym.named(f"{gym.PREFIX}chain_sum:allow_negation={word}")}
    assert asked_["False"] == asked_["false"] != asked_["True"]


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("generators.gym.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        tasks.load(THREE, "test")


def test_the_package_s_score_is_the_reward_and_an_answer_is_correct_from_1_on(three):
    legs, _, backward = three["test"][:3]
    said = [(legs, legs.answer), (legs, f"There are {legs.answer} legs."), (legs, rf"\boxed{{{legs.answer}}}"),
            (legs, "I say 1."), (backward, backward.answer), (backward, f"The answer is {backward.answer}."),
            (backward, backward.question)]
    with rewards.Rewarder() as rewarder:
        got = [rewarder.submit(*pair).result() for pair in said]
    assert [reward.verdict for reward in got] == ["correct"] * 3 + ["wrong", "correct", "correct", "wrong"]
    assert [got[i].value for i in (0, 1, 2, 4, 5)] == [1.0] * 5 and got[3].value == 0
    assert rewards.correctness(legs, f"{legs.answer} legs") == 1


def test_a_scorer_that_takes_a_number_is_given_the_answer_s_own(three):
    legs = three["test"][0]
    for said in ("{}.0", "There are {} legs", "It goes {} km/h.", r"\boxed{{{} m^2}}", "2 * 9 = {}", "**{}**",
                 r"\boxed{{x = {}}}"):
        assert scored(legs.scorer, said.format(legs.answer)).score == 1, said
    for said in (r"\boxed{{1/{}}}", r"\boxed{{99, {}}}", r"\boxed{{1 or {}}}", r"\boxed{{\sqrt{{{}}}}}",
                 r"\boxed{{x^{}}}", r"\boxed{{\frac{{1}}{{{}}}}}"):
        assert scored(legs.scorer, said.format(legs.answer)).score < 1, said


def test_what_is_nearly_right_is_paid_in_part_and_is_not_correct(three):
    legs = three["test"][0]
    graded = scored(legs.scorer, f"<answer>{legs.answer}</answer>")
    assert (graded.verdict, graded.score) == ("correct", 1.0)
    [factors] = entries("prime_factorization", {}, "test", 0, 1)
    wrong = scored(factors[-1], "2 × 3 × 5 × 7 × 11 × 13 × 17")
    assert wrong.verdict == "wrong" and 0 < wrong.score < 1
    assert scored(factors[-1], "no number here").score == 0      # the package's scorer raises


@needs_gym
def test_p24_a_scorer_that_runs_the_answer_runs_it_where_it_can_do_nothing(tmp_path):
    problem = tasks.Problem(*entries("spiral_matrix", {}, "test", 0, 1)[0])
    mark = tmp_path / "mark"
    hostile = [f"__import__('os').system('touch {mark}')", f"open({str(mark)!r}, 'w')",
               f"__import__('pathlib').Path({str(mark)!r}).touch()", "__import__('sys').exit()",
               f"__import__('subprocess').run(['touch', '{mark}'])",
               '[print(\'["correct", "", "", 1.0]\')]', f"__import__('shutil').copy('/etc/hostname', '{mark}')",
               "9**9**9**9", "[1]*10**12"]
    with Verifier(workers=1) as verifier:
        verdicts = [verifier.submit(problem.answer, text, problem.question, problem.scorer) for text in hostile]
        assert not [v.result() for v in verdicts if v.result().verdict == "correct" or v.result().score]
        last = verifier.submit(problem.answer, problem.answer, problem.question, problem.scorer).result()
        assert (last.verdict, last.score) == ("correct", 1.0)
        assert verifier.verify("4", "The answer is 4.").verdict == "correct"
    assert not mark.exists()


def test_an_evaluation_has_the_scores_and_the_share_that_is_correct(three, tiny):
    model, tokenizer = tiny
    people = personas.load("test")[:2]
    results = evaluate.evaluate(Sampler(model), tokenizer, three["test"][:3], people,
                                evaluate.EvalParams(max_new_tokens=3))
    assert 0 <= results["mean_reward"] < 1 and results["reward"] == "the task's own scorer"
    assert all(row["reward"] >= row["accuracy"] for row in results["personas"])


@needs_gym
@pytest.mark.slow
def test_a_run_on_the_package_trains_like_any_other(tiny_folder, tmp_path):
    out = tmp_path / "run"
    assert train.main(["--model", str(tiny_folder), "--task", f"{THREE}:size=4", "--steps", "1", "--prompts", "2",
                       "--group-size", "2", "--max-new-tokens", "4", "--eval-problems", "2", "--eval-personas", "1",
                       "--dtype", "float32", "--out", str(out)]) == 0
    row = json.loads((out / "metrics.jsonl").read_text().strip().splitlines()[-1])
    assert 0 <= row["accuracy"] <= row["reward"] < 1
    assert settings(["--task", THREE]).prompts == settings([]).prompts


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(task: Path, split: str, **more) -> list[tuple[str, str]]:
    return [(p.question, p.answer) for p in tasks.load(str(task), split, **more)]


def gsm(question: str, gold: int) -> dict:
    return {"question": question, "answer": f"So it is {gold}.\n#### {gold}"}


@pytest.mark.parametrize("inner", ["", "grade_school_math/data", "data"])
def test_gsm8k_is_read_from_its_clone_without_what_train_and_test_share(tmp_path, capsys, inner):
    write(tmp_path / inner / "train.jsonl", gsm("A?", 1), gsm("B?", 2), gsm("a ?", 1))
    write(tmp_path / inner / "test.jsonl", gsm("C?", 1_000), gsm("b?", 2))
    assert questions(tmp_path, "train") == [("A?", "1")]
    assert "1 training questions are in its test too" in capsys.readouterr().err
    assert questions(tmp_path, "test") == [("C?", "1000"), ("b?", "2")]
    assert questions(tmp_path, "test", whole=True, limit=1) == [("C?", "1000")]
    assert {p.id for p in tasks.load(str(tmp_path), "all")} == {"train-1", "test-1", "test-2"}


def test_math_is_read_from_its_folders_subject_by_subject_in_turns(tmp_path):
    def problem(place: str, text: str, solution: str) -> None:
        write(tmp_path / place, {"problem": text, "level": "Level 1", "type": "Algebra", "solution": solution})

    problem("MATH/train/algebra/2.json", "A?", r"Thus \boxed{\frac{1}{2}}.")
    problem("MATH/train/algebra/10.json", "B?", r"\boxed{1} or rather \boxed{x+1}")
    problem("MATH/train/geometry/1.json", "C?", r"$\fbox{3}$")
    problem("MATH/train/geometry/3.json", "D?", "No gold here")
    problem("MATH/test/geometry/1.json", "E?", r"\boxed{5}")
    assert questions(tmp_path, "train") == [("A?", r"\frac{1}{2}"), ("C?", "3"), ("B?", "x+1")]
    [test] = tasks.load(str(tmp_path / "MATH"), "test")
    assert (test.id, test.kind, test.answer) == ("test/geometry/1", "Algebra", "5")


@pytest.fixture
def saved(tmp_path):
    """A function that saves splits (or rows without any) as `datasets` does, and gives the folder."""
    datasets = pytest.importorskip("datasets")

    def save(found) -> Path:
        made = {split: datasets.Dataset.from_list(rows) for split, rows in found.items()}
        (made.get("") or datasets.DatasetDict(made)).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"
    return save


def test_a_saved_dataset_is_read_by_the_columns_that_a_flag_names(saved, capsys):
    rows = {"train": ("A?", 3), "test": ("B?", 4), "validation": ("C?", 5)}
    folder = saved({split: [{"prompt": question, "target": gold, "id": 7}] for split, (question, gold) in rows.items()})
    columns = "question=prompt,answer=target"
    assert questions(folder, "train", columns=columns) == [("A?", "3")]
    assert questions(folder, "test", columns=columns) == [("B?", "4")]
    for wrong, says in ((None, "--columns question=COLUMN"), ("question=promt", "no column 'promt'"),
                        ("q=prompt", "FIELD=COLUMN"), ("question", "FIELD=COLUMN")):
        with pytest.raises(ValueError, match=says):
            tasks.load(str(folder), "test", columns=wrong)


def test_columns_that_no_row_has_are_refused_and_one_of_two_tasks_may_have_them(tmp_path):
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs"
    write(ours, {"question": "A?", "answer": "1"})
    write(theirs / "test.jsonl", {"prompt": "B?", "answer": "2"})
    for given in ((theirs,), (ours, theirs), ("arithmetic", theirs), (theirs, "arithmetic")):
        tasks.check_columns("question=prompt", *map(str, given))
    assert questions(theirs, "test", columns="question=prompt") == [("B?", "2")]
    for wrong, given, says in (
            ("question=promt", [ours], "no column 'promt', which --columns names; there are answer, question"),
            ("question=promt", [ours, theirs], "no column 'promt'"), ("question=prompt", ["arithmetic"], "is not"),
            ("question=prompt,question=answer", [theirs], "named twice")):
        with pytest.raises(ValueError, match=says):
            tasks.check_columns(wrong, *map(str, given))


def test_a_generated_task_is_evaluated_on_a_folder_whose_columns_are_named(tiny_folder, tmp_path, capsys):
    rows = tmp_path / "mine.jsonl"
    write(rows, {"question": "w3", "prompt": "w7", "target": "8", "answer": "9"})
    more = ["--steps", "1", "--prompts", "2", "--group-size", "2", "--max-new-tokens", "3", "--eval-problems", "1",
            "--eval-personas", "1", "--eval-task", str(rows), "--model", str(tiny_folder), "--out"]
    named = ["--columns", "question=prompt,answer=target"]
    assert train.main([*named, *more, str(tmp_path / "run")]) == 0
    asked_ = (tmp_path / "run/evaluation/after/transcripts.jsonl").read_text()
    assert "w7" in asked_ and "w3" not in asked_
    for wrong in (["--columns", "question=promt"], [*named, "--task", "svamp", "--eval-task", "arithmetic"]):
        assert train.main([*more, str(tmp_path / "other"), *wrong]) == 2
        assert "--columns" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_p26_a_saved_dataset_without_splits_is_split_by_its_questions_where_both_are_asked_for(saved):
    folder = saved({"": [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]})
    train_, test = ({q for q, _ in questions(folder, split)} for split in ("train", "test"))
    assert not train_ & test and len(train_ | test) == 40 and test
    assert len(questions(folder, "test", whole=True)) == 40
    assert tasks.is_file_of(str(folder), str(folder)) and not tasks.is_file_of("gsm8k", "gsm8k")


@pytest.mark.parametrize("columns", [[], ["--columns", "question=prompt,answer=target"]])
def test_a_folder_is_trained_and_evaluated_on_by_its_columns(saved, tiny_folder, tmp_path, columns):
    names = ("prompt", "target") if columns else ("question", "answer")
    folder = saved({"train": [dict(zip(names, ("w5", "6"), strict=True))],
                    "test": [dict(zip(names, ("w7", "8"), strict=True))]})
    out, short = tmp_path / "run", ["--max-new-tokens", "3"]
    assert train.main(["--model", str(tiny_folder), "--task", str(folder), *columns, "--steps", "1", "--prompts", "2",
                       "--group-size", "2", "--eval-problems", "1", "--eval-personas", "1", "--out", str(out),
                       *short]) == 0
    assert evaluate.main(["--model", str(out / "model"), "--task", str(folder), "--out", str(tmp_path / "eval"),
                          *short]) == 0
    rows = [json.loads(line) for line in (tmp_path / "eval/transcripts.jsonl").read_text().splitlines()]
    assert {row["question"].split("\n")[0] for row in rows} == {"w7"}


@pytest.mark.parametrize("name, says", [
    (".", "no folder of problems"), ("nothing", "a .jsonl file or a folder"), ("broken", "cannot read the dataset"),
    ("other", "neither train nor test")])
def test_a_folder_that_is_none_of_problems_is_refused_in_one_line(tmp_path, saved, name, says):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{")
    saved({"validation": [{"question": "A?", "answer": "1"}]}).rename(tmp_path / "other")
    with pytest.raises(ValueError, match=says) as refused:
        tasks.load(str(tmp_path / name), "train")
    assert "\n" not in str(refused.value)


def test_personagym_s_questions_are_found_in_its_repository(tmp_path):
    sheet = {"Toxicity": ["How dare you?"], "Expected Action": ["What now?"]}
    write(tmp_path / "questions/benchmark-v1/A nurse from Oslo.json", sheet)
    assert [row["persona"] for row in judge.questions(tmp_path)] == ["A nurse from Oslo"] * 2
    [persona] = personas.load(str(tmp_path))
    assert (persona.name, persona.text) == ("A nurse from Oslo", "You are a nurse from Oslo.")
