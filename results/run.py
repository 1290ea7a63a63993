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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT_IN = ROOT / "results"
sys.path.insert(0, str(ROOT))

import personas  # noqa: E402
import tasks  # noqa: E402
from common.files import write_atomically  # noqa: E402
from evaluation import compare, plots, report  # noqa: E402
from results import curves, transcripts  # noqa: E402
from training.settings import settings  # noqa: E402

ARMS = {
    "sft": ["--method", "sft"],
    "distill": ["--method", "distill"],
    "rlvr": ["--method", "rlvr"],
    "permix": ["--method", "permix"],
    "permix+anchor": ["--method", "permix", "--anchor-coef", "0.5"],
}
ABLATIONS = {
    "rlvr+anchor": ["--method", "rlvr", "--anchor-coef", "0.5"],
    "rlvr+kl": ["--method", "rlvr", "--kl-coef", "0.03"],
    "permix+kl": ["--method", "permix", "--kl-coef", "0.03"],
    "rlvr+paraphrases": ["--method", "permix", "--personas", "paraphrases-train"],      # prompts vary, nobody speaks
    "permix+anchor, 1 a step": ["--method", "permix", "--anchor-coef", "0.5", "--anchor-count", "1"],
    **{f"rho={rho}": ["--method", "permix", "--persona-prob", rho] for rho in ("0.25", "0.5", "0.75", "1.0")},
    "per rollout": ["--method", "permix", "--mix", "rollout"],
    **{f"kl={beta}": ["--method", "permix", "--kl-coef", beta] for beta in ("0.03", "0.1")},
    **{f"personas={n}": ["--method", "permix", "--personas", n] for n in ("1", "4", "16", "64")},
    **{f"lora={rank}": ["--method", "permix", "--lora-rank", rank] for rank in ("1", "8", "16", "64")},
    "adamw8bit": ["--method", "permix", "--optimizer", "adamw8bit"],
}
KEPT = ("comparison.json", "stability_against_fidelity.png", "stability_against_accuracy.png",
        "learning_curves.png")                                                          # of a comparison


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


def call(script: str, *flags, processes: int = 1) -> None:
    """Runs a script of ours. CalledProcessError where it fails; it has told why."""
    print("$", script, *flags, flush=True)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    subprocess.run([sys.executable, *map(str, (*several, script, *flags))], cwd=ROOT, check=True)


def evaluated(model, arm: str, folder: Path, args, speaks: bool = True) -> Path:
    """results.json of a model in `folder`, made if it is not there; `speaks`: open questions too."""
    if not (folder / "results.json").is_file():
        call("evaluate.py", "--model", model, "--task", args.eval_task, "--personas", args.personas, "--limit",
             args.problems, "--method", arm, "--out", folder, *args.computes, *(args.spoken if speaks else []),
             *(args.asked if arm == "start" else []))
    return folder


def flags(arm: str, out: Path) -> list[str]:
    """Those of train.py for an arm; a number of personas becomes a file of as many, evenly from the strata."""
    *rest, last = (ARMS | ABLATIONS)[arm]
    if rest[-1] != "--personas" or not last.isdigit():
        return [*rest, last]
    file = out / f"{last}-personas.jsonl"
    chosen = personas.few(personas.load("train"), int(last))
    file.write_text("".join(json.dumps(vars(persona)) + "\n" for persona in chosen))
    return [*rest, str(file)]


def stage(step: int | None) -> str:
    """The folder of a checkpoint that --at names; without --at there is one, and no folder of its own."""
    return f"step-{step}" if step else ""


def trained(arm: str, seed: int, step: int, run: Path, args) -> Path:
    """The model of an arm after `step` steps, in its run folder; goes on with a run that has fewer."""
    goes_on = ["--resume", run, "--steps", step] if (run / "config.json").is_file() else [
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
    print(f"run.py: {judged['judge']} cannot judge here: {told}", file=sys.stderr)
    sys.exit(2)


def identity(args) -> dict:
    """What two commands must share to be parts of one experiment; arms and seeds may be added."""
    names = ("model", "task", "eval_task", "personas", "problems", "questions", "fidelity_once", "personagym", "at",
             "rest")
    judge = {"judge_model": args.judge_model} if args.personagym else {}
    return {name: getattr(args, name) for name in names} | judge | ({"steps": args.steps} if args.at == [None] else {})


def check_identity(args) -> None:
    """Ends the command where --out or results/NAME holds an experiment of other flags."""
    for flag, folder in (("--out", args.out), ("--name", KEPT_IN / args.name)):
        file, own = folder / "experiment.json", identity(args)
        used = any(folder.glob("*/results.json")) or any(folder.glob("*/config.json*"))
        there = json.loads(file.read_text()) if file.is_file() else {} if used else own
        for key in [key for key in own | there if own.get(key) != there.get(key)]:
            print(f"run.py: {folder} holds another experiment, with {key} {there.get(key)}, not {own.get(key)}: "
                  f"give another {flag}", file=sys.stderr)
            sys.exit(2)


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
    arms, folder = {}, KEPT_IN / name
    for file in sorted({*folder.glob(f"*/{stage(step)}/results.json"), folder / "start" / "results.json"}):
        role, results = compare.read_arm(file.parent)
        arms.setdefault(role, []).append(results)
    order = json.loads((folder / "compared" / stage(step) / "comparison.json").read_text())["arms"]
    arms = {role: arms[role] for role in order}
    return arms, compare.side_by_side(arms, looks=len(list(folder.glob("compared/step-*"))) or 1)


def rebuild(name: str) -> None:
    """comparison.json, tables.md and the plots of results/NAME again, from each run's table of right and wrong."""
    for step in kept_comparisons(name):
        (arms, comparison), folder = kept(name, step), KEPT_IN / name / "compared" / stage(step)
        shown = {role: compare.averaged(runs, comparison["arms"][role]) for role, runs in arms.items()}
        plot = plots.tradeoff(shown, comparison["runs"])
        plot.savefig(folder / "stability_against_fidelity.png", dpi=160)
        (folder / "comparison.json").write_text(json.dumps(comparison, indent=1))
    write_page(name)


def write_page(name: str) -> None:
    """tables.md of the kept comparisons; with --at also compared/curves.json and its picture."""
    folder, comparisons = KEPT_IN / name, kept_comparisons(name)
    (folder / "tables.md").write_text(page(comparisons))
    if None not in comparisons:
        (folder / "compared" / "curves.json").write_text(json.dumps(curves.differences(comparisons), indent=1))
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
    """The command line, checked; `rest` are train.py's flags, `at` the evaluated checkpoints (None: the end)."""
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, *ABLATIONS], help="trained arms")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds of each")
    p.add_argument("--steps", type=int, default=34, help="of training")
    p.add_argument("--at", nargs="+", type=int, metavar="STEP",
                   help="evaluate after each of these steps; the last ends the training, whatever --steps says")
    p.add_argument("--model", default="smollm2-135m", help="start model")
    p.add_argument("--task", default="arithmetic", help="trained on")
    p.add_argument("--eval-task", help="evaluated on (default: --task's test problems)")
    p.add_argument("--personas", default="test", help="of the evaluation")
    p.add_argument("--problems", type=int, default=50, help="held-out problems")
    p.add_argument("--questions", type=int, default=8, help="open questions for fidelity; 0: none")
    p.add_argument("--fidelity-once", action="store_true", help="open questions after the last step of --at alone")
    p.add_argument("--personagym", metavar="FILE", help="PersonaGym's questions, graded by --judge-model")
    p.add_argument("--judge-model", default="smollm2-135m", help="a model in the process of evaluate.py")
    p.add_argument("--out", type=Path, default=Path("runs/experiment"), help="run folders")
    p.add_argument("--name", default="main", help="results are kept in results/NAME")
    p.add_argument("--rebuild", nargs="+", metavar="NAME", help="only: the kept comparisons again, from kept results")
    p.add_argument("--jobs", type=int, help="runs at a time, each on its share of the cores (default: 2, or 1 with "
                                           "--processes)")
    p.add_argument("--processes", type=int, default=1, help="of torchrun, for a run's training; one a GPU")
    args, args.rest = p.parse_known_args(argv)
    args.jobs = (1 if args.processes > 1 else 2) if args.jobs is None else args.jobs
    for name in ("jobs", "processes"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.processes > 1 < args.jobs:
        p.error("--processes shares the GPUs among the ranks of one run: leave out --jobs")
    for name in ("model", "task", "eval_task", "personas", "personagym"):
        given = getattr(args, name)
        if given and Path(given).exists():
            setattr(args, name, str(Path(given).resolve()))     # the scripts run in the repository's root
    own_file = any(map(tasks.is_local, (args.task, args.eval_task or args.task)))   # whose lines both may ask for
    args.apart = ["--eval-task", args.eval_task] if args.eval_task and own_file else []
    args.eval_task = args.eval_task or args.task
    args.spoken = ["--fidelity", args.questions, "--start-model", args.model] if args.questions else []
    args.spoken += ["--personagym", args.personagym, "--judge-model", args.judge_model] if args.personagym else []
    args.at = args.at or [None]
    if args.at != [None] and (args.at[0] < 1 or args.at != sorted(set(args.at))):
        p.error("--at takes steps from 1 on, each later than the one before")
    try:
        for arm in args.arms:                           # train.py's flags: a mistyped one is told before anything runs
            own = (ARMS | ABLATIONS)[arm]
            own = own[:own.index("--personas")] if "--personas" in own else own
            told = settings([*own, "--task", args.task, "--eval-problems", "0", *args.apart, *args.rest])
    except ValueError as error:
        p.error(f"{arm}: {error}")
    if told.stop:
        p.error("--stop ends the answers of trained models alone, and the start model's would go on: leave it out")
    usual = settings([])
    args.computes = [part for name in ("dtype", "device", "slots") if getattr(told, name) != getattr(usual, name)
                     for part in (f"--{name}", getattr(told, name))] + ["--no-cuda-graphs"] * told.no_cuda_graphs
    args.asked = ["--prompt", told.prompt, "--max-new-tokens", told.max_new_tokens]     # as the trained ones are
    args.asked += ["--chat-template", told.chat_template] if told.chat_template else []
    args.asked += ["--trained-on", args.task] if tasks.is_local(args.eval_task) else []
    args.asked += ["--columns", told.columns] if told.columns else []
    if told.overlap and len(args.at) > 1:
        p.error("--at stops and resumes, which with --overlap is another run than one that goes through")
    return args


def main(argv: list[str] | None = None) -> None:
    args = flags_of(argv)
    if args.rebuild:
        for name in args.rebuild:
            rebuild(name)
        return
    args.out, began = args.out.resolve(), time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    args.flags = {arm: flags(arm, args.out) for arm in args.arms}

    check_identity(args)
    if args.personagym:
        one_run("start", None, args)                    # whose answers say whether the judge can judge
    for folder in (args.out, KEPT_IN / args.name):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "experiment.json", json.dumps(identity(args), indent=1) + "\n")

    # All arms of a seed first: stopped early, arms are comparable.
    todo = [("start", None), *((arm, seed) for seed in args.seeds for arm in args.arms)]
    with workers(args.jobs) as pool:
        try:
            folders = [future.result() for future in [pool.submit(one_run, *one, args) for one in todo]]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    compared(folders, args)
    print(f"{time.time() - began:.0f} seconds; everything is in {args.out}")


def command(argv: list[str]) -> None:
    """main, where the failure of a script that it calls, which has told why, is the exit code."""
    try:
        main(argv)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    command(sys.argv[1:])
