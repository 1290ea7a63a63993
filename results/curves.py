"""Arms compared at equal accuracy, from several evaluated checkpoints of each (`run.py --at`).

An arm that solves more has less room for a lottery. So two arms are not compared after equal steps
alone: each is a curve over its checkpoints, (accuracy, measure), interpolated by lines, and the
difference is the mean over the accuracies that both have (`lottery.at_equal_accuracy`).

The start model is the first point of every curve in the picture. It is left out of differences: it
is the same for all arms, and would pull each difference towards 0.

Left out: an interval over items. The interval here is of training seeds alone: Student's t of the
jackknife's pseudo-values, each seed of one arm with the same seed of the other.
"""

from itertools import combinations

import numpy as np

from evaluation import lottery, measures, plots, report

MEASURES = {"persona_sd": "persona_sd, points", "persona_identification": "persona identification",
            "self_identification": "self identification"}


def points(comparisons: dict, arm: str, measure: str, seeds=None) -> list[tuple[float, float]]:
    """(mean accuracy, measure) of an arm at each checkpoint, over its training seeds or some of them.

    comparisons: {step: comparison.json}. KeyError where the measure was not taken.
    """
    out = []
    for c in comparisons.values():
        runs = [run for run in c["runs"][arm] if seeds is None or run["training_seed"] in seeds]
        out.append((np.mean([run["mean_accuracy"] for run in runs]), averaged(measure, [run[measure] for run in runs])))
    return out


def averaged(measure: str, values: list[float]) -> float:
    """The mean over seeds; of a spread the root of the mean of signed squares, as everywhere."""
    x = np.array(values)
    return float(lottery.signed_root(np.mean(x * np.abs(x))) if measure == "persona_sd" else x.mean())


def difference(comparisons: dict, first: str, second: str, measure: str) -> dict | None:
    """Second arm minus first at equal accuracy; None where they have no accuracy in common.

    What `lottery.at_equal_accuracy` gives for the arms' means over their common `seeds`. From two
    on, `low` and `high` (95 %) are of the jackknife: without each seed the difference is computed
    anew. They are missing where the arms then have no accuracy in common.
    """
    both = [{run["training_seed"] for run in c["runs"][arm]} for c in comparisons.values() for arm in (first, second)]
    seeds = sorted(set.intersection(*both), key=str)

    def apart(among: list) -> dict | None:
        return lottery.at_equal_accuracy(*(points(comparisons, arm, measure, among) for arm in (first, second)))

    if not seeds or (found := apart(seeds)) is None:
        return None
    found["seeds"] = seeds
    s, whole = len(seeds), found["difference"]
    without = [apart([one for one in seeds if one != seed]) for seed in seeds if s > 1]
    if without and all(without):
        values = np.array([s * whole - (s - 1) * one["difference"] for one in without])
        found["low"], found["high"] = measures.interval(whole + values @ measures.seed_spread(s))
    return found


def measured(comparisons: dict) -> list[str]:
    """Those of MEASURES that every trained arm has at every checkpoint."""
    arms = [scores for c in comparisons.values() for arm, scores in c["arms"].items() if arm != "start"]
    return [measure for measure in MEASURES if all(measure in scores for scores in arms)]


def differences(comparisons: dict) -> dict:
    """{measure: {"second - first": difference}} for every pair of trained arms."""
    arms = [arm for arm in next(iter(comparisons.values()))["arms"] if arm != "start"]
    return {m: {f"{b} - {a}": difference(comparisons, a, b, m) for a, b in combinations(arms, 2)}
            for m in measured(comparisons)}


def rows(found: dict) -> list[list[str]]:
    """A table of `differences`: head, then a row for each measure and pair."""
    out = [["at equal accuracy", "difference", "accuracies", "seeds", "mean difference [over seeds]"]]
    for measure, pairs in found.items():
        for pair, got in pairs.items():
            out.append([MEASURES[measure], pair, *cells(measure, got)])
    return out


def cells(measure: str, got: dict | None) -> list[str]:
    if got is None:
        return ["none in common", "–", "–"]
    value = report.number(measure, got["difference"], "+")
    if "low" in got:
        low, high = (report.number(measure, got[end], "+") for end in ("low", "high"))
        value += f" [{low}, {high}]"
    return [f"{got['accuracy'][0]:.3f} to {got['accuracy'][-1]:.3f}", str(len(got["seeds"])), value]


def plot(comparisons: dict):
    """Each measure against mean accuracy, a line an arm from the start model on -> Figure."""
    last = list(comparisons.values())[-1]["arms"]
    taken = measured(comparisons)
    fig, axes = plots.figure(4.6, 1 + 2.4 * len(taken), rows=len(taken))
    for ax, measure in zip(np.atleast_1d(axes), taken, strict=True):
        factor = 100 if measure in report.POINTS else 1
        for i, arm in enumerate(arm for arm in last if arm != "start"):
            start = points(comparisons, "start", measure)[:1] if "start" in last else []
            x, y = np.array(start + points(comparisons, arm, measure)).T
            ax.plot(x, factor * y, color=f"C{i}", marker=plots.marker(i), label=arm)
        ax.set_title(MEASURES[measure], loc="left")
    ax.set_xlabel("mean accuracy")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig
