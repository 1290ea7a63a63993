"""Rotary positions and the MLP's gate on a GPU, as kernels/elementwise.py defines them, in Triton.

A layer's forward so has 3 launches in place of 18: torch takes 8 for each of q and k, and 2 for the
gate. Each kernel reads its inputs once, computes in fp32 and rounds once. Left out: RMSNorm, for
which torch has a kernel.
"""

import torch
import triton
import triton.language as tl

from kernels.triton_linear_logprob import _round

BLOCK = 1024                                            # numbers of a program


@triton.jit
def rotate_kernel(x, table, out, heads, stride_n, stride_h, direction, HALF: tl.constexpr,
                  BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_H heads of one token. Grid (N, blocks of heads); HALF: of the numbers of a head."""
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    inside = (h < heads) & (d < HALF)
    at = x + n * stride_n + h * stride_h + d
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    angles = table + n * 2 * HALF + d
    cos = tl.load(angles, mask=d < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=d < HALF, other=0.0) * direction
    to = out + (n * heads + h) * 2 * HALF + d
    tl.store(to, _round(a * cos - b * sin, out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, _round(b * cos + a * sin, out.dtype.element_ty), mask=inside)


@triton.jit
def _share(gate, SILU: tl.constexpr):
    """(s, its derivative) with act(gate) = gate * s: the sigmoid of a polynomial in gate."""
    if SILU:
        share = tl.sigmoid(gate)
        slope = share * (1 - share)
    else:                       # tanh(y) = 2 sigmoid(2 y) - 1; 1.5957... = 2 sqrt(2 / pi)
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        slope = share * (1 - share)
        steep = 1.5957691216057308 * (1 + 0.134145 * gate * gate)       # inf where gate is huge
        slope = tl.where(slope == 0, 0.0, slope * steep)
    return share, slope


@triton.jit
def gated_kernel(gate, up, out, D, stride_gate, stride_up, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of one row. Grid (N, blocks of D)."""
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + n * stride_gate + d, mask=d < D, other=0.0).to(tl.float32)
    u = tl.load(up + n * stride_up + d, mask=d < D, other=0.0).to(tl.float32)
    share, _ = _share(g, SILU)
    tl.store(out + n * D + d, _round(g * share * u, out.dtype.element_ty), mask=d < D)


@triton.jit
def gated_backward_kernel(grad, gate, up, grad_gate, grad_up, D, SILU: tl.constexpr,
                          BLOCK: tl.constexpr):
    """The gradients of both; all [N, D], contiguous. Grid (N, blocks of D)."""
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = n * D + d, d < D
    dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    share, slope = _share(g, SILU)
    dg = dy * u * (share + g * slope)
    tl.store(grad_gate + at, _round(dg, grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, _round(dy * g * share, grad_up.dtype.element_ty), mask=inside)


def triton_rotate(x, table, direction):
    """x [N, heads, D] turned by table [N, 1, D] fp32, contiguous; direction -1 turns it back."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (N, heads, D), out = x.shape, x.new_empty(x.shape)
    width = triton.next_power_of_2(D // 2)
    rows = min(triton.next_power_of_2(heads), max(1, BLOCK // width))
    if x.numel():
        rotate_kernel[N, triton.cdiv(heads, rows)](
            x, table, out, heads, *x.stride()[:2], direction, HALF=D // 2, BLOCK_H=rows,
            BLOCK_D=width)
    return out


def triton_gated(gate, up, activation):
    """act(gate) * up, both [N, D] with rows of any stride."""
    gate, up = (x if x.stride(-1) == 1 else x.contiguous() for x in (gate, up))
    (N, D), out = gate.shape, gate.new_empty(gate.shape)
    if gate.numel():
        gated_kernel[N, triton.cdiv(D, BLOCK)](gate, up, out, D, gate.stride(0), up.stride(0),
                                               SILU=activation == "silu", BLOCK=BLOCK)
    return out


def triton_gated_backward(grad, gate, up, activation):
    """The gradients of gate and up; all [N, D]."""
    grad, gate, up = (x.contiguous() for x in (grad, gate, up))
    (N, D), out = gate.shape, (torch.empty_like(gate), torch.empty_like(up))
    if gate.numel():
        gated_backward_kernel[N, triton.cdiv(D, BLOCK)](
            grad, gate, up, *out, D, SILU=activation == "silu", BLOCK=BLOCK)
    return out
