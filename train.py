"""PerMix-RLVR: mix personas -> roll out -> reward -> advantages -> loss -> step.

    python train.py                                          # the main job: the embedded model
    torchrun --nproc-per-node 2 train.py --method rlvr --task gsm8k --model Qwen/Qwen3-0.6B
    python train.py --resume runs/rlvr                       # goes on (on a CPU bit for bit)

PerMix-RLVR (arXiv 2604.08986): with probability rho a training persona opens a problem's prompt,
else none does. G completions are sampled under it, the verifier says which are correct, and GRPO
moves the policy towards those. rho = 0 is plain RLVR. The paper's abstract names neither a mixing
scheme nor hyper-parameters; those are ours.

Step s is a function of (seed, s) and the checkpoint, so a resumed run is the same run. Under
torchrun each rank samples and trains its own share of a step's problems. Counts and gradients are
summed over ranks; no collective depends on what a rank has drawn.

`sft` and `distill` are the same step on other completions: the gold answers, or a teacher's. Each
is weighted by its reward, and those without a reward are left out. A teacher's text is learned at
the temperature it was sampled at, gold answers at 1.

Behind this file, in training/: settings, ranks (policy.py), masters (adamw.py), checkpoints, what
surrounds a run (run.py), how it ends early (stop.py). Left out: a critic, a replay buffer, rollouts
that lag by more than a step.
"""

import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import grpo
import personas
import tasks
import weights
from common.command import note, one_line
from common.ranks import join, ranks, summed, wait
from grpo import Loss
from model import Transformer, completion_logprobs, pack
from rollout import Completion, Sampler
from training.checkpoints import Checkpoints
from training.memory import plan
from training.minibatches import MicroBatch, micro_batches, minibatches
from training.monitor import Monitor, batch_metrics
from training.overlap import overlapped
from training.policy import Policy
from training.run import Job, anchored, before_after, evaluated, read, run_folder, side_by_side
from training.settings import settings
from training.stop import ANOTHER_DIED, Stopped, another_died, told
from weights import lora, templates

# --------------------------------------------------------------------------------------------------
# Mix, roll out, reward


@dataclass
class Rollout:
    """This rank's B problems with G completions each. Completion b * G + g answers problem b."""
    problems: list[tasks.Problem]
    personas: list[list[personas.Persona | None]]       # [B][G]: who speaks
    groups: list[tuple[list[int], list[list[int]]]]     # (prompt_ids, completions that share it)
    completions: list[Completion]                       # [B * G]
    texts: list[str]
    verdicts: list[str]
    rewards: Tensor                                     # [B, G], after `--truncated`
    kept: Tensor                                        # [B, G] bool: may enter the loss
    lengths: Tensor                                     # [B, G] tokens

    def joined(self, other: "Rollout") -> "Rollout":
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return Rollout(*(torch.cat(p) if isinstance(p[0], Tensor) else p[0] + p[1] for p in pairs))


def roll_out(author: Sampler | None, job: Job, turn: int) -> Rollout:
    """One turn of problems: each under the persona it drew, sampled by `author`, and rewarded.

    A group under one persona is one prompt, sampled G times. With `--mix rollout` each completion
    has a prompt of its own. Rewards are computed while other completions still decode.
    """
    args, G = job.args, job.args.group_size
    n = job.sampling.n                                  # completions that share a prompt: G, or 1
    rank, world = ranks()
    mine = slice(rank * args.prompts // world, (rank + 1) * args.prompts // world)
    rounds = 1 + args.dynamic_sampling
    problems = tasks.batch(job.problems, turn, args.prompts, args.seed, rounds)[mine]
    names = [f"{turn}:{i}" for i in range(args.prompts)][mine]
    speakers = personas.mix(job.pool, args.persona_prob, args.mix, names, G, args.seed)

    prompts = []
    for problem, row in zip(problems, speakers, strict=True):
        prompts += [personas.prompt_ids(job.tokenizer, problem.question, persona)
                    for persona in row[::n]]
    completions, texts, futures = ([None] * (len(problems) * G) for _ in range(3))
    if author:
        params = replace(job.sampling, seed=args.seed + 1_000_003 * (turn + 1))  # one for each turn
        first = mine.start * G // n                     # keys are the same whichever rank samples
        done = author.generate(prompts, params, keys=range(first, first + len(prompts)),
                               tokenizer=job.tokenizer)
    else:
        done = gold_completions(job, [p for p in problems for _ in range(G // n)], n)
    for completion in done:
        i = completion.index * n + completion.sample
        completions[i] = completion
        texts[i] = (job.sampling.text(completion.tokens, job.tokenizer) if author else
                    job.tokenizer.decode(completion.tokens, skip_special_tokens=True))
        futures[i] = job.rewarder.submit(problems[i // G], texts[i], speakers[i // G][i % G])
    values, verdicts = zip(*(future.result() for future in futures), strict=True)

    truncated = torch.tensor([c.truncated for c in completions]).view(-1, G)
    given_up = torch.tensor([c.error is not None for c in completions]).view(-1, G)
    rewards, _ = grpo.truncation(torch.tensor(values).view(-1, G), given_up)    # zero, always
    rewards, kept = grpo.truncation(rewards, truncated, args.truncated)
    groups = [(prompt, [c.tokens for c in completions[i * n:(i + 1) * n]])
              for i, prompt in enumerate(prompts)]
    lengths = torch.tensor([len(c.tokens) for c in completions]).view(-1, G)
    return Rollout(problems, speakers, groups, completions, texts, list(verdicts), rewards, kept,
                   lengths)


def gold_completions(job: Job, problems: list[tasks.Problem], n: int) -> Iterator[Completion]:
    """`sft`: for each prompt its problem's gold answer in a sentence, n times."""
    end = templates.turn_end(job.tokenizer, job.model.c.stop_ids)
    lead = templates.answer_lead(job.tokenizer)
    for i, problem in enumerate(problems):
        text = f"{lead}The answer is {problem.answer}."
        tokens = [*job.tokenizer(text, add_special_tokens=False).input_ids, end]
        for sample in range(n):
            yield Completion(i, sample, tokens, [0.0] * len(tokens), truncated=False)


def rollouts(job: Job, first: int) -> Iterator[tuple[Rollout, int]]:
    """(batch, lag) of each step from `first` on. lag: how many steps old the sampling weights are.

    Dynamic sampling (DAPO): further rounds follow until `--prompts` groups have unequal rewards.
    Which problems come is a function of (seed, step), whatever earlier steps needed.
    """
    args, rounds = job.args, 1 + job.args.dynamic_sampling
    if args.overlap:
        yield from overlapped(roll_out, job, first)
        return
    author = job.author and job.sampler(job.author, job.longest_prompt)
    for step in range(first, args.steps):
        batch = job.stop.agreed(roll_out, author, job, step * rounds)
        for turn in range(step * rounds + 1, (step + 1) * rounds):
            if summed([grpo.informative(batch.rewards).sum()])[0] >= args.prompts:
                break
            batch = batch.joined(job.stop.agreed(roll_out, author, job, turn))
        yield batch, 0


# --------------------------------------------------------------------------------------------------
# Advantages, loss, step


def learn(policy: Policy, batch: Rollout, job: Job, step: int) -> dict:
    """Advantages, losses and optimizer steps on one batch -> the step's metrics over all ranks.

    Each of `--inner-epochs` takes the batch in `--minibatches` parts, an optimizer step each.
    The loss is a sum over micro-batches of whole groups, so their size changes only rounding.
    """
    args, kept, skipped = job.args, batch.kept, policy.skipped
    if job.imitates:                                    # what was rewarded is learned
        advantages, kept = batch.rewards, kept & (batch.rewards > 0)
    else:
        rewards = batch.rewards + penalties(batch, job)
        advantages = grpo.group_advantages(rewards, job.loss.advantage)
    if args.dynamic_sampling:                           # DAPO: flat groups do not count
        kept = kept & grpo.informative(batch.rewards)[:, None]

    parts = minibatches(batch, advantages, kept, job)
    steps = len(parts) * args.inner_epochs
    for micro in chain(*parts):
        if steps > 1:
            micro.old = frozen_logprobs(policy.model, micro.groups, job.temperature)
        if job.reference:
            micro.reference = frozen_logprobs(job.reference, micro.groups, job.temperature)
    seen, divergences, norms = [], [], []               # read at the end: no wait for a GPU between
    for i in range(steps):
        for micro in parts[i % len(parts)]:
            loss, more = micro_loss(policy.model, micro, job.loss, job.temperature)
            policy.backward(loss)
            seen.append(more)
        if job.anchor:
            divergence = job.anchor.loss(policy.model, step * steps + i)
            policy.backward(args.anchor_coef * divergence / ranks()[1])     # the same on all ranks
            divergences.append(divergence.detach())
        norms.append(policy.step(args.max_grad_norm))
    sums = {name: sum(float(more[name]) for more in seen) for name in SUMS}
    worst = max(norms, key=lambda norm: norm if math.isfinite(norm) else math.inf)
    return {**batch_metrics(batch, sums, job.imitates), "grad_norm": worst,
            "anchor_kl": sum(map(float, divergences)) / steps, "loss_scale": policy.loss_scale,
            "skipped_steps": policy.skipped - skipped}


def penalties(batch: Rollout, job: Job) -> Tensor:
    """What is added to the rewards before the advantages [B, G]: DAPO's overlong penalty, and minus
    the KL to the start model where `--kl-in reward` puts it."""
    args, total = job.args, torch.zeros_like(batch.rewards)
    if args.overlong_buffer:
        total += grpo.overlong_penalty(batch.lengths, args.max_new_tokens, args.overlong_buffer)
    if job.reference and job.loss.kl_in == "reward":
        reference = [frozen_logprobs(job.reference, groups, job.temperature)
                     for _, groups in micro_batches(batch.groups, args.micro_tokens)]
        sampled = torch.tensor([x for c in batch.completions for x in c.logprobs])
        divergence = grpo.kl_reward(sampled, torch.cat(reference).cpu(), batch.lengths.flatten())
        total -= job.loss.kl_coef * divergence.view_as(total)
    return total


@torch.no_grad()
def frozen_logprobs(model: Transformer, groups: list[tuple], temperature: float) -> Tensor:
    """Log-probs [N] of the groups' completions, without gradient."""
    return completion_logprobs(model, pack(groups, model), temperature)[0]


SUMS = ("packed_tokens", "trained_tokens", "entropy", "kl", "gap", *grpo.SUMS)


def micro_loss(model: Transformer, micro: MicroBatch, loss: Loss, temperature: float,
               ) -> tuple[Tensor, dict]:
    """The loss of one micro-batch (a sum over its tokens), and SUMS."""
    packed = pack(micro.groups, model)
    logprobs, entropy = completion_logprobs(model, packed, temperature)
    old = logprobs.detach() if micro.old is None else micro.old
    correction = None
    if loss.correction != "none":
        level = "sequence" if loss.name == "gspo" else "token"
        correction = grpo.sampler_correction(old, micro.sampled, micro.lengths, loss.correction,
                                             level)
    total, sums = grpo.policy_loss(loss, logprobs, old, micro.advantages, micro.lengths,
                                   micro.weights, correction)
    divergence = torch.zeros_like(logprobs)
    if micro.reference is not None:
        corrected = old if loss.kl == "k1" else None            # else k1's mean gradient is 0
        divergence = grpo.kl(logprobs, micro.reference, loss.kl, corrected)
        if loss.kl_in == "loss":
            total = total + loss.kl_coef * (micro.weights * divergence).sum()
    if loss.entropy_coef:
        total = total - loss.entropy_coef * (micro.weights * entropy).sum()
    return total, sums | {
        "packed_tokens": len(packed.input_ids), "trained_tokens": len(logprobs),
        "entropy": entropy.detach().sum(), "kl": divergence.detach().sum(),
        "gap": (old - micro.sampled).abs().sum()}


# --------------------------------------------------------------------------------------------------
# The run


def train(job: Job, policy: Policy, out: Path) -> None:
    """All steps, from the last checkpoint on. Writes the run folder as it goes."""
    args = job.args
    checkpoints = Checkpoints(out / "checkpoints", args.keep, args.async_save)
    first = checkpoints.load(policy)
    if first or args.resume:
        note(f"train.py: resuming after step {first}")
    checkpoints.check_disk(policy)
    done = saved = first
    monitor = Monitor(out, first, args, policy)
    try:
        with job.rewarder:
            batches = rollouts(job, first)
            for step in range(first, args.steps):
                with monitor.phase("step", step):
                    with monitor.phase("sample"):
                        batch, lag = next(batches)
                    with monitor.phase("train"):
                        metrics = learn(policy, batch, job, step)
                monitor.log(step, batch, metrics, lag)
                done = step + 1
                if done % args.save_every == 0 or done == args.steps:
                    checkpoints.save(policy, done)
                    saved = done
                job.stop.agree()
    except Stopped:
        if done > saved:
            checkpoints.save(policy, done)
        checkpoints.finish()
        raise
    checkpoints.finish()
    if ranks()[0] == 0:
        monitor.finish(samples=not job.imitates)
        weights.save(job.model, job.tokenizer, out / "model")
        if args.lora_rank:
            lora.save(job.model, args.model, out / "adapter")


def run(args) -> None:
    """Loads and checks all that the flags name, before the run folder exists; then trains."""
    began, job = time.time(), read(args)
    policy = Policy(job.model, args.learning_rate, args.warmup, args.shard,
                    args.optimizer == "adamw8bit")
    if not args.micro_tokens:                           # as --memory allows
        plan(policy, job)
    out, alone = run_folder(args)
    with alone, told(args, out), job.stop.heard():
        job = anchored(job)
        if job.held_out:
            answers = len(job.held_out[0]) * (1 + len(job.held_out[1]))
            note(f"run folder {out}; evaluating before training: {answers} answers")
            before = evaluated(job, out / "evaluation" / "before", 0)
        with job.stop.hold():
            train(job, policy, out)
        del policy                                      # its moments
        if job.held_out:
            after = evaluated(job, out / "evaluation" / "after", args.steps)
            if ranks()[0] == 0:
                print(before_after(args, out, before, after))
                side_by_side(out / "evaluation")
    if ranks()[0] == 0:
        page = out / "evaluation" / "report.html"
        first = f"; begin with {page}" if page.is_file() else ""
        print(f"{time.time() - began:.0f} seconds; everything is in {out}{first}")
    wait()                                              # others may still need this rank


def main(argv: list[str] | None = None) -> int:
    try:
        args = settings(argv)
        join(weights.pick_device(args.device))
        run(args)
    except (ValueError, OSError) as error:
        print(f"train.py: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not another_died(error):
            raise
        print(f"train.py: {ANOTHER_DIED}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        return 128 + getattr(stopped, "number", signal.SIGINT)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
