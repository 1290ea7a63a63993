"""The loop: mix personas -> roll out -> verify -> advantages -> loss -> step -> log -> save.

    python train.py                                          # the main job: PerMix-RLVR on the embedded model
    python train.py --method rlvr --task gsm8k --model Qwen/Qwen3-0.6B --steps 200 --out runs/rlvr
    python train.py --resume runs/rlvr                       # goes on where it stopped, bit for bit

PerMix-RLVR (arXiv 2604.08986): with probability rho a training persona opens a problem's prompt, else none does; G
completions are sampled under it, the verifier says which are correct, and GRPO moves the policy towards those.
rho = 0 is plain RLVR. Mixing scheme, rho, pool and all numbers below are ours: the paper's abstract names none.

Step s is a function of (seed, s) and the weights alone, so a resumed run is the same run. (`--overlap` trains on the
batch that the weights before have sampled; see `batches`.)

`sft` and `distill` are the same step with other authors: completions written by the task's gold answers, or by a
teacher and kept when verified, trained with advantage 1 (the policy gradient is then the cross-entropy's).

Under torchrun each rank samples and trains its own share of a step's problems; rewards, token counts and gradients are
summed over ranks in the same places whatever the ranks have drawn.

Left out: a critic, a replay buffer, and rollouts that lag by more than a step.
"""

import copy
import json
import math
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import evaluate
import grpo
import personas
import tasks
import weights
from common.files import one_line
from evaluation import report
from model import Transformer, chunks, completion_logprobs, pack
from rewards import Verifier, load_reward
from rollout import Completion, SamplingParams, generate
from sampling.cache import prefilled
from training import monitor
from training.anchor import Anchor
from training.policy import (
    Policy,
    check_disk,
    fitted,
    gathered,
    join,
    load_checkpoint,
    memory,
    ranks,
    save_checkpoint,
    wait,
)
from training.settings import run_folder, settings

# ----------------------------------------------------------------------------------------------------------------------
# Rolling out


@dataclass
class Batch:
    """B problems with G completions each (this rank's); completion b * G + g belongs to problem b."""
    problems: list[tasks.Problem]
    personas: list[list[personas.Persona | None]]       # [B][G]
    groups: list[tuple[list[int], list[list[int]]]]     # (prompt_ids, the completions that share it)
    completions: list[Completion]                       # [B * G]
    texts: list[str]
    verdicts: list[str]
    rewards: Tensor                                     # [B, G]

    @property
    def lengths(self) -> Tensor:                        # [B, G]
        return torch.tensor([len(c.tokens) for c in self.completions]).view_as(self.rewards)

    @property
    def truncated(self) -> Tensor:                      # [B, G]
        return torch.tensor([c.truncated for c in self.completions]).view_as(self.rewards)

    def joined(self, other: "Batch") -> "Batch":
        lists = ("problems", "personas", "groups", "completions", "texts", "verdicts")
        return Batch(*(getattr(self, name) + getattr(other, name) for name in lists),
                     torch.cat([self.rewards, other.rewards]))


def roll_outs(author: Transformer | None, tokenizer, problems, pool, grade, args, step: int) -> Batch:
    """This rank's share of a step's problems, each under its drawn persona, sampled and verified.

    Dynamic sampling (DAPO): until `--prompts` groups over all ranks have unequal rewards, further problems follow, at
    most `--dynamic-sampling` times as many. Which ones is a function of (seed, step), whatever earlier steps needed.
    """
    rank, world = ranks()
    share = slice(rank * args.prompts // world, (rank + 1) * args.prompts // world)
    batch = None
    for turn in range(1 + args.dynamic_sampling):
        at = step * (1 + args.dynamic_sampling) + turn
        chosen = tasks.batch(problems, at, args.prompts, args.seed, 1 + args.dynamic_sampling)
        keys = [f"{at}:{i}" for i in range(args.prompts)]
        drawn = personas.mix(pool, args.persona_prob, args.mix, keys, args.group_size, args.seed)
        more = roll_out(author, tokenizer, chosen[share], drawn[share], grade, args, at, share.start)
        batch = batch.joined(more) if batch else more
        if not args.dynamic_sampling:
            break
        rewards = gathered(grpo.truncation(batch.rewards, batch.truncated, args.truncated)[0])
        if grpo.informative(rewards).sum() >= args.prompts:
            break
    return batch


def roll_out(author: Transformer | None, tokenizer, problems, drawn, grade, args, step: int, first_key: int) -> Batch:
    """Samples from `author` and verifies; early completions are verified while others still decode.

    A group under one persona is one prompt sampled G times. Under `--mix rollout` each completion has its own prompt.
    Without an author (`sft`) the completion states the gold answer.
    """
    B, G = len(problems), args.group_size
    n = G if args.mix == "prompt" else 1
    asked = [(problem, p) for problem, row in zip(problems, drawn, strict=True) for p in row[::n]]
    prompts = [prompt_of(tokenizer, problem, p, args) for problem, p in asked]
    completions, texts, grades = [None] * (B * G), [""] * (B * G), [None] * (B * G)
    if author:
        keys = range(first_key * G // n, first_key * G // n + len(asked))       # the same whichever rank samples it
        params = SamplingParams(n, args.max_new_tokens, args.temperature,
                                seed=args.seed + 1_000_003 * (step + 1))
        samples = generate(author, prompts, params, keys=keys, slots=args.slots,
                           cuda_graphs=args.cuda_graphs)
    else:
        samples = gold_completions(tokenizer, [problem for problem, _ in asked], n)
    for done in samples:
        at = done.index * n + done.sample
        completions[at], texts[at] = done, tokenizer.decode(done.tokens, skip_special_tokens=True)
        grades[at] = grade(problems[at // G], texts[at])
    groups = [(prompt, [c.tokens for c in completions[i * n:(i + 1) * n]]) for i, prompt in enumerate(prompts)]
    values, verdicts = zip(*(graded() for graded in grades), strict=True)
    return Batch(problems, drawn, groups, completions, texts, list(verdicts), torch.tensor(values).view(B, G))


def gold_completions(tokenizer, problems: list[tasks.Problem], n: int):
    """`sft`: each problem's gold answer in a sentence, n times."""
    for i, problem in enumerate(problems):
        tokens = tokenizer(f"The answer is {problem.answer}.", add_special_tokens=False).input_ids
        tokens = tokens + [tokenizer.eos_token_id]
        yield from (Completion(i, j, tokens, [0.0] * len(tokens), truncated=False) for j in range(n))


def prompt_of(tokenizer, problem: tasks.Problem, persona: personas.Persona | None, args) -> list[int]:
    return personas.prompt_ids(tokenizer, tasks.format_question(problem, args.prompt), persona)


def make_grader(spec: str, verifier: Verifier):
    """grade(problem, text) -> a function to call, later, for (reward, verdict). The default works meanwhile in the
    verifier's processes; a user's `module:function` runs in this one, and what it pays for is logged as correct."""
    reward = None if spec == "rewards:correctness" else load_reward(spec)

    def grade(problem: tasks.Problem, text: str):
        if reward:
            value = float(reward(problem, text))
            if not math.isfinite(value):
                raise ValueError(f"--reward {spec} gave {value} for {text[:60]!r}; it must be a finite number")
            return lambda: (value, "correct" if value > 0 else "wrong")
        future = verifier.submit(problem.answer, text)
        return lambda: (float(future.result().verdict == "correct"), future.result().verdict)
    return grade


# ----------------------------------------------------------------------------------------------------------------------
# Learning


SUMS = ("packed_tokens", "trained_tokens", "entropy", "kl", "gap", *grpo.SUMS)  # added up over micro-batches and ranks


def learn(policy: Policy, start: Transformer | None, batch: Batch, anchor, step: int, args) -> dict:
    """Advantages, loss and optimizer steps on one batch. Returns the metrics of the step, over all ranks: rewards and
    lengths of everything sampled; entropy, KL, gap and clips of the tokens trained on (groups without variance are
    not)."""
    lengths, truncated = gathered(batch.lengths), gathered(batch.truncated)     # [B, G] of all ranks
    rewards, kept = grpo.truncation(gathered(batch.rewards), truncated, args.truncated)
    mine, device = slice(ranks()[0] * len(batch.rewards), (ranks()[0] + 1) * len(batch.rewards)), policy.model.device
    batch.rewards = rewards[mine]                       # what was truncated is logged as it is trained
    if args.dynamic_sampling:                           # DAPO: the others are not trained on
        kept = kept & grpo.informative(rewards)[:, None]
    imitates = args.method in ("sft", "distill")
    if imitates:                                        # cross-entropy on the correct completions
        advantages, kept = rewards, kept & (rewards > 0)
    else:
        advantages = grpo.group_advantages(rewards + gathered(penalties(start, batch, args)), args.advantage,
                                           gathered(persona_ids(batch)))
        advantages = advantages * kept if args.dynamic_sampling else advantages
    counts = {"total_tokens": int(lengths[kept].sum()), "total_sequences": int(kept.sum()),
              "max_tokens": args.max_new_tokens}
    advantages, lengths_mine, kept = (x[mine].flatten() for x in (advantages, lengths, kept))   # on the host

    n = len(batch.completions) // len(batch.groups)                             # completions in a group of the pack
    useful = [i for i in range(len(batch.groups))
              if args.kl_coef or args.entropy_coef or advantages[i * n:(i + 1) * n].any()]
    micros = list(micro_batches([batch.groups[i] for i in useful], args.micro_tokens))
    old, sums, anchor_kl, skipped = {}, dict.fromkeys(SUMS, 0.0), 0.0, policy.skipped
    for _ in range(args.inner_epochs):
        for first, last in micros:
            rows = [r for i in useful[first:last] for r in range(i * n, (i + 1) * n)]
            chosen = lengths_mine[rows].to(device)
            weight = grpo.token_weights(chosen, args.normaliser, kept=kept[rows].to(device), **counts)
            sampled = torch.tensor([x for r in rows for x in batch.completions[r].logprobs], device=device)
            loss, old[first], more = micro_loss(
                policy.model, start, [batch.groups[i] for i in useful[first:last]], sampled, old.get(first),
                advantages[rows].to(device), chosen, weight, args)
            policy.backward(loss)
            sums = {name: sums[name] + float(more[name]) for name in SUMS}
        if anchor:
            anchor_kl += anchor(policy, step, args.anchor_coef, args.anchor_count)
        norm = policy.step(args.max_grad_norm)
    totals = gathered(torch.tensor([list(sums.values())], dtype=torch.float64)).sum(0)
    sums = dict(zip(SUMS, totals.tolist(), strict=True))
    counted = [batch.verdicts.count("unverifiable"), sum(c.error is not None for c in batch.completions)]
    unverifiable, errors = gathered(torch.tensor([counted])).sum(0).tolist()
    tokens = sums["trained_tokens"]
    entropy, divergence, gap = (sums[name] / tokens if tokens else None for name in ("entropy", "kl", "gap"))
    return {
        "reward": rewards.mean().item(), "entropy": entropy, "kl": divergence,
        "anchor_kl": anchor_kl / args.inner_epochs, "grad_norm": norm, "loss_scale": policy.loss_scale,
        "skipped_steps": policy.skipped - skipped, **grpo.summarise(sums),
        "completion_length": lengths.float().mean().item(), "truncated_fraction": truncated.float().mean().item(),
        "zero_variance_fraction": None if imitates else 1 - grpo.informative(rewards).float().mean().item(),
        "sampler_trainer_gap": None if imitates else gap,
        "unverifiable_fraction": unverifiable / rewards.numel(), "errors": errors,
        **{name: int(sums[name]) for name in ("packed_tokens", "trained_tokens")}, "sampled_tokens": int(lengths.sum()),
        "prefilled_tokens": int(gathered(torch.tensor([prefilled([prompt for prompt, _ in batch.groups])])).sum())}


def micro_loss(model: Transformer, start: Transformer | None, groups, sampled: Tensor, old: Tensor | None,
               advantages: Tensor, lengths: Tensor, weight: Tensor, args) -> tuple[Tensor, Tensor, dict]:
    """The loss of R completions with N tokens in `groups`, the log-probs of before the first optimizer step, and SUMS.

    sampled [N]: the sampler's log-probs. old [N]: the log-probs an earlier inner epoch gave, None in the first.
    advantages [R], lengths [R], weight [N].
    """
    packed = pack(groups, model)
    logprobs, entropy = completion_logprobs(model, packed, args.temperature)
    old = logprobs.detach() if old is None else old
    correction = None if args.correction == "none" else grpo.sampler_correction(
        old, sampled, lengths, args.correction, "sequence" if args.loss == "gspo" else "token")
    loss, sums = grpo.policy_loss(args.loss, logprobs, old, advantages, lengths, weight, args.clip_low, args.clip_high,
                                  args.dual_clip, correction)
    divergence = torch.zeros_like(logprobs)
    if args.kl_coef:
        with torch.no_grad():
            reference, _ = completion_logprobs(start, packed, args.temperature)
        corrected = old if args.kl == "k1" else None    # without it k1's gradient is 0 on average
        divergence = grpo.kl(logprobs, reference, args.kl, corrected)
    if args.kl_coef and args.kl_in == "loss":
        loss = loss + args.kl_coef * (weight * divergence).sum()
    if args.entropy_coef:
        loss = loss - args.entropy_coef * (weight * entropy).sum()
    return loss, old, sums | {"packed_tokens": len(packed.input_ids), "trained_tokens": len(sampled),
                              "entropy": entropy.detach().sum(), "kl": divergence.detach().sum(),
                              "gap": (old - sampled).abs().sum()}


@torch.no_grad()
def penalties(start: Transformer | None, batch: Batch, args) -> Tensor:
    """What is added to the verifier's rewards before the advantages [B, G]: DAPO's overlong penalty, and minus the KL
    to the start model where `--kl-in reward` puts it (of the sampled tokens, under the same persona)."""
    total = torch.zeros_like(batch.rewards)
    if args.overlong_buffer:
        total += grpo.overlong_penalty(batch.lengths, args.max_new_tokens, args.overlong_buffer)
    if args.kl_coef and args.kl_in == "reward":
        reference = [completion_logprobs(start, pack(batch.groups[a:b], start), args.temperature)[0]
                     for a, b in micro_batches(batch.groups, args.micro_tokens)]
        sampled = torch.tensor([x for c in batch.completions for x in c.logprobs])
        divergence = grpo.kl_reward(sampled, torch.cat(reference).cpu(), batch.lengths.flatten())
        total -= args.kl_coef * divergence.view_as(total)
    return total


def micro_batches(groups: list, limit: int):
    """Runs of whole groups of at most `limit` packed tokens (or of one longer group), as (first, last + 1)."""
    return chunks([len(prompt) + sum(map(len, completions)) for prompt, completions in groups], limit)


def persona_ids(batch: Batch) -> Tensor:
    """[B, G]: a number for each persona text, 0 for none."""
    return torch.tensor([[zlib.crc32(p.text.encode()) if p else 0 for p in row] for row in batch.personas])


# ----------------------------------------------------------------------------------------------------------------------
# The run


def train(model: Transformer, teacher: Transformer | None, tokenizer, problems: list[tasks.Problem],
          pool: list[personas.Persona], args, out: Path) -> None:
    """The loop. Writes the run folder as it goes."""
    rank = ranks()[0]
    start = copy.deepcopy(model) if args.kl_coef or args.method == "distill" and not teacher else None
    author = {"distill": teacher or start, "sft": None}.get(args.method, model)
    anchor = Anchor(model, tokenizer, pool, args) if args.anchor_coef else None
    policy = Policy(model, args.learning_rate, args.warmup, args.shard)
    first = load_checkpoint(policy, out / "checkpoints")
    if first > args.steps:
        raise ValueError(f"{out} has {first} steps already: --steps {args.steps} would take some back")
    watch = monitor.Watch(monitor.resumed(out, first)) if rank == 0 else None
    track = monitor.tracker(args.tracker, out, vars(args)) if rank == 0 else None
    check_disk(out, policy, args.keep)
    plan_memory(policy, [other for other in (start, teacher) if other], tokenizer, problems, pool, args)
    broken, saved, ended = 0, None, False               # gradients in a row that were not finite; the last checkpoint
    with (Verifier() as verifier, terminated() as stop,
          tqdm(total=args.steps, initial=first, unit="step",
               disable=rank > 0 or not (args.progress or sys.stderr.isatty())) as bar):
        grade = make_grader(args.reward, verifier)
        rolled_out = batches(lambda by, step: roll_outs(by, tokenizer, problems, pool, grade, args, step), author,
                             first, args)
        for step in range(first, args.steps):
            clock = monitor.Clock(model.device)
            with clock("step"), monitor.operators(
                    args.profile and rank == 0 and step == first + 1, model.device):
                with clock("sample"):
                    batch, lag = next(rolled_out)
                with clock("train"):
                    metrics = learn(policy, start, batch, anchor, step, args)
            speed = metrics["sampled_tokens"] / clock.seconds["step" if lag else "sample"]
            metrics = {"step": step, **metrics, "lag": lag, "accuracy_by_stratum": monitor.strata(batch),
                       "tokens_per_second": speed, "seconds": clock.seconds}
            finite = math.isfinite(metrics["grad_norm"])
            broken = 0 if finite or policy.loss_scale > 1 else broken + 1       # an overflow in fp16 breaks nothing
            if rank == 0:
                if not finite:
                    print(f"step {step}: the gradient is not finite; the step was skipped", file=sys.stderr)
                monitor.record(out, step, batch, metrics)
                watch(metrics)
                track(metrics)
                bar.set_postfix(reward=f"{metrics['reward']:.2f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
                bar.update()
            if broken == MAX_BROKEN:
                raise ValueError(f"{broken} gradients in a row were not finite: lower --learning-rate, and go on from "
                                 f"the last checkpoint with --resume {out}")
            ended = gathered(torch.tensor([len(stop)])).any()                   # SIGTERM, on whichever rank
            if ended or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                if saved:
                    saved.result()
                saved = save_checkpoint(policy, out / "checkpoints", step + 1, args.keep, args.async_save)
            if ended:
                break
        if saved:
            saved.result()
        if ended and step + 1 < args.steps:
            raise Terminated
    if rank == 0:
        if args.profile:                                # without the first step, and the one that was recorded
            print(monitor.profile(watch.history[first + 2:], model, ranks()[1], author is model), file=sys.stderr)
        weights.save(model, tokenizer, out / "model")
        report.curves({args.method: watch.history}).savefig(out / "curves.png", dpi=120)


def batches(roll, author: Transformer | None, first: int, args):
    """(batch, lag) of every step: lag is how many steps old the weights are that have sampled it.

    `--overlap`: a copy of the author samples the next batch while this one is trained on, so its lag is 1. The first
    one after a checkpoint that `--save-every` asks for is sampled with its very weights: resumed from there, a run is
    the same run. Resumed after SIGTERM, or where a shorter run had ended, it samples one batch more that way.
    """
    if not args.overlap:
        yield from ((roll(author, step), 0) for step in range(first, args.steps))
        return
    earlier, ahead = copy.deepcopy(author), None
    on = (torch.cuda.set_device, (author.device,)) if author.device.type == "cuda" else (None, ())
    thread = ThreadPoolExecutor(1, "", *on)             # not `with`: on Ctrl-C the verifier closes first, and ends it
    for step in range(first, args.steps):
        batch, lag = (ahead.result(), 1) if ahead else (roll(author, step), 0)
        ahead = None
        if step + 1 < args.steps and (step + 1) % args.save_every:
            earlier.load_state_dict(author.state_dict())
            ahead = thread.submit(roll, earlier, step + 1)
        yield batch, lag


def plan_memory(policy: Policy, others: list[Transformer], tokenizer, problems, pool, args) -> None:
    """Prints the estimated peak by part; with `--memory` sizes the micro-batches to fit, or raises ValueError. others:
    the models beside the policy, start or teacher."""
    persona = max(pool, key=lambda p: len(p.text), default=None) if args.persona_prob else None
    prompt = len(prompt_of(tokenizer, max(problems, key=lambda p: len(p.question)), persona, args))
    group = prompt, args.group_size if args.mix == "prompt" else 1, args.max_new_tokens
    flags = {"overlap": args.overlap, "background": args.async_save, "others": others}
    if args.memory:
        args.micro_tokens = fitted(policy, args.memory * 1e9, args.slots, *group, **flags)
    if ranks()[0] == 0:
        parts = memory(policy, args.slots, args.micro_tokens, *group, **flags)
        print("memory, estimated GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()),
              file=sys.stderr)


MAX_BROKEN = 5


class Terminated(Exception):
    """SIGTERM came, and the step that it came in has been saved."""


@contextmanager
def terminated():
    """Yields a list that is no longer empty once SIGTERM has come."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def held_out(args) -> tuple[list[tasks.Problem], list[personas.Persona]]:
    """The fixed problems and personas of the evaluation: the same for every seed and arm, asked as in training."""
    problems = tasks.load(args.eval_task or args.task, "test", 0, args.eval_problems)
    return tasks.put(problems, args.prompt), personas.few(personas.load("test"), args.eval_personas)


def evaluated(model: Transformer, tokenizer, held, args, folder: Path, steps: int) -> dict:
    """On what `held_out` gave, as evaluate.py does it; read back where that has been done after as many steps."""
    info = {"task": args.eval_task or args.task, "prompt": args.prompt, "max_new_tokens": args.max_new_tokens,
            "steps": steps}
    asked = info | {"items": [{"id": problem.id, "kind": problem.kind} for problem in held[0]]}
    if (folder / "results.json").is_file():
        done = json.loads((folder / "results.json").read_text())
        names = [row["name"] for row in done["personas"][1:]]
        if names == [persona.name for persona in held[1]] and all(done.get(key) == asked[key] for key in asked):
            return done
    info |= {"model": args.model} | evaluate.compare.arm_of({"settings": vars(args)})
    return evaluate.evaluate(model, tokenizer, *held, args.seed, args.max_new_tokens, folder, info)


def before_after(before: dict, after: dict) -> str:
    """The table the main job ends with."""
    scores = ("mean_accuracy", "no_persona_accuracy", "worst_persona_accuracy", "pss", "pss_mean_minus_std",
              "pss_all_correct")
    rows = [(name, before[name], after[name]) for name in scores]
    rows += [(f"  {a['name']} ({a['stratum']})", a["accuracy"], b["accuracy"])
             for a, b in zip(before["personas"], after["personas"], strict=True)]
    width = max(len(name) for name, *_ in rows)
    return "\n".join([f"{'':{width}}  before   after"] + [f"{n:{width}}  {a:6.3f}  {b:6.3f}" for n, a, b in rows])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def run(args) -> None:
    """What the flags name is read first, and refused; then the run folder is made."""
    rank, began = ranks()[0], time.time()
    if rank:
        wait()                                          # until rank 0 has fetched what was not there
    model, tokenizer = weights.load(args.model, args.dtype, args.device)
    model.checkpointing = args.recompute
    args.dtype = str(model.dtype).removeprefix("torch.")        # what auto meant here is what a resumed run computes in
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"the weights of {args.model} are not all finite: it is broken, take another copy")
    teacher = weights.load_beside(args.teacher, tokenizer, args.dtype, args.device) if args.teacher else None
    problems, pool = tasks.load(args.task, "train", args.seed), personas.load(args.personas)
    if tested := {p.text for p in pool} & personas.held_out_texts():
        raise ValueError(f"--personas {args.personas} would train on {len(tested)} of the evaluation's personas: give "
                         "train, conflict-train, paraphrases-train, or a file without them")
    held = held_out(args) if args.eval_problems else None
    make_grader(args.reward, None)
    if args.tracker:
        monitor.tracker_package(args.tracker)
    if not rank:
        wait()
    folder = [run_folder(args) if rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    out = folder[0]
    try:
        if rank == 0 and args.eval_problems:
            print(f"run folder {out}; evaluating before training", file=sys.stderr)
            before = evaluated(model, tokenizer, held, args, out / "evaluation" / "before", 0)
        train(model, teacher, tokenizer, problems, pool, args, out)
        if rank == 0 and args.eval_problems:
            after = evaluated(model, tokenizer, held, args, out / "evaluation" / "after", args.steps)
            print(before_after(before, after))
    except (KeyboardInterrupt, Terminated):
        print(f"\ntrain.py: stopped; go on with --resume {out}", file=sys.stderr)
        raise
    if rank == 0:
        print(f"{time.time() - began:.0f} seconds; everything is in {out}")
    wait()                                              # nobody leaves while another still talks to it


def main(argv: list[str] | None = None) -> int:
    try:
        args = settings(argv)
        join(weights.pick_device(args.device))
        run(args)
    except (ValueError, OSError) as error:
        print(f"train.py: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
