"""evaluation/compare.py: arms that were made to differ get the verdicts they were made for; folders find their seed."""

import json
from collections import namedtuple

import numpy as np
import pytest

import evaluate
from evaluation import claims, command, compare, lottery, measures, plots, report
from evaluation import judge as judge_module
from tests.test_evaluate import persona_tables


def results_of(accuracies, seed, identified=0.9, n_items=150, hard=True):
    """The results dict of a made-up arm: every fourth item is of the kind "hard", never solved."""
    rng = np.random.default_rng(seed)
    table = (rng.random((n_items, len(accuracies))) < accuracies) * ((np.arange(n_items)[:, None] % 4 > 0) | (not hard))
    problems = [Problem("", "", str(i), "easy" if i % 4 else "hard") for i in range(n_items)]
    speakers = [Persona(f"p{j}", "x") for j in range(len(accuracies) - 1)]
    out = evaluate.summary(table.astype(float), problems, speakers, 0)
    hits = (rng.random((40, len(accuracies) - 1)) < identified).astype(float)
    return out | {"task": "t", "seed": 0, "max_new_tokens": 8,
                  "fidelity": {"tables": {"persona_identification": hits.tolist()}}}


Problem = namedtuple("Problem", "question answer id kind")
Persona = namedtuple("Persona", "name stratum")
BASE, RLVR, PERMIX = np.r_[0.3, np.linspace(0.05, 0.5, 8)], np.r_[0.7, np.linspace(0.45, 0.7, 8)], np.full(9, 0.8)


def verdicts(arms):
    return {h["name"]: h["verdict"] for h in compare.side_by_side(arms)["hypotheses"]}


def test_each_hypothesis_gets_the_verdict_that_the_arms_were_made_for():
    arms = {"start": [results_of(BASE, 0, 0.95)], "rlvr": [results_of(RLVR, 1, 0.5)],
            "permix": [results_of(PERMIX, 2, 0.9)]}
    assert verdicts(arms) == dict.fromkeys(("H1", "H2", "H3", "H4", "H5"), "shown")
    arms["rlvr"], arms["permix"] = arms["permix"], arms["rlvr"]
    got = verdicts(arms)
    assert (got["H3"], got["H4"], got["H5"]) == ("opposite", "opposite", "opposite")


def test_nothing_is_claimed_of_two_equal_arms_or_of_an_arm_that_is_missing():
    arms = {"rlvr": [results_of(RLVR, 1)], "permix": [results_of(RLVR, 1)]}
    got = verdicts(arms)
    assert (got["H1"], got["H3"], got["H4"]) == ("not tested", "not shown", "not shown")
    same = compare.side_by_side(arms)["differences"]["permix - rlvr"]
    assert all(abs(d["difference"]) < 1e-9 and d["low"] <= 1e-9 and d["high"] >= -1e-9 for d in same.values())


def told(monkeypatch, **rows):
    """Hypotheses of two arms whose differences are made up: {score: (difference, low, high)}."""
    made = {name: {"first": 0.05, "second": 0.05 + row[0], "difference": row[0], "low": row[1], "high": row[2],
                   "detectable": 0.04} for name, row in rows.items()}
    monkeypatch.setattr(claims, "difference", lambda a, b, level=0.95: made)
    return compare.side_by_side({"start": [results_of(BASE, 0)], "rlvr": [results_of(RLVR, 1)]})["hypotheses"][0]


def test_stability_is_decided_by_the_spread_alone_and_the_harmful_gap_is_told_beside_it(monkeypatch):
    falls, grows = (-0.04, -0.05, -0.03), (0.04, 0.01, 0.07)
    assert told(monkeypatch, persona_sd=falls, pss=(-0.2, -0.3, -0.1))["verdict"] == "shown"
    got = told(monkeypatch, persona_sd=falls, harmful_gap=grows)
    assert got["verdict"] == "shown" and "harmful_gap 5.0 -> 9.0 points, difference +4.0 [+1.0, +7.0]" in got["words"]
    assert told(monkeypatch, persona_sd=(0.04, 0.03, 0.05), harmful_gap=falls)["verdict"] == "opposite"


def test_several_looks_at_h3_are_one_claim():
    """The interval of 95 % leaves out 0, that of 98.3 % does not; what else is claimed has one look."""
    draws = np.stack([np.linspace(-0.1, 0.0047, 2001)] * 2)
    high = {level: measures.interval(draws, level)[1] for level in (0.95, 1 - 0.05 / 3)}
    between = sum(high.values()) / 2
    arms = {role: [results_of(RLVR, seed)] for seed, role in enumerate(("start", "rlvr", "permix"))}
    made = {"persona_sd": (0.0, draws - between)}
    zero = {"persona_sd": (0.0, np.zeros((2, 2001)))}
    scores = {role: {"pss": 0.5, "pss_shuffled": 0.6} for role in arms}
    for looks, verdict in ((1, "shown"), (3, "not shown")):
        h1, _, h3, *_ = claims.hypotheses(arms, {"start": zero, "rlvr": zero, "permix": made}, scores, looks=looks)
        assert h3["verdict"] == verdict and ("intervals of 98.3 %, for 3 looks" in h3["words"]) == (looks == 3)
        assert "98.3" not in h1["words"]


def test_character_is_decided_by_the_models_own_reading_where_it_was_measured():
    """The start model's reading is of drift, which may go the other way."""
    arms = {"start": [results_of(BASE, 0, 0.5)], "rlvr": [results_of(RLVR, 1, 0.95)]}
    assert verdicts(arms)["H2"] == "opposite"
    for role, share in (("start", 0.95), ("rlvr", 0.5)):
        own = (np.random.default_rng(5).random((40, 8)) < share).astype(float)
        arms[role][0]["fidelity"]["tables"]["self_identification"] = own.tolist()
    got = compare.side_by_side(arms)["hypotheses"][1]
    assert got["verdict"] == "shown" and got["words"].startswith("self_identification ")
    assert "; persona_identification " in got["words"]


def test_beside_not_shown_stands_what_could_have_been_shown(monkeypatch):
    got = told(monkeypatch, persona_sd=(-0.02, -0.05, 0.01))["words"]
    assert "persona_sd 5.0 -> 3.0 points, difference -2.0 [-5.0, +1.0]" in got
    assert got.endswith("; a fall of 4.0 points could have been shown") and "shuffled) -> " in got
    too_much = {"detectable": 0.06, "first": 0.05}
    assert claims.could_show("persona_sd", too_much, -1) == "not even a fall to 0 could have been shown"
    assert "-0.060 could" in claims.could_show("persona_identification", too_much, -1)
    assert "+0.030 or more" in claims.could_show("no_persona_accuracy", too_much, 0)


def test_mere_saturation_shrinks_the_spread_of_accuracy_and_not_the_spread_in_logits():
    logits = np.linspace(-2.5, -0.5, 9)
    first, second = (results_of(1 / (1 + np.exp(-logits - shift)), 3, n_items=2000, hard=False) for shift in (1, 5))
    got = claims.difference(*(compare.arm_draws([run]) for run in (first, second)))
    assert got["persona_sd"]["high"] < -0.02 and got["pss"]["low"] > 0.1
    assert got["persona_sd_logit"]["low"] < 0 < got["persona_sd_logit"]["high"]


def test_the_interval_of_a_difference_in_spread_leaves_out_0_exactly_where_that_of_its_square_does():
    rng, verdicts = np.random.default_rng(0), []
    for shift in np.linspace(-5, 5, 41):
        squares = [(mean, mean + rng.normal(size=2000)) for mean in (1.0, 1.0 + shift)]
        low, high = measures.interval(squares[1][1] - squares[0][1])
        a, b = ({"persona_sd": tuple(map(lottery.signed_root, pair))} for pair in squares)
        d = claims.difference(a, b)["persona_sd"]
        assert (d["low"] > 0, d["high"] < 0) == (low > 0, high < 0)
        verdicts.append(claims.verdict(d, -1))
    assert set(verdicts) == {"shown", "opposite", "not shown"}


def test_a_fall_that_could_be_shown_is_shown_in_four_of_five_repetitions():
    rng, shown, start = np.random.default_rng(1), 0, 25.0
    fall = claims.detectable_fall(*((5.0, lottery.signed_root(start + rng.normal(size=20_000))) for _ in range(2)))
    truth = (5 - fall) ** 2  # of the second arm's square, each square with a standard error of 1
    for _ in range(500):
        estimated = [start + rng.normal(), truth + rng.normal()]
        draws = ({"persona_sd": (lottery.signed_root(x), lottery.signed_root(x + rng.normal(size=400)))}
                 for x in estimated)
        shown += claims.difference(*draws)["persona_sd"]["high"] < 0
    assert shown / 500 == pytest.approx(0.8, abs=0.06)


def test_several_training_seeds_of_an_arm_are_averaged_and_widen_its_interval():
    runs = [results_of(np.full(9, level), seed) for seed, level in enumerate((0.3, 0.5, 0.7))]
    one, all_three = compare.arm_draws(runs[1:2])["mean_accuracy"], compare.arm_draws(runs)["mean_accuracy"]
    assert all_three[0] == pytest.approx(np.mean([run["mean_accuracy"] for run in runs]))
    width = [np.subtract(*measures.interval(draws)[::-1]) for _, draws in (one, all_three)]
    assert width[1] > 1.5 * width[0]


def test_the_paired_interval_of_a_pss_difference_covers_in_simulation():
    rng, covered = np.random.default_rng(2), 0
    truth = [measures.pss(next(persona_tables(a, 400_000, 1, rng)).mean(axis=0)) for a in (BASE, RLVR)]
    for run in range(200):
        difficulty = rng.normal(size=(80, 1))
        tables = [rng.random((80, 9)) < 1 / (1 + np.exp(-(difficulty + np.log(a / (1 - a))))) for a in (BASE, RLVR)]
        counts = measures.resamples(80, 300, run)
        a, b = (measures.bootstrap(table, counts, [run, i])["pss"] for i, table in enumerate(tables))
        low, high = measures.interval(b - a)
        covered += low <= truth[1] - truth[0] <= high
    assert 0.9 <= covered / 200 <= 1, covered / 200


@pytest.mark.parametrize("change, said", [
    ({"task": "u"}, r"differ in 'task' \(t and u\): evaluate again with --task$"), ({"items": []}, "in 'items'$"),
    ({"personas": []}, "in 'personas'$"),
    ({"max_new_tokens": 9}, r"'max_new_tokens' \(8 and 9\): evaluate again with --max-new-tokens$"),
    ({"reward": "a:b"}, r"'reward' \(None and a:b\)"),
    ({"problems": "1"}, "'problems'"), ({"pool": "1"}, "'pool'"), ({"stop": ["\n"]}, "'stop'"),
    ({"template": "1"}, r"'template' \(0 and 1\)"),
    ({"trained": {"reward": "a:b"}}, r"training's 'reward' \(c:d and a:b\)$"),
    ({"trained": {"task": "u"}}, r"training's 'task' \(t and u\)$"),
    ({"trained": {"personas": "who.jsonl"}}, "training's 'personas'")])
def test_runs_that_cannot_be_paired_are_refused_in_a_line_that_names_the_difference(change, said):
    trained = {"task": "t", "reward": "c:d", "personas": "train"}
    run = results_of(BASE, 0) | {"problems": "0", "pool": "0", "stop": [], "template": "0", "trained": trained}
    with pytest.raises(ValueError, match=said):
        compare.side_by_side({"rlvr": [run], "permix": [run | change]})
    if "trained" in change:                             # an ablation of just that, under its own name
        compare.side_by_side({"rlvr": [run], "mine": [run | change]})


def test_six_problems_are_too_few_for_a_claim():
    arms = {"start": [results_of(BASE, 0, 0.95, n_items=6)], "rlvr": [results_of(RLVR, 1, 0.5, n_items=6)],
            "permix": [results_of(PERMIX, 2, 0.9, n_items=6)]}
    got, few = verdicts(arms), "too few problems"
    assert got == {"H1": few, "H2": "shown", "H3": few, "H4": "shown", "H5": few}
    lead = report.finding({role: runs[0] for role, runs in arms.items()}, compare.side_by_side(arms))
    assert lead.startswith("Too few problems for most claims: 6 problems; the intervals need 20. ")
    assert "Too few problems for a claim" in report.finding({"start": arms["start"][0]}, None)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def run_folder(top, method, seed, accuracies, anchor=0.0, steps=9, **settings):
    """A run as train.py leaves it: config, metrics, evaluation/after -> the evaluation's folder."""
    run = top / f"{method}-{anchor}-{seed}"
    folder = run / "evaluation/after"
    folder.mkdir(parents=True)
    config = {"settings": {"method": method, "seed": seed, "anchor_coef": anchor} | settings}
    (run / "config.json").write_text(json.dumps(config))
    rows = [{"step": i, "reward": seed + i / 9, "entropy": 1.0, "completion_length": None} for i in range(9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = results_of(accuracies, 10 * seed + len(method)) | {"steps": steps, "model": "m", "command": "",
                                                                 "commit": ""} | compare.arm_of(config)
    results["fidelity"] |= {"chance": 0.125, "persona_identification": 0.5}
    (folder / "results.json").write_text(json.dumps(results))
    rows = [{"persona": name, "id": "1", "question": "?", "gold": "1", "answer": "1", "correct": True}
            for name in results["correct"]]
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """The evaluations of two start models' runs, and of rlvr, permix and permix with the anchor, three seeds each."""
    top = tmp_path_factory.mktemp("runs")
    made = [run_folder(top, "permix", seed, PERMIX, anchor) for anchor in (0.5, 0.0) for seed in (2, 0, 1)]
    made += [run_folder(top, "rlvr", seed, RLVR) for seed in (0, 1, 2)]
    return made + [run_folder(top, f"sft{i}", 0, BASE, steps=0) for i in (1, 2)]


def test_folders_find_their_arm_and_training_seed_and_the_start_model_counts_once(arms, tmp_path):
    got = compare.folders(arms, tmp_path)
    assert list(got["runs"]) == ["start", "rlvr", "permix", "permix+anchor"]
    seeds = {role: [run["training_seed"] for run in runs] for role, runs in got["runs"].items()}
    assert seeds == {"start": [0], "rlvr": [0, 1, 2], "permix": [0, 1, 2], "permix+anchor": [0, 1, 2]}
    for role, runs in got["runs"].items():
        assert got["arms"][role]["pss"] == pytest.approx(np.mean([run["pss"] for run in runs]))
        assert got["arms"][role]["persona_identification_high"] <= 1
    assert {h["name"]: h["verdict"] for h in got["hypotheses"]}["H1"] == "shown" and len(got["differences"]) == 6
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "comparison.json", "learning_curves.png", "report.html", "stability_against_fidelity.png",
        "the_persona_lottery.png"]


def test_the_text_names_every_arm_pair_and_hypothesis_and_who_has_one_seed(arms, tmp_path):
    comparison = compare.folders(arms, tmp_path)
    text = compare.text(comparison)
    assert all(f"\n{role} " in f"\n{text}" for role in [*comparison["runs"], *comparison["differences"]])
    assert all(f"{h['name']} {h['claim']}: {h['verdict'].upper()}." in text for h in comparison["hypotheses"])
    assert "One training seed for start:" in text and max(map(len, text.split("\n\n")[0].splitlines())) < 160


def test_two_ablations_of_one_method_are_not_taken_for_two_seeds(arms, tmp_path):
    with pytest.raises(ValueError, match=r"permix\+anchor with training seed 2.*--roles"):
        compare.folders(arms[:1] + arms[:1], tmp_path)
    got = compare.folders(arms[:1] + arms[:1], tmp_path, ["a", "b"])
    assert [len(runs) for runs in got["runs"].values()] == [1, 1]


def test_arms_trained_longer_or_faster_are_compared_with_a_warning_and_seeds_of_one_arm_are_not(
        tmp_path, capsys):
    usual = run_folder(tmp_path, "rlvr", 0, RLVR, learning_rate=3e-5)
    faster = run_folder(tmp_path, "permix", 0, PERMIX, steps=20, learning_rate=1e-4)
    start = run_folder(tmp_path, "sft", 0, BASE, steps=0, learning_rate=1.0)
    compare.folders([usual, faster], tmp_path / "out")
    said = capsys.readouterr().err
    assert "warning: trained with other steps: rlvr 9, permix 20" in said
    assert "warning: trained with other learning rate: rlvr 3e-05, permix 0.0001" in said
    compare.folders([start, usual], tmp_path / "out")
    assert "warning" not in capsys.readouterr().err
    other = run_folder(tmp_path, "rlvr", 1, RLVR, steps=20, learning_rate=3e-5)
    with pytest.raises(ValueError, match=r"runs of rlvr differ in their 'steps' \(9, 20\).*--roles"):
        compare.folders([usual, other], tmp_path / "out")


def test_arms_of_other_start_models_or_other_readers_are_compared_with_a_warning(tmp_path, capsys):
    folders = [run_folder(tmp_path, "rlvr", 0, RLVR, model="x/small"),
               run_folder(tmp_path, "permix", 0, PERMIX, model="large")]
    for folder, reader in zip(folders, ("small", "runs/small"), strict=True):
        results = json.loads((folder / "results.json").read_text())
        results["fidelity"]["reader"] = reader
        (folder / "results.json").write_text(json.dumps(results))
    compare.folders(folders, tmp_path / "out")
    said = capsys.readouterr().err
    assert "warning: trained with other model: rlvr small, permix large" in said and "reader" not in said
    results["fidelity"]["reader"] = "runs/half"
    (folders[1] / "results.json").write_text(json.dumps(results))
    compare.folders(folders, tmp_path / "out")
    assert "warning: fidelity with another reader: rlvr small, permix half" in capsys.readouterr().err


def test_an_arms_scores_are_of_all_its_seeds_or_left_out():
    runs = [results_of(RLVR, seed) | {"mean_reward": reward, "reward": "r", "pass_at_k": {}, "noise_floor": {}}
            for seed, reward in enumerate((0.1, 0.9))]
    shown = compare.averaged(runs, compare.side_by_side({"rlvr": runs})["arms"]["rlvr"])
    assert shown["mean_reward"] == pytest.approx(0.5) and not {"pass_at_k", "noise_floor"} & shown.keys()
    alone = compare.averaged(runs[:1], compare.side_by_side({"rlvr": runs[:1]})["arms"]["rlvr"])
    assert alone["mean_reward"] == 0.1 and {"pass_at_k", "noise_floor"} <= alone.keys()


def test_an_arrow_over_few_problems_is_said_to_be_no_claim():
    few, enough = (compare.text(compare.side_by_side({role: [results_of(RLVR, seed, n_items=n)] for seed, role in
                                                      enumerate(("rlvr", "permix"))})) for n in (12, 24))
    assert "fewer than 20 problems" in few and "fewer than 20 problems" not in enough


def test_two_models_of_unknown_seed_are_not_merged_or_dropped(arms, tmp_path):
    """As `evaluate.py` leaves them for two models that lie in no run: both are called start, or as --method says."""
    for role in ("start", "mine"):
        folders = []
        for model in ("a", "b"):
            results = json.loads((arms[0] / "results.json").read_text())
            folders.append(tmp_path / role / model)
            folders[-1].mkdir(parents=True)
            results |= {"method": role, "model": model, "training_seed": None}
            (folders[-1] / "results.json").write_text(json.dumps(results))
        with pytest.raises(ValueError, match=f"two folders hold {role} .*--roles"):
            compare.folders(folders, tmp_path / "out")
        assert len(compare.folders(folders, tmp_path / "out", ["a", "b"])["runs"]) == 2


def test_fidelity_is_shown_where_every_run_of_an_arm_has_it(arms, tmp_path):
    results = json.loads((arms[1] / "results.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(
        {key: value for key, value in results.items() if key != "fidelity"}))
    got = compare.folders([arms[0], tmp_path / "other", *arms[6:]], tmp_path / "out")
    assert "persona_identification" not in got["arms"]["permix+anchor"]
    assert "persona_identification" in got["arms"]["rlvr"]


def test_an_arm_graded_by_a_judge_alone_keeps_its_grades():
    run = results_of(BASE, 0) | {"fidelity": {"personagym": graded([[2, 4], [3, 3]])}}
    scores = compare.arm_scores(compare.arm_draws([run]))
    shown = compare.averaged([run], scores)["fidelity"]
    assert shown["personagym"] == graded([[2, 4], [3, 3]]) and shown["persona_score"] == 3.0


def graded(table, usable=True, judge="some"):
    """PersonaGym's part of the results, of grades [personas, tasks]."""
    return judge_module.person_scores([
        {"persona": f"p{i}", "task": task, "score": score}
        for i, row in enumerate(table) for task, score in zip(judge_module.TASKS, row, strict=False)], 0) | {
        "usable": usable, "judge": judge}


def test_personagyms_grades_are_compared_over_the_same_personas():
    """permix is graded 1 more than rlvr by every persona, so the difference is 1 whoever is drawn."""
    rng = np.random.default_rng(0)
    tables = [rng.integers(1, 5, (12, 2)) for _ in range(2)]
    arms = {"rlvr": [], "permix": []}
    for seed, table in enumerate(tables):
        for more, role in enumerate(arms):
            run = results_of(BASE, seed) | {"training_seed": seed}
            run["fidelity"] = run["fidelity"] | {"personagym": graded((table + more).tolist())}
            arms[role].append(run)
    got = compare.side_by_side(arms)
    d = got["differences"]["permix - rlvr"]["persona_score"]
    assert [d["difference"], d["low"], d["high"]] == pytest.approx([1, 1, 1])
    assert got["arms"]["rlvr"]["persona_score"] == pytest.approx(np.mean(tables))
    assert got["arms"]["rlvr"]["persona_score_low"] < np.mean(tables) < got["arms"]["rlvr"]["persona_score_high"]
    tasks = compare.averaged(arms["permix"], got["arms"]["permix"])["fidelity"]["personagym"]["tasks"]
    assert list(tasks.values()) == pytest.approx(np.mean(tables, axis=(0, 1)) + 1)
    arms["permix"][0]["fidelity"]["personagym"] |= {"usable": False}        # a judge that failed its controls
    got = compare.side_by_side(arms)
    assert "persona_score" not in got["differences"]["permix - rlvr"]
    assert "personagym" not in compare.averaged(arms["permix"], got["arms"]["permix"])["fidelity"]
    arms["permix"][0]["fidelity"]["personagym"] |= {"judge": "another"}
    with pytest.raises(ValueError, match="differ in PersonaGym's 'judge' .some and another."):
        compare.side_by_side(arms)


def test_a_file_that_is_no_evaluation_is_named(arms, tmp_path):
    (tmp_path / "results.json").write_text('{"method": "rlvr"}')
    with pytest.raises(ValueError, match=r"results.json is no evaluation: it has no 'personas'"):
        compare.folders([arms[0], tmp_path], tmp_path / "out")
    run = arms[0].parents[1]
    with pytest.raises(ValueError, match=f"{run} is no evaluation: .*: give {run}/evaluation/after$"):
        compare.folders([arms[1], run], tmp_path / "out")


def test_learning_curves_of_several_seeds_are_averaged_step_by_step():
    runs = [[{"step": i, "reward": base + i, "entropy": None} for i in range(n)] for base, n in ((0, 3), (1, 2))]
    assert plots.mean_curve(runs) == [{"step": 0, "reward": 0.5}, {"step": 1, "reward": 1.5}]


@pytest.mark.parametrize("change", [
    {"personas": "abc"}, {"personas": []}, {"correct": {}}, {"correct": []}, {"items": None}, {"items": []}])
def test_results_whose_tables_do_not_fit_are_broken_in_one_line(tmp_path, change):
    row = {"method": "rlvr", "lottery": [], "personas": [{"name": "none"}], "items": [{}] * 2,
           "correct": {"none": "01"}}
    (tmp_path / "results.json").write_text(json.dumps(row))
    assert compare.read_arm(tmp_path)[0] == "rlvr"
    (tmp_path / "results.json").write_text(json.dumps(row | change))
    with pytest.raises(ValueError, match="results.json is broken: its answers do not fit"):
        compare.read_arm(tmp_path)


@pytest.mark.parametrize("table", ["0", "0x", None, [0, 1]])
def test_a_table_that_is_no_text_of_0_and_1_for_each_item_is_none(table):
    row = {"personas": [{"name": "none"}], "items": [{}] * 2, "correct": {"none": table}}
    assert not measures.has_table(row)


def test_a_start_model_evaluated_otherwise_is_refused_not_dropped(tmp_path):
    for name, run in (("a", results_of(BASE, 0)), ("b", results_of(BASE, 0) | {"max_new_tokens": 9})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(run | {"method": "start", "model": "m"}))
    with pytest.raises(ValueError, match="cannot be paired: they differ in 'max_new_tokens'"):
        compare.folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="whose report it would overwrite"):
        command.check(command.parse(["--compare", "x", str(tmp_path), "--out", str(tmp_path / "x" / "..")]))
