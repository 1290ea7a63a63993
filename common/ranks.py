"""The processes of torchrun: who this one is, and what they tell each other."""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist


def join(device: str) -> None:
    """Meets the other ranks of torchrun, if there are any: gloo on CPUs, NCCL on GPUs.

    device: this process's. After a restart torchrun hands out the same store. Its keys then get the
    number of the restart, or gloo would meet the dead.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world = next(dist.rendezvous("env://"))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"life {restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                            timeout=timedelta(hours=12))  # others wait while rank 0 evaluates


def refuse_several() -> None:
    """Raises ValueError where torchrun has started several processes of a program that is one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun would do the same several times: start it with python")


def ranks() -> tuple[int, int]:
    """(this process's rank, how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def summed(numbers: Iterable[float]) -> list[float]:
    """Each number summed over all ranks, in float64."""
    total = torch.tensor([float(x) for x in numbers], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def from_first(value):
    """Rank 0's value, on all ranks: what they must agree on, whatever each has found."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]
