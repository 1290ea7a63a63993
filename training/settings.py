"""What a run is told: the flags, what may not be combined, and the folder with its config.json.

A flag means what it says in every arm. The numbers are those of the main job, measured on the embedded model; where a
named loss (`--loss`) has its own in its paper, those. Left out: configuration files, since config.json is one.
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import grpo
import tasks
import weights
from common.command import Parser
from common.files import commit, write_atomically
from kernels.attention import flash_attn_with_kvcache
from training import monitor


def parser() -> argparse.ArgumentParser:
    p = Parser(description="PerMix-RLVR: persona-mixed RL with verifiable rewards.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def add(flag, default, text, **more):
        kind = {} if "choices" in more or default is None or "action" in more else {"type": type(default)}
        p.add_argument(f"--{flag}", default=default, help=text, **kind | more)

    add("method", "permix", "RL with personas mixed in, RL without, or imitation: of gold answers, of a teacher",
        choices=["permix", "rlvr", "sft", "distill"])
    add("model", weights.EMBEDDED, "smollm2-135m, a Hugging Face folder or hub id, or a .gguf file (in parts: "
        "'file.gguf.part*')")
    add("task", "arithmetic", "arithmetic, facts, svamp, gsm8k, math, or a .jsonl file")
    add("out", None, "run folder (default: runs/METHOD-TASK-seedN)")
    add("resume", None, "run folder to continue with its own settings")
    add("steps", 34, "batches; each is --inner-epochs optimizer steps")
    add("seed", 0, "of problems, personas and samples")
    add("persona-prob", None, "rho: share of prompts with a persona (default: 0.7 for permix, else 0)", type=float)
    add("mix", "prompt", "one persona a group, or one a completion", choices=["prompt", "rollout"])
    add("personas", "train", "training pool: train, conflict-train, paraphrases-train, or a .jsonl file")
    add("prompts", None, "problems a step (default: 12 for generated tasks, else 64, since fewer of them teach)",
        type=int)
    add("group-size", None, "completions a problem, G (default: 8; sft has one gold answer)", type=int)
    add("max-new-tokens", None, "length limit of a completion (default: 32 for generated tasks, else 48)", type=int)
    add("temperature", 0.6, "of sampling, and of the log-probs trained on")
    add("prompt", None, "how a problem is asked (default: plain for generated tasks, else short)",
        choices=sorted(tasks.PROMPTS))
    add("reward", "rewards:correctness", "module:function, called with (problem, completion text)")
    add("teacher", None, "model that writes the completions of distill (default: the start model)")
    add("learning-rate", None, "AdamW's, after warm-up (default: 3e-5 for generated tasks, else 6e-5)", type=float)
    add("warmup", 2, "steps of linear warm-up")
    add("max-grad-norm", 1.0, "gradient clipping")
    add("loss", None, "policy loss; naming one also sets advantage, normaliser and clips to its paper's, unless given "
        "(default: grpo's with those below)", choices=sorted(grpo.RECIPES))
    add("advantage", "mean", "baseline and scale", choices=grpo.ADVANTAGES)
    add("normaliser", "token", "a token's loss is divided by: all tokens, its completion's length, the length limit",
        choices=grpo.NORMALISERS)
    add("clip-low", 0.2, "the ratio may fall to 1 - this")
    add("clip-high", 0.2, "the ratio may rise to 1 + this")
    add("dual-clip", None, "bound on the ratio of bad tokens (dual-clip PPO)", type=float)
    add("dynamic-sampling", 0, "DAPO: at most so many further rounds of problems, until --prompts groups have unequal "
        "rewards")
    add("overlong-buffer", 0, "DAPO: completions lose up to 1 over the last so many tokens before the limit")
    add("inner-epochs", 1, "optimizer steps on each batch")
    add("truncated", "zero", "completions cut off: no reward, no loss, or kept", choices=["zero", "mask", "keep"])
    add("correction", None, "importance weights sampler -> trainer (default: none; truncate with --overlap)",
        choices=["none", "truncate", "mask"])
    add("kl-coef", 0.0, "weight of the KL to the start model under the same persona")
    add("kl", "k3", "its estimator", choices=["k1", "k2", "k3"])
    add("kl-in", "loss", "where it acts", choices=["loss", "reward"])
    add("entropy-coef", 0.0, "weight of the entropy bonus")
    add("anchor-coef", 0.0, "expressivity anchor (ours): weight of KL(start || policy) on role-play answers")
    add("anchor-count", 4, "role-play answers a step")
    add("anchor-answers", 80, "role-play answers prepared before training")
    add("anchor-tokens", 40, "their length limit")
    add("dtype", "auto", "of compute; float16 has a loss scale", choices=["auto", *weights.DTYPES])
    add("device", "auto", "auto: the GPU if there is one, else the CPU", choices=weights.DEVICES)
    add("micro-tokens", 1024, "packed tokens in one forward and backward")
    add("memory", 0.0, "GB a rank may take: sizes the micro-batches to fit, in place of --micro-tokens")
    add("recompute", False, "recompute layers in the backward: less memory, more time", action="store_true")
    add("shard", 0, "ranks that share one copy of masters and AdamW's moments; 0: all of them")
    add("slots", 96, "completions decoded together")
    add("cuda-graphs", False, "decode steps as CUDA graphs (never run by us)", action="store_true")
    add("eval-task", None, "task to evaluate on (default: --task's test split)")
    add("eval-problems", 50, "held-out problems before and after; 0: no evaluation")
    add("eval-personas", 9, "how many test personas, evenly from the strata")
    add("save-every", 20, "steps between checkpoints")
    add("keep", 2, "checkpoints kept")
    add("async-save", False, "write checkpoints while training goes on, from a copy of the state",
        action="store_true")
    add("overlap", False, "sample a step's batch while the one before is trained on, with a copy of the weights: one "
        "step off-policy, corrected", action="store_true")
    add("profile", False, "say where a step's time goes, beside the time of its matmuls alone", action="store_true")
    add("tracker", None, "also log there", choices=list(monitor.TRACKERS))
    add("progress", False, "progress bar even without a terminal", action="store_true")
    return p


def settings(argv: list[str] | None) -> argparse.Namespace:
    """Flags over the loss's recipe over a resumed run's settings over the defaults; ValueError where they clash."""
    p = parser()
    first, _ = p.parse_known_args(argv)
    if first.resume:
        path = Path(first.resume) / "config.json"
        if not path.is_file():
            raise ValueError(f"{first.resume} is not a run folder: it has no config.json")
        before = json.loads(path.read_text()).get("settings")
        if not before:
            raise ValueError(f"{path} is not a run's: give the folder that train.py wrote")
        if first.out and Path(first.out).resolve() != Path(first.resume).resolve():
            raise ValueError(f"--resume {first.resume} goes on in its own folder: leave out --out")
        p.set_defaults(**before)
        if first.overlap and not before.get("overlap"):
            p.set_defaults(correction=None)             # as --overlap wants it, not as the run was without
    if first.loss:
        p.set_defaults(**grpo.RECIPES[first.loss])
    args = p.parse_args(argv)
    for name in ("model", "task", "method", "seed", "dtype") if first.resume else ():
        if getattr(args, name) != before[name]:
            raise ValueError(f"--{name} of a resumed run is {before[name]}; for another one start a new run")
    small = args.task in tasks.GENERATED                # what the embedded model solves often, in few words
    unset = {"loss": "grpo", "group_size": 1 if args.method == "sft" else 8, "prompts": 12 if small else 64,
             "prompt": "plain" if small else "short", "max_new_tokens": 32 if small else 48,
             "learning_rate": 3e-5 if small else 6e-5, "persona_prob": 0.7 if args.method == "permix" else 0.0,
             "correction": "truncate" if args.overlap else "none"}   # with --overlap the samples are of weights before
    for name, value in unset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    return args


AT_LEAST = {
    1: ("steps", "prompts", "group_size", "max_new_tokens", "inner_epochs", "micro_tokens", "slots", "save_every",
        "keep", "eval_personas", "anchor_count", "anchor_answers", "anchor_tokens"),
    0: ("seed", "dynamic_sampling", "overlong_buffer", "kl_coef", "entropy_coef", "anchor_coef", "memory", "shard")}


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, with what to do instead, for settings that cannot mean what they say."""
    imitates, world = args.method in ("sft", "distill"), int(os.environ.get("WORLD_SIZE", 1))
    for least, names in AT_LEAST.items():
        for name in names:
            if not getattr(args, name) >= least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    refusals = (
        (args.method == "rlvr" and args.persona_prob,
         "--method rlvr has no personas: use permix with --persona-prob, or leave it out"),
        (not 0 <= args.persona_prob <= 1, f"--persona-prob must be between 0 and 1, not {args.persona_prob}"),
        (not (args.temperature > 0 and args.learning_rate > 0),
         "--temperature and --learning-rate must be above 0 (greedy samples of a group are all equal)"),
        (not args.max_grad_norm > 0, f"--max-grad-norm must be above 0, not {args.max_grad_norm} (inf: no clipping)"),
        (args.teacher and args.method != "distill", "--teacher writes the completions of --method distill, no other's"),
        (args.dynamic_sampling and imitates,
         f"--dynamic-sampling wants groups of unequal rewards; {args.method} imitates the correct ones"),
        (args.overlap and args.dynamic_sampling,
         "--overlap cannot go with --dynamic-sampling, which counts over all ranks while they train"),
        (args.overlap and imitates,
         f"--overlap is for a policy that samples; {args.method} imitates others' completions"),
        (imitates and (args.loss, args.advantage, args.correction, args.inner_epochs, args.overlong_buffer, args.kl_in)
         != ("grpo", "mean", "none", 1, 0, "loss"),
         f"--method {args.method} is cross-entropy on the correct completions: leave out --loss, --advantage, "
         "--correction, --inner-epochs, --overlong-buffer and --kl-in"),
        (args.overlap and args.profile,
         "--profile tells sampling from training, and --overlap does both at once: choose one"),
        (args.cuda_graphs and not (torch.cuda.is_available() and args.device in ("auto", "cuda")
                                   and flash_attn_with_kvcache and args.dtype != "float32"),
         "--cuda-graphs needs a GPU, flash-attn, and bfloat16"),
        (args.shard and world % args.shard, f"--shard {args.shard} must divide the {world} processes"),
        (args.prompts % world, f"--prompts {args.prompts} must be a multiple of the {world} processes"),
    )
    for refused, reason in refusals:
        if refused:
            raise ValueError(reason)
    grpo.check(loss=args.loss, advantage=args.advantage, normaliser=args.normaliser,
               group_size=args.group_size + imitates,   # who imitates needs no siblings to compare with
               clip_low=args.clip_low, clip_high=args.clip_high, inner_epochs=args.inner_epochs, kl_coef=args.kl_coef,
               kl_kind=args.kl, kl_in=args.kl_in, mix=args.mix, dual_clip=args.dual_clip,
               dynamic_sampling=args.dynamic_sampling > 0, max_tokens=args.max_new_tokens,
               overlong_buffer=args.overlong_buffer)


def run_folder(args) -> Path:
    """The run's folder, made and described by config.json. Raises ValueError if it holds another run.

    Restarted by torchrun (--max-restarts), a run with --out goes on where it was.
    """
    name = f"{args.method}-{Path(args.task).stem}-seed{args.seed}"
    out = Path(args.resume or args.out or Path("runs") / name)
    if not (args.resume or args.out):
        taken = [out, *(out.with_name(f"{name}-{i}") for i in range(2, 1000))]
        out = next(folder for folder in taken if not (folder / "config.json").exists())
    goes_on = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if (out / "config.json").exists() and not goes_on:
        raise ValueError(f"{out} holds a run already: continue it with --resume {out}, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    config = {"settings": vars(args) | {"resume": None, "out": str(out)}, "method": args.method,
              "command": " ".join(sys.argv), "commit": commit(),
              "versions": packages | {"python": sys.version.split()[0]}}
    write_atomically(out / "config.json", json.dumps(config, indent=1))
    return out
