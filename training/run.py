"""What surrounds the algorithm: what a run works with, its folder, evaluation before and after."""

import json
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

from transformers import PreTrainedTokenizerBase

import evaluate
import personas
import tasks
import weights
from common.command import note, one_line
from common.files import claim, commit, write_atomically
from common.ranks import from_first, ranks, wait
from evaluation import bands, report
from grpo import Loss
from model import Transformer
from rewards import CORRECTNESS, Rewarder
from rollout import Sampler, SamplingParams
from sampling.cache import slots_for
from training import monitor
from training.anchor import Anchor
from training.checkpoints import newest
from training.checks import check, check_weights
from training.minibatches import micro_tokens_for
from training.settings import loss_of, settings
from training.stop import Stop
from weights import lora, templates


@dataclass(frozen=True)
class Job:
    """What a run works with. All of it is read, and refused, before anything is spent."""
    args: object                        # the settings, an argparse.Namespace
    loss: Loss
    sampling: SamplingParams
    model: Transformer                  # the one that is trained
    author: Transformer | None          # who writes the completions; None: the gold answers
    reference: Transformer | None       # the frozen start model, where a KL wants it
    tokenizer: PreTrainedTokenizerBase
    problems: list[tasks.Problem]       # with their question as it is asked
    pool: list[personas.Persona]
    rewarder: Rewarder
    held_out: tuple[list, list] | None  # problems and personas of the evaluation
    anchor: Anchor | None = None        # see `anchored`
    stop: Stop = field(default_factory=Stop)

    @property
    def imitates(self) -> bool:
        """sft and distill: another wrote what is correct, and it is learned by heart."""
        return self.author is not self.model

    def sampler(self, model: Transformer, longest_prompt: int = 0) -> Sampler:
        """longest_prompt: in tokens, of all its calls, which bounds the slots; 0: of the first."""
        slots = self.args.slots
        if longest_prompt:
            slots = slots or slots_for(model, longest_prompt + self.args.max_new_tokens)
        return Sampler(model, slots, not self.args.no_cuda_graphs)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest question under the longest persona, both by their characters."""
        pool = self.pool if self.args.persona_prob else []
        persona = max(pool, key=lambda p: len(p.text), default=None)
        question = max(self.problems, key=lambda p: len(p.question)).question
        return len(personas.prompt_ids(self.tokenizer, question, persona))

    @property
    def temperature(self) -> float:
        """Of the log-probs trained on: the one that the text was sampled at, also a teacher's.

        At 1 a teacher's text, sampled at 0.6, would teach a policy that is sharper than its
        teacher. Gold answers come from no sampler: they are learned by plain cross-entropy.
        """
        return self.args.temperature if self.author else 1.0


def read(args) -> Job:
    """Everything that the flags name. Raises ValueError or OSError in one line."""
    if ranks()[0]:
        wait()                          # until rank 0 has fetched what was not there
    model, tokenizer = weights.load(args.model, args.dtype, args.device, args.chat_template)
    model.checkpointing = args.recompute
    if not args.memory:                                 # which sizes them, see training/memory.py
        args.micro_tokens = args.micro_tokens or micro_tokens_for(model)
    args.dtype = str(model.dtype).removeprefix("torch.")    # what auto meant, for a resumed run
    check_weights(args.model, model)
    if args.lora_rank:
        lora.add(model, args.lora_rank, args.lora_alpha, args.lora_targets.split(","), args.seed)
    asked = args.eval_task or args.task
    tasks.check_columns(args.columns, args.task, asked)
    whole = not tasks.is_file_of(args.task, asked)      # else one file is split between the two
    problems = tasks.load(args.task, "train", args.seed, whole=whole, columns=args.columns)
    held_out = held_out_of(args, problems, whole) if args.eval_problems or args.eval_task else None
    problems = tasks.put(problems, args.prompt)
    pool = personas.load(args.personas, "train")
    personas.check_disjoint(pool, personas.held_out() + personas.load(args.eval_pool, "test"))
    n = args.group_size if personas.shares_prompt(args.mix) else 1
    sampling = SamplingParams(n, args.max_new_tokens, args.temperature, stop=tuple(args.stop))
    rewarder = Rewarder(args.reward, args.reward_seconds)
    if args.tracker:
        monitor.tracker_package(args.tracker)
    reference = start_model(args, model, tokenizer) if args.kl_coef else None
    match args.method:
        case "sft":
            author = None
            templates.turn_end(tokenizer, model.c.stop_ids)      # refused now if there is none
        case "distill" if args.teacher:
            author = weights.load_beside(args.teacher, tokenizer, args.dtype, args.device)
            check_weights(args.teacher, author)
        case "distill":
            author = reference or start_model(args, model, tokenizer)
        case _:
            author = model
    job = Job(args, loss_of(args), sampling, model, author, reference, tokenizer, problems, pool,
              rewarder, held_out if args.eval_problems else None)
    check(job)
    if not ranks()[0]:
        wait()
    note(f"{tasks.counts(args.task, problems)}; {personas.counts(args.personas, pool)}")
    if job.held_out:
        note(f"evaluation: {tasks.counts(asked, held_out[0])}; "
             f"{personas.counts(args.eval_pool, held_out[1])}")
    return job


def start_model(args, model: Transformer, tokenizer) -> Transformer:
    """Read anew from --model, so that no checkpoint can have changed it; adapters do not."""
    if args.lora_rank:
        return lora.without(model)
    return weights.load_beside(args.model, tokenizer, args.dtype, args.device)


def anchored(job: Job) -> Job:
    """The job with the anchor's answers, where --anchor-coef wants them.

    They are sampled now, which takes its time; `read` only looks. The start model is dropped after.
    """
    if not job.args.anchor_coef:
        return job
    start = job.reference or start_model(job.args, job.model, job.tokenizer)
    return replace(job, anchor=Anchor(job.sampler(start), job))


# --------------------------------------------------------------------------------------------------
# The folder


def run_folder(args) -> tuple[Path, ExitStack]:
    """The run's folder, made and described by config.json, the same on all ranks; and the lock on
    it, which rank 0 has to close (see files.claim).

    Raises ValueError if another process works in it. Restarted by torchrun (--max-restarts), a run
    with --out goes on where it was.
    """
    task = re.sub(r"[^\w.+-]+", "-", Path(args.task).stem)[:60]
    name = f"{args.method}-{task}-seed{args.seed}"
    out = Path(args.resume or args.out or Path("runs") / name)
    number, alone = 1, ExitStack()
    if ranks()[0] == 0:
        while not (args.resume or args.out) and (out / "config.json").exists():
            number += 1
            out = out.with_name(f"{name}-{number}")
        if Path(args.model).is_dir() and Path(args.model).resolve() == (out / "model").resolve():
            raise ValueError(f"--model {args.model} is where the run writes its own model: choose "
                             "another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be made: {error.strerror}") from error
        alone = claim(out)
        versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
        versions["python"] = sys.version.split()[0]
        settings = vars(args) | {"resume": None, "unset": [], "out": str(out)}
        config = {"settings": settings, "method": args.method, "command": " ".join(sys.argv),
                  "commit": commit(), "versions": versions, "resumed": resumed(out, settings)}
        write_atomically(out / "config.json", json.dumps(config, indent=1))
    return from_first(out), alone


def resumed(out: Path, settings: dict) -> list[dict]:
    """What config.json keeps of the run so far: for each time it was resumed, after which step, and
    the command, commit and changed settings [old, new] of before."""
    path = out / "config.json"
    if not path.is_file():
        return []
    old = json.loads(path.read_text())
    changed = {name: [value, settings.get(name)] for name, value in old["settings"].items()
               if value != settings.get(name)}
    last = {"after": newest(out / "checkpoints"), "changed": changed}
    return [*old.get("resumed", []), last | {key: old.get(key) for key in ("command", "commit")}]


# --------------------------------------------------------------------------------------------------
# Evaluation before and after


def held_out_of(args, trained: list[tasks.Problem], whole: bool,
                ) -> tuple[list[tasks.Problem], list[personas.Persona]]:
    """The evaluation's problems and personas: the same for every seed and arm, asked as in
    training. Raises ValueError where a file asks what is trained on."""
    asked = args.eval_task or args.task
    problems = tasks.load(asked, "test", 0, args.eval_problems or None,
                          whole=whole, columns=args.columns)
    if asked != args.task or tasks.is_local(asked):
        tasks.check_disjoint(trained, problems)
    pool = personas.load(args.eval_pool, "test")
    count = args.eval_personas or min(9, len(pool))
    if count > len(pool):
        raise ValueError(f"--eval-personas {count}: {args.eval_pool} has {len(pool)}")
    return tasks.put(problems, args.prompt), personas.few(pool, count)


def evaluated(job: Job, folder: Path, steps: int) -> dict:
    """The results of evaluate.py on what is held out. What has been done already is read back.

    All ranks sample; rank 0 writes.
    """
    args, (problems, speakers) = job.args, job.held_out
    info = {"task": args.eval_task or args.task, "prompt": args.prompt,
            "max_new_tokens": args.max_new_tokens, "steps": steps,
            "stop": list(job.sampling.stops(job.tokenizer))}
    asked = info | evaluate.digests(problems, speakers)
    if (done := already_there(folder)) and asked.items() <= done.items():
        return done
    info |= {"model": args.model} | evaluate.compare.arm_of({"settings": vars(args)})
    if not steps:
        info["method"] = "start"
    mine = None if args.reward == CORRECTNESS else args.reward
    params = evaluate.EvalParams(args.seed, args.max_new_tokens, reward=mine,
                                 reward_seconds=args.reward_seconds, stop=job.sampling.stop)
    return evaluate.evaluate(job.sampler(job.model), job.tokenizer, problems, speakers, params,
                             None if ranks()[0] else folder, info)


def already_there(folder: Path) -> dict | None:
    """The results in rank 0's folder: the others may have none, and must not go another way."""
    path = folder / "results.json"
    return from_first(json.loads(path.read_text()) if path.is_file() else None)


def before_after(args, out: Path, before: dict, after: dict) -> str:
    """The table and the line that the main job ends with."""
    scores = {"mean_accuracy": "mean accuracy over personas", "no_persona_accuracy": "without one",
              "worst_persona_accuracy": "of the worst persona", "pss": "pss: worst over best",
              "persona_sd": "persona_sd: true spread, points", "mean_reward": "mean reward"}
    if before.get("reward") != after.get("reward"):
        scores.pop("mean_reward")
    rows = [(words, *(report.number(name, x) for x in pair)) for name, words in scores.items()
            if None not in (pair := (before.get(name), after.get(name)))]
    for old, new in zip(before["personas"], after["personas"], strict=True):
        pair = (report.number("accuracy", row["accuracy"]) for row in (old, new))
        rows.append((f"  {old['name']} ({old['stratum']})", *pair))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:{width}}  {old:>6}  {new:>6}" for name, old, new in rows]
    return "\n".join([f"{'':{width}}  before   after", *lines, *in_line(args, out, after)])


def side_by_side(folder: Path) -> None:
    """Start and trained on one page: report.html in the folder `evaluation` of a run.

    No page, and a note, where a run was resumed with what makes the two no pair (another --reward).
    """
    try:
        evaluate.compare.folders([folder / when for when in ("before", "after")], folder)
    except ValueError as error:
        (folder / "report.html").unlink(missing_ok=True)    # of what was there before
        note(f"no page of start and trained: {one_line(error)}")


# What decides where a run ends. Another dtype or another micro-batch only rounds otherwise.
DECIDES = (*bands.SAME, "method", "steps", "persona_prob", "mix", "personas", "anchor_coef",
           "optimizer", "eval_task", "eval_pool")


def in_line(args, out: Path, after: dict) -> list[str]:
    """What to say of a run with train.py's own settings, a line: its mean accuracy beside that of
    the runs in results/job (of another method: results/main), on the problems and personas of both.
    Of another run, nothing.

    In line is within three standard deviations over the kept seeds.
    """
    try:
        own = vars(settings(["--method", args.method], quiet=True))
    except ValueError:                                  # that run cannot be on so many processes
        return []
    files = f"{args.method}-seed*/results.json"
    kept = [*bands.RESULTS.glob(f"job/{files}")] or [*bands.RESULTS.glob(f"main/{files}")]
    runs = [json.loads(file.read_text()) for file in sorted(kept)]
    if len(runs) < 3 or any(getattr(args, name) != own[name] for name in DECIDES):
        return []
    names = runs[0]["correct"].keys() & {row["name"] for row in after["personas"][1:]}
    ids = {item["id"] for item in runs[0]["items"]} & {item["id"] for item in after["items"]}

    def accuracy(results: dict) -> float:
        marks = [mark for name in names for item, mark in
                 zip(results["items"], results["correct"][name], strict=True) if item["id"] in ids]
        return marks.count("1") / len(marks)

    here, theirs = accuracy(after), [accuracy(run) for run in runs]
    off = abs(here - mean(theirs)) > 3 * stdev(theirs)
    words = f"not in line: look at evaluate.py --check-run {out}" if off else "in line"
    return [f"{len(runs)} stored runs of these settings ended at a mean accuracy of "
            f"{min(theirs):.2f} to {max(theirs):.2f}, this one at {here:.2f}: {words}"]
