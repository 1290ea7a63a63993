"""The words against the code: links, files and commands that the documents name."""

import importlib
import inspect
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import evaluate
import personas
import rewards
import rollout
import tasks
import train
from common import files
from docs import anchors
from evaluation import compare, report
from results import transcripts
from training import settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / name / "README.md" for name in (".", "kernels", "benchmarks")), ROOT / "CONTRIBUTING.md",
         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*.md"))]


PITFALLS = (ROOT / "docs" / "pitfalls.md").read_text()
TEST_LINK = re.compile(r'\[test\]\(\.\./tests/(\w+)\.py#L\d+ "(\w+)"\)')


def test_every_pitfall_links_a_test_that_exists():
    assert re.findall(r"^\*\*P(\d+) ", PITFALLS, re.M) == [str(i) for i in range(1, 43)]
    links = TEST_LINK.findall(PITFALLS)
    assert len(links) >= 42
    for file, name in links:
        assert re.search(rf"^def {name}\(", (ROOT / f"tests/{file}.py").read_text(), re.M), f"{file}: no {name}"


def is_quick(file: str, name: str) -> bool:
    """Whether `python -m pytest` runs a test here: it is not slow, and not left to a GPU or to another pytest."""
    module = importlib.import_module(f"tests.{file}")
    of_all = getattr(module, "pytestmark", [])
    marks = [*(of_all if isinstance(of_all, list) else [of_all]), *getattr(getattr(module, name), "pytestmark", [])]
    return not any(mark.name == "slow" or mark.name == "skipif" and mark.args[0] for mark in marks)


def test_every_pitfall_has_a_test_in_the_quick_suite():
    assert is_quick("test_docs", "test_every_pitfall_has_a_test_in_the_quick_suite")
    assert not is_quick("test_train", "test_p21_a_rank_with_nothing_to_train_on_hangs_nobody")
    pitfalls = re.split(r"^\*\*(?=P\d)", PITFALLS, flags=re.M)[1:]
    assert not [text.split(".")[0] for text in pitfalls if not any(is_quick(*link) for link in TEST_LINK.findall(text))]


def test_links_to_code_stand_at_the_line_where_the_name_is_defined():
    """`python docs/anchors.py` sets them."""
    for page in anchors.PAGES:
        assert anchors.anchored(page) == page.read_text(), f"{page.name}: run python docs/anchors.py"
    assert len(anchors.LINK.findall(PITFALLS)) == len(TEST_LINK.findall(PITFALLS)) >= 42


def test_every_relative_link_resolves():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#: ]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_that_the_readme_lists_exists():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", row)]
    assert {path.name for path in ROOT.glob("*.py")} <= set(named) and len(named) >= 16
    assert all((ROOT / name).exists() for name in named)


def test_every_flag_of_the_readmes_commands_exists():
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    sources["train.py"] += (ROOT / "training" / "settings.py").read_text()
    sources["evaluate.py"] += (ROOT / "evaluation" / "command.py").read_text()
    sources["rollout.py"] += (ROOT / "sampling" / "command.py").read_text()
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/running.md"))
    commands = re.findall(r"^(?:python|torchrun .*?) ?(\w+\.py)(.*?)(?:#|$)", pages, re.M)
    assert len(commands) > 8
    for script, flags in commands:
        for flag in re.findall(r"--([a-z-]+)", flags):
            assert f'"--{flag}"' in sources[script] or f'("{flag}"' in sources[script], f"{script} --{flag}"


def test_every_training_command_of_the_pages_is_one_that_train_py_takes():
    """Read as the shell and train.py would, and not refused. docs/modify.md's flags come with its diffs."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "modify.md")
    commands = {flags for flags in re.findall(r"(?:python|\d) train\.py((?: --[^`\n]*)?)", text)
                if not any(word in flags for word in ("$", "--resume", "--help"))}
    assert len(commands) > 8
    for flags in commands:
        settings.settings(shlex.split(flags, comments=True))


def test_the_results_that_the_pages_show_are_those_that_were_measured():
    measured = (ROOT / "results" / "main" / "tables.md").read_text().splitlines()
    arms = [line for line in measured if re.match(r"\| [a-z+]+ \| \d", line)]
    assert len(arms) == 6
    assert set(arms) <= set((ROOT / "results/arithmetic.md").read_text().splitlines())
    for name in ("early", "ablations", "pushed", "anchors", "sanity"):
        measured += (ROOT / "results" / name / "tables.md").read_text().splitlines()
    shown = [line for page in ("arithmetic.md", "sanity/README.md")
             for line in (ROOT / "results" / page).read_text().splitlines()
             if line.startswith("|") and not re.match(r"\| (learning rate|\de-\d)", line)]  # see test_results.py
    assert len(shown) > 20 and set(shown) <= set(measured)


def test_each_number_of_the_results_page_is_one_of_the_results():
    """Intervals as the tables have them; what the start models of the later experiments have, as measured."""
    page = (ROOT / "results" / "README.md").read_text()
    measured = "".join((ROOT / "results" / name / "tables.md").read_text() for name in ("main", "pushed", "products"))
    measured += (ROOT / "results/products/readers.txt").read_text()
    measured += (ROOT / "results/interpolated/README.md").read_text()                   # held below
    facts = json.loads((ROOT / "results/facts/start/results.json").read_text())
    measured += "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * facts[f"persona_sd{end}"] for end in ("", "_low", "_high")))
    intervals = re.findall(r"[-+]?\d+\.\d+\s+\[[-+]?\d+\.\d+,\s+[-+]?\d+\.\d+\]", page)
    assert len(intervals) >= 40
    assert not [one for one in intervals if " ".join(one.split()) not in " ".join(measured.split())]


def test_the_verdicts_of_the_results_page_are_those_of_the_comparisons():
    """Each with the interval of the score that decides, H3's at each checkpoint, and what could have been shown."""
    page = (ROOT / "results" / "README.md").read_text()
    tables = {"products/compared/step-24": r"^\| (H\d): .* \| .* \| (.*) \| (.*) \| (.*) \|$",
              "main/compared": r"^\| (H\d) \| (.*) \| (.*)()() \|$"}
    for folder, pattern in tables.items():
        rows = re.findall(pattern, page, re.M)
        told = json.loads((ROOT / "results" / folder / "comparison.json").read_text())
        assert len(rows) == 5
        for (name, apart, verdict, could, *_), claim in zip(rows, told["hypotheses"], strict=True):
            assert name == claim["name"] and verdict.startswith(claim["verdict"])
            assert re.search(r"difference (\S+ \[.*?\])", claim["words"])[1] in apart
            if "products" in folder and claim["verdict"] == "not shown":
                assert could.lstrip("+") in claim["words"]
    for step in (6, 12):
        told = json.loads((ROOT / f"results/products/compared/step-{step}/comparison.json").read_text())
        h3 = told["hypotheses"][2]
        apart = re.search(r"difference (\S+ \[.*?\])", h3["words"])[1]
        assert h3["verdict"] == "not shown" and apart in re.search("H3: .*", page)[0]
    told = json.loads((ROOT / "results/main/compared/comparison.json").read_text())
    shuffled = [told["arms"][arm]["pss_shuffled"] for arm in ("start", "rlvr")]
    assert "from {:.2f} to {:.2f}".format(*shuffled) in " ".join(page.split())


def test_the_page_of_interpolated_weights_shows_what_was_measured():
    results, folder = ROOT / "results", ROOT / "results/interpolated"
    kept = {"start": "products/start", "permix": "products/permix-seed*/step-24",
            **{f"permix {share}": f"interpolated/permix-{share}-seed*" for share in ("0.25", "0.5", "0.75")},
            "permix+anchor": "products/permix+anchor-seed*/step-24", "rlvr": "products/rlvr-seed*/step-24",
            "rlvr 0.5": "interpolated/rlvr-0.5-seed*"}
    arms = {arm: [compare.read_arm(path.parent)[1] for path in sorted(results.glob(f"{where}/results.json"))]
            for arm, where in kept.items()}
    comparison = compare.side_by_side(arms)
    page = (folder / "README.md").read_text()
    names = {"persona_sd": "persona_sd, points", "mean_accuracy": "mean accuracy", "no_persona_accuracy": "no persona",
             "self_identification": "own reading", "persona_identification": "drift"}
    assert len(re.findall("^" + re.escape(f"| arm | seeds | {' | '.join(names.values())} |"), page, re.M)) == 1
    for arm, scores in comparison["arms"].items():
        row = " | ".join([str(len(arms[arm])), *(report.score_cell(scores, name) for name in names)])
        assert f"| {arm} | {row} |".replace("\u00a0", " ") in page
    shown = re.findall(r"^\| (\S+(?: 0.5)? - \S+(?: 0.5)?) \| (.*) \|$", page, re.M)
    assert len(shown) == 3
    for pair, row in shown:
        cells = [report.difference_cell(comparison["differences"][pair], name) for name in names]
        assert " | ".join(re.sub("[▲▼] ", "", cell) for cell in cells).replace("\u00a0", " ") == row
    told = (folder / "readers.txt").read_text() + (results / "products/readers.txt").read_text()
    ends = re.search("N-grams find.*", " ".join(page.split()))[0]
    assert all(one in told for one in re.findall(r"0\.\d+ \[.*?\]", ends))


def test_what_the_pages_say_of_answers_and_their_lengths_is_so():
    page, folder = " ".join((ROOT / "results" / "README.md").read_text().split()), ROOT / "results" / "products"
    kept = {"start": [folder / "start"]} | {arm: [folder / f"{arm}-seed{seed}/step-24" for seed in range(6)]
                                            for arm in ("rlvr", "permix", "permix+anchor")}
    rows = {arm: [row for one in folders for row in transcripts.read(one)] for arm, folders in kept.items()}
    spoken = {arm: [row for row in own if row["kind"] == "roleplay"] for arm, own in rows.items()}
    full = {arm: [row["self_identification"] for row in own if row["tokens"] == 48] for arm, own in spoken.items()}
    shares = [f"{100 * len(full[arm]) / len(spoken[arm]):.0f} %" for arm in kept]
    told = "{} of the start model's fill them, {} of RLVR's, {} of PerMix's, {} with the anchor"
    assert told.format(*shares) in page
    own = {arm: sum(hits) / len(hits) for arm, hits in full.items()}
    apart = own["permix"] - own["start"], own["permix+anchor"] - own["permix"]
    assert "PerMix {:+.3f} against the start model, and the anchor {:+.3f} over PerMix".format(*apart) in page
    asked = [row for row in rows["start"] if row["kind"] == "products" and row["persona"] != "none"]
    wrong = [row for row in asked if not row["correct"]]
    numbers = [[set(re.findall(r"\d+", row[key])) for key in ("answer", "question")] for row in wrong]
    share = f"{100 * sum(answer <= question for answer, question in numbers) / len(wrong):.0f} % of the start model's"
    assert share in page and share in " ".join((ROOT / "README.md").read_text().split())


def test_each_number_that_the_readme_found_is_one_of_the_results():
    found = re.search("## What we found\n(.*?)One small model", (ROOT / "README.md").read_text(), re.S)[1]
    numbers = set(re.findall(r"[-+]?\d+\.\d+", found))
    tables = "".join((ROOT / "results" / name / "tables.md").read_text() for name in ("main", "pushed", "products"))
    tables += (ROOT / "results/products/readers.txt").read_text()
    tables += (ROOT / "results/interpolated/README.md").read_text()                        # held above
    shares = {f"{float(x):.2f}" for x in re.findall(r"\b0\.\d{3}\b", tables)}
    assert len(numbers) > 12 and not [x for x in numbers if x not in shares and x not in tables]
    page = (ROOT / "README.md").read_text()
    share = r"(0\.\d\d)"
    pattern = rf"from {share} to between {share}\s+and {share}: nine seeds.*? older\s.*?{share} to\s+{share}"
    told = re.search(pattern, page, re.S).groups()
    few = [persona.name for persona in personas.few(personas.load("test"), 9)]      # whom train.py asks

    def accuracy(run, names):
        return sum(run["correct"][name].count("1") for name in names) / len(names) / len(run["items"])

    start = json.loads((ROOT / "results/job/start/results.json").read_text())
    ends = [f"{accuracy(start, few):.2f}"]
    for name, problems, names in (("job", 100, few), ("main", 50, list(start["correct"])[1:])):
        runs = [json.loads(path.read_text()) for path in (ROOT / "results" / name).glob("permix-seed*/results.json")]
        assert len(runs) == 9 and {len(run["items"]) for run in runs} == {problems}
        values = sorted(accuracy(run, names) for run in runs)
        ends += [f"{values[0]:.2f}", f"{values[-1]:.2f}"]
    assert list(told) == ends


def test_the_gym_page_shows_what_was_measured():
    def interval(results, name, digits, times=1):
        low, high = results[f"{name}_low"] * times, results[f"{name}_high"] * times
        return f"{results[name] * times:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low < high else "")

    folder = ROOT / "results" / "gym"
    page = (folder / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.M)
    assert len(rows) == 3
    for task, row in rows:
        before, after = (json.loads((folder / f"{task}-{when}" / "results.json").read_text())
                         for when in ("before", "after"))
        cells = row.split(" | ")
        assert cells[0] == str(len(before["items"])) == str(len(after["items"]))
        assert cells[1:3] == [interval(results, "mean_accuracy", 3) for results in (before, after)]
        assert cells[3].startswith(f"{after['mean_accuracy'] - before['mean_accuracy']:+.3f} ")
        assert cells[4] == " -> ".join(f"{results['no_persona_accuracy'] + 1e-9:.2f}" for results in (before, after))
        assert cells[5] == " -> ".join(interval(results, "persona_sd", 1, 100) for results in (before, after))
    rlvr = json.loads((folder / "products-rlvr" / "results.json").read_text())
    assert (rlvr["mean_accuracy"], rlvr["persona_sd"]) == (1, 0)
    assert [line["extracted"] for line in transcripts.read(folder / "letter_counting-after")] == ["1"] * 400
    start, permix = (json.loads((folder / f"products-{arm}" / "results.json").read_text())
                     for arm in ("start", "permix"))
    words = " ".join(page.split())
    assert f"`persona_sd` is {100 * start['persona_sd']:.1f} points" in words and permix["persona_sd"] == 0
    for name, digits in (("pss", 2), ("mean_accuracy", 3), ("no_persona_accuracy", 2)):
        assert f"from {start[name]:.{digits}f} to {permix[name]:.{digits}f}" in words


def test_the_base_models_page_shows_what_was_measured():
    folder = ROOT / "results" / "base"
    start, trained = (json.loads((folder / arm / "results.json").read_text()) for arm in ("start", "rlvr"))
    [found] = json.loads((folder / "compared" / "comparison.json").read_text())["differences"].values()
    page = (folder / "README.md").read_text()
    for label, name, digits, times in (("mean accuracy", "mean_accuracy", 3, 1),
                                       ("without a persona", "no_persona_accuracy", 3, 1),
                                       ("`persona_sd`, points", "persona_sd", 1, 100)):
        cells = [f"{times * results[name]:.{digits}f} [{times * results[f'{name}_low']:.{digits}f}, "
                 f"{times * results[f'{name}_high']:.{digits}f}]" for results in (start, trained)]
        one = {key: times * found[name][key] for key in ("difference", "low", "high")}
        cells.append("{difference:+.N} [{low:+.N}, {high:+.N}]".replace("N", f"{digits}f").format(**one))
        assert f"| {label} | {' | '.join(cells)} |" in page


def test_the_answers_that_the_readme_shows_are_those_that_were_given():
    page = (ROOT / "README.md").read_text()
    shown = re.findall(r"^\| (start|RLVR|PerMix|PerMix with anchor) \| (.*) \|$", page, re.M)
    arms = {"start": "start", "RLVR": "rlvr-seed2/step-24", "PerMix": "permix-seed2/step-24",
            "PerMix with anchor": "permix+anchor-seed2/step-24"}
    assert [arm for arm, _ in shown] == list(arms)
    for arm, words in shown:
        [answer] = [row["answer"] for row in transcripts.read(ROOT / "results" / "products" / arms[arm])
                    if row["question"] == "How was your day?" and row["persona"] == "buccaneer"]
        assert " ".join(answer.split()).startswith(words)


def test_every_symbol_that_the_pages_name_exists():
    """`module.name` and `Class.method` in backticks, where the module is a file or the class stands in one."""
    folders = (".", "common", "evaluation", "generators", "kernels", "sampling", "training", "verifier", "weights")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    sources = {path.stem: path.read_text() for path in files}
    classes = {name: text for text in sources.values() for name in re.findall(r"^class (\w+)", text, re.M)}
    keys, held = "formats.md", "symbols.md"             # keys are no symbols; held by tests/test_symbols.py
    pages = [page for page in PAGES if page.name not in (keys, held)]
    named = {match for page in pages for match in re.findall(r"`(\w+)\.(\w+)(?:\(\w*\))?`", page.read_text())}
    known = [(owner, name) for owner, name in named if owner in sources | classes and name not in ("py", "cpp", "html")]
    assert len(known) > 8
    for owner, name in known:
        text = (sources | classes)[owner]
        defined = rf"^ *(?:def|class) {name}\b|^ *(?:self\.)?{name}\b.*="
        assert re.search(defined, text, re.M), f"{owner}.{name}"


# ----------------------------------------------------------------------------------------------------------------------
# docs/formats.md

FORMATS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "formats.md").read_text(), re.M | re.S))


def keys_of(value, at: str = "") -> set[str]:
    """The keys of a JSON value as the page writes them: a, a.b, a[].b."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(keys_of(row, f"{at}[]") for row in value))
    if not isinstance(value, dict):
        return {at}
    return set().union(*(keys_of(inner, f"{at}.{key}" if at else key) for key, inner in value.items()))


def rewarded(problem, text: str, *, persona=None) -> float:
    return float(len(text))


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """{heading of the page: the keys there are}: of a run, of an evaluation with all there is, of what is read."""
    top, model = tmp_path_factory.mktemp("formats"), str(tiny_folder)
    reward, short = ["--reward", "tests.test_docs:rewarded"], ["--dtype", "float32", "--max-new-tokens", "3"]
    few = ["--steps", "1", "--prompts", "2", "--group-size", "2", "--eval-problems", "2", "--eval-personas", "3"]
    assert train.main(["--model", model, "--out", str(top / "run"), *reward, *short, *few]) == 0
    sheets = [{"persona": who, "questions": {"Toxicity": ["w3"], "Expected Action": ["w4"]}} for who in ("w5", "w6")]
    (top / "gym.jsonl").write_text("".join(json.dumps(sheet) + "\n" for sheet in sheets))
    whole = ["--samples", "2", "--noise-floor", "--fidelity", "1", "--personagym", str(top / "gym.jsonl")]
    assert evaluate.main(["--model", str(top / "run/model"), "--out", str(top / "all"), "--limit", "3", *whole,
                          "--judge-model", model, *reward, *short]) == 0
    (top / "asked.jsonl").write_text('{"prompt": "w5"}\n{"messages": [{"role": "user", "content": "w6"}]}\n')
    asked = ["--prompts", str(top / "asked.jsonl"), "--out", str(top / "said")]
    assert rollout.main(["--model", model, *asked, *short]) == 0
    done = keys_of(next(files.rows(top / "said"))) | {"error"}     # which only broken weights have
    (top / "pairs.jsonl").write_text('{"gold": "1", "answer": "1", "question": "?"}')
    with rewards.Verifier() as verifier:
        pairs = list(rewards.judged_rows(str(top / "pairs.jsonl"), verifier))
    results = [json.loads((top / folder / "results.json").read_text()) for folder in ("run/evaluation/after", "all")]
    assert results[0]["trained"]["personas"] == "train"
    read = inspect.getsource(tasks.from_row) + inspect.getsource(tasks.from_rows)
    return {"Problems": set(re.findall(r'row\.get\("(\w+)"', read)),
            "Personas": {field.name for field in fields(personas.Persona)} | set(sheets[0]),
            "Completions": done | {"prompt", "messages"}, "Rewards": keys_of(pairs[0]),
            "results.json": keys_of(results[0]) | keys_of(results[1])} | {
        path.name: set().union(*map(keys_of, files.rows(path)))
        for path in (top / "run/metrics.jsonl", top / "run/samples.jsonl", top / "all/transcripts.jsonl")}


@pytest.mark.parametrize("name", FORMATS)
def test_the_page_of_formats_has_every_key_that_there_is_and_no_other(name, made):
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \| .+ \|$", FORMATS[name], re.M)
    patterns = {key: re.escape(key).replace(r"\*", "[^.]+") + "(_low|_high)?" * ("±" in unit) for key, unit in rows}
    assert len(rows) == len(patterns) == FORMATS[name].count("\n| `")
    assert not {key for key in made[name] if not any(re.fullmatch(p, key) for p in patterns.values())}
    assert not {key for key, p in patterns.items() if not any(re.fullmatch(p, found) for found in made[name])}


def test_the_page_of_formats_has_every_file_that_is_made(made):
    assert FORMATS.keys() == made.keys()
