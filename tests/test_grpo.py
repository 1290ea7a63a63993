"""grpo.py against slow float64 formulas, autograd's gradcheck, and TRL's losses."""

import math
import statistics
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

import grpo
from docs import losses as lesson

LENGTHS = [3, 0, 5, 1, 4, 7]  # an empty completion among them
KINDS = grpo.CHOICES
WIDER = {"gspo": {"clip_low": 0.1, "clip_high": 0.15}}  # so that both sides of the clip occur below


def recipe(name, **more):
    return grpo.Loss(name, **grpo.RECIPES[name] | WIDER.get(name, {}) | more)


def close(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def batch(seed=0, spread=0.5, dtype=torch.float64):
    """Packed log-probs, old ones, advantages and lengths; ratios lie on both sides of each clip."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(sum(LENGTHS), generator=generator, dtype=dtype) - 0.1
    logprobs = old + spread * torch.randn(len(old), generator=generator, dtype=dtype)
    advantages = torch.randn(len(LENGTHS), generator=generator, dtype=dtype)
    return logprobs.requires_grad_(), old, advantages, torch.tensor(LENGTHS)


def weights_of(kind, lengths=LENGTHS, kept=None):
    kept = torch.ones(len(lengths), dtype=torch.bool) if kept is None else kept
    lengths = torch.tensor(lengths)
    return grpo.token_weights(lengths, kind, int(lengths[kept].sum()), int(kept.sum()), 8, kept)


def spans(lengths=LENGTHS):
    return [range(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]


# --------------------------------------------------------------------------------------------------
# Advantages


def reference_advantage(group, i, kind):
    """The formulas, on lists."""
    if max(group) == min(group):
        return 0.0
    centre = group[i] - statistics.fmean(group)
    return {
        "mean": centre,
        "std": centre / statistics.stdev(group),
        "rloo": group[i] - statistics.fmean(group[:i] + group[i + 1:]),
    }[kind]


@pytest.mark.parametrize("kind", KINDS["advantage"])
@pytest.mark.parametrize("binary", [True, False])
def test_advantages_equal_their_formula(kind, binary):
    rewards = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rewards = (rewards > 0.5).double() if binary else rewards
    rewards[2] = 1.0  # a group that is always right
    groups = rewards.tolist()
    expected = [[reference_advantage(group, i, kind) for i in range(5)] for group in groups]
    close(grpo.group_advantages(rewards, kind), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS["advantage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-6])
@pytest.mark.parametrize("level", [0.0, 0.1, 1.0])
def test_p8_equal_rewards_give_exactly_zero_gradient_also_with_float_noise(
        kind, dtype, noise, level):
    noise = noise * torch.randn(6, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    advantages = grpo.group_advantages(level + noise, kind)
    assert advantages.eq(0).all()
    for name in grpo.RECIPES:
        logprobs, old, _, lengths = batch(dtype=dtype, spread=2.0)
        weights = weights_of("token")
        value, _ = grpo.policy_loss(recipe(name), logprobs, old, advantages[:, 0], lengths, weights)
        value.backward()
        assert value == 0 and logprobs.grad.eq(0).all()


@pytest.mark.parametrize("kind", KINDS["advantage"])
def test_p8_a_flat_group_stays_at_zero_beside_groups_that_are_not(kind):
    rewards = torch.tensor([[1.0, 1.0, 1.0 + 1e-7], [1.0, 0.0, 0.0]])
    advantages = grpo.group_advantages(rewards, kind)
    assert advantages[0].eq(0).all() and advantages[1].ne(0).any()


def test_p8_a_small_true_difference_is_not_taken_for_noise():
    advantages = grpo.group_advantages(torch.tensor([[0.5, 0.5001]], dtype=torch.float64), "std")
    close(advantages, torch.tensor([[-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2), 1e-8)


@pytest.mark.parametrize("kind", KINDS["advantage"])
def test_p8_a_group_of_one_is_refused(kind):
    with pytest.raises(ValueError):  # in words of one's own: it is homework
        grpo.group_advantages(torch.tensor([[1.0], [0.0]]), kind)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_p8_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError):
        grpo.group_advantages(torch.tensor([[1.0, bad]]), "mean")


@pytest.mark.parametrize("name", grpo.RECIPES)
def test_p8_a_ratio_beyond_the_range_of_floats_leaves_zero_advantages_at_zero(name):
    logprobs = torch.tensor([0.0, -500.0], requires_grad=True)
    old, ones = torch.tensor([-500.0, 0.0]), torch.ones(2)
    value, metrics = grpo.policy_loss(recipe(name), logprobs, old, 0 * ones, ones.long(), ones)
    value.backward()
    assert logprobs.grad.eq(0).all() and all(value.isfinite() for value in metrics.values())


def test_dynamic_sampling_keeps_the_groups_that_have_a_gradient():
    rewards = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]).double()
    rewards[3, 1] = 1.0 - 1e-9
    assert grpo.informative(rewards).tolist() == [False, True, False, False]
    large = torch.tensor([[1e6, 1e6 + 1], [1e6, 1e6 + 100]])  # a float32 there has steps of 1/16
    assert grpo.informative(large).tolist() == [False, True]


# --------------------------------------------------------------------------------------------------
# Truncation


REWARDS, CUT = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[True, False, False]])


@pytest.mark.parametrize(("policy", "expected"), [("zero", [0, 1, 0]), ("keep", [1, 1, 0])])
def test_p7_zero_takes_the_reward_of_what_was_cut_keep_leaves_it_and_both_train_on_it(
        policy, expected):
    rewards, kept = grpo.truncation(REWARDS, CUT, policy)
    assert rewards.tolist() == [expected] and kept.all()


def test_p7_what_is_cut_off_earns_nothing_and_keeps_its_penalty():
    rewards, kept = grpo.truncation(torch.tensor([[-1.0, 0.5, 1.0]]), torch.tensor([[True, True, False]]), "zero")
    assert rewards.tolist() == [[-1, 0, 1]] and kept.all()


def test_p7_mask_takes_truncated_completions_out_of_loss_and_normaliser():
    rewards, kept = grpo.truncation(REWARDS, CUT, "mask")
    assert rewards.tolist() == REWARDS.tolist()
    lengths = [9, 2, 3]
    weights = weights_of("token", lengths, kept.flatten())
    close(weights, torch.tensor([0.0] * 9 + [1 / 5] * 5))
    logprobs = torch.zeros(14, dtype=torch.float64, requires_grad=True)
    advantages = grpo.group_advantages(rewards.double()).flatten()
    value, metrics = grpo.policy_loss(
        grpo.Loss(), logprobs, logprobs, advantages, torch.tensor(lengths), weights)
    value.backward()
    assert logprobs.grad[:9].eq(0).all() and logprobs.grad[9:].ne(0).all()
    assert metrics["tokens"] == 5


def test_the_overlong_penalty_falls_linearly_over_the_buffer():
    got = grpo.overlong_penalty(torch.tensor([0, 16, 18, 20, 25]), max_tokens=20, buffer=4)
    close(got, torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0]))


# --------------------------------------------------------------------------------------------------
# Normalisers


@pytest.mark.parametrize("kind", KINDS["normaliser"])
def test_p9_the_gradient_of_a_short_and_a_long_completion_equals_the_closed_form(kind):
    # theta_i is the log-prob of every token of completion i; A = +1, -1
    short, long, most = 2, 10, 16
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([short, long])
    weights = grpo.token_weights(lengths, kind, short + long, 2, most)
    logprobs = theta.repeat_interleave(lengths)
    advantages = torch.tensor([1.0, -1.0]).double()
    value, _ = grpo.policy_loss(grpo.Loss(), logprobs, logprobs, advantages, lengths, weights)
    value.backward()
    expected = {  # minus the pull on theta: each completion's tokens times their weight
        # longer pulls more, as its share of the tokens
        "token": [-short / (short + long), long / (short + long)],
        # the same pull for any length, so less per token of a long wrong answer
        "sequence": [-1 / 2, 1 / 2],
        # the plain policy gradient, up to a fixed factor
        "constant": [-short / (2 * most), long / (2 * most)],
    }[kind]
    close(theta.grad, torch.tensor(expected, dtype=torch.float64), 1e-7)  # the weights are fp32


@pytest.mark.parametrize(("kind", "expected"), [
    ("token", [1 / 10] * 5), ("sequence", [1 / 8] * 2 + [1 / 12] * 3), ("constant", [1 / 32] * 5)])
def test_p9_the_weights_of_two_of_four_completions_by_hand(kind, expected):
    lengths, totals = torch.tensor([2, 0, 3]), (10, 4, 8)
    weights, expected = grpo.token_weights(lengths, kind, *totals), torch.tensor(expected)
    assert weights.dtype == torch.float32
    close(weights, expected, 1e-7)
    kept = torch.tensor([True, True, False])
    expected[2:] = 0
    close(grpo.token_weights(lengths, kind, *totals, kept), expected, 1e-7)
    assert grpo.token_weights(lengths[:0], kind, 0, 0, 8).shape == (0,)
    assert grpo.token_weights(lengths, kind, 0, 0, 8).isfinite().all()


def test_p9_a_total_or_a_length_of_0_counts_as_1_and_an_unknown_kind_is_refused():
    lengths, kept = torch.tensor([0, 2]), torch.tensor([True, False])
    for kind, expected in (("token", 1), ("sequence", 1 / 2), ("constant", 1 / 8)):
        assert grpo.token_weights(lengths, kind, 0, 0, 8).tolist() == [expected] * 2
        assert grpo.token_weights(lengths, kind, 0, 0, 8, kept).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError):
        grpo.token_weights(lengths, "mean", 2, 2, 8)


def toy_gradient(name, kind, micro_batches):
    """A whole toy model's gradient, summed over `micro_batches` (lists of completion numbers)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(11, 16), torch.nn.Tanh(), torch.nn.Linear(16, 11))
    lengths, tokens = torch.tensor(LENGTHS), torch.randint(0, 11, (sum(LENGTHS) + 1,))
    _, _, advantages, _ = batch(dtype=torch.float32)
    noise = 0.3 * torch.randn(sum(LENGTHS))
    for rows in micro_batches:
        at = torch.tensor([t for i in rows for t in spans()[i]], dtype=torch.long)
        log_p = model(tokens[at]).log_softmax(-1)
        log_p = log_p.gather(-1, tokens[at + 1].unsqueeze(-1)).squeeze(-1)
        weights = grpo.token_weights(lengths[rows], kind, sum(LENGTHS), len(LENGTHS), 8)
        old = log_p.detach() + noise[at]
        value, _ = grpo.policy_loss(
            recipe(name), log_p, old, advantages[rows], lengths[rows], weights)
        (value + 0.1 * (weights * grpo.kl(log_p, old, "k3")).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", grpo.RECIPES)
@pytest.mark.parametrize("kind", KINDS["normaliser"])
def test_p10_the_gradient_does_not_depend_on_the_micro_batches(name, kind):
    everything = [0, 1, 2, 3, 4, 5]
    whole = toy_gradient(name, kind, [everything])
    singles = [[i] for i in everything]
    for micro_batches in (singles, [[0, 1], [2, 3], [4, 5]], [[5, 2, 0], [], [4, 1, 3]]):
        difference = (toy_gradient(name, kind, micro_batches) - whole).norm() / whole.norm()
        assert difference <= 1e-6, (micro_batches, difference)


@pytest.mark.parametrize("kind", KINDS["normaliser"])
def test_p10_weights_of_parts_are_the_parts_of_the_weights(kind):
    lengths, totals = torch.tensor(LENGTHS), (sum(LENGTHS), len(LENGTHS), 8)
    parts = [grpo.token_weights(length, kind, *totals) for length in lengths.split(1)]
    assert torch.equal(torch.cat(parts), grpo.token_weights(lengths, kind, *totals))


def test_p10_metrics_add_up_over_micro_batches():
    logprobs, old, advantages, lengths = batch()
    weights, loss = weights_of("token"), recipe("dapo", dual_clip=1.5)
    _, whole = grpo.policy_loss(loss, logprobs, old, advantages, lengths, weights)
    sums = defaultdict(float)
    for i, span in enumerate(spans()):
        packed = (x[span.start : span.stop] for x in (logprobs, old, weights))
        new_i, old_i, weights_i = packed
        _, metrics = grpo.policy_loss(
            loss, new_i, old_i, advantages[i : i + 1], lengths[i : i + 1], weights_i)
        for key, value in metrics.items():
            sums[key] += value
    close(dict(sums), {key: value.to(sums[key].dtype) for key, value in whole.items()})
    assert min(whole["clipped_high"], whole["clipped_low"], whole["clipped_dual"]) > 0


# --------------------------------------------------------------------------------------------------
# Losses


def reference_loss(loss, logprobs, old, advantages, weights):
    """Value and gradient with respect to each log-prob, token by token, by the papers' formulas."""
    total, gradient = 0.0, [0.0] * len(logprobs)
    for span, a in zip(spans(), advantages, strict=True):
        mean = sum(logprobs[t] - old[t] for t in span) / max(1, len(span))
        for t in span:
            rho = math.exp(mean if loss.name == "gspo" else logprobs[t] - old[t])
            bounded = min(max(rho, 1 - loss.clip_low), 1 + loss.clip_high)
            if loss.name == "reinforce":
                value, slope = a * logprobs[t], a
            elif loss.name == "cispo":
                value, slope = bounded * a * logprobs[t], bounded * a
            elif loss.name not in ("grpo", "dr_grpo", "dapo", "gspo"):
                raise NotImplementedError(f"write the formula of {loss.name} here")
            else:
                value = min(rho * a, bounded * a)
                slope = rho * a if value == rho * a else 0.0
                if loss.dual_clip is not None and a < 0 and value < loss.dual_clip * a:
                    value, slope = loss.dual_clip * a, 0.0
            total -= weights[t] * value
            if loss.name == "gspo":  # every token moves the one ratio of its completion
                for u in span:
                    gradient[u] -= weights[t] * slope / len(span)
            else:
                gradient[t] -= weights[t] * slope
    return torch.tensor(total, dtype=torch.float64), torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.parametrize("dual_clip", [None, 1.4])
@pytest.mark.parametrize("kind", KINDS["normaliser"])
@pytest.mark.parametrize("name", grpo.RECIPES)
def test_losses_and_their_gradients_equal_the_formula(name, kind, dual_clip):
    loss = recipe(name, dual_clip=dual_clip if name in grpo.CLIPPED else None)
    for seed in range(3):
        logprobs, old, advantages, lengths = batch(seed)
        weights = weights_of(kind)
        value, _ = grpo.policy_loss(loss, logprobs, old, advantages, lengths, weights)
        value.backward()
        tensors = (logprobs, old, advantages, weights)
        expected, gradient = reference_loss(loss, *(x.tolist() for x in tensors))
        close(value.detach(), expected)
        close(logprobs.grad, gradient)


# cispo's loss is made for its gradient, not its value
@pytest.mark.parametrize("name", ["reinforce", *grpo.CLIPPED])
def test_losses_pass_gradcheck(name):
    logprobs, old, advantages, lengths = batch()
    arguments = (old, advantages, lengths, weights_of("sequence"))
    loss = recipe(name, dual_clip=3.0 if name in grpo.CLIPPED else None)
    assert gradcheck(lambda x: grpo.policy_loss(loss, x, *arguments)[0], (logprobs,))


@pytest.mark.parametrize("name", grpo.RECIPES)
def test_p11_the_first_inner_step_is_reinforce_and_the_second_has_ratios_off_one(name):
    logprobs, _, advantages, lengths = batch()
    old, after = logprobs.detach().clone(), (advantages, lengths, weights_of("sequence"))
    value, metrics = grpo.policy_loss(recipe(name), logprobs, old, *after)
    value.backward()
    close(logprobs.grad, -after[-1] * advantages.repeat_interleave(lengths))
    assert metrics["ratio"] == sum(LENGTHS) and metrics["ratio_squared"] == sum(LENGTHS)
    moved = (logprobs - logprobs.grad).detach()  # an optimizer step; the old log-probs stay
    _, metrics = grpo.policy_loss(recipe(name), moved, old, *after)
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
])
def test_p12_the_clip_leaves_these_gradients(advantage, ratio, clip, clip_higher, dual, cispo):
    losses = [
        grpo.Loss("grpo"),
        grpo.Loss("dapo", clip_high=0.28),
        grpo.Loss("grpo", dual_clip=3.0),
        grpo.Loss("cispo", clip_low=1.0, clip_high=1.0),
    ]
    gradients = [lesson.clip_gradient(loss, ratio, advantage) for loss in losses]
    assert gradients == pytest.approx([clip, clip_higher, dual, cispo], abs=1e-12)


@pytest.mark.parametrize(("loss", "clipped"), [
    (grpo.Loss("grpo", dual_clip=3.0), {"high": 1, "low": 1, "dual": 1}),
    (grpo.Loss("cispo"), {"high": 3, "low": 2, "dual": 0}),
    (recipe("reinforce"), {"high": 0, "low": 0, "dual": 0}),
])
def test_p12_each_side_of_the_clip_is_counted_where_it_takes_the_gradient(loss, clipped):
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 4.0, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    _, sums = grpo.policy_loss(loss, ratio.log(), 0 * ratio, advantages, ones.long(), ones)
    assert sums["tokens"] == 6
    assert {side: int(sums[f"clipped_{side}"]) for side in clipped} == clipped


@pytest.mark.parametrize("dual_clip", [None, 1.4])
@pytest.mark.parametrize("name", grpo.CLIPPED)
def test_p12_the_tokens_counted_as_clipped_are_those_without_gradient(name, dual_clip):
    logprobs, old, advantages, lengths = batch()
    loss = recipe(name, dual_clip=dual_clip)
    value, sums = grpo.policy_loss(loss, logprobs, old, advantages, lengths, weights_of("token"))
    value.backward()
    counted = sum(sums[f"clipped_{side}"] for side in ("high", "low", "dual"))
    assert 0 < counted == logprobs.grad.eq(0).sum() < sums["tokens"]


@pytest.mark.parametrize("name", grpo.RECIPES)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_p21_a_rank_without_tokens_has_a_zero_loss_to_backpropagate_and_the_same_metrics(
        name, lengths):
    parameter, none = torch.ones(3, requires_grad=True), torch.zeros(0)
    lengths = torch.tensor(lengths, dtype=torch.long)
    value, metrics = grpo.policy_loss(
        recipe(name), parameter[:0], none, lengths + 1.0, lengths, none)
    value.backward()
    assert value == 0 and parameter.grad.eq(0).all()
    _, full = grpo.policy_loss(recipe(name), *batch(), weights_of("token"))
    assert metrics.keys() == full.keys() == set(grpo.SUMS)
    assert grpo.summarise(metrics)["clip_fraction"] == 0


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


@pytest.mark.parametrize("name", grpo.RECIPES)
def test_the_metrics_of_a_loss_carry_no_gradient(name):
    logprobs, old, advantages, lengths = batch()
    value, metrics = grpo.policy_loss(recipe(name), logprobs, old, advantages, lengths, weights_of("sequence"))
    assert value.requires_grad and set(metrics) == set(grpo.SUMS)
    assert not any(value.requires_grad for value in metrics.values())


def test_a_sampler_correction_scales_each_token_and_does_not_carry_gradient():
    logprobs, old, advantages, lengths = batch()
    correction = grpo.sampler_correction(logprobs, old, lengths)
    assert not correction.requires_grad
    batched = (grpo.Loss(), logprobs, old, advantages, lengths)
    value, _ = grpo.policy_loss(*batched, weights_of("token"), correction)
    scaled, _ = grpo.policy_loss(*batched, weights_of("token") * correction)
    close(torch.autograd.grad(value, logprobs), torch.autograd.grad(scaled, logprobs))


def test_equal_samplers_are_not_corrected():
    old, _, _, lengths = batch()
    for kind in ("truncate", "mask"):
        assert grpo.sampler_correction(old, old, lengths, kind).eq(1).all()


# --------------------------------------------------------------------------------------------------
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
    expected = [KL[kind](p, q) for p, q in pairs]
    close(grpo.kl(logprobs, ref, kind), torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(lambda x: grpo.kl(x, ref, kind), (logprobs,))
    assert gradcheck(lambda x: grpo.kl(x, ref, kind, ref), (logprobs,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p13_k3_is_never_negative_and_zero_at_equality(dtype):
    logprobs = -torch.rand(10_000, dtype=dtype) * 5
    difference = torch.randn(10_000, dtype=dtype) * 10 ** torch.linspace(-9, 1, 10_000, dtype=dtype)
    assert grpo.kl(logprobs, logprobs + difference, "k3").min() >= 0
    assert all(grpo.kl(logprobs, logprobs, kind).eq(0).all() for kind in KL)


@pytest.mark.parametrize("kind", KL)
def test_p13_ratios_of_a_kl_are_cut_and_logprobs_alone_has_a_gradient(kind):
    def values(log_p, ref, old):
        return grpo.kl(*(torch.tensor([x, -x]) for x in (log_p, ref)), kind, old * torch.tensor([1.0, -1.0]))

    cut = grpo.LOG_RATIO_LIMIT
    assert values(0.0, 500.0, 500.0).isfinite().all() and values(0.0, 500.0, 500.0).equal(values(0.0, cut, cut))
    logprobs, ref, old = (torch.zeros(3, requires_grad=True) for _ in range(3))
    grpo.kl(logprobs, ref - 1, kind, old).sum().backward()
    assert logprobs.grad.ne(0).all() and ref.grad is None and old.grad is None
    with pytest.raises(ValueError):
        grpo.kl(logprobs, ref, "k4")


def five_tokens():
    """A policy over five tokens, so that an expectation under it is a sum, and a reference."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    theta = torch.randn(5, dtype=torch.float64, generator=first).requires_grad_()
    ref = torch.randn(5, dtype=torch.float64, generator=second).log_softmax(-1)
    return theta, theta.log_softmax(-1), ref


@pytest.mark.parametrize(("kind", "corrected", "direction"), [
    ("k1", False, "none"), ("k2", False, "reverse"), ("k3", False, "forward"),
    ("k1", True, "reverse"), ("k3", True, "reverse"),
])
def test_p13_the_expected_gradient_of_each_estimator_is_that_of_the_named_kl(
        kind, corrected, direction):
    theta, log_p, ref = five_tokens()
    estimate = grpo.kl(log_p, ref, kind, log_p.detach() if corrected else None)
    (got,) = torch.autograd.grad((log_p.exp().detach() * estimate).sum(), theta, retain_graph=True)
    expected = {
        "reverse": (log_p.exp() * (log_p - ref)).sum(),  # KL(pi || pi_ref)
        "forward": (ref.exp() * (ref - log_p)).sum(),  # KL(pi_ref || pi)
        "none": 0 * theta.sum(),
    }[direction]
    close(got, torch.autograd.grad(expected, theta)[0])


def test_p13_k1_in_the_reward_gives_the_gradient_of_the_kl():
    theta, log_p, ref = five_tokens()
    penalty = grpo.kl_reward(log_p, ref, torch.ones(5, dtype=torch.long))
    expectation = (log_p.exp().detach() * penalty * log_p).sum()
    (got,) = torch.autograd.grad(expectation, theta, retain_graph=True)
    close(got, torch.autograd.grad((log_p.exp() * (log_p - ref)).sum(), theta)[0])


def test_the_kl_reward_sums_each_completion():
    logprobs, ref, _, lengths = batch()
    expected = [sum((logprobs[t] - ref[t]).item() for t in span) for span in spans()]
    close(grpo.kl_reward(logprobs, ref, lengths), torch.tensor(expected, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------
# Diagnostics and settings


def test_summaries_equal_their_formula():
    ratio = torch.tensor([0.5, 1.0, 1.5, 3.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the last token is not in the loss
    got = grpo.summarise(grpo.policy_metrics(grpo.Loss(), ratio, torch.ones(4), weights))
    expected = {
        "clip_fraction": 1 / 3,
        "clip_fraction_high": 1 / 3, "clip_fraction_low": 0, "clip_fraction_dual": 0,
        "ratio_mean": 1.0, "old_kl": sum(r - 1 - math.log(r) for r in (0.5, 1.0, 1.5)) / 3,
        "effective_sample_fraction": 9 / (3 * 3.5),
    }
    assert got == pytest.approx(expected, abs=1e-12)
    nothing = grpo.summarise(grpo.policy_metrics(grpo.Loss(), ratio, torch.ones(4), 0 * weights))
    assert nothing["ratio_mean"] is nothing["effective_sample_fraction"] is None and nothing["clip_fraction"] == 0


def test_the_recipes_hold_the_papers_numbers():
    clips = {name: (r["clip_low"], r["clip_high"]) for name, r in grpo.RECIPES.items()}
    kinds = {name: (r["advantage"], r["normaliser"]) for name, r in grpo.RECIPES.items()}
    papers = {"reinforce": (math.inf, math.inf), "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2),
              "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
    assert papers.items() <= clips.items()
    papers = {"reinforce": ("mean", "token"), "grpo": ("std", "sequence"), "cispo": ("std", "token"),
              "dr_grpo": ("mean", "constant"), "dapo": ("std", "token"), "gspo": ("std", "sequence")}
    assert papers.items() <= kinds.items()


@pytest.mark.parametrize(("settings", "reason"), [
    ({"clip_low": -0.1}, "at least 0"),
    ({"clip_low": math.nan}, "at least 0"),
    ({"clip_low": 1.5}, "does nothing"),
    ({"name": "reinforce"}, "no ratio to clip"),
    ({"name": "dapo", "clip_low": 0.3}, "must not exceed"),
    ({"name": "dapo", "normaliser": "sequence"}, "token level"),
    ({"name": "dr_grpo", "advantage": "std"}, "leaves out the std"),
    ({"name": "dr_grpo", "normaliser": "sequence"}, "division by length"),
    ({"name": "gspo"}, "one ratio per completion"),
    ({"name": "cispo", "dual_clip": 3.0}, "dual clip"),
    ({"dual_clip": 1.1}, "above 1"),
    ({"kl_coef": -1.0}, "kl_coef"),
    ({"kl_coef": math.nan}, "kl_coef"),
    ({"entropy_coef": -1.0}, "entropy_coef"),
    ({"kl_coef": 0.1, "kl_in": "reward", "kl": "k2"}, "only k1"),
    ({"kl_coef": 0.1, "kl_in": "reward", "kl": "k1", "advantage": "std"}, "give --advantage mean"),
    *(({field: "unheard of"}, f"unknown {field} 'unheard of'") for field in KINDS),
])
def test_settings_that_contradict_each_other_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        grpo.Loss(**settings)


def test_a_kind_that_does_not_exist_is_refused_by_each_function():
    one = torch.ones(1)
    for call in (
        lambda: grpo.group_advantages(torch.ones(1, 2), "none"),
        lambda: grpo.token_weights(one.long(), "none", 1, 1, 1),
        lambda: grpo.sampler_correction(one, one, one.long(), "none"),
        lambda: grpo.kl(one, one, "none"),
        lambda: grpo.truncation(one, one.bool(), "none"),
    ):
        with pytest.raises(ValueError, match="unknown"):
            call()


def test_the_script_prints_every_advantage_and_the_twelve_cases():
    done = subprocess.run([sys.executable, lesson.__file__], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert all(f" {name} " in done.stdout for name in KINDS["advantage"])
    assert "rloo   +0.667 -0.667 -0.667 +0.667" in done.stdout
    last = "-1   4.00        -1.00        -4.00        -4.00        +0.00        -2.00"
    assert done.stdout.rstrip().endswith(last)


def test_the_script_refuses_an_unknown_flag_in_one_line(script):
    done = script("docs/losses.py", "--unknown")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# A peer's numbers


def trl_loss(loss_type, logprobs, old, advantages, ref, correction=None, **settings):
    """TRL's own loss code, on a padded copy of our tensors in place of its model's outputs."""
    trl = pytest.importorskip("trl", reason="TRL, a peer to compare with, is not installed")
    position = torch.arange(max(LENGTHS))
    mask = (position < torch.tensor(LENGTHS)[:, None]).long()
    index = (torch.tensor([span.start for span in spans()])[:, None] + position) * mask
    config = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
              "importance_sampling_level": "token", **settings}
    arguments = SimpleNamespace(
        delta=config.pop("delta", None), use_bias_correction_kl=config.pop("corrected", False),
        steps_per_generation=1)
    trainer = SimpleNamespace(
        args=arguments, loss_type=loss_type, max_completion_length=8,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=correction is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprobs[index], torch.zeros(mask.shape), None),
        **config,
    )
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), mask)
    inputs |= {"advantages": advantages, "old_per_token_logps": old[index],
               "ref_per_token_logps": ref[index], "num_items_in_batch": mask.sum()}
    if correction is not None:
        inputs["importance_sampling_ratio"] = correction[index]
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(("name", "kind", "ours", "loss_type", "theirs"), [
    ("grpo", "sequence", {}, "grpo", {}),
    ("grpo", "sequence", {"dual_clip": 1.4}, "grpo", {"delta": 1.4}),
    ("grpo", "sequence", {"kl_coef": 0.1}, "grpo", {"beta": 0.1}),
    ("grpo", "sequence", {"kl_coef": 0.1, "corrected": True}, "grpo",
     {"beta": 0.1, "corrected": True}),
    ("dr_grpo", "constant", {}, "dr_grpo", {}),
    ("dapo", "token", {"clip_high": 0.28}, "dapo", {"epsilon_high": 0.28}),
    ("dapo", "token", {}, "dapo", {"tis": True}),
    # TRL's bnpo divides by the micro-batch's tokens; equal as there is only one
    ("grpo", "token", {}, "bnpo", {}),
    ("gspo", "sequence", {"clip_low": 0.1, "clip_high": 0.15}, "grpo",
     {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15}),
    # TRL's epsilon_high is the bound itself, ours the distance of the bound from 1, as in the paper
    ("cispo", "token", {"clip_low": 1.0, "clip_high": 0.5}, "cispo", {"epsilon_high": 1.5}),
])
def test_losses_agree_with_trl_where_the_definitions_coincide(name, kind, ours, loss_type, theirs):
    ours, theirs = dict(ours), dict(theirs)
    logprobs, old, advantages, lengths = batch()
    ref, weights = batch(1)[0].detach(), weights_of(kind)
    correction = None
    if theirs.pop("tis", False):
        correction = grpo.sampler_correction(old, ref, lengths)
    expected = trl_loss(loss_type, logprobs, old, advantages, ref, correction, **theirs)
    bias_corrected = ours.pop("corrected", False)
    loss = grpo.Loss(name, normaliser=kind, **ours)
    value, _ = grpo.policy_loss(loss, logprobs, old, advantages, lengths, weights, correction)
    divergence = grpo.kl(logprobs, ref, loss.kl, old if bias_corrected else None)
    value = value + loss.kl_coef * (weights * divergence).sum()
    close(value, expected, 1e-6)
    close(torch.autograd.grad(value, logprobs), torch.autograd.grad(expected, logprobs), 1e-6)
