"""run.py's flags: what they mean, what they cannot mean, and which experiment they name."""

import json
import sys
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import personas  # noqa: E402
import tasks  # noqa: E402
from common import files  # noqa: E402
from common.command import Parser  # noqa: E402
from results.arms import ARMS, EVERY, parts  # noqa: E402
from training.settings import settings  # noqa: E402
from weights import sources  # noqa: E402

OURS = ("--method", "--seed", "--resume", "--unset", "--eval-problems", "--eval-pool", "--keep")  # run.py sets them
FREE = {"slots", "micro_tokens", "memory", "recompute", "save_every", "async_save", "profile", "tracker",
        "no_cuda_graphs", "shard", "task", "eval_task", "eval_problems", "seed", "steps"}   # no part of an identity


def parse(argv: list[str] | None, about: str) -> Namespace:
    """The command line, checked; `rest` are train.py's flags, `at` the evaluated checkpoints (None: the end)."""
    p = Parser(description=about)
    add = p.add_argument
    add("--arms", nargs="+", default=list(ARMS), choices=list(EVERY), metavar="ARM",
        help=f"trained arms, of: {'; '.join(EVERY)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds of each")
    add("--steps", type=int, default=34, help="of training")
    add("--at", nargs="+", type=int, metavar="STEP",
        help="evaluate after each of these steps; the last ends the training, whatever --steps says")
    add("--model", default="smollm2-135m", help="start model")
    add("--task", default="arithmetic", help="trained on")
    add("--eval-task", help="evaluated on (default: --task's test problems)")
    add("--personas", default="test", help="of the evaluation, as for evaluate.py")
    add("--problems", type=int, default=50, help="held-out problems")
    add("--questions", type=int, default=8, help="open questions for fidelity; 0: none")
    add("--fidelity-once", action="store_true", help="open questions after the last step of --at alone")
    add("--personagym", metavar="FILE", help="PersonaGym's questions, graded by --judge-model")
    add("--judge-model", default="smollm2-135m", help="a model in the process of evaluate.py")
    add("--out", type=Path, default=Path("runs/experiment"), help="run folders")
    add("--name", default="main", help="results are kept in results/NAME")
    add("--rebuild", nargs="+", metavar="NAME", help="only: the kept comparisons again, from kept results")
    add("--jobs", type=int,
        help="runs at a time, each on its share of the cores and a GPU of its own (default: 2, or 1 with --processes)")
    add("--processes", type=int, default=1, help="of torchrun, for a run's training; one a GPU")
    args, args.rest = p.parse_known_args(argv)
    try:
        return checked(args)
    except ValueError as error:
        p.error(str(error))


def checked(args: Namespace) -> Namespace:
    """The flags with what follows from them. ValueError where they cannot be meant; nothing is read but settings."""
    args.jobs = (1 if args.processes > 1 else 2) if args.jobs is None else args.jobs
    for name, least in {"jobs": 1, "processes": 1, "problems": 1, "questions": 0}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.processes > 1 < args.jobs:
        raise ValueError("--processes shares the GPUs among the ranks of one run: leave out --jobs")
    if not args.name.strip(" ./"):
        raise ValueError("--name is empty: give results/NAME a name")
    args.arms, args.seeds = list(dict.fromkeys(args.arms)), list(dict.fromkeys(args.seeds))
    args.at = args.at or [None]
    if args.at != [None] and (args.at[0] < 1 or args.at != sorted(set(args.at))):
        raise ValueError("--at takes steps from 1 on, each later than the one before")

    other = args.eval_task and args.eval_task != args.task
    args.apart = ["--eval-task", args.eval_task] if other else []   # train.py refuses a question in both
    args.apart += ["--eval-pool", args.personas] if args.personas != "test" else []
    args.eval_task = args.eval_task or args.task
    trained = ["--task", args.task, "--steps", str(args.at[-1] or args.steps)]
    for arm in args.arms:
        own = {flag for flag in EVERY[arm] if flag.startswith("--")}
        if wrong := [flag for flag in args.rest if flag.split("=")[0] in own.union(OURS)]:
            raise ValueError(f"{wrong[0]} is set for {arm} already: leave it out, or add an arm to results/arms.py")
        try:
            settings([*EVERY[arm], *trained, *args.rest], quiet=True)       # its notes come with its run
        except ValueError as error:
            raise ValueError(f"{arm}: {error}") from error
    args.told = told = settings([*trained, *args.rest])
    if told.stop:
        raise ValueError("--stop ends the answers of trained models alone, and the start model's would go on: "
                         "leave it out")
    if told.overlap and len(args.at) > 1:
        raise ValueError("--at stops and resumes, which with --overlap is another run than one that goes through")
    if told.prompts % args.processes:
        raise ValueError(f"--prompts {told.prompts} cannot be shared by {args.processes} processes")
    for_evaluation(args, told)
    return args


def for_evaluation(args: Namespace, told: Namespace) -> None:
    """What evaluate.py is told: of every model (`computes`), of the start model (`asked`, as the trained ones are), and
    where open questions are asked (`spoken`)."""
    usual = vars(settings([]))
    args.trained = {name: value for name, value in vars(told).items() if value != usual[name] and name not in FREE}
    args.faster = []            # of a resumed run: what only decides how fast it goes; the rest stands in its folder
    for name in ("slots", "micro_tokens", "save_every", "recompute", "no_cuda_graphs", "async_save"):
        if (value := getattr(told, name)) != usual[name]:
            args.faster += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    args.computes = [str(part) for name in ("dtype", "device", "slots") if getattr(told, name) != usual[name]
                     for part in (f"--{name}", getattr(told, name))] + ["--no-cuda-graphs"] * told.no_cuda_graphs
    args.computes += ["--columns", told.columns] if told.columns and tasks.is_local(args.eval_task) else []
    args.asked = ["--prompt", told.prompt, "--max-new-tokens", str(told.max_new_tokens)]
    args.asked += ["--chat-template", told.chat_template] if told.chat_template else []
    args.asked += ["--trained-on", args.task] if tasks.is_file_of(args.eval_task, args.task) else []
    args.spoken = ["--fidelity", str(args.questions), "--start-model", args.model] if args.questions else []
    args.spoken += ["--personagym", args.personagym, "--judge-model", args.judge_model] if args.personagym else []


def check_inputs(args: Namespace) -> None:
    """ValueError where the tasks, personas or questions cannot be had, or what is tested would be trained on."""
    tasks.check_columns(args.told.columns, args.task, args.eval_task)
    columns, apart = args.told.columns, not tasks.is_file_of(args.task, args.eval_task)
    trained = tasks.load(args.task, "train", whole=apart, columns=columns if tasks.is_local(args.task) else None)
    tasks.check_disjoint(trained, tasks.load(args.eval_task, "test", whole=apart,
                                             columns=columns if tasks.is_local(args.eval_task) else None))
    people = personas.load(args.personas, "test")
    pools = {args.told.personas, *filter(None, (parts(arm)[1] for arm in args.arms))}
    for pool in [pool for pool in pools if not pool.isdigit()]:         # a number is of those in train
        personas.check_disjoint(personas.load(pool, "train"), people)
    most = len(personas.load_roleplay("test"))
    if args.questions > most:
        raise ValueError(f"--questions must be at most {most}, not {args.questions}")


def identity(args: Namespace) -> dict:
    """What two commands must share to be parts of one experiment. Arms and seeds may be added, and what only decides
    how fast it goes may change; a file is known by its content."""
    names = ("model", "task", "eval_task", "personas", "problems", "questions", "fidelity_once", "personagym")
    found = {name: getattr(args, name) for name in names}
    found |= {"judge_model": args.judge_model} if args.personagym else {}
    found |= {"at": args.at} if args.at != [None] else {"steps": args.steps}
    found |= {f"train.py's {name}": value for name, value in args.trained.items()}
    return {name: known(value) for name, value in found.items()}


def known(value):
    """The name of a file, or of a model's folder, and the first of its content's SHA-256; other values as they are."""
    path = Path(str(value))
    if not isinstance(value, str) or not (path.is_file() or (path / "config.json").is_file()):
        return value
    content = [path] if path.is_file() else sorted([path / "config.json", *path.glob("*.safetensors")])
    sums = [sources.sha256(file) for file in content]
    return f"{path.name} {(sums[0] if path.is_file() else files.digest(sums))[:12]}"


def check_identity(args: Namespace, kept_in: Path) -> None:
    """ValueError where --out or results/NAME holds results of another experiment."""
    own = json.loads(json.dumps(identity(args)))        # as it is read back
    for flag, folder in (("--out", args.out), ("--name", kept_in)):
        file = folder / "experiment.json"
        if not any(folder.glob("*/results.json")) and not any(folder.glob("*/config.json*")):
            continue
        there = json.loads(file.read_text()) if file.is_file() else {}
        for key in [key for key in own | there if own.get(key) != there.get(key)]:
            raise ValueError(f"{folder} holds another experiment, with {key} {there.get(key)}, not {own.get(key)}: "
                             f"give another {flag}")
