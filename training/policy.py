"""What is trained: the model that samples and trains, with fp32 master weights and AdamW behind it.

The policy is one model in the compute dtype, so its log-probs as sampler and as trainer agree up to
rounding. AdamW steps on fp32 masters: bf16 has too few digits to take a step of 1e-5. What they
take beside the model: training/adamw.py.

Over ranks, every rank samples, so every rank needs the whole model in the compute dtype. It trains
on that copy too. What is sharded (ZeRO, arXiv 1910.02054) is the rest. Each of `shard` ranks keeps
the masters and moments of its rows of every weight, and steps on them; further ranks repeat this.
With P parameters in bf16 a rank holds 2P + 4P (gradients, summed in fp32) + 10P / shard bytes.
Gradients meet once a step, as a reduce-scatter. No collective stands in a branch that ranks can
take differently.

Left out: FSDP2. It would gather each layer in each forward and backward, and the sampler holds the
whole model anyway. So a model must fit a rank in the compute dtype.
"""

import math
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

from common.ranks import ranks
from model import Transformer
from training.adamw import AdamW

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may save too

GROWTH = 200        # steps without an overflow before fp16's loss scale doubles
MAX_LOSS_SCALE = 2.0 ** 24
SHARDED = Replicate(), Shard(0)


class Policy:
    """A model in the compute dtype, its gradients summed in fp32, and AdamW.

    shard: ranks that share one copy of masters and moments (0: all). eight_bit: moments.

    fp16 holds no number below 6e-8. So losses are scaled up before the backward pass and gradients
    down after it (Micikevicius et al., arXiv 1710.03740). A step whose gradients overflow is
    skipped and the scale halved; it doubles after GROWTH good steps.
    """

    def __init__(self, model: Transformer, learning_rate: float, warmup: int, shard: int = 0,
                 eight_bit: bool = False):
        self.model, self.learning_rate, self.warmup = model, learning_rate, warmup
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = zip(*trained, strict=True)
        self.scaled = model.dtype == torch.float16
        self.loss_scale = 2.0 ** 16 if self.scaled else 1.0
        self.good_steps, self.skipped = 0, 0
        world, self.mesh = ranks()[1], None
        if world > 1:
            shard = shard or world
            self.mesh = init_device_mesh(model.device.type, (world // shard, shard),
                                         mesh_dim_names=("replicate", "shard"))
        self.optimizer = AdamW([self.own(p) for p in self.parameters], eight_bit)
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)     # whole, fp32

    def own(self, p: Tensor) -> Tensor:
        """A view of the rows that this rank steps on: Shard(0)'s."""
        p = p.detach()
        if not self.mesh:
            return p
        rows = -(-len(p) // self.mesh.size(1))
        first = self.mesh.get_local_rank("shard") * rows
        return p[first:first + rows]

    def over_ranks(self, x: Tensor, placements: tuple, like: Tensor) -> Tensor:
        """This rank's part of a tensor with the rows of `like` as a DTensor; itself on one rank."""
        if not self.mesh:
            return x
        shape = torch.Size([len(like), *x.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, self.mesh, placements, run_check=False, shape=shape,
                                  stride=stride)

    def backward(self, loss: Tensor) -> None:
        """Adds each gradient to its sum as soon as it is there, so no two are kept.

        The sum is in fp32: bf16 would round each sum of micro-batches.
        """
        hooks = [p.register_post_accumulate_grad_hook(partial(self.add_up, i))
                 for i, p in enumerate(self.parameters)]
        try:
            (loss * self.loss_scale).backward()
        finally:
            for hook in hooks:
                hook.remove()

    def add_up(self, i: int, p: Tensor) -> None:
        if self.gradients[i] is None:
            self.gradients[i] = p.grad.float()
        else:
            self.gradients[i].add_(p.grad)
        p.grad = None

    def reduced(self) -> list[Tensor | None]:
        """This rank's rows of the gradients, summed over ranks. A rank without one adds zeros."""
        summed_up, self.gradients = self.gradients, [None] * len(self.gradients)
        if not self.mesh:
            return summed_up
        for i, p in enumerate(self.parameters):
            mine = summed_up[i]
            if mine is None:
                mine = torch.zeros_like(p, dtype=torch.float32)
            total = self.over_ranks(mine, (Partial(), Partial()), p)
            summed_up[i] = total.redistribute(placements=SHARDED).to_local()
        return summed_up

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Clips, steps, gathers the model. Returns the gradient's norm.

        A norm that is not finite changes no weight. Nor does one of 0: a batch without a gradient
        must not step on momentum alone.
        """
        gradients = self.reduced()
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        if self.mesh:
            squares = norm.square()
            dist.all_reduce(squares, group=self.mesh.get_group("shard"))
            norm = squares.sqrt()
        norm = norm.item() / self.loss_scale
        if math.isfinite(norm) and norm > 0:
            warm = min(1.0, (self.optimizer.steps + 1) / max(1, self.warmup))
            scale = min(1.0, max_norm / (norm + 1e-6)) / self.loss_scale
            self.optimizer.step(gradients, self.learning_rate * warm, scale)
            self.gather()
        if norm:  # a batch without a gradient says nothing about the scale
            self.rescale(math.isfinite(norm))
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
    def gather(self) -> None:
        """Each rank's rows to all."""
        if self.mesh:
            for p, own in zip(self.parameters, self.optimizer.weights, strict=True):
                p.copy_(self.over_ranks(own, SHARDED, p).full_tensor())

    def check_finite(self) -> None:
        """Raises ValueError before weights are saved that are not finite, on all ranks alike."""
        if not all(p.isfinite().all() for p in self.parameters):
            raise ValueError("the weights are no longer finite and are not saved: lower "
                             "--learning-rate, and go on from the last checkpoint with --resume")

    def state(self) -> dict:
        """Everything a step changes, by name: the tensors themselves. But a rank's rows of weights
        are copies, since torch's background save takes no views."""
        state = {"steps": self.optimizer.steps}
        if self.scaled:
            state |= {"loss_scale": self.loss_scale, "good_steps": self.good_steps}
        for name, p, own, more in zip(self.names, self.parameters, self.optimizer.weights,
                                      self.optimizer.state, strict=True):
            tensors = {"weight": own.clone() if self.mesh else own, **more}
            state[name] = {key: self.over_ranks(x, SHARDED, p) for key, x in tensors.items()}
        return state

    def restored(self, state: dict) -> None:
        """After `state()` has been filled from a checkpoint."""
        self.optimizer.steps = state["steps"]
        if self.scaled:
            self.loss_scale, self.good_steps = state["loss_scale"], state["good_steps"]
        for name, own in zip(self.names, self.optimizer.weights, strict=True):
            if self.mesh:
                own.copy_(state[name]["weight"].to_local())
        self.gather()
