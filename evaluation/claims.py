"""The paper's claims as hypotheses: what paired differences between arms say of each.

The claims of PerMix-RLVR (arXiv 2604.08986) become H1 to H5. Each has a verdict: shown, opposite,
not shown, not tested, or too few problems. Beside "not shown" stands the difference that the design
could have shown. Stability is decided by `persona_sd`, in which luck cancels
(evaluation/lottery.py). The paper's `pss` is printed beside its value for shuffled answers.

H2 and H4 are decided by one reader, a model: a second one has to agree (results/readers.py).

Left out: that stability is near 0 where accuracy is, which is true by construction; and corrections
for looking at many pairs. The hypotheses are few; that `persona_sd` decides was fixed before the
second experiment (results/plan.md), after the first one's data were seen.
"""

from evaluation import lottery, measures, report

CLAIMS = (  # hypothesis, first arm, second arm, the score that decides, the sign claimed, in words
    ("H1", "start", "rlvr", "persona_sd", -1, "RLVR raises stability over the start model"),
    ("H2", "start", "rlvr", "persona_identification", -1,
     "RLVR lowers fidelity against the start model"),
    ("H3", "rlvr", "permix", "persona_sd", -1, "PerMix raises stability over RLVR"),
    ("H4", "rlvr", "permix", "persona_identification", 1, "PerMix raises fidelity over RLVR"),
    ("H5", "rlvr", "permix", "no_persona_accuracy", 0,
     "PerMix loses no accuracy without a persona"),
)
BESIDE = {  # told beside the score that decides
    "persona_sd": ("persona_sd_logit", "harmful_gap"),
    "self_identification": ("persona_identification", "persona_score")}
MARGIN = 0.03  # of accuracy: H5 claims no loss, and less than this is none


def difference(a, b, level=0.95):
    """Second arm minus first, paired: {score: {"first", "second", "difference", "low", "high",
    "detectable"}} for the scores that both have.

    a, b: as compare.arm_draws gives them. The interval of persona_sd leaves out 0 exactly where
    that of its square S2 does, since the root keeps the order of each pair of draws.
    """
    out = {}
    for name in [name for name in a if name in b]:
        low, high = measures.interval(b[name][1] - a[name][1], level)
        first, second = float(a[name][0]), float(b[name][0])
        out[name] = {"first": first, "second": second, "difference": second - first, "low": low,
                     "high": high, "detectable": measures.detectable(low, high, level)}
    if "persona_sd" in out:
        fall = detectable_fall(a["persona_sd"], b["persona_sd"], level)
        out["persona_sd"]["detectable"] = fall
    return out


def detectable_fall(a, b, level=0.95):
    """The smallest fall of persona_sd from arm a's value that could have been shown, from the
    standard error of S2; above a's value where even a fall to 0 could not have been."""
    first, apart = a[0] * abs(a[0]), b[1] * abs(b[1]) - a[1] * abs(a[1])
    least = measures.detectable(*measures.interval(apart, level), level)
    return float(a[0] - lottery.signed_root(first - least))


def hypotheses(arms, draws, scores, looks=1):
    """A verdict for each of H1-H5: dicts of name, claim, verdict (shown, opposite, not shown, not
    tested, too few problems) and words. draws: {role: compare.arm_draws}; scores: {role: the scores
    that are printed}.

    Stability rises where the interval of the difference in persona_sd lies below 0; H5's interval
    must stay above -MARGIN. looks: at how many checkpoints H3 is looked at. They are one claim, so
    H3's interval is of 1 - 0.05 / looks (Bonferroni). That H3 holds at equal accuracy too, which
    results/plan.md asks for, is not decided here: results/curves.py shows it.
    """
    out, few = [], too_few(next(iter(arms.values()))[0])
    for name, first, second, score, sign, claim in CLAIMS:
        missing = [arm for arm in (first, second) if arm not in arms]
        level = 1 - 0.05 / (looks if name == "H3" else 1)
        got = {} if missing else difference(draws[first], draws[second], level)
        if score == "persona_identification" and "self_identification" in got:
            score = "self_identification"  # the other is of drift, but older results have only that
        found, said = "not tested", f"no {score} was measured"
        if missing:
            said = f"no arm {' or '.join(missing)} given"
        if score in got:
            found = verdict(got[score], sign)
            told = [key for key in (score, *BESIDE.get(score, ())) if key in got]
            said = "; ".join(words(key, got[key]) for key in told)
            if level > 0.95:
                said += f"; intervals of {100 * level:.1f} %, for {looks} looks"
            if score == "persona_sd":
                before, after = (beside_shuffled(scores[arm]) for arm in (first, second))
                said += f"; pss {before} -> {after}"
            if found == "not shown":
                said += f"; {could_show(score, got[score], sign)}"
        row = {"name": name, "claim": claim, "verdict": found, "words": said}
        by_problems = score in got and not score.endswith("_identification")
        out.append(row | few if by_problems else row)
    return out


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
