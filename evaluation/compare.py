"""Arms side by side: what each training method did to stability and fidelity, and whether the paper's claims show.

Every arm answered the same problems under the same personas, so differences are paired: one resampling of the items
serves all arms, and training seeds add their own spread (measures.seed_spread). The claims of PerMix-RLVR (arXiv
2604.08986) become hypotheses H1 to H6, each with a verdict in words: shown, opposite, not shown, or not tested. Beside
"not shown" stands the difference that the design could have shown. H6 is ours. Stability is decided by `persona_sd`, in
which luck cancels (evaluation/lottery.py); the paper's `pss` is printed beside what shuffled answers give.

    python evaluate.py --compare runs/*/evaluation/after runs/rlvr-0/evaluation/before --out runs/compared

Left out: corrections for looking at many pairs. The hypotheses are few and were fixed in advance.
"""

import json
from itertools import combinations
from pathlib import Path

import numpy as np

from common import files
from evaluation import lottery, measures, report

ARMS = ("start", "sft", "distill", "rlvr", "permix", "permix+anchor")  # their order in a comparison; others follow


def answer_table(run):
    """The table of right and wrong [N, 1 + P] of a results dict, column 0 without a persona."""
    return np.array([[int(c) for c in run["correct"][row["name"]]] for row in run["personas"]], dtype=float).T


def run_draws(run, salt, seed=0):
    """{score: (value, draws [2, B])} of one results dict. Counts are the same for every run, so items are paired; the
    shrinkage is drawn for each run by itself, by its `salt`."""
    table = answer_table(run)
    counts = measures.resamples(len(table), seed=seed)
    drawn = measures.bootstrap(table[:, 1:], counts, [seed, salt])
    out = {name: (value, drawn[name]) for name, value in measures.table_scores(table[:, 1:]).items()}
    out["no_persona_accuracy"] = table[:, 0].mean(), np.stack([counts @ table[:, 0] / len(table)] * 2)
    for name, rows in run.get("fidelity", {}).get("tables", {}).items():  # [questions, personas]
        out[name] = np.mean(rows), np.stack([measures.crossed(rows, seed)] * 2)
    return out


def persona_tables(runs):
    """(tables [S, N, P], the personas' strata, their names) of an arm's runs, `none` left out."""
    tables = np.array([answer_table(run)[:, 1:] for run in runs])
    rows = runs[0]["personas"][1:]
    return tables, [row["stratum"] for row in rows], [row["name"] for row in rows]


def arm_draws(runs, salt=0, seed=0):
    """{score: (value, draws)} of an arm: the mean over its runs, one a training seed."""
    each = [run_draws(run, 1000 * salt + i, seed) for i, run in enumerate(runs)]
    shared = [name for name in each[0] if all(name in draws for draws in each)]
    out = {name: measures.over_seeds(*zip(*(draws[name] for draws in each), strict=True), seed)
           for name in shared}
    return out | lottery.estimates(*persona_tables(runs)[:2], seed)


def check_comparable(runs):
    """ValueError unless all runs answered the same items under the same personas with the same settings. The seed may
    differ: train.py gives its own, and greedy answers do not depend on it."""
    asked = [run | {"personas": [row["name"] for row in run["personas"]]} for run in runs]
    spoken = [run["fidelity"] for run in runs if "fidelity" in run]
    for group, keys in ((asked, ("task", "prompt", "max_new_tokens", "items", "personas")),
                        (spoken, ("questions", "candidates"))):
        for key in keys:
            seen = [run[key] for run in group if key in run]
            if seen.count(seen[0] if seen else None) < len(seen):
                raise ValueError(f"these evaluations cannot be paired: they differ in {key!r}")


def difference(a, b):
    """Second arm minus first, paired: {score: {"first", "second", "difference", "low", "high",
    "detectable"}} for the scores that both have; a, b as arm_draws gives them.

    The interval of persona_sd leaves out 0 exactly where that of its square S2 does, since the root
    keeps the order of each pair of draws.
    """
    out = {}
    for name in [name for name in a if name in b]:
        low, high = measures.interval(b[name][1] - a[name][1])
        out[name] = {"first": float(a[name][0]), "second": float(b[name][0]), "low": low, "high": high,
                     "difference": float(b[name][0] - a[name][0]),
                     "detectable": measures.detectable(low, high)}
    if "persona_sd" in out:
        out["persona_sd"]["detectable"] = detectable_fall(a["persona_sd"], b["persona_sd"])
    return out


def detectable_fall(a, b):
    """The smallest fall of persona_sd from arm a's value that could have been shown, from the
    standard error of S2; above a's value where even a fall to 0 could not have been."""
    first, apart = a[0] * abs(a[0]), b[1] * abs(b[1]) - a[1] * abs(a[1])
    return float(a[0] - lottery.signed_root(first - measures.detectable(*measures.interval(apart))))


CLAIMS = (  # hypothesis, first arm, second arm, the score that decides, the sign claimed, in words
    ("H1", "start", "rlvr", "persona_sd", -1, "RLVR raises stability over the start model"),
    ("H2", "start", "rlvr", "persona_identification", -1, "RLVR lowers fidelity against the start model"),
    ("H3", "rlvr", "permix", "persona_sd", -1, "PerMix raises stability over RLVR"),
    ("H4", "rlvr", "permix", "persona_identification", 1, "PerMix raises fidelity over RLVR"),
    ("H5", "rlvr", "permix", "no_persona_accuracy", 0, "PerMix loses no accuracy without a persona"),
)
BESIDE = {"persona_sd": ("persona_sd_logit", "harmful_gap"),
          "self_identification": ("persona_identification",)}  # told beside the score that decides
MARGIN = 0.03  # of accuracy: H5 claims no loss, and less than this is none
NEAR_ZERO = 0.1  # of accuracy, for H6


def hypotheses(arms, draws, scores, seed=0):
    """A verdict for each of H1-H6: dicts of name, claim, verdict (shown, opposite, not shown, not
    tested) and words. draws: {role: arm_draws}; scores: {role: the scores that are printed}.

    Stability rises where the interval of the difference in persona_sd lies below 0 and the gap of
    harmful personas does not grow (an interval above 0). H5's interval must stay above -MARGIN.
    """
    out = []
    for name, first, second, score, sign, claim in CLAIMS:
        missing = [arm for arm in (first, second) if arm not in arms]
        got = {} if missing else difference(draws[first], draws[second])
        if score == "persona_identification" and "self_identification" in got:
            score = "self_identification"  # the start model's reading is of drift; older results have no other
        found, said = "not tested", f"no arm {' or '.join(missing)} given" if missing else f"no {score} was measured"
        if score in got:
            found = verdict(got[score], sign)
            said = "; ".join(words(key, got[key]) for key in (score, *BESIDE.get(score, ())) if key in got)
            if score == "persona_sd":
                said += f"; pss {beside_shuffled(scores[first])} -> {beside_shuffled(scores[second])}"
                if found == "shown" and got.get("harmful_gap", {"low": 0})["low"] > 0:
                    found, said = "not shown", said + "; the gap of harmful personas grows"
            if found == "not shown":
                said += f"; {could_show(score, got[score], sign)}"
        out.append({"name": name, "claim": claim, "verdict": found, "words": said})
    return [*out, collapse(arms, seed)]


def words(name, d):
    """A difference in words: the two values, and the change with its interval."""
    first, second = (report.number(name, d[key]) for key in ("first", "second"))
    unit = " points" if name in report.POINTS else ""
    apart = report.interval(d["difference"], d["low"], d["high"], "+", name)
    return f"{name} {first} -> {second}{unit}, difference {apart}".replace("\u00a0", " ")


def beside_shuffled(scores):
    """`pss`, and in brackets its value without any effect of personas."""
    return f"{scores['pss']:.3f} ({scores['pss_shuffled']:.3f} shuffled)"


def could_show(name, d, sign):
    """What the design could have shown with 80 % power, in words, beside "not shown"."""
    size = d["detectable"]
    if name == "persona_sd":
        return ("not even a fall to 0 could have been shown" if size > d["first"] else
                f"a fall of {report.number(name, size)} points could have been shown")
    if sign == 0:
        return f"a true difference of {size - MARGIN:+.3f} or more could have been shown to be no loss"
    return f"a difference of {sign * size:+.3f} could have been shown"


def verdict(d, sign):
    """One word or two for a difference with its interval against the claimed sign; sign 0 claims no loss."""
    if sign == 0:
        return "shown" if d["low"] > -MARGIN else "opposite" if d["high"] < 0 else "not shown"
    low, high = sorted((sign * d["low"], sign * d["high"]))
    return "shown" if low > 0 else "opposite" if high < 0 else "not shown"


def collapse(arms, seed=0):
    """H6, PSS collapses where accuracy is near zero: PSS of problem kinds with a mean below NEAR_ZERO against others.

    Kinds, not items: items chosen for being answered wrong would have a low PSS by construction.
    """
    values, draws = {True: [], False: []}, {True: [], False: []}  # key: is the kind's accuracy near zero?
    for run in [run for runs in arms.values() for run in runs]:
        table, kinds = answer_table(run)[:, 1:], np.array([item["kind"] for item in run["items"]])
        for part in [table[kinds == kind] for kind in np.unique(kinds)]:
            weak = bool(part.mean() < NEAR_ZERO)
            values[weak].append(measures.pss(part.mean(axis=0)))
            draws[weak].append(measures.bootstrap(part, measures.resamples(len(part), seed=seed), seed)["pss"])
    out = {"name": "H6", "claim": "PSS collapses where accuracy is near zero"}
    if not values[True] or not values[False]:
        side = "above" if values[True] else "below"
        return out | {"verdict": "not tested", "words": f"no problem kind has a mean accuracy {side} {NEAR_ZERO}"}
    low, high = measures.interval(np.mean(draws[False], axis=0) - np.mean(draws[True], axis=0))
    words = (f"PSS {np.mean(values[True]):.3f} where a run's accuracy on a kind of problem is below {NEAR_ZERO} "
             f"({len(values[True])} of {len(values[True] + values[False])}), else {np.mean(values[False]):.3f}, "
             f"difference {np.mean(values[False]) - np.mean(values[True]):+.3f} [{low:+.3f}, {high:+.3f}]")
    return out | {"verdict": verdict({"low": low, "high": high}, 1), "words": words}


def side_by_side(arms, seed=0):
    """Arms side by side, {role: [results dict, one a training seed]} -> runs, scores with intervals, differences,
    hypotheses.

    Differences are second minus first, for every pair of arms in the order given. ValueError where runs cannot be
    paired.
    """
    check_comparable([run for runs in arms.values() for run in runs])
    draws = {role: arm_draws(runs, salt, seed) for salt, (role, runs) in enumerate(arms.items())}
    scores = {role: arm_scores(got) | without_effect(arms[role], seed) for role, got in draws.items()}
    return {
        "runs": {role: [run_scores(run) for run in runs] for role, runs in arms.items()},
        "arms": scores,
        "differences": {f"{b} - {a}": difference(draws[a], draws[b]) for a, b in combinations(arms, 2)},
        "hypotheses": hypotheses(arms, draws, scores, seed),
    }


def without_effect(runs, seed=0):
    """An arm's scores that have no difference: what shuffled answers give, and what its lottery is
    without one persona."""
    tables, _, names = persona_tables(runs)
    return measures.no_effect(tables, seed) | {"pss_without_one": lottery.leave_one_out(tables, names)}


def arm_scores(got):
    """{score: (value, draws)} of an arm -> values with intervals; shares keep to 0..1 however far seeds spread."""
    bounds = dict.fromkeys(("style_shift", "persona_sd_logit"), (-np.inf, np.inf))
    bounds |= dict.fromkeys(("log_posterior", "self_log_posterior"), (-np.inf, 0))
    bounds |= dict.fromkeys(("pss_mean_minus_std", *report.POINTS), (-1, 1))
    draws = {name: np.clip(drawn, *bounds.get(name, (0, 1))) for name, (_, drawn) in got.items()}
    return measures.with_intervals({name: value for name, (value, _) in got.items()}, draws)


def run_scores(run):
    """One training seed of an arm: its seed and the scores that the arm's are the mean of. (Spread is
    averaged as a variance, so an arm's persona_sd is the root of the mean of signed squares.)"""
    tables, strata, _ = persona_tables([run])
    found = measures.table_scores(tables[0]) | {"no_persona_accuracy": run["no_persona_accuracy"]}
    found |= {name: float(value) for name, (value, _) in lottery.estimates(tables, strata).items()}
    spoken = run.get("fidelity", {}).get("tables", {})
    return {"training_seed": run.get("training_seed")} | found | {n: float(np.mean(t)) for n, t in spoken.items()}


def averaged(runs, scores):
    """The first of an arm's results with all that is a mean over its training seeds in place of its own."""
    first, curves = runs[0], ("lottery", "lottery_held_out")
    out = first | scores | {name: np.mean([run[name] for run in runs], axis=0).tolist() for name in curves}
    spoken = out.pop("fidelity", {})
    if "persona_identification" not in scores:  # not measured in every run
        spoken = {key: value for key, value in spoken.items() if key == "personagym"}
    return out | ({"fidelity": spoken | scores} if spoken else {})


# ----------------------------------------------------------------------------------------------------------------------
# Folders in, a report out


def run_of(folder):
    """(config, metrics) of the run that a folder (its model, one of its evaluations) lies in; ({}, []) outside a
    run."""
    for parent in list(Path(folder).resolve().parents)[:2] if Path(folder).exists() else ():
        if (parent / "config.json").exists() and (parent / "metrics.jsonl").exists():
            return json.loads((parent / "config.json").read_text()), list(files.rows(parent / "metrics.jsonl"))
    return {}, []


def arm_of(config):
    """{"method", "training_seed"} of a run by its config.json, {} without one. The anchor makes an arm of its own."""
    trained = config.get("settings")
    return {"method": trained["method"] + ("+anchor" if trained.get("anchor_coef") else ""),
            "training_seed": trained["seed"]} if trained else {}


def read_arm(folder, role=None):
    """(role, results) of an evaluation folder. Its role in a comparison is the one given, else `start` before any
    step of training, else its method: as its results say, or the run that it lies in. ValueError where it is none."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    missing = [key for key in ("method", "personas", "items", "correct", "lottery") if key not in results]
    if missing:
        raise ValueError(f"{folder / 'results.json'} is no evaluation: it has no {missing[0]!r}")
    return role or ("start" if results.get("steps") == 0 else results["method"] or folder.name), results


def rank(row):
    """The order of (role, results, folder): by arm, then by training seed, which pairs the seeds of two arms."""
    role, results, _ = row
    return ARMS.index(role) if role in ARMS else len(ARMS), results.get("training_seed") or 0, "fidelity" not in results


def folders(paths, out, roles=None, seed=0):
    """Evaluations side by side: comparison.json, report.html and plots into `out` -> the comparison dict.

    paths: folders as read_arm reads them; roles: a name for each. Several of one role are training seeds of one arm;
    of the start model, which has none, one is enough. ValueError where two folders of an arm have the same training
    seed, as two ablations of one method would.
    """
    given = roles or [None] * len(paths)
    if len(paths) < 2 or len(given) != len(paths):
        raise ValueError("--compare needs at least two folders, and --roles one name for each of them")
    found = [(*read_arm(Path(folder), role), Path(folder)) for folder, role in zip(paths, given, strict=True)]
    arms, transcripts, metrics = {}, {}, {}
    for role, results, folder in sorted(found, key=rank):
        before, number = arms.get(role, []), results.get("training_seed")
        if role == "start" and before and results["model"] == before[0]["model"]:
            continue
        repeated = number is not None and number in [run.get("training_seed") for run in before]
        unknown = number is None and before and not roles  # two seeds, or two models?
        if repeated or unknown or role == "start" and before:
            raise ValueError(f"two folders hold {role} with training seed {number}: tell them apart with --roles")
        arms.setdefault(role, []).append(results)
        if role not in transcripts:  # an arm's first seed speaks for it
            transcripts[role] = list(files.rows(folder / "transcripts.jsonl"))
        if role != "start" and run_of(folder)[1]:
            metrics.setdefault(role, []).append(run_of(folder)[1])
    comparison, out = side_by_side(arms, seed), Path(out)
    shown = {role: averaged(runs, comparison["arms"][role]) for role, runs in arms.items()}
    out.mkdir(parents=True, exist_ok=True)
    curves = {role: mean_curve(runs) for role, runs in metrics.items()}
    report.write(shown, list(transcripts.values()), out, curves, comparison)
    files.write_atomically(out / "comparison.json", json.dumps(comparison, indent=1))
    return comparison


def mean_curve(runs):
    """Learning curves of several training seeds -> one: the mean of each metric at each step that all have reached."""
    return [{key: float(np.mean([row[key] for row in rows]))
             for key in ("step", *report.CURVES) if all(row.get(key) is not None for row in rows)}
            for rows in zip(*runs, strict=False)]


# ----------------------------------------------------------------------------------------------------------------------
# Text


def aligned(rows):
    """Rows of strings as text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def text(comparison):
    """Each arm's main scores, the paired differences between arms, and a verdict in words for each hypothesis."""
    verdicts = [f"{h['name']} {h['claim']}: {h['verdict'].upper()}. {h['words']}" for h in comparison["hypotheses"]]
    single = ", ".join(role for role, runs in comparison["runs"].items() if len(runs) == 1)
    return "\n\n".join([
        aligned(report.arm_rows(comparison)), aligned(report.difference_rows(comparison)), "\n".join(verdicts),
        "[95 % interval], paired over problems and training seeds; ▲ ▼ where it leaves out 0." + (
            f" One training seed for {single}: its intervals cover the choice of problems alone." if single else "")])
