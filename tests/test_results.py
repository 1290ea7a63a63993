"""The experiment's script: its arms, and the tables it left."""

import copy
import gzip
import json
import random
import re
import runpy
import shlex
import subprocess
import threading
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import personas
import rewards
import tasks
import train
import weights
from common import files
from evaluation import answers, fidelity, lottery, report
from results import arms, curves, interpolate, readers, transcripts
from rollout import Completion, Sampler
from tests.conftest import make_reference, saved
from training import settings
from training.run import in_line

RESULTS = Path(__file__).resolve().parents[1] / "results"


def test_runs_at_a_time_have_a_gpu_of_their_own_where_there_are_several(monkeypatch):
    given = defaultdict(list)
    for gpus, processes in (("2,5", 1), ("2,5", 4), ("3", 1), ("", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        run = SimpleNamespace(**runpy.run_path(str(RESULTS / "run.py")))
        monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
        monkeypatch.setattr(run.os, "sched_setaffinity", lambda *_: None, raising=False)
        both = threading.Barrier(2)

        def process(command, check, env, key=(gpus, processes), both=both):
            both.wait(10)                               # so that each thread starts one
            given[key].append(env.get("CUDA_VISIBLE_DEVICES"))

        monkeypatch.setattr(run.subprocess, "run", process)
        with run.workers(2, run.gpus_here(processes)) as pool:
            list(pool.map(run.call, ["train.py", "train.py"]))
    assert {key: sorted(seen) for key, seen in given.items()} == {
        ("2,5", 1): ["2", "5"], ("2,5", 4): ["2,5", "2,5"], ("3", 1): ["3", "3"], ("", 1): ["", ""]}


@pytest.fixture(scope="module")
def run():
    return SimpleNamespace(**runpy.run_path(str(RESULTS / "run.py")))


@pytest.mark.parametrize("name", ["main", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "early", "ablations", "pushed", "anchors"))])
def test_the_tables_follow_from_the_raw_results_that_are_kept(run, name):
    """From each run's answers to intervals and verdicts, as `python results/run.py` computed them."""
    comparison = run.kept(name)[1]
    assert run.tables(comparison) == (RESULTS / name / "tables.md").read_text()
    written = json.loads((RESULTS / name / "compared" / "comparison.json").read_text())
    assert run.tables(written) == run.tables(comparison)  # the numbers to the digits that the tables show


@pytest.mark.slow
def test_the_tables_of_an_experiment_with_checkpoints_follow_from_its_raw_results(run):
    folder = RESULTS / "products"
    comparisons = {step: run.kept("products", step)[1] for step in run.kept_comparisons("products")}
    assert run.page(comparisons) == (folder / "tables.md").read_text()
    told = [f"{name} (chance 0.125)\n{report.aligned(readers.lines(readers.arms(runs)))}\n"
            for name, runs in json.loads((folder / "readers.json").read_text()).items()]
    assert "\n".join(told) + "\n" == (folder / "readers.txt").read_text()


def test_the_page_says_how_many_runs_of_an_experiment_under_way_are_kept():
    told = dict(re.findall(r"^\| `(\w+)`.*under way: (\d+) of \d+ runs", (RESULTS / "README.md").read_text(), re.M))
    assert told == {name: str(len([*(RESULTS / name).glob(f"*-seed*/{last}/results.json")]))
                    for name, last in [("facts", "step-34")]}


def test_the_page_shows_how_far_rlvr_was_pushed_as_it_was_measured():
    page = (RESULTS / "arithmetic.md").read_text().splitlines()
    for label, folder in {"3e-5, 34": "main/rlvr-seed0", "3e-5, 102": "probes/rlvr-102-steps",
                          "6e-5, 68": "pushed/rlvr-seed0", "1e-4, 34": "probes/rlvr-1e-4"}.items():
        got = json.loads((RESULTS / folder / "results.json").read_text())
        numbers = got["mean_accuracy"], got["pss"], got["fidelity"]["persona_identification"]
        assert f"| {label} | {' | '.join(f'{x:.3f}' for x in numbers)} |" in page


def test_identification_by_length_follows_from_what_is_kept():
    length, kept = runpy.run_path(str(RESULTS / "length.py")), RESULTS / "main" / "by_length.json"
    assert length["table"](json.loads(kept.read_text())) == kept.with_suffix(".md").read_text()


def test_a_reply_is_read_from_its_first_tokens(tiny):
    """The sums that length.py cuts are those of the plain log-probs of shorter replies."""
    sums, groups = runpy.run_path(str(RESULTS / "length.py"))["sums"], [([5, 9, 2], [[7, 8, 4], [1]])]
    got = sums(tiny[0], groups)
    assert got.shape == (1, 2, 4) and (got[..., 0] == 0).all() and (got[0, 1, 1:] == got[0, 1, 1]).all()
    for cut in (1, 2, 3):
        want = fidelity.total_logprobs(tiny[0], [([5, 9, 2], [[7, 8, 4][:cut]])])[0]
        assert got[0, 0, cut] == pytest.approx(want, abs=1e-5)


def test_the_sanity_table_follows_from_the_curves_that_are_kept_and_has_a_row_for_each_loss():
    """That each loss learns is test_each_loss_learns_a_reward_that_can_be_learnt."""
    from results import sanity

    rewards, clipped = (json.loads((RESULTS / "sanity" / f"{name}.json").read_text())
                        for name in ("rewards", "clip_fractions"))
    assert rewards.keys() == clipped.keys() >= {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce", "rloo"}
    assert (RESULTS / "sanity" / "tables.md").read_text() == sanity.table(rewards, clipped)


def test_the_start_model_is_asked_as_the_arms_are_trained(run, monkeypatch, tmp_path):
    called = []
    monkeypatch.setitem(run.evaluated.__globals__, "call", lambda *flags: called.append(list(map(str, flags))))
    args = run.flags_of(["--prompt", "cot", "--max-new-tokens", "64", "--eval-task", "facts"])
    run.evaluated(args.model, "start", tmp_path, args)
    assert called[0][-4:] == ["--prompt", "cot", "--max-new-tokens", "64"]
    assert called[0][called[0].index("--task") + 1] == "facts"


def test_every_arm_is_one_that_train_py_takes(tmp_path):
    for arm in arms.EVERY:
        settings.settings(arms.flags(arm, tmp_path))


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_a_number_of_personas_is_a_file_of_as_many_training_personas_from_all_strata(tmp_path, count):
    pool = personas.load(arms.flags(f"personas={count}", tmp_path)[-1])
    assert len(pool) == count and set(pool) <= set(personas.load("train"))
    assert len({p.stratum for p in pool}) == min(count, 3)


def test_the_papers_setting_is_one_that_both_scripts_take_and_a_given_flag_wins(run):
    paper = runpy.run_path(str(RESULTS / "paper.py"))
    args = run.flags_of(paper["flags"](["--model", "some", "--task", "math", "--at", "50"]))
    assert (args.task, args.eval_task, args.at, args.problems, args.model) == ("math", "math500", [50], 500, "some")
    assert len(personas.load(args.personas)) == 24 + 30 and "cot" in args.rest
    small = run.flags_of(paper["flags"](["--small", "--questions", "3"]))
    assert (small.at, small.problems, small.questions, small.personas) == ([1, 2], 4, 3, args.personas)
    for one in (args, small):
        assert settings.settings(["--task", one.task, *one.rest]).prompt == "cot"
    assert args.asked[:4] == ["--prompt", "cot", "--max-new-tokens", "512"]
    assert settings.settings(args.rest).max_new_tokens == 512 != settings.settings(small.rest).max_new_tokens


def test_every_command_of_the_experiments_pages_is_one_that_the_script_takes(run):
    paper, found = runpy.run_path(str(RESULTS / "paper.py")), []
    for page in sorted(RESULTS.rglob("*.md")):
        text = page.read_text().replace("\\\n", " ")
        for script, given in re.findall(r"^python results/(run|paper)\.py(.*)$", text, re.M):
            argv = shlex.split(given.replace("NAME", "some"), comments=True)
            found.append(run.flags_of(paper["flags"](argv) if script == "paper" else argv))
        if page.name == "recipes.md":
            of_one_page = {(one.name, one.out, json.dumps(run.command.identity(one))) for one in found[-5:]}
    assert len(found) > 8 and any(one.processes > 1 for one in found)
    names, outs, _ = map(set, zip(*of_one_page, strict=True))
    assert len(names) == len(outs) == len(of_one_page) == 5


@pytest.fixture
def scripts(run, monkeypatch, tmp_path):
    """(calls, graded) of main with scripts that only write what main reads; results are kept in tmp_path/kept.

    calls: (script, flags, processes). graded: PersonaGym's part of every results.json."""
    calls, graded = [], {}

    def call(script, *flags, processes=1):
        calls.append((script, list(map(str, flags)), processes))
        folder = Path(flags[flags.index("--out") + 1] if "--out" in flags else flags[flags.index("--resume") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "metrics.jsonl") if script == "train.py" else ("transcripts.jsonl",):
            (folder / name).write_text("")
        if script == "evaluate.py" and "--compare" not in flags:
            (folder / "results.json").write_text(json.dumps({"fidelity": {"personagym": graded}}))

    monkeypatch.setitem(run.main.__globals__, "KEPT_IN", tmp_path / "kept")
    monkeypatch.setitem(run.main.__globals__, "call", call)
    monkeypatch.setitem(run.main.__globals__, "write_page", lambda name: None)
    return calls, graded


def questions_in(path, first=0):
    """A file of 20 problems of its own."""
    path.write_text("".join(json.dumps({"question": f"Say {i}.", "answer": str(i)}) + "\n"
                            for i in range(first, first + 20)))
    return str(path)


def main_of(run, tmp_path, *flags):
    own = ["--out", str(tmp_path / "runs"), "--name", "some", "--jobs", "1", "--arms", "rlvr", "permix"]
    return run.run([*own, *flags])


def asked_by(calls, script, folder):
    """The flags of a script whose --out ends so."""
    [found] = [flags for name, flags, _ in calls if name == script and "--out" in flags
               and flags[flags.index("--out") + 1].endswith(folder)]
    return found


def test_the_scripts_are_called_as_the_flags_say(run, scripts, tmp_path):
    calls, graded = scripts
    graded |= {"usable": True}
    tested = questions_in(tmp_path / "tested.jsonl")
    flags = ["--fidelity-once", "--questions", "3", "--model", "some", "--personagym", "gym", "--judge-model", "judge",
             "--processes", "2", "--slots", "7", "--eval-task", tested, "--personas", "conflict-test"]
    assert main_of(run, tmp_path, "--seeds", "4", "--at", "2", "5", *flags) == 0
    assert all("2" in str(processes) for script, _, processes in calls if script == "train.py")
    spoken = ["--fidelity", "3", "--start-model", "some", "--personagym", "gym", "--judge-model", "judge"]
    for folder, speaks in (("runs/start", True), ("rlvr-seed4/evaluation/step-2", False),
                           ("permix-seed4/evaluation/step-5", True)):
        flags = asked_by(calls, "evaluate.py", folder)
        assert (" ".join(spoken) in " ".join(flags)) == speaks and ("--fidelity" in flags) == speaks
        assert "--slots 7" in " ".join(flags) and flags[flags.index("--task") + 1] == tested
    [first, second] = [flags for script, flags, _ in calls if script == "train.py" and "permix-seed4" in str(flags)]
    assert first[first.index("--task") + 1] == "arithmetic" and first[first.index("--eval-task") + 1] == tested
    assert first[first.index("--eval-pool") + 1] == "conflict-test"
    assert second[:4] == ["--resume", str(tmp_path / "runs/permix-seed4"), "--steps", "5"]
    compared = [flags for script, flags, _ in calls if "--compare" in flags]
    assert len(compared) == 2 and all(flags[flags.index("--looks") + 1] == "2" for flags in compared)
    kept = tmp_path / "kept/some/permix-seed4"
    assert (kept / "metrics.jsonl.gz").is_file() and (kept / "step-2/results.json").is_file()


def test_a_run_goes_on_with_the_flags_of_now_and_a_seed_given_twice_is_one(run, scripts, tmp_path):
    calls, _ = scripts
    assert main_of(run, tmp_path, "--seeds", "4", "4", "--at", "2", "5", "--recompute", "--micro-tokens", "64") == 0
    trained = [flags for script, flags, _ in calls if script == "train.py"]
    assert len(trained) == 4 and [flags[0] for flags in trained].count("--resume") == 2
    assert all({"--recompute", "--micro-tokens", "64"} < set(flags) for flags in trained)


def test_a_file_is_asked_of_the_start_model_without_the_lines_that_are_trained_on(run, scripts, tmp_path):
    calls, _ = scripts
    mine, others = questions_in(tmp_path / "mine.jsonl"), questions_in(tmp_path / "others.jsonl", 100)
    assert main_of(run, tmp_path, "--seeds", "0", "--task", mine, "--dtype", "float32") == 0
    start, trained = (asked_by(calls, "evaluate.py", folder) for folder in ("runs/start", "rlvr-seed0/evaluation"))
    assert start[start.index("--task") + 1] == mine == start[start.index("--trained-on") + 1]
    assert "--trained-on" not in trained and all("--dtype float32" in " ".join(flags) for flags in (start, trained))
    calls.clear()
    assert run.run(["--out", str(tmp_path / "two"), "--name", "two", "--arms", "rlvr", "--seeds", "0", "--task", mine,
                    "--eval-task", others, "--questions", "0"]) == 0
    flags = asked_by(calls, "train.py", "two/rlvr-seed0")
    assert flags[flags.index("--eval-task") + 1] == others      # so that train.py keeps it apart
    assert not any("--fidelity" in flags or "--trained-on" in flags for _, flags, _ in calls)


@pytest.mark.parametrize("flags, says", [
    (["--personas", "nosuch"], "no personas called"), (["--personas", "train"], "144 of the evaluation's personas"),
    (["--arms", "rlvr+paraphrases", "--personas", "paraphrases-train"], "48 of the evaluation's personas"),
    (["--task", "nosuch"], "unknown task"), (["--questions", "1000"], "--questions must be at most"),
    (["--eval-task", "facts"], "questions are trained on"), (["--model", "x", "--problems", "0"], "at least 1"),
    (["--columns", "question=q"], "--columns")])
def test_inputs_that_cannot_be_had_or_are_trained_on_are_refused_before_anything_runs(
        run, scripts, tmp_path, capsys, flags, says):
    calls, _ = scripts
    try:
        assert main_of(run, tmp_path, "--seeds", "0", *flags) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert says in (err := capsys.readouterr().err.splitlines())[-1] and not calls, err
    assert main_of(run, tmp_path, "--seeds", "0") == 0          # the corrected command may use the same folders


def test_a_failed_arm_ends_the_command_and_starts_no_other(run, scripts, tmp_path, monkeypatch):
    calls, _ = scripts
    works = run.main.__globals__["call"]

    def fails(script, *flags, processes=1):
        works(script, *flags, processes=processes)
        if script == "train.py":
            raise subprocess.CalledProcessError(7, "train.py")

    monkeypatch.setitem(run.main.__globals__, "call", fails)
    assert main_of(run, tmp_path, "--seeds", "0", "1") == 7
    assert [script for script, _, _ in calls] == ["evaluate.py", "train.py"]


def test_two_commands_do_not_work_in_one_folder(run, scripts, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with files.claim(tmp_path / "runs"):
        assert main_of(run, tmp_path, "--seeds", "0") == 2
    assert "another process works in" in capsys.readouterr().err and not scripts[0]
    assert main_of(run, tmp_path, "--seeds", "0") == 0


def test_experiments_of_other_flags_share_no_folder_and_seeds_can_be_added(run, scripts, tmp_path, capsys):
    calls, _ = scripts
    main_of(run, tmp_path, "--seeds", "0")
    calls.clear()
    for other in (["--task", "facts"], ["--eval-task", "svamp"], ["--problems", "5"], ["--learning-rate", "1e-4"],
                  ["--steps", "3"], ["--model", "other"], ["--questions", "1"], ["--personas", "conflict-test"]):
        assert main_of(run, tmp_path, "--seeds", "0", *other) == 2
        assert "holds another experiment, with " in capsys.readouterr().err and not calls
    main_of(run, tmp_path, "--seeds", "1")
    [compared] = [flags for _, flags, _ in calls if "--compare" in flags]
    for one in ("runs/rlvr-seed1", "runs/permix-seed1", "kept/some/rlvr-seed0", "kept/some/permix-seed0"):
        assert [one in flag for flag in compared].count(True) == 1
    mine = questions_in(tmp_path / "mine.jsonl")
    again = ["--out", str(tmp_path / "f"), "--name", "f", "--arms", "rlvr", "--seeds", "0", "--task", mine]
    assert run.run([*again, "--slots", "9"]) == 0
    questions_in(tmp_path / "mine.jsonl", 3)                    # another file of that name
    assert run.run(again) == 2
    questions_in(tmp_path / "mine.jsonl")                           # again, and with other slots: the same experiment
    assert run.run(again) == 0
    (tmp_path / "kept/some/experiment.json").unlink()           # of nobody knows what
    assert main_of(run, tmp_path, "--seeds", "0") == 2


@pytest.mark.parametrize("flags, says", [
    (["--processes", "2", "--jobs", "2"], "leave out --jobs"), (["--stop", "x"], "would go on"),
    (["--arms", "sft", "--temperature", "1", "--loss", "nope"], "invalid choice"), (["--jobs", "0"], "at least 1"),
    (["--name", ""], "--name is empty"), (["--name", ".."], "--name is empty"), (["--seed", "5"], "set for"),
    (["--arms", "rlvr", "--method", "sft"], "set for rlvr"), (["--prompts", "3", "--processes", "2"], "by 2 processes"),
    (["--arms", "permix", "permix+anchor", "--anchor-coef=0.1"], "set for permix+anchor")])
def test_flags_that_cannot_be_meant_are_refused(run, capsys, flags, says):
    with pytest.raises(SystemExit, match="2"):
        run.flags_of(flags)
    assert says in capsys.readouterr().err
    assert run.flags_of(["--processes", "2"]).jobs == 1 and run.flags_of([]).jobs == 2


@pytest.mark.parametrize("gap", [None, 0.1])
def test_a_judge_that_fails_its_planted_controls_ends_the_experiment_before_any_training(
        run, scripts, tmp_path, capsys, gap):
    calls, graded = scripts
    graded |= {"judge": "tiny", "usable": False, "planted_gap": gap, "planted_gap_low": -0.1, "planted_gap_high": 0.3}
    assert main_of(run, tmp_path, "--personagym", "gym", "--judge-model", "tiny") == 2
    said = "no control could be planted" if gap is None else "get +0.100 [-0.100,\u00a0+0.300] grades more than under"
    assert "tiny cannot judge here: " in (err := capsys.readouterr().err) and said in err
    assert [script for script, _, _ in calls] == ["evaluate.py"] and not [*(tmp_path / "kept/some").glob("*/")]
    graded |= {"usable": True}                                  # another judge: the start model is asked again
    main_of(run, tmp_path, "--personagym", "gym", "--judge-model", "better", "--seeds", "0")
    assert [script for script, _, _ in calls[1:]] == ["evaluate.py", *["train.py", "evaluate.py"] * 2, "evaluate.py"]


# -- what a run keeps ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory):
    """(results.json of an evaluation with made-up answers, its folder, where it is kept)."""
    folder, target = (tmp_path_factory.mktemp(name) for name in ("evaluation", "kept"))
    draw = random.Random(0)

    def answered(model, tokenizer, prompts, params, log=None):
        log.touch()
        return [[(draw.choice(["It is 6.", "So 8\u2028apples.", "six", "9, no, 6."]),
                  Completion(i, j, [draw.randint(3, 98) for _ in range(3)], [], draw.random() < 0.3))
                 for j in range(params.n)] for i in range(len(prompts))]

    problems = [tasks.Problem(f"What is {i} + {g - i}?", str(g), f"{g}-{i}", "add") for g in (6, 8) for i in (1, 2, 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "sample", answered)
        params = evaluate.EvalParams(samples=2, fidelity=fidelity.Fidelity(["Who?", "Why?"], tiny[0]))
        results = evaluate.evaluate(Sampler(tiny[0]), tiny[1], problems, personas.load("test")[:8], params, folder)
    transcripts.keep(folder, target)
    return results, folder, target


def test_the_kept_answers_are_all_that_the_evaluation_wrote(kept):
    _, folder, target = kept
    assert transcripts.read(target) == list(files.rows(folder / "transcripts.jsonl"))
    text = gzip.decompress((target / "transcripts.json.gz").read_bytes()).decode()
    assert text.count('"What is 1 + 5?"') == text.count('"Who?"') == 1  # not once a persona


def test_the_kept_answers_give_the_verdicts_and_the_tables_of_the_results_again(kept):
    results, _, target = kept
    rows = transcripts.read(target)
    greedy = [row for row in rows if row.get("temperature") == 0]
    table = {name: "" for name in results["correct"]}
    for row in greedy:
        verdict = rewards.verify(row["gold"], row["answer"], row["question"]).verdict
        assert verdict == row["verdict"]
        table[row["persona"]] += "01"[verdict == "correct"]
    assert table == results["correct"] and "1" in str(table) and "0" in str(table)
    spoken = [row for row in rows if row["kind"] == "roleplay"]
    for name, want in results["fidelity"]["tables"].items():
        assert np.array([row[name] for row in spoken]).round(4).reshape(2, 8).tolist() == want


def test_the_kept_answers_give_the_lengths_of_the_results_again(kept):
    results, _, target = kept
    greedy = [row for row in transcripts.read(target) if row.get("temperature") == 0]
    for row in results["personas"]:
        own = [answer for answer in greedy if answer["persona"] == row["name"]]
        finished = [answer["correct"] for answer in own if not answer["truncated"]]
        assert row["tokens"] == np.mean([answer["tokens"] for answer in own])
        assert row["truncated"] == pytest.approx(np.mean([answer["truncated"] for answer in own]))
        assert row["accuracy_finished"] == (pytest.approx(np.mean(finished)) if finished else None)


def test_the_same_answers_are_the_same_bytes(kept, tmp_path):
    _, folder, target = kept
    transcripts.keep(folder, tmp_path)
    first, again = ((path / "transcripts.json.gz").read_bytes() for path in (target, tmp_path))
    assert first == again and first[4:8] == bytes(4)  # the header's time


# -- checkpoints on the way ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(run, tiny_folder, tmp_path_factory):
    """(arguments, calls) of two arms evaluated after 1 and 3 steps, with the scripts called in this process."""
    out, calls = tmp_path_factory.mktemp("stages"), []
    people = out / "people.jsonl"
    people.write_text("".join(json.dumps(vars(p)) + "\n" for p in personas.load("test")[:8]))
    args = run.flags_of([
        "--arms", "rlvr", "permix", "--seeds", "0", "--at", "1", "3", "--model", str(tiny_folder), "--problems", "4",
        "--questions", "1", "--personas", str(people), "--name", "staged", "--out", str(out / "runs"),
        "--prompts", "2", "--group-size", "4", "--max-new-tokens", "6", "--dtype", "float32", "--truncated", "keep",
        "--learning-rate", "1e-3", "--temperature", "1.0", "--reward", "tests.test_train:word_reward"])
    args.out.mkdir()
    args.flags = {arm: arms.flags(arm, args.out) for arm in args.arms}

    def call(script, *flags, processes=1):
        calls.append((script, *map(str, flags)))
        assert {"train.py": train, "evaluate.py": evaluate}[script].main(list(map(str, flags))) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.one_run.__globals__, "call", call)
        patch.setitem(run.one_run.__globals__, "KEPT_IN", out)
        everything = [("start", None), ("rlvr", 0), ("permix", 0)]
        run.compared([run.one_run(*one, args) for one in everything], args)
        yield args, calls, out / "staged", lambda: [run.one_run(*one, args) for one in everything]


@pytest.mark.slow
def test_a_run_that_is_evaluated_on_the_way_is_the_run_of_one_go(stages, tmp_path):
    args, calls, _, _ = stages
    first = next(flags for script, *flags in calls if script == "train.py" and "rlvr" in flags)
    at, out = first.index("--steps"), first.index("--out")
    whole = [*first[:at], "--steps", "3", *first[at + 2:out], "--out", str(tmp_path / "whole"), *first[out + 2:]]
    assert train.main(whole) == 0
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (tmp_path / "whole",
                                                                                args.out / "rlvr-seed0")]
    assert weights[0] == weights[1]
    rewarded = [row["reward"] for row in files.rows(args.out / "rlvr-seed0/metrics.jsonl")]
    assert rewarded == [row["reward"] for row in files.rows(tmp_path / "whole/metrics.jsonl")] and len(rewarded) == 3


@pytest.mark.slow
def test_each_checkpoint_is_kept_with_its_answers_and_the_run_with_its_metrics(stages):
    args, _, target, _ = stages
    for arm in ("rlvr-seed0", "permix-seed0"):
        tables = [json.loads((target / arm / step / "results.json").read_text()) for step in ("step-1", "step-3")]
        answers = [transcripts.read(target / arm / step) for step in ("step-1", "step-3")]
        assert answers[0] != answers[1] and len(answers[0]) == 4 * 9 + 8
        assert all(table["training_seed"] == 0 for table in tables)
        lines = gzip.decompress((target / arm / "metrics.jsonl.gz").read_bytes()).decode().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
        config = json.loads(gzip.decompress((target / arm / "config.json.gz").read_bytes()))
        assert config["settings"]["steps"] == 3 and not (args.out / arm / "checkpoints").exists()
    assert transcripts.read(target / "start") and not (target / "start" / "step-1").exists()


@pytest.mark.slow
def test_the_same_command_again_runs_nothing_that_is_there(stages):
    args, calls, target, again = stages
    before = len(calls)
    again()
    assert len(calls) == before > 0


@pytest.mark.slow
def test_what_is_kept_is_not_run_again_where_its_run_folder_is_gone(run, stages):
    args, calls, target, again = stages
    before, moved = len(calls), args.out.rename(args.out.with_name("elsewhere"))
    folders = again()
    assert len(calls) == before and folders[0] == [target / "start"] * 2
    assert folders[1] == [target / "rlvr-seed0" / step for step in ("step-1", "step-3")]
    moved.rename(args.out)


@pytest.mark.slow
def test_the_page_has_a_part_for_each_checkpoint_and_is_rebuilt_from_what_is_kept(run, stages):
    _, _, target, _ = stages
    page = (target / "tables.md").read_text()
    heads = [line for line in page.splitlines() if line.startswith("## ")]
    assert heads == ["## At step 1", "## At step 3", "## At equal accuracy"]
    (target / "tables.md").unlink()
    (target / "compared/step-3/stability_against_fidelity.png").unlink()
    run.rebuild("staged")
    assert (target / "tables.md").read_text() == page
    assert (target / "compared/step-3/stability_against_fidelity.png").stat().st_size > 0
    assert json.loads((target / "compared/curves.json").read_text()).keys() == curves.MEASURES.keys()


@pytest.mark.parametrize("given, says", [(["34", "12"], "each later"), (["0", "12"], "from 1 on"),
                                         (["12", "12"], "each later"), (["12", "34", "--overlap"], "another run")])
def test_checkpoints_that_cannot_be_had_are_refused(run, given, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.flags_of(["--arms", "rlvr", "--at", *given])
    assert says in capsys.readouterr().err


# -- curves ----------------------------------------------------------------------------------------


def comparisons(**arms):
    """{step: comparison}: arms {name: [seeds, steps, (accuracy, persona_sd)]}, and a start model."""
    out = {}
    for i, step in enumerate((12, 34)):
        runs = {name: [{"training_seed": seed, "mean_accuracy": points[i][0], "persona_sd": points[i][1]}
                       for seed, points in enumerate(seeds)] for name, seeds in arms.items()}
        runs["start"] = [{"training_seed": None, "mean_accuracy": 0.2, "persona_sd": 0.1}]
        means = {name: {"mean_accuracy": np.mean([row["mean_accuracy"] for row in rows]),
                        "persona_sd": lottery.signed_root(np.mean([abs(row["persona_sd"]) * row["persona_sd"]
                                                                   for row in rows]))}
                 for name, rows in runs.items()}
        out[step] = {"arms": means, "runs": runs}
    return out


def test_arms_are_compared_at_the_accuracies_that_both_have():
    """rlvr's spread falls from 8 to 4 points between 0.4 and 0.6; permix has 2 points less there."""
    made = comparisons(rlvr=[[(0.4, 0.08), (0.6, 0.04)]], permix=[[(0.5, 0.04), (0.7, 0.0)]])
    got = curves.differences(made)
    assert list(got) == ["persona_sd"] and list(got["persona_sd"]) == ["permix - rlvr"]
    found = got["persona_sd"]["permix - rlvr"]
    assert found["difference"] == pytest.approx(-0.02) and found["accuracy"] == pytest.approx([0.5, 0.6])
    assert found == {"seeds": [0]} | lottery.at_equal_accuracy(
        [(0.4, 0.08), (0.6, 0.04)], [(0.5, 0.04), (0.7, 0.0)])
    assert curves.rows(got)[1] == ["persona_sd, points", "permix - rlvr", "0.500 to 0.600", "1", "-2.0"]


def test_arms_without_a_common_accuracy_are_not_compared():
    got = curves.differences(comparisons(rlvr=[[(0.3, 0.08), (0.4, 0.04)]], permix=[[(0.5, 0.04), (0.7, 0.0)]]))
    assert got["persona_sd"]["permix - rlvr"] is None
    assert curves.rows(got)[1][-3:] == ["none in common", "–", "–"]


def test_the_interval_of_a_curve_is_the_jackknifes_over_the_seeds():
    """Delete one seed, compute the difference anew: of a mean these are the plain values of the seeds."""
    seeds = [[(0.4, 0.5 + x), (0.6, 0.5 + x)] for x in (0.0, 0.01, 0.05)]
    made = comparisons(rlvr=[seeds[0]] * 3, permix=seeds)
    for c in made.values():
        for runs in (*c["runs"].values(), [*c["arms"].values()]):
            for run in runs:
                run["self_identification"] = run["persona_sd"]
    found = curves.difference(made, "rlvr", "permix", "self_identification")
    half = 4.3027 * np.std([0.0, 0.01, 0.05], ddof=1) / np.sqrt(3)  # t with 2 degrees of freedom
    assert found["difference"] == pytest.approx(0.02) and found["seeds"] == [0, 1, 2]
    assert [found["low"], found["high"]] == pytest.approx([0.02 - half, 0.02 + half], rel=0.05)
    spread = curves.difference(made, "rlvr", "permix", "persona_sd")    # the root of the mean of squares
    assert spread["difference"] == pytest.approx(np.sqrt(np.mean(np.square([0.5, 0.51, 0.55]))) - 0.5)


def test_arms_without_a_lottery_are_seldom_told_apart_at_equal_accuracy():
    """S2 of both is noise about 0, and its signed root is bimodal: single seeds' roots covered 0 in 84 % of cases."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        arms = {name: [[(0.5 + 0.1 * i + 0.01 * rng.normal(), lottery.signed_root(2e-4 * rng.normal()))
                        for i in range(2)] for _ in range(6)] for name in ("rlvr", "permix")}
        found = curves.difference(comparisons(**arms), "rlvr", "permix", "persona_sd")
        covered += found["low"] <= 0 <= found["high"]
    assert covered / 200 >= 0.9


def test_a_measure_of_the_last_checkpoint_alone_has_no_curve():
    made = comparisons(rlvr=[[(0.4, 0.08), (0.6, 0.04)]], permix=[[(0.5, 0.04), (0.7, 0.0)]])
    for scores in made[34]["arms"].values():
        scores["persona_identification"] = 0.5
    assert len(curves.plot(made).axes) == 1 and list(curves.differences(made)) == ["persona_sd"]


def test_the_picture_begins_each_arm_at_the_start_model():
    fig = curves.plot(comparisons(rlvr=[[(0.4, 0.08), (0.6, 0.04)]], permix=[[(0.5, 0.04), (0.7, 0.0)]]))
    lines = fig.axes[0].get_lines()
    assert [line.get_xydata()[0].tolist() for line in lines] == [[0.2, 10], [0.2, 10]]
    assert lines[1].get_xydata()[2] == pytest.approx([0.7, 0])


def test_every_arm_of_many_has_a_look_of_its_own_in_the_picture():
    fig = curves.plot(comparisons(**{f"arm {i}": [[(0.4, 0.08), (0.6, 0.04)]] for i in range(25)}))
    assert len({(line.get_color(), line.get_marker()) for line in fig.axes[0].get_lines()}) == 25


@pytest.mark.slow
def test_recipes_say_what_the_script_counts_of_what_fits_on_which_card():
    from benchmarks import memory

    assert memory.table() in (RESULTS / "recipes.md").read_text()


def test_the_main_job_ends_with_its_place_among_the_kept_runs_of_its_settings(monkeypatch):
    def said(*flags, after, processes=1):
        args = settings.settings(flags)
        monkeypatch.setenv("WORLD_SIZE", str(processes))    # 12 prompts are no multiple of 8
        return in_line(args, Path("runs/mine"), json.loads((RESULTS / "job" / after / "results.json").read_text()))

    [line] = said(after="permix-seed3")
    assert re.fullmatch(r"9 stored runs .* mean accuracy of 0\.5\d to 0\.7\d, this one at 0\.66: in line", line)
    assert said(after="start")[0].endswith(": not in line: look at evaluate.py --check-run runs/mine")
    assert said("--seed", "7", "--dtype", "float32", after="permix-seed3") == [line]      # decides nothing
    for other in (["--steps", "33"], ["--anchor-coef", "0.5"], ["--lora-rank", "4"], ["--task", "facts"]):
        assert said(*other, after="permix-seed3") == []
    assert said("--prompts", "16", after="permix-seed3", processes=8) == []


# -- rivals without training -----------------------------------------------------------------------


def test_weights_are_interpolated_and_the_folder_is_a_model_like_any(tiny, tiny_folder, tmp_path, capsys):
    moved = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for weight in moved.parameters():
            weight += torch.randn_like(weight) * 0.1
    weights.save(moved, tiny[1], tmp_path / "trained")
    flags = ["--start", str(tiny_folder), "--trained", str(tmp_path / "trained")]
    for share in (0.0, 0.25, 1.0):
        out = tmp_path / str(share)
        assert interpolate.main([*flags, "--share", str(share), "--out", str(out)]) == 0
        got = weights.load(str(out), "float32")[0]
        for one, a, b in zip(got.parameters(), tiny[0].parameters(), moved.parameters(), strict=True):
            assert torch.allclose(one.double(), (1 - share) * a.double() + share * b.double(), atol=1e-7)
    assert interpolate.main([*flags, "--share", "1.5", "--out", str(tmp_path / "far")]) == 2
    assert "must lie in [0, 1], not 1.5" in capsys.readouterr().err and not (tmp_path / "far").exists()
    for taken in (tmp_path / "0.25", tmp_path / "0.25/config.json"):
        assert interpolate.main([*flags, "--out", str(taken)]) == 2
        assert "is there already" in capsys.readouterr().err
    other = weights.load(str(saved(tmp_path / "other", make_reference("llama3", hidden_size=64))), "float32")[0]
    with pytest.raises(ValueError, match="other names or shapes"):
        interpolate.interpolate(tiny[0], other, 0.5)
