"""evaluation/lottery.py: estimators against brute force on tiny tables, and the truth in simulation."""

import itertools
from functools import cache

import numpy as np
import pytest

from evaluation import lottery, measures

P, SIZES = 24, [(50, 0.25), (50, 0.6), (200, 0.25), (200, 0.6)]  # items, mean accuracy
SPREADS = (0.0, 0.01, 0.02, 0.04, 0.08)  # true persona_sd
DIFFICULTY = {0.25: (1.0, 3.0), 0.6: (1.8, 1.2)}  # of items: beta distributions of these means
TINY = (np.random.default_rng(0).random((3, 5, 4)) < 0.5).astype(float)


def effects(spread):
    """P persona effects on accuracy with exactly this spread (ddof 1) and mean 0."""
    line = np.linspace(-1, 1, P)
    return line / line.std(ddof=1) * spread


def simulated(runs, n_items, accuracy, effect, rng):
    """Tables [runs, N, P]: items differ in difficulty q, a persona adds effect * q (1 - q) / its mean.

    So E c[i, p] = accuracy + effect_p exactly, and chances stay within 0 and 1.
    """
    a, b = DIFFICULTY[accuracy]
    q = rng.beta(a, b, size=(runs, n_items, 1))
    chance = q + effect * q * (1 - q) * (a + b) * (a + b + 1) / (a * b)
    return (rng.random((runs, n_items, len(effect))) < chance).astype(float)


def squares(tables):
    """S2 of each table [runs, N, P] by itself."""
    return np.array([lottery.products(table[None])[0, 0] for table in tables])


@cache
def many(n_items, accuracy, spread):
    """Simulated tables that several tests look at."""
    rng = np.random.default_rng([n_items, int(100 * accuracy), int(100 * spread)])
    return simulated(400, n_items, accuracy, effects(spread), rng)


# ----------------------------------------------------------------------------------------------------------------------
# Against brute force


def by_pairs(tables, s, t):
    """The mean over pairs of different items of d[s, i] . d[t, j] / (P - 1), term by term."""
    d = tables - tables.mean(axis=2, keepdims=True)
    pairs = list(itertools.permutations(range(tables.shape[1]), 2))
    return sum(d[s, i] @ d[t, j] for i, j in pairs) / len(pairs) / (tables.shape[2] - 1)


def test_s2_and_its_common_part_are_means_over_pairs_of_different_items():
    want = [[by_pairs(TINY, s, t) for t in range(3)] for s in range(3)]
    assert lottery.products(TINY) == pytest.approx(np.array(want))
    inside = np.trace(want) / 3
    across = (np.sum(want) - np.trace(want)) / 6
    assert lottery.persona_sd(TINY) == pytest.approx(np.sign(inside) * abs(inside) ** 0.5)
    assert lottery.persona_sd_common(TINY) == pytest.approx(np.sign(across) * abs(across) ** 0.5)
    assert lottery.persona_sd_common(TINY[:1]) is None


def test_leaving_an_item_out_equals_computing_anew_without_it():
    want = [lottery.products(np.delete(TINY, i, axis=1)) for i in range(5)]
    assert lottery.products_without_each_item(TINY) == pytest.approx(np.array(want))


def test_a_seed_counts_in_the_common_part_as_the_jackknife_without_it_says():
    pairs = lottery.products(np.concatenate([TINY, TINY[:, ::-1]])[:4])
    rest = [lottery.between(np.delete(np.delete(pairs, s, 0), s, 1)) for s in range(4)]
    assert lottery.seed_values(pairs) == pytest.approx(4 * lottery.between(pairs) - 3 * np.array(rest))


def test_a_table_by_hand_has_the_spread_of_its_two_personas():
    """Persona a solves all, b nothing: accuracies 1 and 0, variance 1/2, and no luck at all."""
    assert lottery.persona_sd(np.array([[[1, 0]] * 4])) == pytest.approx(0.5**0.5)
    assert lottery.persona_sd(np.array([[[1, 0], [0, 1]]])) == pytest.approx(-(0.5**0.5))


def chances(beta, k):
    """All sets of k of the personas, as rows of 0 and 1, and their chances where k are right."""
    everyone = range(len(beta))
    sets = np.array([[p in s for p in everyone] for s in itertools.combinations(everyone, k)])
    weight = np.exp(sets @ beta)
    return sets.astype(float), weight / weight.sum()


def test_the_chances_of_the_conditional_logit_equal_those_over_all_sets():
    beta = np.array([0.3, -1.2, 0.8, 0.1, 2.0])
    one, two = lottery.inclusion(beta, [1, 2, 3, 4, 5])
    for k in range(1, 6):
        sets, chance = chances(beta, k)
        assert one[k - 1] == pytest.approx(chance @ sets)
        assert two[k - 1] == pytest.approx(np.einsum("s,sp,sq->pq", chance, sets, sets))


def penalised(beta, correct):
    """The penalised conditional log-likelihood, by enumeration."""
    total = -lottery.RIDGE / 2 * beta @ beta
    for row in correct:
        sets, chance = chances(beta, int(row.sum()))
        total += np.log(chance[(sets == row).all(axis=1)][0])
    return total


def test_the_conditional_logit_is_the_enumerated_maximum_and_its_variance_the_sandwich():
    correct = (np.random.default_rng(1).random((12, 4)) < [0.3, 0.5, 0.6, 0.8]).astype(float)
    beta, influence = lottery.conditional_logit(correct)
    step, axes = 1e-4, np.eye(4) * 1e-4

    def slope(at, rows):
        return np.array([penalised(at + a, rows) - penalised(at - a, rows) for a in axes]) / (2 * step)

    assert slope(beta, correct) == pytest.approx(np.zeros(4), abs=1e-5)
    hessian = -np.array([slope(beta + a, correct) - slope(beta - a, correct) for a in axes]) / (2 * step)
    scores = np.array([slope(beta, row[None]) + lottery.RIDGE * beta for row in correct])
    told = (0 < correct.sum(axis=1)) & (correct.sum(axis=1) < 4)
    inverse = np.linalg.inv(hessian)
    sandwich = inverse @ scores.T @ scores @ inverse * told.sum() / (told.sum() - 1)
    assert influence.T @ influence == pytest.approx(sandwich, rel=1e-3, abs=1e-5)
    want = (beta @ beta - np.trace(sandwich)) / 3
    assert lottery.logit_variance(correct)[0] == pytest.approx(want, rel=1e-3)


def test_items_that_all_or_none_solve_say_nothing_to_the_conditional_logit():
    correct = many(50, 0.6, 0.04)[0]
    more = np.vstack([correct, np.ones((3, P)), np.zeros((2, P))])
    assert lottery.persona_sd_logit([more]) == pytest.approx(lottery.persona_sd_logit([correct]))
    assert lottery.persona_sd_logit([np.ones((5, P))]) is None


def test_a_persona_that_is_never_right_has_a_finite_place_below_the_others():
    correct = many(50, 0.6, 0.0)[1].copy()
    correct[:, 7] = 0
    beta, _ = lottery.conditional_logit(correct)
    assert beta.argmin() == 7 and -8 < beta[7] < np.delete(beta, 7).min() - 1


def test_the_harmful_gap_by_hand_names_its_stratum_or_is_absent():
    tables = np.array([[[1, 0, 0, 1], [1, 1, 0, 0]]])
    strata = ["expert", "harmful", "harmful", "neutral"]
    assert lottery.harmful_gap(tables, strata).tolist() == [[1, 0]]
    assert lottery.harmful_gap(tables[0], strata, "neutral") == pytest.approx([-2 / 3, 2 / 3])
    got = lottery.harmful_gap(tables, ["conflict", *strata[1:]])
    assert got == pytest.approx(np.array([[-2 / 3, -2 / 3]]))
    assert lottery.harmful_gap(tables, ["expert"] * 4) is None
    assert lottery.harmful_gap(tables, ["harmful"] * 4) is None


def test_the_deconvolved_range_by_hand():
    """Two personas, accuracies 4/5 and 1/5: Var 0.18, S2 (4.5 - 2.5) / (5 * 4) = 0.1."""
    table = np.array([[[1, 0], [1, 0], [1, 0], [1, 0], [0, 1]]])
    g = (0.1 / 0.18) ** 0.5
    assert lottery.pss_deconvolved(table) == pytest.approx((0.5 - 0.3 * g) / (0.5 + 0.3 * g))
    assert lottery.pss_deconvolved(table, np.array([-1.0, 0.18])) == pytest.approx([1, 0.25])


def test_two_curves_are_compared_where_both_have_been_by_hand():
    first, second = [(0.2, 4.0), (0.4, 2.0), (0.6, 2.0)], [(0.5, 1.0), (0.3, 2.0)]
    got = lottery.at_equal_accuracy(first, second)
    assert got["accuracy"] == [0.3, 0.4, 0.5]
    assert got["first"] == pytest.approx([3, 2, 2]) and got["second"] == pytest.approx([2, 1.5, 1])
    assert got["difference"] == pytest.approx((-0.75 - 0.75) / 2)  # the means of two straight pieces
    touching = lottery.at_equal_accuracy(first, [(0.6, 5.0), (0.9, 0.0)])
    assert touching["accuracy"] == [0.6] and touching["difference"] == 3
    assert lottery.at_equal_accuracy(first, [(0.7, 5.0), (0.9, 0.0)]) is None
    tied = lottery.at_equal_accuracy([(0.5, 2.0), (0.5, 8.0), (0.6, 4.0)], [(0.5, 5.0), (0.6, 5.0)])
    assert tied["first"] == [5, 4] and tied["difference"] == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Against the truth, in simulation


@pytest.mark.parametrize("n_items, accuracy", SIZES)
def test_p41_s2_is_unbiased_for_every_true_spread_where_the_spread_of_accuracies_is_not(n_items, accuracy):
    for spread in SPREADS:
        tables = many(n_items, accuracy, spread)
        got = squares(tables)
        error = got.std() / len(got) ** 0.5
        assert abs(got.mean() - spread**2) < 3.5 * error, spread
        assert tables.mean(axis=1).var(axis=1, ddof=1).mean() - spread**2 > 10 * error, spread


@pytest.mark.parametrize("n_items, accuracy", [
    *SIZES[::3], *(pytest.param(*size, marks=pytest.mark.slow) for size in SIZES[1:3])])
def test_the_jackknife_interval_covers_the_true_spread(n_items, accuracy):
    for spread in (0.0, 0.02, 0.08):
        covered = 0
        for run, table in enumerate(many(n_items, accuracy, spread)[:150]):
            low, high = measures.interval(lottery.variances(table[None], run)["persona_sd"][1])
            covered += low <= spread**2 <= high
        assert covered / 150 >= 0.88, (spread, covered / 150)


@pytest.mark.parametrize("n_items, accuracy, runs", [(50, 0.25, 300), (50, 0.6, 300), (200, 0.6, 80)])
def test_the_permutation_test_is_fooled_in_one_case_of_twenty_at_most(n_items, accuracy, runs):
    p = np.array([measures.no_effect(table[None], run, n_draws=99)["persona_sd_p"]
                  for run, table in enumerate(many(n_items, accuracy, 0.0)[:runs])])
    assert np.mean(p <= 0.05) <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5 and 0.4 < p.mean() < 0.62


def test_the_permutation_test_finds_a_lottery_that_is_there():
    p = [measures.no_effect(table[None], n_draws=99)["persona_sd_p"] for table in many(50, 0.6, 0.08)[:40]]
    assert np.mean(np.array(p) <= 0.05) > 0.9


def seeds_of(n_seeds, common, own, rng, n_items=50):
    """An arm [S, N, P] whose persona effects are `common` to its seeds plus a draw of each seed's own."""
    line = effects(common)
    return np.concatenate([simulated(1, n_items, 0.6, line + rng.permutation(effects(own)), rng)
                           for _ in range(n_seeds)])


def test_the_common_part_is_what_repeats_over_seeds_and_both_intervals_cover():
    rng, found, covered = np.random.default_rng(5), [], {"persona_sd": 0, "persona_sd_common": 0}
    truth = {"persona_sd": 0.05**2 + 0.03**2, "persona_sd_common": 0.05**2}
    for run in range(150):
        got = lottery.variances(seeds_of(4, 0.05, 0.03, rng), run)
        found.append([got[name][0] for name in truth])
        for name, (_, draws) in got.items():
            low, high = measures.interval(draws)
            covered[name] += low <= truth[name] <= high
    off = (np.mean(found, axis=0) - list(truth.values())) / (np.std(found, axis=0) / 150**0.5)
    assert np.abs(off).max() < 3.5 and min(covered.values()) / 150 >= 0.88, (off, covered)


def test_a_paired_difference_in_spread_covers_the_truth_and_is_seldom_shown_without_one():
    rng, covered, wrong = np.random.default_rng(6), 0, 0
    for run in range(150):
        a, b, c = (lottery.variances(seeds_of(3, spread, 0.02, rng), run)["persona_sd"][1]
                   for spread in (0.06, 0.02, 0.02))
        low, high = measures.interval(b - a)
        covered += low <= 0.02**2 - 0.06**2 <= high
        low, high = measures.interval(c - b)
        wrong += low > 0 or high < 0
    assert covered / 150 >= 0.88 and wrong / 150 <= 0.05 + 3 * (0.05 * 0.95 / 150) ** 0.5


def test_more_items_or_seeds_narrow_the_interval():
    rng = np.random.default_rng(7)
    width = {(n, s): np.subtract(*measures.interval(
        lottery.variances(seeds_of(s, 0.05, 0.0, rng, n))["persona_sd"][1])[::-1])
        for n, s in ((50, 1), (50, 12), (400, 1))}
    assert width[50, 12] < width[50, 1] and width[400, 1] < width[50, 1] / 2


@pytest.mark.parametrize("spread", [0.0, 0.35, 0.7])
def test_the_spread_in_logits_is_found_at_low_and_at_high_accuracy(spread):
    rng, beta = np.random.default_rng(8), effects(spread)
    for level in (-1.5, 2.0):
        logits = level + 1.5 * rng.normal(size=(60, 100, 1)) + beta
        tables = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
        got = [lottery.logit_variance(table)[0] for table in tables]
        error = np.std(got) / 60**0.5
        assert abs(np.mean(got) - spread**2) < 3.5 * error + 0.08 * spread**2, (level, np.mean(got))


def test_the_interval_of_the_spread_in_logits_covers():
    rng, beta, covered = np.random.default_rng(9), effects(0.5), 0
    for run in range(100):
        logits = 1.5 * rng.normal(size=(60, 1)) + beta
        table = (rng.random((60, P)) < 1 / (1 + np.exp(-logits))).astype(float)
        low, high = measures.interval(lottery.estimates([table], ["x"] * P, run)["persona_sd_logit"][1])
        covered += low <= 0.5 <= high
    assert covered / 100 >= 0.88, covered


def test_an_arm_without_effect_has_a_deconvolved_pss_near_1_where_its_pss_is_not():
    arms = [seeds_of(6, 0.0, 0.0, np.random.default_rng(run)) for run in range(40)]
    assert np.mean([lottery.pss_deconvolved(arm) for arm in arms]) > 0.95
    assert np.mean([measures.pss(arm.mean(axis=1)).mean() for arm in arms]) < 0.8


def test_the_deconvolved_pss_of_a_wide_lottery_is_that_of_the_true_accuracies():
    true = measures.pss(0.6 + effects(0.08))
    got = [lottery.pss_deconvolved(table[None]) for table in many(200, 0.6, 0.08)[:100]]
    assert np.mean(got) == pytest.approx(true, abs=0.05)


def test_leaving_one_out_names_the_outlier_that_makes_the_lottery():
    effect, names = np.zeros(P), [f"p{j}" for j in range(P)]
    effect[5] = -0.3
    (table,) = simulated(1, 200, 0.6, effect * 0.6, np.random.default_rng(3))
    got = lottery.leave_one_out([table], names)
    assert got["persona"] == "p5" and got["high"] > 0.85 > 0.75 > got["low"]
    assert lottery.leave_one_out([table[:, :2]], names[:2]) is None


def test_what_a_table_is_too_small_for_is_left_out():
    assert lottery.estimates(TINY[:, :2], ["x"] * 4) == {}
    assert lottery.estimates(TINY[:, :, :1], ["x"]) == {}
    got = lottery.estimates(TINY, ["harmful", "x", "x", "x"])
    assert set(got) == set(lottery.NAMES) and "persona_sd_common" not in lottery.estimates(TINY[:2], ["x"] * 4)


def test_the_detectable_difference_is_2_8_standard_errors_of_a_normal_interval():
    assert measures.detectable(-1.96, 1.96) == pytest.approx(2.8)


def test_an_interval_over_questions_and_personas_covers_where_one_over_questions_alone_does_not():
    rng, covered = np.random.default_rng(4), np.zeros(2)
    for run in range(200):
        table = rng.normal(size=(8, 1)) + 2 * rng.normal(size=24) + rng.normal(size=(8, 24))
        questions = measures.resamples(8, seed=run) @ table.mean(axis=1) / 8
        intervals = map(measures.interval, (measures.crossed(table, run), questions))
        covered += [low <= 0 <= high for low, high in intervals]
    assert covered[0] / 200 >= 0.88 > covered[1] / 200
    assert measures.crossed(np.eye(12)).mean() == pytest.approx(1 / 12, rel=0.1)  # two draws, not one
