"""evaluation/judge.py against an OpenAI-compatible server on loopback: the embedded model, and failures on request."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from evaluation import judge

ROOT = Path(__file__).resolve().parents[1]
GYM = ROOT.parent / "shared/data/personagym_half.jsonl"
ANSWERS = {"a pirate": "Arr, me hearty, hoist the sails!", "a chemist": "First I would titrate the sample."}
ROWS = [{"persona": persona, "task": task, "question": "What do you do at dawn?", "answer": answer}
        for persona, answer in ANSWERS.items() for task in judge.TASKS]
FEW = [row for row in ROWS if row["task"] in ("Linguistic Habits", "Toxicity Control")]  # for the slow judge
CALLS = 10 + 8  # 2 personas x 5 tasks, and 2 x 4 planted controls


class Server:
    """`reply(text)` behind /v1/chat/completions; faults: one a request, in order; `good` counts replies by prompt."""

    def __init__(self, reply, faults=(), hold_after=None):
        self.reply, self.faults, self.hold_after = reply, list(faults), hold_after
        self.good, self.requests, self.lock, self.release = {}, 0, threading.Lock(), threading.Event()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return self

    def __exit__(self, *exc):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, http):
        text = json.loads(http.rfile.read(int(http.headers["Content-Length"])))["messages"][0]["content"]
        with self.lock:
            self.requests += 1
            fault = self.faults.pop(0) if self.faults else "none"
            held = self.hold_after is not None and sum(self.good.values()) >= self.hold_after
            if fault == "none" and not held:
                self.good[text] = self.good.get(text, 0) + 1
        if held or fault == "slow":
            self.release.wait(30 if held else 2)
            return
        if fault == "drop":
            return http.connection.close()
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "served", "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.reply(text)}}],
            "usage": {"prompt_tokens": len(text), "completion_tokens": 4, "total_tokens": len(text) + 4}})
        body = {"malformed": body[:40], "fields": '{"choices": []}'}.get(fault, body).encode()
        http.send_response(int(fault) if fault.isdigit() else 200)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(body)))
        http.end_headers()
        http.wfile.write(body)


@pytest.fixture(scope="module", autouse=True)
def loopback():
    """conftest.py forbids the hub; the server on this machine is allowed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_HUB_OFFLINE", "0")
        yield


@pytest.fixture(scope="module")
def model_replies(tmp_path_factory):
    """(judgement by the embedded model in this process, its reply to every prompt: what the server serves)."""
    import weights

    ask, known = judge.local(*weights.load("smollm2-135m")), {}

    def recording(prompts):
        for index, text, tokens_in, tokens_out in ask(prompts):
            known[prompts[index]] = text
            yield index, text, tokens_in, tokens_out

    rows = [dict(row) for row in FEW]
    got = judge.grade(rows, recording, "m", tmp_path_factory.mktemp("local"))
    return got, [row["score"] for row in rows], known


@pytest.fixture(scope="module")
def served(model_replies):
    return model_replies[2].__getitem__


@pytest.fixture(scope="module")
def undisturbed(served, tmp_path_factory):
    with Server(served) as server:
        rows = [dict(row) for row in FEW]
        got = judge.grade(rows, judge.endpoint(server.url, "m"), "m", tmp_path_factory.mktemp("calm"))
        assert set(server.good.values()) == {1}
    return got, [row["score"] for row in rows]


def test_a_judge_in_this_process_and_the_same_judge_behind_a_server_agree(model_replies, undisturbed):
    local, scores, _ = model_replies
    differs = {"tokens_in", "tokens_out"}  # the server's bill is in characters
    assert scores == undisturbed[1] and local["tokens_in"] > local["tokens_out"] > 0
    assert {k: v for k, v in local.items() if k not in differs} == {
        k: v for k, v in undisturbed[0].items() if k not in differs}


def test_faults_are_retried_and_change_nothing(undisturbed, served, tmp_path):
    faults = "429 500 drop none malformed slow fields none 503 drop 429 none malformed".split()
    with Server(served, faults) as server:
        rows = [dict(row) for row in FEW]
        got = judge.grade(rows, judge.endpoint(server.url, "m", backoff=0.01, timeout=1.0), "m", tmp_path)
    assert (got, [row["score"] for row in rows]) == undisturbed
    assert set(server.good.values()) == {1} and server.requests == got["calls"] + sum(f != "none" for f in faults)


CHILD = "import sys, json; sys.path.insert(0, sys.argv[1]); from evaluation import judge; " \
        "judge.grade(json.loads(sys.argv[4]), judge.endpoint(sys.argv[2], 'm'), 'm', sys.argv[3])"


def test_an_evaluation_killed_half_way_goes_on_without_judging_anything_twice(undisturbed, served, tmp_path):
    with Server(served, hold_after=3) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(ROOT), server.url, str(tmp_path), json.dumps(FEW)])
        cache, patience = tmp_path / "judge.jsonl", time.time() + 60
        while not cache.exists() or cache.read_text().count('"key"') < 3:
            assert time.time() < patience and child.poll() is None
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        with cache.open("a") as file:
            file.write('\n{"key": "torn')  # as a kill in the middle of a write would leave it
        server.hold_after = None
        server.release.set()
        rows = [dict(row) for row in FEW]
        got = judge.grade(rows, judge.endpoint(server.url, "m"), "m", tmp_path)
    assert (got, [row["score"] for row in rows]) == undisturbed
    assert set(server.good.values()) == {1}


def reader(text):
    """A judge that can read: 5 where the answer's words belong to the character named, else 1."""
    persona = text.split("Character: ")[1].split("\n")[0]
    return f"Score: {5 if ANSWERS[persona] in text else 1}"


@pytest.mark.parametrize("reply, usable", [(reader, True), (lambda text: "Score: 4", False)],
                         ids=["a judge that reads", "a judge that likes everything"])
def test_planted_controls_tell_a_usable_judge_from_a_useless_one(reply, usable, tmp_path):
    with Server(reply) as server:
        got = judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m"), "m", tmp_path, price=(1.0, 2.0))
    assert got["usable"] is usable and got["planted_gap"] == (4 if usable else 0)
    assert got["persona_score"] == (5 if usable else 4) and set(got["tasks"]) == set(judge.TASKS)
    assert got["calls"] == CALLS == server.requests and got["unparsed"] == 0
    assert got["cost"] == pytest.approx((got["tokens_in"] + 2 * got["tokens_out"]) / 1e6)


def test_a_reply_without_a_score_is_asked_for_once_more_then_counted_as_one_and_reported(tmp_path):
    def reply(text):
        if "Character: a pirate" in text:
            return "I cannot grade this."
        return "Score: 5" if text.endswith("alone.") else "hm"

    with Server(reply) as server:
        rows = [dict(row) for row in ROWS]
        got = judge.grade(rows, judge.endpoint(server.url, "m"), "m", tmp_path)
    assert got["asked_twice"] == CALLS and got["unparsed"] == 9 and got["calls"] == 2 * CALLS == server.requests
    assert [row["score"] for row in rows] == [1] * 5 + [5] * 5


def test_a_refused_key_ends_the_evaluation_at_once_with_one_plain_error(tmp_path):
    with Server(reader, ["401"] * 99) as server, pytest.raises(OSError, match="judge at http"):
        judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m", concurrency=1), "m", tmp_path)
    assert server.requests <= 3


@pytest.mark.parametrize("reply, score", [
    ("Score: 4", 4), ("score = 2.", 2), ("**Score:** 5", 5), ("3", 3), ("4/5", 4),
    ("Score: 2\nOn reflection, score: 3", 3), ("The score is 1", 1), ("Score: 45", None), ("Score: 3.5", None),
    ("Score: 0", None), ("", None), ("12", None),
    ("I like 4 of them", None)])
def test_a_score_is_read_or_not_from_a_reply(reply, score):
    assert judge.parse(reply) == score


def test_personagym_is_read_in_both_of_its_forms(tmp_path):
    sheet = {"Expected Action": ["q1", "q2"], "Toxicity": ["q3"]}
    (tmp_path / "a baker.json").write_text(json.dumps(sheet))
    (tmp_path / "all.jsonl").write_text(json.dumps({"persona": "a baker", "questions": sheet}) + "\n")
    want = [("a baker", "Expected Action", "q1"), ("a baker", "Toxicity Control", "q3")]
    for path in (tmp_path, tmp_path / "all.jsonl"):
        assert [(r["persona"], r["task"], r["question"]) for r in judge.questions(path)] == want
    less = json.dumps({"persona": "x", "questions": {"Toxicity": ["q"]}}) + "\n" + json.dumps(
        {"persona": "y", "questions": sheet})
    for bad, said in ((json.dumps({"persona": "x", "questions": {"Chess": ["q"]}}), "Chess"), ('{"name": "x"}', "1:"),
                      ("[1]", "1:"), (less, "'x' has no question of Expected Action")):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=said):
            judge.questions(tmp_path / "bad.jsonl")


@pytest.mark.skipif(not GYM.exists(), reason="shared/data is absent")
def test_all_of_personagyms_half_is_read():
    assert len(judge.questions(GYM)) == 100 * 5


def test_controls_are_other_personas_answers_and_never_the_right_ones():
    planted = judge.plant(ROWS, seed=3)
    assert len(planted) == 8 and all(row["answer"] != ANSWERS[row["persona"]] for row in planted)
    assert judge.plant(ROWS[:5], seed=0) == []  # one persona has nobody to trade with


@pytest.mark.skipif(not GYM.exists(), reason="shared/data is absent")
def test_ctrl_c_half_way_is_one_line_and_the_same_command_goes_on_through_faults_judging_nothing_twice(
        tiny_folder, tmp_path, capsys, monkeypatch):
    import evaluate

    run = tmp_path / "run"
    shutil.copytree(tiny_folder, run / "model")
    (run / "config.json").write_text(json.dumps({"settings": {
        "method": "permix", "anchor_coef": 0.5, "seed": 3, "model": str(tiny_folder), "max_new_tokens": 4}}))
    (run / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
    (tmp_path / "gym.jsonl").write_text("".join(GYM.read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "sums.jsonl").write_text("".join(
        json.dumps({"question": f"w{i} w{i + 1}?", "answer": f"w{i}", "split": "test"}) + "\n" for i in range(4)))
    (tmp_path / "who.jsonl").write_text("".join(
        json.dumps({"name": f"w{i}", "text": f"w{i} w{3 * i}.", "stratum": "x"}) + "\n" for i in (7, 9, 11)))
    command = ["--model", str(run / "model"), "--task", str(tmp_path / "sums.jsonl"), "--dtype", "float32",
               "--personas", str(tmp_path / "who.jsonl"), "--prompt", "few-shot", "--samples", "2", "--fidelity", "2",
               "--personagym", str(tmp_path / "gym.jsonl"), "--judge-model", "m", "--judge-price", "1", "2"]

    def results(server, out):
        assert evaluate.main([*command, "--judge", server.url, "--out", str(out)]) == 0
        assert "persona, then score" in capsys.readouterr().out
        got = json.loads((out / "results.json").read_text())
        return {key: value for key, value in got.items() if key not in ("seconds", "command")}

    def reply(text):
        return f"Score: {1 + len(text) % 5}"

    with Server(reply, hold_after=5) as server:
        child = subprocess.Popen([sys.executable, str(ROOT / "evaluate.py"), *command, "--judge", server.url, "--out",
                                  str(tmp_path / "out")], stderr=subprocess.PIPE, text=True, start_new_session=True,
                                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # as in test_train
        cache, patience = tmp_path / "out/judge.jsonl", time.time() + 120
        while not cache.exists() or cache.read_text().count('"key"') < 5:
            assert time.time() < patience and child.poll() is None, child.communicate()
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        server.release.set()
        _, err = child.communicate(timeout=60)
        assert child.returncode == 130 and err.strip().count("\n") == 0 and "evaluate.py: stopped" in err
        assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["answers.jsonl.part", "judge.jsonl"]
        server.hold_after, server.faults = None, "429 500 drop malformed slow fields 503".split()
        monkeypatch.setattr("rollout.Generation.run", no_sampling)
        got = results(server, tmp_path / "out")
        assert set(server.good.values()) == {1} and len(server.good) == CALLS and not server.faults
        monkeypatch.undo()
        assert got == results(server, tmp_path / "whole")
    assert (got["method"], got["training_seed"], got["prompt"]) == ("permix+anchor", 3, "few-shot")
    assert list(got["pass_at_k"]["k"]) == ["1", "2"] and got["fidelity"]["candidates"] == 3
    assert "majority of 2 samples without persona" in [row["name"] for row in got["inference_time_rivals"]]
    assert got["fidelity"]["personagym"]["calls"] == CALLS and got["fidelity"]["personagym"]["cost"] > 0


def no_sampling(self, *args):
    """Stands in for the sampler's loop where every answer is on disk."""
    assert not self.waiting
    return iter(())
