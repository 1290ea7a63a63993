"""Arms side by side: what each training method did to stability and fidelity.

Every arm answered the same problems under the same personas, so differences are paired: one
resampling of the items serves all arms. Training seeds add their own spread (measures.seed_spread).

The claims of PerMix-RLVR (arXiv 2604.08986) become hypotheses H1 to H6; H6 is ours. Each has a
verdict: shown, opposite, not shown, not tested, or too few problems. Beside "not shown" stands the
difference that the design could have shown. Stability is decided by `persona_sd`, in which luck
cancels (evaluation/lottery.py). The paper's `pss` is printed beside its value for shuffled answers.

    python evaluate.py --compare runs/*/evaluation/after runs/rlvr-0/evaluation/before

Left out: corrections for looking at many pairs. The hypotheses are few and were fixed in advance.
"""

import json
from itertools import combinations
from pathlib import Path

import numpy as np

from common import files
from evaluation import lottery, measures, plots, report

ARMS = ("start", "sft", "distill", "rlvr", "permix", "permix+anchor")  # in this order, then others
TRAINED = ("task", "reward", "personas")  # settings in which those may not differ


def answer_table(run):
    """The table of right and wrong [N, 1 + P] of a results dict, column 0 without a persona."""
    columns = [list(run["correct"][row["name"]]) for row in run["personas"]]
    return np.array(columns, dtype=float).T


def run_draws(run, salt, seed=0):
    """{score: (value, draws [2, B])} of one results dict.

    The counts are the same for every run, so items are paired. The shrinkage is drawn for each run
    by itself, by its `salt`.
    """
    table = answer_table(run)
    plain, correct = table[:, 0], table[:, 1:]
    counts = measures.resamples(len(table), seed=seed)
    drawn = measures.bootstrap(correct, counts, [seed, salt])
    out = {name: (value, drawn[name]) for name, value in measures.table_scores(correct).items()}
    out["no_persona_accuracy"] = plain.mean(), np.stack([counts @ plain / len(table)] * 2)
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
    """ValueError unless all runs answered the same items under the same personas, asked alike.

    The seed may differ: train.py gives its own, and greedy answers do not depend on it.
    """
    asked = [{"reward": None} | run.get("fidelity", {}) | run
             | {"personas": [row["name"] for row in run["personas"]]} for run in runs]
    check_same(asked, ("task", "prompt", "max_new_tokens", "stop", "reward", "items", "problems",
                       "personas", "pool", "template", "questions", "candidates"), "")


def check_same(rows, keys, where):
    """ValueError that names the first of `keys` with two values in the rows that have it."""
    for key in keys:
        seen = [row[key] for row in rows if key in row]
        if other := [value for value in seen if value != seen[0]]:
            apart = "" if isinstance(seen[0], list) else f" ({seen[0]} and {other[0]})"
            raise ValueError("these evaluations cannot be paired: they differ in "
                             f"{where}{key!r}{apart}")


def difference(a, b):
    """Second arm minus first, paired: {score: {"first", "second", "difference", "low", "high",
    "detectable"}} for the scores that both have.

    a, b: as arm_draws gives them. The interval of persona_sd leaves out 0 exactly where that of its
    square S2 does, since the root keeps the order of each pair of draws.
    """
    out = {}
    for name in [name for name in a if name in b]:
        low, high = measures.interval(b[name][1] - a[name][1])
        first, second = float(a[name][0]), float(b[name][0])
        out[name] = {"first": first, "second": second, "difference": second - first, "low": low,
                     "high": high, "detectable": measures.detectable(low, high)}
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
    ("H2", "start", "rlvr", "persona_identification", -1,
     "RLVR lowers fidelity against the start model"),
    ("H3", "rlvr", "permix", "persona_sd", -1, "PerMix raises stability over RLVR"),
    ("H4", "rlvr", "permix", "persona_identification", 1, "PerMix raises fidelity over RLVR"),
    ("H5", "rlvr", "permix", "no_persona_accuracy", 0,
     "PerMix loses no accuracy without a persona"),
)
BESIDE = {"persona_sd": ("persona_sd_logit", "harmful_gap"),
          "self_identification": ("persona_identification",)}  # told beside the score that decides
MARGIN = 0.03  # of accuracy: H5 claims no loss, and less than this is none
NEAR_ZERO = 0.1  # of accuracy, for H6


def hypotheses(arms, draws, scores, seed=0):
    """A verdict for each of H1-H6: dicts of name, claim, verdict (shown, opposite, not shown, not
    tested, too few problems) and words. draws: {role: arm_draws}; scores: {role: the scores that
    are printed}.

    Stability rises where the interval of the difference in persona_sd lies below 0 and the gap of
    harmful personas does not grow (an interval above 0). H5's interval must stay above -MARGIN.
    """
    out, few = [], too_few(next(iter(arms.values()))[0])
    for name, first, second, score, sign, claim in CLAIMS:
        missing = [arm for arm in (first, second) if arm not in arms]
        got = {} if missing else difference(draws[first], draws[second])
        if score == "persona_identification" and "self_identification" in got:
            score = "self_identification"  # the other is of drift, but older results have only that
        found, said = "not tested", f"no {score} was measured"
        if missing:
            said = f"no arm {' or '.join(missing)} given"
        if score in got:
            found = verdict(got[score], sign)
            told = [key for key in (score, *BESIDE.get(score, ())) if key in got]
            said = "; ".join(words(key, got[key]) for key in told)
            if score == "persona_sd":
                before, after = (beside_shuffled(scores[arm]) for arm in (first, second))
                said += f"; pss {before} -> {after}"
                if found == "shown" and got.get("harmful_gap", {"low": 0})["low"] > 0:
                    found, said = "not shown", said + "; the gap of harmful personas grows"
            if found == "not shown":
                said += f"; {could_show(score, got[score], sign)}"
        row = {"name": name, "claim": claim, "verdict": found, "words": said}
        by_problems = score in got and not score.endswith("_identification")
        out.append(row | few if by_problems else row)
    return [*out, collapse(arms, seed) | few]


def too_few(run):
    """The verdict where a run has fewer problems than its intervals need, else {}."""
    n, least = len(run["items"]), measures.LEAST
    words = f"{n} problems; the intervals need {least}"
    return {"verdict": "too few problems", "words": words} if n < least else {}


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
        return (f"a true difference of {size - MARGIN:+.3f} or more could have been shown to be "
                "no loss")
    return f"a difference of {sign * size:+.3f} could have been shown"


def verdict(d, sign):
    """The verdict on a difference with its interval, against the claimed sign; 0 claims no loss."""
    if sign == 0:
        return "shown" if d["low"] > -MARGIN else "opposite" if d["high"] < 0 else "not shown"
    low, high = sorted((sign * d["low"], sign * d["high"]))
    return "shown" if low > 0 else "opposite" if high < 0 else "not shown"


def collapse(arms, seed=0):
    """H6, PSS collapses where accuracy is near zero: PSS of problem kinds with a mean below
    NEAR_ZERO against others.

    Kinds, not items: items chosen for being answered wrong would have a low PSS by construction.
    """
    values, draws = {True: [], False: []}, {True: [], False: []}  # key: is accuracy near zero?
    for run in [run for runs in arms.values() for run in runs]:
        table, kinds = answer_table(run)[:, 1:], np.array([item["kind"] for item in run["items"]])
        for part in [table[kinds == kind] for kind in np.unique(kinds)]:
            weak = bool(part.mean() < NEAR_ZERO)
            counts = measures.resamples(len(part), seed=seed)
            values[weak].append(measures.pss(part.mean(axis=0)))
            draws[weak].append(measures.bootstrap(part, counts, seed)["pss"])
    out = {"name": "H6", "claim": "PSS collapses where accuracy is near zero"}
    n_weak, n_strong = len(values[True]), len(values[False])
    if not n_weak or not n_strong:
        side = "above" if n_weak else "below"
        return out | {"verdict": "not tested",
                      "words": f"no problem kind has a mean accuracy {side} {NEAR_ZERO}"}
    weak, strong = np.mean(values[True]), np.mean(values[False])
    low, high = measures.interval(np.mean(draws[False], axis=0) - np.mean(draws[True], axis=0))
    said = (f"PSS {weak:.3f} where a run's accuracy on a kind of problem is below {NEAR_ZERO} "
            f"({n_weak} of {n_weak + n_strong}), else {strong:.3f}, "
            f"difference {strong - weak:+.3f} [{low:+.3f}, {high:+.3f}]")
    return out | {"verdict": verdict({"low": low, "high": high}, 1), "words": said}


def side_by_side(arms, seed=0):
    """{role: [results dict, one a training seed]} -> runs, arms (their scores with intervals),
    differences, hypotheses.

    Differences are second minus first, for every pair of arms in the order given. ValueError where
    runs cannot be paired.
    """
    check_comparable([run for runs in arms.values() for run in runs])
    own = [run.get("trained", {}) for role in ARMS for run in arms.get(role, ())]
    check_same(own, TRAINED, "their training's ")  # arms of other names may
    draws, scores = {}, {}
    for salt, (role, runs) in enumerate(arms.items()):
        draws[role] = arm_draws(runs, salt, seed)
        scores[role] = arm_scores(draws[role]) | without_effect(runs, seed)
    return {
        "runs": {role: [run_scores(run) for run in runs] for role, runs in arms.items()},
        "arms": scores,
        "differences": {f"{b} - {a}": difference(draws[a], draws[b])
                        for a, b in combinations(arms, 2)},
        "hypotheses": hypotheses(arms, draws, scores, seed),
    }


def without_effect(runs, seed=0):
    """An arm's scores that have no difference: what shuffled answers give, and what its lottery is
    without one persona."""
    tables, _, names = persona_tables(runs)
    without_one = lottery.leave_one_out(tables, names)
    return measures.no_effect(tables, seed) | {"pss_without_one": without_one}


def arm_scores(got):
    """{score: (value, draws)} of an arm -> values with intervals. Shares keep to 0..1, however far
    the seeds spread."""
    bounds = dict.fromkeys(("style_shift", "persona_sd_logit"), (-np.inf, np.inf))
    bounds |= dict.fromkeys(("log_posterior", "self_log_posterior"), (-np.inf, 0))
    bounds |= dict.fromkeys(("pss_mean_minus_std", *report.POINTS), (-1, 1))
    draws = {name: np.clip(drawn, *bounds.get(name, (0, 1))) for name, (_, drawn) in got.items()}
    return measures.with_intervals({name: value for name, (value, _) in got.items()}, draws)


def run_scores(run):
    """One training seed of an arm: its seed and the scores whose mean are the arm's scores.

    Spread is averaged as a variance: an arm's persona_sd is the root of the mean of signed squares.
    """
    tables, strata, _ = persona_tables([run])
    out = {"training_seed": run.get("training_seed")} | measures.table_scores(tables[0])
    out["no_persona_accuracy"] = run["no_persona_accuracy"]
    out |= {name: float(value) for name, (value, _) in lottery.estimates(tables, strata).items()}
    spoken = run.get("fidelity", {}).get("tables", {})
    return out | {name: float(np.mean(table)) for name, table in spoken.items()}


def averaged(runs, scores):
    """The first of an arm's results, with means over training seeds in place of its own values."""
    out = runs[0] | scores
    for name in ("lottery", "lottery_held_out"):
        out[name] = np.mean([run[name] for run in runs], axis=0).tolist()
    spoken = out.pop("fidelity", {})
    if "persona_identification" not in scores:  # not measured in every run
        spoken = {key: value for key, value in spoken.items() if key == "personagym"}
    return out | ({"fidelity": spoken | scores} if spoken else {})


# --------------------------------------------------------------------------------------------------
# Folders in, a report out


def run_of(folder):
    """(config, metrics) of the run that a folder (its model, or an evaluation) lies in; ({}, [])
    outside a run."""
    for parent in list(Path(folder).resolve().parents)[:2] if Path(folder).exists() else ():
        config, metrics = parent / "config.json", parent / "metrics.jsonl"
        if config.exists() and metrics.exists():
            return json.loads(config.read_text()), list(files.rows(metrics))
    return {}, []


def arm_of(config):
    """{"method", "training_seed", "trained"} of a run by its config.json, {} without one. The
    anchor makes an arm of its own."""
    settings = config.get("settings")
    if not settings:
        return {}
    anchor = "+anchor" if settings.get("anchor_coef") else ""
    keys = TRAINED if settings.get("persona_prob") else TRAINED[:-1]
    return {"method": settings["method"] + anchor, "training_seed": settings["seed"],
            "trained": {key: settings[key] for key in keys if key in settings}}


def read_arm(folder, role=None):
    """(role, results) of an evaluation folder. ValueError where it is none.

    Without a `role` it is `start` before any step of training, else the method in the results.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no evaluation: it has no results.json")
    results = files.parsed(str(file), file.read_bytes(), "the results of evaluate.py")
    for key in ("method", "personas", "items", "correct", "lottery"):
        if key not in results:
            raise ValueError(f"{file} is no evaluation: it has no {key!r}")
    if not measures.has_table(results):
        raise ValueError(f"{file} is broken: its answers do not fit its problems: evaluate again")
    found = "start" if results.get("steps") == 0 else results["method"] or folder.name
    return role or found, results


def rank(row):
    """The order of (role, results, folder): by arm, then by training seed, which pairs arms."""
    role, results, _ = row
    arm = ARMS.index(role) if role in ARMS else len(ARMS)
    return arm, results.get("training_seed") or 0, "fidelity" not in results


def folders(paths, out, roles=None, seed=0):
    """Evaluations side by side: comparison.json, report.html and plots into `out` -> the dict of
    side_by_side.

    paths: folders as read_arm reads them; roles: a name for each. Several of one role are training
    seeds of one arm; of the start model one is enough. ValueError where two have one training seed.
    """
    given = roles or [None] * len(paths)
    if len(paths) < 2 or len(given) != len(paths):
        raise ValueError("--compare needs at least two folders, and --roles one name for each")
    found = [(*read_arm(Path(p), role), Path(p)) for p, role in zip(paths, given, strict=True)]
    arms, transcripts, metrics = {}, {}, {}
    for role, results, folder in sorted(found, key=rank):
        before, number = arms.get(role, []), results.get("training_seed")
        if role == "start" and before and results["model"] == before[0]["model"]:
            check_comparable([before[0], results])
            continue
        repeated = number is not None and number in [run.get("training_seed") for run in before]
        unknown = number is None and before and not roles  # two seeds, or two models?
        if repeated or unknown or role == "start" and before:
            raise ValueError(f"two folders hold {role} with training seed {number}: "
                             "tell them apart with --roles")
        arms.setdefault(role, []).append(results)
        if role not in transcripts:  # those of an arm's first seed are shown
            transcripts[role] = list(files.rows(folder / "transcripts.jsonl"))
        curves = run_of(folder)[1]
        if role != "start" and curves:
            metrics.setdefault(role, []).append(curves)
    comparison, out = side_by_side(arms, seed), Path(out)
    shown = {role: averaged(runs, comparison["arms"][role]) for role, runs in arms.items()}
    out.mkdir(parents=True, exist_ok=True)
    curves = {role: plots.mean_curve(runs) for role, runs in metrics.items()}
    report.write(shown, list(transcripts.values()), out, curves, comparison)
    files.write_atomically(out / "comparison.json", json.dumps(comparison, indent=1))
    return comparison


# --------------------------------------------------------------------------------------------------
# Text


def text(comparison):
    """The arms' main scores, their paired differences, and a verdict for each hypothesis."""
    verdicts = [f"{h['name']} {h['claim']}: {h['verdict'].upper()}. {h['words']}"
                for h in comparison["hypotheses"]]
    return "\n\n".join([report.aligned(report.arm_rows(comparison)),
                        report.aligned(report.difference_rows(comparison)),
                        "\n".join(verdicts), report.remark(comparison)])
