"""grpo.py against slow float64 references written from the formulas, autograd's gradcheck, and TRL's losses."""

import math
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

import grpo

LENGTHS = [3, 0, 5, 1, 4, 7]  # an empty completion among them
CLIPPED = ("grpo", "dr_grpo", "dapo", "gspo")
SETTINGS = {name: {side: recipe[side] for side in ("clip_low", "clip_high")} for name, recipe in grpo.RECIPES.items()}
SETTINGS["gspo"] = {"clip_low": 0.1, "clip_high": 0.15}  # wider than the paper's, so that both sides occur below


def close(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def batch(seed=0, spread=0.5, dtype=torch.float64):
    """Packed log-probs, old log-probs, advantages and lengths with ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(sum(LENGTHS), generator=generator, dtype=dtype) - 0.1
    logprobs = old + spread * torch.randn(len(old), generator=generator, dtype=dtype)
    advantages = torch.randn(len(LENGTHS), generator=generator, dtype=dtype)
    return logprobs.requires_grad_(), old, advantages, torch.tensor(LENGTHS)


def weights_of(kind, lengths=LENGTHS, kept=None, dtype=torch.float64):
    kept = torch.ones(len(lengths), dtype=torch.bool) if kept is None else kept
    lengths = torch.tensor(lengths)
    return grpo.token_weights(lengths, kind, int(lengths[kept].sum()), int(kept.sum()), 8, kept, dtype)


def spans(lengths=LENGTHS):
    return [range(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def reference_advantages(rewards, kind, personas):
    """One loop per formula, on lists."""
    every = [r for group in rewards for r in group]
    mean = [statistics.fmean(group) for group in rewards]
    centred = [[r - m for r in group] for group, m in zip(rewards, mean, strict=True)]
    flat = [c for group in centred for c in group]
    result = []
    for b, group in enumerate(rewards):
        for i, r in enumerate(group):
            centre, others = centred[b][i], group[:i] + group[i + 1 :]
            same = [c for c, p in zip(flat, personas, strict=True) if p == personas[b * len(group) + i]]
            if kind == "batch":
                value = (r - statistics.fmean(every)) / statistics.pstdev(every)
            elif max(group) == min(group):
                value = 0.0
            else:
                value = {
                    "mean": r - mean[b],
                    "std_sample": centre / statistics.stdev(group),
                    "std_population": centre / statistics.pstdev(group),
                    "rloo": r - statistics.fmean(others),
                    "mean_batch_std": centre / statistics.pstdev(flat),
                    "persona": centre - (statistics.fmean(same) if len(same) > 1 else 0),
                }[kind]
            result.append(value)
    return torch.tensor(result, dtype=torch.float64).view(len(rewards), -1)


@pytest.mark.parametrize("kind", grpo.ADVANTAGES)
@pytest.mark.parametrize("binary", [True, False])
def test_advantages_equal_their_formula(kind, binary):
    rewards = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rewards = (rewards > 0.5).double() if binary else rewards
    rewards[2] = 1.0  # a group that is always right
    personas = torch.randint(0, 12, (6, 5), generator=torch.Generator().manual_seed(2))
    assert 1 in personas.flatten().bincount()  # a persona that is seen once
    expected = reference_advantages(rewards.tolist(), kind, personas.flatten().tolist())
    close(grpo.group_advantages(rewards, kind, personas), expected)


def test_recipes_name_known_advantages_and_normalisers_and_pass_the_check():
    for loss, recipe in grpo.RECIPES.items():
        grpo.check(loss=loss, group_size=8, **recipe)
        assert recipe["advantage"] in grpo.ADVANTAGES and recipe["normaliser"] in grpo.NORMALISERS


@pytest.mark.parametrize("kind", grpo.ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 1e-9])
@pytest.mark.parametrize("level", [0.0, 0.1, 1.0])
def test_p8_equal_rewards_give_exactly_zero_gradient_also_with_float_noise(kind, dtype, noise, level):
    noise = noise * torch.randn(6, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    personas = torch.arange(24).view(6, 4) % 5
    advantages = grpo.group_advantages(level + noise, kind, personas)
    assert advantages.eq(0).all()
    for name in grpo.RECIPES:
        logprobs, old, _, lengths = batch(dtype=dtype, spread=2.0)
        loss, _ = grpo.policy_loss(name, logprobs, old, advantages[:, 0], lengths, weights_of("token", dtype=dtype))
        loss.backward()
        assert loss == 0 and logprobs.grad.eq(0).all()


def test_p8_a_flat_group_stays_at_zero_beside_groups_that_are_not():
    rewards = torch.tensor([[1.0, 1.0, 1.0 + 1e-7], [1.0, 0.0, 0.0]])
    for kind in set(grpo.ADVANTAGES) - {"batch"}:
        advantages = grpo.group_advantages(rewards, kind, torch.tensor([[0, 1, 2], [0, 1, 2]]))
        assert advantages[0].eq(0).all() and advantages[1].ne(0).any(), kind


def test_p8_a_small_true_difference_is_not_taken_for_noise():
    advantages = grpo.group_advantages(torch.tensor([[0.5, 0.5001]], dtype=torch.float64), "std_population")
    close(advantages, torch.tensor([[-1.0, 1.0]], dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("kind", sorted(set(grpo.ADVANTAGES) - {"batch"}))
def test_p8_a_group_of_one_gives_zero_and_no_nan(kind):
    assert grpo.group_advantages(torch.tensor([[1.0], [0.0]]), kind, torch.tensor([[0], [0]])).eq(0).all()


def test_p8_a_batch_baseline_gives_groups_of_one_a_gradient():
    close(grpo.group_advantages(torch.tensor([[1.0], [0.0]]), "batch"), torch.tensor([[1.0], [-1.0]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_p8_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        grpo.group_advantages(torch.tensor([[1.0, bad]]), "mean")


@pytest.mark.parametrize("name", grpo.RECIPES)
def test_p8_a_ratio_beyond_the_range_of_floats_leaves_zero_advantages_at_zero(name):
    logprobs = torch.tensor([0.0, -500.0], requires_grad=True)
    loss, metrics = grpo.policy_loss(
        name, logprobs, torch.tensor([-500.0, 0.0]), torch.zeros(2), torch.tensor([1, 1]), torch.ones(2)
    )
    loss.backward()
    assert logprobs.grad.eq(0).all() and all(value.isfinite() for value in metrics.values())


def test_dynamic_sampling_keeps_the_groups_that_have_a_gradient():
    rewards = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0 - 1e-9]], dtype=torch.float64)
    assert grpo.informative(rewards).tolist() == [False, True, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


REWARDS, CUT = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[True, False, False]])


def test_p7_zero_takes_the_reward_of_truncated_completions_and_trains_on_them():
    rewards, kept = grpo.truncation(REWARDS, CUT, "zero")
    assert rewards.tolist() == [[0, 1, 0]] and kept.all()


def test_p7_mask_takes_truncated_completions_out_of_loss_and_normaliser():
    rewards, kept = grpo.truncation(REWARDS, CUT, "mask")
    assert rewards.tolist() == REWARDS.tolist()
    lengths = [9, 2, 3]
    weights = weights_of("token", lengths, kept.flatten())
    close(weights, torch.tensor([0.0] * 9 + [1 / 5] * 5, dtype=torch.float64))
    logprobs = torch.zeros(14, dtype=torch.float64, requires_grad=True)
    advantages = grpo.group_advantages(rewards.double()).flatten()
    loss, metrics = grpo.policy_loss("grpo", logprobs, logprobs, advantages, torch.tensor(lengths), weights)
    loss.backward()
    assert logprobs.grad[:9].eq(0).all() and logprobs.grad[9:].ne(0).all() and metrics["tokens"] == 5


def test_p7_keep_changes_nothing():
    rewards, kept = grpo.truncation(REWARDS, CUT, "keep")
    assert rewards.tolist() == REWARDS.tolist() and kept.all()


def test_the_overlong_penalty_falls_linearly_over_the_buffer():
    got = grpo.overlong_penalty(torch.tensor([0, 16, 18, 20, 25]), max_tokens=20, buffer=4)
    close(got, torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0]))


# ---------------------------------------------------------------------------------------------------------------------
# Normalisers


@pytest.mark.parametrize("kind", grpo.NORMALISERS)
def test_p9_the_gradient_of_a_short_and_a_long_completion_equals_the_closed_form(kind):
    short, long, most = 2, 10, 16  # theta_i is the log-prob of every token of completion i; A = +1, -1
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([short, long])
    weights = grpo.token_weights(lengths, kind, short + long, 2, most, dtype=torch.float64)
    logprobs = theta.repeat_interleave(lengths)
    loss, _ = grpo.policy_loss("grpo", logprobs, logprobs, torch.tensor([1.0, -1.0]).double(), lengths, weights)
    loss.backward()
    expected = {  # minus the pull on theta: each completion's tokens times their weight
        "token": [-short / (short + long), long / (short + long)],  # longer pulls more, as its share of the tokens
        "sequence": [-1 / 2, 1 / 2],  # the same pull for any length, so less per token of a long wrong answer
        "constant": [-short / (2 * most), long / (2 * most)],  # the plain policy gradient, up to a fixed factor
    }[kind]
    close(theta.grad, torch.tensor(expected, dtype=torch.float64))


def toy_gradient(name, kind, micro_batches, dtype=torch.float32):
    """Gradient of a whole toy model, accumulated over `micro_batches` (lists of completion numbers)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 16), torch.nn.Tanh(), torch.nn.Linear(16, 11)).to(dtype)
    lengths, tokens = torch.tensor(LENGTHS), torch.randint(0, 11, (sum(LENGTHS) + 1,))
    _, _, advantages, _ = batch(dtype=dtype)
    noise = 0.3 * torch.randn(sum(LENGTHS), dtype=dtype)
    for rows in micro_batches:
        at = torch.tensor([t for i in rows for t in spans()[i]], dtype=torch.long)
        log_p = model(tokens[at]).log_softmax(-1).gather(-1, tokens[at + 1].unsqueeze(-1)).squeeze(-1)
        weights = grpo.token_weights(lengths[rows], kind, sum(LENGTHS), len(LENGTHS), 8, dtype=dtype)
        old = log_p.detach() + noise[at]
        loss, _ = grpo.policy_loss(name, log_p, old, advantages[rows], lengths[rows], weights, **SETTINGS[name])
        (loss + 0.1 * (weights * grpo.kl(log_p, old, "k3")).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", grpo.RECIPES)
@pytest.mark.parametrize("kind", grpo.NORMALISERS)
def test_p10_the_gradient_does_not_depend_on_the_micro_batches(name, kind):
    everything = [0, 1, 2, 3, 4, 5]
    whole = toy_gradient(name, kind, [everything])
    for micro_batches in ([[i] for i in everything], [[0, 1], [2, 3], [4, 5]], [[5, 2, 0], [], [4, 1, 3]]):
        difference = (toy_gradient(name, kind, micro_batches) - whole).norm() / whole.norm()
        assert difference <= 1e-6, (micro_batches, difference)


@pytest.mark.parametrize("kind", grpo.NORMALISERS)
def test_p10_weights_of_parts_are_the_parts_of_the_weights(kind):
    lengths = torch.tensor(LENGTHS)
    parts = [grpo.token_weights(lengths[i : i + 1], kind, sum(LENGTHS), len(LENGTHS), 8) for i in range(len(LENGTHS))]
    assert torch.equal(torch.cat(parts), grpo.token_weights(lengths, kind, sum(LENGTHS), len(LENGTHS), 8))


def test_p10_metrics_add_up_over_micro_batches():
    logprobs, old, advantages, lengths = batch()
    weights, settings = weights_of("token"), {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5}
    _, whole = grpo.policy_loss("dapo", logprobs, old, advantages, lengths, weights, **settings)
    sums = defaultdict(float)
    for i, span in enumerate(spans()):
        new_i, old_i, weights_i = (x[span.start : span.stop] for x in (logprobs, old, weights))
        _, metrics = grpo.policy_loss(
            "dapo", new_i, old_i, advantages[i : i + 1], lengths[i : i + 1], weights_i, **settings
        )
        for key, value in metrics.items():
            sums[key] += value
    close(dict(sums), {key: value.to(sums[key].dtype) for key, value in whole.items()})
    assert min(whole["clipped_high"], whole["clipped_low"], whole["clipped_dual"]) > 0


def test_an_unknown_normaliser_is_refused():
    with pytest.raises(ValueError, match="unknown normaliser"):
        grpo.token_weights(torch.tensor([1]), "mean", 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def reference_loss(name, logprobs, old, advantages, weights, clip_low, clip_high, dual_clip=None):
    """Loss and gradient with respect to each log-prob, token by token, from the papers' formulas."""
    loss, gradient = 0.0, [0.0] * len(logprobs)
    for span, a in zip(spans(), advantages, strict=True):
        mean = sum(logprobs[t] - old[t] for t in span) / max(1, len(span))
        for t in span:
            rho = math.exp(mean if name == "gspo" else logprobs[t] - old[t])
            bounded = min(max(rho, 1 - clip_low), 1 + clip_high)
            if name == "reinforce":
                value, slope = a * logprobs[t], a
            elif name == "cispo":
                value, slope = bounded * a * logprobs[t], bounded * a
            else:
                value = min(rho * a, bounded * a)
                slope = rho * a if value == rho * a else 0.0
                if dual_clip is not None and a < 0 and value < dual_clip * a:
                    value, slope = dual_clip * a, 0.0
            loss -= weights[t] * value
            for u in span if name == "gspo" else [t]:  # gspo: every token moves the sequence's one ratio
                gradient[u] -= weights[t] * slope / (len(span) if name == "gspo" else 1)
    return torch.tensor(loss, dtype=torch.float64), torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.parametrize("dual_clip", [None, 1.4])
@pytest.mark.parametrize("kind", grpo.NORMALISERS)
@pytest.mark.parametrize("name", grpo.RECIPES)
def test_losses_and_their_gradients_equal_the_formula(name, kind, dual_clip):
    for seed in range(3):
        logprobs, old, advantages, lengths = batch(seed)
        weights, settings = weights_of(kind), {**SETTINGS[name], "dual_clip": dual_clip if name in CLIPPED else None}
        loss, _ = grpo.policy_loss(name, logprobs, old, advantages, lengths, weights, **settings)
        loss.backward()
        tensors = (logprobs, old, advantages, weights)
        expected, gradient = reference_loss(name, *(x.tolist() for x in tensors), **settings)
        close(loss.detach(), expected)
        close(logprobs.grad, gradient)


@pytest.mark.parametrize("name", ["reinforce", *CLIPPED])  # cispo's loss is made for its gradient, not its value
def test_losses_pass_gradcheck(name):
    logprobs, old, advantages, lengths = batch()
    arguments = (old, advantages, lengths, weights_of("sequence"))
    settings = {**SETTINGS[name], "dual_clip": 3.0 if name in CLIPPED else None}
    assert gradcheck(lambda x: grpo.policy_loss(name, x, *arguments, **settings)[0], (logprobs,))


@pytest.mark.parametrize("name", grpo.RECIPES)
def test_p11_the_first_inner_step_is_reinforce_and_the_second_has_ratios_off_one(name):
    logprobs, _, advantages, lengths = batch()
    weights, old = weights_of("sequence"), logprobs.detach().clone()
    loss, metrics = grpo.policy_loss(name, logprobs, old, advantages, lengths, weights, **SETTINGS[name])
    loss.backward()
    close(logprobs.grad, -weights * advantages.repeat_interleave(lengths))
    assert metrics["ratio"] == sum(LENGTHS) and metrics["ratio_squared"] == sum(LENGTHS)
    moved = (logprobs - logprobs.grad).detach()  # an optimiser step; the old log-probs stay those of the sampler
    _, metrics = grpo.policy_loss(name, moved, old, advantages, lengths, weights, **SETTINGS[name])
    assert metrics["ratio_squared"] != sum(LENGTHS) and metrics["old_kl"] > 0


@pytest.mark.parametrize(("advantage", "ratio", "clip", "clip_higher", "dual", "cispo"), [
    (+1, 0.50, 0.50, 0.50, 0.50, 0.50),  # below the range but wanted: the gradient brings it back
    (+1, 0.90, 0.90, 0.90, 0.90, 0.90),
    (+1, 1.00, 1.00, 1.00, 1.00, 1.00),
    (+1, 1.25, 0.00, 1.25, 0.00, 1.25),  # between the two upper bounds
    (+1, 1.50, 0.00, 0.00, 0.00, 1.50),  # already far enough
    (+1, 4.00, 0.00, 0.00, 0.00, 2.00),
    (-1, 0.50, 0.00, 0.00, 0.00, -0.50),  # already far enough down
    (-1, 0.90, -0.90, -0.90, -0.90, -0.90),
    (-1, 1.00, -1.00, -1.00, -1.00, -1.00),
    (-1, 1.25, -1.25, -1.25, -1.25, -1.25),
    (-1, 1.50, -1.50, -1.50, -1.50, -1.50),
    (-1, 4.00, -4.00, -4.00, 0.00, -2.00),  # unbounded without the dual clip
])  # fmt: skip
def test_p12_the_clip_leaves_these_gradients(advantage, ratio, clip, clip_higher, dual, cispo):
    gradients = [
        grpo.clip_gradient("grpo", ratio, advantage),
        grpo.clip_gradient("dapo", ratio, advantage, clip_high=0.28),
        grpo.clip_gradient("grpo", ratio, advantage, dual_clip=3.0),
        grpo.clip_gradient("cispo", ratio, advantage, clip_low=1.0, clip_high=1.0),
    ]
    assert gradients == pytest.approx([clip, clip_higher, dual, cispo], abs=1e-12)


def test_p12_each_side_of_the_clip_is_counted_where_it_takes_the_gradient():
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 4.0, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    lengths, ones = torch.ones(6, dtype=torch.long), torch.ones(6, dtype=torch.float64)
    _, sums = grpo.policy_loss("grpo", ratio.log(), 0 * ratio, advantages, lengths, ones, dual_clip=3.0)
    assert [int(sums[key]) for key in ("tokens", "clipped_high", "clipped_low", "clipped_dual")] == [6, 1, 1, 1]
    _, sums = grpo.policy_loss("cispo", ratio.log(), 0 * ratio, advantages, lengths, ones)
    assert [int(sums[key]) for key in ("clipped_high", "clipped_low", "clipped_dual")] == [3, 2, 0]


@pytest.mark.parametrize("name", grpo.RECIPES)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_p21_a_rank_without_tokens_has_a_zero_loss_to_backpropagate_and_the_same_metrics(name, lengths):
    parameter = torch.ones(3, requires_grad=True)
    arguments = (torch.zeros(0), torch.ones(len(lengths)), torch.tensor(lengths, dtype=torch.long), torch.zeros(0))
    loss, metrics = grpo.policy_loss(name, parameter[:0], *arguments)
    loss.backward()
    assert loss == 0 and parameter.grad.eq(0).all()
    logprobs, old, advantages, lengths = batch()
    _, full = grpo.policy_loss(name, logprobs, old, advantages, lengths, weights_of("token"))
    assert metrics.keys() == full.keys() and grpo.summarise(metrics)["clip_fraction"] == 0


def test_an_unknown_loss_is_refused():
    logprobs, old, advantages, lengths = batch()
    with pytest.raises(ValueError, match="unknown loss"):
        grpo.policy_loss("ppo", logprobs, old, advantages, lengths, weights_of("token"))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_sampler_corrections_equal_their_formula(kind, level):
    old, sampler, _, lengths = batch(3)
    old = old.detach()
    got = grpo.sampler_correction(old, sampler, lengths, kind, level, low=0.6, high=1.3)
    expected = torch.zeros(len(old), dtype=torch.float64)
    for span in spans():
        for t in span:
            over = span if level == "sequence" else [t]
            c = math.prod(math.exp(old[u]) / math.exp(sampler[u]) for u in over)
            expected[t] = min(c, 1.3) if kind == "truncate" else c * (0.6 <= c <= 1.3)
    close(got, expected)
    assert got.unique().numel() > 2


def test_a_sampler_correction_scales_each_token_and_does_not_carry_gradient():
    logprobs, old, advantages, lengths = batch()
    correction = grpo.sampler_correction(logprobs, old, lengths)
    assert not correction.requires_grad
    loss, _ = grpo.policy_loss("grpo", logprobs, old, advantages, lengths, weights_of("token"), correction=correction)
    scaled, _ = grpo.policy_loss("grpo", logprobs, old, advantages, lengths, weights_of("token") * correction)
    close(torch.autograd.grad(loss, logprobs), torch.autograd.grad(scaled, logprobs))


def test_equal_samplers_are_not_corrected():
    old, _, _, lengths = batch()
    for kind in ("truncate", "mask"):
        assert grpo.sampler_correction(old, old, lengths, kind).eq(1).all()


# ---------------------------------------------------------------------------------------------------------------------
# KL


KL = {
    "k1": lambda p, q: math.log(p / q),
    "k2": lambda p, q: math.log(p / q) ** 2 / 2,
    "k3": lambda p, q: q / p - 1 - math.log(q / p),
}


@pytest.mark.parametrize("kind", KL)
def test_p13_kl_estimators_equal_their_formula_and_pass_gradcheck(kind):
    logprobs, ref, _, _ = batch()
    pairs = zip(logprobs.exp().tolist(), ref.exp().tolist(), strict=True)
    close(grpo.kl(logprobs, ref, kind), torch.tensor([KL[kind](p, q) for p, q in pairs], dtype=torch.float64))
    assert gradcheck(lambda x: grpo.kl(x, ref, kind), (logprobs,))
    assert gradcheck(lambda x: grpo.kl(x, ref, kind, ref), (logprobs,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p13_k3_is_never_negative_and_zero_at_equality(dtype):
    logprobs = -torch.rand(10_000, dtype=dtype) * 5
    difference = torch.randn(10_000, dtype=dtype) * 10 ** torch.linspace(-9, 1, 10_000, dtype=dtype)
    assert grpo.kl(logprobs, logprobs + difference, "k3").min() >= 0
    assert all(grpo.kl(logprobs, logprobs, kind).eq(0).all() for kind in KL)


@pytest.mark.parametrize(("kind", "corrected", "direction"), [
    ("k1", False, "none"), ("k2", False, "reverse"), ("k3", False, "forward"), ("k1", True, "reverse"),
    ("k3", True, "reverse"),
])  # fmt: skip
def test_p13_the_expected_gradient_of_each_estimator_is_that_of_the_named_kl(kind, corrected, direction):
    theta = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ref = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    log_p = theta.log_softmax(-1)  # five tokens, so the expectation under the policy is a sum
    estimate = grpo.kl(log_p, ref, kind, log_p.detach() if corrected else None)
    (got,) = torch.autograd.grad((log_p.exp().detach() * estimate).sum(), theta, retain_graph=True)
    expected = {
        "reverse": (log_p.exp() * (log_p - ref)).sum(),  # KL(pi || pi_ref)
        "forward": (ref.exp() * (ref - log_p)).sum(),  # KL(pi_ref || pi)
        "none": 0 * theta.sum(),
    }[direction]
    close(got, torch.autograd.grad(expected, theta)[0])


def test_p13_k1_in_the_reward_gives_the_gradient_of_the_kl():
    theta = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ref = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    log_p = theta.log_softmax(-1)
    penalty = grpo.kl_reward(log_p, ref, torch.ones(5, dtype=torch.long))
    (got,) = torch.autograd.grad((log_p.exp().detach() * penalty * log_p).sum(), theta, retain_graph=True)
    close(got, torch.autograd.grad((log_p.exp() * (log_p - ref)).sum(), theta)[0])


def test_the_kl_reward_sums_each_completion():
    logprobs, ref, _, lengths = batch()
    expected = [sum((logprobs[t] - ref[t]).item() for t in span) for span in spans()]
    close(grpo.kl_reward(logprobs, ref, lengths), torch.tensor(expected, dtype=torch.float64))


def test_an_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown KL"):
        grpo.kl(torch.zeros(1), torch.zeros(1), "k4")


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics and settings


def test_summaries_equal_their_formula():
    ratio = torch.tensor([0.5, 1.0, 1.5, 3.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # the last token is not in the loss
    got = grpo.summarise(grpo.policy_metrics("grpo", ratio, torch.ones(4), weights, 0.2, 0.2))
    expected = {
        "clip_fraction": 1 / 3, "clip_fraction_high": 1 / 3, "clip_fraction_low": 0, "clip_fraction_dual": 0,
        "ratio_mean": 1.0, "old_kl": sum(r - 1 - math.log(r) for r in (0.5, 1.0, 1.5)) / 3,
        "effective_sample_fraction": 9 / (3 * 3.5),
    }  # fmt: skip
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("settings", "reason"), [
    ({"group_size": 0}, "at least 1"),
    ({"group_size": 1, "advantage": "std_sample"}, "no siblings"),
    ({"group_size": 1, "advantage": "rloo"}, "no siblings"),
    ({"advantage": "persona"}, "mix prompt"),
    ({"advantage": "batch", "dynamic_sampling": True}, "dynamic sampling"),
    ({"overlong_buffer": 64, "max_tokens": 64}, "overlong buffer"),
    ({"clip_low": -0.1}, "at least 0"),
    ({"clip_low": math.nan}, "at least 0"),
    ({"clip_low": 1.5}, "does nothing"),
    ({"loss": "reinforce"}, "no ratio to clip"),
    ({"loss": "reinforce", "clip_low": math.inf, "clip_high": math.inf, "inner_epochs": 2}, "second inner epoch"),
    ({"loss": "dapo", "clip_low": 0.3}, "clip-higher"),
    ({"loss": "dapo", "normaliser": "sequence"}, "token level"),
    ({"loss": "dr_grpo", "advantage": "std_sample"}, "leaves out the std"),
    ({"loss": "dr_grpo", "normaliser": "sequence"}, "division by length"),
    ({"loss": "gspo"}, "one ratio a completion"),
    ({"loss": "cispo", "dual_clip": 3.0}, "dual clip"),
    ({"dual_clip": 1.1}, "above 1"),
    ({"kl_coef": -1.0}, "kl_coef"),
    ({"kl_coef": 0.1, "kl_in": "reward", "kl_kind": "k2"}, "only k1"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused_with_the_reason(settings, reason):
    legal = {"loss": "grpo", "advantage": "mean", "normaliser": "token", "group_size": 8, "clip_low": 0.2,
             "clip_high": 0.2}  # fmt: skip
    grpo.check(**legal)
    with pytest.raises(ValueError, match=reason):
        grpo.check(**{**legal, **settings})


def run_script(*arguments):
    script = Path(grpo.__file__)
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)


def test_the_script_prints_every_advantage_and_the_twelve_cases():
    done = run_script("--rewards", "1", "0", "0", "0")
    assert done.returncode == 0 and done.stderr == ""
    assert all(f"{name} " in done.stdout for name in (*grpo.ADVANTAGES, *grpo.NORMALISERS))
    assert "rloo   +1.000 -0.333 -0.333 -0.333" in done.stdout
    assert done.stdout.rstrip().endswith("-1   4.00        -1.00        -4.00        -4.00        +0.00        -2.00")


@pytest.mark.parametrize("arguments", [["--unknown"], ["--rewards", "nan"], ["--rewards", "x"]])
def test_the_script_refuses_bad_usage_without_a_traceback(arguments):
    done = run_script(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A peer's numbers


def trl_loss(loss_type, logprobs, old, advantages, ref, correction=None, **settings):
    """TRL's own loss code, on a padded copy of our tensors in place of its model's outputs."""
    trl = pytest.importorskip("trl", reason="TRL, a peer to compare with, is not installed")
    longest, spread = max(LENGTHS), spans()
    index = torch.tensor([[span.start + t if t < len(span) else 0 for t in range(longest)] for span in spread])
    mask = torch.tensor([[int(t < len(span)) for t in range(longest)] for span in spread])
    config = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token", **settings}
    arguments = SimpleNamespace(
        delta=config.pop("delta", None), use_bias_correction_kl=config.pop("corrected", False), steps_per_generation=1
    )
    trainer = SimpleNamespace(
        args=arguments, loss_type=loss_type, max_completion_length=8, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=correction is not None, vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs[index], torch.zeros(mask.shape), None),
        **config,
    )  # fmt: skip
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), mask)
    inputs |= {"advantages": advantages, "old_per_token_logps": old[index], "ref_per_token_logps": ref[index],
               "num_items_in_batch": mask.sum()}  # fmt: skip
    if correction is not None:
        inputs["importance_sampling_ratio"] = correction[index]
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(("name", "kind", "ours", "loss_type", "theirs"), [
    ("grpo", "sequence", {}, "grpo", {}),
    ("grpo", "sequence", {"dual_clip": 1.4}, "grpo", {"delta": 1.4}),
    ("grpo", "sequence", {"kl": 0.1}, "grpo", {"beta": 0.1}),
    ("grpo", "sequence", {"kl": 0.1, "corrected": True}, "grpo", {"beta": 0.1, "corrected": True}),
    ("dr_grpo", "constant", {}, "dr_grpo", {}),
    ("dapo", "token", {"clip_high": 0.28}, "dapo", {"epsilon_high": 0.28}),
    ("dapo", "token", {"tis": True}, "dapo", {"tis": True}),
    ("grpo", "token", {}, "bnpo", {}),  # TRL's bnpo divides by the micro-batch's tokens; equal as there is only one
    ("gspo", "sequence", {"clip_low": 0.1, "clip_high": 0.15}, "grpo",
     {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15}),
    # TRL's epsilon_high is the bound itself, ours the distance of the bound from 1, as in the paper
    ("cispo", "token", {"clip_low": 1.0, "clip_high": 0.5}, "cispo", {"epsilon_high": 1.5}),
])  # fmt: skip
def test_losses_agree_with_trl_where_the_definitions_coincide(name, kind, ours, loss_type, theirs):
    ours, theirs = dict(ours), dict(theirs)
    logprobs, old, advantages, lengths = batch()
    ref, weights = batch(1)[0].detach(), weights_of(kind)
    correction = grpo.sampler_correction(old, ref, lengths) if theirs.pop("tis", False) else None
    expected = trl_loss(loss_type, logprobs, old, advantages, ref, correction, **theirs)
    coefficient, corrected, _ = ours.pop("kl", 0.0), ours.pop("corrected", False), ours.pop("tis", None)
    loss, _ = grpo.policy_loss(name, logprobs, old, advantages, lengths, weights, correction=correction, **ours)
    loss = loss + coefficient * (weights * grpo.kl(logprobs, ref, "k3", old if corrected else None)).sum()
    close(loss, expected, 1e-6)
    close(torch.autograd.grad(loss, logprobs), torch.autograd.grad(expected, logprobs), 1e-6)
