"""How a run ends before its last step: by a signal on whichever rank, or by an error."""

import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from common.command import note, one_line
from common.files import rows
from common.ranks import ranks, summed
from training.checkpoints import newest

# --------------------------------------------------------------------------------------------------
# Signals


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP   # the last: the terminal is gone


class Stopped(KeyboardInterrupt):
    """One of SIGNALS came; `number` says which."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class Stop:
    """Hears SIGNALS, and raises Stopped in the main thread.

    It does so at once, but not while `held`: a step or a checkpoint that has begun is finished. A
    second Ctrl-C ends a run of one process where it stands. (torchrun sends every signal twice.)
    """

    def __init__(self):
        self.number, self.held = 0, False

    def __call__(self, number: int, frame) -> None:
        again, self.number = self.number, number
        if again and number == signal.SIGINT and ranks()[1] == 1:
            raise KeyboardInterrupt
        if not (self.held or again):
            self.held = True
            raise Stopped(number)

    @contextmanager
    def heard(self):
        """Hears the signals, but none that is ignored (a job in a shell's background)."""
        before = {n: signal.getsignal(n) for n in SIGNALS}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def hold(self):
        """Within it only what goes through `agreed` is cut short."""
        self.held = True
        yield
        self.held = False
        self.agree()

    def agree(self) -> None:
        """Raises Stopped on all ranks if one of them has heard a signal."""
        if summed([self.number])[0]:
            raise Stopped(self.number or signal.SIGTERM)

    def agreed(self, sample: Callable, *arguments):
        """sample(*arguments), which a signal cuts short; all ranks then raise Stopped together."""
        result = None
        with suppress(Stopped):
            self.held = False
            if not self.number:
                result = sample(*arguments)
            self.held = True
        self.agree()
        return result


# --------------------------------------------------------------------------------------------------
# What is said, and what is left


@contextmanager
def told(args, out: Path):
    """Says how a run in this folder goes on, or leaves nothing of one that never began."""
    def goes_on() -> str:
        return f"--resume {out} goes on after step {newest(out / 'checkpoints')}"

    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError):                         # the terminal is gone
            note(f"\ntrain.py: stopped; {goes_on()}")
        raise
    except ValueError:
        take_back(args, out)
        raise
    except OSError as error:                            # a full disk, say
        raise OSError(f"{one_line(error)}; once that is mended, {goes_on()}") from error
    except RuntimeError as error:
        if not another_died(error):
            raise
        raise OSError(f"{ANOTHER_DIED}; {goes_on()}") from error


ANOTHER_DIED = "another rank has died, its own last lines say of what"


def another_died(error: RuntimeError) -> bool:
    """Whether a collective failed because a rank has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def take_back(args, out: Path) -> None:
    """Removes what a run wrote that failed before its first step: the folder can be used again."""
    if ranks()[0] or args.resume or any(rows(out / "metrics.jsonl")):
        return
    shutil.rmtree(out / "evaluation" / "before", ignore_errors=True)
    for name in ("config.json", "metrics.jsonl", "samples.jsonl"):
        (out / name).unlink(missing_ok=True)
    for folder in (out / "evaluation", out / "checkpoints", out):
        with suppress(OSError):                         # it holds something else
            folder.rmdir()
