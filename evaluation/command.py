"""evaluate.py's flags, and what can't be meant by them."""

import math
from pathlib import Path

import personas
import tasks
import weights
from common.command import Parser
from common.ranks import refuse_several


def parse(argv):
    """The command line as a namespace."""
    parser = Parser(description="Accuracy under every persona, and fidelity to them.")
    add = parser.add_argument
    add("--model", default="smollm2-135m",
        help="smollm2-135m, a Hugging Face folder or id, a .gguf file")
    add("--chat-template", metavar="FILE",
        help="a Jinja template, or plain: for a base model, which has none")
    add("--task", default="arithmetic",
        help="arithmetic, facts, svamp, gsm8k, math, math500, reasoning-gym:NAME, a .jsonl file or "
             "a folder")
    add("--trained-on", metavar="TASK",
        help="of a file: it was trained on, so without the lines that training takes (default: the "
             "task of the model's run)")
    add("--columns", help="of a file or folder: question=COLUMN,answer=COLUMN (default: as in the "
                          "model's run)")
    add("--personas", default="test",
        help=f"{', '.join(personas.POOLS)}, several joined by +, or a .jsonl file")
    add("--out", help="folder for results.json, report.html and plots (default: runs/evaluation, "
                      "of --compare runs/compared)")
    add("--limit", type=int, default=50, help="number of problems")
    add("--seed", type=int, default=0, help="of generated problems, sampling and bootstrap")
    add("--max-new-tokens", type=int,
        help="longest answer, in tokens (default: that of the model's run, else 32 for generated "
             "tasks, 48 for others)")
    add("--prompt", choices=sorted(tasks.PROMPTS),
        help="how a problem is put (default: as in the model's run, else plain for generated "
             "tasks, short for others)")
    add("--dtype", default="auto", choices=["auto", *weights.DTYPES], help="of compute")
    add("--device", default="auto", choices=weights.DEVICES,
        help="auto: the GPU if there is one, else the CPU")
    add("--slots", type=int, default=0, help="answers decoded together; 0: as suits the device")
    add("--no-cuda-graphs", action="store_true",
        help="on a GPU: decode step by step, without recording")
    add("--method",
        help="the arm's role, for --compare (default: of the model's run, else start)")
    add("--reward", metavar="MODULE:FUNCTION",
        help="also score the answers with a reward of yours, as train.py --reward would")
    add("--reward-seconds", type=float, default=30.0,
        help="time limit of one call of --reward, in seconds")
    add("--samples", type=int, default=0, help="answers per prompt, for pass@k")
    add("--noise-floor", action="store_true",
        help="rerun the prompt without persona, sampled, once per persona")
    add("--temperature", type=float, default=0.7, help="of --samples and --noise-floor")
    add("--fidelity", type=int, nargs="?", const=8, default=0, metavar="N",
        help="identify personas by their answers to N open questions (8 without a number)")
    add("--start-model",
        help="frozen reader of --fidelity (default: that of the model's run, else the model)")
    add_judge(add)
    add_compare(add)
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = "runs/compared" if args.compare else "runs/evaluation"
    return args


def add_judge(add):
    """The flags of PersonaGym, by `add` of a parser."""
    add("--personagym", metavar="FILE", help="PersonaGym's questions, graded by --judge-model")
    add("--judge", metavar="URL",
        help="OpenAI-compatible endpoint, key in JUDGE_API_KEY (default: in this process)")
    add("--judge-model", default="smollm2-135m", help="name at --judge, or a model as for --model")
    add("--judge-concurrency", type=int, default=4, help="questions asked of --judge at a time")
    add("--judge-tokens", type=int, default=16,
        help="room of a judge's reply; one cut off before its score is repeated with more")
    add("--judge-price", nargs=2, type=float, default=(0.0, 0.0), metavar=("IN", "OUT"),
        help="per million tokens")


def add_compare(add):
    """The flags that evaluate nothing, but read what is there."""
    add("--compare", nargs="+", metavar="DIR",
        help="evaluation folders to put side by side, into --out")
    add("--check-run", metavar="RUN",
        help="does a training run look right? Its metrics beside those of the kept runs")
    add("--looks", type=int, default=1,
        help="of --compare: checkpoints at which H3 is looked at; its interval is of 1 - 0.05 / N")
    add("--roles", nargs="+", help="names for the folders of --compare: start, rlvr, permix, ...")


LEAST = {"limit": 1, "seed": 0, "slots": 0, "max_new_tokens": 1, "samples": 0, "fidelity": 0,
         "looks": 1, "judge_concurrency": 1, "judge_tokens": 1, "judge_price": 0}
BESIDE = {  # flags that are read only beside another
    "roles": ["compare"], "looks": ["compare"], "reward_seconds": ["reward"],
    "start_model": ["fidelity"],
    "temperature": ["samples", "noise_floor"], "judge_concurrency": ["judge"],
    **dict.fromkeys(("judge", "judge_model", "judge_tokens", "judge_price"), ["personagym"])}


def check(args):
    """ValueError for flags that cannot mean what they say, or that nothing would read."""
    refuse_several()
    usual = vars(parse([]))
    given = {name: value for name, value in vars(args).items() if value != usual[name]}
    for name, value in given.items():
        flag, least = f"--{name.replace('_', '-')}", LEAST.get(name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and not one.strip():
                raise ValueError(f"{flag} is empty: give it a value, or leave it out")
            if least is not None and not least <= one < math.inf:
                raise ValueError(f"{flag} must be at least {least}, not {one}")
        if args.compare and name not in ("compare", "roles", "looks", "out", "seed"):
            raise ValueError(f"--compare does not read {flag}: leave it out")
        if args.check_run and name != "check_run":
            raise ValueError(f"--check-run does not read {flag}: leave it out")
        beside = BESIDE.get(name, given)
        if not given.keys() & beside:
            others = " or ".join(f"--{other.replace('_', '-')}" for other in beside)
            raise ValueError(f"{flag} does nothing without {others}")
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature must be a finite number above 0, not {args.temperature}")
    if args.judge and not args.judge.startswith(("http://", "https://")):
        raise ValueError(f"--judge must be a URL (http://localhost:8000/v1), not {args.judge}")
    out = Path(args.out).absolute()
    if not next(path for path in (out, *out.parents) if path.exists()).is_dir():
        raise ValueError(f"--out {args.out} is, or lies in, a file: give a folder")
    if out.resolve() in [Path(folder).resolve() for folder in args.compare or ()]:
        raise ValueError(f"--out {args.out} is a folder of --compare, whose report it would "
                         "overwrite: give another")
