"""RMSNorm, rotary positions and the gate of an MLP: what a layer does between its matmuls.

Each is written in plain torch, which is the definition and runs everywhere, and in C++ for CPUs
(native.cpp), with a backward pass of its own. The last two are also in Triton for GPUs
(triton_elementwise.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native


def fused(x: Tensor) -> bool:
    """Whether rotary positions and the gate are one kernel each here."""
    return native.usable(x) or x.is_cuda and x.dtype != torch.float64


# --------------------------------------------------------------------------------------------------
# RMSNorm (Zhang and Sennrich, arXiv 1910.07467)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension, rounded once.

    x [N, D] or [N, heads, D]; weight [D].
    """
    return add_rms_norm(x, None, weight, eps, offset)[0]


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float,
                 offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(rms_norm of the sum, the sum) of x and residual, both [N, D]; the sum is x without one."""
    if weight.dtype != x.dtype or not native.usable(x):
        total = x if residual is None else x + residual
        return torch_rms_norm(total, weight, eps, offset), total
    if torch.is_grad_enabled():
        out, total = AddRMSNorm.apply(x, residual, weight, eps, offset)
    else:
        out, total, _ = native_add_rms_norm(x, residual, weight, eps, offset)
    return out, x if residual is None else total


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    if not offset:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(wide(x), weight.shape, wide(weight) + offset, eps).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def native_add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float,
                        offset: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(the norm, the sum, 1 / sqrt(mean(sum^2) + eps) of each vector in fp32)"""
    (x, N, heads, D), weight = native.rows(x), weight.contiguous()
    out, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[:-1], dtype=torch.float32)
    total = None
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    native.run("rms_norm", x.numel(), x, x, residual, weight, total, out, rstd, N, heads,
               x.stride(0), D, eps, offset)
    return out, total, rstd


class AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset):
        out, total, rstd = native_add_rms_norm(x, residual, weight, eps, offset)
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.offset, ctx.adds = offset, residual is not None
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total):
        x, weight, rstd = ctx.saved_tensors
        x, weight, D = x.contiguous(), weight.contiguous(), x.shape[-1]
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        grad_total = grad_total if grad_total is None else grad_total.contiguous()
        dx = torch.empty_like(x)
        partial = torch.zeros(torch.get_num_threads(), D, dtype=torch.float32)
        native.run("rms_norm_backward", x.numel(), x, grad, grad_total, x, weight, rstd, dx,
                   partial, x.numel() // D, D, ctx.offset)
        return dx, dx if ctx.adds else None, partial.sum(0).to(weight.dtype), None, None


# --------------------------------------------------------------------------------------------------
# Rotary positions (Su et al., arXiv 2104.09864)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x [N, heads, D] turned by table [N, 1, R] fp32: cosines [R / 2], then sines. What a head has
    beyond R numbers stays (Qwen3.5)."""
    if table.shape[-1] < x.shape[-1]:
        turned, same = x.split([table.shape[-1], x.shape[-1] - table.shape[-1]], -1)
        return torch.cat([rotate(turned, table), same], -1)
    if not fused(x):
        return torch_rotate(x, table)
    return Rotate.apply(x, table) if torch.is_grad_enabled() else fused_rotate(x, table, 1.0)


def torch_rotate(x: Tensor, table: Tensor) -> Tensor:
    (a, b), (cos, sin) = x.chunk(2, -1), table.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def fused_rotate(x: Tensor, table: Tensor, direction: float) -> Tensor:
    """Direction -1 turns back."""
    if x.is_cuda:
        from kernels.triton_elementwise import triton_rotate  # a CPU needs no triton

        return triton_rotate(x, table, direction)
    x, N, heads, D = native.rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    native.run("rotate", x.numel(), x, x, table, out, N, heads, x.stride(0), D, direction)
    return out


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table):
        ctx.table = table
        return fused_rotate(x, table, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return fused_rotate(grad, ctx.table, -1.0), None


# --------------------------------------------------------------------------------------------------
# The gate (Shazeer, arXiv 2002.05202)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, both [N, D]. activation: silu or gelu_tanh."""
    if not fused(gate):
        return torch_gated(gate, up, activation)
    if torch.is_grad_enabled():
        return Gated.apply(gate, up, activation)
    return fused_gated(gate, up, activation)


def torch_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def fused_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.is_cuda:
        from kernels.triton_elementwise import triton_gated

        return triton_gated(gate, up, activation)
    (gate, N, _, D), up = native.rows(gate), native.rows(up)[0]
    out = torch.empty(N, D, dtype=gate.dtype)
    native.run("gated", N * D, gate, gate, up, out, N, D, gate.stride(0), up.stride(0),
               int(activation == "silu"))
    return out


def fused_gated_backward(grad: Tensor, gate: Tensor, up: Tensor,
                         activation: str) -> tuple[Tensor, Tensor]:
    if gate.is_cuda:
        from kernels.triton_elementwise import triton_gated_backward

        return triton_gated_backward(grad, gate, up, activation)
    grad, gate, up = (x.contiguous() for x in (grad, gate, up))
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    native.run("gated_backward", gate.numel(), gate, grad, gate, up, dgate, dup, *gate.shape,
               int(activation == "silu"))
    return dgate, dup


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return fused_gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = fused_gated_backward(grad, *ctx.saved_tensors, ctx.activation)
        return *grads, None
