"""What the flags, the prompts and the papers say is what reaches the weights: each test computes it in its own way."""

import copy
import inspect
import json
import math
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import grpo
import personas
import tasks
import train
import training.overlap
import training.run
import weights
from evaluation import fidelity
from model import completion_hidden, pack
from rollout import Sampler
from tests.conftest import SIZES
from tests.test_train import FAST, REWARD, arguments, gradients_of, one_batch, step_on
from training import anchor, monitor
from training.policy import Policy
from training.settings import FLAGS

DISTANCE = 1e-5                                         # relative, between fp32 and the formula in float64


# -- the gradient of a step ------------------------------------------------------------------------------------------

SHIFTS = (0.0, 0.3, -0.3, 1.2, -1.2, 0.1)               # sampler above trainer: ratios on both sides of [0.5, 2]
REFERENCE, MOVED = 0.7, 1.3                             # the last norm's weight of the start model, after a step
STEPS = "--temperature 0.6 --inner-epochs 2 --micro-tokens 90 "
WANTED = {"loss": "grpo", "advantage": "mean", "normaliser": "token", "clip_low": 0.2, "clip_high": 0.2,
          "dual_clip": None, "correction": "none", "kl_coef": 0.0, "kl": "k3", "kl_in": "loss", "entropy_coef": 0.0,
          "overlong_buffer": 0, "temperature": 0.6, "inner_epochs": 2, "method": "permix"}
CASES = [
    "", "--advantage rloo --normaliser sequence", "--advantage std --normaliser constant --clip-low 0.05",
    "--clip-high 0.02 --dual-clip 1.03", "--loss reinforce --inner-epochs 1", "--loss grpo", "--loss dr_grpo",
    "--loss dapo --clip-high 0.3", "--loss gspo --clip-low 0.02 --clip-high 0.02", "--loss cispo --clip-high 0.05",
    "--correction truncate", "--correction mask", "--loss gspo --correction truncate",
    "--kl-coef 0.3", "--kl-coef 0.3 --kl k1", "--kl-coef 0.3 --kl k2", "--entropy-coef 0.2",
    "--kl-coef 0.3 --kl k1 --kl-in reward", "--overlong-buffer 5", "--truncated mask", "--truncated zero",
    "--mix rollout --persona-prob 0.5 --micro-tokens 60 --entropy-coef 0.2",
    "--method sft --temperature 1 --inner-epochs 1", "--method distill --temperature 1 --inner-epochs 1"]


def told(flags: str) -> dict:
    """What the flags of a case say, over a paper's numbers, over the defaults."""
    given = dict(zip(flags.split()[::2], flags.split()[1::2], strict=True))
    given = {name[2:].replace("-", "_"): value for name, value in given.items()}
    recipe = grpo.RECIPES.get(given.get("loss"), {})
    numbers = {name: float(value) for name, value in given.items() if isinstance(WANTED.get(name), float | int)}
    numbers |= {"dual_clip": float(given["dual_clip"])} if "dual_clip" in given else {}
    return WANTED | recipe | given | numbers


@cache
def plain(folder, scale: float = 1.0):
    """transformers' model in float64, with another last norm."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.model.norm.weight.detach().mul_(scale)
    return model


def read_out(model, rows, temperature):
    """[(log-probs [L], entropies [L])] of each (prompt, completion): right-padded, which a causal model does not see."""
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.tensor([prompt + completion + [0] * (longest - len(prompt) - len(completion))
                        for prompt, completion in rows])
    log_p, out = (model(ids).logits / temperature).log_softmax(-1), []
    for (prompt, completion), row in zip(rows, log_p, strict=True):
        row = row[len(prompt) - 1:len(prompt) + len(completion) - 1]
        out.append((row.gather(-1, torch.tensor(completion)[:, None])[:, 0], -(row.exp() * row).sum(-1)))
    return out


def advantages_of(rewards, want):
    """Of one group, a list."""
    mean, G = statistics.fmean(rewards), len(rewards)
    scale = {"mean": 1.0, "rloo": G / (G - 1), "std": 1 / (statistics.stdev(rewards) or 1)}[want["advantage"]]
    return [(reward - mean) * scale for reward in rewards]


def surrogate(want, now, old, advantage):
    """[L] what a completion's tokens add to the objective, before weights and correction."""
    log_ratio = now - old
    if want["loss"] == "gspo":
        log_ratio = log_ratio.mean().expand_as(now)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - want["clip_low"], 1 + want["clip_high"])
    if want["loss"] == "reinforce":
        return now * advantage
    if want["loss"] == "cispo":
        return bounded.detach() * advantage * now
    smaller = torch.minimum(ratio * advantage, bounded * advantage)
    if want["dual_clip"] and advantage < 0:
        smaller = smaller.clamp(min=want["dual_clip"] * advantage)
    return smaller


def corrected(want, old, sampled):
    over = (old - sampled).sum().expand_as(old) if want["loss"] == "gspo" else old - sampled
    ratio = over.exp()
    if want["correction"] == "mask":
        return ratio * ((ratio >= 0.5) & (ratio <= 2))
    return ratio.clamp(max=2) if want["correction"] == "truncate" else torch.ones_like(ratio)


def divergence(want, now, old, start):
    d = start - now
    if want["kl"] == "k1":
        return -d * (now - old).exp()
    return d ** 2 / 2 if want["kl"] == "k2" else d.exp() - 1 - d


def formula(model, behind, start, batch, want):
    """The loss of an optimizer step by the papers, a completion at a time. behind: the model before the batch."""
    rows = [(prompt, completion) for prompt, group in batch.groups for completion in group]
    T, G = want["temperature"], batch.rewards.shape[1]
    with torch.no_grad():
        old, reference = ([logprobs for logprobs, _ in read_out(m, rows, T)] for m in (behind, start))
    sampled = [torch.tensor(c.logprobs, dtype=torch.float64) for c in batch.completions]
    rewards, kept = batch.rewards.flatten().tolist(), batch.kept.flatten().tolist()
    imitates = want["method"] in ("sft", "distill")
    for i, (_, completion) in enumerate(rows):
        if want["overlong_buffer"]:
            rewards[i] += max(-1, min(0, (6 - want["overlong_buffer"] - len(completion)) / want["overlong_buffer"]))
        if want["kl_in"] == "reward":
            rewards[i] -= want["kl_coef"] * (sampled[i] - reference[i]).sum().item()
        kept[i] = kept[i] and (not imitates or rewards[i] > 0)
    tokens, count = sum(len(c) for (_, c), k in zip(rows, kept, strict=True) if k), sum(kept)
    total = torch.zeros((), dtype=torch.float64)
    for i, (now, entropy) in enumerate(read_out(model, rows, T)):
        if not kept[i]:
            continue
        first = i // G * G
        advantage = rewards[i] if imitates else advantages_of(rewards[first:first + G], want)[i - first]
        gain = surrogate(want, now, old[i], advantage) * corrected(want, old[i], sampled[i])
        gain = gain + want["entropy_coef"] * entropy
        if want["kl_in"] == "loss":
            gain = gain - want["kl_coef"] * divergence(want, now, old[i], reference[i])
        weight = {"token": 1 / tokens, "sequence": 1 / (len(now) * count), "constant": 1 / (6 * count)}
        total = total - (weight[want["normaliser"]] * gain).sum()
    return total


@pytest.fixture
def many_stops(monkeypatch):
    """A sixth of all words end a completion, so that lengths differ."""
    load = weights.load

    def loaded(*args):
        model, tokenizer = load(*args)
        model.c.stop_ids = [2, *range(3, 20)]
        return model, tokenizer

    monkeypatch.setattr(weights, "load", loaded)


@pytest.mark.parametrize("flags", CASES)
def test_the_gradient_of_each_optimizer_step_is_that_of_the_papers_formula(tiny_folder, many_stops, flags):
    """At another temperature, with lengths that differ, a flat group, a sampler that is off, a moved start model."""
    want = told(flags)
    job, batch = one_batch(tiny_folder, *(STEPS + flags).split())
    lengths = {len(c.tokens) for c in batch.completions}
    assert len(lengths) > 1 or want["method"] == "sft"
    if want["method"] in ("permix", "distill"):
        batch.rewards[0] = torch.tensor([1.0, 0, 0, 0]) * batch.kept[0]
        batch.rewards[1] = 0.5                          # a flat group
    for i, completion in enumerate(batch.completions):
        completion.logprobs = [x + SHIFTS[(i + t) % 6] for t, x in enumerate(completion.logprobs)]
    if job.reference:
        job.reference.norm.weight.detach().mul_(REFERENCE)
    found = gradients_of(job, batch, MOVED)
    assert len(found) == want["inner_epochs"]
    behind, start, names = plain(tiny_folder), plain(tiny_folder, REFERENCE), dict(job.model.named_parameters())
    for gradient, model in zip(found, (behind, plain(tiny_folder, MOVED)), strict=False):
        parameters = dict(model.named_parameters())
        exact = torch.autograd.grad(formula(model, behind, start, batch, want),
                                    [parameters[f"model.{name}"] for name in names])
        exact = torch.cat([g.flatten() for g in exact])
        assert (gradient - exact).norm() <= DISTANCE * exact.norm() > 0
