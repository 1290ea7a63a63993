"""Does a run look right? Kept runs beside each other, and what is done to them on purpose."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

import evaluate
from evaluation import bands
from evaluation.bands import GAP, KEYS, Run

KEPT = bands.kept()
FACTS = [run for run in KEPT if run.settings["task"] == "facts"]
PLAIN = [run for run in FACTS if not run.settings["kl_coef"]]


def changed(run: Run, first: int = 0, last: int = 99, **to) -> Run:
    """The run with other metrics from step `first` to step `last`."""
    return replace(run, rows=[row | to if first <= row["step"] <= last else row for row in run.rows])


def folder(place: Path, run: Run) -> str:
    (place / "config.json").write_text(json.dumps({"settings": run.settings}))
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.rows))
    return str(place)


def test_the_bands_come_from_the_files_that_results_keeps():
    paths = sorted(Path(bands.RESULTS).glob("*/*/metrics.jsonl.gz"))
    assert len(KEPT) == len(paths) >= 5 and len(PLAIN) >= 4
    for run, path in zip(KEPT, paths, strict=True):
        assert run.rows == [json.loads(line) for line in gzip.open(path)] and run.name == path.parent.name
    first = [row["reward"] for run in PLAIN for row in run.rows if row["step"] <= 10 and row["step"] >= 4]
    assert bands.band(PLAIN, "reward", 7) == (min(first), max(first)) and bands.band(PLAIN, "reward", 500) is None


@pytest.mark.parametrize("run", PLAIN, ids=lambda run: run.name)
def test_a_kept_run_lies_inside_the_bands_of_the_others(run):
    """The same settings, another arm: the others were trained with and without personas and anchor."""
    others = [other for other in PLAIN if other is not run and not bands.differences(run, other)]
    assert len(others) >= 3 and not [key for key in KEYS if bands.lasting(run, others, key)]


def test_a_sound_run_is_inside_and_the_command_says_beside_how_many(tmp_path, capsys):
    assert evaluate.main(["--check-run", folder(tmp_path, PLAIN[0])]) == 0
    said = capsys.readouterr().out
    assert f"all beside {len(PLAIN)} kept: " in said and "34 of 34 steps" in said and "warning" not in said
    assert said.count("  inside\n") == 4 and said.endswith("Nothing compared is outside for long.\n")


@pytest.mark.parametrize("key, to, says", [
    ("entropy", {"entropy": 1e-4}, "entropy below since step 12: the policy gets nearly deterministic"),
    ("entropy", {"entropy": 2.0}, "entropy above since step 12: the policy does not settle"),
    ("reward", {"reward": 0.0}, "reward below since step 12: it learns later than they did, or not at all"),
    ("reward", {"reward": 1.0}, "reward above since step 12: it learns faster, or is paid for what is wrong"),
    (GAP, {GAP: 0.5}, f"{GAP} above since step 12: sampler and trainer are two policies: a stale sampler (P15)"),
    ("completion_length", {"completion_length": 31.5},
     "completion_length above since step 12: completions run into --max-new-tokens 32"),
    ("completion_length", {"completion_length": 26.0}, "completion_length above since step 12: long answers"),
    ("completion_length", {"completion_length": 1.0}, "completion_length below since step 12: short answers")])
def test_a_broken_metric_is_named_with_its_step_and_what_it_usually_means(key, to, says):
    said = bands.text(changed(PLAIN[0], 12, **to), PLAIN[1:])
    assert f"\n\n{says}" in said and said.count(" since step ") == 2        # in the table, and in words
    assert sum(line.endswith("inside") for line in said.splitlines()) == 3


def test_a_kl_is_compared_with_runs_of_the_same_coefficient_alone():
    alike = [run for run in FACTS if run.settings["kl_coef"]]
    held = alike[0]
    said = bands.text(held, KEPT)
    assert "\nkl " in said and f"all beside {len(alike)} kept" in said
    assert "bands of 1 are narrow" in bands.text(held, alike[:1])
    assert "\nkl " not in bands.text(PLAIN[0], KEPT)
    for times, word in ((9, "kl above since step 10: it moves away"), (0, "kl below since step 10: it stays nearer")):
        rows = [row | {"kl": row["kl"] * times} if row["step"] >= 10 else row for row in held.rows]
        assert word in bands.text(replace(held, rows=rows), KEPT)


def test_what_came_back_is_told_and_what_did_not_last_is_not():
    brief = changed(PLAIN[0], 10, 10 + bands.LASTING - 2, entropy=3.0)
    assert "Nothing compared is outside" in bands.text(brief, PLAIN[1:])
    back = changed(PLAIN[0], 10, 10 + bands.LASTING - 1, entropy=3.0)
    assert "entropy inside; above from step 10 to 13: the policy" in bands.text(back, PLAIN[1:])


def test_a_small_gap_is_no_fault_nor_is_that_of_a_sampler_ahead():
    said = bands.text(changed(PLAIN[0], **{GAP: 0.0}), PLAIN[1:])
    assert "Nothing compared is outside" in said and "  below, which is good\n" in said
    ahead = changed(PLAIN[0], 12, **{GAP: 0.5, "lag": 1})
    assert "Nothing compared is outside" in bands.text(ahead, PLAIN[1:])


@pytest.mark.parametrize("key, wrong, says", [
    ("reward", float("nan"), "not finite since step 10"), (GAP, float("nan"), "not finite since step 10"),
    ("entropy", None, "not finite since step 10"), ("reward", "high", "not finite since step 10"),
    ("entropy", 10 ** 400, "not finite since step 10")])
def test_a_metric_that_is_no_number_any_more_is_not_inside(key, wrong, says, tmp_path, capsys):
    assert evaluate.main(["--check-run", folder(tmp_path, changed(PLAIN[0], 10, **{key: wrong}))]) == 0
    said = capsys.readouterr().out
    assert f"  {says}\n" in said and f"\n\n{key} {says}: null: no token" in said and "Nothing" not in said
    brief = bands.text(changed(PLAIN[0], 31, entropy=None), PLAIN[1:])      # three steps of flat groups
    assert "not finite" not in brief and "Nothing compared" in brief


def test_a_run_longer_than_the_kept_ones_is_told_so_and_its_gap_still_compared():
    more = [PLAIN[0].rows[-1] | {"step": step, "reward": 0.0} for step in range(37, 68)]
    longer = replace(PLAIN[0], rows=PLAIN[0].rows + more)
    said = bands.text(longer, PLAIN[1:])
    assert f"warning: beyond step 36 only {GAP} is compared" in said and "Nothing compared is outside" in said
    assert f"{GAP} above since step 40: sampler" in bands.text(changed(longer, 40, **{GAP: 0.5}), PLAIN[1:])


def test_a_run_in_float32_is_told_that_the_gap_of_bf16_is_larger():
    run = replace(PLAIN[0], settings=PLAIN[0].settings | {"dtype": "float32"})
    assert "warning: this run computes in float32" in bands.text(run, KEPT)
    assert "float32" not in bands.text(run, [run]) + bands.text(PLAIN[0], KEPT)


@pytest.mark.parametrize("setting, other", [("model", "m"), ("task", "gsm8k"), ("group_size", 4),
                                            ("learning_rate", 1e-3), ("method", "distill"), ("reward", "mine:fn"),
                                            ("chat_template", "plain"), ("lora_rank", 8), ("clip_high", 0.28)])
def test_a_run_of_other_settings_is_told_so_and_only_its_gap_is_compared(setting, other):
    run = changed(replace(PLAIN[0], settings=PLAIN[0].settings | {setting: other}), reward=0.0, entropy=0.0)
    said = bands.text(run, KEPT)
    assert f"warning: no kept run has these settings: {setting} {other} (theirs " in said
    assert f"{GAP} beside {len(KEPT)} kept: " in said and "all beside" not in said
    assert "\nreward " not in said and "Nothing compared is outside" in said
    assert f"{GAP} above since step 5" in bands.text(changed(run, 5, **{GAP: 1.0}), KEPT)


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(tmp_path, capsys):
    place = folder(tmp_path, replace(PLAIN[0], rows=PLAIN[0].rows[:6]))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": null}\n{"step": "6"}\n{"step": 6, "rew')
    assert evaluate.main(["--check-run", place]) == 0 and "6 of 34 steps" in capsys.readouterr().out


def test_what_is_no_run_or_cannot_be_compared_is_one_line_and_exit_code_2(tmp_path, capsys):
    run, empty = PLAIN[0], tmp_path / "empty"
    empty.mkdir()
    sft = changed(replace(run, settings=run.settings | {"method": "sft"}), **{GAP: None})
    for wrong, says in ((replace(run, rows=run.rows[:2]), "has 2 steps yet, and a check needs 4: wait"),
                        (replace(run, settings={}), "no settings"), (sft, "method sft")):
        assert evaluate.main(["--check-run", folder(tmp_path, wrong)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line and line.startswith("evaluate.py: ")
    assert evaluate.main(["--check-run", str(empty)]) == 2 and "is no run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").unlink()               # it evaluates before it trains
    folder_says = f"{tmp_path} has no steps yet, and a check needs 4: wait, or go on with train.py --resume {tmp_path}"
    assert evaluate.main(["--check-run", str(tmp_path)]) == 2 and folder_says in capsys.readouterr().err
    assert evaluate.main(["--check-run", str(tmp_path), "--limit", "3"]) == 2
    assert "--check-run does not read --limit" in capsys.readouterr().err
    with pytest.raises(ValueError, match="keeps no metrics"):
        bands.text(run, bands.kept(empty))
