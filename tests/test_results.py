"""The experiment's script: its arms, and the tables it left."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import personas
import settings

RESULTS = Path(__file__).resolve().parents[1] / "results"


@pytest.fixture(scope="module")
def run():
    return SimpleNamespace(**runpy.run_path(str(RESULTS / "run.py")))


@pytest.mark.parametrize("name", ["main", "early", "ablations", "pushed", "anchors"])
def test_the_tables_follow_from_the_raw_results_that_are_kept(run, name):
    """From each run's answers to intervals and verdicts, as `python results/run.py` computed them."""
    comparison = run.kept(name)[1]
    assert run.tables(comparison) == (RESULTS / name / "tables.md").read_text()
    written = json.loads((RESULTS / name / "compared" / "comparison.json").read_text())
    assert run.tables(written) == run.tables(comparison)  # the numbers to the digits that the tables show


def test_the_page_shows_how_far_rlvr_was_pushed_as_it_was_measured():
    page = (RESULTS / "README.md").read_text().splitlines()
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
        want = evaluate.total_logprobs(tiny[0], [([5, 9, 2], [[7, 8, 4][:cut]])])[0]
        assert got[0, 0, cut] == pytest.approx(want, abs=1e-5)


def test_every_loss_has_learnt_the_sanity_problems():
    rewards = json.loads((RESULTS / "sanity" / "rewards.json").read_text())
    assert rewards.keys() == {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce", "rloo"}
    for name, curve in rewards.items():
        assert curve[0] < 0.4 and max(a + b for a, b in zip(curve, curve[1:], strict=False)) / 2 >= 0.95, name


def test_the_start_model_is_asked_as_the_arms_are_trained(run, monkeypatch, tmp_path):
    called = []
    monkeypatch.setitem(run.evaluated.__globals__, "call", lambda *flags: called.append(list(map(str, flags))))
    args = SimpleNamespace(task="arithmetic", rest=["--prompt", "cot", "--max-new-tokens", "64"], personas="test",
                           problems=2, questions=2, model="smollm2-135m")
    run.evaluated(args.model, "start", tmp_path, args)
    assert called[0][-4:] == ["--prompt", "cot", "--max-new-tokens", "64"]


def test_every_arm_is_one_that_train_py_takes(run, tmp_path):
    for arm in run.ARMS | run.ABLATIONS:
        settings.settings(run.flags(arm, tmp_path))


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_a_number_of_personas_is_a_file_of_as_many_training_personas_from_all_strata(run, tmp_path, count):
    pool = personas.load(run.flags(f"personas={count}", tmp_path)[-1])
    assert len(pool) == count and set(pool) <= set(personas.load("train"))
    assert len({p.stratum for p in pool}) == min(count, 3)
