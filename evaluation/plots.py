"""Plots of an evaluation: results in, matplotlib Figure out.

An arm has the same colour in every plot, and a marker of its own, so that colour is not all that
tells two arms apart. Markers are hollow, and they and lines get smaller over the first three arms,
so that equal arms are all seen.
"""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

CURVES = {  # of metrics.jsonl, and with their units
    "reward": "reward, mean over completions", "entropy": "entropy, nats a token",
    "completion_length": "completion length, tokens"}
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


def called(persona):
    """A persona's label."""
    return "no persona" if persona == "none" else short(persona)


def width(i):
    """Of arm i's lines: each lies on the one before it and leaves its edges free."""
    return max(1, 3 * 0.6 ** i)


def marker(i):
    """Arm i's: another one where the colours begin again."""
    return MARKERS[(i + i // 10) % len(MARKERS)]


def hollow(i, size=13):
    """Arm i's colour and marker: it fits into the one before it."""
    return {"color": f"C{i}", "marker": marker(i), "markerfacecolor": "none",
            "markersize": size * max(0.45, 0.72 ** i), "markeredgewidth": 1.2}


def bars(results):
    """Accuracy of every persona as sorted bars with 95 % intervals, `none` in another colour."""
    rows = sorted(results["personas"], key=lambda row: row["accuracy"])
    value, low, high = np.array([[row["accuracy"], row["accuracy_low"], row["accuracy_high"]]
                                 for row in rows]).T
    fig, ax = figure(4.6, 0.9 + 0.2 * len(rows))
    ax.barh(range(len(rows)), value, xerr=np.abs([value - low, high - value]),
            color=["C1" if row["name"] == "none" else "C0" for row in rows],
            error_kw={"ecolor": "gray", "capsize": 2})
    ax.axvline(results["mean_accuracy"], color="black", linestyle=":")
    ax.set(xlabel="accuracy, share of problems\n(dotted: mean over personas)",
           xlim=(0, min(1, 1.05 * high.max())))
    ax.set_yticks(range(len(rows)), [called(row["name"]) for row in rows])
    ax.margins(y=0.01)
    ax.grid(visible=False, axis="y")
    return fig


def dots(arms):
    """Accuracy of every persona, a marker an arm; sorted by the last arm's."""
    *_, last = arms.values()
    names = [row["name"] for row in sorted(last["personas"], key=lambda row: row["accuracy"])]
    fig, ax = figure(4.6, 1.2 + 0.2 * len(names))
    for i, (arm, results) in enumerate(arms.items()):
        accuracy = {row["name"]: row["accuracy"] for row in results["personas"]}
        ax.plot([accuracy[name] for name in names], range(len(names)), linestyle="none",
                label=arm, clip_on=False, **hollow(i, 10))
    ax.set(xlabel="accuracy, share of problems", xlim=(0, None))
    ax.set_yticks(range(len(names)), map(called, names))
    ax.set_ylim(-0.7, len(names) - 0.3)
    fig.legend(loc="outside lower center", ncols=3)
    return fig


def lottery(arms):
    """Expected accuracy of the best of k personas: as seen, and on items that did not pick it."""
    fig, ax = figure(4.6, 3.5)
    told = "dashed: picked on other problems"
    for i, (label, results) in enumerate(arms.items()):
        reruns = results.get("noise_floor", {}).get("lottery", [])
        told += "\ndotted: reruns without persona" if reruns and "dotted" not in told else ""
        for style, values in (("-", results["lottery"]), ("--", results["lottery_held_out"]),
                              (":", reruns)):
            solid = style == "-"  # pale, so that a dashed line on it is seen
            ax.plot(range(1, len(values) + 1), values, style, color=f"C{i}", linewidth=width(i),
                    alpha=0.6 if solid else 1, label=label if solid else None)
    ax.set(xlabel=f"personas tried, k\n{told}", ylabel="expected accuracy of the best, share")
    ax.set_ylim(0, min(1.04, 1.1 * ax.get_ylim()[1]))
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
        ax.errorbar(factor * scores[x], scores[y], xerr=factor * errors[0], yerr=errors[1],
                    capsize=2, linestyle="none", elinewidth=width(i), label=arm, **hollow(i))
        seeds = runs[arm] if runs and len(runs[arm]) > 1 else []
        ax.scatter([factor * seed[x] for seed in seeds], [seed[y] for seed in seeds], s=9,
                   marker=marker(i), linewidths=0.8, facecolors="none",
                   edgecolors=f"C{i}")
    ax.set(xlabel=label, ylabel="mean accuracy, share of problems")
    if y != "mean_accuracy":
        ax.axhline(next(iter(arms.values()))["fidelity"]["chance"], color="gray", linestyle=":")
        ax.set_ylabel("answers traced to their persona, share\n(dotted: chance)")
    if x == "persona_sd":
        ax.invert_xaxis()  # stable arms stand on the right
    fig.legend([box.lines[0] for box in ax.containers], list(arms), loc="outside lower center",
               ncols=3)
    return fig


def curves(metrics, labels=None):
    """Learning curves, {arm: rows of metrics.jsonl}; labels: all arms, for their colours."""
    labels = list(labels or metrics)
    fig, axes = figure(4.6, 4.6, rows=len(CURVES))
    for ax, key in zip(axes, CURVES, strict=True):
        for label, rows in metrics.items():
            told = [row for row in rows if row.get(key) is not None]
            ax.plot([row["step"] for row in told], [row[key] for row in told],
                    color=f"C{labels.index(label)}", label=label,
                    linewidth=width(labels.index(label)))
        ax.set_title(CURVES[key], loc="left")
    axes[-1].set_xlabel("training step")
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
