"""Warnings in words, and trackers."""

import json
import sys
import types

import pytest

from training import monitor, settings

HEALTHY = {"reward": 0.5, "zero_variance_fraction": 0.3, "entropy": 1.0, "truncated_fraction": 0.1,
           "sampler_trainer_gap": 0.01}


def history(steps: int, **last) -> list[dict]:
    """A healthy run whose reward rises, and whose last ten steps are as told."""
    rows = [{"step": i} | HEALTHY | {"reward": 0.3 + i / 100} for i in range(steps)]
    return rows[:-10] + [row | last for row in rows[-10:]]


def test_a_healthy_run_and_a_young_one_have_no_symptoms():
    assert monitor.symptoms(history(40)) == {} and monitor.symptoms(history(9, reward=0.0)) == {}
    assert "2 completions were given up" in monitor.symptoms([HEALTHY | {"errors": 2}])["errors"]       # at any age


@pytest.mark.parametrize("name, sick, word", [
    ("no reward", {"reward": 0.0}, "--max-new-tokens"),
    ("no variance", {"zero_variance_fraction": 0.97}, "--group-size"),
    ("flat reward", {"reward": 0.3}, "--learning-rate"), ("entropy collapse", {"entropy": 0.05}, "--entropy-coef"),
    ("truncation", {"truncated_fraction": 0.6}, "--max-new-tokens"),
    ("sampler gap", {"sampler_trainer_gap": 0.2}, "--correction"), ("errors", {"errors": 1}, "--dtype float32")])
def test_each_sickness_has_its_words_and_no_other(name, sick, word):
    found = monitor.symptoms(history(40, **sick))
    assert list(found) == [name] and word in found[name]


def test_metrics_without_a_value_are_passed_over():
    assert monitor.symptoms(history(40, entropy=None, sampler_trainer_gap=None)) == {}


def watching(out, rows: list[dict]) -> monitor.Monitor:
    """The monitor of a run that goes on after these steps."""
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return monitor.Monitor(out, len(rows), settings.settings([]), None)


def test_a_symptom_is_said_once_a_run_also_after_a_resume(tmp_path, capsys):
    rows = history(40, entropy=0.05)
    watch = watching(tmp_path, rows[:31])
    for row in rows[31:]:
        watch.history.append(row)
        watch.warn(row["step"], finite=True)
    assert capsys.readouterr().err.count("entropy fell") == 1
    again = watching(tmp_path, rows)
    again.history.append(rows[-1])
    again.warn(40, finite=True)
    assert capsys.readouterr().err == ""


def test_a_tracker_gets_flat_numbers_by_step_and_a_resumed_run_goes_on_as_the_same_one(tmp_path, monkeypatch):
    calls = []

    def init(**given):
        calls.append(given)
        return types.SimpleNamespace(id=given["id"] or "drawn")

    stand_in = types.SimpleNamespace(init=init, log=lambda m, step: calls.append((m, step)))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for first in (0, 3):
        log = monitor.tracker("wandb", tmp_path, {"seed": 0}, first)
    log({"step": 3, "reward": 0.5, "kl": None, "seconds": {"train": 2.0}})
    told = {"project": "permix-rlvr", "name": tmp_path.name, "config": {"seed": 0}, "resume": "allow"}
    assert calls == [told | {"id": None}, told | {"id": "drawn"}, ({"step": 3, "reward": 0.5, "seconds/train": 2.0}, 3)]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(tmp_path, monkeypatch):
    made = []
    stand_in = types.SimpleNamespace(SummaryWriter=lambda *where, **more: made.append((where, more)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monitor.tracker("tensorboard", tmp_path, {}, 3)
    assert made == [((str(tmp_path / "tensorboard"),), {"purge_step": 3})]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        monitor.tracker("wandb", tmp_path, {}, 0)
