"""Group-relative policy optimisation and its relatives: advantages, losses, normalisers, KL, as pure functions.

A prompt gets G completions y_1..y_G with rewards r_1..r_G. The whole method is

    A_i   = r_i - mean(r_1..r_G)                                    what was better than its siblings
    ratio = pi(y_t | ...) / pi_old(y_t | ...)                       how far the policy moved since it sampled y
    loss  = - sum over tokens of  w_t * min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)

(GRPO, arXiv 2402.03300, on PPO's clip, arXiv 1707.06347). Every variant here changes one of three things: the
advantage, the surrogate inside the sum, or the token weights w_t. One step of training reads

    advantages = group_advantages(rewards, "mean")                                        # [B, G], global batch
    weights = token_weights(lengths, "token", total_tokens, total_sequences, max_tokens)  # [N], this micro-batch
    loss, metrics = policy_loss("grpo", logprobs, old_logprobs, advantages.flatten(), lengths, weights)
    loss = loss + kl_coef * (weights * kl(logprobs, ref_logprobs, "k3")).sum()   # optional
    loss = loss - entropy_coef * (weights * entropy).sum()                       # optional
    loss.backward()

Completions are packed: `logprobs` [N] holds the tokens of all R completions one after another, `lengths` [R] says how
many each has (0 is allowed). Nothing is padded, so there is no mask to get wrong.

**The loss is a weighted sum, never a mean.** The weights come from counts over the *global* batch (all micro-batches,
all ranks), known before the first forward. So gradients add up: the same for any micro-batch size, packing or number of
ranks. Where a wrapper averages gradients over ranks (DDP, FSDP), multiply the loss by the number of ranks.
For the same reason metrics are sums; add them over micro-batches and ranks, then call `summarise`.

Left out: a learned value function and GAE (no critic fits "minimal"), token-level rewards, GSPO-token (equal to GSPO
unless advantages differ within a completion), and the gradient norm, which `torch.nn.utils.clip_grad_norm_` returns.

`python grpo.py` prints a worked example: advantages of four completions, and the clip table with its gradients.
"""

import argparse
import math

import torch
from torch import Tensor

FLAT = 1e-6  # rewards of a group that differ by no more than this are equal: what is left is float noise
LOG_RATIO_LIMIT = 20.0  # log ratios are cut here (no gradient beyond): exp overflows further out, and inf * 0 is NaN

ADVANTAGES = ("mean", "std_sample", "std_population", "rloo", "batch", "mean_batch_std", "persona")
NORMALISERS = ("token", "sequence", "constant")

# What each paper means by its name. Every entry can be changed on its own; `check` says which changes make no sense.
RECIPES = {
    # Williams 1992, with the group's mean as the baseline
    "reinforce": {"advantage": "mean", "normaliser": "token", "clip_low": math.inf, "clip_high": math.inf},
    # DeepSeekMath, arXiv 2402.03300
    "grpo": {"advantage": "std_sample", "normaliser": "sequence", "clip_low": 0.2, "clip_high": 0.2},
    # Understanding R1-Zero-like training, arXiv 2503.20783: no std, no division by length
    "dr_grpo": {"advantage": "mean", "normaliser": "constant", "clip_low": 0.2, "clip_high": 0.2},
    # DAPO, arXiv 2503.14476: clip-higher and token level (dynamic sampling and overlong penalty are functions below)
    "dapo": {"advantage": "std_sample", "normaliser": "token", "clip_low": 0.2, "clip_high": 0.28},
    # GSPO, arXiv 2507.18071: the ratio is a sequence's, per token, so it stays much closer to 1
    "gspo": {"advantage": "std_sample", "normaliser": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # MiniMax-M1, arXiv 2506.13585: no lower bound; the upper one as in ScaleRL, arXiv 2510.13786: ratio <= 5
    "cispo": {"advantage": "std_sample", "normaliser": "token", "clip_low": 1.0, "clip_high": 4.0},
}


# ---------------------------------------------------------------------------------------------------------------------
# Advantages: rewards [B, G] -> [B, G]


def group_advantages(rewards: Tensor, kind: str = "mean", persona_ids: Tensor | None = None) -> Tensor:
    """Advantages [B, G] of `rewards` [B, G] (fp32 or fp64): B prompts of the global batch, G completions of each.

    kind: mean | std_sample | std_population | rloo | batch | mean_batch_std | persona (needs `persona_ids` [B, G]).
    A group whose rewards are all equal gets exactly 0, float noise or not (for "batch": a batch).
    Raises ValueError on an unknown kind or a reward that is not finite.
    """
    if not rewards.isfinite().all():
        raise ValueError("rewards must be finite numbers: one NaN would spread to its whole group")
    centred = rewards - rewards.mean(-1, keepdim=True)
    match kind:
        case "mean":  # Dr. GRPO: unbiased up to the factor (G - 1) / G
            advantages = centred
        case "std_sample" | "std_population":  # GRPO: the paper says "std"; TRL and verl divide by G - 1
            correction = min(1, rewards.shape[-1] - 1) if kind == "std_sample" else 0
            advantages = centred / rewards.std(-1, correction=correction, keepdim=True)
        case "rloo":  # arXiv 2402.14740: r_i minus the mean of the others = centred * G / (G - 1)
            advantages = centred * (rewards.shape[-1] / max(1, rewards.shape[-1] - 1))
        case "batch":  # REINFORCE++, arXiv 2501.03262: no groups, so G = 1 works
            standardised = (rewards - rewards.mean()) / rewards.std(correction=0)
            return _zero_where_flat(standardised, rewards.flatten())
        case "mean_batch_std":  # REINFORCE++-baseline: the group's mean, the batch's std
            advantages = centred / centred.std(correction=0)
        case "persona":
            advantages = centred - persona_offsets(centred, persona_ids)
        case _:
            raise ValueError(f"unknown advantage {kind!r}")
    return _zero_where_flat(advantages, rewards)


def persona_offsets(centred: Tensor, persona_ids: Tensor) -> Tensor:
    """Mean of `centred` [B, G] over all completions with the same persona id [B, G], 0 for a persona seen once.

    For groups that mix personas: the baseline is then problem + persona (as in a two-way analysis of variance), so a
    persona is compared with what it usually reaches, not with its luckier siblings. Ours, not from a paper.
    """
    _, index, counts = persona_ids.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=centred.dtype, device=centred.device)
    sums = sums.index_add(0, index.flatten(), centred.flatten())
    return torch.where(counts > 1, sums / counts, 0)[index]


def informative(rewards: Tensor) -> Tensor:
    """Groups [B] (bool) whose rewards [B, G] are not all equal: only these have a gradient.

    DAPO's dynamic sampling keeps them and samples further prompts in place of the others. It looks at the verifier's
    rewards: a KL or length penalty added before would make every group look informative.
    """
    return rewards.amax(-1) - rewards.amin(-1) > FLAT


def _zero_where_flat(advantages: Tensor, rewards: Tensor) -> Tensor:
    return torch.where(informative(rewards).unsqueeze(-1), advantages, 0)  # where, not *: 0 / 0 is NaN, NaN * 0 too


# ---------------------------------------------------------------------------------------------------------------------
# Truncated completions


def truncation(rewards: Tensor, truncated: Tensor, policy: str = "zero") -> tuple[Tensor, Tensor]:
    """Rewards and a mask `kept` (bool), both of the shape of `rewards`, for completions cut off at the length limit.

    zero: reward 0, whatever stands in the unfinished text. mask: the tokens leave the loss and the normaliser, while
    the reward stays in the baseline (as in DAPO's overlong filtering). keep: nothing changes.
    """
    if policy not in ("zero", "mask", "keep"):
        raise ValueError(f"unknown truncation policy {policy!r}")
    if policy == "zero":
        rewards = rewards.masked_fill(truncated, 0)
    return rewards, ~truncated if policy == "mask" else torch.ones_like(truncated)


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft penalty (eq. 13), added to the reward: 0 up to max_tokens - buffer, then falling to -1 at max_tokens.

    `lengths` of any shape; buffer in tokens, at least 1.
    """
    return ((max_tokens - buffer - lengths) / buffer).clamp(-1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Normalisers


def token_weights(
    lengths: Tensor, kind: str, total_tokens: int, total_sequences: int, max_tokens: int,
    kept: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight [N] of each token in the loss, from `lengths` [R] of this micro-batch and counts over the *global* batch.

    token: 1 / total_tokens, every token alike (DAPO). sequence: 1 / (length * total_sequences), every completion alike,
    so tokens of long ones weigh less (GRPO). constant: 1 / (max_tokens * total_sequences), free of both (Dr. GRPO).
    `kept` [R]: completions that stay in the loss; the totals count only these.
    """
    match kind:
        case "token":
            weights = (max(1, total_tokens) * torch.ones_like(lengths, dtype=dtype)).reciprocal()
        case "sequence":
            weights = (max(1, total_sequences) * lengths.clamp(min=1).to(dtype)).reciprocal()
        case "constant":
            weights = (max_tokens * max(1, total_sequences) * torch.ones_like(lengths, dtype=dtype)).reciprocal()
        case _:
            raise ValueError(f"unknown normaliser {kind!r}")
    if kept is not None:
        weights = weights * kept
    return weights.repeat_interleave(lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def policy_loss(
    name: str, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, lengths: Tensor, weights: Tensor,
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, correction: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (a scalar, a weighted sum over tokens) and its metrics (sums over tokens; see `summarise`).

    logprobs [N] with gradient, old_logprobs [N] under the weights that sampled (`logprobs.detach()` where a batch gets
    only one step), advantages [R], lengths [R], weights [N] of `token_weights`, correction [N] of `sampler_correction`.
    name: reinforce | grpo | dr_grpo | dapo | gspo | cispo. N = 0 gives a loss of 0 that `backward` accepts.
    """
    advantages = advantages.repeat_interleave(lengths, output_size=len(logprobs))  # [N]
    log_ratio = logprobs - old_logprobs.detach()
    if name == "gspo":
        log_ratio = sequence_mean(log_ratio, lengths)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    match name:
        case "reinforce":
            surrogate = logprobs * advantages
        case "grpo" | "dr_grpo" | "dapo" | "gspo":
            surrogate = clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
        case "cispo":
            surrogate = ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantages * logprobs
        case _:
            raise ValueError(f"unknown loss {name!r}")
    if correction is not None:
        surrogate = surrogate * correction
    loss = -(weights * surrogate).sum()
    return loss, policy_metrics(name, ratio.detach(), advantages, weights, clip_low, clip_high, dual_clip)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), all [N]: no reward for moving beyond the clip.

    dual_clip c > 1 (arXiv 1912.09729) bounds it from below by c A where A < 0: a bad token that has become much
    likelier since it was sampled would otherwise push without limit.
    """
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is None:
        return surrogate
    return torch.where(advantages < 0, torch.max(surrogate, dual_clip * advantages), surrogate)


def sequence_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums [R] of `values` [N] over each completion; 0 for an empty one. Differentiable, deterministic on CUDA too."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0, unsafe=True)  # unsafe: R = 0 is fine


def sequence_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Each completion's mean of `values` [N], at each of its tokens [N]. GSPO's s_i = exp(sequence_mean(log ratio))."""
    means = sequence_sum(values, lengths) / lengths.clamp(min=1)
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(values))
    return means[owner]                                 # repeat_interleave's backward adds atomically on a GPU (P42)


def sampler_correction(
    old_logprobs: Tensor, sampler_logprobs: Tensor, lengths: Tensor,
    kind: str = "truncate", level: str = "token", low: float = 0.5, high: float = 2.0,
) -> Tensor:
    """Importance weights [N], without gradient, for a sampler whose log-probs differ from the trainer's (bf16, say).

    With c = pi_trainer_old / pi_sampler of a token, or of a whole completion (level "sequence": the product):
    truncate: min(c, high), "TIS" (Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training).
    mask: c inside [low, high], else 0, "masked IS" (IcePop, arXiv 2510.18855).
    """
    log_ratio = (old_logprobs - sampler_logprobs).detach()
    if level == "sequence":
        log_ratio = sequence_sum(log_ratio, lengths).repeat_interleave(lengths, output_size=len(log_ratio))
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if kind == "truncate":
        return ratio.clamp(max=high)
    if kind == "mask":
        return torch.where((ratio >= low) & (ratio <= high), ratio, 0)
    raise ValueError(f"unknown sampler correction {kind!r}")


# ---------------------------------------------------------------------------------------------------------------------
# KL to the start model


def kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3", old_logprobs: Tensor | None = None) -> Tensor:
    """Estimates [N] of KL(pi || pi_ref) per token sampled from pi (Schulman 2020, Approximating KL divergence).

    With d = log pi_ref - log pi:  k1 = -d (unbiased, can be negative), k2 = d^2 / 2, k3 = e^d - 1 - d (unbiased, >= 0).
    Values and gradients are different matters (arXiv 2506.09477): as a loss k2's gradient is the KL's, k3's is that of
    KL(pi_ref || pi), k1's is zero on average. With `old_logprobs` the estimate is multiplied by pi / pi_old
    (DeepSeek-V3.2), which makes the gradients of k1 and k3 that of KL(pi || pi_ref) and corrects for old samples.
    """
    difference = (ref_logprobs.detach() - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    match kind:
        case "k1":
            estimate = -difference
        case "k2":
            estimate = difference.square() / 2
        case "k3":
            estimate = difference.expm1() - difference  # expm1 keeps the digits where both policies nearly agree
        case _:
            raise ValueError(f"unknown KL estimator {kind!r}")
    if old_logprobs is None:
        return estimate
    return estimate * (logprobs - old_logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def kl_reward(old_logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor) -> Tensor:
    """log pi(y) - log pi_ref(y) [R], to be subtracted (times kl_coef) from the rewards before the advantages.

    Only k1 belongs in a reward: the score function then gives exactly the gradient of KL(pi || pi_ref).
    """
    return sequence_sum((old_logprobs - ref_logprobs).detach(), lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics

SUMS = ("tokens", "clipped_high", "clipped_low", "clipped_dual", "ratio", "ratio_squared", "old_kl")

def policy_metrics(
    name: str, ratio: Tensor, advantages: Tensor, weights: Tensor,
    clip_low: float, clip_high: float, dual_clip: float | None = None,
) -> dict[str, Tensor]:
    """Sums (scalars) over the tokens in the loss (weight > 0): add them over micro-batches and ranks, then `summarise`.

    A token counts as clipped when the clip took its gradient (cispo: when its ratio is cut, for its gradient lives on).
    """
    live = weights > 0
    up, down = live & (advantages > 0), live & (advantages < 0)
    if name == "cispo":
        up = down = up | down
    elif name == "reinforce":
        up = down = torch.zeros_like(live)
    return {
        "tokens": live.sum(),
        "clipped_high": (up & (ratio > 1 + clip_high)).sum(),
        "clipped_low": (down & (ratio < 1 - clip_low)).sum(),
        "clipped_dual": (down & (ratio > (math.inf if dual_clip is None else dual_clip))).sum(),
        "ratio": (live * ratio).sum(),
        "ratio_squared": (live * ratio.square()).sum(),
        "old_kl": (live * (ratio - 1 - ratio.log())).sum(),  # k3 of KL(pi_old || pi)
    }


def summarise(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means over tokens of `policy_metrics` added up over the whole batch.

    effective_sample_fraction = (sum ratio)^2 / (n sum ratio^2): 1 on policy, 1/n when one token outweighs all others.
    """
    total = {name: float(value) for name, value in sums.items()}
    tokens = max(1.0, total["tokens"])
    clipped = {side: total[f"clipped_{side}"] / tokens for side in ("high", "low", "dual")}
    return {
        "clip_fraction": sum(clipped.values()),
        **{f"clip_fraction_{side}": fraction for side, fraction in clipped.items()},
        "ratio_mean": total["ratio"] / tokens,
        "old_kl": total["old_kl"] / tokens,
        "effective_sample_fraction": total["ratio"] ** 2 / max(tokens * total["ratio_squared"], 1e-30),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Settings that contradict each other


def check(
    *, loss: str, advantage: str, normaliser: str, group_size: int, clip_low: float, clip_high: float,
    dual_clip: float | None = None, inner_epochs: int = 1, kl_coef: float = 0.0, kl_kind: str = "k3",
    kl_in: str = "loss", dynamic_sampling: bool = False, mix: str = "prompt", max_tokens: int = 1,
    overlong_buffer: int = 0,
) -> None:
    """Raises ValueError, with the reason, where a combination cannot do what its names say.

    kl_in: loss | reward; mix: see personas.
    """
    no_ratio = loss == "reinforce"
    refusals = (
        (group_size < 1, "group size must be at least 1"),
        (group_size == 1 and advantage != "batch",
         f"a group of 1 has no siblings, so its {advantage} advantage is always 0: use advantage batch"),
        (advantage == "persona" and mix == "prompt",
         "with mix prompt a group has one persona and its mean already is that persona's baseline: use advantage mean"),
        (dynamic_sampling and advantage == "batch",
         "dynamic sampling drops groups of equal rewards, which do have a gradient under a batch baseline"),
        (not 0 <= overlong_buffer < max_tokens, "the overlong buffer must be shorter than the length limit"),
        (not (clip_low >= 0 and clip_high >= 0), "clip bounds must be at least 0: the ratio 1 lies inside"),
        (no_ratio and inner_epochs > 1,
         "reinforce has no ratio, so it is wrong from the second inner epoch on: use grpo"),
        (no_ratio and min(clip_low, clip_high) < math.inf, "reinforce has no ratio to clip: use grpo"),
        (not no_ratio and clip_low > 1, "a ratio is never below 0, so clip_low above 1 does nothing"),
        (loss == "dapo" and clip_low > clip_high, "dapo is clip-higher: clip_low must not exceed clip_high"),
        (loss == "dapo" and normaliser != "token", "dapo is token level: use normaliser token, or loss grpo"),
        (loss == "dr_grpo" and advantage.startswith("std"),
         "dr_grpo leaves out the std: use advantage mean, or loss grpo"),
        (loss == "dr_grpo" and normaliser == "sequence",
         "dr_grpo leaves out the division by length: use normaliser constant, or loss grpo"),
        (loss == "gspo" and normaliser != "sequence",
         "gspo has one ratio a completion: any normaliser but sequence would weigh it by the length"),
        (dual_clip is not None and loss in ("reinforce", "cispo"), f"{loss} has no clipped minimum for a dual clip"),
        (dual_clip is not None and not dual_clip > 1 + clip_high, "dual clip must lie above 1 + clip_high"),
        (not kl_coef >= 0, "kl_coef must be at least 0"),
        (kl_coef > 0 and kl_in == "reward" and kl_kind != "k1",
         f"{kl_kind} in the reward does not give the gradient of the KL: only k1 does"),
    )
    for refused, reason in refusals:
        if refused:
            raise ValueError(reason)


# ---------------------------------------------------------------------------------------------------------------------
# The worked example


def clip_gradient(name: str, ratio: float, advantage: float, **settings: float) -> float:
    """d surrogate / d log pi of one token, by autograd: what the clip leaves of ratio * advantage."""
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    loss, _ = policy_loss(name, logprob, 0 * one, advantage * one, torch.tensor([1]), one, **settings)
    loss.backward()
    return -logprob.grad.item()


def print_advantages(rewards: list[float]) -> None:
    batch = torch.tensor([rewards, [0.0] * len(rewards)], dtype=torch.float64)
    personas = torch.arange(len(rewards)).expand_as(batch)
    print("Advantages. Group 1 has the rewards", *rewards, "and group 2 has 0 everywhere.\n")
    for kind in ADVANTAGES:
        groups = (" ".join(f"{a:+.3f}" for a in group) for group in group_advantages(batch, kind, personas))
        print(f"{kind:>15}", *groups, sep="   ")


def print_weights(lengths: list[int]) -> None:
    print(f"\nWeight of one token, in completions of {lengths} tokens, at most {max(lengths)}:\n")
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for kind in NORMALISERS:
        weights = token_weights(torch.tensor(lengths), kind, sum(lengths), len(lengths), max(lengths))
        print(f"{kind:>15}  ", *(f"{w:.4f}" for w in weights[starts].tolist()))


def print_clip_table() -> None:
    columns = {
        "reinforce": ("reinforce", {}),
        "clip 0.2": ("grpo", {}),
        "clip-higher": ("dapo", {"clip_high": 0.28}),
        "dual clip 3": ("grpo", {"dual_clip": 3.0}),
        "cispo <= 2": ("cispo", {"clip_low": 1.0, "clip_high": 1.0}),
    }
    print("\nGradient with respect to one token's log-prob, twelve cases:\n")
    print("advantage  ratio", *(f"{title:>12}" for title in columns))
    for advantage in (1.0, -1.0):
        for ratio in (0.5, 0.9, 1.0, 1.25, 1.5, 4.0):
            cells = (clip_gradient(name, ratio, advantage, **settings) for name, settings in columns.values())
            print(f"{advantage:>+9.0f}{ratio:>7.2f}", *(f"{cell + 0.0:>+12.2f}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints advantages, token weights and the clip table of an example.")
    parser.add_argument("--rewards", type=float, nargs="+", default=[1.0, 0.0, 0.0, 1.0], help="one per completion")
    args = parser.parse_args()
    if not all(map(math.isfinite, args.rewards)):
        parser.error("--rewards must be finite numbers")
    print_advantages(args.rewards)
    print_weights([2, 4, 8, 16])
    print_clip_table()


if __name__ == "__main__":
    main()
