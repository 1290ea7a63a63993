"""results/screen.py: each rule fires alone on a table that was made for it, and go needs them all."""

import json
import re

import numpy as np
import pytest

import evaluate
from evaluation import compare
from personas import Persona, load
from results import screen
from tasks import Problem

N = 600
SPREAD = np.linspace(0.25, 0.6, 12)


def results_of(accuracies, seed=0, truncated=0.05) -> dict:
    """A results dict of N problems, each persona right with its own chance; `none` as the first."""
    chances = np.r_[accuracies[0], accuracies]
    table = (np.random.default_rng(seed).random((N, len(chances))) < chances).astype(float)
    problems = [Problem("", "", str(i), "sum") for i in range(N)]
    people = [Persona(f"p{j}", f"You are {j}.", "x", "test") for j in range(len(accuracies))]
    out = evaluate.summary(table, problems, people, 0)
    for row in out["personas"]:
        row |= {"tokens": 20.0, "truncated": truncated, "accuracy_finished": row["accuracy"]}
    return out | {"model": "m", "task": "facts", "prompt": "plain", "max_new_tokens": 32,
                  "method": "start", "truncated_fraction": truncated}


def failed(*given) -> list[int]:
    """Which rules do not hold, by their number."""
    return [i for i, (holds, _) in enumerate(screen.checks(*given)) if not holds]


PILOT = results_of(SPREAD, seed=1)


def test_it_is_go_when_every_rule_holds():
    assert failed(results_of(SPREAD)) == failed(results_of(SPREAD), PILOT) == []
    assert len(screen.checks(results_of(SPREAD))) == 4
    assert len(screen.checks(results_of(SPREAD), PILOT)) == 5


@pytest.mark.parametrize("rule, results", [
    (0, results_of(np.linspace(0.33, 0.55, 12))),  # a true spread of 7 points
    (1, results_of(np.r_[np.full(8, 0.5), np.full(4, 0.2)])),  # four personas make the lottery
    (2, results_of(SPREAD + 0.3)), (2, results_of(SPREAD - 0.22)),
    (3, results_of(SPREAD, truncated=0.1))])
def test_each_rule_fires_alone(rule, results):
    assert failed(results, PILOT) == [rule]


def test_a_pilot_that_leaves_no_lottery_is_a_reason_of_its_own():
    assert failed(results_of(SPREAD), results_of(np.full(12, 0.6), seed=1)) == [4]


@pytest.mark.parametrize("many, kept", [(4, False), (5, True), (6, True)])
def test_five_personas_that_are_alike_carry_a_lottery_and_four_do_not(many, kept):
    found = screen.checks(results_of(np.r_[np.full(24 - many, 0.55), np.full(many, 0.15)]))
    assert found[1][0] == kept and found[0][0]


def test_the_personas_that_are_left_out_are_the_extreme_ones_on_both_sides():
    table = (np.random.default_rng(0).random((N, 8)) < [0.4, 0.9, 0.4, 0.4, 0.1, 0.4, 0.8, 0.05])
    left, gone = screen.without_carriers(table, list("abcdefgh"))
    assert set(gone) == set("begh") and abs(left) < 0.03


def test_a_pilot_that_was_asked_other_problems_is_refused():
    with pytest.raises(ValueError, match="differ in 'items'"):
        screen.checks(results_of(SPREAD), PILOT | {"items": PILOT["items"][::-1]})


def command(folder, results, *more) -> int:
    """The command, on an evaluation that is there already."""
    people = folder / "people.jsonl"
    people.write_text("".join(json.dumps({"name": f"p{j}", "text": f"You are {j}.", "stratum": "x"})
                              + "\n" for j in range(12)))
    (folder / "results.json").write_text(json.dumps(results))
    return screen.main(["--model", "m", "--personas", str(people), "--problems", str(N), "--out",
                        str(folder), *more])


def test_the_command_says_go_or_no_go_and_why(tmp_path, capsys):
    assert command(tmp_path, results_of(SPREAD)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "go" and sum(line.startswith("holds") for line in lines) == 4
    assert command(tmp_path, results_of(SPREAD, truncated=0.2)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "no-go"
    assert [line for line in lines if line.startswith("FAILS")] == [
        "FAILS  20.0 % of the answers are cut off (under 10 %)"]


def test_the_command_prints_how_long_each_persona_s_answers_are(tmp_path, capsys):
    results = results_of(SPREAD)
    results["personas"][3] |= {"tokens": 61.7, "truncated": 0.48, "accuracy_finished": None}
    command(tmp_path, results)
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("p2 ")]
    assert row.split()[-3:] == ["–", "61.7", "0.48"]


@pytest.mark.parametrize("change, says", [({"task": "arithmetic"}, "of other task"),
                                          ({"max_new_tokens": 96}, "of other max_new_tokens")])
def test_an_evaluation_of_something_else_is_not_taken_for_this_one(tmp_path, capsys, change, says):
    assert command(tmp_path, results_of(SPREAD) | change) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("flags", [["--pilot", "/nowhere"], ["--problems", "7"]])
def test_bad_usage_is_one_line_and_exit_2(tmp_path, capsys, flags):
    assert command(tmp_path, results_of(SPREAD), *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_evaluates_once_and_reads_what_is_there_the_next_time(
        tiny_folder, tmp_path, capsys, monkeypatch):
    flags = ["--model", str(tiny_folder), "--task", "facts", "--problems", "4",
             "--max-new-tokens", "3", "--out", str(tmp_path)]
    assert screen.main(flags) == 1  # a random model solves nothing
    first = capsys.readouterr().out
    monkeypatch.setattr(evaluate, "one_arm", None)
    assert screen.main(flags) == 1 and capsys.readouterr().out == first


def test_the_page_of_screens_says_what_the_rules_say_of_the_kept_evaluations():
    folder = screen.ROOT / "results" / "screens"
    rows = re.findall(r"^\| \[(.*?)\]\((.*?)\) \| (.*) \|$", (folder / "README.md").read_text(), re.M)
    models, tasks = {"135M": "smollm2-135m", "0.5B": "qwen2.5-coder-0.5b"}, {"facts": "facts"}
    products = "reasoning-gym:products:min_terms=2:max_terms=2:min_digits=1:max_digits="
    tasks |= {"one-digit products": products + "1", "products, one or two digits": products + "2"}
    assert {where for _, where, _ in rows} == {"../facts/start", "../products/start"} | {
        path.parent.name for path in folder.glob("*/results.json")}
    for name, where, row in rows:
        results = json.loads((folder / where / "results.json").read_text())
        tables, _, names = compare.persona_tables([results])
        sd, low, high = (100 * results[f"persona_sd{end}"] for end in ("", "_low", "_high"))
        shown = [f"{sd:.1f} [{low:.1f}, {high:.1f}]", f"{100 * screen.without_carriers(tables[0], names)[0]:.1f}",
                 f"{tables.mean():.3f}", f"{100 * results['truncated_fraction']:.0f} %"]
        holds = [rule for rule, _ in screen.checks(results)]
        sd, left, mean, cut = (text if rule else f"**{text}**" for text, rule in zip(shown, holds, strict=True))
        verdict = "go" if all(holds) else "no-go"
        model, task, pool = re.fullmatch(r"(\S+), (.*), (\w+)", name).groups()
        assert (results["model"], results["task"]) == (models[model], tasks[task])
        assert names == [persona.name for persona in load(f"{pool}-test" if pool == "conflict" else pool)]
        alone = results["no_persona_accuracy"]
        assert row == (f"{len(results['items'])} | {results['max_new_tokens']} | {sd} | {left} | {mean} | "
                       f"{alone:.3f} | {cut} | {verdict}")
