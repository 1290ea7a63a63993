"""The sanity run: does every loss learn what can be learnt?

    python results/sanity.py                                # all of them, into results/sanity/
    python results/sanity.py --losses grpo gspo --steps 60

16 arithmetic problems that the start model solves 20-80 % of the time (of 8 samples, no persona),
trained on by each loss with its paper's advantage, normaliser and clips, everything else alike.
The reward should reach 0.95. A loss that does not get there is broken, or its settings are.

Each batch gets several optimizer steps: after the first one the ratio is not 1, and the clips act.
The share of clipped tokens is kept beside the rewards. reinforce has no ratio and would be wrong
from the second step on, so it takes one step a batch. So does rloo, which is reinforce with another
baseline. Runs that are there are not run again.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
import personas  # noqa: E402
import rewards  # noqa: E402
import tasks  # noqa: E402
import weights  # noqa: E402
from common import files  # noqa: E402
from common.command import Parser, one_line, positive  # noqa: E402
from evaluation import plots  # noqa: E402
from rollout import SamplingParams, generate  # noqa: E402

SEVERAL_STEPS = ["--minibatches", "2", "--inner-epochs", "2"]  # four optimizer steps a batch
LOSSES = {
    **{name: ["--loss", name, *SEVERAL_STEPS] for name in grpo.RECIPES if name != "reinforce"},
    "reinforce": ["--loss", "reinforce"],
    "rloo": ["--loss", "reinforce", "--advantage", "rloo"],
}


def halfway(count: int, samples: int = 8) -> list[tasks.Problem]:
    """The first `count` training problems that the start model solves 20-80 % of the time."""
    transformer, tokenizer = weights.load(weights.EMBEDDED)
    problems = tasks.load("arithmetic", "train", 0, 12 * count)
    prompts = [personas.prompt_ids(tokenizer, problem.question, None) for problem in problems]
    solved = Counter()
    with rewards.Verifier() as verifier:
        params = SamplingParams(n=samples, max_tokens=32, temperature=0.6)
        for done in generate(transformer, prompts, params):
            text = tokenizer.decode(done.tokens, skip_special_tokens=True)
            verdict = verifier.submit(problems[done.index].answer, text).result().verdict
            solved[done.index] += verdict == "correct" and not done.truncated
    chosen = [problem for i, problem in enumerate(problems) if 0.2 <= solved[i] / samples <= 0.8]
    if len(chosen) < count:
        raise ValueError(f"only {len(chosen)} of {len(problems)} problems lie between 20 and 80 %")
    return chosen[:count]


def train(name: str, problems: Path, out: Path, args) -> list[dict]:
    """metrics.jsonl of one loss's run, made where it is not there. ValueError where it is there with
    other --steps or --learning-rate."""
    run = out / name
    if not (run / "model").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        flags = ["--method", "rlvr", "--task", str(problems), "--prompt", "plain", *LOSSES[name],
                 "--prompts", "8", "--group-size", "8", "--max-new-tokens", "32",
                 "--learning-rate", str(args.learning_rate), "--steps", str(args.steps),
                 "--eval-problems", "0", "--save-every", str(args.steps), "--out", str(run)]
        subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=True)
        shutil.rmtree(run / "checkpoints")
    settings = json.loads((run / "config.json").read_text())["settings"]
    if (settings["steps"], settings["learning_rate"]) != (args.steps, args.learning_rate):
        raise ValueError(f"{run} has other --steps or another --learning-rate: give another --out")
    return list(files.rows(run / "metrics.jsonl"))


def keep(metrics: dict[str, list[dict]], key: str, path: Path) -> dict[str, list[float]]:
    """Adds one metric of these losses, step by step, to what is kept, and returns that."""
    curves = json.loads(path.read_text()) if path.is_file() else {}
    curves |= {name: [round(row[key], 4) for row in rows] for name, rows in metrics.items()}
    path.write_text(json.dumps(curves) + "\n")
    return curves


def table(rewards: dict[str, list[float]], clipped: dict[str, list[float]]) -> str:
    """What results/sanity/README.md shows of it."""
    first = min(curve[0] for curve in rewards.values())
    lines = [f"| loss | best mean reward of two batches, from {first:.2f} "
             "| tokens clipped, mean over batches | most in a batch |", "|---|---|---|---|"]
    for name, curve in rewards.items():
        best = max(a + b for a, b in zip(curve, curve[1:], strict=False)) / 2
        mean = sum(clipped[name]) / len(clipped[name])
        lines.append(f"| {name} | {best:.3f} | {100 * mean:.2f} % | {100 * max(clipped[name]):.1f} % |")
    return "\n".join(lines) + "\n"


def main() -> int:
    p = Parser(description="Train each loss on problems that are neither easy nor impossible.")
    p.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    p.add_argument("--steps", type=positive, default=40)
    p.add_argument("--learning-rate", type=float, default=2e-5)
    p.add_argument("--out", type=Path, default=Path("runs/sanity"), help="run folders")
    try:
        run(p.parse_args())
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"results/sanity.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(args) -> None:
    out, kept = args.out.resolve(), ROOT / "results" / "sanity"
    out.mkdir(parents=True, exist_ok=True)
    kept.mkdir(exist_ok=True)
    problems = kept / "problems.jsonl"
    if not problems.is_file():
        rows = [{"question": p.question, "answer": p.answer, "kind": p.kind, "split": "train"}
                for p in halfway(16)]
        problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {}
    for name in args.losses:
        metrics[name] = train(name, problems, out, args)
        rewards = keep(metrics, "reward", kept / "rewards.json")
        clipped = keep(metrics, "clip_fraction", kept / "clip_fractions.json")
        (kept / "tables.md").write_text(table(rewards, clipped))
        print(table({name: rewards[name]}, clipped).splitlines()[-1], flush=True)
    plots.curves(metrics).savefig(kept / "curves.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
