"""Arms side by side: what each training method did to stability and fidelity.

Every arm answered the same problems under the same personas, so differences are paired: one
resampling of the items serves all arms. Training seeds add their own spread (measures.seed_spread).

What the differences say of the claims of PerMix-RLVR (arXiv 2604.08986) is in evaluation/claims.py.

    python evaluate.py --compare runs/*/evaluation/after runs/rlvr-0/evaluation/before
"""

import json
from itertools import combinations
from pathlib import Path

import numpy as np

from common import files
from common.command import note
from evaluation import claims, lottery, measures, plots, report

ARMS = ("start", "sft", "distill", "rlvr", "permix", "permix+anchor")  # in this order, then others
TRAINED = ("task", "reward", "personas")  # settings in which those may not differ
FLAGS = ("task", "prompt", "max_new_tokens", "reward")  # of evaluate.py, for how it is asked
TOLD = ("model", "steps", "learning_rate", "prompts")  # those that are told where they do


def grades_of(runs):
    """PersonaGym's part of each results dict, empty where it was not asked."""
    return [run.get("fidelity", {}).get("personagym", {}) for run in runs]


def run_draws(run, salt, seed=0):
    """{score: (value, draws [2, B])} of one results dict.

    The counts are the same for every run, so items are paired. The shrinkage is drawn for each run
    by itself, by its `salt`.
    """
    table = measures.answer_table(run)
    plain, correct = table[:, 0], table[:, 1:]
    counts = measures.resamples(len(table), seed=seed)
    drawn = measures.bootstrap(correct, counts, [seed, salt])
    out = {name: (value, drawn[name]) for name, value in measures.table_scores(correct).items()}
    out["no_persona_accuracy"] = plain.mean(), np.stack([counts @ plain / len(table)] * 2)
    for name, rows in run.get("fidelity", {}).get("tables", {}).items():  # [questions, personas]
        out[name] = np.mean(rows), np.stack([measures.crossed(rows, seed)] * 2)
    graded = grades_of([run])[0]
    if graded.get("usable") and "table" in graded:  # [personas, tasks]; the tasks are fixed
        rows = np.mean(graded["table"], axis=1)
        drawn = measures.resamples(len(rows), seed=seed) @ rows / len(rows)
        out["persona_score"] = rows.mean(), np.stack([drawn] * 2)
    return out


def persona_tables(runs):
    """(tables [S, N, P], the personas' strata, their names) of an arm's runs, `none` left out."""
    tables = np.array([measures.answer_table(run)[:, 1:] for run in runs])
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
    check_same(grades_of(runs), ("judge", "personas", "questions"), "PersonaGym's ")
    check_same(asked, ("task", "prompt", "max_new_tokens", "stop", "reward", "items", "problems",
                       "personas", "pool", "template", "questions", "candidates"), "")


def check_same(rows, keys, where):
    """ValueError that names the first of `keys` with two values in the rows that have it."""
    for key in keys:
        seen = [row[key] for row in rows if key in row]
        if other := [value for value in seen if value != seen[0]]:
            apart = "" if isinstance(seen[0], list) else f" ({seen[0]} and {other[0]})"
            again = ""
            if key in FLAGS and not where:
                again = f": evaluate again with --{key.replace('_', '-')}"
            raise ValueError("these evaluations cannot be paired: they differ in "
                             f"{where}{key!r}{apart}{again}")


def apart(arms):
    """A line for each of TOLD, and for the reader of fidelity, in which trained arms differ.
    ValueError where an arm's own runs do."""
    lines = []
    for key in (*TOLD, "reader"):
        found = {}
        for role, runs in arms.items():
            values = {value for run in runs if (value := told_of(run, key))}
            if len(values) > 1:
                raise ValueError(f"the runs of {role} differ in their {key!r} "
                                 f"({', '.join(map(str, sorted(values)))}): give them --roles "
                                 "of their own")
            if values and (role != "start" or key == "reader"):     # it is not trained yet
                found[role] = values.pop()
        if len(set(found.values())) > 1:
            arms_at = ", ".join(f"{role} {value}" for role, value in found.items())
            words = "fidelity with another" if key == "reader" else "trained with other"
            lines.append(f"{words} {key.replace('_', ' ')}: {arms_at}")
    return lines


def told_of(run, key):
    """One of TOLD, or the `reader`, of a results dict; None or "" where it is not known."""
    trained = run.get("trained", {})
    if key == "model":                                  # the start model, wherever it lay
        return Path(trained.get("model", "")).name
    if key == "reader":
        return Path(run.get("fidelity", {}).get("reader", "")).name
    return (trained | run).get(key)


def side_by_side(arms, seed=0, looks=1):
    """{role: [results dict, one a training seed]} -> runs, arms (their scores with intervals),
    differences, hypotheses.

    Differences are second minus first, for every pair of arms in the order given. looks: at how
    many checkpoints the arms are compared, see claims.hypotheses. ValueError where runs cannot be
    paired.
    """
    check_comparable([run for runs in arms.values() for run in runs])
    own = [run.get("trained", {}) for role in ARMS for run in arms.get(role, ())]
    check_same(own, TRAINED, "their training's ")  # arms of other names may
    draws, scores = {}, {}
    for salt, (role, runs) in enumerate(arms.items()):
        draws[role] = arm_draws(runs, salt, seed)
        scores[role] = arm_scores(draws[role]) | without_effect(runs, seed)
    return {
        "problems": len(next(iter(arms.values()))[0]["items"]),
        "runs": {role: [run_scores(run) for run in runs] for role, runs in arms.items()},
        "arms": scores,
        "differences": {f"{b} - {a}": claims.difference(draws[a], draws[b])
                        for a, b in combinations(arms, 2)},
        "hypotheses": claims.hypotheses(arms, draws, scores, looks),
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
    bounds["persona_score"] = 1, 5
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
    """The first of an arm's results, with means over training seeds in place of its own values.

    What is not averaged is left out.
    """
    out = runs[0] | dict.fromkeys(lottery.NAMES) | scores
    if len(runs) > 1:
        for name in ("pass_at_k", "noise_floor", "mean_reward"):
            out.pop(name, None)
    if all("mean_reward" in run for run in runs):
        out["mean_reward"] = float(np.mean([run["mean_reward"] for run in runs]))
    for name in ("lottery", "lottery_held_out"):
        out[name] = np.mean([run[name] for run in runs], axis=0).tolist()
    spoken = dict(out.pop("fidelity", {}))
    if "persona_identification" not in scores:  # not measured in every run
        spoken = {key: value for key, value in spoken.items() if key == "personagym"}
    graded = grades_of(runs)
    if len(runs) > 1 and "persona_score" not in scores:  # one of them has none to be believed
        spoken.pop("personagym", None)
    elif all(graded):
        tasks = {task: float(np.mean([one["tasks"][task] for one in graded]))
                 for task in graded[0]["tasks"]}
        spoken["personagym"] = graded[0] | {"tasks": tasks}
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
    anchor and its rivals make arms of their own."""
    settings = config.get("settings")
    if not settings:
        return {}
    anchor = ""
    if settings.get("anchor_coef"):
        anchor = "+rehearsal" if settings.get("anchor_on") == "solved" else "+anchor"
        anchor += "-ce" if settings.get("anchor_loss") == "ce" else ""
    keys = TOLD + (TRAINED if settings.get("persona_prob") else TRAINED[:-1])
    return {"method": settings["method"] + anchor, "training_seed": settings["seed"],
            "trained": {key: settings[key] for key in keys if key in settings}}


def read_arm(folder, role=None):
    """(role, results) of an evaluation folder. ValueError where it is none.

    Without a `role` it is `start` before any step of training, else the method in the results.
    """
    file = folder / "results.json"
    if not file.is_file():
        inside = Path("evaluation", "after")            # of a run
        hint = f": give {folder / inside}" if (folder / inside / "results.json").is_file() else ""
        raise ValueError(f"{folder} is no evaluation: it has no results.json{hint}")
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


def folders(paths, out, roles=None, seed=0, looks=1):
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
    for line in apart(arms):
        note(f"warning: {line}")
    comparison, out = side_by_side(arms, seed, looks), Path(out)
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
