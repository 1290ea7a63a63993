"""What a run says of itself: metrics.jsonl, samples.jsonl, where its time goes, warnings in words, and trackers.

metrics.jsonl comes first: a line a step, written before anything else looks at it. Left out: dashboards.
"""

import importlib
import json
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median

import torch

from common.files import rows, write_atomically

# What TensorBoard, Weights & Biases and Trackio are called as packages; the last two share their interface.
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def record(out: Path, step: int, batch, metrics: dict) -> None:
    """One line of metrics, and completions of the step's first two problems to read."""
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    with open(out / "samples.jsonl", "a") as file:
        for i in range(min(len(batch.texts), 2 * len(batch.personas[0])))[::len(batch.personas[0]) // 2 or 1]:
            b, g = divmod(i, len(batch.personas[0]))
            persona = batch.personas[b][g]
            file.write(json.dumps({
                "step": step, "persona": persona.name if persona else "none", "question": batch.problems[b].question,
                "gold": batch.problems[b].answer, "completion": batch.texts[i], "verdict": batch.verdicts[i],
                "reward": batch.rewards[b, g].item(), "truncated": batch.completions[i].truncated}) + "\n")


def strata(batch) -> dict[str, float]:
    """Mean reward by persona stratum, of rank 0's completions."""
    values = defaultdict(list)
    for row, reward in zip(batch.personas, batch.rewards.tolist(), strict=True):
        for persona, value in zip(row, reward, strict=True):
            values[persona.stratum if persona else "none"].append(value)
    return {name: sum(v) / len(v) for name, v in sorted(values.items())}


def resumed(out: Path, step: int) -> list[dict]:
    """Drops the lines of `step` and later, which a resumed run writes again; returns the metrics before it."""
    kept = []
    for name in ("samples.jsonl", "metrics.jsonl"):
        kept = [row for row in rows(out / name) if row["step"] < step]
        write_atomically(out / name, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


class Clock:
    """Seconds by phase of one step: with clock("sample"): ... What a GPU still works at belongs to the phase."""

    def __init__(self, device: torch.device):
        self.seconds, self.synchronize = {}, torch.get_device_module(device).synchronize

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.synchronize()
        self.seconds[phase] = round(time.perf_counter() - start, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Where the time goes (--profile)


@contextmanager
def operators(wanted: bool, device: torch.device):
    """Prints the ten operators that take the most time within it, on `device`."""
    if not wanted:
        yield
        return
    with torch.profiler.profile() as recorded:          # CPU, and CUDA where there is one
        yield
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    taken = sorted(((getattr(e, by), e.count, e.key) for e in recorded.key_averages()
                    if e.device_type == torch.autograd.DeviceType.CPU), reverse=True)   # kernels count with operators
    total = sum(time for time, *_ in taken) or 1
    print("operators of one step:", file=sys.stderr)
    for microseconds, count, name in taken[:10]:
        print(f"  {name:40} {microseconds / 1e6:8.3f} s {microseconds / total:6.1%} {count:8} calls", file=sys.stderr)


def profile(history: list[dict], model, ranks: int, samples: bool) -> str:
    """The median step by phase beside its floor: the FLOPs of the linear layers (2 a weight and token forward, 4
    backward) at the speed of one large matmul, measured here. samples: is it the model itself that samples?"""
    if not history:
        return "--profile needs a third step: the first warms up, the second is recorded"
    body = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    head, speed = model.head_weight.numel(), matmul_speed(model.dtype, model.device)
    floors = [{"train": 6 * body * m["packed_tokens"] + 6 * head * m["trained_tokens"], "sample": samples * (
        2 * body * (m["prefilled_tokens"] + m["sampled_tokens"] * (1 - 1 / m["completion_length"]))  # the last: not fed
        + 2 * head * m["sampled_tokens"])} for m in history]
    lines = [f"a step's seconds, the floor of its matmuls at {speed / 1e9:.0f} GFLOP/s, and their ratio:"]
    for phase in ("sample", "train", "step"):
        seconds = median(m["seconds"][phase] for m in history)
        floor = median(f["sample"] + f["train"] if phase == "step" else f[phase] for f in floors) / speed / ranks
        lines.append(f"  {phase:8} {seconds:8.2f} {floor:8.2f} {seconds / floor:6.1f}x" if floor else
                     f"  {phase:8} {seconds:8.2f}")
    return "\n".join(lines)


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of one large matmul, the best of five. Larger on a GPU, where a small one is all launch."""
    size = 2048 if device.type == "cpu" else 8192
    a, times = torch.randn(size, size, dtype=dtype, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                            # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(times)


# ----------------------------------------------------------------------------------------------------------------------
# Warnings

WINDOW = 10                                             # steps


def symptoms(history: list[dict]) -> dict[str, str]:
    """What looks sick in the metrics of the steps so far: name -> what is seen and what to try. Thresholds are ours."""
    if len(history) < WINDOW:
        return {}

    def mean(key: str, rows: list[dict]) -> float:
        values = [row[key] for row in rows if row.get(key) is not None]
        return fmean(values) if values else 0.0

    def first(key: str) -> float:
        return mean(key, history[:WINDOW])

    def last(key: str) -> float:
        return mean(key, history[-WINDOW:])

    samples = history[-1].get("zero_variance_fraction") is not None     # imitation: the author learns nothing
    cut_off = f"{last('truncated_fraction'):.0%} of the completions are cut off"
    seen = {
        "no reward": (last("reward") <= 0, f"no completion was correct, {cut_off}: try an easier task, a larger "
                      "--max-new-tokens, or a --prompt that asks for shorter answers"),
        "no variance": (last("reward") > 0 and last("zero_variance_fraction") > 0.9, "hardly a group has unequal "
                        "rewards, so hardly any has a gradient: try --dynamic-sampling 3, a larger --group-size, or "
                        f"problems that are {'harder' if last('reward') > 0.5 else 'easier'}"),
        "flat reward": (len(history) >= 3 * WINDOW and samples
                        and 0 < last("reward") < min(0.9, first("reward") + 0.01),
                        "the reward does not rise: try more --prompts, or another --learning-rate"),
        "entropy collapse": (0 < last("entropy") < 0.1 * first("entropy") and last("reward") < 0.9, "entropy fell "
                             "below a tenth of the start's: try a lower --learning-rate, --clip-high 0.28 or "
                             "--entropy-coef 0.001"),
        "truncation": (last("truncated_fraction") > max(0.3, first("truncated_fraction") + 0.1), f"{cut_off} and ever "
                       "more: try a larger --max-new-tokens, or --overlong-buffer"),
        "sampler gap": (last("sampler_trainer_gap") > max(0.05, 3 * first("sampler_trainer_gap"))
                        and not last("lag"), "the sampler's and "
                        "the trainer's log-probs drift apart: try --correction truncate, or --dtype float32"),
    }
    return {name: words for name, (sick, words) in seen.items() if sick}


class Watch:
    """Says each symptom once a run, on stderr."""

    def __init__(self, history: list[dict]):
        self.history, self.said = list(history), set(symptoms(history))

    def __call__(self, metrics: dict) -> None:
        self.history.append(metrics)
        for name, words in symptoms(self.history).items():
            if name not in self.said:
                print(f"step {metrics['step']}: {words}", file=sys.stderr)
                self.said.add(name)


# ----------------------------------------------------------------------------------------------------------------------
# Trackers


def tracker_package(name: str):
    """The module behind `--tracker`; ValueError where it is missing."""
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ValueError(f"--tracker {name} needs its package: pip install {name}") from error


def tracker(name: str | None, out: Path, config: dict):
    """log(metrics) for `--tracker`; None: a function that does nothing."""
    if name is None:
        return lambda metrics: None
    module = tracker_package(name)
    if name == "tensorboard":
        writer = module.SummaryWriter(str(out / "tensorboard"))
        return lambda metrics: [writer.add_scalar(k, v, metrics["step"]) for k, v in flat(metrics).items()]
    module.init(project="permix-rlvr", name=out.name, config=config)
    return lambda metrics: module.log(flat(metrics), step=metrics["step"])


def flat(metrics: dict, prefix: str = "") -> dict[str, float]:
    """{"seconds": {"train": 1.0}} -> {"seconds/train": 1.0}; what is no number is left out."""
    out = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            out[prefix + key] = value
    return out
