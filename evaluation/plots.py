"""Plots of an evaluation: results in, matplotlib Figure out.

An arm has the same colour in every plot, and a marker of its own, so that colour is not all that
tells two arms apart.
"""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

CURVES = ("reward", "entropy", "completion_length")  # of metrics.jsonl
MARKERS = "osD^vhpX*<"  # as many as matplotlib has colours
matplotlib.rcParams.update({
    "axes.axisbelow": True, "axes.grid": True, "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlesize": 9, "font.size": 9, "grid.alpha": 0.4,
    "legend.frameon": False, "text.parse_math": False})  # a persona's name may hold a $


def figure(width, height, rows=1):
    """A Figure and its axes, without pyplot's global state."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, 1) if rows > 1 else fig.add_subplot()


def short(name, limit=34):
    """A label that fits its plot."""
    return name if len(name) <= limit else name[:limit - 1].rstrip() + "…"


def bars(results):
    """Accuracy of every persona as sorted bars with 95 % intervals, `none` in another colour."""
    rows = sorted(results["personas"], key=lambda row: row["accuracy"])
    value, low, high = np.array([[row["accuracy"], row["accuracy_low"], row["accuracy_high"]]
                                 for row in rows]).T
    fig, ax = figure(4.6, 0.9 + 0.2 * len(rows))
    ax.barh(range(len(rows)), value, xerr=np.abs([value - low, high - value]),
            color=["C1" if row["name"] == "none" else "C0" for row in rows],
            error_kw={"ecolor": "gray", "capsize": 2})
    ax.axvline(results["mean_accuracy"], color="gray", linestyle=":")
    ax.set(xlabel="accuracy (dotted: mean)", xlim=(0, min(1, 1.05 * high.max())))
    ax.set_yticks(range(len(rows)), [short(row["name"]) for row in rows])
    ax.margins(y=0.01)
    ax.grid(visible=False, axis="y")
    return fig


def lottery(arms):
    """Expected accuracy of the best of k personas: as seen, and on items that did not pick it."""
    fig, ax = figure(4.6, 3.5)
    for i, (label, results) in enumerate(arms.items()):
        reruns = results.get("noise_floor", {}).get("lottery", [])
        for style, values in (("-", results["lottery"]), ("--", results["lottery_held_out"]),
                              (":", reruns)):
            ax.plot(range(1, len(values) + 1), values, style, color=f"C{i}",
                    label=label if style == "-" else None)
    ax.set(ylabel="expected accuracy of the best", ylim=(0, None), xlabel="k personas tried\n"
           "dashed: picked on other problems; dotted: reruns without persona")
    if len(arms) > 1:
        fig.legend(loc="outside lower center", ncols=3)
    return fig


def stability(arms):
    """(score, factor, label) to plot an arm's stability by: persona_sd, or pss where an arm has too
    few problems for that."""
    if any(results.get("persona_sd") is None for results in arms.values()):
        return "pss", 1, "stability: PSS (1 is no lottery)"
    return "persona_sd", 100, "spread over personas, points (persona_sd; 0 is no lottery)"


def measured(arms):
    """Was fidelity measured in every arm?"""
    return all("persona_identification" in results.get("fidelity", ()) for results in arms.values())


def tradeoff(arms, runs=None):
    """Stability against fidelity, a point an arm; against accuracy where fidelity is not measured.

    runs: {arm: [scores of a training seed]}. Several of an arm stand around it as small points.
    """
    x, factor, label = stability(arms)
    y = "persona_identification" if measured(arms) else "mean_accuracy"
    fig, ax = figure(4.6, 4)
    for i, (arm, results) in enumerate(arms.items()):
        scores = results | results.get("fidelity", {})
        errors = [np.clip([[scores[key] - scores[key + "_low"]],
                           [scores[key + "_high"] - scores[key]]], 0, 1) for key in (x, y)]
        style = {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)]}
        ax.errorbar(factor * scores[x], scores[y], xerr=factor * errors[0], yerr=errors[1],
                    markersize=8, capsize=2, linestyle="none", label=arm, **style)
        seeds = runs[arm] if runs and len(runs[arm]) > 1 else []
        ax.scatter([factor * seed[x] for seed in seeds], [seed[y] for seed in seeds], s=16,
                   alpha=0.7, **style)
    ax.set(xlabel=label, ylabel=y.replace("_", " "))
    if y != "mean_accuracy":
        ax.axhline(next(iter(arms.values()))["fidelity"]["chance"], color="gray", linestyle=":")
        ax.set_ylabel("persona identification (dotted: chance)")
    if x == "persona_sd":
        ax.invert_xaxis()  # stable arms stand on the right
    fig.legend(loc="outside lower center", ncols=3)
    return fig


def curves(metrics, labels=None):
    """Learning curves, {arm: rows of metrics.jsonl}; labels: all arms, for their colours."""
    labels = list(labels or metrics)
    fig, axes = figure(4.6, 4.6, rows=len(CURVES))
    for ax, key in zip(axes, CURVES, strict=True):
        for label, rows in metrics.items():
            told = [row for row in rows if row.get(key) is not None]
            ax.plot([row["step"] for row in told], [row[key] for row in told],
                    color=f"C{labels.index(label)}", label=label)
        ax.set_title(key.replace("_", " "), loc="left")
    axes[-1].set_xlabel("step")
    if len(metrics) > 1:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def mean_curve(runs):
    """Learning curves of several training seeds -> one: the mean of each metric at each step that
    all have reached."""
    out = []
    for rows in zip(*runs, strict=False):
        told = [key for key in ("step", *CURVES)
                if all(row.get(key) is not None for row in rows)]
        out.append({key: float(np.mean([row[key] for row in rows])) for key in told})
    return out
