"""The experiment: does PerMix-RLVR do what the paper says? Arms x seeds, trained, evaluated, compared.

    python results/run.py                                   # the main table
    python results/run.py --arms rlvr permix --seeds 0 1    # part of it; what is there already is not run again
    python results/run.py --task problems.jsonl --out runs/other --steps 60 --learning-rate 1e-4

    python results/run.py --rebuild main early              # the kept comparisons from the kept results, no run

Flags that are not its own go to train.py, for every arm.

All arms see the same problems in the same order, with as many steps and completions; only who speaks (and for `sft`
and `distill` who writes) differs. Evaluation: greedy accuracy on 50 held-out problems under 24 test personas, and
fidelity by persona identification over 8 open questions, neither of which any arm was trained on.

Each arm is a run folder of train.py under --out; stopped anywhere, the same command goes on. Kept in results/NAME: each
arm's results.json, and the comparison of all as JSON, tables and plots.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import personas  # noqa: E402
from evaluation import compare, report  # noqa: E402
from settings import settings  # noqa: E402

ARMS = {
    "sft": ["--method", "sft"],
    "distill": ["--method", "distill"],
    "rlvr": ["--method", "rlvr"],
    "permix": ["--method", "permix"],
    "permix+anchor": ["--method", "permix", "--anchor-coef", "0.5"],
}
ABLATIONS = {
    "rlvr+anchor": ["--method", "rlvr", "--anchor-coef", "0.5"],
    "permix+anchor, 1 a step": ["--method", "permix", "--anchor-coef", "0.5", "--anchor-count", "1"],
    **{f"rho={rho}": ["--method", "permix", "--persona-prob", rho] for rho in ("0.25", "0.5", "0.75", "1.0")},
    "per rollout": ["--method", "permix", "--mix", "rollout"],
    "per rollout, persona baseline": ["--method", "permix", "--mix", "rollout", "--advantage", "persona"],
    **{f"kl={beta}": ["--method", "permix", "--kl-coef", beta] for beta in ("0.03", "0.1")},
    **{f"personas={n}": ["--method", "permix", "--personas", n] for n in ("1", "4", "16", "64")},
}
KEPT = ("results.json", "comparison.json", "stability_against_fidelity.png", "learning_curves.png")


def workers(jobs: int) -> ThreadPoolExecutor:
    """Threads that start processes, each with its own share of the cores. One core does a model of 135M more good than
    half of two does (the small operations between the matmuls do not split), and shared cores are the worst of all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    jobs, shares = min(jobs, len(cores)), queue.SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job::jobs])

    def pin():
        share = shares.get()
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, share)              # of this thread, and of the processes it starts

    os.environ["OMP_NUM_THREADS"] = str(len(cores) // jobs)
    return ThreadPoolExecutor(jobs, initializer=pin)


def call(script: str, *flags) -> None:
    print("$", script, *flags, flush=True)
    subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, check=True)


def evaluated(model, arm: str, folder: Path, args) -> Path:
    """results.json of a model in `folder`, made if it is not there."""
    if not (folder / "results.json").is_file():
        trained = settings(["--task", args.task, *args.rest])       # the start model is asked as the others are trained
        asked = ["--prompt", trained.prompt, "--max-new-tokens", trained.max_new_tokens] if arm == "start" else []
        call("evaluate.py", "--model", model, "--task", args.task, "--personas", args.personas, "--limit",
             args.problems, "--fidelity", args.questions, "--start-model", args.model, "--method", arm, "--out", folder,
             *asked)
    return folder


def flags(arm: str, out: Path) -> list[str]:
    """Those of train.py for an arm; a number of personas becomes a file of as many, evenly from the strata."""
    *rest, last = (ARMS | ABLATIONS)[arm]
    if rest[-1] != "--personas":
        return [*rest, last]
    file = out / f"{last}-personas.jsonl"
    chosen = personas.few(personas.load("train"), int(last))
    file.write_text("".join(json.dumps(vars(persona)) + "\n" for persona in chosen))
    return [*rest, str(file)]


def trained(arm: str, seed: int, args) -> Path:
    """The run folder of an arm, trained to the end, its checkpoints removed."""
    run = args.out / f"{arm.replace(' ', '-').replace(',', '')}-seed{seed}"
    if not (run / "model" / "config.json").is_file():
        goes_on = ["--resume", run] if (run / "config.json").is_file() else [
            *args.flags[arm], "--model", args.model, "--task", args.task, "--seed", seed, "--steps", args.steps,
            "--eval-problems", 0, "--keep", 1, "--out", run, *args.rest]
        call("train.py", *goes_on)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return run


def keep(folder: Path, name: str, args) -> None:
    """What is small enough for the repository, into results/NAME."""
    target = ROOT / "results" / args.name / name
    target.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (folder / file).is_file():
            shutil.copy(folder / file, target / file)


def tables(comparison: dict) -> str:
    """A comparison as Markdown: the arms, their differences, a verdict for each hypothesis."""
    def markdown(head, *rows):
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    verdicts = [[h["name"], h["claim"], h["verdict"], h["words"]] for h in comparison["hypotheses"]]
    return "\n\n".join([markdown(*report.arm_rows(comparison)), markdown(*report.difference_rows(comparison)),
                        markdown(["", "claim", "verdict", "measured"], *verdicts)]) + "\n"


def kept(name: str) -> tuple[dict, dict]:
    """({arm: its results, one a training seed}, their comparison) of what results/NAME keeps."""
    arms, folder = {}, ROOT / "results" / name
    for file in sorted(folder.glob("*/results.json")):
        role, results = compare.read_arm(file.parent)
        arms.setdefault(role, []).append(results)
    order = json.loads((folder / "compared" / "comparison.json").read_text())["arms"]
    arms = {role: arms[role] for role in order}
    return arms, compare.side_by_side(arms)


def rebuild(name: str) -> None:
    """comparison.json, tables.md and the plot of results/NAME again, from each run's table of right and wrong."""
    (arms, comparison), folder = kept(name), ROOT / "results" / name
    shown = {role: compare.averaged(runs, comparison["arms"][role]) for role, runs in arms.items()}
    with matplotlib.rc_context(report.RC):
        plot = report.tradeoff(shown, comparison["runs"])
        plot.savefig(folder / "compared" / "stability_against_fidelity.png", dpi=160)
    (folder / "compared" / "comparison.json").write_text(json.dumps(comparison, indent=1))
    (folder / "tables.md").write_text(tables(comparison))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, *ABLATIONS], help="trained arms")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds of each")
    p.add_argument("--steps", type=int, default=34, help="of training")
    p.add_argument("--model", default="smollm2-135m", help="start model")
    p.add_argument("--task", default="arithmetic", help="trained and evaluated on")
    p.add_argument("--personas", default="test", help="of the evaluation")
    p.add_argument("--problems", type=int, default=50, help="held-out problems")
    p.add_argument("--questions", type=int, default=8, help="open questions for fidelity")
    p.add_argument("--out", type=Path, default=Path("runs/experiment"), help="run folders")
    p.add_argument("--name", default="main", help="results are kept in results/NAME")
    p.add_argument("--rebuild", nargs="+", metavar="NAME", help="only: the kept comparisons again, from kept results")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, 5.6 GB each, on its share of the cores")
    args, args.rest = p.parse_known_args()
    if args.rebuild:
        for name in args.rebuild:
            rebuild(name)
        return
    if args.jobs < 1:
        p.error(f"--jobs must be at least 1, not {args.jobs}")
    try:
        settings(args.rest)                             # train.py's flags: a mistyped one is told before anything runs
    except ValueError as error:
        p.error(str(error))
    args.out, began = args.out.resolve(), time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    args.flags = {arm: flags(arm, args.out) for arm in args.arms}

    def run(arm: str, seed: int | None) -> Path:
        if arm == "start":
            model, name, folder = args.model, "start", args.out / "start"
        else:
            model = trained(arm, seed, args) / "model"
            name, folder = model.parent.name, model.parent / "evaluation"
        keep(evaluated(model, arm, folder, args), name, args)
        return folder

    # All arms of a seed first: stopped early, arms are comparable.
    todo = [("start", None), *((arm, seed) for seed in args.seeds for arm in args.arms)]
    with workers(args.jobs) as pool:
        try:
            folders = [future.result() for future in [pool.submit(run, *one) for one in todo]]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    call("evaluate.py", "--compare", *folders, "--out", args.out / "compared")
    keep(args.out / "compared", "compared", args)
    comparison = json.loads((args.out / "compared" / "comparison.json").read_text())
    (ROOT / "results" / args.name / "tables.md").write_text(tables(comparison))
    print(f"{time.time() - began:.0f} seconds; everything is in {args.out}")


if __name__ == "__main__":
    main()
