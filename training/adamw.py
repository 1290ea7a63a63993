"""AdamW on fp32 masters that take two bytes a number beside a bf16 model.

A bf16 number is the upper half of an fp32 number. So a bf16 weight and a 16-bit remainder *are* the
fp32 master, and nothing is kept twice. The weight is the master rounded to nearest, so the
remainder is signed; a tie goes away from zero, or its remainder would not fit.

fp32 weights are their own masters. fp16 weights have fp32 masters beside them.

The moments are fp32, or take 8 bits a number and a scale for each block of at most 256 (Dettmers et
al., arXiv 2110.02861), through torchao's code. A step takes a piece of a tensor at a time, so that
no tensor exists whole in a second form; on a GPU, but for 8 bits, it is one Triton kernel.
"""

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kernels import native

PIECE = 2 ** 19                 # numbers in fp32 at a time: they fit a CPU's cache
GPU_PIECE = 2 ** 22             # a piece takes some 13 launches
BETAS, EPS = (0.9, 0.95), 1e-8


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its int16 remainder."""
    if native.usable(weight):
        master = torch.empty(weight.shape)
        native.run("join", master.numel(), weight, weight, remainder, master, master.numel())
        return master
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def split(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Writes an fp32 master as a bf16 weight and an int16 remainder."""
    if native.usable(weight):
        native.run("split", master.numel(), weight, master, weight, remainder, master.numel())
        return
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    weight.copy_(upper.to(torch.int16).view(torch.bfloat16))
    remainder.copy_(bits - (upper << 16))


class AdamW:
    """weights: changed in place by `step`. `state` holds what a step changes beside them, a dict of
    tensors for each weight. eight_bit: of the moments, where a matrix's width is a multiple of 64.
    """

    def __init__(self, weights: list[Tensor], eight_bit: bool = False):
        self.weights, self.steps, self.state = weights, 0, []
        for w in weights:
            state = {}
            if w.dtype == torch.bfloat16:
                state["remainder"] = torch.zeros_like(w, dtype=torch.int16)
            elif w.dtype == torch.float16:
                state["master"] = w.float()
            for name in ("exp_avg", "exp_avg_sq"):
                if eight_bit and w.dim() == 2 and w.shape[1] % 64 == 0:
                    state[name] = torch.zeros_like(w, dtype=torch.uint8)
                    blocks = w.shape[1] // math.gcd(w.shape[1], 256)
                    state[f"{name}_scale"] = torch.zeros(len(w), blocks, device=w.device)
                else:
                    state[name] = torch.zeros_like(w, dtype=torch.float32)
            self.state.append(state)

    def step(self, gradients: list[Tensor | None], learning_rate: float, scale: float) -> None:
        """One step with scale * gradients, fp32, which it spends. None: of a weight that stays."""
        self.steps += 1
        for weight, state, gradient in zip(self.weights, self.state, gradients, strict=True):
            if gradient is None:
                continue
            if in_triton(weight, state):
                from kernels.triton_adamw import triton_adamw  # a CPU needs no triton

                triton_adamw(weight, state, gradient, self.steps, learning_rate, scale, BETAS, EPS)
                continue
            for w, s, g in pieces(weight, state, gradient):
                master = master_of(w, s)
                moments = [Moment(s, name) for name in ("exp_avg", "exp_avg_sq")]
                adamw([master], [g.mul_(scale)], [moments[0].value], [moments[1].value], [],
                      [torch.full((), self.steps - 1.0, device=w.device)], fused=True,
                      amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=learning_rate,
                      weight_decay=0.0, eps=EPS, maximize=False)
                for moment in moments:
                    moment.keep()
                if "remainder" in s:
                    split(master, w, s["remainder"])
                elif "master" in s:
                    w.copy_(master)


def in_triton(weight: Tensor, state: dict[str, Tensor]) -> bool:
    return weight.is_cuda and "exp_avg_scale" not in state


class Moment:
    """A moment in fp32: `value` is what is stored, or is stored by `keep` in 8 bits."""

    def __init__(self, state: dict[str, Tensor], name: str):
        self.stored = self.value = state[name]
        if f"{name}_scale" in state:
            from torchao.optim.subclass_8bit import OptimState8bit

            signed = name == "exp_avg"
            self.stored = OptimState8bit(state[name], state[f"{name}_scale"].flatten(),
                                         code_book(signed, state[name].device), signed)
            self.value = self.stored.dequantize()

    def keep(self) -> None:
        if self.value is not self.stored:
            self.stored.copy_(self.value)


@cache
def code_book(signed: bool, device: torch.device) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.zeros((256, 1), signed, device=device).qmap


def master_of(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "remainder" in state:
        return joined(weight, state["remainder"])
    return state.get("master", weight)


def pieces(weight: Tensor, state: dict, gradient: Tensor) -> Iterator[tuple]:
    """Views of a weight, its state and its gradient: as many rows as a piece has room for."""
    if len(weight):
        most = PIECE if weight.device.type == "cpu" else GPU_PIECE
        rows = max(1, most // weight[0].numel())
        for first in range(0, len(weight), rows):
            part = slice(first, first + rows)
            yield weight[part], {name: x[part] for name, x in state.items()}, gradient[part]
