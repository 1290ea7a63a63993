"""The report of an evaluation: one HTML page that opens offline, on a phone too, and its plots.

The page holds its style and its plots, and fetches nothing. All text that a model or a file wrote
is escaped. The tables of a comparison are plain rows of strings, which compare.py prints as well.
Left out: JavaScript. Every number is in results.json.
"""

import base64
import html
from string import Template

from common.files import write_atomically
from evaluation import measures, plots

POINTS = ("persona_sd", "persona_sd_common", "harmful_gap")  # accuracies, told in points of 0..100
MAIN = {  # the columns of a comparison: name in results.json, and in the head of the table
    "persona_sd": "persona_sd, points", "persona_sd_p": "p", "harmful_gap": "harmful gap, points",
    "pss": "pss (shuffled)", "mean_accuracy": "mean accuracy", "no_persona_accuracy": "no persona",
    "persona_identification": "persona identification",
    "self_identification": "self identification",
}
SCORES = {  # name in results.json: what the reader is told
    "persona_sd": "true spread over personas, points; luck cancels",
    "persona_sd_common": "its part that repeats over seeds, points",
    "persona_sd_logit": "spread in logits, free of saturation",
    "harmful_gap": "points that harmful personas cost",
    "pss": "worst over best persona; 1 is no lottery",
    "pss_deconvolved": "worst over best without the luck",
    "pss_shuffled": "pss if personas made no difference",
    "pss_mean_minus_std": "mean minus spread over personas",
    "pss_all_correct": "problems right under every persona",
    "worst_persona_accuracy": "the unlucky ticket",
    "mean_accuracy": "a persona at random",
    "no_persona_accuracy": "no persona: the template's own system prompt, if any",
    "persona_identification": "answers that the start model traces to their persona",
    "log_posterior": "its log posterior of that persona",
    "self_identification": "answers that the model itself traces to their persona",
    "self_log_posterior": "its own log posterior of that persona",
    "style_shift": "log-prob a token that the persona adds",
    "persona_score": "PersonaGym, 1 to 5, by a judge model",
}
PAGE = Template("""<!doctype html>
<html lang=en><head><meta charset=utf-8><link rel=icon href="data:,">
<meta name=viewport content="width=device-width,initial-scale=1"><title>$title</title>
<style>
:root{color-scheme:light dark} *{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;font:16px/1.5 system-ui,sans-serif}
body{overflow-wrap:anywhere} small,footer{color:gray} .scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem} small{display:block}
td,th{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;min-width:5rem}
tr{border-bottom:1px solid gray} td:first-child{position:sticky;left:0;background:Canvas}
.row{display:flex;flex-wrap:wrap;gap:1rem;align-items:start}
.row>*{flex:1 1 14rem;min-width:0} .row>img{flex-basis:22rem;max-width:100%;background:white}
pre{white-space:pre-wrap;max-height:16rem;overflow-y:auto}
article{border-top:1px solid gray}
</style></head><body><h1>$title</h1><p>$lead</p>
$tables
<h2>Plots</h2><div class=row>$plots</div>
<h2>Transcripts</h2>$transcripts
<footer>$footer</footer></body></html>
""")

# --------------------------------------------------------------------------------------------------
# Numbers and tables as text


def number(name, value, sign=""):
    """A score as text: three decimals, or points with one where the score is one of POINTS."""
    return f"{100 * value:{sign}z.1f}" if name in POINTS else f"{value:{sign}.3f}"


def interval(value, low, high, sign="", name=""):
    """A number with its 95 % interval; the space inside the brackets does not break."""
    value, low, high = (number(name, x, sign) for x in (value, low, high))
    return f"{value} [{low},\u00a0{high}]"


def score_cell(scores, name):
    """A score with its interval, from a dict of name, name_low and name_high; a dash without."""
    if scores.get(name) is None:
        return "–"
    return interval(scores[name], scores[f"{name}_low"], scores[f"{name}_high"], name=name)


def arm_cell(scores, name):
    """One score of an arm: a p value has no interval, `pss` stands beside its shuffled value."""
    if name == "pss":
        return f"{scores['pss']:.3f} ({scores['pss_shuffled']:.3f})"
    if name == "persona_sd_p" and name in scores:
        return f"{scores[name]:.3f}"
    return score_cell(scores, name)


def arm_rows(comparison):
    """A head and a row for each arm: its training seeds and main scores."""
    arms = comparison["arms"]
    names = [name for name in MAIN
             if any(scores.get(name) is not None for scores in arms.values())]
    return [["arm", "seeds", *(MAIN[name] for name in names)]] + [
        [role, str(len(comparison["runs"][role])), *(arm_cell(scores, name) for name in names)]
        for role, scores in arms.items()]


def difference_rows(comparison):
    """A head and a row for each pair of arms, with an arrow where the interval leaves out 0."""
    pairs = comparison["differences"]
    names = [name for name in MAIN if any(name in scores for scores in pairs.values())]
    out = [["difference", *(MAIN[name].replace(" (shuffled)", "") for name in names)]]
    for pair, scores in pairs.items():
        row = [pair]
        for name in names:
            d = scores.get(name)
            arrow = "▲ " if d and d["low"] > 0 else "▼ " if d and d["high"] < 0 else ""
            row.append(arrow + interval(d["difference"], d["low"], d["high"], "+", name)
                       if d else "–")
        out.append(row)
    return out


def score_rows(arms):
    """A head and a row for each score that an arm has, one column an arm."""
    graded = [results.get("fidelity", {}).get("personagym", {}) for results in arms.values()]
    found = [gym | results.get("fidelity", {}) | results
             for gym, results in zip(graded, arms.values(), strict=True)]
    rows = [[f"{name}\n{told}", *(score_cell(scores, name) for scores in found)]
            for name, told in SCORES.items()]
    for task in dict.fromkeys(task for gym in graded for task in gym.get("tasks", ())):
        means = [gym.get("tasks", {}).get(task) for gym in graded]
        rows.append([f"{task}\nPersonaGym's task, 1 to 5",
                     *("–" if mean is None else f"{mean:.2f}" for mean in means)])
    rows.append(["judge", *(judge_cell(gym) for gym in graded)])
    rows.append(["pss of the noise floor\nas many reruns without persona",
                 *(score_cell(results.get("noise_floor", {}), "pss") for results in arms.values())])
    sampled = [results.get("pass_at_k", {}).get("k", {}) for results in arms.values()]
    for k in sampled[0]:
        rows.append([f"pass@{k}\nsampled, mean over personas",
                     *(score_cell(by_k.get(k, {}), "personas") for by_k in sampled)])
    return [["score [95 % interval]", *arms]] + [row for row in rows if set(row[1:]) != {"–"}]


def judge_cell(gym):
    """A judge in words: whether its planted controls allow to believe it, and what it cost."""
    if not gym:
        return "–"
    usable = "true answers score above planted ones" if gym["usable"] else "failed planted controls"
    cost = "unknown" if gym["cost"] is None else f"{gym['cost']:.2f}"
    return (f"{gym['judge']}, {'usable' if gym['usable'] else 'NOT USABLE'}: {usable}; "
            f"{gym['calls']} calls, {gym['tokens_in']} tokens in, {gym['tokens_out']} out, "
            f"cost {cost}; {gym['unparsed']} without a score")


def ranked(results):
    """The rows of the personas from best to worst: one order for equal ones, whoever asks."""
    rows = [row for row in results["personas"] if row["name"] != "none"]
    return sorted(rows, key=lambda row: row["accuracy"])[::-1]


def finding(arms, comparison):
    """The finding in a sentence or two."""
    if comparison:
        name, factor, label = plots.stability(arms)
        scores = ", ".join(f"{arm} {factor * results[name]:.{1 if factor > 1 else 2}f}"
                           for arm, results in arms.items())
        shown = [h["claim"] for h in comparison["hypotheses"] if h["verdict"] == "shown"]
        against = [h["claim"] for h in comparison["hypotheses"] if h["verdict"] == "opposite"]
        few = [h["words"] for h in comparison["hypotheses"] if h["verdict"] == "too few problems"]
        limit = f"Too few problems for most claims: {few[0]}. " if few else ""
        return (f"{limit}{label}: {scores}. Shown here: {'; '.join(shown) or 'nothing'}. "
                f"The data speak against: {'; '.join(against) or 'nothing'}.")
    (label, results), = arms.items()
    best, *_, worst = ranked(results) * 2               # one persona is both
    few = " Too few problems for a claim." if best["n"] < measures.LEAST else ""
    return (f"With nothing changed but the persona in the system prompt, {label} answers between "
            f"{100 * worst['accuracy']:.0f} % ({worst['name']}) and {100 * best['accuracy']:.0f} % "
            f"({best['name']}) of {best['n']} problems, and "
            f"{100 * results['no_persona_accuracy']:.0f} % without a persona. Stability (PSS) is "
            f"{results['pss']:.2f}. It would be {results['pss_shuffled']:.2f} if personas made no "
            f"difference.{few}")


# --------------------------------------------------------------------------------------------------
# The page


def html_table(title, rows):
    """A head and rows of plain text as an HTML table that scrolls by itself on a narrow screen.

    What follows a line break in a cell is a note.
    """
    body = ""
    for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False):
        cells = [html.escape(cell).split("\n") for cell in row]
        cells = [f"<{tag}>{text}{''.join(f'<small>{note}</small>' for note in notes)}</{tag}>"
                 for text, *notes in cells]
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f"<h2>{title}</h2><div class=scroll><table>{body}</table></div>"


def panels(arms, transcripts):
    """Answers to read side by side: a list of [(label, transcript row), ...], one a question.

    One arm: without a persona, under the best and under the worst. Several arms: each under the
    same persona. Questions on which the answers differ come first.
    """
    greedy = [{(row["persona"], row["id"]): row for row in rows if not row.get("temperature")}
              for rows in transcripts]
    names = [row["name"] for row in ranked(next(iter(arms.values())))]
    found = []
    for place, i in enumerate(dict.fromkeys(i for _, i in greedy[0])):
        name = names[place % len(names)]
        columns = [(f"{arm} as {name}", answers.get((name, i)))
                   for arm, answers in zip(arms, greedy, strict=True)]
        if len(arms) == 1:
            columns = [(name, greedy[0].get((name, i))) for name in ("none", names[0], names[-1])]
        found.append([(label, row) for label, row in columns if row])
    return sorted(filter(None, found), key=lambda p: -len({row.get("correct") for _, row in p}))


def card(panel):
    """A question with its answers in columns."""
    columns = ""
    for label, row in panel:
        cut = ", cut off" if row.get("truncated") else ""
        verdict = {True: f" (right{cut})", False: f" (wrong{cut})", None: ""}[row.get("correct")]
        columns += (f"<div><b>{html.escape(label)}{verdict}</b>"
                    f"<pre>{html.escape(row['answer'])}</pre></div>")
    row = panel[0][1]
    gold = f"<small>gold: {html.escape(row['gold'])}</small>" if "gold" in row else ""
    return f"<article><p>{html.escape(row['question'])}{gold}</p><div class=row>{columns}</div>" \
           "</article>"


def image(fig, path):
    """The figure as a PNG file -> an HTML image of the same bytes."""
    fig.savefig(path, dpi=160)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem.replace("_", " ")}" src="data:image/png;base64,{data}">'


def stage(results):
    """When a model was evaluated, in words."""
    steps = results.get("steps")
    if steps == 0:
        return "before training"
    return (results["method"] or "model") + (f" after {steps} steps" if steps else "")


def write(arms, transcripts, folder, metrics=None, comparison=None):
    """report.html, and each plot as PNG, into `folder`.

    arms {label: results}; transcripts: a list of rows for each arm; metrics {label: rows of
    metrics.jsonl}; comparison: what compare.side_by_side returned, where there are several arms.
    """
    first = next(iter(arms.values()))
    tables = html_table("Scores", score_rows(arms))
    if comparison:
        title = " / ".join(arms)
        seeds = ", ".join(f"{role} {len(runs)}" for role, runs in comparison["runs"].items())
        claims = [[f"{h['name']} {h['claim']}", h["verdict"], h["words"]]
                  for h in comparison["hypotheses"]]
        tables = html_table("The claims", [["claim", "verdict", "measured"], *claims]) + tables
        tables += html_table("Paired differences", difference_rows(comparison))
        against = "fidelity" if plots.measured(arms) else "accuracy"
        figures = {f"stability_against_{against}": plots.tradeoff(arms, comparison["runs"])}
    else:
        title, seeds = f"{stage(first)}: {first['model']} on {first['task']}", "1"
        rivals = [[row["name"], f"{row['accuracy']:.3f}", f"{row['tokens_per_item']:.1f}"]
                  for row in first["inference_time_rivals"]]
        tables += html_table("What inference can buy", [
            ["instead of training", "accuracy", "generated tokens per item"], *rivals])
        figures = {"accuracy_per_persona": plots.bars(first)}
    figures["the_persona_lottery"] = plots.lottery(arms)
    if metrics:
        figures["learning_curves"] = plots.curves(metrics, arms)
    every = panels(arms, transcripts)
    spoken = [panel for panel in every if "correct" not in panel[0][1]]  # answers of role play
    solved = [panel for panel in every if "correct" in panel[0][1]]
    footer = (f"{first['task']}, {len(first['items'])} problems, {len(first['personas']) - 1} "
              f"personas, greedy; training seeds: {seeds}. "
              f"{first['command']} {first['commit']}")
    write_atomically(folder / "report.html", PAGE.substitute(
        title=html.escape(title), lead=html.escape(finding(arms, comparison)), tables=tables,
        plots="".join(image(fig, folder / f"{name}.png") for name, fig in figures.items()),
        transcripts="".join(card(panel) for panel in spoken[:6] + solved[:6]),
        footer=html.escape(footer)))


# --------------------------------------------------------------------------------------------------
# On the terminal


def table_text(results):
    """The table that the command prints: personas from best to worst, then the scores."""
    ends = ("", "_low", "_high")
    rows = [["persona, then score", "value", "95 % from", "to"]]
    for row in sorted(results["personas"], key=lambda row: row["accuracy"])[::-1]:
        rows.append([row["name"], *(f"{row['accuracy' + end]:.3f}" for end in ends)])
    for name in measures.SCORES:
        rows.append([name, *(f"{results[name + end]:.3f}" for end in ends)])
    cut, limit = results["truncated_fraction"], results["max_new_tokens"]
    lines = [aligned(rows), lottery_text(results),
             f"{100 * cut:.0f} % of the answers were cut at {limit} tokens (--max-new-tokens)"]
    if "reward" in results:
        lines.append(f"{results['reward']}, mean over personas: {results['mean_reward']:.3f}")
    if results["errors"]:
        lines.append(f"{results['errors']} answers were given up where logits were not finite: "
                     "try --dtype float32")
    return "\n".join(lines)


def lottery_text(results):
    """The lottery without luck, in a few lines."""
    def shown(name):
        values = [results.get(name + end) for end in ("", "_low", "_high")]
        return "not measured" if None in values else interval(*values, name=name)

    rests, one = "", results["pss_without_one"]
    if one and one["low"] < one["high"] and shown("pss_deconvolved") != "not measured":
        rests = (f"; with any one persona left out it lies between {one['low']:.3f} and "
                 f"{one['high']:.3f}, highest without {one['persona']}")
    return (f"persona_sd, the true spread over personas in points: {shown('persona_sd')}, "
            f"p = {results['persona_sd_p']:.3f} without any effect; "
            f"in logits {shown('persona_sd_logit')}\n"
            f"harmful_gap, what harmful personas cost in points: {shown('harmful_gap')}\n"
            f"pss would be {shown('pss_shuffled')} if personas made no difference; "
            f"without luck it is {shown('pss_deconvolved')}{rests}")


def aligned(rows):
    """Rows of strings as text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
