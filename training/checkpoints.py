"""Checkpoints: folders step-N with masters, moments and counters, whole or not at all.

Each rank writes its shards (torch.distributed.checkpoint). A manifest of the files' sizes is
written last, and then the folder is renamed into place. What a kill has torn is passed over.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from common.command import note, one_line
from common.files import sync, write_atomically
from common.ranks import ranks, wait
from training.policy import Policy


class Checkpoints:
    """The checkpoints of one run; those older than the last `keep` are removed.

    background: write while training goes on, from a copy of the state in the host's memory.
    """

    def __init__(self, folder: Path, keep: int, background: bool = False):
        self.folder, self.keep = folder, keep
        self.thread = ThreadPoolExecutor(1) if background else None
        self.writing: Future | None = None
        self.group = None  # its collectives cannot be mixed up with those of the step
        if background and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")

    def load(self, policy: Policy) -> int:
        """Restores the newest whole checkpoint and returns its step, 0 if there is none.

        Another number of ranks may have written it. The run then goes on equal up to the order of
        summation (with `--minibatches`: with other parts). Raises ValueError where it is of another
        model, or where there are checkpoints and none is whole.
        """
        found = by_step(self.folder)
        for checkpoint in reversed(found):
            step = finished(checkpoint)
            if step is None:
                note(f"{checkpoint} cannot be read: it is torn; trying the one before")
                continue
            state = policy.state()
            try:
                dcp.load(state, checkpoint_id=checkpoint)
            except dcp.api.CheckpointException as failed:
                raise ValueError(f"{checkpoint} does not fit this model, or is broken "
                                 f"({one_line(first_error(failed))}): put its model or its files "
                                 "back, or remove it to go on from the one before") from failed
            policy.restored(state)
            return step
        if found:
            raise ValueError(f"no checkpoint in {self.folder} is whole: put their files back, or "
                             "remove them all to begin again")
        return 0

    def save(self, policy: Policy, step: int) -> None:
        """Writes step-N. In the background only the copy of the state is waited for."""
        policy.check_finite()
        self.finish()
        part = self.folder / f".step-{step:06d}.part"
        if ranks()[0] == 0:
            for torn in self.folder.glob(".step-*.part"):
                shutil.rmtree(torn)
            part.mkdir(parents=True)
        wait()
        if not self.thread:
            self.commit(part, step, lambda: dcp.save(policy.state(), checkpoint_id=part))
            return
        written = dcp.async_save(policy.state(), checkpoint_id=part, process_group=self.group)
        self.writing = self.thread.submit(self.commit, part, step, written.result)

    def commit(self, part: Path, step: int, written: Callable) -> None:
        """Gives a folder its manifest and its name once it is written, and removes older ones.

        Raises OSError where it could not be written, on a full disk say, and removes what is torn.
        """
        try:
            written()
        except dcp.api.CheckpointException as failed:   # a BaseException, with each rank's own
            shutil.rmtree(part, ignore_errors=True)
            error = first_error(failed)
            raise OSError(f"{part} could not be written ({one_line(error)})") from error
        if ranks()[0]:
            return
        target = self.folder / f"step-{step:06d}"
        sizes = {file.name: file.stat().st_size for file in part.iterdir()}
        write_atomically(part / "manifest.json", json.dumps({"step": step, "sizes": sizes}))
        shutil.rmtree(target, ignore_errors=True)  # a torn one of the same step
        part.rename(target)
        sync(self.folder)
        there = by_step(self.folder)
        kept = [checkpoint for checkpoint in there if finished(checkpoint) is not None]
        for old in set(there) - set(kept[-self.keep:]):  # torn ones too
            shutil.rmtree(old)

    def finish(self) -> None:
        """Waits for what is being written in the background; raises what went wrong there."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def check_disk(self, policy: Policy) -> None:
        """Raises ValueError where the run's checkpoints and its model would not fit on the disk."""
        there = sum(finished(checkpoint) is not None for checkpoint in by_step(self.folder))
        more = self.keep + 1 - min(self.keep, there)  # one more while it is written
        weights = sum(p.nbytes for p in policy.parameters)
        beside = sum(x.nbytes for state in policy.optimizer.state for x in state.values())
        shards = policy.mesh.size(1) if policy.mesh else 1
        model = sum(p.nbytes for p in policy.model.parameters())
        needed = more * (weights + shards * beside) + model
        free = shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise ValueError(f"{self.folder.parent}: its checkpoints and model need "
                             f"{needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free: "
                             "make room, or lower --keep")


def first_error(failed: BaseException) -> Exception:
    """Of a CheckpointException, what went wrong on one rank. Raises Ctrl-C again."""
    error, _ = next(iter(failed.failures.values()))
    if not isinstance(error, Exception):
        raise error from None
    return error


def by_step(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the oldest first, whole or torn."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint, 0 if there is none."""
    return max((finished(checkpoint) or 0 for checkpoint in by_step(folder)), default=0)


def finished(checkpoint: Path) -> int | None:
    """The step of a checkpoint whose files are all there at their sizes, else None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        sizes = manifest["sizes"].items()
        complete = all((checkpoint / name).stat().st_size == size for name, size in sizes)
        return manifest["step"] if complete else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
