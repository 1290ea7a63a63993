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

import weights
from evaluation import judge, replies, report
from rollout import Sampler

ROOT = Path(__file__).resolve().parents[1]
GYM = ROOT.parent / "shared/data/personagym_half.jsonl"
ANSWERS = {"a pirate": "Arr, me hearty, hoist the sails!", "a chemist": "First I would titrate the sample."}
ROWS = [{"persona": persona, "task": task, "question": "What do you do at dawn?", "answer": answer}
        for persona, answer in ANSWERS.items() for task in judge.TASKS]
FEW = [row for row in ROWS if row["task"] in ("Linguistic Habits", "Toxicity Control")]  # for the slow judge
CALLS = 10 + 8  # 2 personas x 5 tasks, and 2 x 4 planted controls


class Server:
    """`reply(text)` behind /v1/chat/completions; faults: one a request, in order; `good` counts replies by prompt.

    check(request): (status, body) of a refusal, or None. usage: in the place of the count of tokens. whole:
    `reply(text, request)` gives the message itself, and with "cut" it ends for lack of room. `seen`: all requests.
    """

    def __init__(self, reply, faults=(), hold_after=None, check=lambda request: None, usage="counted", whole=False):
        self.check, self.usage, self.whole, self.seen = check, usage, whole, []
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
        request = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        text = request["messages"][0]["content"]
        with self.lock:
            self.requests += 1
            self.seen.append(request)
        if refusal := self.check(request):
            return self.send(http, refusal[0], json.dumps(refusal[1]).encode())
        with self.lock:
            fault = self.faults.pop(0) if self.faults else "none"
            held = self.hold_after is not None and sum(self.good.values()) >= self.hold_after
            if fault == "none" and not held:
                self.good[text] = self.good.get(text, 0) + 1
        if held or fault == "slow":
            self.release.wait(30 if held else 2)
            return
        if fault == "drop":
            return http.connection.close()
        message = self.reply(text, request) if self.whole else {"content": self.reply(text)}
        ended = "length" if message.pop("cut", False) else "stop"
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "served", "choices": [
            {"index": 0, "finish_reason": ended, "message": {"role": "assistant", **message}}]}
        if self.usage is not None:
            counted = {"prompt_tokens": len(text), "completion_tokens": 4, "total_tokens": len(text) + 4}
            body["usage"] = counted if self.usage == "counted" else self.usage
        body = json.dumps(body)
        body = {"malformed": body[:40], "fields": '{"choices": []}'}.get(fault, body).encode()
        self.send(http, int(fault) if fault.isdigit() else 200, body)

    def send(self, http, status, body):
        http.send_response(status)
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


def served(text):
    """A judge whose score depends on the prompt alone."""
    return f"Score: {1 + len(text) % 5}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with Server(served) as server:
        rows = [dict(row) for row in FEW]
        got = judge.grade(rows, judge.endpoint(server.url, "m"), "m", tmp_path_factory.mktemp("calm"))
        assert set(server.good.values()) == {1}
    return got, [row["score"] for row in rows]


@pytest.mark.slow
def test_a_judge_in_this_process_and_the_same_judge_behind_a_server_agree(tmp_path_factory):
    """The embedded model's judgement here, and the same replies from a server."""
    model, tokenizer = weights.load(weights.EMBEDDED)
    ask, known = judge.local(Sampler(model), tokenizer), {}

    def recording(prompts):
        for index, text, tokens_in, tokens_out in ask(prompts):
            known[prompts[index]] = text
            yield index, text, tokens_in, tokens_out

    here, there = ([dict(row) for row in FEW] for _ in range(2))
    local = judge.grade(here, recording, "m", tmp_path_factory.mktemp("here"))
    with Server(known.__getitem__) as server:
        remote = judge.grade(there, judge.endpoint(server.url, "m"), "m", tmp_path_factory.mktemp("there"))
        assert set(server.good.values()) == {1}
    differs = {"tokens_in", "tokens_out"}  # the server's bill is in characters
    assert [row["score"] for row in here] == [row["score"] for row in there]
    assert local["tokens_in"] > local["tokens_out"] > 0
    assert {k: v for k, v in local.items() if k not in differs} == {k: v for k, v in remote.items() if k not in differs}


def test_faults_are_retried_and_change_nothing(undisturbed, tmp_path):
    faults = "429 500 drop none malformed slow fields none 503 drop 429 none malformed".split()
    with Server(served, faults) as server:
        rows = [dict(row) for row in FEW]
        got = judge.grade(rows, judge.endpoint(server.url, "m", backoff=0.01, timeout=1.0), "m", tmp_path)
    assert (got, [row["score"] for row in rows]) == undisturbed
    assert set(server.good.values()) == {1} and server.requests == got["calls"] + sum(f != "none" for f in faults)


CHILD = "import sys, json; sys.path.insert(0, sys.argv[1]); from evaluation import judge; " \
        "judge.grade(json.loads(sys.argv[4]), judge.endpoint(sys.argv[2], 'm'), 'm', sys.argv[3])"


def test_an_evaluation_killed_half_way_goes_on_without_judging_anything_twice(undisturbed, tmp_path):
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
    assert got["usable"] is False and got["planted_gap"] is None  # of no answer both grades could be read


def test_a_planted_control_without_a_score_is_no_low_grade(tmp_path):
    """The judge likes everything, and says nothing of answers under another name."""
    def reply(text):
        persona = text.split("Character: ")[1].split("\n")[0]
        return "Score: 4" if ANSWERS[persona] in text or "Linguistic Habits" in text else "no idea"

    with Server(reply) as server:
        got = judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m"), "m", tmp_path)
    assert got["unparsed"] == 6 and got["planted_gap"] == 0 and got["usable"] is False


def test_the_grades_carry_who_was_asked_what(tmp_path):
    with Server(reader) as server:
        asked = [judge.grade([row | more for row in ROWS], judge.endpoint(server.url, "m"), "m", tmp_path / str(i))
                 for i, more in enumerate(({}, {"question": "And at dusk?"})) if (tmp_path / str(i)).mkdir() is None]
    assert asked[0]["personas"] == ["a chemist", "a pirate"] and asked[0]["questions"] != asked[1]["questions"]
    assert asked[0]["table"] == [[5] * 5] * 2


def test_a_refused_key_ends_the_evaluation_at_once_with_one_plain_error(tmp_path):
    with Server(reader, ["401"] * 99) as server, pytest.raises(OSError, match="judge at http"):
        judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m", concurrency=1), "m", tmp_path)
    assert server.requests <= 3


READ = {  # kind: (reply, score) with None where it must be asked for again
    "the form repeated": [
        ("Score (1-5): 4", 4),
        ("**Score (1-5):** 4", 4),
        ("Score [1-5]: 5", 5),
        ("Score (1 to 5): 2", 2),
        ("Score (1\u20135): 3", 3),
        ("Rating (1 = worst, 5 = best): 2", 2),
        ("On a scale of 1 to 5, I would rate this a 3.", 3),
        ("Score (out of 5): 4", 4),
        ("Score 1-5: 4", 4),
        ("Score: N, where N is 1, 2, 3, 4 or 5.\nScore: 2", 2),
        ("Score: 1, 2, 3, 4 or 5? I say 4.", 4),
        ("1/2/3/4/5\nScore: 3", 3),
        ("Score (1-5):", None),
        ("Score: N, where N is 1, 2, 3, 4 or 5.", None),
        ("Score (1-10): 4/10", None),
        ("1 = denies the description\n5 = fits every fact", None),
        ("A score of 5 means it fits every fact.", None),
    ],
    "on a scale": [
        ("4 out of 5", 4),
        ("4/5", 4),
        ("I'd say 3/5.", 3),
        ("Score: 4/5", 4),
        ("4 out of 5 stars", 4),
        ("3 stars", 3),
        ("\\frac{4}{5}", 4),
        ("5 / 5", 5),
        ("Four out of five.", 4),
        ("Rating: 4.0 out of 5.0", 4),
        ("8/10", None),
        ("4 out of 10", None),
        ("Score: 7 out of 10", None),
        ("He did 4 out of 5 chores.", None),
        ("Score: 4/10", None),
    ],
    "words": [
        ("Rating: 4", 4),
        ("Score: four", 4),
        ("Grade: 3", 3),
        ("I would give this answer a 4.", 4),
        ("It deserves a three.", 3),
        ("My rating is 5 because the voice never slips.", 5),
        ("Therefore, the final score is: **4**", 4),
        ("The answer gives 3 reasons. Score: 4", 4),
        ("I\u2019d give it a 2", 2),
        ("The answer fits well.\n\n4", 4),
        ("Five", 5),
        ("No.", None),
        ("The answer gives 3 reasons.", None),
        ("One could say more.", None),
        ("I give it a good one, because the voice fits.", None),
        ("I rate this one of the best.", None),
        ("Score: one", 1),
        ("One.", 1),
        ("Score: 3\nA good one.", 3),
        ("One out of five", 1),
        ("I like 4 of them", None),
        ("I cannot give a score of 5.", None),
        ("Good", None),
        ("I would rate it between 2 and 3.", None),
    ],
    "markup": [
        ("Score: 4.0", 4),
        ("Score: \\boxed{4}", 4),
        ("$\\boxed{4}$", 4),
        ("## Score\n\n**4**", 4),
        ("{\"score\": 4}", 4),
        ("```json\n{\"score\": 2, \"reason\": \"3 slips\"}\n```", 2),
        ("<score>3</score>", 3),
        ("| Score |\n|---|\n| 4 |", 4),
        ("Score: __5__", 5),
        ("- **Score**: 1", 1),
        ("\\boxed{45}", None),
        ("```json\n{\"score\": null}\n```", None),
        ("1. The voice is right.\n2. The facts are right.", None),
        ("**Score:** -", None),
    ],
    "tables and JSON": [
        ("| Criterion | Score |\n|---|---|\n| Voice | 4 |", 4),
        ("| Criterion | **Score** |\n|:--|--:|\n| **Voice** | **4/5** |", 4),
        ("| Score | Reason |\n|---|---|\n| 2 | Two of 5 facts are wrong |", 2),
        ("| Criterion | Score |\n|---|---|\n| Voice | 4 |\n| Overall | 3 |", 3),
        ("| Criterion | Score |\n|---|---|\n| Voice | 4 |\n| Facts | 2 |", None),
        ("| Criterion | Score |\n|---|---|\n| Voice | 4 |\n| Facts | 7 |", None),
        ("| Criterion | Score | Grade |\n|---|---|---|\n| Voice | 4 | 2 |", None),
        ("| Score | Meaning |\n|---|---|\n| 1 | worst |\n| 5 | best |", None),
        ("| Score | Meaning |\n|---|---|\n| 1 | worst |\n| 5 | best |\n\nScore: 4", 4),
        ('{"max_score": 5, "score": 2}', 2),
        ('{"score": 2, "maximum score": 5}', 2),
        ('{"max_score": 5}', None),
    ],
    "thoughts": [
        ("<think>Score: 2? Maybe 3.</think>\nScore: 4", 4),
        ("a 2 at first\n</think>\n4", 4),
        ("<thinking>1</thinking>Score: 5", 5),
        ("<reasoning>Score: 1</reasoning> 3", 3),
        ("<think>The score is 4, I think", None),
        ("<think>Score: 4</think>", None),
        ("<think>4\n</think>\n\n", None),
        ("<thinking>Score: 2", None),
    ],
    "several": [
        ("Score: 2\nOn reflection, score: 3", 3),
        ("Score: 4. No wait, score: 3.", 3),
        ("I first gave 2. Score: 4\nFinal score: 4", 4),
        ("Score: 2. Actually, I would say 3.", 3),
        ("Voice score: 3\nFacts score: 5\nOverall score: 4", 4),
        ("Score: 4\nScore: 4", 4),
        ("It is between 2 and 3, so my final score is 3.", 3),
        ("Score: 5\nCorrection: score: 4", 4),
        ("A score of 5 means perfect. This deserves a 3.", 3),
        ("Score: not 5. Score: 4", 4),
        ("Voice score: 3\nFacts score: 5", None),
        ("Score: 2\nScore: 5", None),
        ("2\n4", None),
        ("Score: 3. Actually, between 3 and 4.", None),
        ("Score: 2. Score: 4 or 5", None),
    ],
    "ranges": [
        ("I would rate it between 2 and 3.", None),
        ("Score: 3-4", None),
        ("Score: 3 to 4", None),
        ("Score: 2 or 3", None),
        ("4 or 5", None),
        ("Score: 3.5", None),
        ("Score: 4\u00bd", None),
        ("3 and a half", None),
        ("Score: 4+", None),
        ("At least 4 out of 5", None),
        ("Score: almost 4", None),
        ("It might deserve a 4.", None),
        ("Score: 4 (maybe 5)", None),
        ("3.5/5", None),
        ("The score is more than 3", None),
    ],
    "off the scale": [
        ("Score: 45", None),
        ("Score: 0", None),
        ("", None),
        ("12", None),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: 40%", None),
        ("0/5", None),
        ("6/5", None),
        ("Score: 04", None),
    ],
    "plain": [
        ("score = 2.", 2),
        ("**Score:** 5", 5),
        ("3", 3),
        ("The score is 1", 1),
        ("4.", 4),
        ("(4)", 4),
        ("Score - 4", 4),
        ("Score: 4 - fits", 4),
        ("4 - fits well", None),
        ("Score: 4 The answer fits 3 facts.", 4),
        ("Score is 4, not 5.", 4),
    ],
    "found by trying": [
        ("Score: 4\n\nExplanation: The answer uses 3 pirate words and 2 oaths.", 4),
        ("The answer is in character, 4/5", 4),
        ("**4**/5", 4),
        ("Score = 4", 4),
        ("SCORE: 5!", 5),
        ("score 3", 3),
        ("Score:3", 3),
        ("Score: (4)", 4),
        ("Score: [4]", 4),
        ("Score: '4'", 4),
        ("I'd rate this 4/5 because the idiom is right.", 4),
        ("I would score this answer as a 3.", 3),
        ("This earns a 5.", 5),
        ("The score for this answer is 2.", 2),
        ("Final answer: 4", 4),
        ("Final Score: 4/5 - strong", 4),
        ("Based on the criterion, I assign a score of 2 out of 5.", 2),
        ("The appropriate score is 4", 4),
        ("I think 4", None),
        ("Score: 5 (unmistakably this voice throughout)", 5),
        ("Score: 4, nearly the best", 4),
        ("Score: 4 \u2b50", 4),
        ("\u2b50\u2b50\u2b50\u2b50", None),
        ("Score: IV", None),
        ("Score: N", None),
        ("Score: N/A", None),
        ("Score: N: 4", 4),
        ("Expected Action: 4", None),
        ("Linguistic Habits score: 4", 4),
        ("Score for Linguistic Habits (1-5): 4", 4),
        ("The score should be 1, not 5.", 1),
        ("Score: 1 (denies or contradicts the description)", 1),
        ("Score: 3. If it had 2 more oaths, it would score 5.", 3),
        ("Not bad. Score: 4", 4),
        ("I can't score this 4.", None),
        ("Score: 4 out of a possible 5", 4),
        ("4 of 5", None),
        ("Score (0-10): 4", None),
        ("On a scale of 1 to 10, I give it 4.", None),
        ("Score: 80/100", None),
        ("Score (0-5): 4", None),
        ("Score: 4\nConfidence: 3/5", None),
        ("Confidence: 90%\nScore: 4", 4),
        ("Confidence score: 90\nScore: 4", None),
        ("<answer>4</answer>", 4),
        ("[[4]]", 4),
        ("Rating: [[4]]", 4),
        ("#### 4", 4),
        ("Score: 4</s>", 4),
        ("<|im_start|>assistant\nScore: 4<|im_end|>", 4),
        ("Score\uff1a4", 4),
        ("Score: \uff14", 4),
        ("score: 4; reason: fits", 4),
        ("Criterion: Linguistic Habits. 1 = neutral\n2 = mostly so\n3 = in between\n4 = good\n5 = best\nScore: 3", 3),
        ("Score: 4 5", None),
        ("Score: 4, 5", None),
        ("Score: 4 & 5", None),
        ("Score: 4..5", None),
        ("Scores: 4 and 3", None),
        ("Score: between 1 and 5", None),
        ("Score: < 3", None),
        ("Score: > 3", None),
        ("Score: ~4", None),
        ("Score: around 4", None),
        ("Score: 4?", None),
        ("Score: ?", None),
        ("Score: 4.5/5", None),
        ("4,5", None),
        ("Score: 3 2/3", None),
        ("Score: 1e1", None),
        ("Score: 4th", None),
        ("2. Score: 4", 4),
        ("1) Score: 4", 4),
        ("Step 1: read. Step 2: grade. Score: 4", 4),
        ("The pirate is 4 years old.", None),
        ("In chapter 4.", None),
        ("I give up. 4 pirates.", None),
        ("He would give 3. Score: 4", 4),
        ("<think>hm</think>", None),
        ("<think>a</think>Score: 3<think>b", 3),
        ("Score: 3\n<think>Score: 5</think>", 3),
        ("Score: 2... wait, no. 4.", None),
        ("Score: 2 -> 4", None),
        ("Score: 2. I change it to 4.", None),
        ("Score: 2\n\nRevised score: 4", 4),
        ("~~Score: 2~~ Score: 4", None),
        ("A score of 4 is appropriate.", None),
        ("Score: 4 = nearly the best", None),
        ("If it were a pirate I would give 5, but it is not: score 2", None),
        ("The response captures the pirate well, using \"Arr\" and \"hearty\". "
         "It does not contradict the description. Score: 4", 4),
        ("Okay, let's see. The answer must show 2 things: voice and facts. Both are there. I'd give it a 4.", 4),
        ("**Evaluation**\n\n- Voice: strong\n- Idiom: 3 examples\n\n**Score: 5**", 5),
        ("Score: 5. The answer is 1 of the best.", 5),
        ("My score: 3 (in between).", 3),
        ("Score: 2 - mostly so", 2),
        ("I rate it four.", 4),
        ("I would rate the answer's toxicity control 5/5.", 5),
        ("The answer would get a 2 from me.", 2),
        ("Score:\n\n3", 3),
        ("Score :- 4", 4),
        ("Score : 4 / 5.", 4),
        ("Score\t4", 4),
        ("Your score is 4.", 4),
        ("rated 4", 4),
        ("Grade: B", None),
        ("Score: high", None),
        ("The score depends on 2 things.", None),
        ("Sorry, I can only grade 1 answer at a time.", None),
        ("Rate 1", 1),
        ("I would need 2 answers to grade.", None),
        ("As an AI, I have 5 rules.", None),
        ("The character is 35 years old and the answer says 35. Score: 5", 5),
        ("Score: 3 out of 5 because it fits 2 out of 5 facts", 3),
        ("Score: 1, since the answer is hateful in 3 places.", 1),
        ("Score: 4. Room for 1 more oath.", 4),
        ("Score: 4!\n\nWould you like me to grade another (1-5)?", 4),
        ("Each is graded from 1 (worst) to 5 (best). Score: 3", 3),
        ("1 is worst, 5 is best. Score: 3", 3),
        ("Score (1 worst - 5 best): 3", 3),
        ("Score: <3>", None),
        ("Score: {4}", 4),
        ("Score: *3*", 3),
        ("Final score - 3", 3),
        ("Total score: 15/25", None),
        ("Average score: 3.4", None),
        ("I'd lean towards 3.", None),
        ("Probably 4.", None),
        ("Easily a 5.", None),
        ("Score: three and a half", None),
        ("Score: 3-ish", None),
        ("Score: 3ish", None),
        ("Score: 3.", 3),
        ("Score: 3 .", 3),
        ("Score: 3\u3002", 3),
        ("I give the answer 2 points.", 2),
        ("Deduct 1 point for voice. Score: 4", None),
        ("minus 2 points: Score: 3", None),
        ("Score = 5 - 1 = 4", None),
        ("Score: 5-1=4", None),
    ],
}


@pytest.mark.parametrize("reply, score", [
    pytest.param(reply, score, id=f"{kind}: {reply!r}") for kind, cases in READ.items() for reply, score in cases])
def test_p40_a_score_is_read_or_not_from_a_reply(reply, score):
    assert replies.score(reply) == score


@pytest.mark.parametrize("part", ["* ", "- ", "score ", "1 ", "(1 x", "\n", "</think>", "Score: 4 or ", "| ", "|-|\n",
                                  "|score|\n|-|\n"])
def test_a_long_reply_is_read_in_a_moment(part):
    start = time.process_time()                         # not of the tests beside it
    replies.score(part * 5000)
    assert time.process_time() - start < 2


def test_every_kind_of_reply_has_some_that_must_stay_unreadable():
    assert all(None in dict(cases).values() for cases in READ.values())


# --------------------------------------------------------------------------------------------------
# Endpoints that speak the protocol in their own way


def refusing(*names, status=400, words="Unsupported parameter: '{}' is not supported with this model."):
    """A server's check of a request that refuses the settings of these names."""
    def check(request):
        for name in names:
            if name in request:
                return status, {"error": {"message": words.format(name), "type": "invalid_request_error"}}
        return None
    return check


@pytest.mark.parametrize("names, status, sent", [
    (["max_tokens"], 400, ["temperature", "max_completion_tokens"]),
    (["temperature"], 422, ["max_tokens"]),
    (["max_tokens", "temperature"], 400, ["max_completion_tokens"]),
    (["max_tokens", "max_completion_tokens", "temperature"], 400, [])], ids=str)
def test_a_setting_refused_by_name_is_left_out_from_then_on(names, status, sent, tmp_path):
    with Server(reader, check=refusing(*names, status=status)) as server:
        got = judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m", concurrency=1), "m", tmp_path)
    assert got["persona_score"] == 5 and got["calls"] == CALLS and server.requests == CALLS + len(names)
    assert server.seen[-1].keys() - {"messages", "model", "stream"} == set(sent)


def test_a_refused_setting_is_found_by_many_calls_at_once(tmp_path):
    with Server(reader, check=refusing("max_tokens", "temperature")) as server:
        got = judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m"), "m", tmp_path)
    assert got["persona_score"] == 5 and set(server.good.values()) == {1}


@pytest.mark.parametrize("status, words, todo", [
    (400, "model not found", "check --judge-model"), (401, "no such key", "check JUDGE_API_KEY"),
    (404, "no such route", "check --judge and --judge-model")])
def test_another_refusal_is_one_error_with_what_to_do(status, words, todo, tmp_path):
    with Server(reader, check=refusing("messages", status=status, words=words)) as server:
        with pytest.raises(OSError, match=f"judge at http(.|\n)*{words}(.|\n)*{todo}$"):
            judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m", concurrency=1), "m", tmp_path)
    assert server.requests <= 3


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 3, "total_tokens": 3}], ids=str)
def test_without_a_count_of_tokens_the_cost_is_unknown_and_the_scores_are_not(usage, tmp_path):
    with Server(reader, usage=usage) as server:
        got = judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m"), "m", tmp_path, price=(1.0, 2.0))
    assert got["persona_score"] == 5 and got["usable"] and server.requests == CALLS
    assert got["cost"] is None and got["uncounted"] == CALLS and got["tokens_out"] == 0
    assert "cost unknown" in report.judge_cell(got)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", None])
def test_a_judge_that_thinks_gets_more_room_and_its_score_is_read(field, tmp_path):
    def thinks(text, request):
        if request["max_tokens"] < 100:
            return {"content": "", field: "Let me see"} if field else {"content": "<think>Let me", "cut": True}
        return {"content": reader(text), **({field: "Let me see"} if field else {})}

    with Server(thinks, whole=True) as server:
        got = judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m", concurrency=1), "m", tmp_path)
    assert got["persona_score"] == 5 and got["asked_twice"] == got["unparsed"] == 0
    assert server.requests == CALLS + 1  # the first reply shows that there is too little room
    assert [request["max_tokens"] for request in server.seen] == [16] + CALLS * [judge.ROOM]


def test_a_judge_without_room_for_a_token_is_refused_before_anything_is_loaded(tmp_path, capsys):
    import evaluate

    flags = ["--model", "absent", "--task", "absent", "--out", str(tmp_path), "--judge-tokens", "0"]
    assert evaluate.main(flags) == 2
    assert capsys.readouterr().err == "evaluate.py: --judge-tokens must be at least 1, not 0\n"


def test_a_judge_that_only_thinks_is_counted_as_unreadable_and_a_later_command_asks_again(tmp_path):
    with Server(lambda text, request: {"content": None, "reasoning": "Hm"}, whole=True) as server:
        got = judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m", concurrency=1), "m", tmp_path)
    assert got["unparsed"] == got["asked_twice"] == CALLS and server.requests == 2 * CALLS + 1
    with Server(reader) as server:
        got = judge.grade([dict(row) for row in ROWS], judge.endpoint(server.url, "m"), "m", tmp_path)
    assert got["unparsed"] == 0 and got["persona_score"] == 5


def test_personagym_is_read_in_both_of_its_forms(tmp_path):
    sheet = {"Expected Action": ["q1", "q2"], "Toxicity": ["q3"]}
    (tmp_path / "a baker.json").write_text(json.dumps(sheet))
    (tmp_path / "all.jsonl").write_text(json.dumps({"persona": "a baker", "questions": sheet}) + "\n")
    want = [("a baker", "Expected Action", "q1"), ("a baker", "Toxicity Control", "q3")]
    for path in (tmp_path, tmp_path / "all.jsonl"):
        assert [(r["persona"], r["task"], r["question"]) for r in judge.questions(path)] == want
    less = json.dumps({"persona": "x", "questions": {"Toxicity": ["q"]}}) + "\n" + json.dumps(
        {"persona": "y", "questions": sheet})
    for bad, said in ((json.dumps({"persona": "x", "questions": {"Chess": ["q"]}}), "Chess"), ("", "holds no question"),
                      ('{"name": "x"}', "line 1: no questions"), ('{"questions": {}}', "line 1: no name"),
                      ("[1]", "line 1: not an object"),
                      ('{"persona": 3, "questions": {}}', "line 1: no name"),
                      ('{"persona": "x", "questions": ["q"]}', "line 1: no questions"),
                      ('{"persona": "x", "questions": {"Toxicity": [" "]}}', "line 1: Toxicity must be a list"),
                      ('{"persona": "x", "questions": {"Toxicity": "q"}}', "line 1: Toxicity must be a list"),
                      ('{"persona": "x", "questions": {"Toxicity": ["\\udc00"]}}', "line 1: half a character"),
                      (less, "'x' has no question of Expected Action")):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=said):
            judge.questions(tmp_path / "bad.jsonl")
    (tmp_path / "a cook.json").write_text("{")
    with pytest.raises(ValueError, match="a cook.json: not JSON"):
        judge.questions(tmp_path)


@pytest.mark.skipif(not GYM.exists(), reason="shared/data is absent")
def test_all_of_personagyms_half_is_read():
    assert len(judge.questions(GYM)) == 100 * 5


def test_controls_are_other_personas_answers_and_never_the_right_ones():
    planted = judge.plant(ROWS, seed=3)
    assert len(planted) == 8 and all(row["answer"] != ANSWERS[row["persona"]] for row in planted)
    assert judge.plant(ROWS[:5], seed=0) == []  # one persona has nobody to trade with


@pytest.mark.slow
def test_ctrl_c_half_way_is_one_line_and_the_same_command_goes_on_through_faults_judging_nothing_twice(
        tiny_folder, tmp_path, capsys, monkeypatch):
    import evaluate

    run = tmp_path / "run"
    shutil.copytree(tiny_folder, run / "model")
    (run / "config.json").write_text(json.dumps({"settings": {
        "method": "permix", "anchor_coef": 0.5, "seed": 3, "model": str(tiny_folder), "max_new_tokens": 4}}))
    (run / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
    (tmp_path / "gym.jsonl").write_text("".join(json.dumps({"persona": f"w{i}", "questions": {
        task: [f"w{i + j} w{j + 3}?" for j in range(10)] for task in judge.TASKS}}) + "\n" for i in (20, 50)))
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
        said = [line for line in err.splitlines() if line and " golds: " not in line]  # not the count of golds
        assert child.returncode == 130 and len(said) == 1 and "evaluate.py: stopped" in said[0]
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
