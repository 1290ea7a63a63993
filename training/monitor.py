"""What a run says of itself: metrics, samples to read, where its time goes, warnings, trackers.

metrics.jsonl comes first: a line a step, written before anything else looks at it. Its keys are
defined in docs/formats.md. Left out: dashboards.
"""

import importlib
import json
import math
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm

import grpo
from common.files import rows, write_atomically
from common.ranks import ranks, summed
from evaluation import plots
from sampling.cache import prefilled
from training.policy import Policy

MAX_BROKEN = 5      # steps in a row whose gradient may be not finite


class Monitor:
    """Watches the steps of one run. Every rank has one; rank 0 alone writes and speaks.

    first: the step that the run begins or goes on with. A killed run may have left lines of that
    step and later. They are dropped, since they are written again.
    """

    def __init__(self, out: Path, first: int, args, policy: Policy):
        self.out, self.first, self.args, self.policy = out, first, args, policy
        self.speaks = ranks()[0] == 0
        self.seconds: dict[str, float] = {}             # by phase, of the step that runs
        self.history = rewound(out, first) if self.speaks else []       # metrics of all steps
        self.said = set(symptoms(self.history))         # warnings, once a run
        self.broken = 0                                 # gradients in a row that were not finite
        self.sound = False                              # has any step been finite?
        self.track = None
        if args.tracker and self.speaks:
            self.track = tracker(args.tracker, out, vars(args), first)
        hidden = not self.speaks or not (args.progress or sys.stderr.isatty())
        self.bar = tqdm(total=args.steps, initial=first, unit="step", disable=hidden)

    @contextmanager
    def phase(self, name: str, step: int | None = None):
        """Measures a phase. What a GPU still works at belongs to the phase.

        step: of a whole step, its number. With --profile the second one's operators are printed.
        """
        device, start = self.policy.model.device, time.perf_counter()
        if step == self.first + 1 and self.args.profile and self.speaks:
            with operators(device):
                yield
        else:
            yield
        module = torch.get_device_module(device)        # not the other stream of --overlap
        (module.current_stream() if device.type == "cuda" else module).synchronize()
        self.seconds[name] = round(time.perf_counter() - start, 4)

    def log(self, step: int, batch, metrics: dict, lag: int) -> None:
        """Records a finished step. Raises ValueError after MAX_BROKEN steps without a gradient, or
        after the last one if no step had any.

        batch: the step's train.Rollout. lag: how many steps old the weights are that sampled it.
        """
        busy = self.seconds["step" if lag else "sample"]
        metrics = {"step": step, **metrics, "lag": lag, "accuracy_by_stratum": strata(batch),
                   "tokens_per_second": metrics["sampled_tokens"] / busy,
                   "seconds": self.seconds}
        self.seconds = {}
        all_given_up = metrics["errors"] == len(batch.completions) * ranks()[1]
        finite = math.isfinite(metrics["grad_norm"]) and not metrics["skipped_steps"]
        finite = finite and not all_given_up            # their logits were not finite
        overflow = self.policy.loss_scale > 1           # of fp16: nothing is broken
        self.broken = 0 if finite or overflow else self.broken + 1
        self.sound = self.sound or finite or (overflow and self.policy.optimizer.steps > 0)
        if self.speaks:
            record(self.out, step, batch, metrics)
            self.history.append(metrics)
            self.warn(step, finite)
            if self.track:
                self.track(metrics)
            self.bar.set_postfix(reward=f"{metrics['reward']:.2f}",
                                 tok_s=f"{metrics['tokens_per_second']:.0f}")
            self.bar.update()
            if self.bar.disable:
                print(f"step {step + 1}/{self.args.steps}: reward {metrics['reward']:.3f}, "
                      f"accuracy {metrics['accuracy']:.3f}, {metrics['seconds']['step']:.1f} s",
                      file=sys.stderr)
        if self.broken == MAX_BROKEN or step + 1 == self.args.steps and not self.sound:
            count, what = self.broken or step + 1 - self.first, "gradients in a row were not finite"
            if all_given_up:
                what = "steps in a row had no finite logits to sample from"
            raise ValueError(f"{count} {what}: lower "
                             "--learning-rate, and go on from the last checkpoint with "
                             f"--resume {self.out}")

    def warn(self, step: int, finite: bool) -> None:
        """Says each symptom once a run, on stderr."""
        if not finite:
            print(f"step {step}: the gradient or all logits are not finite; the step was skipped",
                  file=sys.stderr)
        for name, words in symptoms(self.history).items():
            if name not in self.said:
                print(f"step {step}: {words}", file=sys.stderr)
                self.said.add(name)

    def finish(self, samples: bool) -> None:
        """Draws the curves; with --profile says where the time went. samples: see `profile`."""
        self.bar.close()
        if self.args.profile:                           # without the first and the recorded step
            print(profile(self.history[self.first + 2:], self.policy.model, samples),
                  file=sys.stderr)
        plots.curves({self.args.method: self.history}).savefig(self.out / "curves.png", dpi=120)


def batch_metrics(batch, sums: dict[str, float], imitates: bool) -> dict:
    """What a step's batch was like, over all ranks.

    Rewards and lengths are of everything sampled. Entropy, KL, gap and clips are of the tokens that
    went through the forward, and None where there were none. sums: see train.SUMS.
    """
    verdicts, completions = batch.verdicts, batch.completions
    own = {"rewards": batch.rewards.sum(), "completions": batch.rewards.numel(),
           "truncated": sum(c.truncated for c in completions),
           "errors": sum(c.error is not None for c in completions),
           "correct": verdicts.count("correct"),
           "unverifiable": verdicts.count("unverifiable"), "tokens_sampled": batch.lengths.sum(),
           "groups": len(batch.rewards), "informative": grpo.informative(batch.rewards).sum(),
           "prefilled": prefilled([prompt for prompt, _ in batch.groups])} | sums
    own = dict(zip(own, summed(own.values()), strict=True))
    count, tokens = own["completions"], own["trained_tokens"]
    means = {name: own[name] / tokens if tokens else None for name in ("entropy", "kl", "gap")}
    flat = 1 - own["informative"] / own["groups"]
    return {
        "reward": own["rewards"] / count, "accuracy": own["correct"] / count,
        "entropy": means["entropy"], "kl": means["kl"],
        **grpo.summarise(own),
        "completion_length": own["tokens_sampled"] / count,
        "truncated_fraction": own["truncated"] / count,
        "zero_variance_fraction": None if imitates else flat,
        "sampler_trainer_gap": None if imitates else means["gap"],
        "unverifiable_fraction": own["unverifiable"] / count, "errors": int(own["errors"]),
        "packed_tokens": int(own["packed_tokens"]), "trained_tokens": int(tokens),
        "sampled_tokens": int(own["tokens_sampled"]), "prefilled_tokens": int(own["prefilled"])}


# --------------------------------------------------------------------------------------------------
# Files


def record(out: Path, step: int, batch, metrics: dict) -> None:
    """One line of metrics, and two completions of each of the step's first two problems."""
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    G = batch.rewards.shape[1]
    with open(out / "samples.jsonl", "a") as file:
        for i in range(0, min(len(batch.texts), 2 * G), G // 2 or 1):
            problem, persona = batch.problems[i // G], batch.personas[i // G][i % G]
            row = {"step": step, "persona": persona.name if persona else "none",
                   "question": problem.question, "gold": problem.answer,
                   "completion": batch.texts[i], "verdict": batch.verdicts[i],
                   "reward": batch.rewards.flatten()[i].item(),
                   "truncated": batch.completions[i].truncated}
            file.write(json.dumps(row) + "\n")


def strata(batch) -> dict[str, float]:
    """Share of correct completions by persona stratum, of this rank's."""
    values, speakers = defaultdict(list), chain(*batch.personas)
    for persona, verdict in zip(speakers, batch.verdicts, strict=True):
        values[persona.stratum if persona else "none"].append(verdict == "correct")
    return {name: sum(v) / len(v) for name, v in sorted(values.items())}


def rewound(out: Path, step: int) -> list[dict]:
    """Drops the lines of `step` and later, and returns the metrics before it."""
    kept = []
    for name in ("samples.jsonl", "metrics.jsonl"):
        kept = [row for row in rows(out / name) if row["step"] < step]
        write_atomically(out / name, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


# --------------------------------------------------------------------------------------------------
# Where the time goes (--profile)


@contextmanager
def operators(device: torch.device):
    """Prints the ten operators that take the most time within it, on `device`."""
    with torch.profiler.profile() as recorded:          # CPU, and CUDA where there is one
        yield
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    on_cpu = torch.autograd.DeviceType.CPU              # kernels count with their operators
    events = [e for e in recorded.key_averages() if e.device_type == on_cpu]
    events.sort(key=lambda e: getattr(e, by), reverse=True)
    total = sum(getattr(e, by) for e in events) or 1
    print("operators of one step:", file=sys.stderr)
    for e in events[:10]:
        time = getattr(e, by)
        print(f"  {e.key:40} {time / 1e6:8.3f} s {time / total:6.1%} {e.count:8} calls",
              file=sys.stderr)


def profile(history: list[dict], model, samples: bool) -> str:
    """The median step by phase, beside its floor: what its matmuls alone would take.

    The floor counts the FLOPs of the linear layers (2 a weight and token forward, 4 backward) at
    the speed of one large matmul, measured here. samples: whether the model itself samples.
    """
    if not history:
        return "--profile needs a third step: the first warms up, the second is recorded"
    body = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    head, speed = model.head_weight.numel(), matmul_speed(model.dtype, model.device)
    floors = []
    for m in history:
        train = 6 * body * m["packed_tokens"] + 6 * head * m["trained_tokens"]
        fed = m["sampled_tokens"] * (1 - 1 / m["completion_length"])    # the last token is not fed
        sample = 2 * body * (m["prefilled_tokens"] + fed) + 2 * head * m["sampled_tokens"]
        sample *= samples
        floors.append({"train": train, "sample": sample, "step": sample + train})
    lines = [f"a step's seconds, the floor of its matmuls at {speed / 1e9:.0f} GFLOP/s, "
             "and their ratio:"]
    for phase in ("sample", "train", "step"):
        seconds = median(m["seconds"][phase] for m in history)
        floor = median(f[phase] for f in floors) / speed / ranks()[1]
        ratio = f" {floor:8.2f} {seconds / floor:6.1f}x" if floor else ""
        lines.append(f"  {phase:8} {seconds:8.2f}{ratio}")
    return "\n".join(lines)


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of one large matmul, the best of five."""
    size = 2048 if device.type == "cpu" else 8192       # a small one is all launch on a GPU
    a, times = torch.randn(size, size, dtype=dtype, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                            # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(times)


# --------------------------------------------------------------------------------------------------
# Warnings

WINDOW = 10         # steps


def symptoms(history: list[dict]) -> dict[str, str]:
    """What looks sick in the metrics of the steps so far: name -> what is seen and what to try.

    The thresholds are ours.
    """
    found = {}
    if errors := sum(row.get("errors", 0) for row in history):
        found["errors"] = (
            f"{errors} completions were given up, since their logits were not finite; they earn "
            "nothing: try a lower --learning-rate, or --dtype float32")
    if len(history) < WINDOW:
        return found

    def mean(key: str, rows: list[dict]) -> float:
        values = [row[key] for row in rows if row.get(key) is not None]
        return fmean(values) if values else 0.0

    keys = ("reward", "entropy", "truncated_fraction", "zero_variance_fraction",
            "sampler_trainer_gap", "lag")
    first = {key: mean(key, history[:WINDOW]) for key in keys}
    last = {key: mean(key, history[-WINDOW:]) for key in keys}
    samples = history[-1].get("zero_variance_fraction") is not None     # else it imitates
    cut_off = f"{last['truncated_fraction']:.0%} of the completions are cut off"
    if last["reward"] <= 0:
        found["no reward"] = (
            f"no completion was correct, {cut_off}: try an easier task, a larger "
            "--max-new-tokens, or a --prompt that asks for shorter answers")
    if last["reward"] > 0 and last["zero_variance_fraction"] > 0.9:
        level = "harder" if last["reward"] > 0.5 else "easier"
        found["no variance"] = (
            "hardly a group has unequal rewards, so hardly any has a gradient: try "
            f"--dynamic-sampling 3, a larger --group-size, or problems that are {level}")
    rises = last["reward"] >= min(0.9, first["reward"] + 0.01)
    if len(history) >= 3 * WINDOW and samples and last["reward"] > 0 and not rises:
        found["flat reward"] = (
            "the reward does not rise: try more --prompts, or another --learning-rate")
    if 0 < last["entropy"] < 0.1 * first["entropy"] and last["reward"] < 0.9:
        found["entropy collapse"] = (
            "entropy fell below a tenth of the start's: try a lower --learning-rate, "
            "--clip-high 0.28 with --minibatches 2, or --entropy-coef 0.001")
    if last["truncated_fraction"] > max(0.3, first["truncated_fraction"] + 0.1):
        found["truncation"] = (
            f"{cut_off} and ever more: try a larger --max-new-tokens, or --overlong-buffer")
    drifts = last["sampler_trainer_gap"] > max(0.05, 3 * first["sampler_trainer_gap"])
    if drifts and not last["lag"]:
        found["sampler gap"] = (
            "the sampler's and the trainer's log-probs drift apart: try --correction truncate, "
            "or --dtype float32")
    return found


# --------------------------------------------------------------------------------------------------
# Trackers: what they are called as packages

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def tracker_package(name: str):
    """The module behind `--tracker`; ValueError where it is missing."""
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ValueError(f"--tracker {name} needs its package: pip install {name}") from error


def tracker(name: str, out: Path, config: dict, first: int):
    """log(metrics) for `--tracker`. A resumed run goes on as the same one, from step `first`."""
    module = tracker_package(name)
    if name == "tensorboard":
        writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=first)

        def log(metrics: dict) -> None:
            for key, value in flat(metrics).items():
                writer.add_scalar(key, value, metrics["step"])

        return log
    kept = out / "wandb-id"
    run = module.init(project="permix-rlvr", name=out.name, config=config, resume="allow",
                      id=kept.read_text() if kept.exists() else None)
    write_atomically(kept, run.id)
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
