"""The verifier: right on a labelled corpus (P23), safe (P24), not fooled by format (P25); and rewards."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
import tasks
from rewards import Rewarder, Verifier, load_reward, verify
from verifier.extract import extract
from verifier.parse import parse
from verifier.text import NotMath, TooBig
from verifier.verdict import gold_kind
from verifier.workers import Worker

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"the shared data sets are not at {DATA}")
CORPUS = [json.loads(line) for line in (ROOT / "tests/verifier_corpus.jsonl").read_text(encoding="utf-8").splitlines()]
PROSE = [json.loads(line) for line in (ROOT / "tests/verifier_prose.jsonl").read_text(encoding="utf-8").splitlines()]


def lines(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def verdict(gold, answer):
    return verify(gold, answer).verdict


# -- P23: right --------------------------------------------------------------------------------------------------------


def test_p23_the_corpus_has_no_false_positive_and_99_percent_are_right():
    wrong = [(row, verify(row["gold"], row["answer"])) for row in CORPUS
             if (verdict(row["gold"], row["answer"]) == "correct") != row["correct"]]  # fmt: skip
    assert not [row for row in wrong if not row[0]["correct"]], "false positives"
    assert len(wrong) <= 0.01 * len(CORPUS), wrong


def test_p23_a_point_where_a_side_is_undefined_decides_nothing():
    assert verdict(r"\frac{1}{x+|x|}", r"\frac{2}{2x+2|x|}") == "correct"
    assert verdict(r"\frac{1}{x-x}", r"\frac{2}{x-x}") == "unverifiable"


def test_p23_the_corpus_is_large_and_every_class_has_both_labels():
    assert len(CORPUS) >= 500
    labels = {(row["class"], row["correct"]) for row in CORPUS}
    assert {(name, label) for name, _ in labels for label in (True, False)} == labels


def golds_and_solutions():
    """Golds with a worked solution that ends in `#### gold`: GSM8K's where they are, else in its form."""
    if DATA.exists():
        solutions = [row["answer"] for row in lines("gsm8k_train.jsonl")]
    else:
        solutions = [f"It is 3 + 4 at first.\nSo it is {problem.answer} in all.\n#### {problem.answer}"
                     for problem in tasks.load("arithmetic", "train", limit=500)]
    return [(solution.split("####")[1].strip(), solution) for solution in solutions]


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_p23_every_gold_is_right_against_itself_and_its_own_solution(every):
    for gold, solution in golds_and_solutions()[::every]:
        assert verdict(gold, gold) == verdict(gold, solution) == verdict(solution, gold) == "correct", solution


def test_p23_every_gold_is_right_in_a_box_and_in_a_sentence():
    golds = {row["gold"] for row in CORPUS if "####" not in row["gold"]}
    golds |= {row["answer"] for row in lines("math500_half.jsonl")} if DATA.exists() else set()
    assert len(golds) > 400
    for gold in golds:
        for answer in (gold, rf"We find $x$, so \boxed{{{gold}}}.", f"The answer is ${gold}$."):
            assert verdict(gold, answer) == "correct", (gold, answer, verify(gold, answer))


def test_p23_a_gold_of_another_kind_is_right_only_where_unit_percent_or_name_is_all_that_differs():
    golds = {row["class"]: row["gold"] for row in reversed(CORPUS)}.values()    # the first of each
    same = {frozenset((a, b)) for a in golds for b in golds if a != b and verdict(a, rf"\boxed{{{b}}}") != "wrong"}
    assert len(golds) > 35 and same == {frozenset(("0.5", r"50\%")), frozenset((r"5 \text{ cm}", "x=5"))}


@needs_data
def test_p23_another_problems_gold_is_right_only_where_unit_is_all_that_differs():
    golds = sorted({row["answer"] for row in lines("math500_half.jsonl")})
    pairs = [(a, b) for i, a in enumerate(golds) for b in golds[i % 7 :: 7] if a != b]
    same = {frozenset(pair) for pair in pairs if verdict(pair[0], rf"\boxed{{{pair[1]}}}") != "wrong"}
    assert same <= {frozenset(pair) for pair in (("36", r"\$36"), ("36", r"36^\circ"), ("15", r"15\mbox{ cm}^2"))}


def test_p23_a_percent_accepts_fraction_and_number_but_a_fraction_not_the_number():
    assert verdict(r"50\%", "0.5") == verdict(r"50\%", "50") == verdict("0.5", r"50\%") == "correct"
    assert verdict("0.5", "50") == verdict(r"50\%", r"0.5\%") == verdict("0.5", r"0.5\%") == "wrong"


def test_p23_interval_ends_and_base_subscripts_count():
    assert verdict("[2, 5)", "2 \\le x < 5") == verdict("101_2", "101_{2}") == "correct"
    assert verdict("[2, 5)", "(2, 5]") == verdict("[2, 5)", "[2, 5]") == verdict("101_2", "101") == "wrong"
    assert verdict("101_2", "101_3") == verdict("11_2", "3_4") == "wrong"      # the second: equal, in another base


def test_p23_a_rounded_or_almost_equal_value_is_wrong():
    assert verdict(r"\frac13", "0.3333") == verdict(r"\pi", "3.14159") == "wrong"
    assert verdict(r"\sqrt2", r"\sqrt2+10^{-90}") == verdict("2^{1000}", "2^{1000}+1") == "wrong"


def test_p23_points_of_both_signs_tell_x_from_its_absolute_value():
    assert verdict("|x|", r"\sqrt{x^2}") == "correct"
    assert verdict("x", r"\sqrt{x^2}") == verdict(r"\sqrt2 x", r"\sqrt{2x^2}") == "wrong"


def test_p25_hedging_between_choices_earns_nothing():
    assert verdict(r"\text{(A)}", "(A)") == "correct"
    assert verdict(r"\text{(A)}", "(A) or (B)") == verdict(r"\text{(A)}", r"\boxed{A, B}") == "wrong"


def test_a_verdict_does_not_depend_on_when_it_is_asked():
    pair = (r"\frac{x+1}{x-1}", r"\boxed{1+\frac{2}{x-1}}")
    assert {verify(*pair) for _ in range(20)} == {verify(*pair)}


# -- P39: prose, and P33: copies; pairs of tests/verifier_prose.jsonl -----------------------------------------------


@pytest.mark.parametrize("kind", sorted({row["class"] for row in PROSE}))
def test_p39_every_kind_of_prose_answer_is_judged_as_a_strict_reader_would(kind):
    """Each kind has right answers, and wrong twins that a lenient reading would pay for."""
    rows = [row for row in PROSE if row["class"] == kind]
    verdicts = [verify(row["gold"], row["answer"], row.get("question", "")) for row in rows]
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if (v.verdict == "correct") != row["correct"]]
    assert len(rows) >= 10 and not wrong


def test_p39_a_sign_a_scale_and_a_fraction_in_words_change_the_number():
    """Every word of the table, in a sentence: the number with it is right, and without it wrong."""
    for words, value in [("minus 6", "-6"), ("negative 6", "-6"), ("6 hundred", "600"), ("6 thousand", "6000"),
                         ("6 million", "6000000"), ("6 billion", "6000000000"), ("6 dozen", "72"),
                         ("6 trillion", "6000000000000"), ("6 and a half", "6.5"), ("6 and a quarter", "6.25"),
                         ("6 and three quarters", "6.75"), ("6 and a third", "19/3"), ("6 tenths", "0.6")]:
        for form in ("{}", "That makes {}.", "The answer is {}.", "So it is {} metres.", "#### {}", "\\boxed{{{}}}"):
            text = form.format(words)
            assert verdict(value, text) == "correct", text
            assert verdict("6", text) == "wrong", text


SUM = "What is 12 - 9, and what is $5!$? A train with 4 cars leaves at 9."


@pytest.mark.parametrize("answer", ["12 - 9", "It is $12-9$", "A train with 4 cars leaves at 9.", SUM])
def test_p33_verifier_rewarder_and_correctness_see_the_question(answer):
    problem = SimpleNamespace(id="p", question=SUM, answer="9" if "cars" in answer else "3")
    with Verifier(workers=1) as verifier, Rewarder() as rewarder:
        assert verifier.submit(problem.answer, answer, SUM).result().verdict == "wrong"
        assert rewarder.submit(problem, answer).result() == (0.0, "wrong")
    assert rewards.correctness(problem, answer) == 0.0
    assert rewards.correctness(problem, f"{answer} So it is {problem.answer}.") == 1.0


def test_p33_a_worker_sees_the_question_too():
    hard = r"\ln(-x^2)+0", r"\boxed{\ln(-x\cdot x)}"
    with Verifier(workers=1, timeout_s=20.0) as verifier:
        assert verifier.verify(*hard).verdict == "correct"
        assert verifier.verify(*hard, r"Simplify $\ln(-x \cdot x)$.").verdict == "wrong"


def test_p33_copying_a_built_in_problem_earns_nothing_and_its_gold_does():
    for task in ("arithmetic", "facts"):
        for problem in tasks.load(task, "test", limit=150):
            copies = (problem.question, f"Question: {problem.question}", problem.question.split(". ")[-1])
            assert [verify(problem.answer, text, problem.question).verdict for text in copies] == ["wrong"] * 3
            for text in (problem.answer, f"{problem.question} The answer is {problem.answer}."):
                assert verify(problem.answer, text, problem.question).verdict == "correct"


@pytest.mark.parametrize(("gold", "kind"), [
    ("5", "number"), ("-1,200", "number"), (r"\frac{3}{4}", "number"), ("2 million", "number"), ("50\\%", "number"),
    ("The answer is 5.", "number"), ("#### 5", "number"), ("(D) 12", "number"), ("3 cm", "number"),
    ("2\\sqrt3", "expression"), ("x=5", "expression"), ("(1, 2)", "expression"), ("1, 2", "expression"),
    ("yes", "text"), ("odd", "text"), ("①③", "text"), ("B", "text"), ("10:15 AM", "text"),
    (r"n \equiv 1 \pmod{3}", "text"), ("no solution", "text"),
    ("", "unreadable"), (r"\frac{1}{2", "unreadable"), ("(" * 500, "unreadable"), ("1+" * 900 + "1", "unreadable")])
def test_a_gold_is_a_number_an_expression_a_text_or_unreadable(gold, kind):
    assert gold_kind(gold)[0] == kind
    assert bool(gold_kind(gold)[1]) == (kind == "unreadable")


def test_the_golds_of_a_file_are_counted_and_an_unreadable_one_is_a_warning_with_its_line(tmp_path, capsys):
    path = tmp_path / "golds.jsonl"
    golds = ["5", "yes", r"\frac{1}{2", "7", r"2\sqrt{3}"]
    path.write_text("\n".join(json.dumps({"question": f"is it {gold}", "answer": gold}) for gold in golds))
    problems = tasks.load(str(path), "all")
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {path}, line 3: the gold '\\\\frac{{1}}{{2' can't be read")
    counts = tasks.counts("a.jsonl", problems)
    assert counts == "a.jsonl: 5 problems, golds: 2 number, 1 text, 1 unreadable, 1 expression"


# -- P24: safe ---------------------------------------------------------------------------------------------------------

TOUCH = "open('{0}/pwned','w')"
HOSTILE = [
    r"\boxed{5^{(5^{(5^{(5^5)})}-4)}}", r"\boxed{9^{9^{9^9}}}", r"\boxed{10^{10^{10}}}", r"\boxed{10^{-10^{10}}}",
    r"\boxed{99999!}", r"\boxed{(10^9)!}", r"\boxed{((3!)!)!}", r"\boxed{(((3!)!)!)!}",
    r"\boxed{\binom{10^9}{5\cdot10^8}}",
    r"\boxed{\binom{2000}{1000}^{2000}}", r"\boxed{\sqrt[1000000]{2}}", r"\boxed{\sqrt[10^9]{2^{10^9}}}",
    r"\boxed{\sin(10^{290})}", r"\boxed{\tan(10^{10^5})}", r"\boxed{(x+1)^{10000}}", r"\boxed{x^{x^{x^{x^x}}}}",
    r"\boxed{e^{e^{e^{e^e}}}}", r"\boxed{\log_{1}5}", r"\boxed{\frac{1}{0}}", r"\boxed{0^{-1}}", r"\boxed{\ln(0)}",
    r"\boxed{1e9999}", r"\boxed{1e-9999}", r"\boxed{1e99999999}", r"\boxed{1_{99}}",
    r"\boxed{\gcd(10^{9000},6^{9000})}",
    r"\boxed{(x+y+z)^{1000}-(x+y+z)^{999}}", r"\boxed{\ln(-x^2)^{\ln(-y^2)}}",
    "\\boxed{" + "9^{" * 50 + "9" + "}" * 51, "\\boxed{" + "(" * 10**4 + "1" + ")" * 10**4 + "}",
    "\\boxed{" + "{" * 10**4 + "1" + "}" * 10**4 + "}", "(" * 10**4, "\\boxed{" * 10**4, "\\boxed{" * 5000 + "}" * 5000,
    "\\frac{1}{" * 5000 + "2" + "}" * 5000, "\\boxed{" + "-" * 1900 + "1}", "\\boxed{" + "\\sqrt " * 300 + "2}",
    "\\boxed{" + "\\sin " * 390 + "2}", "\\boxed{" + "1+" * 290 + "1}", "\\boxed{" + "x^" * 290 + "1}",
    "\\boxed{" + "|" * 900 + "}", "\\boxed{" + "2!" * 290 + "}", "\\boxed{5" + "!" * 500 + "}",
    "\\boxed{" + "\\pm1" * 50 + "}",
    "\\boxed{" + "9" * 1500 + "}", "\\boxed{" + "9" * 5000 + "}", "\\boxed{0." + "3" * 1500 + "}",
    "\\boxed{" + ",".join(f"\\sqrt{{{i}}}" for i in range(2, 70)) + "}",
    "\\boxed{" + "+".join(f"\\sqrt{{{i}}}" for i in range(2, 110)) + "}",
    "\\boxed{" + "+".join(f"\\frac{{1}}{{{i}^{{99}}}}" for i in range(2, 90)) + "}",
    "\\boxed{" + "\\cup".join(f"({i},{i + 1})" for i in range(90)) + "}", "\\begin{pmatrix}" * 500,
    "7" * 10**6, "a" * 10**6, "1," * 500_000, "wait " * 200_000, "answer is " * 100_000, "$" * 10**6, "\\(" * 500_000,
    "####\n" * 200_000, "1 or " * 250_000, "\\" * 10**5, "{" * 10**5, "\\left" * 10**4, "_" * 10**4,
    "\\begin{cases}" * 150 + "x=1", "<answer>" * 2500, "1 and " * 5000, "\\boxed{1} and " * 1500, "①" * 20000,
    "one hundred and " * 1200, "答案是" * 6000, "$\\boxed 1 + " * 1500, "minus **" * 2500, "half of 5 " * 2000,
    f"__import__('os').system(\"{TOUCH}\")", f"\\boxed{{{TOUCH}}}", f"exec(\"{TOUCH}\")",
    "\\boxed{[x for x in range(10**9)]}",
    "\\boxed{().__class__.__bases__[0].__subclasses__()}", "\\boxed{lambda: 1}", "\x00\x01\x02\x1b[31m9\x1b[0m",
    "\\boxed{\ud800}", "\udfff", "\u202e9", "\\boxed{\x00}", "\n" * 10**5,
]  # fmt: skip


def test_p24_hostile_answers_get_verdicts_within_512_mb_and_the_next_answer_is_right(tmp_path):
    """In a process of its own under a memory limit, which a hang, a crash or a memory hog would end."""
    rows = [{"gold": gold, "answer": text.replace("{0}", str(tmp_path))}
            for text in HOSTILE for gold in ("7", r"\sqrt2+\sqrt3", "x^2+1")]  # fmt: skip
    rows = [row for hostile in rows for row in (hostile, {"gold": "7", "answer": r"\boxed{7}"})]
    (tmp_path / "in").mkdir()
    pairs = tmp_path / "in/pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    limited = f"ulimit -v {512 * 1024}; exec '{sys.executable}' '{ROOT}/rewards.py' --jsonl '{pairs}'"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    verdicts = [json.loads(line)["verdict"] for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(HOSTILE) >= 60 and len(verdicts) == len(rows)
    assert "correct" not in verdicts[::2] and set(verdicts[1::2]) == {"correct"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"], "an answer created a file"


def test_p24_a_late_worker_is_killed_and_replaced_and_only_its_own_pair_suffers():
    worker = Worker(memory_mb=512)
    try:
        assert worker.ask("1", "1", timeout_s=10.0).verdict == "correct"
        pid = worker.process.pid
        late = worker.ask(r"\ln(-x^2)", r"\ln(-x^4)-\ln(x^2)", timeout_s=0.001)
        assert late.verdict == "unverifiable" and "no verdict within" in late.rule
        assert worker.process.pid != pid
        assert worker.ask("1/2", "0.5", timeout_s=10.0).verdict == "correct"
    finally:
        worker.stop()


def test_p24_a_worker_that_dies_by_itself_costs_no_pair_its_verdict():
    worker = Worker(memory_mb=512)
    try:
        assert worker.ask("1", "1", timeout_s=10.0).verdict == "correct"
        os.kill(worker.process.pid, signal.SIGKILL)
        assert worker.ask("1/2", "0.5", timeout_s=10.0).verdict == "correct"
    finally:
        worker.stop()


def test_p24_workers_decide_what_is_too_long_or_undecidable_for_the_trainers_process():
    roots = [rf"\sqrt{{{n}}}" for n in range(2, 58)]
    long_list = ",".join(roots), rf"\boxed{{{','.join(reversed(roots))}}}"
    never_real = r"\ln(-x^2)+0", r"\boxed{\ln(-x\cdot x)}"
    assert verdict(*long_list) == verdict(*never_real) == "unverifiable"
    with Verifier(workers=1, timeout_s=20.0) as verifier:
        futures = [verifier.submit(*long_list), verifier.submit(*never_real)]
        assert [f.result(60).verdict for f in futures] == ["correct", "correct"]


def test_p24_no_future_is_left_waiting_where_no_worker_can_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with Verifier(workers=1) as verifier:
        hard, easy = verifier.submit(r"\ln(-x^2)+0", r"\boxed{\ln(-x\cdot x)}"), verifier.submit("1/2", "0.5")
        assert hard.result(30).verdict == "unverifiable" and "no worker" in hard.result().rule
        assert easy.result(30).verdict == "correct"


@pytest.mark.parametrize("limit", [float("inf"), 1e12])
def test_a_reward_without_a_time_limit_is_waited_for(limit):
    with Rewarder("tests.test_train:flat_reward", limit) as rewarder:
        assert rewarder.submit(None, "text").result(timeout=20).value == 1.0


def test_p24_a_trainer_without_a_main_guard_and_its_threads_can_verify(tmp_path):
    """Workers must not import the trainer again (spawn would), nor need its main thread (an alarm would)."""
    script = tmp_path / "trainer.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import threading\nfrom rewards import Verifier\nprint('imported')\n"
        "verifier, found = Verifier(workers=1, timeout_s=20), []\n"
        "def ask(n): found.append(verifier.verify(r'\\ln(-x^2)+%d' % n, r'\\boxed{\\ln(-x\\cdot x)+%d}' % n).verdict)\n"
        "threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\nverifier.close()\nprint(*found)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert Counter(done.stdout.split()) == {"imported": 1, "correct": 3}, done.stderr


def test_p24_workers_end_with_their_parent(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from verifier.workers import Worker; w = Worker(512); " \
             "w.ask('1', '1', timeout_s=9.0); print(w.process.pid, flush=True); import os; os._exit(0)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if state.startswith("Z"):  # ended, and nobody in this container collects orphans
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


FRAGMENTS = st.sampled_from([*"0123456789xyei()[]{}|,;:+-*/^_!%$=<>&. \n", r"\frac", r"\sqrt", r"\boxed{", r"\text{",
                             r"\pm", r"\{", r"\}", r"\cup", r"\infty", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\",
                             r"\sin", r"\log_", r"^\circ", r"\pi", "½", "√", "−", "²", "####", "the answer is ", " cm",
                             r"\le", r"\binom", r"\overline", " or ", "10^", r"\cdot", "wait"])  # fmt: skip

FORMULAS = st.lists(FRAGMENTS, max_size=25).map("".join)


@settings(max_examples=600, deadline=None)
@given(st.text(max_size=60) | FORMULAS, FORMULAS)
def test_p24_any_text_gives_a_verdict_and_never_an_exception(gold, answer):
    for text in (answer, rf"\boxed{{{answer}}}", f"The answer is {answer}."):
        assert verdict(gold, text) in ("correct", "wrong", "unverifiable")


@settings(max_examples=300, deadline=None)
@given(FORMULAS)
def test_p24_the_parser_refuses_with_its_own_errors_only(text):
    try:
        assert isinstance(parse(text), tuple)
    except (NotMath, TooBig):
        pass


# -- P25: not fooled by format -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "It is {}.", "\\boxed{{{}}}", "x = {}", "So there are {} apples.", "({})"])
@pytest.mark.parametrize("exercise, gold", [("12 - 9", "3"), ("8 + 3", "11"), ("6 * 8", "48"), ("6 \\times 8", "48"),
                                            ("48 / 8", "6"), ("\\frac{48}{8}", "6"), ("8 * 7 + 4", "60"),
                                            ("9 + 4 - 2", "11"), ("1/2 + 1/4", "3/4")])
def test_p25_copying_the_exercise_earns_nothing(form, exercise, gold):
    """Equal in value, and what a policy writes that is paid for copying; worked out, it counts."""
    assert verify(gold, form.format(exercise)).verdict == "wrong"
    assert verify(gold, f"{exercise} = {gold}").verdict == "correct"
    assert verify(gold, f"{exercise} = {gold}1").verdict == "wrong"


INTERVAL = "What is the interval of x with 0 < x <= 1?"


@pytest.mark.parametrize("gold, answer, question, expected", [
    ("(0, 1]", INTERVAL, INTERVAL, "wrong"), ("(0, 1]", "0 < x <= 1", INTERVAL, "wrong"),
    ("(0, 1]", "The interval of x with 0 < x <= 1 is the interval of", INTERVAL, "wrong"),
    ("(0, 1]", r"0 < x \le 1", INTERVAL.replace("0 < x <= 1", r"$0 < x \le 1$"), "wrong"),
    (r"(-\infty, 3)", "x < 3", "Write x < 3 in interval notation.", "wrong"),
    ("(0, 1]", "(0, 1]", INTERVAL, "correct"), ("x < 3", "x < 3", "Solve 2x < 6.", "correct"),
    (r"(-\infty, 3]", "x <= 3", "Solve 2x ≤ 6.", "correct"),
    ("(-1, 2)", "-1 < x < 2", "Solve |2x - 1| < 3.", "correct"),
    ("3", "3", "How many integers n satisfy 2 <= n <= 4?", "correct"),
    ("x < 3", "x < 3", "Is x < 3 or x > 3 the solution of 2x < 6?", "correct"),
    ("4", "sqrt(16)", "What is <math>sqrt(16)</math>?", "wrong"), ("1024", "2^10", "<p>2^10</p>", "wrong"),
    ("120", "5!", "<question>5!</question>", "wrong"), ("120", "5!", "Evaluate -> 5!", "wrong"),
    ("7", "|-7|", "Find <|-7|>", "wrong"), ("4", "sqrt(16)", ">>> sqrt(16)", "wrong"),
    ("1/2", "0.5", "Convert 0.5 -> fraction", "wrong"), ("120", "120", "Evaluate -> 5!", "correct")])
def test_p33_an_inequality_copied_from_the_question_earns_nothing(gold, answer, question, expected):
    assert verify(gold, answer, question).verdict == expected


@pytest.mark.parametrize(("answer", "expected"), [
    (r"\boxed{6} then \boxed{7}", "correct"), (r"\boxed{7} then \boxed{6}", "wrong"),
    (r"\boxed{7", "wrong"), (r"7, so \boxed{}", "wrong"), (r"\boxed{7} \boxed{}", "wrong"),
    (r"\boxed{7} or \boxed{8", "correct"),
    (r"\boxed{5, 6, 7}", "wrong"), (r"\boxed{6 \text{ or } 7}", "wrong"), ("The answer is 6 or 7.", "wrong"),
    (r"\boxed{answer}", "wrong"), (r"Write it as \boxed{your answer}. It is 7.", "wrong"), (r"\fbox{7}", "correct"),
    ("It is not 7.", "wrong"), ("The answer is 7. Wait, the answer is 6.", "wrong"), ("#### 7\n#### 6", "wrong"),
])  # fmt: skip
def test_p25_the_form_of_an_answer_earns_nothing(answer, expected):
    assert verdict("7", answer) == expected


@pytest.mark.parametrize(("answer", "expected"), [
    (r"\boxed{{{} 7}}", "wrong"), (r"\boxed{{{} 7", "wrong"), (r"\boxed{{{} 6}} so \boxed{{7}}", "correct"),
    (r"\boxed{{6}} {} so it is 7", "correct"),
])  # fmt: skip
def test_p25_the_rest_of_a_box_that_is_too_long_is_no_answer(answer, expected):
    assert verify("7", answer.format("+ 0" * 10_000)).verdict == expected
    assert verify("7", answer.format("+ 0" * 10_000), "What is 3 + 4?").verdict == expected


@pytest.mark.parametrize(("text", "expected"), [
    (r"\boxed{\frac{1}{\sqrt{2}}}", (r"\frac{1}{\sqrt{2}}", "box")), (r"\boxed{\boxed{3}}", ("3", "box")),
    (r"\boxed{\{1, 2\}}", (r"\{1, 2\}", "box")), ("so\n#### 1,234", ("1,234", "####")),
    ("The answer is 3/4, which is less than 1.", ("3/4", "statement")),
    ("Arr, that be 42 doubloons!", ("42", "last number")),
    ("x = -3", ("x = -3", "whole")), (r"\boxed{1", ("", "unclosed box")), ("No idea", ("No idea", "whole text")),
])  # fmt: skip
def test_p25_the_verdict_names_the_rule_that_found_the_answer(text, expected):
    assert extract(text) == expected
    assert verify("1", text).rule.startswith(expected[1])


def test_p25_an_answer_that_cannot_be_checked_is_told_apart_from_a_wrong_one():
    with Verifier(workers=1) as verifier:
        answers = (r"\boxed{7}", r"\boxed{8}", r"\boxed{5^{5^{5^{5^5}}}}")
        assert [verifier.verify("7", text).verdict for text in answers] == ["correct", "wrong", "unverifiable"]


# -- rewards and doors -------------------------------------------------------------------------------------------------


def test_correctness_is_1_or_0_whatever_the_form():
    problem = SimpleNamespace(question="3+4", answer="7")
    for answer, correct in [("7", 1.0), ("8", 0.0), (r"\boxed{5^{5^{5^{5^5}}}}", 0.0),
                            (r"\boxed{7}", 1.0), (r"\boxed{8}\boxed{7}", 1.0), (r"\boxed{}", 0.0)]:
        assert rewards.correctness(problem, answer) == correct
        assert rewards.correctness(problem, answer, persona="anybody") == correct


SEVEN = SimpleNamespace(id="p1", question="What is 3 + 4?", answer="7")
PIRATE = SimpleNamespace(name="pirate", text="You are a pirate.")
STUCK = threading.Event()                               # set when a test ends, to free its threads
CALLS = []


def said(problem, text, *, persona=None):
    """Keeps what it is given, and in which thread."""
    CALLS.append((problem.id, text, persona and persona.name, threading.get_ident()))
    return len(text)


def moody(problem, text, *, persona=None):
    if text == "stuck":
        STUCK.wait(30)
    if text == "slow":
        time.sleep(0.05)
    if text == "raise":
        raise KeyError("x")
    if text == "exit":
        sys.exit(3)
    return {"nan": float("nan"), "none": None, "minus": -0.5, "words": "0.5"}.get(text, 0.5)


def old_style(problem, text):
    return 1.0


def greedy(problem, text, persona, model):
    return 1.0


not_a_function = 3


@pytest.fixture
def free():
    """Frees the threads that a test has left behind."""
    CALLS.clear()
    STUCK.clear()
    yield
    STUCK.set()


def test_the_default_reward_is_the_verifier_s_verdict():
    with Rewarder() as rewarder:
        futures = [rewarder.submit(SEVEN, text) for text in ("7", "8", r"\boxed{5^{5^{5^{5^5}}}}")]
    assert [tuple(f.result()) for f in futures] == [(1, "correct"), (0, "wrong"), (0, "unverifiable")]


def test_a_user_s_reward_sees_problem_text_and_persona_in_order_and_in_one_thread(free):
    with Rewarder("tests.test_rewards:said") as rewarder:
        futures = [rewarder.submit(SEVEN, "x" * n, PIRATE if n % 2 else None) for n in range(5)]
        assert [f.result(10) for f in futures] == [(n, "correct" if n else "wrong") for n in range(5)]
    threads = {call[3] for call in CALLS}
    assert [call[:3] for call in CALLS] == [("p1", "x" * n, "pirate" if n % 2 else None) for n in range(5)]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_a_late_reward_is_worth_0_and_the_next_is_right(free):
    with Rewarder("tests.test_rewards:moody", time_limit_s=0.3) as rewarder:
        futures = [rewarder.submit(SEVEN, text) for text in ("fine", "stuck", "fine", "stuck", "minus")]
        got = [tuple(f.result(10)) for f in futures]
    right, late = (0.5, "correct"), (0, "unverifiable")
    assert got == [right, late, right, late, (-0.5, "wrong")]


def test_the_time_limit_counts_from_the_start_of_a_call_not_from_its_submission(free):
    with Rewarder("tests.test_rewards:moody", time_limit_s=1.0) as rewarder:
        futures = [rewarder.submit(SEVEN, "slow") for _ in range(30)]       # 1.5 seconds in all
        assert {f.result(10) for f in futures} == {(0.5, "correct")}


def test_submit_and_close_do_not_wait_for_a_reward(free):
    start = time.perf_counter()
    with Rewarder("tests.test_rewards:moody", time_limit_s=20.0) as rewarder:
        first, second = (rewarder.submit(SEVEN, text) for text in ("stuck", "fine"))
    assert time.perf_counter() - start < 2 and not first.done()
    STUCK.set()
    assert first.result(10) == second.result(10) == (0.5, "correct")


def test_after_an_error_in_the_block_no_further_reward_is_computed(free):
    with pytest.raises(ZeroDivisionError), Rewarder("tests.test_rewards:moody") as rewarder:
        first, second = (rewarder.submit(SEVEN, text) for text in ("stuck", "fine"))
        raise ZeroDivisionError
    for future in (first, second):                      # nor is one waited for that hangs
        with pytest.raises(RuntimeError, match="closed"):
            future.result(10)


def test_after_an_error_in_the_block_the_hard_pairs_that_wait_for_the_verifier_are_dropped():
    hard, start = SimpleNamespace(answer=r"\ln(-x^2)", question=""), time.perf_counter()
    with pytest.raises(ZeroDivisionError), Rewarder() as rewarder:
        futures = [rewarder.submit(hard, r"\ln(-x^4)-\ln(x^2)") for _ in range(40)]
        raise ZeroDivisionError
    assert {future.result(0).verdict for future in futures} == {"unverifiable"}
    assert time.perf_counter() - start < 30             # all of them take a minute


@pytest.mark.parametrize("spec", ["rewards:correctness", "tests.test_rewards:moody"])
def test_a_closed_rewarder_takes_no_more_calls(spec):
    rewarder = Rewarder(spec)
    rewarder.close()
    with pytest.raises(RuntimeError, match="closed"):
        rewarder.submit(SEVEN, "7")


@pytest.mark.parametrize(("text", "says"), [("raise", "KeyError: missing 'x'"), ("exit", "SystemExit: 3"),
                                            ("none", "TypeError"), ("nan", "gave nan"),
                                            ("words", "it gave the text '0.5', not a number")])
def test_a_reward_that_fails_or_is_not_finite_is_one_line_with_its_name_and_the_problem(text, says):
    with Rewarder("tests.test_rewards:moody") as rewarder:
        future, after = rewarder.submit(SEVEN, text), rewarder.submit(SEVEN, "fine")
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            future.result(10)
        assert after.result(10) == (0.5, "correct")
    message = str(error.value)
    assert "tests.test_rewards:moody" in message and "problem p1" in message and "\n" not in message


@pytest.mark.parametrize(("spec", "says"), [
    ("rewards", "module:function"), (":f", "module:function"), ("rewards:", "module:function"),
    ("no_such_module:f", "cannot import"), ("rewards:no_such", "no function"),
    ("tests.test_rewards:not_a_function", "no function"),
    ("tests.test_rewards:old_style", "write it as def old_style(problem, text, *, persona=None)"),
    ("tests.test_rewards:greedy", "write it as def greedy(problem, text, *, persona=None)"),
])
def test_a_reward_that_cannot_be_called_is_one_line_that_says_what_to_write(spec, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        Rewarder(spec)
    assert "\n" not in str(error.value) and spec in str(error.value)


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_time_limit_that_is_no_time_is_refused(limit):
    with pytest.raises(ValueError, match="above 0 seconds"):
        Rewarder(time_limit_s=limit)


@pytest.mark.parametrize("source", ["def short(problem, text\n", "import sys\nsys.exit(0)\n"])
def test_a_module_that_cannot_be_run_is_one_line_too(tmp_path, monkeypatch, source):
    monkeypatch.delitem(sys.modules, "torn_reward", raising=False)
    (tmp_path / "torn_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="cannot import module 'torn_reward'") as error:
        load_reward("torn_reward:short")
    assert "\n" not in str(error.value)


def test_the_process_ends_while_a_reward_is_stuck(tmp_path):
    (tmp_path / "stuck.py").write_text("import time\ndef never(problem, text, *, persona=None):\n    time.sleep(99)\n")
    script = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n" \
             "from rewards import Rewarder\nfrom tasks import Problem\n" \
             "with Rewarder('stuck:never', time_limit_s=0.1) as rewarder:\n" \
             "    print(rewarder.submit(Problem('q', '1', '1', 'k'), '1').result())\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "unverifiable" in done.stdout, done.stderr


def test_the_command_line_prints_one_word_for_a_pair(script):
    assert script("rewards.py", "--gold", "1/2", "--answer", r"\boxed{0.5}").stdout == "correct\n"
    assert script("rewards.py", "--gold", "7", "--answer", r"\boxed{5^{5^{5^{5^5}}}}").stdout == "unverifiable\n"


def test_the_command_line_adds_verdict_and_milliseconds_to_each_line_in_order(script, tmp_path):
    rows = [{"gold": str(n), "answer": str(n % 3), "id": n} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    done = script("rewards.py", "--jsonl", tmp_path / "pairs.jsonl")
    out = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{k: r[k] for k in ("gold", "answer", "id")} for r in out] == rows
    assert [r["verdict"] for r in out] == ["correct"] * 3 + ["wrong"] * 3
    assert all(r["ms"] >= 0 for r in out)


@pytest.mark.parametrize("args", [["--gold", "1"], ["--unknown"], ["--jsonl", "/no/such/file"], ["--jsonl", "BAD"],
                                  ["--jsonl", ""], ["--question", "What?"], ["--jsonl", "BAD", "--question", "What?"]])
def test_a_users_mistake_is_one_line_and_exit_2(script, args, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"gold": 1}\n')
    done = script("rewards.py", *[str(tmp_path / "bad.jsonl") if a == "BAD" else a for a in args])
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if not line.startswith(("usage:", "  "))]) == 1, done.stderr


def test_without_flags_the_verifier_shows_a_short_tour(script):
    done = script("rewards.py")
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"correct", "wrong", "unverifiable"}


@pytest.mark.parametrize("text, verdict", [
    (" 4\n24/4", "wrong"), ("2 1/2", "correct"), ("2\t1/2", "correct"), ("It is 2 1/2.", "correct")])
def test_p39_a_number_above_a_fraction_is_judged_and_a_mixed_number_is_one(text, verdict):
    assert verify("5/2", text, "What is 24 / 4?").verdict == verdict
