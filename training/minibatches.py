"""A batch in parts: which groups share an optimizer step, which a forward, and what tokens weigh.

batch is a train.Rollout and job a training.run.Job throughout.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import grpo
from model import Transformer, chunks, completion_logprobs, pack
from training.policy import summed


def minibatches(batch, advantages: Tensor, job) -> list[tuple]:
    """The batch's groups in `--minibatches` parts: (groups, micro-batches).

    Groups without a gradient are left out of the micro-batches.
    """
    args, parts = job.args, []
    live = advantages.view(len(batch.groups), -1).any(1)
    if args.kl_coef or args.entropy_coef:
        live[:] = True
    for part in torch.arange(len(batch.groups)).tensor_split(args.minibatches):
        micros = micro_batches(batch, part[live[part]].tolist(), args.micro_tokens)
        parts.append((part, list(micros)))
    return parts


def micro_batches(batch, groups: Sequence[int], limit: int) -> Iterator[Sequence[int]]:
    """Runs of whole groups of at most `limit` packed tokens together, or of one longer group."""
    sizes = [len(batch.groups[i][0]) + sum(map(len, batch.groups[i][1])) for i in groups]
    for first, last in chunks(sizes, limit):
        yield groups[first:last]


def loss_weights(batch, kept: Tensor, groups: Tensor, job) -> list[Tensor]:
    """For each completion, the weight of its tokens. Counted are the part's groups, on all ranks.

    Completions that are not `kept` weigh 0 and are not counted.
    """
    mine = kept.view(len(batch.groups), -1)[groups]
    lengths = batch.lengths.view(len(batch.groups), -1)[groups]
    tokens, sequences = summed([(lengths * mine).sum(), mine.sum()])
    weights = grpo.token_weights(batch.lengths.flatten(), job.loss.normaliser, tokens, sequences,
                                 job.args.max_new_tokens, kept.flatten())
    return weights.split(batch.lengths.flatten().tolist())


def old_logprobs(model: Transformer, batch, parts: list[tuple], job) -> dict:
    """By first group of each micro-batch: the log-probs [N] before the first optimizer step."""
    old = {}
    with torch.no_grad():
        for _, micros in parts:
            for micro in micros:
                packed = pack([batch.groups[i] for i in micro], model)
                old[micro[0]], _ = completion_logprobs(model, packed, job.args.temperature)
    return old
