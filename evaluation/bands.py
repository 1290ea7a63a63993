"""Does my run look right? A run's metrics.jsonl beside bands from the runs that results/ keeps.

    python evaluate.py --check-run runs/permix             # also while it is going on

A band at a step is the lowest to the highest value of the kept runs within NEAR steps of it. A
metric is outside once LASTING steps in a row lie on one side of its band: a single step of 96
completions is noise. Both numbers are ours; with them each kept run lies inside the others' bands.

Kept runs of several arms share a band (personas and the anchor move the curves little), but not of
another model, task or learning rate (`SAME`). Beside such runs only the gap between sampler and
trainer is compared: it should be small whatever is trained.
Beyond the kept runs' last step the gap is held to all of its known values, the rest to nothing.
Steps count from 0, as in metrics.jsonl.
Left out: evaluations, which `--compare` puts side by side, and a verdict that needs no reader.
"""

import gzip
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import files
from evaluation import report

RESULTS = Path(__file__).resolve().parents[1] / "results"
NEAR = 3                                                # steps on either side
LASTING = 4                                             # steps in a row
FEW = 3                                                 # kept runs
SAME = ("model", "task", "prompt", "prompts", "group_size", "max_new_tokens", "temperature",
        "learning_rate", "loss", "advantage", "normaliser", "kl_coef", "entropy_coef",
        "inner_epochs", "minibatches", "dynamic_sampling", "truncated", "lora_rank", "reward",
        "chat_template", "columns", "correction", "clip_low", "clip_high", "max_grad_norm",
        "overlong_buffer", "warmup")
LATER = {"minibatches": 1, "lora_rank": 0, "chat_template": None, "columns": None}
GAP = "sampler_trainer_gap"
KEYS = "reward", "entropy", "completion_length", "kl", GAP
WORDS = {  # (metric, side): what it usually means
    ("reward", "below"): "it learns later than they did, or not at all: read samples.jsonl, and "
    "look whether grad_norm is 0 (flat groups, P8) or the steps are too small (P29, P30)",
    ("reward", "above"): "it learns faster, or is paid for what is wrong: read samples.jsonl for "
    "copies of the exercise and for tricks of form (P23, P25, P33)",
    ("entropy", "below"): "the policy gets nearly deterministic, so groups get flat and nothing "
    "more is learned: try a lower --learning-rate, --clip-high 0.28 with --minibatches 2, or "
    "--entropy-coef 0.001",
    ("entropy", "above"): "the policy does not settle: a term of the loss with the wrong sign "
    "(P12), or log-probs of another temperature, label or position (P1 to P3)",
    ("completion_length", "below"): "short answers: read samples.jsonl, are they still answers?",
    ("completion_length", "above"): "long answers: does a token's weight depend on the length of "
    "its completion (P9), or is the end of an answer lost (P4, P5)?",
    ("kl", "below"): "it stays nearer to the start model: is the KL's direction right (P13)?",
    ("kl", "above"): "it moves away from the start model faster than they did: try a lower "
    "--learning-rate, or a higher --kl-coef",
    (GAP, "above"): "sampler and trainer are two policies: a stale sampler (P15), an adapter that "
    "only one of them runs (P34), or other labels, temperatures or positions (P1 to P3, P14)",
}
NOT_FINITE = "not finite since step {}", "null: no token was trained, groups are flat (P8); NaN: " \
    "logits, rewards or gradients overflow: lower --learning-rate, or try --dtype float32"
AT_THE_CAP = "completions run into --max-new-tokens {}: they are cut off and by default worth " \
    "nothing (P7); does the policy learn to stop (P4)? Else raise the limit"


@dataclass(frozen=True)
class Run:
    name: str
    settings: dict                                      # of its config.json
    rows: list[dict]                                    # of its metrics.jsonl


def read(folder: Path) -> Run:
    """A run folder, perhaps one that still grows. ValueError where it is none."""
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not config.is_file():
        raise ValueError(f"{folder} is no run: give a folder of train.py, with config.json and "
                         "metrics.jsonl")
    told = files.parsed(str(config), config.read_bytes(), "settings").get("settings")
    rows = [row for row in files.rows(metrics)
            if isinstance(row, dict) and isinstance(row.get("step"), int)]
    if not isinstance(told, dict) or "method" not in told:
        raise ValueError(f"{config} is not a run's: it has no settings")
    if len(rows) < LASTING:                             # none: it evaluates before it trains
        raise ValueError(f"{folder} has {len(rows) or 'no'} steps yet, and a check needs "
                         f"{LASTING}: wait, or go on with train.py --resume {folder} --steps N")
    return Run(str(folder), told, rows)


def kept(results: Path = RESULTS) -> list[Run]:
    """The runs whose metrics and settings lie in results/, gzipped."""
    found = []
    for path in sorted(results.glob("*/*/metrics.jsonl.gz")):
        config = json.loads(gzip.decompress(path.with_name("config.json.gz").read_bytes()))
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        found.append(Run(path.parent.name, config["settings"], rows))
    return found


def kind(settings: dict) -> str:
    """Arms of one kind share a band."""
    return settings["method"] if settings["method"] in ("sft", "distill") else "rlvr, permix"


def differences(run: Run, other: Run) -> dict[str, tuple]:
    """{setting: (the run's, the other's)} of those that keep their curves from being compared.

    A setting that one of the two did not have yet counts as off where LATER says how that is
    written, and is not looked at otherwise.
    """
    mine, theirs = LATER | run.settings, LATER | other.settings
    pairs = {key: (mine[key], theirs[key]) for key in SAME if key in mine and key in theirs}
    pairs["method"] = kind(run.settings), kind(other.settings)
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def value(row: dict, key: str) -> float | None:
    """A step's metric, None without a finite one. With --overlap a gap is no fault."""
    found = None if key == GAP and row.get("lag") else row.get(key)
    known = isinstance(found, (int, float)) and abs(found) <= sys.float_info.max
    return found if known else None


def not_finite(run: Run, key: str) -> int | None:
    """The first step of the last stretch without a finite value, None where that is no fault: one
    short stretch of null (no token was trained), --overlap, or a metric that the run never has."""
    last = []
    for row in reversed(run.rows):
        if value(row, key) is not None or key == GAP and row.get("lag"):
            break
        last.append(row)
    null = all(row.get(key) is None for row in last)
    fault = LASTING <= len(last) < len(run.rows) if null else last
    return last[-1]["step"] if fault else None


def band(runs: list[Run], key: str, step: int) -> tuple[float, float] | None:
    """(lowest, highest) of a metric near a step; None where no run went so far or had it.

    Of a gap beyond the last kept step: of all steps.
    """
    near = NEAR if key != GAP or step <= end(runs) else step
    known = [x for run in runs for row in run.rows if abs(row["step"] - step) <= near
             and (x := value(row, key)) is not None]
    return (min(known), max(known)) if known else None


def end(runs: list[Run]) -> int:
    """The last step that a band reaches."""
    return max(row["step"] for run in runs for row in run.rows) + NEAR


def lasting(run: Run, runs: list[Run], key: str) -> tuple[str, int, int] | None:
    """("below" or "above", first step, last step) of the last stretch outside the band that lasts;
    None where there is none. A gap below the band is never bad."""
    found, side, since, count = None, "", 0, 0
    for row in run.rows:
        x, limits = value(row, key), band(runs, key, row["step"])
        if x is None or limits is None:
            continue
        now = "above" if x > limits[1] else "below" if x < limits[0] and key != GAP else ""
        since, count = (since, count + 1) if now == side else (row["step"], 1)
        side = now
        if side and count >= LASTING:
            found = side, since, row["step"]
    return found


def meaning(run: Run, key: str, side: str) -> str:
    limit, length = run.settings.get("max_new_tokens"), value(run.rows[-1], "completion_length")
    if (key, side) == ("completion_length", "above") and limit and (length or 0) > 0.9 * limit:
        return AT_THE_CAP.format(limit)
    return WORDS[key, side]


def text(run: Run, others: list[Run]) -> str:
    """The table and the words: of each metric, inside or outside, since which step, and what that
    usually means. others: the kept runs. ValueError where there are none."""
    if not others:
        raise ValueError("results/ keeps no metrics.jsonl.gz to compare with")
    apart = [differences(run, other) for other in others]
    like = [other for other, differs in zip(others, apart, strict=True) if not differs]
    nearest = min(apart, key=len)
    told = ", ".join(f"{key} {mine} (theirs {theirs})" for key, (mine, theirs) in nearest.items())
    table, said = [["metric", "at step", "here", "band", ""]], []
    for key in KEYS:
        same, since = others if key == GAP else like, not_finite(run, key)  # a gap: see the head
        if key == "kl" and not run.settings.get("kl_coef"):
            continue
        seen = [row for row in run.rows if value(row, key) is not None
                and band(same, key, row["step"])]
        outside = lasting(run, same, key)
        if outside:
            words = f"{outside[0]} since step {outside[1]}"
            if outside[2] != seen[-1]["step"]:
                words = f"inside; {outside[0]} from step {outside[1]} to {outside[2]}"
            said.append(f"{key} {words}: {meaning(run, key, outside[0])}.")
        if since is not None:
            words = NOT_FINITE[0].format(since)
            said.append(f"{key} {words}: {NOT_FINITE[1]}.")
            table.append([key, str(run.rows[-1]["step"]), "-", "-", words])
        elif seen:
            step, x = seen[-1]["step"], value(seen[-1], key)
            low, high = band(same, key, step)
            if not outside:
                words = "below, which is good" if key == GAP and x < low else "inside"
            table.append([key, str(step), f"{x:.3g}", f"{low:.3g} to {high:.3g}", words])
    if len(table) == 1:
        raise ValueError(f"{run.name} has nothing to compare: no kept run has its settings "
                         f"({told}), and it has no {GAP}")
    head = [f"{run.name}, {run.rows[-1]['step'] + 1} of {run.settings.get('steps')} steps "
            "(below they count from 0, as in metrics.jsonl)"]
    for what, runs in (("all", like), (GAP, others)):
        counts = Counter(other.name.partition("-seed")[0] for other in runs)
        names = ", ".join(f"{count} {arm}" for arm, count in counts.items())
        head += [f"{what} beside {len(runs)} kept: {names}"] if runs else []
    if not like:
        head.append(f"warning: no kept run has these settings: {told}. Only {GAP} is compared")
    elif len(like) < FEW:
        head.append(f"warning: bands of {len(like)} are narrow, and a sound run may leave them")
    if like and run.rows[-1]["step"] > end(like):
        head.append(f"warning: beyond step {end(like)} only {GAP} is compared: no kept run of "
                    "these settings went so far")
    if run.settings.get("dtype") == "float32" not in {o.settings.get("dtype") for o in others}:
        head.append(f"warning: this run computes in float32, the kept ones in bfloat16: a fault "
                    f"may hide in their {GAP}; here it should be below 1e-4")
    return "\n\n".join(["\n".join(head), report.aligned(table),
                        *(said or ["Nothing compared is outside for long."])])
