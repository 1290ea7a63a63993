"""What is trained: fp32 master weights and AdamW behind the model that samples and trains.

The policy is one model in the compute dtype, so its log-probs as sampler and as trainer agree up to
rounding. AdamW steps on fp32 masters: bf16 has too few digits to take a step of 1e-5.

Over ranks, every rank samples, so every rank needs the whole model in the compute dtype. It trains
on that copy too. What is sharded (ZeRO, arXiv 1910.02054) is the rest. Masters and AdamW's moments
are DTensors, split along their first dimension over `shard` ranks and replicated over the others.
With P parameters in bf16 a rank holds 2P + 6P (gradients, and their sum in fp32) + 12P / shard
bytes. Gradients meet once a step, as a reduce-scatter. No collective stands in a branch that ranks
can take differently.

Left out: FSDP2. It would gather each layer in each forward and backward, and the sampler holds the
whole model anyway. So a model must fit a rank in the compute dtype.
"""

import math
import os
import warnings
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from model import Transformer

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may save too

# --------------------------------------------------------------------------------------------------
# Ranks


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


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


# --------------------------------------------------------------------------------------------------
# The weights

GROWTH = 200        # steps without an overflow before fp16's loss scale doubles
MAX_LOSS_SCALE = 2.0 ** 24


class Policy:
    """A model in the compute dtype with fp32 masters, fp32 gradients and AdamW behind it.

    In fp32 on one rank the masters are the model's own parameters and nothing is copied.
    shard: ranks that share one copy of the masters (0: all).

    fp16 holds no number below 6e-8. So losses are scaled up before the backward pass and gradients
    down after it (Micikevicius et al., arXiv 1710.03740). A step whose gradients overflow is
    skipped and the scale halved; it doubles after GROWTH good steps.
    """

    def __init__(self, model: Transformer, learning_rate: float, warmup: int, shard: int = 0):
        self.model, self.learning_rate, self.warmup, self.steps = model, learning_rate, warmup, 0
        self.names, self.parameters = zip(*model.named_parameters(), strict=True)
        self.scaled = model.dtype == torch.float16
        self.loss_scale = 2.0 ** 16 if self.scaled else 1.0
        self.good_steps, self.skipped = 0, 0
        world = ranks()[1]
        self.copies = model.dtype != torch.float32 or world > 1
        self.masters = list(self.parameters)
        if self.copies:
            self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        if world > 1:
            shard = shard or world
            self.mesh = init_device_mesh(model.device.type, (world // shard, shard),
                                         mesh_dim_names=("replicate", "shard"))
            self.masters = [distribute_tensor(m, self.mesh, [Replicate(), Shard(0)],
                                              src_data_rank=None) for m in self.masters]
        self.gradients: list[Tensor | None] = [None] * len(self.masters)  # this rank's, whole, fp32
        self.optimizer = torch.optim.AdamW(self.masters, learning_rate, (0.9, 0.95),
                                           weight_decay=0.0, fused=True)
        for m in self.masters:  # now, not at the first step: a checkpoint is loaded in place
            self.optimizer.state[m] = {"step": torch.zeros((), device=m.device),
                                       "exp_avg": torch.zeros_like(m),
                                       "exp_avg_sq": torch.zeros_like(m)}

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients up in fp32: bf16 would round each sum of micro-batches."""
        (loss * self.loss_scale).backward()
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            if self.gradients[i] is None:
                self.gradients[i] = p.grad.float()
            else:
                self.gradients[i].add_(p.grad)
            p.grad = None

    def reduce(self) -> None:
        """Gives the masters the gradient summed over ranks. A rank without one adds zeros."""
        for i, (master, p) in enumerate(zip(self.masters, self.parameters, strict=True)):
            master.grad, self.gradients[i] = self.gradients[i], None
            if self.scaled and master.grad is not None:
                master.grad.div_(self.loss_scale)
            if isinstance(master, DTensor):
                mine = master.grad
                if mine is None:
                    mine = torch.zeros_like(p, dtype=torch.float32)
                total = DTensor.from_local(mine, self.mesh, [Partial(), Partial()], run_check=False)
                master.grad = total.redistribute(placements=master.placements)

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Clips, steps, refreshes the model. Returns the gradient's norm.

        A norm that is not finite changes no weight. Nor does one of 0: a batch without a gradient
        must not step on momentum alone.
        """
        self.reduce()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.masters, max_norm)).item()
        if math.isfinite(norm) and norm > 0:
            self.steps += 1
            warm = min(1.0, self.steps / max(1, self.warmup))
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * warm
            self.optimizer.step()
            self.refresh()
        if norm:  # a batch without a gradient says nothing about the scale
            self.rescale(math.isfinite(norm))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def rescale(self, finite: bool) -> None:
        """Counts what is skipped, and gives fp16 its next scale. Ranks agree: their norm is one."""
        self.skipped += not finite
        self.good_steps = self.good_steps + 1 if finite else 0
        if self.scaled and not finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.scaled and self.good_steps % GROWTH == 0:
            self.loss_scale = min(MAX_LOSS_SCALE, 2 * self.loss_scale)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the masters into the model, gathered in its dtype."""
        if self.copies:
            for p, master in zip(self.parameters, self.masters, strict=True):
                p.copy_(whole(master.to(p.dtype)))

    def check_finite(self) -> None:
        """Raises ValueError before weights are saved that are not finite, on all ranks alike."""
        if not all(p.isfinite().all() for p in self.parameters):
            raise ValueError("the weights are no longer finite and are not saved: lower "
                             "--learning-rate, and go on from the last checkpoint with --resume")

    def state(self) -> dict:
        """Everything a step changes, by name: the tensors themselves, not copies."""
        state = {"steps": self.steps, "masters": dict(zip(self.names, self.masters, strict=True))}
        if self.scaled:
            state |= {"loss_scale": self.loss_scale, "good_steps": self.good_steps}
        for key in ("exp_avg", "exp_avg_sq"):
            moments = (self.optimizer.state[m][key] for m in self.masters)
            state[key] = dict(zip(self.names, moments, strict=True))
        return state

    def restored(self, state: dict) -> None:
        """After `state()` has been filled from a checkpoint."""
        self.steps = state["steps"]
        if self.scaled:
            self.loss_scale, self.good_steps = state["loss_scale"], state["good_steps"]
        for m in self.masters:
            self.optimizer.state[m]["step"].fill_(self.steps)
        self.refresh()
