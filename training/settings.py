"""What a run is told: the flags, and what may not be combined.

A flag means what it says in every arm. The defaults are those of the main job, measured on the
embedded model. Where a named loss (`--loss`) has its own numbers in its paper, those hold. Left
out: configuration files, since a run's config.json is one.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import grpo
import personas
import tasks
import weights
from common.command import Parser, note
from grpo import Loss
from training.checkpoints import newest
from training.monitor import TRACKERS
from weights import lora, templates

# name, default, help, and what else argparse should know
FLAGS = [
    ("method", "permix", "RL with personas mixed in, RL without, or imitation: of gold answers, "
     "of a teacher", {"choices": ["permix", "rlvr", "sft", "distill"]}),
    ("model", weights.EMBEDDED, "smollm2-135m, a Hugging Face folder or hub id, or a .gguf file "
     "(in parts: 'file.gguf.part*')", {}),
    ("chat-template", None, "for a base model, which has none: plain, or a file with a Jinja "
     "template", {}),
    ("task", "arithmetic", "arithmetic, facts, svamp, gsm8k, math, reasoning-gym:NAME[,NAME], a "
     ".jsonl file, or a folder (GSM8K, MATH, a saved dataset)", {}),
    ("columns", None, "what a file's or folder's columns are called: question=COLUMN,answer=COLUMN",
     {}),
    ("out", None, "run folder (default: runs/METHOD-TASK-seedN)", {}),
    ("resume", None, "run folder to continue with its own settings; what is given beside it is "
     "changed, and recorded in its config.json", {}),
    ("unset", [], "with --resume: a flag to set back to its default; may be repeated",
     {"action": "append", "metavar": "FLAG"}),
    ("steps", 34, "batches; each is --inner-epochs x --minibatches optimizer steps", {}),
    ("seed", 0, "of problems, personas and samples", {}),
    # mix
    ("persona-prob", None, "rho: share of prompts with a persona (default: 0.7 for permix, else 0)",
     {"type": float}),
    ("mix", "prompt", "one persona per group, or one per completion",
     {"choices": personas.MODES}),
    ("personas", "train", "training pool: train, conflict-train, paraphrases-train, or a .jsonl "
     "file", {}),
    # roll out
    ("prompts", None, "problems per step (default: 12 for generated tasks, else 64, since fewer of "
     "them teach)", {"type": int}),
    ("group-size", None, "completions per problem, G (default: 8; sft has one gold answer)",
     {"type": int}),
    ("max-new-tokens", None, "tokens of the longest completion (default: 32 for generated tasks, "
     "else 48)", {"type": int}),
    ("temperature", 0.6, "of sampling, and of the log-probs trained on; sft, whose text nobody "
     "sampled, is cross-entropy at 1", {}),
    ("stop", [], "a string that ends a completion; may be repeated", {"action": "append"}),
    ("prompt", None, "how a problem is asked (default: plain for generated tasks, else short)",
     {"choices": sorted(tasks.PROMPTS)}),
    ("teacher", None, "model that writes the completions of distill (default: the start model)",
     {}),
    ("dynamic-sampling", 0, "DAPO: at most so many further rounds of problems, until --prompts "
     "groups have unequal rewards", {}),
    # reward
    ("reward", "rewards:correctness", "module:function, called with (problem, text, persona=...)",
     {}),
    ("reward-seconds", 30.0, "time limit of one call of it, in seconds; what is late earns nothing",
     {}),
    ("truncated", "zero", "completions cut off: no reward, no loss, or kept",
     {"choices": ["zero", "mask", "keep"]}),
    ("overlong-buffer", 0, "DAPO: completions lose up to 1 over the last so many tokens before the "
     "limit", {}),
    # loss
    ("loss", None, "policy loss; naming one also sets advantage, normaliser and clips to its "
     "paper's, unless given (default: grpo's with those below)", {"choices": sorted(grpo.RECIPES)}),
    ("advantage", Loss.advantage, "baseline and scale", {"choices": grpo.CHOICES["advantage"]}),
    ("normaliser", Loss.normaliser, "a token's loss is divided by: all tokens, its completion's "
     "length, the length limit", {"choices": grpo.CHOICES["normaliser"]}),
    ("clip-low", Loss.clip_low, "the ratio may fall to 1 - this", {}),
    ("clip-high", Loss.clip_high, "the ratio may rise to 1 + this", {}),
    ("dual-clip", Loss.dual_clip, "bound on the ratio of bad tokens (dual-clip PPO)",
     {"type": float}),
    ("correction", None, "importance weights sampler -> trainer (default: none; truncate with "
     "--overlap)", {"choices": grpo.CHOICES["correction"]}),
    ("kl-coef", Loss.kl_coef, "weight of the KL to the start model under the same persona", {}),
    ("kl", Loss.kl, "its estimator", {"choices": grpo.CHOICES["kl"]}),
    ("kl-in", Loss.kl_in, "where it acts", {"choices": grpo.CHOICES["kl_in"]}),
    ("entropy-coef", Loss.entropy_coef, "weight of the entropy bonus", {}),
    ("anchor-coef", 0.0, "expressivity anchor (ours): weight of KL(start || policy) on role-play "
     "answers, or as the next two say", {}),
    ("anchor-on", "roleplay", "the anchor holds the start model's answers to role-play, or to the "
     "training problems that it solves (after DPH-RL)", {"choices": ["roleplay", "solved"]}),
    ("anchor-loss", "kl", "the anchor's loss: the KL, or cross-entropy on its answers",
     {"choices": ["kl", "ce"]}),
    ("anchor-count", 4, "the anchor's answers an optimizer step", {}),
    ("anchor-answers", 80, "its answers prepared before training", {}),
    ("anchor-tokens", 40, "their length limit, in tokens", {}),
    # step
    ("learning-rate", None, "AdamW's, after warm-up (default: 3e-5 for generated tasks, else "
     "6e-5; ten times that with --lora-rank)", {"type": float}),
    ("lora-rank", 0, "train low-rank updates of this rank, the model stays frozen; 0: all weights",
     {}),
    ("lora-alpha", 32.0, "they are scaled by this, divided by the rank", {}),
    ("lora-targets", ",".join(lora.TARGETS), "the linear layers that get them", {}),
    ("optimizer", "adamw", "adamw8bit keeps its moments in 8 bits, and needs torchao",
     {"choices": ["adamw", "adamw8bit"]}),
    ("warmup", 2, "optimizer steps of linear warm-up", {}),
    ("max-grad-norm", 1.0, "norm that a step's whole gradient is cut down to; inf: none", {}),
    ("inner-epochs", 1, "how often a batch is gone through", {}),
    ("minibatches", 1, "optimizer steps each time: the batch's groups in so many parts (PPO)", {}),
    # where it computes
    ("dtype", "auto", "of compute; float16 has a loss scale",
     {"choices": ["auto", *weights.DTYPES]}),
    ("device", "auto", "auto: the GPU if there is one, else the CPU",
     {"choices": weights.DEVICES}),
    ("micro-tokens", 0, "packed tokens in one forward and backward; 0: as suits the device", {}),
    ("memory", 0.0, "GB a rank may take: sizes the micro-batches to fit, in place of "
     "--micro-tokens, and prints the estimate; a resumed run keeps their size", {}),
    ("recompute", False, "recompute layers in the backward: less memory, more time", {}),
    ("shard", 0, "ranks that share one copy of masters and AdamW's moments; 0: all of them", {}),
    ("slots", 0, "completions decoded together; 0: as suits the device", {}),
    ("no-cuda-graphs", False, "on a GPU: decode step by step, without recording", {}),
    ("overlap", False, "sample a step's batch while the one before is trained on, with a copy of "
     "the weights: one step off-policy, corrected", {}),
    # what is kept and said
    ("eval-task", None, "task to evaluate on; a file is used whole (default: --task's test split)",
     {}),
    ("eval-problems", 100, "held-out problems before and after; 0: no evaluation", {}),
    ("eval-pool", "test", "who speaks in the evaluation: test, conflict-test, paraphrases-test, or "
     "a .jsonl file", {}),
    ("eval-personas", None, "how many of them, evenly from the strata (default: 9, or all)",
     {"type": int}),
    ("save-every", 20, "steps between checkpoints", {}),
    ("keep", 2, "checkpoints kept", {}),
    ("async-save", False, "write checkpoints while training goes on, from a copy of the state", {}),
    ("profile", False, "say where a step's time goes, beside the time of its matmuls alone", {}),
    ("tracker", None, "also log there", {"choices": list(TRACKERS)}),
    ("progress", False, "progress bar even without a terminal, in place of a line a step", {}),
]


IDENTITY = ("model", "task", "method", "seed", "dtype")             # in every config.json
FIXED = (*IDENTITY, "chat_template", "lora_rank", "lora_alpha", "lora_targets",
         "optimizer")                                   # for the whole of a run


def parser() -> argparse.ArgumentParser:
    p = Parser(description="PerMix-RLVR: persona-mixed RL with verifiable rewards.")
    for name, default, text, more in FLAGS:
        if isinstance(default, bool):
            more = {"action": "store_true"}
        elif isinstance(default, int | float | str):
            text += f" (default: {default})"
            more = more if "choices" in more else {"type": type(default)}
        p.add_argument(f"--{name}", default=default, help=text, **more)
    return p


def settings(argv: list[str] | None, quiet: bool = False) -> argparse.Namespace:
    """The settings. First come the flags, then the loss's recipe, a resumed run's, the defaults.

    quiet: without the notes on flags that do nothing. Raises ValueError where settings contradict
    each other.
    """
    p = parser()
    first, _ = p.parse_known_args(argv)
    told = {name for name, value in vars(first).items() if value != p.get_default(name)}
    if empty := [name for name in told if getattr(first, name) == ""]:
        raise ValueError(f"--{empty[0].replace('_', '-')} is empty: give a value, or leave it out")
    before = settings_before(first, p) if first.resume else {}
    unset = {flag.strip("-").replace("-", "_") for flag in first.unset}
    if before and (unknown := unset - vars(first).keys()):
        raise ValueError(f"--unset {unknown.pop()}: train.py has no such flag; --help lists them")
    p.set_defaults(**{name: value for name, value in before.items() if name not in unset})
    if first.overlap and not before.get("overlap"):
        p.set_defaults(correction=None)                 # as --overlap wants it
    if first.loss:
        p.set_defaults(**grpo.RECIPES[first.loss])
    args = p.parse_args(argv)
    if args.chat_template:
        args.chat_template = templates.read(args.chat_template)     # kept for a resumed run
    for name in FIXED:
        old = before.get(name, p.get_default(name))     # an older run knew fewer flags
        if before and getattr(args, name) != old and not (
                name in ("model", "task") and moved(old, getattr(args, name))):
            raise ValueError(f"--{name.replace('_', '-')} of a resumed run is "
                             f"{str(old)[:60]!r}; for another one start a new run")
    if args.memory and "memory" not in told:            # a resumed run's, sized already
        args.micro_tokens = before.get("micro_tokens", 0)
    elif args.memory or before.get("memory") and "micro_tokens" not in told:
        args.micro_tokens = 0                           # to be sized, or no longer by --memory
    small = tasks.is_generated(args.task)               # the embedded model often solves them
    prompt, longest = tasks.usual(args.task)
    defaults = {"group_size": 1 if args.method == "sft" else 8, "prompts": 12 if small else 64,
             "prompt": prompt, "max_new_tokens": longest,
             "learning_rate": (3e-5 if small else 6e-5) * (10 if args.lora_rank else 1),
             "persona_prob": 0.7 if args.method == "permix" else 0.0,
             "correction": "truncate" if args.overlap else "none", "loss": "grpo"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    for words in () if quiet else notes(args, told):
        note(f"train.py: {words}")
    return args


def settings_before(first: argparse.Namespace, p: argparse.ArgumentParser) -> dict:
    """The settings of the run that `--resume` names, each of the kind that its flag gives."""
    path = Path(first.resume) / "config.json"
    if not path.is_file():
        raise ValueError(f"{first.resume} is not a run folder: it has no config.json")
    try:
        before = dict(json.loads(path.read_text())["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a run's: give the folder that train.py wrote") from error
    if before.get("advantage") == "std_sample":         # its name until November 2026
        before["advantage"] = "std"
    for action in p._actions[1:]:                       # the first is --help
        value = before.get(action.dest, None if action.dest in IDENTITY else action.default)
        if not is_for(action, value):
            raise ValueError(f"{path} has {value!r} for {action.dest}, which train.py does not "
                             "write: put the file back as it was")
    if first.out and Path(first.out).resolve() != Path(first.resume).resolve():
        raise ValueError(f"--resume {first.resume} goes on in its own folder: leave out --out")
    return before


def moved(old: str, new: str) -> bool:
    """Whether a file or folder that was given is gone, and one of its name is given now."""
    before, now = Path(old), Path(new)
    return (before.is_absolute() and before.name == now.name
            and now.exists() and not before.exists())


def is_for(action: argparse.Action, value) -> bool:
    """Whether a value of a config.json is of the kind that its flag gives."""
    if value is None:
        return action.default is None
    if action.choices:
        return value in list(action.choices)
    if isinstance(action.default, list):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    kind = bool if action.nargs == 0 else action.type or str
    return type(value) is kind or kind is float and type(value) is int


def loss_of(args: argparse.Namespace) -> Loss:
    """The flags of the same names as Loss's fields. Raises ValueError where they contradict."""
    names = [field.name for field in fields(Loss) if field.name != "name"]
    return Loss(args.loss, **{name: getattr(args, name) for name in names})


# --------------------------------------------------------------------------------------------------
# What cannot mean what it says

BOUNDS = {
    (1, 10**9): ("steps", "save_every", "keep"),
    (0, 10**9): ("warmup", "micro_tokens", "shard"), (0, 10**5): ("lora_rank",),
    (1, 10**6): ("prompts", "group_size", "max_new_tokens", "minibatches", "anchor_count",
                 "anchor_answers", "anchor_tokens", "eval_personas"),
    (0, 10**6): ("overlong_buffer", "eval_problems", "memory", "slots"),
    (1, 1000): ("inner_epochs", "dual_clip"), (1e-6, 10**6): ("lora_alpha",),
    (0, 1000): ("kl_coef", "entropy_coef", "anchor_coef"), (0, 100): ("dynamic_sampling",),
    (0, 10**17): ("seed",), (0, 1): ("persona_prob",),
    (0.01, 100): ("temperature",), (1e-30, 1): ("learning_rate",),
    (1e-30, math.inf): ("max_grad_norm",), (0.001, math.inf): ("reward_seconds",),
    (0, math.inf): ("clip_low", "clip_high")}


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, with what to do instead, for settings that cannot mean what they say."""
    for (least, most), names in BOUNDS.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not least <= value <= most:        # nan is not either
                raise ValueError(f"--{name.replace('_', '-')} must be between {least} and {most}, "
                                 f"not {value}")
    for refused, reason in refusals(args):
        if refused:
            raise ValueError(reason)
    loss_of(args)


def refusals(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """(refused, the reason and what to do instead)"""
    imitates, world = args.method in ("sft", "distill"), int(os.environ.get("WORLD_SIZE", 1))
    rl_only = (args.loss, args.advantage, args.correction, args.inner_epochs, args.minibatches,
               args.overlong_buffer, args.kl_in)
    steps = args.inner_epochs * args.minibatches
    groups = args.prompts // world * (1 if personas.shares_prompt(args.mix) else args.group_size)
    recipe, clips = grpo.RECIPES[args.loss], (args.clip_low, args.clip_high)
    usual = (Loss.clip_low, Loss.clip_high), (recipe.get("clip_low"), recipe.get("clip_high"))
    done = newest(Path(args.resume) / "checkpoints") if args.resume else 0
    goes_on = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return [
        (args.out and not goes_on and (Path(args.out) / "config.json").exists(),
         f"{args.out} holds a run already: continue it with --resume {args.out}, or choose another "
         "--out"),
        (done > args.steps,
         f"{args.resume} has {done} steps already: give --steps {done} or more"),
        (args.resume and not done and (Path(args.resume) / "model").is_dir(),
         f"{args.resume} has a model, but no whole checkpoint to go on from: put its checkpoints "
         "back, or train that model further in a run of its own"),
        (unknown := [t for t in args.lora_targets.split(",") if t not in lora.TARGETS],
         f"--lora-targets {', '.join(unknown)}: give some of {','.join(lora.TARGETS)}"),
        (args.optimizer == "adamw8bit" and not find_spec("torchao"),
         "--optimizer adamw8bit needs torchao: pip install torchao"),
        (args.method == "rlvr" and args.persona_prob,
         "--method rlvr has no personas: use permix with --persona-prob, or leave it out"),
        (args.prompts * args.group_size > 10**6,
         f"--prompts {args.prompts} x --group-size {args.group_size} are more than a million "
         "completions a step: give fewer"),
        (not args.overlong_buffer < args.max_new_tokens,
         "--overlong-buffer must be shorter than --max-new-tokens"),
        (args.teacher and args.method != "distill",
         "--teacher writes the completions of --method distill, no other's"),
        (args.dynamic_sampling and imitates,
         f"--dynamic-sampling wants unequal rewards; {args.method} imitates what is correct"),
        (args.overlap and imitates,
         f"--overlap is for a policy that samples; {args.method} imitates others"),
        (imitates and rl_only != ("grpo", "mean", "none", 1, 1, 0, "loss"),
         f"--method {args.method} is cross-entropy on the correct completions: leave out --loss, "
         "--advantage, --correction, --inner-epochs, --minibatches, --overlong-buffer, --kl-in"),
        (args.group_size == 1 and not imitates,
         "a group of 1 has no siblings, so its advantage is always 0: give --group-size 2"),
        (args.overlap and args.dynamic_sampling,
         "--overlap cannot go with --dynamic-sampling, which counts over ranks while they train"),
        (args.overlap and args.profile,
         "--profile tells sampling from training; --overlap does both at once: choose one"),
        (args.minibatches > groups,
         f"--minibatches {args.minibatches} is more than the {groups} groups that a process has"),
        (args.loss == "reinforce" and steps > 1,
         "reinforce has no ratio, so a batch's second optimizer step is wrong: use grpo"),
        (steps == 1 and not args.resume and (args.dual_clip is not None or clips not in usual),
         "with one optimizer step a batch the ratio is 1, and --clip-low, --clip-high and "
         "--dual-clip do nothing: give --minibatches 2 or --inner-epochs 2 too"),
        (args.shard and world % args.shard,
         f"--shard {args.shard} must divide the {world} processes"),
        (args.prompts % world,
         f"--prompts {args.prompts} must be a multiple of the {world} processes"),
    ]


def notes(args: argparse.Namespace, told: set[str]) -> Iterator[str]:
    """What may be given and yet does nothing. Arms share a command line, so it is not refused.

    told: the flags of this command line that are not at their default.
    """
    alone, sft = int(os.environ.get("WORLD_SIZE", 1)) == 1, args.method == "sft"
    steps = args.inner_epochs * args.minibatches
    idle = [
        (not args.resume, ("unset",), "without --resume"),
        (not args.persona_prob, ("mix",), "without --persona-prob"),
        (not args.persona_prob and not (args.anchor_coef and args.anchor_on == "roleplay"),
         ("personas",), "without --persona-prob"),
        (sft, ("temperature", "truncated"), "with --method sft, for which nobody samples"),
        (sft and not args.eval_problems, ("stop",), "with --method sft, for which nobody samples"),
        (not args.kl_coef, ("kl", "kl_in"), "without --kl-coef"),
        (not args.anchor_coef, ("anchor_on", "anchor_loss", "anchor_count", "anchor_answers",
                                "anchor_tokens"), "without --anchor-coef"),
        (args.anchor_on == "solved", ("anchor_tokens",), "with --anchor-on solved, whose limit is "
         "--max-new-tokens"),
        (not args.lora_rank, ("lora_alpha", "lora_targets"), "without --lora-rank"),
        (args.memory, ("micro_tokens",), "with --memory, which sizes the micro-batches"),
        (alone, ("shard",), "in one process"),
        (args.device == "cpu", ("no_cuda_graphs",), "on a CPU"),
        (1 in (args.steps, args.save_every), ("overlap",), "with --steps 1 or --save-every 1"),
        (args.steps < 3, ("profile",), "before a third step"),
        (not args.eval_problems, ("eval_personas",), "with --eval-problems 0"),
    ]
    for does_nothing, names, where in idle:
        for name in told.intersection(names) if does_nothing else ():
            yield f"--{name.replace('_', '-')} does nothing {where}"
    if "loss" in told and args.loss != "reinforce" and steps == 1:
        yield (f"with one optimizer step a batch the ratio is 1 and the clip of {args.loss} does "
               "nothing; --minibatches 2 gives it work")
    if "warmup" in told and args.warmup > args.steps * steps:
        yield (f"--warmup {args.warmup} is longer than the run's {args.steps * steps} optimizer "
               "steps, so --learning-rate is never reached")
