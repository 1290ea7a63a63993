"""Short runs of the embedded model with a fixed seed, against what they gave before the code was rearranged.

`python -m tests.test_trace` records tests/trace.json anew: only after a change that is meant to change the numbers. So
far two were: `grad_norm` of a batch with several optimizer steps is the largest of them, not the last; `sft` is
cross-entropy at temperature 1.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest

import train
from common.files import rows

TRACE = Path(__file__).with_name("trace.json")
ALL = ["--steps", "2", "--prompts", "3", "--group-size", "4", "--max-new-tokens", "24", "--eval-problems", "0",
       "--learning-rate", "1e-4", "--warmup", "0", "--seed", "3", "--truncated", "keep", "--dtype", "float32",
       "--device", "cpu"]
RUNS = {
    "permix": [],
    "a persona a completion, KL and entropy in the loss": [
        "--mix", "rollout", "--kl-coef", "0.1", "--entropy-coef", "0.01", "--truncated", "mask"],
    "KL in the reward, overlong penalty": [
        "--kl-coef", "0.1", "--kl", "k1", "--kl-in", "reward", "--overlong-buffer", "8"],
    "two epochs on a batch": ["--loss", "gspo", "--inner-epochs", "2", "--correction", "truncate"],
    "dynamic sampling": ["--loss", "dapo", "--dynamic-sampling", "1"],
    "anchor": ["--anchor-coef", "0.1", "--anchor-answers", "6", "--anchor-tokens", "8", "--anchor-count", "2"],
    "overlap": ["--overlap"],
    "sft": ["--method", "sft", "--group-size", "1"],
    "distill": ["--method", "distill"],
}
SHORT = ("permix", "a persona a completion, KL and entropy in the loss", "two epochs on a batch", "sft")
LEFT_OUT = ("seconds", "tokens_per_second")             # differ from run to run


def trace(flags: list[str], out: Path) -> dict:
    assert train.main([*ALL, *flags, "--out", str(out)]) == 0
    metrics = [{k: v for k, v in row.items() if k not in LEFT_OUT} for row in rows(out / "metrics.jsonl")]
    return {"metrics": metrics, "samples": list(rows(out / "samples.jsonl"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_a_fixed_seed_gives_the_recorded_tokens_rewards_and_gradients(name, embedded_path, tmp_path):
    """Texts, rewards and counts exactly; what is summed, within the rounding of another processor."""
    if name not in SHORT and os.environ.get("TRACE") != "all":
        pytest.skip("half a minute each; TRACE=all runs every recorded trace")
    fresh, kept = trace(RUNS[name], tmp_path / "run"), json.loads(TRACE.read_text())[name]
    assert fresh["samples"] == kept["samples"]
    for new, old in zip(fresh["metrics"], kept["metrics"], strict=True):
        for key in old:
            assert new[key] == (pytest.approx(old[key], rel=2e-3, abs=1e-5) if old[key] is not None else None), key


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recorded = {name: trace(flags, Path(folder, str(i))) for i, (name, flags) in enumerate(RUNS.items())}
    TRACE.write_text(json.dumps(recorded, indent=1) + "\n")
