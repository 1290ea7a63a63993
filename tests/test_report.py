"""evaluation/report.py: one file that opens offline, shows every number it was given, and shows text as text."""

import base64
import html
import itertools
import json
import re
import shutil
import subprocess
from collections import namedtuple

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text

import evaluate
from evaluation import compare, measures, plots, report, rivals

Problem = namedtuple("Problem", "question answer id kind")
Persona = namedtuple("Persona", "name stratum")
HOSTILE = '<script>document.title="taken"</script><img src="http://127.0.0.1:9/x.png">'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def arm(seed, method):
    """(results, transcripts) of a made-up arm with hostile text in every place that takes text."""
    rng, names = np.random.default_rng(seed), ["a pirate", "a nurse & poet", HOSTILE]
    problems = [Problem(f"{i} + {i}? {HOSTILE}", str(2 * i), str(i), "sum" if i % 2 else HOSTILE) for i in range(12)]
    rows = [{"persona": name, "id": p.id, "kind": p.kind, "question": p.question, "gold": p.answer, "answer": HOSTILE,
             "correct": bool(rng.random() < 0.5), "tokens": 7, "extracted": "3", "sample": 0}
            for name in ["none", *names] for p in problems]
    results = evaluate.summary(measures.correct_table(rows, 12), problems, [Persona(name, "x") for name in names], seed)
    results |= {"model": "m", "task": "t", "method": method, "seed": 0, "max_new_tokens": 8, "command": HOSTILE,
                "commit": "0" * 40, "inference_time_rivals": rivals.rivals(rows, [], 3, 0),
                "noise_floor": rivals.noise_floor(rows[:36], 12, 0.7, 0)}
    hits = rng.random((5, 3)).round()
    results["fidelity"] = {"chance": 0.5, "persona_identification": hits.mean(), "persona_identification_low": 0.1,
                           "persona_identification_high": 0.9, "tables": {"persona_identification": hits.tolist()}}
    spoken = [{"persona": name, "id": "roleplay-0", "kind": "roleplay", "question": "How are you?",
               "answer": f"As {name}."} for name in names]
    return results, rows + spoken


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of one arm's evaluation inside a run that has learning curves."""
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text("{}")
    rows = [{"step": i, "reward": i / 9, "entropy": 1.0, "completion_length": None} for i in range(9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.write(*arm(0, "rlvr"), run / "evaluation/after")
    return run / "evaluation/after"


@pytest.fixture(scope="module")
def seeds():
    """A comparison in numbers: one start model, and two arms of three training seeds each."""
    arms = {"start": [arm(0, "start")[0]]}
    for place, method in enumerate(("rlvr", "permix")):
        arms[method] = [arm(10 * place + seed, method)[0] | {"training_seed": seed} for seed in (1, 2, 3)]
    comparison = compare.side_by_side(arms)
    return {role: compare.averaged(runs, comparison["arms"][role]) for role, runs in arms.items()}, comparison


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The folder of a comparison of three arms."""
    top = tmp_path_factory.mktemp("arms")
    for seed, method in enumerate(("start", "rlvr", "permix")):
        evaluate.write(*arm(seed, method), top / method)
    compare.folders([top / method for method in ("start", "rlvr", "permix")], top / "all")
    return top / "all"


def pages(single, several):
    return [(folder / "report.html").read_text() for folder in (single, several)]


def test_the_report_fetches_nothing_and_runs_nothing(single, several):
    for page in pages(single, several):
        shown = re.sub(r"&lt;.*?&gt;", "", page)  # the hostile text, which is shown and links to nothing
        links = re.findall(r"""(?:src|href|url|action|@import)\s*[=(]\s*["']?([^"')\s>]+)""", shown)
        assert links and all(link.startswith(("#", "data:")) for link in links)
        assert not re.search(r"<(script|iframe|object|embed|base|meta http)", page)


def test_text_from_models_and_files_is_shown_as_text(single, several):
    for page in pages(single, several):
        assert HOSTILE not in page and "&lt;script&gt;" in page and "a nurse &amp; poet" in page


def test_best_worst_and_every_score_with_its_interval_are_in_the_page(single):
    page, results = (single / "report.html").read_text(), json.loads((single / "results.json").read_text())
    page = page.replace("\u00a0", " ")
    best, *_, worst = report.ranked(results)
    assert all(page.count(html.escape(row["name"])) > 1 for row in (best, worst))       # in the lead and the panels
    for name in ("pss", "mean_accuracy", "no_persona_accuracy", "worst_persona_accuracy"):
        assert f"{results[name]:.3f} [{results[name + '_low']:.3f}, {results[name + '_high']:.3f}]" in page
    assert all(row["name"] in page for row in results["inference_time_rivals"])


def test_lead_and_panels_name_the_same_best_and_worst_persona_also_where_several_are_equal():
    results, rows = arm(0, "rlvr")
    for row in results["personas"]:
        row["accuracy"] = 0.5
    panel, lead = report.panels({"rlvr": results}, [rows])[0], report.finding({"rlvr": results}, None)
    (_, (best, _), (worst, _)) = panel
    assert best != worst and f"% ({worst}) and 50 % ({best})" in lead


def test_an_answer_that_was_cut_off_is_told_so():
    row = arm(0, "rlvr")[1][0] | {"truncated": True}
    assert all(f"none ({word}, cut off)<" in report.card([("none", row | {"correct": right})])
               for word, right in (("right", True), ("wrong", False)))
    assert "(wrong)<" in report.card([("none", row | {"correct": False, "truncated": False})])


def test_what_one_persona_changes_is_told_where_it_is_measured_and_changes_something():
    words = "; with any one persona left out it lies between 0.200 and 0.400, highest without x"
    one = {"low": 0.2, "high": 0.4, "persona": "x"}
    shown = arm(0, "rlvr")[0] | {"pss_without_one": one} | dict.fromkeys(
        ("pss_deconvolved", "pss_deconvolved_low", "pss_deconvolved_high"), 0.3)
    assert report.lottery_text(shown).endswith(words)
    for other in ({"pss_deconvolved": None}, {"pss_without_one": one | {"low": 0.4}}, {"pss_without_one": None}):
        assert "left out" not in report.lottery_text(shown | other)


def test_the_comparison_shows_each_hypothesis_with_its_verdict(several):
    page, comparison = (several / "report.html").read_text(), json.loads((several / "comparison.json").read_text())
    assert [h["name"] for h in comparison["hypotheses"]] == ["H1", "H2", "H3", "H4", "H5"]
    tested = [h for h in comparison["hypotheses"] if h["verdict"] != "not tested"]
    assert len(tested) > 4 and all(f"{h['claim']}</td><td>{h['verdict']}</td>" in page for h in tested)
    assert all(h["claim"] in page for h in comparison["hypotheses"])
    assert all(f"{label} as " in page for label in ("start", "rlvr", "permix"))  # transcripts side by side


def test_without_fidelity_stability_is_plotted_against_accuracy_and_the_lead_gives_each_arms_stability(seeds):
    arms, comparison = seeds
    plain = {label: {k: v for k, v in results.items() if k != "fidelity"} for label, results in arms.items()}
    assert plots.measured(arms) and not plots.measured(plain)
    assert plots.tradeoff(plain, comparison["runs"]).axes[0].get_ylabel() == "mean accuracy, share of problems"
    lead = report.finding(arms, comparison)
    assert all(f"{label} {100 * results['persona_sd']:.1f}" in lead for label, results in arms.items())


def test_each_plot_is_in_the_page_and_beside_it_as_png(single, several):
    wanted = {single: ["accuracy_per_persona", "the_persona_lottery", "learning_curves"],
              several: ["accuracy_per_persona", "the_persona_lottery", "stability_against_fidelity"]}
    for folder, names in wanted.items():
        assert sorted(f.stem for f in folder.glob("*.png")) == sorted(names)
        shown = re.findall(r'src="data:image/png;base64,([^"]+)"', (folder / "report.html").read_text())
        written = [(folder / f"{name}.png").read_bytes() for name in names]
        assert sorted(map(base64.b64decode, shown)) == sorted(written)
        assert all(image[:8] == b"\x89PNG\r\n\x1a\n" for image in written)


def test_bars_and_points_stand_at_the_numbers_given():
    results, _ = arm(0, "rlvr")
    fig = plots.bars(results)
    widths = [bar.get_width() for bar in fig.axes[0].patches]
    assert widths == sorted(row["accuracy"] for row in results["personas"])
    points = plots.tradeoff({"rlvr": results}).axes[0].containers[0].lines[0].get_xydata()
    assert points.tolist() == [[100 * results["persona_sd"], results["fidelity"]["persona_identification"]]]
    fig = plots.tradeoff({"rlvr": results | {"persona_sd": None}})  # an evaluation of two problems
    assert fig.axes[0].containers[0].lines[0].get_xdata() == [results["pss"]]


def test_each_training_seed_is_a_small_point_around_its_arms_mean_and_the_legend_names_each_arm_once(seeds):
    arms, comparison = seeds
    fig = plots.tradeoff(arms, comparison["runs"])
    clouds = [cloud for cloud in fig.axes[0].collections if isinstance(cloud, PathCollection)]
    for cloud, (role, runs) in zip(clouds, comparison["runs"].items(), strict=True):
        points = np.array([[100 * run["persona_sd"], run["persona_identification"]] for run in runs])
        assert cloud.get_offsets().tolist() == (points.tolist() if len(runs) > 1 else [])
        variance = np.mean(points[:, 0] * abs(points[:, 0]))  # an arm's spread is a mean of variances
        assert variance == pytest.approx(1e4 * arms[role]["persona_sd"] * abs(arms[role]["persona_sd"]))
        assert points[:, 1].mean() == pytest.approx(arms[role]["persona_identification"])
    assert [entry.get_text() for entry in fig.legends[0].get_texts()] == list(arms)
    markers = {box.lines[0].get_marker() for box in fig.axes[0].containers}
    assert len(markers) == 3  # told apart without colour too


def test_no_label_of_a_plot_is_cut_off_at_its_edge(seeds):
    arms, comparison = seeds
    rows = [{"step": i, "reward": i / 9, "entropy": 1.0, "completion_length": 30} for i in range(9)]
    for fig in (plots.bars(arms["start"]), plots.dots(arms), plots.lottery(arms),
                plots.tradeoff(arms, comparison["runs"]),
                plots.tradeoff({role: {k: v for k, v in results.items() if k != "fidelity"}
                                for role, results in arms.items()}),
                plots.curves(dict.fromkeys(arms, rows))):
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
        edge = fig.bbox.padded(0.5)
        ticks = {label for ax in fig.axes for label in ax.get_xticklabels() + ax.get_yticklabels()}
        labels = [text for text in fig.findobj(Text) if text.get_text() and text not in ticks]
        assert labels
        for text in labels:
            box = text.get_window_extent()
            assert edge.x0 <= box.x0 and box.x1 <= edge.x1, text.get_text()
            assert edge.y0 <= box.y0 and box.y1 <= edge.y1, text.get_text()


def test_arms_with_the_same_numbers_are_all_seen_each_marker_inside_the_one_before(seeds):
    start = seeds[0]["start"]
    twins = {"start": start, "twin": start, "third": start}
    traded = [box.lines[0] for box in plots.tradeoff(twins).axes[0].containers]
    for markers in (traded, plots.dots(twins).axes[0].lines):
        assert len(markers) == 3 and {marker.get_markerfacecolor() for marker in markers} == {"none"}
        sizes = [marker.get_markersize() for marker in markers]
        assert all(inner <= 0.75 * outer for outer, inner in itertools.pairwise(sizes))
    widths = [line.get_linewidth() for line in plots.lottery(twins).axes[0].lines if line.get_linestyle() == "-"]
    assert len(set(widths)) == 3 and widths == sorted(widths, reverse=True)


def test_twenty_arms_are_told_apart_by_colour_or_marker(seeds):
    arms = {str(i): seeds[0]["start"] for i in range(20)}
    shown = [box.lines[0] for box in plots.tradeoff(arms).axes[0].containers]
    assert len({(point.get_marker(), to_hex(point.get_color())) for point in shown}) == 20


def test_the_lottery_explains_the_dotted_line_only_where_there_is_one():
    results, _ = arm(0, "rlvr")
    assert "dotted" in plots.lottery({"rlvr": results}).axes[0].get_xlabel()
    assert "dotted" not in plots.lottery({"rlvr": results | {"noise_floor": {}}}).axes[0].get_xlabel()


def test_a_score_is_named_in_words_with_its_unit_and_its_field_stands_below(seeds):
    names = [row[0].split("\n") for row in report.score_rows(seeds[0])]
    assert all("_" not in words for words, _ in names)
    below = {field.split(":")[0]: words for words, field in names}
    assert below["persona_sd"].endswith(", points") and below["no_persona_accuracy"] == "accuracy without a persona"


def test_a_reward_of_ones_own_has_its_mean_in_the_table_and_no_row_without_one():
    plain, _ = arm(0, "rlvr")
    rows = report.score_rows({"a": plain, "b": plain | {"mean_reward": 0.25}})
    assert ["reward, mean over personas\nmean_reward", "–", "0.250"] in rows
    assert "mean_reward" not in str(report.score_rows({"a": plain}))


def test_two_arms_have_their_difference_beside_them_and_more_a_table_of_pairs(seeds, several):
    arms, comparison = seeds
    two = {role: arms[role] for role in ("start", "permix")}
    head, *rows = report.score_rows(two, {"permix - start": comparison["differences"]["permix - start"]})
    assert head[1:] == ["start", "permix", "permix - start"] and {len(row) for row in rows} == {4}
    assert rows[0][3] == report.difference_cell(comparison["differences"]["permix - start"], "mean_accuracy")
    assert report.score_rows(arms, comparison["differences"])[0][1:] == list(arms)
    assert "<h2>Paired differences</h2>" in (several / "report.html").read_text()


def test_claims_untested_for_one_reason_share_a_row_and_the_lead_does_not_list_them():
    missing = ("not tested", "no arm rlvr given")
    unmeasured = ("not tested", "no self_identification was measured")
    told = {"H1": missing, "H2": ("shown", "1 -> 2"), "H3": missing, "H4": unmeasured}
    rows = [{"name": name, "claim": f"claim {name}", "verdict": verdict, "words": words}
            for name, (verdict, words) in told.items()]
    assert report.claim_rows({"hypotheses": rows})[1:] == [
        ["H2 claim H2", "shown", "1 → 2"], ["H1 claim H1\nH3 claim H3", *missing],
        ["H4 claim H4", *unmeasured]]
    arms = {role: arm(seed, role)[0] for seed, role in enumerate(("start", "permix"))}
    lead = report.finding(arms, {"hypotheses": rows})
    assert "Shown here: claim H2." in lead and "H1" not in lead and "nothing" not in lead


def test_paired_differences_carry_an_arrow_only_where_the_interval_leaves_out_zero():
    d = {"difference": 0.1, "low": -0.1, "high": 0.3}
    got = report.difference_rows({"differences": {"b - a": {"pss": d, "mean_accuracy": d | {"low": 0.05}},
                                                  "c - a": {"persona_sd": d | {"low": -0.3, "high": -0.1}}}})
    assert got == [["difference", "persona_sd, points", "pss", "mean accuracy"],
                   ["b - a", "–", "+0.100 [-0.100,\u00a0+0.300]", "▲ +0.100 [+0.050,\u00a0+0.300]"],
                   ["c - a", "▼ +10.0 [-30.0,\u00a0-10.0]", "–", "–"]]


def test_a_judge_that_failed_its_controls_is_called_unusable_beside_its_scores_and_costs():
    results, _ = arm(0, "rlvr")
    gym = {"judge": "j", "usable": False, "calls": 18, "tokens_in": 900, "tokens_out": 72, "cost": 0.5, "unparsed": 2,
           "persona_score": 3.5, "persona_score_low": 3, "persona_score_high": 4, "tasks": {"Linguistic Habits": 2.25}}
    results["fidelity"]["personagym"] = gym
    rows = {name.split("\n")[0]: cell for name, cell in report.score_rows({"rlvr": results})}
    assert "NOT USABLE" in rows["judge"] and "18 calls" in rows["judge"] and "cost 0.50" in rows["judge"]
    assert rows["Linguistic Habits"] == "2.25" and rows["playing a persona, 1 to 5"].startswith("3.500 [3.000")
    gym["usable"] = True
    assert "NOT USABLE" not in str(report.score_rows({"rlvr": results}))


def test_the_transcripts_shown_are_the_greedy_answers_not_the_samples_for_pass_at_k():
    results, rows = arm(0, "rlvr")
    drawn = [row | {"temperature": 0.7, "answer": "drawn"} for row in rows]
    shown = report.panels({"rlvr": results}, [rows + drawn])
    assert shown == report.panels({"rlvr": results}, [rows]) and "drawn" not in str(shown)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desktop"])
def test_chromium_opens_the_report_without_an_error_and_nothing_runs_over_the_edge(single, width, tmp_path):
    page = (single / "report.html").read_text()
    probe = ("<script>document.title = innerWidth + ' ' + document.documentElement.scrollWidth</script></body>")
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe))  # the page has no script of its own
    got = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--dump-dom", f"file://{tmp_path / 'probe.html'}"],
        capture_output=True, text=True, timeout=60)
    inner, wide = map(int, re.search(r"<title>(\d+) (\d+)</title>", got.stdout).groups())
    assert wide <= inner and "CONSOLE" not in got.stderr and "ERR_" not in got.stderr
