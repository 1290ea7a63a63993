"""Measures of a persona lottery, in numpy alone: how much does a system prompt move accuracy?

Everything starts from one table, correct[i, p] in {0, 1}: item i answered under persona p, every persona on the same
items. a_p is a column's mean. The persona stability score (PSS) is after PerMix-RLVR (arXiv 2604.08986); the abstract
gives no formula, so min_p a_p / max_p a_p is our reading, and other scores with other failings stand beside it. The
lottery curve is the expected best of k personas drawn without replacement: the estimator of pass@k (Chen et al. 2021,
arXiv 2107.03374), turned from samples to personas. Intervals resample items, all personas together: easy and hard
items then cancel in a comparison. Minimum and maximum of noisy columns are biased; `accuracy_draws` says what is done
about it. Where an arm was trained with several seeds, `seed_spread` adds what they say.

If personas made no difference, PSS would still be below 1, since the worst of P columns is unlucky: `no_effect` says
what it would be. Decisions therefore rest on evaluation/lottery.py, in whose measures luck cancels.

Left out: other significance tests (an interval says more) and anything that needs a model.
"""

from collections import Counter
from math import comb

import numpy as np

SCORES = ("pss", "pss_mean_minus_std", "pss_all_correct", "worst_persona_accuracy", "mean_accuracy",
          "no_persona_accuracy")


def pss(accuracy):
    """min_p a_p / max_p a_p over the last axis of `accuracy` [..., P]; 0 where the maximum is 0."""
    low, high = np.min(accuracy, axis=-1), np.max(accuracy, axis=-1)
    return np.where(high > 0, low / np.where(high > 0, high, 1), 0.0)


def scores(accuracy, all_correct=None):
    """The stability scores of accuracies [..., P] as a dict of arrays [...]; std is that of the population (ddof 0).

    all_correct [...]: the share of items right under every persona, which accuracies alone do not determine.
    """
    mean = np.mean(accuracy, axis=-1)
    out = {
        "pss": pss(accuracy),
        "pss_mean_minus_std": mean - np.std(accuracy, axis=-1),
        "worst_persona_accuracy": np.min(accuracy, axis=-1),
        "mean_accuracy": mean,
    }
    return out if all_correct is None else out | {"pss_all_correct": all_correct}


def table_scores(correct):
    """The scores of a table correct [N, P] as a dict of floats."""
    correct = np.asarray(correct, dtype=float)
    return {name: float(value) for name, value in scores(correct.mean(axis=0), correct.prod(axis=1).mean()).items()}


def shuffled_accuracy(tables, n_draws=500, seed=0):
    """Accuracies [n_draws, S, P] of tables [S, N, P] if personas made no difference: the answers to
    an item are shuffled among them.

    A permutation test (Fisher 1935). Each item is solved as often as before, but no persona is
    better than another. An arm's S runs are shuffled alike, since the luck of a persona with an
    item may be common to them.
    """
    tables, rng = np.asarray(tables, dtype=float), np.random.default_rng(seed)
    orders = (rng.random(tables.shape[1:]).argsort(axis=1)[None] for _ in range(n_draws))
    return np.array([np.take_along_axis(tables, order, 2).mean(axis=1) for order in orders])


def no_effect(tables, seed=0, n_draws=500):
    """What an arm's tables [S, N, P] would give without any effect of personas, by shuffling.

    `pss_shuffled` with `_low` and `_high` (95 % of the shuffles); `pss_shuffled_p`, the chance of a
    mean PSS as low as the arm's; `persona_sd_p`, the chance of a spread as large. Shuffling keeps
    each item's own sum of squares, so the variance of accuracies orders shuffles as S2 does
    (evaluation/lottery.py).
    """
    seen, drawn = np.mean(tables, axis=1)[None], shuffled_accuracy(tables, n_draws, seed)
    out = with_intervals({"pss_shuffled": pss(drawn).mean()}, {"pss_shuffled": pss(drawn).mean(axis=1)})
    for name, extreme in (("pss_shuffled_p", lambda a: -pss(a)), ("persona_sd_p", lambda a: a.var(axis=-1))):
        as_far = extreme(drawn).mean(axis=1) >= extreme(seen).mean() - 1e-9
        out[name] = float((1 + as_far.sum()) / (1 + len(drawn)))
    return out


def draw_weights(n):
    """W [n, n]: W[j-1, k-1] = C(j-1, k-1) / C(n, k), the chance that the j-th smallest of n is the best of k drawn."""
    return np.array([[comb(j - 1, k - 1) / comb(n, k) for k in range(1, n + 1)] for j in range(1, n + 1)])


def lottery(accuracy):
    """E[max of k personas drawn without replacement], k = 1..P, exact, along the last axis of `accuracy` [..., P]."""
    return np.sort(accuracy, axis=-1) @ draw_weights(np.shape(accuracy)[-1])


def held_out_lottery(correct, seed=0, splits=200):
    """What a search really gets: pick the best of k personas on half of the items, score that one on the other half.

    correct [N, P] -> accuracy [P], k = 1..P, exact over the draw of k and averaged over `splits` random halvings;
    ties in the picking half are broken at random. Needs N >= 2 (ValueError).
    """
    correct = np.asarray(correct, dtype=float)
    n, p = correct.shape
    if n < 2:
        raise ValueError("a held-out pick needs at least 2 items")
    rng, total = np.random.default_rng(seed), np.zeros(p)
    for _ in range(splits):
        order = rng.permutation(n)
        picking, scoring = correct[order[:n // 2]].mean(axis=0), correct[order[n // 2:]].mean(axis=0)
        total += scoring[np.lexsort((rng.random(p), picking))]  # held-out accuracies, the last to be picked first
    return total / splits @ draw_weights(p)


# ----------------------------------------------------------------------------------------------------------------------
# Intervals


def resamples(n_items, n=2000, seed=0):
    """Bootstrap counts [n, n_items]: how often each item is drawn. These times a table are its n resampled sums."""
    return np.random.default_rng(seed).multinomial(n_items, np.full(n_items, 1 / n_items), size=n).astype(float)


def accuracy_draws(correct, counts, seed=0):
    """Resampled accuracies [2, B, P] of correct [N, P] under counts [B, N]: as drawn, and with their spread shrunk.

    The smallest of P noisy accuracies lies below the smallest true one, and resampling adds the same error again:
    with 24 equal personas the percentile interval of PSS never covers its true value, 1. Row 1 therefore draws from
    the empirical Bayes posterior of the true accuracies (Efron and Morris 1975): of their observed variance it keeps
    the part f2 that item noise does not explain, itself uncertain by a chi-square of P - 1 degrees. A lone outlier it
    shrinks too far, and there row 0 is right: `interval` takes the hull of both.
    """
    correct = np.asarray(correct, dtype=float)
    n, p = correct.shape
    drawn, accuracy = counts @ correct / n, correct.mean(axis=0)
    if p == 1 or n == 1:
        return np.stack([drawn, drawn])
    error = drawn - accuracy
    common = error.mean(axis=1, keepdims=True)  # an easier draw of items: lifts all personas, is no noise between them
    noise = ((error - common) ** 2).mean() * p / (p - 1) * n / (n - 1)
    variance = accuracy.var(ddof=1) * (p - 1) / np.random.default_rng(seed).chisquare(p - 1, len(counts))
    f2 = np.clip(1 - noise / np.maximum(variance, 1e-12), 0, 1)[:, None]
    shrunk = accuracy.mean() + common + f2 * (accuracy - accuracy.mean()) + np.sqrt(f2) * (error - common)
    return np.stack([drawn, np.clip(shrunk, 0, 1)])


def bootstrap(correct, counts, seed=0):
    """Resampled scores of a table correct [N, P]: a dict of arrays [2, B], the two rows as in accuracy_draws.

    Pass the same counts for two arms and the items are paired: the difference of two such arrays goes to `interval`.
    """
    all_correct = counts @ np.asarray(correct, dtype=float).prod(axis=1) / counts.shape[1]
    return scores(accuracy_draws(correct, counts, seed), np.stack([all_correct, all_correct]))


def interval(values, level=0.95):
    """(low, high): the central `level` of resampled values [..., B], and the hull of the rows where there are
    several."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return float(low.min()), float(high.max())


def with_intervals(values, draws):
    """{name: value} and {name: resampled values} -> {name, name_low, name_high}, as results.json has them."""
    out = {}
    for name, value in values.items():
        low, high = interval(draws[name])
        out |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
    return out


def detectable(low, high):
    """The true difference that a design shows in 80 % of repetitions (two-sided, 5 %): 2.8 standard
    errors, 1.96 of them being half of the 95 % interval (low, high). With few seeds the interval is
    Student's t, and this a little too much."""
    return 2.8 / 1.96 * (high - low) / 2


def crossed(table, seed=0):
    """Resampled means [B] of a table [questions, personas], both drawn anew: an interval for other
    questions and other personas (the pigeonhole bootstrap, Owen 2007; errs on the wide side)."""
    table = np.asarray(table, dtype=float)
    rows, columns = (resamples(n, seed=[seed, axis]) for axis, n in enumerate(table.shape))
    return (rows @ table * columns).sum(axis=1) / table.size


def seed_spread(n, n_draws=2000, seed=0):
    """W [n, n_draws], columns summing to 0: values [n] @ W are draws of how far the mean of n training seeds is off.

    Student's t by simulation: centred normal weights give the mean's normal error, a chi-square of n - 1 degrees its
    uncertain size. Resampling 3 values instead stays within their range, which misses the true mean one time in four.
    """
    if n == 1:
        return np.zeros((1, n_draws))
    rng = np.random.default_rng([seed, n])  # the same for arms of as many seeds: they are paired
    normal = rng.normal(size=(n, n_draws))
    return (normal - normal.mean(axis=0)) / np.sqrt(n * rng.chisquare(n - 1, n_draws))


def over_seeds(values, draws, seed=0):
    """(mean, its draws [2, B]) of one score's values [S] and draws [S, 2, B]: S training seeds of an arm."""
    values = np.asarray(values, dtype=float)
    return values.mean(), np.mean(draws, axis=0) + values @ seed_spread(len(values), np.shape(draws)[-1], seed)


def wilson(hits, n, z=1.96):
    """Wilson's 95 % interval for a proportion: unlike the bootstrap's it does not collapse at 0 of n or n of n."""
    rate, spread = hits / n, z * np.sqrt(hits * (n - hits) / n + z * z / 4) / n
    centre, scale = rate + z * z / (2 * n), 1 + z * z / n
    return float((centre - spread) / scale), float((centre + spread) / scale)


def pass_at_k(hits, n, k):
    """1 - C(n - hits, k) / C(n, k): the chance that one of k of the n samples is right (arXiv 2107.03374)."""
    return 1 - comb(n - hits, k) / comb(n, k)


def majority(rows):
    """Accuracy of the commonest final answer to each item; unreadable answers abstain, and the first wins a tie."""
    ballots = {}
    for row in rows:
        ballots.setdefault(row["id"], []).append(row)
    right = 0
    for ballot in ballots.values():
        winner = Counter(row["extracted"] for row in ballot if row["extracted"]).most_common(1)
        right += any(row["correct"] for row in ballot if winner and row["extracted"] == winner[0][0])
    return right / len(ballots)


def identification(logprobs):
    """Which of k personas wrote the answer? logprobs [A, k] = log p(answer | question, candidate); row a's own is
    column a.

    Returns (hit [A], log posterior of the true persona [A]) under a uniform prior. A tie of t winners scores 1/t, so
    text that says nothing about its persona scores 1/k: chance, not luck of the order.
    """
    best, own = logprobs.max(axis=1), np.diagonal(logprobs)
    hit = np.where(own == best, 1 / (logprobs == best[:, None]).sum(axis=1), 0.0)
    return hit, own - best - np.log(np.exp(logprobs - best[:, None]).sum(axis=1))
