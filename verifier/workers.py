"""verifier/workers.py: verdicts beside the sampler; easy pairs at once, hard ones in workers.

A worker is a child process, `python rewards.py --worker`: JSON lines in, JSON lines out. One that
is late is killed and replaced, and only its own pair becomes `unverifiable`. RLIMIT_AS and
RLIMIT_CPU bound it where the system has them.

What we do not use, and why:
  fork             the parent may hold torch, its threads and a GPU context
  spawn            multiprocessing would import the parent's __main__ again, which is the trainer
  threads, alarms  a thread cannot be stopped, and an alarm needs the main thread
"""

from __future__ import annotations

import contextlib
import json
import queue
import resource
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

from verifier.extract import end_of
from verifier.value import Undecided
from verifier.verdict import Verdict, judged, verify

DOOR = Path(__file__).resolve().parents[1] / "rewards.py"
TIMEOUT_S, SCORER_S = 0.7, 5.0                          # for one hard pair; for a task's own scorer


class Verifier:
    """A context manager: `submit(gold, answer, question)` returns a Future[Verdict] at once.

    Easy pairs are decided in `submit` itself. The rest goes to `workers` child processes, which are
    started at the first submit and used again. One that exceeds `timeout_s` is killed and replaced,
    and its pair is "unverifiable". Safe to use from threads.
    """

    def __init__(self, workers: int = 2, timeout_s: float = TIMEOUT_S, memory_mb: int = 512):
        self.workers, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self._lock, self._queue, self._threads = threading.Lock(), queue.SimpleQueue(), []
        self._closed = False

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, gold: str, answer: str, question: str = "", scorer: str = "") -> Future:
        """Future of the Verdict. Raises RuntimeError after close().

        With the question, an answer that only copies it is wrong. scorer: a task's own judges in
        place of ours (scorer.py), always in a worker.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this Verifier is closed")
            if not self._threads:
                for _ in range(self.workers):
                    self._threads.append(threading.Thread(target=self._serve, daemon=True))
                    self._threads[-1].start()
        future: Future = Future()
        future.set_running_or_notify_cancel()           # from here on nobody can cancel it
        try:
            if scorer:
                raise Undecided("it has a scorer of its own")
            future.set_result(judged(gold, answer, question, deep=False))
        except Undecided:
            with self._lock:                            # never behind the Nones of close()
                if self._closed:
                    raise RuntimeError("this Verifier is closed") from None
                self._queue.put((gold, answer, question, scorer, future))
        return future

    def verify(self, gold: str, answer: str, question: str = "") -> Verdict:
        return self.submit(gold, answer, question).result()

    def _serve(self) -> None:
        """One thread per worker process: takes pairs, waits, replaces a process that was killed."""
        worker = None
        with contextlib.suppress(OSError):              # started early, to have its imports done
            worker = Worker(self.memory_mb)
        while (job := self._queue.get()) is not None:
            *texts, future = job
            try:
                worker = worker or Worker(self.memory_mb)
                seconds = SCORER_S if texts[3] else self.timeout_s
                verdict = worker.ask(*texts, timeout_s=seconds)
            except (OSError, ValueError, TypeError) as error:   # no process, or killed in mid-line
                worker, verdict = None, Verdict("unverifiable", f"no worker: {error}")
            future.set_result(verdict)
        if worker:
            worker.stop()

    def close(self, drop: bool = False) -> None:
        """Finish what is queued (drop: only what a worker has in hand), then stop the workers."""
        with self._lock, contextlib.suppress(queue.Empty):
            self._closed = True
            while drop:
                self._queue.get_nowait()[-1].set_result(Verdict("unverifiable", "dropped"))
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
        command = [sys.executable, str(DOOR), "--worker", str(self.memory_mb)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        self.ready = self.scores = False                # has imported what it needs

    def stop(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):          # a request never read cannot be flushed
                pipe.close()
        self.process.wait()

    def ask(self, gold: str, answer: str, question: str = "", scorer: str = "", *,
            timeout_s: float) -> Verdict:
        """The worker's verdict, or "unverifiable" after timeout_s.

        A worker that died by itself is tried once more.
        """
        texts = [end_of(text) for text in (gold, answer, question)]
        request = json.dumps([*texts, scorer]) + "\n"
        for _ in range(2):
            if not self.ready:
                self.ready = bool(self._read(60.0)[0])  # imports are not the answer's fault
            try:
                if scorer and not self.scores:
                    self.process.stdin.write(json.dumps(["", "", "", scorer]) + "\n")
                    self.process.stdin.flush()
                    self.scores = bool(self._read(60.0)[0])
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
        """(one line, killed?). A timer kills the process, which ends the read: no thread waits."""
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
    replies, guarded = sys.stdout, False
    sys.stdout = None                                   # what an answer prints is no verdict
    print("ready", flush=True, file=replies)
    for line in sys.stdin:
        *texts, scorer = json.loads(line)
        if scorer and not guarded:
            limit(resource.RLIMIT_AS, 4 * memory_mb << 20)
            import reasoning_gym  # noqa: F401

            from verifier.scorer import guard, scored

            sys.addaudithook(guard)
            guarded = True
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 3)
        verdict = scored(scorer, texts[1]) if scorer else verify(*texts, deep=True)
        print(json.dumps(verdict), flush=True, file=replies)


def limit(kind: int, value: int) -> None:
    """Set a soft limit where the system has it. On macOS, which bounds no memory, time must do."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
