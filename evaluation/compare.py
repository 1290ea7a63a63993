"""Arms side by side: what each training method did to stability and fidelity, and whether the paper's claims show.

Every arm answered the same problems under the same personas, so differences are paired: one resampling of the items
serves all arms, and training seeds add their own spread (measures.seed_spread). The claims of PerMix-RLVR (arXiv
2604.08986) become hypotheses H1 to H6, each with a verdict in words: shown, opposite, not shown, or not tested. H6 and
the comparison at equal mean accuracy are ours: a higher mean alone raises stability.

    python evaluate.py --compare runs/*/evaluation/after runs/rlvr-0/evaluation/before --out runs/compared

Left out: corrections for looking at many pairs. The hypotheses are few and were fixed in advance.
"""

import json
from itertools import combinations
from pathlib import Path

import numpy as np

import files
from evaluation import measures, report

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
        mean = np.array(rows).mean(axis=1)
        out[name] = mean.mean(), np.stack([measures.resamples(len(mean), seed=seed) @ mean / len(mean)] * 2)
    return out


def arm_draws(runs, salt=0, seed=0):
    """{score: (value, draws [2, B])} of an arm: the mean over its runs, one a training seed."""
    each = [run_draws(run, 1000 * salt + i, seed) for i, run in enumerate(runs)]
    shared = [name for name in each[0] if all(name in draws for draws in each)]
    return {name: measures.over_seeds(*zip(*(draws[name] for draws in each), strict=True), seed) for name in shared}


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


def difference(first, second, seed=0):
    """Arm second minus arm first: {score: {"difference", "low", "high", ...}} for the scores that both have,
    paired."""
    a, b, out = arm_draws(first, seed=seed), arm_draws(second, 1, seed), {}
    for name in [name for name in a if name in b]:
        low, high = measures.interval(b[name][1] - a[name][1])
        out[name] = {"first": float(a[name][0]), "second": float(b[name][0]), "low": low, "high": high,
                     "difference": float(b[name][0] - a[name][0])}
    return out | {"pss_at_matched_mean": matched_pss(first, second, seed)}


def matched_pss(first, second, seed=0):
    """The difference in PSS after the first arm was moved to the second's mean accuracy (see match_mean)."""
    values, draws, counts = [], [], (len(first), len(second))
    for i in range(max(counts) if min(counts) == 1 else min(counts)):  # seeds in pairs; a lone start model with each
        tables = [answer_table(runs[i % len(runs)])[:, 1:] for runs in (first, second)]
        resampled = measures.resamples(len(tables[0]), seed=seed)
        drawn = [measures.accuracy_draws(table, resampled, [seed, 1000 * j + i]) for j, table in enumerate(tables)]
        for (x, y), out in (([t.mean(axis=0) for t in tables], values), (drawn, draws)):
            out.append(measures.pss(y) - measures.pss(measures.match_mean(x, y.mean(axis=-1))))
    value, drawn = measures.over_seeds(values, draws, seed)
    low, high = measures.interval(drawn)
    return {"difference": float(value), "low": low, "high": high}


STABILITY = ("pss", "pss_mean_minus_std", "worst_persona_accuracy")
CLAIMS = (  # hypothesis, first arm, second arm, the score that leads, the sign claimed, in words
    ("H1", "start", "rlvr", "pss", 1, "RLVR raises stability over the start model"),
    ("H2", "start", "rlvr", "persona_identification", -1, "RLVR lowers fidelity against the start model"),
    ("H3", "rlvr", "permix", "pss", 1, "PerMix raises stability over RLVR"),
    ("H4", "rlvr", "permix", "persona_identification", 1, "PerMix raises fidelity over RLVR"),
    ("H5", "rlvr", "permix", "no_persona_accuracy", 0, "PerMix loses no accuracy without a persona"),
)


MARGIN = 0.03  # of accuracy: H5 claims no loss, and less than this is none
NEAR_ZERO = 0.1  # of accuracy, for H6


def hypotheses(arms, seed=0):
    """A verdict for each of H1-H6: dicts of name, claim, verdict (shown, opposite, not shown, not tested) and words.

    A stability claim needs `pss`, `pss_mean_minus_std` and `worst_persona_accuracy` to agree in sign and the interval
    of `pss` to leave out 0. H5's interval must stay above -MARGIN.
    """
    out = []
    for name, first, second, score, sign, claim in CLAIMS:
        missing = [arm for arm in (first, second) if arm not in arms]
        got = {} if missing else difference(arms[first], arms[second], seed)
        found, words = "not tested", f"no arm {' or '.join(missing)} given" if missing else "fidelity was not measured"
        if score in got:
            d, found = got[score], verdict(got[score], sign)
            words = (f"{score} {d['first']:.3f} -> {d['second']:.3f}, difference {d['difference']:+.3f} "
                     f"[{d['low']:+.3f}, {d['high']:+.3f}]")
            if score == "pss" and "pss_at_matched_mean" in got:
                words += "; at equal mean accuracy {difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(
                    **got["pss_at_matched_mean"])
            if score == "pss" and len({np.sign(got[other]["difference"]) for other in STABILITY}) > 1:
                found, words = "not shown", words + "; the three stability scores disagree in sign"
        out.append({"name": name, "claim": claim, "verdict": found, "words": words})
    return [*out, collapse(arms, seed)]


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
    scored = {role: arm_draws(runs, seed=seed) for role, runs in arms.items()}
    return {
        "runs": {role: [run_scores(run) for run in runs] for role, runs in arms.items()},
        "arms": {role: arm_scores(got) | measures.no_effect([answer_table(run)[:, 1:] for run in arms[role]], seed)
                 for role, got in scored.items()},
        "differences": {f"{b} - {a}": difference(arms[a], arms[b], seed) for a, b in combinations(arms, 2)},
        "hypotheses": hypotheses(arms, seed),
    }


def arm_scores(got):
    """{score: (value, draws)} of an arm -> values with intervals; shares keep to 0..1 however far seeds spread."""
    bounds = {"log_posterior": (-np.inf, 0), "style_shift": (-np.inf, np.inf), "pss_mean_minus_std": (-1, 1)}
    draws = {name: np.clip(drawn, *bounds.get(name, (0, 1))) for name, (_, drawn) in got.items()}
    return measures.with_intervals({name: value for name, (value, _) in got.items()}, draws)


def run_scores(run):
    """One training seed of an arm: its seed and the scores that the arm's are the mean of."""
    found = measures.table_scores(answer_table(run)[:, 1:]) | {"no_persona_accuracy": run["no_persona_accuracy"]}
    tables = run.get("fidelity", {}).get("tables", {})
    return {"training_seed": run.get("training_seed")} | found | {n: float(np.mean(t)) for n, t in tables.items()}


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
