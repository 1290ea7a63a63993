"""rewards.py: what an answer is worth.

A reward is a function `reward(problem, text, *, persona=None) -> float`, named `module:function`.
It sees what a reader of the transcript sees: the problem, the text of the completion, and the
persona that spoke (None where nobody did). So "right and in character" is one function;
docs/modify.md has such a one. It may call `correctness(problem, text)` to ask the verifier, which
then gives 0 for a pair that only a killable process could decide. `Rewarder` runs it with a time
limit while the sampler decodes.

The default, `rewards:correctness`, is the verifier: gold, answer, question -> correct, wrong or
unverifiable.
Training exploits every mistake of a verifier. So it has to be right, fast and safe:
  verifier/extract.py  finds the answer in a completion: a box, `####`, "the answer is", a number
  verifier/words.py    reads the words beside a number: minus 5, 2 million, 2 and a half
  verifier/parse.py    reads the answer into a tree, with text.py; what a model wrote is never run
  verifier/gold.py     tells what a gold is: a number, an expression, a text, or unreadable
  verifier/copied.py   tells an answer that is only the exercise itself, so what is left undone
  verifier/equal.py    compares two trees, with relations.py, exact.py and value.py
  verifier/verdict.py  takes these steps for one pair; each is bounded
  verifier/workers.py  decides easy pairs at once, and hard ones in processes that can be killed

Left out: rewards of whole batches at a time, and rewards that call other machines many at a time.

    python rewards.py                                  a short tour of verdicts
    python rewards.py --gold 1/2 --answer '\\boxed{0.5}'
    python rewards.py --jsonl pairs.jsonl
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cache
from typing import NamedTuple

from common.command import Parser, one_line
from verifier.verdict import Verdict, verify
from verifier.workers import TIMEOUT_S, Verifier, work

# --------------------------------------------------------------------------------------------------
# Rewards


def correctness(problem, text: str, *, persona=None) -> float:
    """1 for a correct completion, else 0, whoever speaks. The default reward."""
    if scorer := getattr(problem, "scorer", ""):        # may be neither run nor trusted here
        verdict = scorers().submit(problem.answer, text, problem.question, scorer)
        return worth(verdict.result()).value
    return worth(verify(problem.answer, text, problem.question)).value


@cache
def scorers() -> Verifier:
    """For `correctness` where a task has a scorer of its own: its processes end with this one."""
    return Verifier(workers=1)


CORRECTNESS = "rewards:correctness"


def load_reward(spec: str) -> Callable[..., float]:
    """The function named by "module:function".

    Raises ValueError, in one line, if there is none or it can't be called as a reward.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"a reward is named module:function, like {CORRECTNESS}, not {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:            # the module's own mistakes too
        raise ValueError(f"reward {spec!r}: cannot import module {module_name!r} "
                         f"({type(error).__name__}: {one_line(error)})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: module {module_name!r} has no function {name!r}")
    try:
        inspect.signature(function).bind("problem", "text", persona=None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {spec!r}: write it as def {name}(problem, text, *, persona=None) "
                         f"({one_line(error)})") from error
    return function


# --------------------------------------------------------------------------------------------------
# Rewards beside the sampler


class Reward(NamedTuple):
    value: float
    verdict: str                                        # correct, wrong or unverifiable


class Rewarder:
    """A context manager: `submit(problem, text, persona)` returns a Future[Reward] at once.

    `rewards:correctness` is decided by a `Verifier`. A user's function runs in this process, in one
    background thread, one call after another in the order of submission. So it may keep a model or
    state; what it loads when its module is imported is not timed. What it pays for is "correct".

    A call that takes longer than `time_limit_s` is worth 0 and "unverifiable". A thread can't be
    stopped, so it is left behind, and a new thread takes the calls that wait.
    """

    def __init__(self, spec: str = CORRECTNESS, time_limit_s: float = 30.0):
        """Raises ValueError, in one line, if `spec` names no reward or the limit is no time."""
        if not time_limit_s > 0:
            raise ValueError(f"a reward's time limit must be above 0 seconds, not {time_limit_s}")
        self.spec, self.time_limit_s = spec, min(time_limit_s, threading.TIMEOUT_MAX)
        self._function = load_reward(spec)
        self._lock, self._queue = threading.Lock(), queue.SimpleQueue()
        self._closed, self._dropped = False, Future()   # the latter is done once calls are dropped
        self._verifier = None
        if spec == CORRECTNESS:
            self._verifier = Verifier(timeout_s=min(TIMEOUT_S, time_limit_s))
        else:
            threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:                            # an error or Ctrl-C: wait for no more calls
            self._dropped.set_result(None)
        self.close()

    def submit(self, problem, text: str, persona=None) -> Future:
        """Future of the Reward. Raises RuntimeError after close().

        Its `result()` raises ValueError, in one line, if a user's reward failed or is not finite.
        """
        future: Future = Future()
        future.set_running_or_notify_cancel()           # from here on nobody can cancel it
        if self._verifier:
            verdict = self._verifier.submit(problem.answer, text, problem.question,
                                            getattr(problem, "scorer", ""))
            verdict.add_done_callback(lambda done: future.set_result(worth(done.result())))
            return future
        with self._lock:                                # never behind the None of close()
            if self._closed:
                raise RuntimeError("this Rewarder is closed")
            self._queue.put((future, problem, text, persona))
        return future

    def close(self) -> None:
        """Takes no more calls. It does not wait for those of a user's reward; they get results."""
        if self._verifier:
            self._verifier.close(self._dropped.done())
        with self._lock:
            self._closed = True
            self._queue.put(None)

    def _serve(self) -> None:
        """Hands the calls to a thread, one at a time, and leaves the thread when a call is late."""
        inbox = None
        while (job := self._queue.get()) is not None:
            future, *arguments = job
            call: Future = Future()
            if inbox is None:
                inbox = queue.SimpleQueue()
                threading.Thread(target=self._work, args=(inbox,), daemon=True).start()
            if not self._dropped.done():
                inbox.put((call, arguments))
                wait([call, self._dropped], self.time_limit_s, FIRST_COMPLETED)
            if self._dropped.done():
                future.set_exception(RuntimeError("this Rewarder is closed"))
            elif not call.done():
                inbox.put(None)                         # ends the thread, should its call ever end
                inbox = None
                future.set_result(Reward(0.0, "unverifiable"))
            elif call.exception():
                future.set_exception(call.exception())
            else:
                future.set_result(call.result())
        if inbox:
            inbox.put(None)

    def _work(self, inbox: queue.SimpleQueue) -> None:
        """The thread that a user's reward runs in."""
        while (job := inbox.get()) is not None:
            call, arguments = job
            try:
                call.set_result(self._call(*arguments))
            except Exception as error:
                call.set_exception(error)

    def _call(self, problem, text: str, persona) -> Reward:
        try:
            value = self._function(problem, text, persona=persona)
            if isinstance(value, str | bytes):          # which float() would read
                raise TypeError(f"it gave the text {value!r}, not a number")
            value = float(value)
        except BaseException as error:                  # also SystemExit: it would end the thread
            raise ValueError(f"--reward {self.spec} failed on problem {problem.id}: "
                             f"{type(error).__name__}: {one_line(error)}") from error
        if not abs(value) < 1e18:                       # its square must be finite in fp32, too
            raise ValueError(f"--reward {self.spec} gave {value} on problem {problem.id}, for "
                             f"{text[:60]!r}; it must be a finite number below 1e18")
        return Reward(value, "correct" if value > 0 else "wrong")


def worth(verdict: Verdict) -> Reward:
    """What the verifier pays: 1 for correct, else 0; the score of a task's own scorer."""
    paid = float(verdict.verdict == "correct") if verdict.score is None else verdict.score
    return Reward(paid, verdict.verdict)


# --------------------------------------------------------------------------------------------------
# Command line

TOUR = [
    ("72", "So she sold 48 + 24 = 72 clips."),
    (r"\frac{1}{2}", r"Hence \boxed{0.5}"),
    (r"\frac13", "0.333"),
    ("42", "Arr matey, that be 42 doubloons!"),
    ("5", r"\boxed{5}, or rather \boxed{6}"),
    ("(1, 2)", r"\boxed{(2, 1)}"),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
    ("50\\%", "The answer is 0.5."),
    ("x > 2", r"\boxed{(2, \infty)}"),
    ("7", r"\boxed{5^{5^{5^{5^5}}}}"),
]


def read_pairs(path: str) -> Iterator[dict]:
    """Lines {"gold", "answer"}, perhaps "question". Raises ValueError naming a bad line."""
    with sys.stdin if path == "-" else open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            texts = [row.get("gold"), row.get("answer")] if isinstance(row, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path}, line {number}: "
                                 'expected {"gold": "...", "answer": "..."}')
            yield row


def judged_rows(path: str, verifier: Verifier) -> Iterator[dict]:
    """The lines of a file with their verdict, its rule, and milliseconds."""
    for row in read_pairs(path):
        start = time.perf_counter()
        verdict = verifier.verify(row["gold"], row["answer"], str(row.get("question") or ""))
        ms = round(1000 * (time.perf_counter() - start), 3)
        yield {**row, "verdict": verdict.verdict, "rule": verdict.rule, "ms": ms}


def main(argv: Iterable[str] | None = None) -> int:
    parser = Parser(description="Is an answer correct, wrong or unverifiable? No flags: a tour.")
    add = parser.add_argument
    add("--gold", help="the right answer: LaTeX or plain text")
    add("--answer", help="a completion or a bare answer")
    add("--question", default="", help="an answer that only copies it is wrong")
    add("--jsonl", metavar="FILE", help='lines {"gold","answer"} in, also "verdict","ms" out')
    add("--worker", type=int, metavar="MB", help=argparse.SUPPRESS)     # see verifier/workers.py
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    one = args.gold or args.answer or args.question
    if (args.jsonl and one or args.jsonl == "" or (args.gold is None) != (args.answer is None)
            or args.question and args.gold is None):
        parser.error("give --gold and --answer together, or --jsonl alone, or nothing")
    with Verifier() as verifier:
        if args.gold is not None:
            print(verifier.verify(args.gold, args.answer, args.question).verdict)
        elif args.jsonl:
            try:
                for row in judged_rows(args.jsonl, verifier):
                    print(json.dumps(row))
            except (OSError, ValueError) as error:
                print(f"rewards.py: {error}", file=sys.stderr)
                return 2
        else:
            for gold, answer in TOUR:
                verdict = verifier.verify(gold, answer)
                print(f"{verdict.verdict:13} gold {gold:14} answer {answer:36} by {verdict.rule}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
