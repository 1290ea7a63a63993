"""The persona lottery with the luck taken out, in numpy alone.

The worst and the best of P noisy accuracies differ even where personas make no difference. Here the
spread comes from products over *different* items, in which the noise of an item cancels:

    c[s, i, p] in {0, 1}    training seed s, item i, persona p; all seeds answer the same items
    d[s, i] = c[s, i] minus its mean over personas
    S2 = sum over i != j of d_i . d_j / [N (N - 1) (P - 1)]

S2 is unbiased for the variance (ddof 1) of the personas' true accuracies, whatever the items are
like. Without an effect it is 0 on average, so it can be negative; its signed root is then negative
too. An arm's S2 is the mean over its seeds. The formulas are ours unless a source is named.

Intervals of S2 add two variances: over items, the delete-one-item jackknife (Efron and Stein 1981),

    (N - 1) / N  sum_i (S2 without item i - their mean)^2,

and over seeds, var_s(S2_s) / S, with Student's t (`measures.seed_spread`). The luck of a seed with
an item is in both, so the sum errs on the wide side. So does the jackknife near S2 = 0, by a factor
of 1.4: whether there is any lottery at all, `measures.no_effect` tests exactly. The bootstrap would
be wrong: an item drawn twice is a product with itself.

Left out: a spread of its own for each problem kind, and personas as a sample from a larger pool.
These P personas are what is measured.
"""

import numpy as np

from evaluation import measures

NAMES = ("persona_sd", "persona_sd_common", "persona_sd_logit", "harmful_gap", "pss_deconvolved")
HARMFUL = ("conflict", "harmful")  # strata that should cost accuracy; the first that is there
RIDGE = 0.25  # of the conditional logit: a normal prior of 2 logits


def signed_root(x):
    """sign(x) sqrt(|x|), so that a variance that came out negative stays visible."""
    return np.sign(x) * np.sqrt(np.abs(x))


# --------------------------------------------------------------------------------------------------
# Products over different items


def centred(tables):
    """d [S, N, P]: tables [S, N, P] minus each item's mean over personas."""
    tables = np.asarray(tables, dtype=float)
    return tables - tables.mean(axis=2, keepdims=True)


def products(tables):
    """sum over items i != j of d[s, i] . d[t, j] / [N (N-1) (P-1)]: [S, S]. The diagonal is S2."""
    d = centred(tables)
    n, p = d.shape[1:]
    total, same_item = d.sum(axis=1), np.einsum("sip,tip->st", d, d)
    return (total @ total.T - same_item) / (n * (n - 1) * (p - 1))


def products_without_each_item(tables):
    """`products` of the other items, for every item left out: [N, S, S]."""
    d = centred(tables)
    n, p = d.shape[1:]
    rest, own = d.sum(axis=1, keepdims=True) - d, np.einsum("sip,tip->ist", d, d)
    same_item = own.sum(axis=0) - own
    return (np.einsum("sip,tip->ist", rest, rest) - same_item) / ((n - 1) * (n - 2) * (p - 1))


def within(pairs):
    """Mean of the diagonal of pairs [..., S, S]: products inside a seed."""
    return np.trace(pairs, axis1=-2, axis2=-1) / pairs.shape[-1]


def between(pairs):
    """Mean off the diagonal of pairs [..., S, S], S >= 2: products over different seeds."""
    s = pairs.shape[-1]
    return (pairs.sum(axis=(-2, -1)) - np.trace(pairs, axis1=-2, axis2=-1)) / (s * (s - 1))


def persona_sd(tables):
    """True spread of accuracy over personas: signed root of the mean S2 of tables [S, N, P], 0..1.

    Needs N >= 2 and P >= 2.
    """
    return float(signed_root(within(products(tables))))


def persona_sd_common(tables):
    """The part of `persona_sd` that repeats over training seeds; None with one seed."""
    return float(signed_root(between(products(tables)))) if len(tables) > 1 else None


# --------------------------------------------------------------------------------------------------
# The spread in logits: a conditional logit, items conditioned out


def inclusion(beta, n_right):
    """P(p is right) [K, P] and P(p and q are) [K, P, P] where k of P are right, k in n_right [K].

    Answers are independent, with odds w = exp(beta). A set of k personas then has the chance
    prod w / e_k(w), e_k the elementary symmetric polynomial (Rasch 1960, Andersen 1970), and
    P(p is right) = w_p e_(k-1)(w without p) / e_k(w). Exact; all k >= 1.
    """
    n, odds, each = len(beta), np.exp(beta - np.mean(beta)), np.arange(len(beta))
    e = np.zeros((n + 1, n + 1, n + 1))  # e_k(w without p and q) at [p, q, k]; n leaves out none
    e[..., 0] = 1
    for j in range(n):
        factor = np.full((n + 1, n + 1, 1), odds[j])
        factor[j], factor[:, j] = 0, 0
        e[..., 1:] += factor * e[..., :-1]
    k = np.asarray(n_right)
    total = e[n, n, k]  # [K]
    one = odds * e[each, n][:, k - 1].T / total[:, None]
    rest = np.where(k > 1, e[:n, :n][..., k - 2], 0)  # [P, P, K]
    two = (np.outer(odds, odds)[..., None] * rest / total).transpose(2, 0, 1)
    two[:, each, each] = one
    return one, two


def conditional_logit(correct):
    """(beta [P], influence [N, P]) of one table correct [N, P]; None below 2 items that differ.

    logit P(c[i, p] = 1) = alpha_i + beta_p, given how many personas were right on the item, so that
    alpha_i drops out. Items that all or no personas solve say nothing and have influence 0.
    influence: H^-1 (score of the item); V = sum of its outer products is the sandwich, clustered by
    item. A persona that is always or never right has no finite estimate, and with few items that
    is common. So beta has a ridge: a normal prior of 2 logits, small beside spreads of 0.1 to 1.
    """
    correct = np.asarray(correct, dtype=float)
    right, n_personas = correct.sum(axis=1).astype(int), correct.shape[1]
    told = (right > 0) & (right < n_personas)
    if told.sum() < 2:
        return None
    n_right, group, count = np.unique(right[told], return_inverse=True, return_counts=True)
    beta = np.zeros(n_personas)
    for _ in range(50):  # Newton; the penalised likelihood is concave
        one, two = inclusion(beta, n_right)
        score = correct[told].sum(axis=0) - count @ one - RIDGE * beta
        spread = two - one[:, :, None] * one[:, None, :]
        hessian = np.tensordot(count, spread, 1) + RIDGE * np.eye(n_personas)
        step = np.linalg.solve(hessian, score)
        beta = beta + step * min(1, 2 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    influence = np.zeros(correct.shape)
    influence[told] = np.linalg.solve(hessian, (correct[told] - one[group]).T).T
    return beta, influence * np.sqrt(told.sum() / (told.sum() - 1))


def logit_variance(correct):
    """(sigma^2 = (sum beta^2 - tr V) / (P - 1), its change with each item [N]) of a table [N, P];
    None where there is no estimate. The change is to first order: 2 beta . influence / (P - 1)."""
    fit = conditional_logit(correct)
    if fit is None:
        return None
    (beta, influence), p = fit, len(fit[0])
    return (beta @ beta - (influence**2).sum()) / (p - 1), 2 * influence @ beta / (p - 1)


def persona_sd_logit(tables):
    """Spread over personas in logits, items conditioned out: free of saturation. Mean variance over
    seeds, signed root; None where a table has fewer than 2 items that some but not all solve."""
    found = [logit_variance(table) for table in tables]
    return None if None in found else float(signed_root(np.mean([value for value, _ in found])))


# --------------------------------------------------------------------------------------------------
# Strata, the range without luck, and what it rests on


def harmful_gap(tables, strata, stratum=None):
    """Mean over the other strata minus mean over `stratum`, item by item: tables [..., N, P] and P
    names -> [..., N]. Without a name it is the first of HARMFUL that is there. None where it is
    absent, or nothing else is there."""
    strata = np.array(strata)
    name = stratum or next((name for name in HARMFUL if name in strata), None)
    inside = strata == name
    if not inside.any() or inside.all():
        return None
    tables = np.asarray(tables, dtype=float)
    return tables[..., ~inside].mean(axis=-1) - tables[..., inside].mean(axis=-1)


def pss_deconvolved(tables, s2=None):
    """min over max of mean + g (a_p - mean), g^2 = max(S2, 0) / Var_p(a_p), of tables [S, N, P].

    The range of accuracies whose spread is the true one (g <= 1). An arm has one g, and the mean
    over its seeds is returned. s2 [...]: other values of S2, as drawn for an interval -> [...].
    """
    accuracy = np.mean(tables, axis=1)  # [S, P]
    s2 = within(products(tables)) if s2 is None else s2
    noisy = accuracy.var(axis=1, ddof=1).mean()
    g = np.sqrt(np.maximum(s2, 0) / noisy) if noisy > 0 else np.zeros(np.shape(s2))
    mean = accuracy.mean(axis=1, keepdims=True)
    shrunk = mean + np.multiply.outer(g, accuracy - mean)
    return measures.pss(np.clip(shrunk, 0, 1)).mean(axis=-1)


def without_each(tables, measure):
    """measure(tables without persona p) for each p: [P]. One outlier can make a lottery."""
    tables = np.asarray(tables, dtype=float)
    return np.array([measure(np.delete(tables, p, axis=2)) for p in range(tables.shape[2])])


def leave_one_out(tables, names):
    """The range of `pss_deconvolved` with one persona left out, and the persona on which it rests:
    without it, the measure is highest. None below 2 items or 3 personas."""
    if np.shape(tables)[1] < 2 or np.shape(tables)[2] < 3:
        return None
    found = without_each(tables, pss_deconvolved)
    return {"low": float(found.min()), "high": float(found.max()), "persona": names[found.argmax()]}


# --------------------------------------------------------------------------------------------------
# Intervals, and curves


def drawn(values, change, seed=0):
    """(mean, its draws) of seeds' values [S] whose mean changes by change [N] with each item.

    Normal weights on the items: the draws' variance is sum change^2, plus the seeds' spread.
    The weights are the same for every arm with as many items: differences are paired.
    """
    weights = np.random.default_rng([seed, len(change), 1]).normal(size=(2000, len(change)))
    return measures.over_seeds(values, [np.mean(values) + weights @ change], seed)


def variances(tables, seed=0):
    """{"persona_sd", "persona_sd_common"}: (S2, its draws [B]) of tables [S, N, P], N > 2, P > 1.

    The common part from 3 seeds on: two leave its own spread over seeds unknown.
    """
    (s, n, _), pairs = np.shape(tables), products(tables)
    without = products_without_each_item(tables)
    change = np.sqrt((n - 1) / n) * (without - without.mean(axis=0))
    out = {"persona_sd": drawn(np.diag(pairs), within(change), seed)}
    if s > 2:
        out["persona_sd_common"] = drawn(seed_values(pairs), between(change), seed)
    return out


def seed_values(pairs):
    """The jackknife's pseudo-values [S] of `between`, pairs [S, S], S > 2: S times it, minus S - 1
    times its value without the seed. A mean over pairs of seeds has no values of single seeds."""
    s = len(pairs)
    own = (pairs.sum(axis=1) - np.diag(pairs)) / (s - 1)
    return own.mean() + 2 * (s - 1) / (s - 2) * (own - own.mean())


def estimates(tables, strata, seed=0):
    """{measure: (value, draws [B])} of an arm's tables [S, N, P], for `measures.interval`.

    What cannot be computed is left out: below 3 items or 2 personas all that rests on S2.
    """
    tables, out = np.asarray(tables, dtype=float), {}
    (_, n, p), gap = tables.shape, harmful_gap(tables, strata)
    if gap is not None:
        resampled = measures.resamples(n, seed=seed) @ gap.mean(axis=0) / n
        out["harmful_gap"] = measures.over_seeds(gap.mean(axis=1), [resampled], seed)
    if n < 3 or p < 2:
        return out
    squares, logit = variances(tables, seed), [logit_variance(table) for table in tables]
    out["pss_deconvolved"] = tuple(pss_deconvolved(tables, s2) for s2 in squares["persona_sd"])
    if None not in logit:
        values, changes = map(np.array, zip(*logit, strict=True))
        squares["persona_sd_logit"] = drawn(values, changes.mean(axis=0), seed)
    return out | {name: tuple(map(signed_root, found)) for name, found in squares.items()}


def at_equal_accuracy(first, second):
    """Two curves over checkpoints, [T, 2] of (accuracy, measure), compared at equal accuracy.

    Both are interpolated, as lines, at every accuracy of either that lies in the overlap ->
    {"accuracy": [M], "first": [M], "second": [M], "difference": mean of second - first over the
    overlap}; None where they do not overlap. Checkpoints are put in the order of their accuracy;
    those of one accuracy are one point, with their mean.
    """
    first, second = (np.array([(x, np.mean([y for at, y in curve if at == x]))
                               for x in sorted({at for at, _ in curve})])
                     for curve in (first, second))
    low, high = max(first[0, 0], second[0, 0]), min(first[-1, 0], second[-1, 0])
    if low > high:
        return None
    both = np.unique(np.concatenate([first[:, 0], second[:, 0]]))
    accuracy = both[(both >= low) & (both <= high)]
    a, b = (np.interp(accuracy, *curve.T) for curve in (first, second))
    mean = np.trapezoid(b - a, accuracy) / (high - low) if high > low else (b - a)[0]
    return {"accuracy": accuracy.tolist(), "first": a.tolist(), "second": b.tolist(),
            "difference": float(mean)}
