"""A batch in parts: groups that share an optimizer step, and groups that share a forward."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import grpo
from model import chunks
from training.policy import summed


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
    lengths, advantages, kept = (x.view(-1, n) for x in (batch.lengths, advantages, kept))
    live = (advantages * kept).any(1)
    if args.kl_coef or args.entropy_coef:
        live[:] = True
    parts = []
    for part in torch.arange(len(batch.groups)).tensor_split(args.minibatches):
        counts = summed([(lengths[part] * kept[part]).sum(), kept[part].sum()])
        micros, ids = [], part[live[part]].tolist()
        for first, last in runs([batch.groups[i] for i in ids], args.micro_tokens):
            chosen = ids[first:last]
            weights = grpo.token_weights(lengths[chosen].flatten(), job.loss.normaliser, *counts,
                                         args.max_new_tokens, kept[chosen].flatten())
            sampled = []
            for i in chosen:
                for completion in batch.completions[i * n:(i + 1) * n]:
                    sampled += completion.logprobs
            micros.append(MicroBatch(
                [batch.groups[i] for i in chosen], lengths[chosen].flatten().to(device),
                advantages[chosen].flatten().to(device), weights.to(device),
                torch.tensor(sampled, device=device)))
        parts.append(micros)
    return parts


def micro_tokens_for(device: torch.device) -> int:
    """Packed tokens in a forward and backward that keep a device busy."""
    return 2048 if device.type in ("cpu", "mps") else 8192


def runs(groups: list, limit: int) -> Iterator[tuple[int, int]]:
    """Runs of whole groups of at most `limit` packed tokens, or of one longer group, as (first,
    last + 1)."""
    return chunks([len(prompt) + sum(map(len, completions)) for prompt, completions in groups],
                  limit)
