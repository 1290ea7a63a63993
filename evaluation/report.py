"""Pictures of an evaluation: PNG plots for a paper, and one HTML file that opens offline, in light, dark, and on a
phone.

Each figure is drawn once, by matplotlib, and written twice: as PNG, and as SVG inside the page, where every colour of
the light palette below becomes a CSS variable, so that the reader's colour scheme repaints the plots as well. The
page carries its style and fetches nothing. Left out: JavaScript, and with it zooming; every number is in
results.json.
"""

import html
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.files import write_atomically

PALETTE = {  # name: (light, dark)
    "ink": ("#1f2428", "#e4e7ea"), "soft": ("#66707a", "#9aa4ae"), "line": ("#d9dee3", "#363d45"),
    "page": ("#fbfbf9", "#14171b"), "card": ("#ffffff", "#1c2127"), "c0": ("#2f6db3", "#7db3f0"),
    "c1": ("#c8553d", "#f0917c"), "c2": ("#3d8b5f", "#78c79a"), "c3": ("#8a5fb0", "#c29be6"),
    "c4": ("#b8860b", "#e5bd57"), "c5": ("#1f8f96", "#66cdd3"), "c6": ("#b0487f", "#ee93c0"),
}
LIGHT = {name: pair[0] for name, pair in PALETTE.items()}
SERIES = [LIGHT[f"c{i}"] for i in range(7)] * 9  # more arms than colours: they come round again
MARKERS = "osD^vhp" * 9  # colour is not all that tells two arms apart
CURVES = ("reward", "entropy", "completion_length")  # of metrics.jsonl
MAIN = {"persona_sd": "persona_sd, points", "persona_sd_p": "p", "harmful_gap": "harmful gap, points",
        "pss": "pss (shuffled)", "mean_accuracy": "mean accuracy", "no_persona_accuracy": "no persona",
        "persona_identification": "persona identification",
        "self_identification": "self identification"}  # of the tables of a comparison
POINTS = ("persona_sd", "persona_sd_common", "harmful_gap")  # accuracies, printed as points of 0..100
RC = {"svg.fonttype": "none", "svg.hashsalt": "permix", "text.parse_math": False, "font.size": 9,
      "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["ink"], "axes.edgecolor": LIGHT["line"],
      "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.titlesize": 9,
      "xtick.color": LIGHT["soft"], "ytick.color": LIGHT["soft"], "grid.color": LIGHT["line"], "grid.linewidth": 0.6,
      "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.8}
SCORES = {  # name in results.json: what the reader is told
    "persona_sd": "true spread over personas, points; luck cancels",
    "persona_sd_common": "its part that repeats over seeds, points",
    "persona_sd_logit": "spread in logits, free of saturation",
    "harmful_gap": "points that harmful personas cost",
    "pss": "worst over best persona; 1 is no lottery",
    "pss_deconvolved": "worst over best without the luck",
    "pss_shuffled": "pss if personas made no difference", "pss_mean_minus_std": "mean minus spread over personas",
    "pss_all_correct": "problems right under every persona", "worst_persona_accuracy": "the unlucky ticket",
    "mean_accuracy": "a persona at random", "no_persona_accuracy": "no system prompt",
    "persona_identification": "answers that the start model traces to their persona",
    "log_posterior": "its log posterior of that persona",
    "self_identification": "answers that the model itself traces to their persona",
    "self_log_posterior": "its own log posterior of that persona",
    "style_shift": "log-prob a token that the persona adds", "persona_score": "PersonaGym, 1 to 5, by a judge model",
}


# ----------------------------------------------------------------------------------------------------------------------
# Figures: results in, matplotlib Figure out


def figure(width, height, rows=1):
    """A Figure and its axes, without pyplot's global state."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, 1) if rows > 1 else fig.add_subplot()


def ranked(results):
    """The rows of results["personas"], from worst to best."""
    return sorted(results["personas"], key=lambda row: row["accuracy"])


def bars(results):
    """Accuracy of every persona as sorted bars with 95 % intervals; the prompt without persona stands out."""
    rows = ranked(results)
    fig, ax = figure(4.6, 0.9 + 0.2 * len(rows))
    value = np.array([row["accuracy"] for row in rows])
    error = np.abs([value - [row["accuracy_low"] for row in rows], [row["accuracy_high"] for row in rows] - value])
    ax.barh(range(len(rows)), value, height=0.68, xerr=error,
            color=[SERIES[1] if row["name"] == "none" else SERIES[0] for row in rows],
            error_kw={"ecolor": LIGHT["soft"], "elinewidth": 1, "capsize": 2})
    ax.axvline(results["mean_accuracy"], color=LIGHT["soft"], linestyle=":", linewidth=1.2)
    ax.set(xlabel="accuracy (dotted: mean)", xlim=(0, min(1, 1.05 * (value + error[1]).max())))
    ax.margins(y=0.01)
    ax.set_yticks(range(len(rows)), [short(row["name"]) for row in rows], color=LIGHT["ink"])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    return fig


def heat(results):
    """Accuracy in percent by persona and problem kind, personas in the order of the bars."""
    rows = ranked(results)
    kinds = list(rows[0]["by_kind"])
    table = np.array([[row["by_kind"][kind] for kind in kinds] for row in rows])
    fig, ax = figure(max(4.6, 1.8 + 0.62 * len(kinds)), 1.1 + 0.2 * len(rows))
    ramp = LinearSegmentedColormap.from_list("accuracy", ["#f3efe4", "#8fb3d9", "#1d4f8c"])
    ax.pcolormesh(table, cmap=ramp, vmin=0, vmax=1, edgecolors=LIGHT["card"], linewidth=0.8)
    for (y, x), value in np.ndenumerate(table):
        ax.text(x + 0.5, y + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                color="#fefefe" if value > 0.55 else "#202122")
    ax.set_xticks(np.arange(len(kinds)) + 0.5, [short(kind, 18) for kind in kinds], color=LIGHT["ink"],
                  **({"rotation": 30, "ha": "right"} if len(kinds) > 4 else {}))
    ax.set_yticks(np.arange(len(rows)) + 0.5, [short(row["name"]) for row in rows], color=LIGHT["ink"])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig


def lottery(arms):
    """Expected accuracy of the best of k personas: as seen, and (dashed) as kept on items that did not pick it."""
    fig, ax = figure(4.6, 3.5)
    styles = {"lottery": ("-", "best of k, as seen"), "lottery_held_out": ("--", "picked on other problems"),
              "noise_floor": (":", "reruns without persona")}
    drawn = set()
    for colour, results in zip(SERIES, arms.values(), strict=False):
        found = results | {"noise_floor": results.get("noise_floor", {}).get("lottery")}
        for key in [key for key in styles if found[key]]:
            ax.plot(np.arange(1, len(found[key]) + 1), found[key], color=colour, linestyle=styles[key][0])
            drawn.add(key)
    ax.set(xlabel="k personas tried", ylabel="expected accuracy", ylim=(0, None))
    ax.grid()
    handles = [Line2D([], [], color=colour, label=label) for colour, label in zip(SERIES, arms, strict=False)]
    handles = (handles if len(arms) > 1 else []) + [
        Line2D([], [], color=LIGHT["soft"], linestyle=style, label=label)
        for key, (style, label) in styles.items() if key in drawn]
    fig.legend(handles=handles, loc="outside lower center", ncols=3 if len(arms) > 1 else 2)
    return fig


def other(arms):
    """(score, what it stands for) to plot stability against: fidelity, or accuracy where not all arms have that."""
    measured = all("persona_identification" in results.get("fidelity", ()) for results in arms.values())
    return ("persona_identification", "fidelity") if measured else ("mean_accuracy", "accuracy")


def stability(arms):
    """(score, factor, label) to plot an arm's stability by: persona_sd, or pss where an arm has too
    few problems for that."""
    if any(results.get("persona_sd") is None for results in arms.values()):
        return "pss", 1, "stability: PSS (1 is no lottery)"
    return "persona_sd", 100, "spread over personas, points (persona_sd; 0 is no lottery)"


def tradeoff(arms, runs=None):
    """Stability against fidelity, one point an arm; against mean accuracy where fidelity was not measured.

    runs: {arm: [scores of a training seed]}; where an arm has several, they stand around it as small points.
    """
    (key, kind), (x, factor, label) = other(arms), stability(arms)
    measured = kind == "fidelity"
    fig, ax = figure(4.6, 4)
    for colour, marker, (name, results) in zip(SERIES, MARKERS, arms.items(), strict=False):
        place = results["fidelity"] if measured else results
        error = [np.clip([[row[k] - row[k + "_low"]], [row[k + "_high"] - row[k]]], 0, 1) * times
                 for row, k, times in ((results, x, factor), (place, key, 1))]
        ax.errorbar(factor * results[x], place[key], xerr=error[0], yerr=error[1], color=colour, marker=marker,
                    markersize=8, elinewidth=1, capsize=2, linestyle="none", label=name, markeredgecolor=LIGHT["card"],
                    zorder=3)
        seeds = runs[name] if runs and len(runs[name]) > 1 else []
        ax.scatter([factor * seed[x] for seed in seeds], [seed[key] for seed in seeds], color=colour, marker=marker,
                   s=16, alpha=0.7, linewidth=0)
    chance = f" (chance: {next(iter(arms.values()))['fidelity']['chance']:.3g})" if measured else ""
    ax.set(xlabel=label, ylabel=key.replace("_", " ") + chance)
    for axis, (low, high) in (("x", ax.get_xlim()), ("y", ax.get_ylim())):
        if axis == "y" or x == "pss":
            ax.set(**{f"{axis}lim": (max(low, -0.02), min(high, 1.03))})
    if x == "persona_sd":
        ax.invert_xaxis()  # stable arms stand on the right
    ax.grid()
    fig.legend(loc="outside lower center", ncols=3)
    return fig


def curves(metrics, labels=None):
    """Learning curves, {arm: rows of metrics.jsonl}; labels: all arms, for the colours that they have elsewhere."""
    labels = list(labels or metrics)
    fig, axes = figure(4.6, 4.6, rows=3)
    for ax, key in zip(axes, CURVES, strict=True):
        for label, rows in metrics.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            ax.plot([x for x, _ in points], [y for _, y in points], color=SERIES[labels.index(label)], label=label)
        ax.set_title(key.replace("_", " "), loc="left")
        ax.grid()
    axes[-1].set_xlabel("step")
    if len(metrics) > 1:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def short(name, limit=34):
    """A label that fits its plot."""
    return name if len(name) <= limit else name[:limit - 1].rstrip() + "…"


def svg(fig):
    """The figure as an SVG element for the page, its light palette replaced by CSS variables."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text[text.index("<svg"):], count=1)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    return text


# ----------------------------------------------------------------------------------------------------------------------
# The page


def sentence(arms, comparison):
    """The finding in a sentence or two."""
    if comparison:
        shown, against = ("; ".join(h["claim"] for h in comparison["hypotheses"] if h["verdict"] == word)
                          for word in ("shown", "opposite"))
        key, factor, told = stability(arms)
        scores = ", ".join(f"{label} {factor * results[key]:.{1 if factor > 1 else 2}f}"
                           for label, results in arms.items())
        return f"{told[0].upper()}{told[1:]}: {scores}. " + (f"Shown here: {shown}. " if shown else "") + (
            f"The data speak against: {against}." if against else "")
    (label, results), = arms.items()
    rows = [row for row in ranked(results) if row["name"] != "none"]
    return (f"With nothing changed but the persona in the system prompt, {label} answers between "
            f"{100 * rows[0]['accuracy']:.0f} % ({rows[0]['name']}) and {100 * rows[-1]['accuracy']:.0f} % "
            f"({rows[-1]['name']}) of {rows[0]['n']} problems, and {100 * results['no_persona_accuracy']:.0f} % "
            f"without a persona. Stability (PSS) is {results['pss']:.2f}, and would be {results['pss_shuffled']:.2f} "
            f"if personas made no difference.")


def html_table(head, rows):
    """Rows of plain text as an HTML table that scrolls by itself on a narrow screen, its first column staying in view;
    what follows a line break is a note."""
    def cell(text):
        name, *notes = html.escape(text).split("\n")
        return f"<td>{name}{''.join(f'<small>{note}</small>' for note in notes)}</td>"

    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"


def numbers(arms):
    """The table of scores with their intervals, one column an arm."""
    def row(name, note, places, key):
        cells = ["–" if p.get(key) is None else interval(p[key], p[f"{key}_low"], p[f"{key}_high"], name=key)
                 for p in places]
        return [f"{name}\n{note}", *cells] if set(cells) != {"–"} else None

    results = list(arms.values())
    graded = [r.get("fidelity", {}).get("personagym", {}) for r in results]
    found = [gym | r.get("fidelity", {}) | r for gym, r in zip(graded, results, strict=True)]
    rows = [row(name, note, found, name) for name, note in SCORES.items()]
    for task in {task: None for gym in graded for task in gym.get("tasks", ())}:
        rows.append([f"{task}\nPersonaGym's task, 1 to 5",
                     *(f"{g['tasks'][task]:.2f}" if task in g.get("tasks", ()) else "–" for g in graded)])
    rows.append(["judge", *(judged(gym) if gym else "–" for gym in graded)] if any(graded) else None)
    floors = [r.get("noise_floor", {}) for r in results]
    rows.append(row("pss of the noise floor", "as many reruns without persona", floors, "pss"))
    sampled = [r.get("pass_at_k", {}).get("k", {}) for r in results]
    for k in sampled[0]:
        rows.append(row(f"pass@{k}", "sampled, mean over personas", [s.get(k, {}) for s in sampled], "personas"))
    return html_table(["score [95 % interval]", *arms], [r for r in rows if r])


def judged(gym):
    """A judge's work in words: whether its planted controls allow to believe it, and what it cost."""
    usable = "usable: true answers score above planted ones" if gym["usable"] else "NOT USABLE: failed planted controls"
    return (f"{gym['judge']}, {usable}; {gym['calls']} calls, {gym['tokens_in']} tokens in, {gym['tokens_out']} out, "
            f"cost {gym['cost']:.2f}; {gym['unparsed']} without a score")


def number(name, value, sign=""):
    """A score as text: three decimals, or points with one where the score is one of POINTS."""
    return f"{100 * value:{sign}z.1f}" if name in POINTS else f"{value:{sign}.3f}"


def interval(value, low, high, sign="", name=""):
    """A number with its 95 % interval; the space inside the brackets does not break."""
    value, low, high = (number(name, x, sign) for x in (value, low, high))
    return f"{value} [{low},\u00a0{high}]"


def arm_cell(scores, key):
    """One score of an arm: with its interval, except a p value, and `pss` beside its shuffled value."""
    if scores.get(key) is None:
        return "–"
    if key == "pss":
        return f"{scores['pss']:.3f} ({scores['pss_shuffled']:.3f})"
    if key == "persona_sd_p":
        return f"{scores[key]:.3f}"
    return interval(*(scores[key + end] for end in ("", "_low", "_high")), name=key)


def arm_rows(comparison):
    """A head and a row for each arm: its training seeds and main scores."""
    arms = comparison["arms"]
    keys = [key for key in MAIN if any(scores.get(key) is not None for scores in arms.values())]
    return [["arm", "seeds", *(MAIN[key] for key in keys)]] + [
        [role, str(len(comparison["runs"][role])), *(arm_cell(scores, key) for key in keys)]
        for role, scores in arms.items()]


def difference_rows(comparison):
    """A head and a row for each pair of arms: paired differences, with an arrow where the interval leaves out 0."""
    pairs = comparison["differences"]
    keys = [key for key in MAIN if any(key in scores for scores in pairs.values())]

    def cell(d, key):
        arrow = "▲ " if d["low"] > 0 else "▼ " if d["high"] < 0 else ""
        return arrow + interval(d["difference"], d["low"], d["high"], "+", key)

    return [["difference", *(MAIN[key].replace(" (shuffled)", "") for key in keys)]] + [
        [pair, *(cell(scores[key], key) if key in scores else "–" for key in keys)]
        for pair, scores in pairs.items()]


def cards(arms, transcripts, limit=6):
    """Answers worth reading side by side: persona against persona, or arm against arm under the same persona."""
    keyed = {label: {(row["persona"], row["id"]): row for row in rows if not row.get("temperature")}
             for label, rows in zip(arms, transcripts, strict=True)}
    first = next(iter(keyed.values()))
    names = [row["name"] for row in ranked(next(iter(arms.values()))) if row["name"] != "none"][::-1]
    ids = list(dict.fromkeys(row["id"] for row in first.values()))
    if len(arms) == 1:
        columns = ("none", names[0], names[-1])
        panels = [[(name, first[name, i]) for name in columns if (name, i) in first] for i in ids]
    else:
        pairs = [(names[j % len(names)], i) for j, i in enumerate(ids)]
        panels = [[(f"{label} as {key[0]}", rows[key]) for label, rows in keyed.items() if key in rows]
                  for key in pairs]
    panels.sort(key=lambda panel: -len({row.get("correct") for _, row in panel}))  # first those on which they differ
    spoken = [panel for panel in panels if panel and "correct" not in panel[0][1]]
    solved = [panel for panel in panels if panel and "correct" in panel[0][1]]
    return "".join(card(panel) for panel in spoken[:limit] + solved[:limit])


def card(panel):
    """One question with its answers in columns; panel: pairs of label and transcript row."""
    columns = ""
    for label, row in panel:
        mark = {True: " <b class=right>right</b>", False: " <b class=wrong>wrong</b>", None: ""}[row.get("correct")]
        columns += f"<div><h4>{html.escape(label)}{mark}</h4><pre>{html.escape(row['answer'])}</pre></div>"
    row = panel[0][1]
    gold = f" <span>gold: {html.escape(row['gold'])}</span>" if "gold" in row else ""
    return f"<article><p class=q>{html.escape(row['question'])}{gold}</p><div class=cols>{columns}</div></article>"


def style():
    """The page's CSS: two palettes; one column on a phone, two on a desktop."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    return f"""
:root{{color-scheme:light dark;{light}}} @media (prefers-color-scheme:dark){{:root{{{dark}}}}}
*{{box-sizing:border-box}} h1{{font-size:1.5rem;margin:.4rem 0}} h2{{font-size:1.1rem;margin:0 0 .6rem}}
body{{margin:0 auto;max-width:1120px;padding:1.2rem;background:var(--page);color:var(--ink)}}
body{{font:16px/1.55 system-ui,sans-serif}} pre{{font:13px/1.5 ui-monospace,monospace}}
.lead{{font-size:1.12rem;max-width:46rem}} .meta,.q span{{color:var(--soft);font-size:.86rem;overflow-wrap:anywhere}}
.grid{{columns:2 440px;column-gap:1rem}} .grid section{{break-inside:avoid}} .q{{margin:.1rem 0 .6rem}}
.cols{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:.9rem}}
section,article{{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem;margin:0 0 1rem}}
svg{{width:100%;height:auto;display:block}} svg text{{font-family:system-ui,sans-serif!important}}
.scroll{{overflow-x:auto}} table{{border-collapse:collapse;font-size:.88rem;width:100%}}
td,th{{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);min-width:4.6rem}}
th,td small{{color:var(--soft)}} td small{{display:block;font-size:inherit}} td{{vertical-align:top}}
td:first-child{{min-width:7.6rem;position:sticky;left:0;background:var(--card)}} .grid{{margin-bottom:1rem}}
h4{{margin:0 0 .3rem;font-size:.86rem}}
@media(max-width:480px){{table{{font-size:.76rem}} td,th{{padding-right:.6rem}}}}
pre{{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:16rem;overflow-y:auto}} dt{{font-weight:600}}
.right,.shown{{color:var(--c2)}} .wrong,.opposite{{color:var(--c1)}} dd{{margin:0 0 .6rem;color:var(--soft)}}
"""


def unbroken(text):
    """Text whose intervals stay on one line."""
    return re.sub(r", (?=[-+]\d)", ",\u00a0", text)


def claims(comparison):
    """The hypotheses as a list: claim, verdict, what was measured."""
    return "".join(f"<dt>{h['name']} {html.escape(h['claim'])}: <span class='{h['verdict'].replace(' ', '-')}'>"
                   f"{h['verdict']}</span></dt><dd>{unbroken(html.escape(h['words']))}</dd>"
                   for h in comparison["hypotheses"])


def page(arms, transcripts, figures, comparison=None):
    """The whole report as one HTML string; arms {label: results}, figures {title: Figure}."""
    results = next(iter(arms.values()))
    scores = f"<section><h2>Scores</h2>{numbers(arms)}</section>"
    if comparison:
        head, *rows = difference_rows(comparison)
        after = f"{scores}<section><h2>Paired differences</h2>{html_table(head, rows)}</section>"
        before = f"<section><h2>The claims</h2><dl>{claims(comparison)}</dl></section>"
    else:
        rows = [[row["name"], f"{row['accuracy']:.3f}", f"{row['tokens_per_item']:.1f}"]
                for row in results["inference_time_rivals"]]
        table = html_table(["instead of training", "accuracy", "generated tokens per item"], rows)
        before, after = f"{scores}<section><h2>What inference can buy</h2>{table}</section>", ""
    plots = "".join(f"<section><h2>{title}</h2>{svg(fig)}</section>" for title, fig in figures.items())
    title = html.escape(" / ".join(arms) if comparison else f"{results['model']} on {results['task']}")
    meta = f"{results['task']}, {len(results['items'])} problems, {len(results['personas']) - 1} personas, greedy, " + (
        "training seeds: " + ", ".join(f"{role} {len(runs)}" for role, runs in comparison["runs"].items())
        if comparison else f"seed {results['seed']}")
    return f"""<!doctype html><html lang=en><head><meta charset=utf-8><link rel=icon href="data:,">
<meta name=viewport content="width=device-width,initial-scale=1"><title>Persona stability: {title}</title>
<style>{style()}</style></head><body><h1>{title}</h1><p class=lead>{html.escape(sentence(arms, comparison))}</p>
<p class=meta>{html.escape(meta)}</p>{before}<div class=grid>{plots}</div>{after}
<h2>Transcripts</h2>{cards(arms, transcripts)}
<p class=meta>{html.escape(results['command'])} {html.escape(results['commit'][:12])}</p></body></html>
"""


def write(arms, transcripts, folder, metrics=None, comparison=None):
    """report.html, and each figure as PNG, into `folder`.

    arms {label: results}; transcripts: a list of rows for each arm; metrics {label: rows of metrics.jsonl};
    comparison: what compare.side_by_side returned, where there are several arms.
    """
    folder = Path(folder)
    with matplotlib.rc_context(RC):
        figures = {"The persona lottery": lottery(arms)}
        if comparison:
            figures = {f"Stability against {other(arms)[1]}": tradeoff(arms, comparison["runs"])} | figures
        else:
            (results,) = arms.values()
            figures = {"Accuracy per persona": bars(results), "Persona and problem kind": heat(results)} | figures
        if metrics:
            figures["Learning curves"] = curves(metrics, arms)
        for title, fig in figures.items():
            fig.savefig(folder / f"{title.lower().replace(' ', '_')}.png", dpi=160)
        text = page(arms, transcripts, figures, comparison)
    write_atomically(folder / "report.html", text)
