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
    "self_identification": "self identification", "persona_score": "PersonaGym, 1 to 5",
}
SCORES = {  # name in results.json: what it is, with its unit where it is no share; a remark
    "mean_accuracy": ("accuracy, mean over personas", "a persona at random"),
    "no_persona_accuracy": ("accuracy without a persona",
                            "under the template's own system prompt, if any"),
    "worst_persona_accuracy": ("accuracy under the worst persona", ""),
    "persona_sd": ("true spread of accuracy over personas, points",
                   "luck cancels, so it may be below 0; 0 is no lottery"),
    "persona_sd_common": ("spread that repeats over training seeds, points", ""),
    "persona_sd_logit": ("true spread over personas, logits", "free of saturation"),
    "harmful_gap": ("what harmful personas cost, points", "other personas minus these"),
    "pss": ("accuracy of the worst over the best persona", "1 is no lottery; luck lowers it"),
    "pss_deconvolved": ("worst over best, without the luck", ""),
    "pss_shuffled": ("worst over best, if personas made no difference", "luck alone"),
    "pss_mean_minus_std": ("mean accuracy minus spread over personas", ""),
    "pss_all_correct": ("problems solved under every persona", ""),
    "persona_identification": ("answers that the start model traces to their persona", ""),
    "log_posterior": ("the start model's log-probability of that persona, nats", ""),
    "self_identification": ("answers that the model itself traces to their persona", ""),
    "self_log_posterior": ("the model's own log-probability of that persona, nats", ""),
    "style_shift": ("what the persona adds to an answer's log-probability, nats a token", ""),
    "persona_score": ("playing a persona, 1 to 5", "PersonaGym, graded by a judge model"),
}
PAGE = Template("""<!doctype html>
<html lang=en><head><meta charset=utf-8><link rel=icon href="data:,">
<meta name=viewport content="width=device-width,initial-scale=1"><title>$title</title>
<style>
:root{color-scheme:light dark} *{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;font:16px/1.5 system-ui,sans-serif}
h1,p,pre,small,footer{overflow-wrap:anywhere} h1{font-size:1.7rem}
small,footer{opacity:.75} .scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem} small{display:block}
td,th{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;min-width:5rem}
tr{border-bottom:1px solid gray} th small{font-weight:normal}
tr>:first-child{position:sticky;left:0;background:Canvas;min-width:8rem}
@media(max-width:40rem){                      /* a phone: a row's name above its few cells */
.few,.few tbody{display:block} .few tr{display:flex;flex-wrap:wrap} .few tr>*{flex:1}
.few tr>:first-child{flex-basis:100%;padding-bottom:0} td,th{padding-right:.3rem}
table{font-size:.8rem}
.few tr>:nth-child(2):nth-last-child(2){flex:0 0 5.5rem}}
.row{display:flex;flex-wrap:wrap;gap:1rem;align-items:start}
.row>*{flex:1 1 14rem;min-width:0} .row>img{flex:0 1 30rem;max-width:100%;background:white}
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
    """A head and a row for each pair of arms."""
    pairs = comparison["differences"]
    names = [name for name in MAIN if any(name in scores for scores in pairs.values())]
    out = [["difference", *(MAIN[name].replace(" (shuffled)", "") for name in names)]]
    for pair, scores in pairs.items():
        out.append([pair, *(difference_cell(scores, name) for name in names)])
    return out


def difference_cell(scores, name):
    """A paired difference, with an arrow where its interval leaves out 0; a dash without."""
    if name not in scores:
        return "–"
    d = scores[name]
    arrow = "▲ " if d["low"] > 0 else "▼ " if d["high"] < 0 else ""
    return arrow + interval(d["difference"], d["low"], d["high"], "+", name)


def remark(comparison):
    """What the intervals and arrows of a comparison mean."""
    single = ", ".join(role for role, runs in comparison["runs"].items() if len(runs) == 1)
    few = comparison.get("problems", measures.LEAST) < measures.LEAST
    return ("[95 % interval], paired over problems and training seeds; ▲ ▼ where it leaves out 0."
            + f" With fewer than {measures.LEAST} problems that is no claim." * few
            + (f" One training seed for {single}: its intervals cover the choice of problems alone."
               if single else ""))


def score_rows(arms, differences=None):
    """A head and a row for each score that an arm has, one column an arm; and of two arms their
    paired difference, {pair: scores}."""
    pairs = (differences or {}) if len(arms) == 2 else {}
    graded = [results.get("fidelity", {}).get("personagym", {}) for results in arms.values()]
    found = [gym | results.get("fidelity", {}) | results
             for gym, results in zip(graded, arms.values(), strict=True)]
    rows = []
    for name, (called, told) in SCORES.items():
        note = f"{name}: {told}" if told else name
        rows.append([f"{called}\n{note}", *(score_cell(scores, name) for scores in found),
                     *(difference_cell(scores, name) for scores in pairs.values())])
    for task in dict.fromkeys(task for gym in graded for task in gym.get("tasks", ())):
        means = [gym.get("tasks", {}).get(task) for gym in graded]
        rows.append([f"{task}\nPersonaGym's task, 1 to 5",
                     *("–" if mean is None else f"{mean:.2f}" for mean in means)])
    rows.append(["reward, mean over personas\nmean_reward", *(
        f"{results['mean_reward']:.3f}" if "mean_reward" in results else "–"
        for results in arms.values())])
    rows.append(["judge", *(judge_cell(gym) for gym in graded)])
    rows.append(["worst over best of as many reruns without a persona\nnoise_floor.pss",
                 *(score_cell(results.get("noise_floor", {}), "pss") for results in arms.values())])
    sampled = [results.get("pass_at_k", {}).get("k", {}) for results in arms.values()]
    for k in dict.fromkeys(k for by_k in sampled for k in by_k):
        rows.append([f"pass@{k}\nsampled, mean over personas",
                     *(score_cell(by_k.get(k, {}), "personas") for by_k in sampled)])
    told = "a share or ratio from 0 to 1 unless a unit is named"
    head = [f"score [95 % interval]\n{told}", *arms, *pairs]
    rows = [row + ["–"] * (len(head) - len(row)) for row in rows]
    return [head] + [row for row in rows if set(row[1:]) != {"–"}]


def claim_rows(comparison):
    """A head, a row for each claim that was tested, and one for each reason why others were not."""
    tested, others = [], {}
    for h in comparison["hypotheses"]:
        told = f"{h['name']} {h['claim']}"
        if h["verdict"] == "not tested":
            others.setdefault(h["words"], []).append(told)
        else:
            tested.append([told, h["verdict"], h["words"].replace("->", "→")])
    untested = [["\n".join(claims), "not tested", why] for why, claims in others.items()]
    return [["claim", "verdict", "measured"], *tested, *untested]


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
        scores = ", ".join(f"{arm} {factor * results[name]:z.{1 if factor > 1 else 2}f}"
                           for arm, results in arms.items())
        solved = ", ".join(f"{arm} {100 * results['mean_accuracy']:.0f} %"
                           for arm, results in arms.items())
        n = len(next(iter(arms.values()))["items"])
        few = [h["words"] for h in comparison["hypotheses"] if h["verdict"] == "too few problems"]
        lead = f"Too few problems for most claims: {few[0]}. " if few else ""
        lead += f"Solved of {n} problems, mean over personas: {solved}. "
        lead += f"{label[0].upper()}{label[1:]}: {scores}. "
        for verdict, words in (("shown", "Shown here"), ("opposite", "The data speak against")):
            claims = [h["claim"] for h in comparison["hypotheses"] if h["verdict"] == verdict]
            lead += f"{words}: {'; '.join(claims)}. " if claims else ""
        return lead.strip()
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
    """A head and rows of plain text as an HTML table that scrolls by itself on a narrow screen;
    with few columns it fits.

    What follows a line break in a cell is a note.
    """
    body = ""
    for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False):
        cells = [html.escape(cell).split("\n") for cell in row]
        cells = [f"<{tag}>{text}{''.join(f'<small>{note}</small>' for note in notes)}</{tag}>"
                 for text, *notes in cells]
        body += f"<tr>{''.join(cells)}</tr>\n"
    few = " class=few" if len(rows[0]) <= 4 else ""
    return f"<h2>{title}</h2><div class=scroll><table{few}>{body}</table></div>"


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
            columns = [("no persona" if name == "none" else name, greedy[0].get((name, i)))
                       for name in ("none", names[0], names[-1])]
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
    gold = f"<small>correct answer: {html.escape(row['gold'])}</small>" if "gold" in row else ""
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
    if comparison:
        title = f"{' / '.join(arms)} on {first['task']}"
        seeds = ", ".join(f"{len(runs)} of {role}" for role, runs in comparison["runs"].items())
        pairs = comparison["differences"]
        tables = html_table("Scores", score_rows(arms, pairs))
        if len(pairs) > 1:
            tables += html_table("Paired differences", difference_rows(comparison))
        tables += f"<p><small>{html.escape(remark(comparison))}</small></p>"
        tables += html_table("The claims", claim_rows(comparison))
        against = "fidelity" if plots.measured(arms) else "accuracy"
        figures = {f"stability_against_{against}": plots.tradeoff(arms, comparison["runs"])}
        if all(len(runs) == 1 for runs in comparison["runs"].values()):
            figures["accuracy_per_persona"] = plots.dots(arms)
    else:
        title, seeds = f"{stage(first)}: {first['model']} on {first['task']}", "1"
        rivals = [[row["name"], f"{row['accuracy']:.3f}", f"{row['tokens_per_item']:.1f}"]
                  for row in first["inference_time_rivals"]]
        tables = html_table("Scores", score_rows(arms))
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
