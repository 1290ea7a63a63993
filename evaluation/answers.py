"""Answers in one call of the sampler, kept in a file as they come.

An evaluation that was interrupted, given again, reads its answers from that file and samples only
the rest. This changes nothing: a sample depends on the model, its prompt, the settings and its
place, not on the batch around it (but for the rounding of its matmuls).
"""

import zlib
from contextlib import nullcontext
from dataclasses import replace

import torch.distributed as dist

from common import files
from common.ranks import from_first, ranks
from rollout import Completion


def sample(sampler, tokenizer, prompts, params, log=None):
    """params.n completions a prompt -> list over prompts of lists of (text, Completion).

    sampler: a rollout.Sampler; params: a rollout.SamplingParams.
    log: a file that takes each completion when it is done. Completions of this very call that it
    holds already are not sampled again; they come back without log-probs. Under torchrun each rank
    samples its share and gets those of all; rank 0's log counts, and takes the others' at the end.
    """
    asked = replace(params, stop=params.stops(tokenizer))
    call = fingerprint(sampler.model, prompts, asked) if log else None
    table = [[None] * params.n for _ in prompts]
    for row in files.rows(log) if log else ():
        if row.pop("call") == call:
            table[row["index"]][row["sample"]] = Completion(**row)
    table = from_first(table)
    todo = [i for i, row in enumerate(table) if None in row]
    with log.open("a", encoding="utf-8") if log else nullcontext() as file:
        for done in sampled(sampler, tokenizer, prompts, params, todo):
            table[done.index][done.sample] = done
            if file:
                kept = ("index", "sample", "tokens", "truncated", "error")
                files.append(file, {"call": call} | {key: getattr(done, key) for key in kept})
    return [[(params.text(done.tokens, tokenizer), done) for done in row] for row in table]


def sampled(sampler, tokenizer, prompts, params, todo):
    """Yields the completions of the prompts with these indices: this rank's, then the others'."""
    rank, world = ranks()
    share, mine = todo[rank::world], []
    asked = [prompts[i] for i in share]
    for done in sampler.generate(asked, params, keys=share, tokenizer=tokenizer):
        mine.append(replace(done, index=share[done.index]))
        yield mine[-1]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
        yield from (done for part in parts[:rank] + parts[rank + 1:] for done in part)


def fingerprint(model, *asked):
    """A number for a model's weights and what it is asked.

    Every 997th weight is enough, since a training step moves all of them.
    """
    number = zlib.crc32(repr(asked).encode())
    for weight in model.parameters():
        part = weight.detach().flatten()[::997].float().contiguous().cpu()
        number = zlib.crc32(part.numpy(), number)
    return number
