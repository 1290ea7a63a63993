"""Group-relative policy optimisation and its relatives: advantages, losses, KL, as pure functions.

A prompt gets G completions y_1..y_G with rewards r_1..r_G. The whole method is

    A_i   = r_i - mean(r_1..r_G)                  how much better than its siblings
    ratio = pi(y_t | ...) / pi_old(y_t | ...)     how far the policy moved since it sampled y
    loss  = - sum over tokens of  w_t * min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)

(GRPO, arXiv 2402.03300, on PPO's clip, arXiv 1707.06347). Every variant here changes one of three
things: the advantage, the surrogate inside the sum, or the token weights w_t. A step of training:

    loss = Loss("dapo", **RECIPES["dapo"])
    advantages = group_advantages(rewards, loss.advantage)                   # [B, G], global batch
    weights = token_weights(lengths, loss.normaliser, total_tokens, total_sequences, max_tokens)
    value, sums = policy_loss(loss, logprobs, old_logprobs, advantages.flatten(), lengths, weights)
    value = value + loss.kl_coef * (weights * kl(logprobs, ref_logprobs, loss.kl)).sum()

Completions are packed: `logprobs` [N] holds the tokens of all R completions one after another, and
`lengths` [R] says how many each has (0 is allowed). Nothing is padded, so there is no mask.

**The loss is a weighted sum, never a mean.** The weights come from counts over the *global* batch
(all micro-batches, all ranks), known before the first forward. So gradients add up: they are the
same, but for rounding, for any micro-batch size, packing or number of ranks. Where a wrapper
averages gradients over ranks (DDP, FSDP), multiply the loss by their number. Metrics are sums too:
add, then `summarise`.

**A new loss** is a row of `RECIPES` and a case in `policy_loss`. Its surrogate must vanish where
the advantage is 0, since such groups are left out of the forward. A new knob is a field of `Loss`
and a flag of the same name in training/settings.py; `Loss` refuses it where it cannot act.
`python docs/losses.py` prints a worked example: advantages, and what the clips leave of gradients.

Left out: a learned value function and GAE (no critic), token-level rewards, GSPO-token (equal to
GSPO unless advantages differ within a completion), and baselines over the whole batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLAT = 1e-5  # rewards of a group that differ by no more, of 1 or of the largest, are equal: noise
LOG_RATIO_LIMIT = 20.0  # log ratios are cut here: exp overflows further out, and inf * 0 is NaN

# What each paper means by its name. Every entry can be changed; `Loss` refuses what makes no sense.
RECIPES = {
    # Williams 1992, with the group's mean as the baseline
    "reinforce": {"advantage": "mean", "normaliser": "token",
                  "clip_low": math.inf, "clip_high": math.inf},
    # DeepSeekMath, arXiv 2402.03300
    "grpo": {"advantage": "std", "normaliser": "sequence", "clip_low": 0.2, "clip_high": 0.2},
    # Understanding R1-Zero-like training, arXiv 2503.20783: no std, no division by length
    "dr_grpo": {"advantage": "mean", "normaliser": "constant", "clip_low": 0.2, "clip_high": 0.2},
    # DAPO, arXiv 2503.14476: clip-higher and token level
    "dapo": {"advantage": "std", "normaliser": "token", "clip_low": 0.2, "clip_high": 0.28},
    # GSPO, arXiv 2507.18071: one ratio per completion, the geometric mean over its tokens
    "gspo": {"advantage": "std", "normaliser": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # MiniMax-M1, arXiv 2506.13585: no lower bound; the upper one from ScaleRL, arXiv 2510.13786
    "cispo": {"advantage": "std", "normaliser": "token", "clip_low": 1.0, "clip_high": 4.0},
}
CLIPPED = ("grpo", "dr_grpo", "dapo", "gspo")  # those with PPO's clipped minimum
CHOICES = {
    "name": tuple(RECIPES),
    "advantage": ("mean", "std", "rloo"),
    "normaliser": ("token", "sequence", "constant"),
    "correction": ("none", "truncate", "mask"),
    "kl": ("k1", "k2", "k3"),
    "kl_in": ("loss", "reward"),
}


@dataclass(frozen=True)
class Loss:
    """What is minimised. Raises ValueError, with the reason, where its settings contradict.

    The defaults are the main job's; a paper's are `Loss(name, **RECIPES[name])`.
    """
    name: str = "grpo"
    advantage: str = "mean"  # see group_advantages
    normaliser: str = "token"  # see token_weights
    clip_low: float = 0.2  # the ratio may fall to 1 - this
    clip_high: float = 0.2  # the ratio may rise to 1 + this
    dual_clip: float | None = None  # bound on the ratio of bad tokens, see clipped_surrogate
    correction: str = "none"  # see sampler_correction
    kl_coef: float = 0.0
    kl: str = "k3"  # the estimator
    kl_in: str = "loss"  # or in the reward
    entropy_coef: float = 0.0

    def __post_init__(self):
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(f"unknown {field} {getattr(self, field)!r}: use one of {known}")
        name, low, high, dual = self.name, self.clip_low, self.clip_high, self.dual_clip
        refusals = (
            (not (low >= 0 and high >= 0), "clip bounds must be at least 0"),
            (name == "reinforce" and min(low, high) < math.inf,
             "reinforce has no ratio to clip: use grpo"),
            (name != "reinforce" and low > 1,
             "a ratio is never below 0, so --clip-low above 1 does nothing"),
            (name == "dapo" and low > high, "dapo's --clip-low must not exceed its --clip-high"),
            (name == "dapo" and self.normaliser != "token",
             "dapo is token level: use normaliser token, or loss grpo"),
            (name == "dr_grpo" and self.advantage == "std",
             "dr_grpo leaves out the std: use advantage mean, or loss grpo"),
            (name == "dr_grpo" and self.normaliser == "sequence",
             "dr_grpo leaves out the division by length: use normaliser constant, or loss grpo"),
            (name == "gspo" and self.normaliser != "sequence",
             "gspo has one ratio per completion: any normaliser but sequence weighs by length"),
            (dual is not None and name not in CLIPPED,
             f"{name} has no clipped minimum for a dual clip (--dual-clip)"),
            (dual is not None and not dual > 1 + high,
             "dual clip (--dual-clip) must lie above 1 + clip_high"),
            (not (self.kl_coef >= 0 and self.entropy_coef >= 0),
             "kl_coef and entropy_coef must be at least 0"),
            (self.kl_coef > 0 and self.kl_in == "reward" and self.kl != "k1",
             f"--kl {self.kl} in the reward does not give the gradient of the KL: only k1 does"),
            (self.kl_coef > 0 and self.kl_in == "reward" and self.advantage == "std",
             "where all answers are right, --advantage std blows the KL in the reward up to full "
             "size, whatever --kl-coef: give --advantage mean, or --kl-in loss"),
        )
        for refused, reason in refusals:
            if refused:
                raise ValueError(reason)


# --------------------------------------------------------------------------------------------------
# Rewards and advantages: [B, G], B prompts of the global batch, G completions of each


def group_advantages(rewards: Tensor, kind: str = "mean") -> Tensor:
    """Advantages [B, G] of `rewards` [B, G] (fp32 or fp64), G at least 2. Each group is on its own.

    mean: r_i minus the group's mean (Dr. GRPO; unbiased up to the factor (G - 1) / G).
    std: that, divided by the group's standard deviation (GRPO; over G - 1, as in TRL and verl).
    rloo: r_i minus the mean of the others (arXiv 2402.14740).
    A group whose rewards are all equal gets exactly 0, rounding or not (`informative`): over a
    standard deviation of 1e-7, the rounding of a KL in the reward would count as much as a verdict.
    Raises ValueError on an unknown kind, a group of one, or a reward that is not finite.
    """
    if not rewards.isfinite().all():
        raise ValueError("rewards must be finite numbers: one NaN would spread to its whole group")
    G = rewards.shape[-1]
    if G < 2:
        raise ValueError("a group of 1 has no siblings, so its advantage is always 0")
    centred = rewards - rewards.mean(-1, keepdim=True)
    match kind:
        case "mean":
            advantages = centred
        case "std":
            advantages = centred / rewards.std(-1, keepdim=True)
        case "rloo":
            advantages = centred * (G / (G - 1))
        case _:
            raise ValueError(f"unknown advantage {kind!r}")
    # where, not a product: 0 / 0 is NaN, and NaN * 0 too
    return torch.where(informative(rewards).unsqueeze(-1), advantages, 0)


def informative(rewards: Tensor) -> Tensor:
    """Groups [B] (bool) whose rewards [B, G] are not all equal: only these have a gradient.

    DAPO's dynamic sampling keeps them and samples further prompts in place of the others. Give it
    the verifier's rewards: with a KL or length penalty added, every group would look informative.
    """
    size = rewards.abs().amax(-1).clamp(min=1)
    return rewards.amax(-1) - rewards.amin(-1) > FLAT * size


def truncation(rewards: Tensor, truncated: Tensor, policy: str = "zero") -> tuple[Tensor, Tensor]:
    """Rewards and a mask `kept` (bool), both [B, G], for completions cut off at the length limit.

    zero: at most 0, whatever the unfinished text says; a penalty stays, or it would pay to ramble.
    keep: nothing changes. mask: their tokens leave the loss and the normaliser; the reward stays in
    the baseline (DAPO's filtering).
    """
    if policy not in ("zero", "mask", "keep"):
        raise ValueError(f"unknown truncation policy {policy!r}")
    if policy == "zero":
        rewards = torch.where(truncated, rewards.clamp(max=0), rewards)
    kept = ~truncated if policy == "mask" else torch.ones_like(truncated)
    return rewards, kept


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft penalty (eq. 13), to be added to the rewards; of the shape of `lengths`.

    0 up to max_tokens - buffer, then falling to -1 at max_tokens. buffer: in tokens, at least 1.
    """
    return ((max_tokens - buffer - lengths) / buffer).clamp(-1, 0)


# --------------------------------------------------------------------------------------------------
# Losses: packed tokens [N] of R completions


def token_weights(lengths: Tensor, kind: str, total_tokens: int, total_sequences: int,
                  max_tokens: int, kept: Tensor | None = None) -> Tensor:
    """Weight [N] (fp32) of each token in the loss, for the completions of one micro-batch.

    lengths [R]: theirs. The totals count the *global* batch. A total or a length of 0 counts as 1.
    token: 1 / total_tokens, every token alike (DAPO).
    sequence: 1 / (length * total_sequences), every completion alike, whatever its length (GRPO).
    constant: 1 / (max_tokens * total_sequences), free of both (Dr. GRPO).
    kept [R] (bool): completions that stay in the loss, the others' tokens weigh 0; the totals must
    count only these. Raises ValueError on an unknown kind.
    """
    match kind:
        case "token":
            divisor = max(1, total_tokens)
        case "sequence":
            divisor = max(1, total_sequences) * lengths.clamp(min=1)
        case "constant":
            divisor = max(1, total_sequences) * max_tokens
        case _:
            raise ValueError(f"unknown normaliser {kind!r}")
    weights = (divisor * torch.ones_like(lengths)).float().reciprocal()
    if kept is not None:
        weights = weights * kept
    return weights.repeat_interleave(lengths)


def policy_loss(loss: Loss, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor,
                lengths: Tensor, weights: Tensor, correction: Tensor | None = None,
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """The value to minimise, - sum_t w_t c_t surrogate_t (a scalar), and `policy_metrics`.

    With ratio = exp(logprobs - old_logprobs), the log ratio cut at +-LOG_RATIO_LIMIT (in gspo it is
    first its completion's `sequence_mean`), and A the advantage of the token's completion:
        reinforce      A log pi
        CLIPPED        `clipped_surrogate`
        cispo          clip(ratio, 1 - clip_low, 1 + clip_high) A log pi, no gradient in the ratio
    logprobs [N] with gradient; old_logprobs [N] under the weights before the batch's first
    optimizer step. advantages [R], lengths [R], weights w [N] of `token_weights`, correction c [N]
    of `sampler_correction`, 1 if None. N = 0 gives a 0 that `backward` accepts. The metrics carry
    no gradient. The caller adds KL and entropy.
    """
    advantages = advantages.repeat_interleave(lengths, output_size=len(logprobs))  # [N]
    log_ratio = logprobs - old_logprobs.detach()
    if loss.name == "gspo":
        log_ratio = sequence_mean(log_ratio, lengths)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    match loss.name:
        case "reinforce":
            surrogate = logprobs * advantages
        case name if name in CLIPPED:
            surrogate = clipped_surrogate(loss, ratio, advantages)
        case "cispo":
            bounded = ratio.detach().clamp(1 - loss.clip_low, 1 + loss.clip_high)
            surrogate = bounded * advantages * logprobs
        case _:
            raise ValueError(f"no case for the loss {loss.name!r}")
    if correction is not None:
        surrogate = surrogate * correction
    value = -(weights * surrogate).sum()
    return value, policy_metrics(loss, ratio.detach(), advantages, weights)


def clipped_surrogate(loss: Loss, ratio: Tensor, advantages: Tensor) -> Tensor:
    """PPO's min(ratio A, clip(ratio) A), all [N]: no reward for moving beyond the clip.

    dual_clip c > 1 (arXiv 1912.09729) bounds it from below by c A where A < 0. Otherwise a bad
    token that has become much likelier since it was sampled would push without limit.
    """
    clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    if loss.dual_clip is None:
        return surrogate
    bounded = torch.max(surrogate, loss.dual_clip * advantages)
    return torch.where(advantages < 0, bounded, surrogate)


def sequence_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums [R] of `values` [N] over each completion, 0 for an empty one. Deterministic on a GPU."""
    if values.device.type == "mps":  # it has no segment_reduce
        return sequence_sum(values.cpu(), lengths.cpu()).to(values.device)
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0, unsafe=True)  # R = 0 too


def sequence_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """A completion's mean of `values` [N], at each of its tokens [N]: the log of GSPO's s_i."""
    means = sequence_sum(values, lengths) / lengths.clamp(min=1)
    owner = torch.repeat_interleave(lengths, output_size=len(values))  # each token's completion
    return means[owner]  # means.repeat_interleave has a backward that adds in random order on a GPU


def sampler_correction(old_logprobs: Tensor, sampler_logprobs: Tensor, lengths: Tensor,
                       kind="truncate", level="token", low=0.5, high=2.0) -> Tensor:
    """Importance weights [N], without gradient, for a sampler that differs from the trainer.

    c = pi_trainer_old / pi_sampler of a token, or of a whole completion (level "sequence").
    truncate: min(c, high), "TIS" (Yao et al. 2025, Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training). mask: c inside [low, high], else 0 (IcePop, arXiv 2510.18855).
    """
    log_ratio = (old_logprobs - sampler_logprobs).detach()
    if level == "sequence":
        total = sequence_sum(log_ratio, lengths)
        log_ratio = total.repeat_interleave(lengths, output_size=len(log_ratio))
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if kind == "truncate":
        return ratio.clamp(max=high)
    if kind == "mask":
        return torch.where((ratio >= low) & (ratio <= high), ratio, 0)
    raise ValueError(f"unknown sampler correction {kind!r}")


def kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3",
       old_logprobs: Tensor | None = None) -> Tensor:
    """Estimates [N] of KL(pi || pi_ref), one per token sampled from pi (Schulman 2020).

    With d = log pi_ref - log pi:  k1 = -d (unbiased, can be negative), k2 = d^2 / 2,
    k3 = e^d - 1 - d (unbiased, never negative: use expm1). Their gradients differ (arXiv
    2506.09477): k2's is the KL's, k3's is that of KL(pi_ref || pi), k1's is zero on average.
    `old_logprobs` multiplies by pi / pi_old (DeepSeek-V3.2), which gives k1 and k3 the gradient of
    KL(pi || pi_ref). d and log(pi / pi_old) are cut at +-LOG_RATIO_LIMIT; of the three arguments
    only logprobs has a gradient. Raises ValueError on an unknown kind.
    """
    difference = (ref_logprobs.detach() - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    match kind:
        case "k1":
            estimate = -difference
        case "k2":
            estimate = difference.square() / 2
        case "k3":
            estimate = difference.expm1() - difference  # exp - 1 would lose the digits near d = 0
        case _:
            raise ValueError(f"unknown KL estimator {kind!r}")
    if old_logprobs is None:
        return estimate
    log_ratio = logprobs - old_logprobs.detach()
    return estimate * log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def kl_reward(old_logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor) -> Tensor:
    """log pi(y) - log pi_ref(y) [R], to be subtracted, times kl_coef, from the rewards.

    Only k1 belongs in a reward: the score function then gives the gradient of KL(pi || pi_ref).
    """
    return sequence_sum((old_logprobs - ref_logprobs).detach(), lengths)


SUMS = ("tokens", "clipped_high", "clipped_low", "clipped_dual", "ratio", "ratio_squared", "old_kl")


def policy_metrics(loss: Loss, ratio: Tensor, advantages: Tensor, weights: Tensor) -> dict:
    """SUMS (scalars) over the tokens in the loss, those of weight > 0; all arguments [N].

    A token counts as clipped where the clip took its gradient. In cispo the gradient lives on, and
    a token counts as clipped where its ratio is cut, whatever the sign of its advantage.
    """
    live = weights > 0
    up, down = live & (advantages > 0), live & (advantages < 0)
    if loss.name == "cispo":
        up = down = up | down
    return {
        "tokens": live.sum(),
        "clipped_high": (up & (ratio > 1 + loss.clip_high)).sum(),
        "clipped_low": (down & (ratio < 1 - loss.clip_low)).sum(),
        "clipped_dual": (down & (ratio > (loss.dual_clip or math.inf))).sum(),
        "ratio": (live * ratio).sum(),
        "ratio_squared": (live * ratio.square()).sum(),
        "old_kl": (live * (ratio - 1 - ratio.log())).sum(),  # k3 of KL(pi_old || pi)
    }


def summarise(sums: dict[str, Tensor]) -> dict[str, float | None]:
    """Means over tokens, of `policy_metrics` added up over the whole batch.

    effective_sample_fraction: 1 on policy, 1/n when one of n tokens outweighs the others. None, as
    the mean ratio, where no token was trained.
    """
    total = {name: float(value) for name, value in sums.items()}
    tokens = max(1.0, total["tokens"])
    squares = max(tokens * total["ratio_squared"], 1e-30)
    clipped = {side: total[f"clipped_{side}"] / tokens for side in ("high", "low", "dual")}
    return {
        "clip_fraction": sum(clipped.values()),
        **{f"clip_fraction_{side}": fraction for side, fraction in clipped.items()},
        "ratio_mean": total["ratio"] / tokens if total["tokens"] else None,
        "old_kl": total["old_kl"] / tokens,
        "effective_sample_fraction": total["ratio"] ** 2 / squares if total["tokens"] else None,
    }
