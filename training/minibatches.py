"""A batch in parts: groups that share an optimizer step, and groups that share a forward."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import grpo
from common.ranks import summed
from model import Transformer, chunks


@dataclass
class MicroBatch:
    """Groups that go through one forward: R completions with N tokens in all."""
    groups: list[tuple[list[int], list[list[int]]]]     # (prompt_ids, completions)
    lengths: Tensor                                     # [R]
    advantages: Tensor                                  # [R]
    weights: Tensor                                     # [N] of each token in the loss
    sampled: Tensor                                     # [N] the sampler's log-probs
    old: Tensor | None = None                           # [N] before the batch's first step
    reference: Tensor | None = None                     # [N] the start model's


def minibatches(batch, advantages: Tensor, kept: Tensor, job) -> list[list[MicroBatch]]:
    """The batch's groups in `--minibatches` parts, each as micro-batches of `--micro-tokens`.

    batch: a train.Rollout. advantages, kept [B, G]. job: a training.run.Job.
    A part's token weights count its groups on all ranks, and of these what is `kept`. Groups
    without a gradient are in no micro-batch. Each rank cuts its own groups, so the parts are others
    on another number of ranks.
    """
    args, device, n = job.args, job.model.device, len(batch.completions) // len(batch.groups)
    lengths, advantages, kept = (x.flatten() for x in (batch.lengths, advantages, kept))
    live = (advantages * kept).view(-1, n).any(1)
    if args.kl_coef or args.entropy_coef:
        live[:] = True
    parts = []
    for part in torch.arange(len(batch.groups)).tensor_split(args.minibatches):
        rows = (part[:, None] * n + torch.arange(n)).flatten()
        counts = summed([(lengths[rows] * kept[rows]).sum(), kept[rows].sum()])
        micros, ids = [], part[live[part]].tolist()
        for pieces, groups in micro_batches([batch.groups[i] for i in ids], args.micro_tokens):
            rows = [ids[i] * n + j for i, completions in pieces for j in completions]
            weights = grpo.token_weights(lengths[rows], job.loss.normaliser, *counts,
                                         args.max_new_tokens, kept[rows])
            sampled = [x for row in rows for x in batch.completions[row].logprobs]
            micros.append(MicroBatch(
                groups, lengths[rows].to(device), advantages[rows].to(device), weights.to(device),
                torch.tensor(sampled, device=device)))
        parts.append(micros)
    return parts


def micro_tokens_for(model: Transformer) -> int:
    """Packed tokens in a forward and backward that keep a device busy; half as many in fp32, which
    is as busy with them and keeps as many bytes. On a CPU 768 in any dtype: two groups of the main
    job. With one (512) a step took 15 % longer; 2,048 took 0.45 GB more than that."""
    if model.device.type == "cpu":
        return 768
    return (4096 if model.device.type == "mps" else 16384) // model.dtype.itemsize


def micro_batches(groups: list, limit: int) -> Iterator[tuple[list[tuple[int, range]], list]]:
    """Runs of groups of at most `limit` packed tokens: (group, which of its completions), and
    these as groups.

    A longer group is cut: each part has the prompt again, and one completion at least.
    """
    pieces = [(i, range(*span)) for i, (prompt, completions) in enumerate(groups)
              for span in chunks([len(c) for c in completions], max(1, limit - len(prompt)))]
    cut = [(groups[i][0], [groups[i][1][j] for j in completions]) for i, completions in pieces]
    sizes = [len(prompt) + sum(map(len, completions)) for prompt, completions in cut]
    for first, last in chunks(sizes, limit):
        yield pieces[first:last], cut[first:last]
