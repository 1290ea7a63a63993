"""What is trained: fp32 master weights and AdamW behind the model that samples and trains, over ranks, and on disk.

The policy is one model in the compute dtype; its log-probs as sampler and as trainer agree up to rounding. AdamW steps
on fp32 masters, since bf16 has too few digits to take a step of 1e-5.

Over ranks: every rank samples, so every rank needs the whole model in the compute dtype, and it trains on that copy.
What is sharded (ZeRO, arXiv 1910.02054) is the rest: masters and AdamW's moments are DTensors, split along their first
dimension over `shard` ranks and replicated over the others (a hybrid mesh: shard within a node, replicate across).
With P parameters in bf16 a rank holds 2P + 6P (gradients, and their sum in fp32) + 12P / shard bytes. Gradients meet
once a step, as a reduce-scatter; no collective stands in a branch that ranks can take differently.

FSDP2 would gather each layer in each forward and backward, only to have what the sampler holds anyway. So it is left
out, and with it models that do not fit a rank in the compute dtype.
"""

import json
import math
import os
import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from model import Transformer, pack

warnings.filterwarnings("ignore", "torch.distributed is disabled")              # one process may save a checkpoint too

# ----------------------------------------------------------------------------------------------------------------------
# Ranks


def join(device: str) -> None:
    """Meets the other ranks of torchrun, if there are any: gloo on CPUs, NCCL on GPUs. device: this process's.

    After a restart torchrun hands out the same store; its keys get the life's number, or gloo would meet the dead.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timedelta(hours=12))      # others wait while rank 0 evaluates


def ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def gathered(x: Tensor) -> Tensor:
    """x of every rank, concatenated along the first dimension. Shapes must agree."""
    if ranks()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(ranks()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


# ----------------------------------------------------------------------------------------------------------------------
# The weights

GROWTH = 200                                            # steps without an overflow before fp16's loss scale doubles
MOST = 2.0 ** 24                                        # of the loss scale


class Policy:
    """A model in the compute dtype with fp32 masters, fp32 gradients and AdamW behind it.

    In fp32 on one rank the masters are the model's own parameters and nothing is copied. shard: ranks that share one
    copy of the masters (default: all).

    fp16 holds no number below 6e-8, so its losses are scaled up before the backward pass and the gradients down after
    it (Micikevicius et al., arXiv 1710.03740). A step whose gradients overflow is skipped, and the scale halved; it
    doubles after GROWTH good steps.
    """

    def __init__(self, model: Transformer, learning_rate: float, warmup: int, shard: int = 0):
        self.model, self.learning_rate, self.warmup, self.steps = model, learning_rate, warmup, 0
        self.names, self.parameters = zip(*model.named_parameters(), strict=True)
        world = ranks()[1]
        self.scaled = model.dtype == torch.float16
        self.loss_scale, self.good_steps, self.skipped = 2.0 ** 16 if self.scaled else 1.0, 0, 0
        self.copies = model.dtype != torch.float32 or world > 1
        self.masters = list(self.parameters)
        if self.copies:
            self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        if world > 1:
            shard = shard or world
            self.mesh = init_device_mesh(model.device.type, (world // shard, shard),
                                         mesh_dim_names=("replicate", "shard"))
            self.masters = [distribute_tensor(m, self.mesh, [Replicate(), Shard(0)], src_data_rank=None)
                            for m in self.masters]
        self.gradients: list[Tensor | None] = [None] * len(self.masters)        # this rank's, whole, fp32
        self.optimizer = torch.optim.AdamW(self.masters, learning_rate, (0.9, 0.95), weight_decay=0.0, fused=True)
        for m in self.masters:                          # now rather than at the first step: a checkpoint loads in place
            self.optimizer.state[m] = {"step": torch.zeros((), device=m.device), "exp_avg": torch.zeros_like(m),
                                       "exp_avg_sq": torch.zeros_like(m)}

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients up in fp32: micro-batches must not be summed in bf16."""
        (loss * self.loss_scale).backward()
        for i, p in enumerate(self.parameters):
            if p.grad is not None:
                self.gradients[i] = p.grad.float() if self.gradients[i] is None else self.gradients[i].add_(p.grad)
                p.grad = None

    def reduce(self) -> None:
        """Gives the masters the gradient summed over ranks; one that had nothing to train on takes part with zeros."""
        for i, (master, p) in enumerate(zip(self.masters, self.parameters, strict=True)):
            master.grad, self.gradients[i] = self.gradients[i], None
            if self.scaled and master.grad is not None:
                master.grad.div_(self.loss_scale)
            if isinstance(master, DTensor):
                own = torch.zeros_like(p, dtype=torch.float32) if master.grad is None else master.grad
                summed = DTensor.from_local(own, self.mesh, [Partial(), Partial()], run_check=False)
                master.grad = summed.redistribute(placements=master.placements)

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Clips, steps, refreshes the model. Returns the gradient's norm; one that is not finite changes no weight."""
        self.reduce()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.masters, max_norm)).item()
        if math.isfinite(norm) and norm > 0:            # a batch without a gradient must not step on momentum alone
            self.steps += 1
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * min(1.0, self.steps / max(1, self.warmup))
            self.optimizer.step()
            self.refresh()
        if norm:                                        # a flat batch says nothing of the scale
            self.rescale(math.isfinite(norm))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def rescale(self, finite: bool) -> None:
        """Counts what is skipped, and gives fp16 its next scale: the same on all ranks, since their norm is."""
        self.skipped += not finite
        self.good_steps = self.good_steps + 1 if finite else 0
        if self.scaled and not finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.scaled and self.good_steps % GROWTH == 0:
            self.loss_scale = min(MOST, 2 * self.loss_scale)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the masters into the model, gathered in its dtype."""
        if self.copies:
            for p, master in zip(self.parameters, self.masters, strict=True):
                p.copy_(whole(master.to(p.dtype)))

    def state(self) -> dict:
        """Everything a step changes, by name: the tensors themselves, not copies."""
        moments = {key: [self.optimizer.state[m][key] for m in self.masters] for key in ("exp_avg", "exp_avg_sq")}
        scale = {name: getattr(self, name) for name in ("loss_scale", "good_steps")} if self.scaled else {}
        return {"steps": self.steps, **scale} | {key: dict(zip(self.names, tensors, strict=True))
                                        for key, tensors in {"masters": self.masters, **moments}.items()}

    def restored(self, state: dict) -> None:
        """After `state()` has been filled from a checkpoint."""
        self.steps = state["steps"]
        if self.scaled:
            self.loss_scale, self.good_steps = state["loss_scale"], state["good_steps"]
        for m in self.masters:
            self.optimizer.state[m]["step"].fill_(self.steps)
        self.refresh()


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def activation_bytes(model: Transformer, prompt: int, completions: int, new_tokens: int) -> float:
    """Bytes a packed token keeps for the backward, counted on a forward of one such group: storages, each once.

    Of the group's own shape, since attention may keep its scores: their number grows with the square of the length.
    """
    own, saved, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)                                  # alive, or the next one would get its address
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    packed = pack([([0] * prompt, [[0] * new_tokens] * completions)], model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(packed.input_ids, packed.position_ids, packed.attend)
    return sum(size for at, size in saved.items() if at not in own) / len(packed.input_ids)


def memory(policy: Policy, slots: int, micro_tokens: int, prompt: int, completions: int, new_tokens: int,
           overlap: bool = False, background: bool = False, others: list[Transformer] = ()) -> dict:
    """Estimated bytes by part, on this rank, and their `peak`: the larger of sampling (`slots` rows) and training
    (`micro_tokens` packed tokens, the longest group at least), or both with `overlap`, beside what is always there.
    Checkpoints in the `background` hold a copy of the state in the host's memory. others: models beside the policy."""
    model, c = policy.model, policy.model.c
    count, size = sum(p.numel() for p in policy.parameters), model.dtype.itemsize
    local = sum((m.to_local() if isinstance(m, DTensor) else m).numel() for m in policy.masters)
    per_token = activation_bytes(model, prompt, completions, new_tokens)
    parts = {"weights": count * size, "masters": 4 * local * policy.copies, "AdamW": 8 * local,
             "gradients": count * (4 + size),           # their sum, and a micro-batch's
             "activations": round(max(micro_tokens, prompt + completions * new_tokens) * per_token),
             "cache": 2 * slots * (prompt + new_tokens) * c.num_layers * c.num_kv_heads * c.head_dim * size}
    if background and model.device.type == "cpu":
        parts["checkpoint"] = 12 * local
    if overlap:
        parts["copy"] = parts["weights"]
    if others:
        parts["others"] = sum(p.numel() * p.itemsize for model in others for p in model.parameters())
    # The CPU's sampler has rearranged weights. Elsewhere a cache that grows is there twice.
    sampling = parts["cache"] + parts["weights" if model.device.type == "cpu" else "cache"]
    training = parts["gradients"] + parts["activations"]
    always = sum(parts.get(name, 0) for name in ("weights", "masters", "AdamW", "checkpoint", "copy", "others"))
    return parts | {"peak": always + (sampling + training if overlap else max(sampling, training))}


def fitted(policy: Policy, limit: float, slots: int, *group: int, **flags) -> int:
    """The most packed tokens a micro-batch may have within `limit` bytes; ValueError where even one group (prompt,
    completions, new_tokens) or the sampler's cache does not fit. flags: as of `memory`."""
    least = memory(policy, slots, 0, *group, **flags)
    if least["peak"] > limit:
        raise ValueError(f"--memory {limit / 1e9:.4g} is too little: about {least['peak'] / 1e9:.2f} GB are needed; "
                         "try --recompute, a smaller --group-size, --max-new-tokens or --slots, or more ranks")
    prompt, completions, new_tokens = group
    room = limit - least["peak"] + least["activations"]
    return int(room / least["activations"] * (prompt + completions * new_tokens))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: step-N/, with a manifest of its files' sizes, whole or not at all


def save_checkpoint(policy: Policy, folder: Path, step: int, keep: int, background: bool = False) -> Future | None:
    """Writes folder/step-N, every rank its shards; then older ones beyond `keep` are removed.

    In the background only a copy of the state is awaited. Ask the future for its result before the next checkpoint.
    """
    target = folder / f"step-{step:06d}"
    part = folder / f".{target.name}.part"
    if ranks()[0] == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait()

    def commit(written: Future | None = None) -> None:
        if written:
            written.result()
        if ranks()[0] == 0:                             # all ranks' files are there, flushed to the disk
            sizes = {file.name: file.stat().st_size for file in part.iterdir()}
            (part / "manifest.json").write_text(json.dumps({"step": step, "sizes": sizes}))
            shutil.rmtree(target, ignore_errors=True)   # a torn one of the same step
            part.rename(target)
            there = sorted(folder.glob("step-*"))
            kept = [checkpoint for checkpoint in there if finished(checkpoint) is not None][-keep:]
            for old in set(there) - set(kept):          # torn ones too
                shutil.rmtree(old)

    if not background:
        dcp.save(policy.state(), checkpoint_id=part)
        return commit()
    group, thread = background_writer()
    return thread.submit(commit, dcp.async_save(policy.state(), checkpoint_id=part, process_group=group))


@cache
def background_writer() -> tuple[dist.ProcessGroup | None, ThreadPoolExecutor]:
    """A group whose collectives can't get mixed up with the step's, and the thread that commits."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None, ThreadPoolExecutor(1)


def load_checkpoint(policy: Policy, folder: Path) -> int:
    """Restores the newest whole checkpoint and returns its step, 0 if there is none. Also one that another number of
    ranks has written: the run then goes on equal up to the order of summation."""
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        step = finished(checkpoint)
        if step is None:
            print(f"{checkpoint} cannot be read: it is torn; trying the one before", file=sys.stderr)
            continue
        state = policy.state()
        dcp.load(state, checkpoint_id=checkpoint)
        policy.restored(state)
        return step
    return 0


def finished(checkpoint: Path) -> int | None:
    """The step of a checkpoint whose files are all there at their sizes, else None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        complete = all((checkpoint / name).stat().st_size == size for name, size in manifest["sizes"].items())
        return manifest["step"] if complete else None
    except (OSError, ValueError, KeyError):
        return None


def check_disk(out: Path, policy: Policy, keep: int) -> None:
    """Raises ValueError where the run's checkpoints and model would not fit."""
    parameters = sum(p.numel() for p in policy.parameters)
    there = sum(finished(checkpoint) is not None for checkpoint in (out / "checkpoints").glob("step-*"))
    more = keep + 1 - min(keep, there)                  # one more while it is written
    needed, free = (12 * more + 4) * parameters, shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(f"{out}: its checkpoints and model need {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB "
                         "are free: make room, or lower --keep")
