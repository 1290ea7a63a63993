"""Measures of a persona lottery, in numpy alone: how much does a system prompt move accuracy?

Everything starts from one table, correct[i, p] in {0, 1}: item i answered under persona p, every
persona on the same items. a_p is a column's mean. The persona stability score (PSS) is after
PerMix-RLVR (arXiv 2604.08986). The abstract gives no formula: min_p a_p / max_p a_p is our reading,
and other scores stand beside it.

The lottery curve is the expected best of k personas drawn without replacement. It is the estimator
of pass@k (Chen et al. 2021, arXiv 2107.03374) with personas in place of samples.

Intervals resample items, for all personas together, so easy and hard items cancel in a comparison.
The minimum and maximum of noisy columns are biased: see `accuracy_draws`. Where an arm was trained
with several seeds, `seed_spread` adds their spread.

If personas made no difference, PSS would still be below 1, since the worst of P columns is unlucky.
`no_effect` says what it would be. So decisions rest on evaluation/lottery.py, in whose measures
luck cancels.

Left out: other significance tests (an interval says more) and anything that needs a model.
"""

from collections import Counter
from math import comb
from statistics import NormalDist

import numpy as np

LEAST = 20  # items for a claim; in simulation 95 % intervals cover 0.86 at 6 items, 0.94 at 20
SCORES = ("pss", "pss_mean_minus_std", "pss_all_correct", "worst_persona_accuracy",
          "mean_accuracy", "no_persona_accuracy")


def correct_table(rows, n_items):
    """Transcripts with one answer a prompt, persona by persona -> [N, columns] of 0 and 1."""
    return np.array([row["correct"] for row in rows], dtype=float).reshape(-1, n_items).T


def pss(accuracy):
    """min_p a_p / max_p a_p over the last axis of `accuracy` [..., P]; 0 where the maximum is 0."""
    low, high = np.min(accuracy, axis=-1), np.max(accuracy, axis=-1)
    return np.where(high > 0, low / np.where(high > 0, high, 1), 0.0)


def scores(accuracy, all_correct=None):
    """The stability scores of accuracies [..., P] as a dict of arrays [...].

    The standard deviation is that of the population (ddof 0). all_correct [...]: the share of items
    right under every persona, which accuracies alone do not determine.
    """
    mean = np.mean(accuracy, axis=-1)
    out = {"pss": pss(accuracy), "pss_mean_minus_std": mean - np.std(accuracy, axis=-1),
           "worst_persona_accuracy": np.min(accuracy, axis=-1), "mean_accuracy": mean}
    return out if all_correct is None else out | {"pss_all_correct": all_correct}


def table_scores(correct):
    """The scores of a table correct [N, P] as a dict of floats."""
    correct = np.asarray(correct, dtype=float)
    found = scores(correct.mean(axis=0), correct.prod(axis=1).mean())
    return {name: float(value) for name, value in found.items()}


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
    shuffled = pss(drawn)
    out = with_intervals({"pss_shuffled": shuffled.mean()}, {"pss_shuffled": shuffled.mean(axis=1)})
    out["pss_shuffled_p"] = tail(-shuffled, -pss(seen))
    out["persona_sd_p"] = tail(drawn.var(axis=-1), seen.var(axis=-1))
    return out


def tail(drawn, seen):
    """The share of draws [B, S] whose mean over seeds is at least that of what was seen [1, S]."""
    as_far = drawn.mean(axis=1) >= seen.mean() - 1e-9
    return float((1 + as_far.sum()) / (1 + len(drawn)))


def draw_weights(n):
    """W [n, n]: W[j-1, k-1] = C(j-1, k-1) / C(n, k), the chance that the j-th smallest of n is the
    best of k drawn."""
    return np.array([[comb(j, k) / comb(n, k + 1) for k in range(n)] for j in range(n)])


def lottery(accuracy):
    """E[max of k personas drawn without replacement], k = 1..P, exact: `accuracy` [..., P] ->
    [..., P]."""
    return np.sort(accuracy, axis=-1) @ draw_weights(np.shape(accuracy)[-1])


def held_out_lottery(correct, seed=0, splits=200):
    """What a search really gets: the best of k personas on one half of the items, scored on the
    other half.

    correct [N, P] -> accuracy [P], k = 1..P: exact over the draw of k, averaged over `splits`
    random halvings. Ties in the picking half are broken at random. ValueError below N = 2.
    """
    correct = np.asarray(correct, dtype=float)
    n, p = correct.shape
    if n < 2:
        raise ValueError("a held-out pick needs at least 2 items")
    rng, total = np.random.default_rng(seed), np.zeros(p)
    for _ in range(splits):
        order = rng.permutation(n)
        picking = correct[order[:n // 2]].mean(axis=0)
        scoring = correct[order[n // 2:]].mean(axis=0)
        total += scoring[np.lexsort((rng.random(p), picking))]  # from the worst pick to the best
    return total / splits @ draw_weights(p)


# --------------------------------------------------------------------------------------------------
# Intervals


def resamples(n_items, n=2000, seed=0):
    """Bootstrap counts [n, n_items]: how often each item is drawn. Their product with a table is
    its n resampled sums."""
    chances = np.full(n_items, 1 / n_items)
    return np.random.default_rng(seed).multinomial(n_items, chances, size=n).astype(float)


def accuracy_draws(correct, counts, seed=0):
    """Resampled accuracies [2, B, P] of correct [N, P] under counts [B, N]: as drawn, and with
    their spread shrunk.

    The smallest of P noisy accuracies lies below the smallest true one, and resampling adds the
    same error again. With 24 equal personas the percentile interval of PSS never covers its true
    value 1. So row 1 draws from the empirical Bayes posterior of the true accuracies (Efron and
    Morris 1975). Of their observed variance it keeps the part f2 that item noise does not explain.
    That part is uncertain by a chi-square of P - 1 degrees. Row 1 shrinks a lone outlier too far.
    There row 0 is right, so `interval` takes the hull of both.
    """
    correct = np.asarray(correct, dtype=float)
    n, p = correct.shape
    drawn, accuracy = counts @ correct / n, correct.mean(axis=0)
    if p == 1 or n == 1:
        return np.stack([drawn, drawn])
    error = drawn - accuracy
    common = error.mean(axis=1, keepdims=True)  # an easier draw of items lifts all personas alike
    noise = ((error - common) ** 2).mean() * p / (p - 1) * n / (n - 1)
    chisquare = np.random.default_rng(seed).chisquare(p - 1, len(counts))
    variance = accuracy.var(ddof=1) * (p - 1) / chisquare
    f2 = np.clip(1 - noise / np.maximum(variance, 1e-12), 0, 1)[:, None]
    mean = accuracy.mean()
    shrunk = mean + common + f2 * (accuracy - mean) + np.sqrt(f2) * (error - common)
    return np.stack([drawn, np.clip(shrunk, 0, 1)])


def bootstrap(correct, counts, seed=0):
    """Resampled scores of a table correct [N, P]: a dict of arrays [2, B], rows as in
    accuracy_draws.

    With the same counts for two arms the items are paired: `interval` then takes the difference of
    two such arrays.
    """
    all_correct = counts @ np.asarray(correct, dtype=float).prod(axis=1) / counts.shape[1]
    return scores(accuracy_draws(correct, counts, seed), np.stack([all_correct, all_correct]))


def interval(values, level=0.95):
    """(low, high): the central `level` of resampled values [..., B], or the hull of their rows."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return float(low.min()), float(high.max())


def with_intervals(values, draws):
    """{name: value} and {name: resampled values} -> {name, name_low, name_high}, as in
    results.json."""
    out = {}
    for name, value in values.items():
        low, high = interval(draws[name])
        out |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
    return out


def detectable(low, high, level=0.95):
    """The true difference that a design shows in 80 % of repetitions: z + 0.84 standard errors,
    where z of them, 1.96 at 95 %, are half of the interval (low, high). With few seeds the interval
    is Student's t, and this a little too much."""
    z = round(NormalDist().inv_cdf((1 + level) / 2), 2)
    return (z + 0.84) / z * (high - low) / 2


def crossed(table, seed=0):
    """Resampled means [B] of a table [questions, personas], both drawn anew: an interval for other
    questions and other personas (the pigeonhole bootstrap, Owen 2007; errs on the wide side)."""
    table = np.asarray(table, dtype=float)
    rows, columns = (resamples(n, seed=[seed, axis]) for axis, n in enumerate(table.shape))
    return (rows @ table * columns).sum(axis=1) / table.size


def seed_spread(n, n_draws=20_000, seed=0):
    """W [n, n_draws], columns summing to 0: values [n] @ W are draws of the error of the mean of n
    training seeds.

    Student's t by simulation: centred normal weights give the mean's normal error, a chi-square of
    n - 1 degrees its uncertain size. Resampling 3 values would stay within their range, and miss
    the true mean one time in four.
    """
    if n == 1:
        return np.zeros((1, n_draws))
    rng = np.random.default_rng([seed, n])  # the same for arms of as many seeds: they are paired
    normal = rng.normal(size=(n, n_draws))
    return (normal - normal.mean(axis=0)) / np.sqrt(n * rng.chisquare(n - 1, n_draws))


def over_seeds(values, draws, seed=0):
    """(mean, its draws [2, 10 B]) of one score over S training seeds: values [S], draws [S, 2, B].

    Each draw of the items meets ten of the seeds: t's tails are long, and with 2,000 draws of a
    fixed generator an interval of 3 seeds was up to 15 % too short, of 4 up to 21 % too long.
    """
    values, draws = np.asarray(values, dtype=float), np.tile(np.mean(draws, axis=0), 10)
    return values.mean(), draws + values @ seed_spread(len(values), draws.shape[-1], seed)


def wilson(hits, n, z=1.96):
    """Wilson's 95 % interval for a proportion. It does not collapse at 0 of n or n of n, as the
    bootstrap's does."""
    rate, spread = hits / n, z * np.sqrt(hits * (n - hits) / n + z * z / 4) / n
    centre, scale = rate + z * z / (2 * n), 1 + z * z / n
    return float((centre - spread) / scale), float((centre + spread) / scale)


def pass_at_k(hits, n, k):
    """1 - C(n - hits, k) / C(n, k): the chance that one of k of the n samples is right
    (arXiv 2107.03374)."""
    return 1 - comb(n - hits, k) / comb(n, k)


def majority(rows):
    """Accuracy of the commonest final answer to each item. Unreadable answers abstain, and the
    first answer wins a tie."""
    ballots = {}
    for row in rows:
        ballots.setdefault(row["id"], []).append(row)
    right = 0
    for ballot in ballots.values():
        votes = Counter(row["extracted"] for row in ballot if row["extracted"])
        for winner, _ in votes.most_common(1):
            right += any(row["correct"] for row in ballot if row["extracted"] == winner)
    return right / len(ballots)


def identification(logprobs):
    """Which of k personas wrote the answer? logprobs [A, k] = log p(answer | question, candidate),
    where row a's own persona is column a.

    Returns (hit [A], log posterior of the true persona [A]) under a uniform prior. A tie of t
    winners scores 1/t, so text that says nothing about its persona scores 1/k, which is chance.
    """
    best, own = logprobs.max(axis=1), np.diagonal(logprobs)
    hit = np.where(own == best, 1 / (logprobs == best[:, None]).sum(axis=1), 0.0)
    return hit, own - best - np.log(np.exp(logprobs - best[:, None]).sum(axis=1))


# --------------------------------------------------------------------------------------------------
# How long answers are


def totals(rows):
    """Mean tokens of an answer, the share that was cut off, and how many were given up."""
    return {"tokens_per_answer": sum(row["tokens"] for row in rows) / len(rows),
            "truncated_fraction": sum(row["truncated"] for row in rows) / len(rows),
            "errors": sum(row["error"] is not None for row in rows)}


def lengths(rows, n_items):
    """How long each persona's answers are -> a dict each, from one answer per prompt.

    `tokens` an answer, `truncated` (the share that was cut off), and `accuracy_finished` among the
    others (None where all were cut off). A lottery of lengths is no lottery of competence.
    """
    table = np.array([[row["tokens"], row["truncated"], row["correct"]] for row in rows], float)
    out = []
    for tokens, cut, right in table.reshape(-1, n_items, 3).transpose(0, 2, 1):
        finished = float(right[cut == 0].mean()) if not cut.all() else None
        out.append({"tokens": float(tokens.mean()), "truncated": float(cut.mean()),
                    "accuracy_finished": finished})
    return out


def has_table(results: dict) -> bool:
    """Whether a results dict says of each persona and item if the answer is right."""
    try:
        tables = [results["correct"][row["name"]] for row in results["personas"]]
        return bool(tables) and all(isinstance(table, str) and set(table) <= {"0", "1"}
                                    and len(table) == len(results["items"]) for table in tables)
    except (TypeError, KeyError):
        return False


def answer_table(run):
    """The table of right and wrong [N, 1 + P] of a results dict, column 0 without a persona."""
    columns = [list(run["correct"][row["name"]]) for row in run["personas"]]
    return np.array(columns, dtype=float).T
