"""The experiment: does PerMix-RLVR do what the paper says? Arms x seeds, trained, evaluated, compared.

    python results/run.py                                   # the main table
    python results/run.py --arms rlvr permix --seeds 0 1    # part of it; what is there already is not run again
    python results/run.py --task problems.jsonl --out runs/other --steps 60 --learning-rate 1e-4

    python results/run.py --at 12 34                        # arms evaluated after 12 steps, and at the end, after 34
    python results/run.py --rebuild main early              # the kept comparisons from the kept results, no run

Flags that are not its own go to train.py, for every arm.

What results/NAME keeps is not run again, also where its run folder is gone: so an experiment of many days goes on from
what was committed, and arms and seeds can be added. Other flags are another experiment, and need another --name.

All arms see the same problems in the same order, with as many steps and completions; only who speaks (and for `sft`
and `distill` who writes) differs. Evaluation: greedy accuracy on 50 held-out problems under 24 test personas, and
fidelity by persona identification over 8 open questions, neither of which any arm was trained on.

Each arm is a run folder of train.py under --out; stopped anywhere, the same command goes on. With --at an arm is
trained to the first step, evaluated, and resumed: resuming is exact, and only the warm-up knows of steps, so the run is
that of one go.

Kept in results/NAME: each arm's results.json, its answers and training metrics gzipped (transcripts.py reads them), and
the comparison of all as JSON, tables and plots. With --at, results and comparisons lie in a folder step-N for each
checkpoint, and curves.py compares the arms at equal accuracy.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
KEPT_IN = ROOT / "results"
sys.path.insert(0, str(ROOT))

from common.command import one_line  # noqa: E402
from common.files import claim, write_atomically  # noqa: E402
from evaluation import compare, plots, report  # noqa: E402
from results import arms, command, curves, transcripts  # noqa: E402

KEPT = ("comparison.json", "stability_against_fidelity.png", "stability_against_accuracy.png",
        "learning_curves.png")                                                          # of a comparison


OWN = threading.local()                 # of a thread of `workers`: the environment of its processes


def workers(jobs: int, gpus: list[str], processes: int = 1) -> ThreadPoolExecutor:
    """Threads that start processes, each with its own share of the cores, and with several GPUs one of them. One core
    does a model of 135M more good than half of two does (the small operations between the matmuls do not split), and
    shared cores are the worst of all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    jobs, shares = min(jobs, len(cores)), queue.SimpleQueue()
    for job in range(jobs):
        shares.put((cores[job::jobs], gpus[job % len(gpus)] if len(gpus) > 1 else None))

    def pin():
        share, gpu = shares.get()
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, share)              # of this thread, and of the processes it starts
        OWN.environment = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}

    os.environ["OMP_NUM_THREADS"] = str(max(1, len(cores) // (jobs * processes)))
    return ThreadPoolExecutor(jobs, initializer=pin)


def gpus_here(processes: int) -> list[str]:
    """The GPUs that runs may share out, as CUDA_VISIBLE_DEVICES names them; none where a run has them all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = named.split(",") if named else list(map(str, range(torch.cuda.device_count())))
    return every if processes == 1 else []


def call(script: str, *flags, processes: int = 1) -> None:
    """Runs a script of ours. CalledProcessError where it fails; it has told why."""
    print("$", script, *flags, flush=True)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    subprocess.run([sys.executable, *map(str, (*several, ROOT / script, *flags))], check=True,
                   env=os.environ | getattr(OWN, "environment", {}))


def evaluated(model, arm: str, folder: Path, args, speaks: bool = True) -> Path:
    """results.json of a model in `folder`, made if it is not there; `speaks`: open questions too."""
    if not (folder / "results.json").is_file():
        call("evaluate.py", "--model", model, "--task", args.eval_task, "--personas", args.personas, "--limit",
             args.problems, "--method", arm, "--out", folder, *args.computes, *(args.spoken if speaks else []),
             *(args.asked if arm == "start" else []))
    return folder


def stage(step: int | None) -> str:
    """The folder of a checkpoint that --at names; without --at there is one, and no folder of its own."""
    return f"step-{step}" if step else ""


def trained(arm: str, seed: int, step: int, run: Path, args) -> Path:
    """The model of an arm after `step` steps, in its run folder; goes on with a run that has fewer."""
    goes_on = ["--resume", run, "--steps", step, *args.faster] if (run / "config.json").is_file() else [
        *args.flags[arm], "--model", args.model, "--task", args.task, "--seed", seed, "--steps", step,
        "--eval-problems", 0, "--keep", 1, "--out", run, *args.apart, *args.rest]
    call("train.py", *goes_on, processes=args.processes)
    return run / "model"


def keep(folder: Path, target: Path) -> None:
    """What is small enough for the repository of an evaluation or a comparison, into `target`; results.json last."""
    target.mkdir(parents=True, exist_ok=True)
    if (folder / "results.json").is_file():
        transcripts.keep(folder, target)
        write_atomically(target / "results.json", (folder / "results.json").read_text())
        return
    for file in KEPT:
        if (folder / file).is_file():
            shutil.copy(folder / file, target / file)


def one_run(arm: str, seed: int | None, args) -> list[Path]:
    """Trains, evaluates and keeps an arm (seed None: the start model) -> its evaluation at each checkpoint.

    What results/NAME keeps is not run again: a long experiment goes on from what was committed.
    """
    kept_in = KEPT_IN / args.name
    name = arm if seed is None else f"{arm.replace(' ', '-').replace(',', '')}-seed{seed}"
    before = [kept_in / name / ("" if seed is None else stage(step)) for step in args.at]
    if all((folder / "results.json").is_file() for folder in before):
        return before
    if seed is None:
        folder = evaluated(args.model, arm, args.out / arm, args)
        if args.personagym:
            check_judge(folder)
        keep(folder, kept_in / arm)
        return [folder] * len(args.at)
    run = args.out / name
    folders = [run / "evaluation" / stage(step) for step in args.at]
    for step, folder in zip(args.at, folders, strict=True):
        if not (folder / "results.json").is_file():
            speaks = not args.fidelity_once or step == args.at[-1]
            evaluated(trained(arm, seed, step or args.steps, run, args), arm, folder, args, speaks)
        if step == args.at[-1]:
            transcripts.keep_training(run, kept_in / run.name)  # before what says that this run is done
        keep(folder, kept_in / run.name / stage(step))
    shutil.rmtree(run / "checkpoints", ignore_errors=True)      # until here, a resumed run starts from the last one
    return folders


def alone(arm: str, seed: int, args) -> list[Path]:
    """one_run, unless another one has failed, which ends the command."""
    if args.failed.is_set():
        raise CancelledError
    try:
        return one_run(arm, seed, args)
    except BaseException:
        args.failed.set()
        raise


def check_judge(folder: Path) -> None:
    """Ends the experiment before any training where the judge fails its planted controls on the start model's answers.
    These results are not kept: the next command, with another judge, asks again."""
    judged = json.loads((folder / "results.json").read_text())["fidelity"]["personagym"]
    if judged["usable"]:
        return
    (folder / "results.json").unlink()
    told = "no control could be planted: give PersonaGym two personas or more"
    if judged["planted_gap"] is not None:
        gap = report.interval(*(judged[f"planted_gap{end}"] for end in ("", "_low", "_high")), "+")
        told = (f"the start model's answers get {gap} grades more than under another persona's name: give another "
                "--judge-model, or a start model that plays its personas")
    raise ValueError(f"{judged['judge']} cannot judge here: {told}")


def markdown(head: list[str], *rows: list[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(comparison: dict) -> str:
    """A comparison as Markdown: the arms, their differences, a verdict for each hypothesis."""
    verdicts = [[h["name"], h["claim"], h["verdict"], h["words"]] for h in comparison["hypotheses"]]
    return "\n\n".join([markdown(*report.arm_rows(comparison)), markdown(*report.difference_rows(comparison)),
                        markdown(["", "claim", "verdict", "measured"], *verdicts)]) + "\n"


def page(comparisons: dict) -> str:
    """tables.md of {step: comparison}, in the order of training; {None: comparison} without --at."""
    if None in comparisons:
        return tables(comparisons[None])
    parts = [f"## At step {step}\n\n{tables(comparison)}" for step, comparison in comparisons.items()]
    return "\n".join([*parts, f"## At equal accuracy\n\n{markdown(*curves.rows(curves.differences(comparisons)))}\n"])


def kept_comparisons(name: str) -> dict:
    """{step: comparison.json} of results/NAME in the order of training; {None: ...} without --at."""
    folder = KEPT_IN / name / "compared"
    steps = sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/comparison.json"))
    return {step: json.loads((folder / stage(step) / "comparison.json").read_text()) for step in steps or [None]}


def kept(name: str, step: int | None = None) -> tuple[dict, dict]:
    """({arm: its results, one a training seed}, their comparison) of what results/NAME keeps, of one checkpoint."""
    found, folder = {}, KEPT_IN / name
    stages = [path.name for path in folder.glob("compared/step-*")] or [""]
    for path in sorted(path for path in folder.iterdir() if path.name not in ("start", "compared")):
        if all((path / other / "results.json").is_file() for other in stages):  # a run that is done
            role, results = compare.read_arm(path / stage(step))
            found.setdefault(role, []).append(results)
    found["start"] = [compare.read_arm(folder / "start")[1]]
    order = json.loads((folder / "compared" / stage(step) / "comparison.json").read_text())["arms"]
    found = {role: found[role] for role in order}
    return found, compare.side_by_side(found, looks=len(stages))


def rebuild(name: str) -> None:
    """comparison.json, tables.md and the plots of results/NAME again, from each run's table of right and wrong."""
    for step in kept_comparisons(name):
        (found, comparison), folder = kept(name, step), KEPT_IN / name / "compared" / stage(step)
        shown = {role: compare.averaged(runs, comparison["arms"][role]) for role, runs in found.items()}
        plot = plots.tradeoff(shown, comparison["runs"])
        plot.savefig(folder / "stability_against_fidelity.png", dpi=160)
        write_atomically(folder / "comparison.json", json.dumps(comparison, indent=1))
    write_page(name)


def write_page(name: str) -> None:
    """tables.md of the kept comparisons; with --at also compared/curves.json and its picture."""
    folder, comparisons = KEPT_IN / name, kept_comparisons(name)
    write_atomically(folder / "tables.md", page(comparisons))
    if None not in comparisons:
        write_atomically(folder / "compared" / "curves.json", json.dumps(curves.differences(comparisons), indent=1))
        curves.plot(comparisons).savefig(folder / "compared" / "curves.png", dpi=160)


def compared(folders: list[list[Path]], args) -> None:
    """All arms at each checkpoint, kept with their page; folders: what `one_run` gave for each arm and seed. What
    results/NAME keeps of other arms and seeds is compared with them."""
    own = {part for folder in folders for part in folder[0].parts}
    for path in sorted((KEPT_IN / args.name).glob("*-seed*")):
        others = [path / stage(step) for step in args.at]
        if path.name not in own and all((other / "results.json").is_file() for other in others):
            folders = [*folders, others]
    for step, at_step in zip(args.at, zip(*folders, strict=True), strict=True):
        folder = Path("compared") / stage(step)
        call("evaluate.py", "--compare", *at_step, "--looks", len(args.at), "--out", args.out / folder)
        keep(args.out / folder, KEPT_IN / args.name / folder)
    write_page(args.name)


def flags_of(argv: list[str] | None = None) -> argparse.Namespace:
    args = command.parse(argv, __doc__.split("\n")[0])
    args.failed = threading.Event()
    return args


def main(argv: list[str] | None = None) -> None:
    """ValueError or OSError, in one line, before anything is spent where that is possible."""
    args = flags_of(argv)
    if args.rebuild:
        for name in args.rebuild:
            rebuild(name)
        return
    args.out, began, kept_in = args.out.resolve(), time.time(), KEPT_IN / args.name
    command.check_identity(args, kept_in)
    command.check_inputs(args)
    for folder in (args.out, kept_in):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "experiment.json", json.dumps(command.identity(args), indent=1) + "\n")
    args.flags = {arm: arms.flags(arm, args.out) for arm in args.arms}

    # The start model first, which says whether the judge can judge. Then all arms of a seed: stopped early, arms are
    # comparable.
    with claim(args.out):
        folders = [one_run("start", None, args)]
        todo = [(arm, seed) for seed in args.seeds for arm in args.arms]
        with workers(args.jobs, gpus_here(args.processes), args.processes) as pool:
            try:
                folders += [future.result() for future in [pool.submit(alone, *one, args) for one in todo]]
            except BaseException:
                args.failed.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        compared(folders, args)
    print(f"{time.time() - began:.0f} seconds; everything is in {args.out}")


def run(argv: list[str]) -> int:
    """main, as a command: the exit code, and one line for what went wrong."""
    try:
        main(argv)
    except subprocess.CalledProcessError as error:          # the script has told why
        return error.returncode
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
