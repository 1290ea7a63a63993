"""rewards.py: the verifier. gold, answer -> correct | wrong | unverifiable, and the rewards made of it.

An RLVR policy is an optimiser pointed at its verifier, so this file has to be right, fast, and safe to point one at:
  verifier/extract.py  the answer out of a completion: last box, `####`, "the answer is", else the last number
  verifier/parse.py    text.py and it read the answer into a tree; no `eval`, no `parse_expr` on what a model wrote
  verifier/equal.py    value.py and it compare two trees, cheap steps first, each bounded
  verifier/verdict.py  takes these steps, for one pair
  Verifier (below)     decides easy pairs at once in `submit`, and sends the rest to worker processes that can be killed
Workers are `python rewards.py --worker` children talking JSON lines over pipes. Not fork: the parent may hold torch,
its threads and a GPU context. Not multiprocessing spawn: it imports the parent's __main__ again, which is the trainer.
Not threads or SIGALRM: a thread cannot be stopped and an alarm needs the main thread. A worker that is late is killed
and replaced; its pair alone becomes `unverifiable`. RLIMIT_AS and RLIMIT_CPU bound it where the system has them.

    python rewards.py                                  a short tour of verdicts
    python rewards.py --gold 1/2 --answer '\\boxed{0.5}'
    python rewards.py --jsonl pairs.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from common.command import Parser
from verifier.extract import MAX_ANSWER
from verifier.value import Undecided
from verifier.verdict import Verdict, judged, verify

# ----------------------------------------------------------------------------------------------------------------------
# Worker processes


class Verifier:
    """A context manager that verifies beside the sampler: `submit(gold, answer)` returns a Future[Verdict] at once.

    Easy pairs are decided in `submit` itself. The rest goes to `workers` child processes, started at the first submit
    and re-used; one that exceeds `timeout_s` is killed and replaced, and its pair is "unverifiable". Safe to use from
    threads.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 0.7, memory_mb: int = 512):
        self.workers, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self._lock, self._queue, self._threads = threading.Lock(), queue.SimpleQueue(), []
        self._closed = False

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, gold: str, answer: str) -> Future:
        """Future of the Verdict. Raises RuntimeError after close()."""
        with self._lock:
            if self._closed:
                raise RuntimeError("this Verifier is closed")
            if not self._threads:
                self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self.workers)]
                for thread in self._threads:
                    thread.start()
        future: Future = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        try:
            future.set_result(judged(gold, answer, deep=False))
        except Undecided:
            with self._lock:                            # not behind the Nones of close()
                if self._closed:
                    raise RuntimeError("this Verifier is closed") from None
                self._queue.put((gold, answer, future))
        return future

    def verify(self, gold: str, answer: str) -> Verdict:
        return self.submit(gold, answer).result()

    def _serve(self) -> None:
        """One thread per worker process: takes pairs, waits, replaces the process when it had to be killed."""
        worker = None
        with contextlib.suppress(OSError):  # started ahead of the first hard pair, to have its imports done
            worker = Worker(self.memory_mb)
        while (job := self._queue.get()) is not None:
            gold, answer, future = job
            try:
                worker = worker or Worker(self.memory_mb)
                verdict = worker.ask(gold, answer, self.timeout_s)
            except (OSError, ValueError, TypeError) as error:  # no process to be had, or one killed in mid-line
                worker, verdict = None, Verdict("unverifiable", f"no worker: {error}")
            future.set_result(verdict)
        if worker:
            worker.stop()

    def close(self) -> None:
        """Finish what is queued, then stop the workers."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


class Worker:
    """One child process, `python rewards.py --worker`: a JSON line in, a JSON line out."""

    def __init__(self, memory_mb: int):
        self.memory_mb = memory_mb
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(self.memory_mb)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        self.ready = False

    def stop(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a request that was never read cannot be flushed
                pipe.close()
        self.process.wait()

    def ask(self, gold: str, answer: str, timeout_s: float) -> Verdict:
        """The worker's verdict, or "unverifiable" after timeout_s. A worker that died by itself is tried once more."""
        request = json.dumps([gold[-MAX_ANSWER:], answer[-MAX_ANSWER:]]) + "\n"
        for _ in range(2):
            if not self.ready:
                self.ready = bool(self._read(60.0)[0])  # imports are not the answer's fault
            try:
                self.process.stdin.write(request)
                self.process.stdin.flush()
            except OSError:
                line, late = "", False
            else:
                line, late = self._read(timeout_s)
            if late or not line:
                self.stop()
                self.start()
            if line:
                return Verdict(*json.loads(line))
            if late:
                return Verdict("unverifiable", f"no verdict within {timeout_s} s")
        return Verdict("unverifiable", "the worker died twice")

    def _read(self, timeout_s: float) -> tuple[str, bool]:
        """(one line, killed?): the timer kills the process, which ends the read: no thread is left waiting."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(timeout_s, kill)
        timer.daemon = True
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        return line, late.is_set()


def work(memory_mb: int) -> None:
    """The worker's side: limits first, then verdicts until the parent closes the pipe."""
    import sympy  # noqa: F401  (slow to import: now, not inside the first answer's time)

    limit(resource.RLIMIT_AS, memory_mb << 20)
    print("ready", flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 3)
        print(json.dumps(verify(*json.loads(line), deep=True)), flush=True)


def limit(kind: int, value: int) -> None:
    """Set a soft limit where the system has it: macOS bounds no address space, and there the timeout must do."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


# ----------------------------------------------------------------------------------------------------------------------
# Rewards: reward(problem, completion_text) -> float


def correctness(problem, completion: str) -> float:
    """1 for a correct completion, else 0. train.py's default reward, which it leaves to a `Verifier`'s processes."""
    return float(verify(problem.answer, completion).verdict == "correct")


def load_reward(spec: str) -> Callable[[object, str], float]:
    """The function named by "module:function". Raises ValueError saying which part of the name was not found."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"a reward is named module:function, for example rewards:correctness, not {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {spec!r}: cannot import module {module_name!r} ({error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: module {module_name!r} has no function {name!r}")
    return function


# ----------------------------------------------------------------------------------------------------------------------
# Command line

TOUR = [("72", "So she sold 48 + 24 = 72 clips."), (r"\frac{1}{2}", r"Hence \boxed{0.5}"), (r"\frac13", "0.333"),
        ("42", "Arr matey, that be 42 doubloons!"), ("5", r"\boxed{5}, or rather \boxed{6}"),
        ("(1, 2)", r"\boxed{(2, 1)}"), (r"\{1, 2\}", r"\boxed{\{2, 1\}}"), ("50\\%", "The answer is 0.5."),
        ("x > 2", r"\boxed{(2, \infty)}"), ("7", r"\boxed{5^{5^{5^{5^5}}}}")]  # fmt: skip


def read_pairs(path: str) -> Iterator[dict]:
    """Lines {"gold", "answer"}. Raises ValueError naming the line that is not one."""
    with sys.stdin if path == "-" else open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("gold", "answer")):
                raise ValueError(f'{path}, line {number}: expected {{"gold": "...", "answer": "..."}}')
            yield row


def main(argv: Iterable[str] | None = None) -> int:
    parser = Parser(description="Is an answer correct, wrong or unverifiable? No flags: a short tour.")
    parser.add_argument("--gold", help="the right answer: LaTeX or plain text")
    parser.add_argument("--answer", help="a completion or a bare answer")
    parser.add_argument("--jsonl", metavar="FILE", help='lines {"gold","answer"} in, also "verdict","ms" out')
    parser.add_argument("--worker", type=int, metavar="MB", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    if args.jsonl and (args.gold or args.answer) or (args.gold is None) != (args.answer is None):
        parser.error("give --gold and --answer together, or --jsonl alone, or nothing")
    with Verifier() as verifier:
        if args.gold is not None:
            print(verifier.verify(args.gold, args.answer).verdict)
        elif args.jsonl:
            try:
                for row in read_pairs(args.jsonl):
                    start = time.perf_counter()
                    verdict = verifier.verify(row["gold"], row["answer"])
                    ms = round(1000 * (time.perf_counter() - start), 3)
                    print(json.dumps({**row, "verdict": verdict.verdict, "rule": verdict.rule, "ms": ms}))
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
