"""AdamW on a GPU, as training/adamw.py defines it: one Triton kernel for a tensor.

torch takes 13 launches for a bf16 weight with its remainder: to join the master, for the step, to
split the master again. Here each number is read and written once, 28 bytes of a bf16 weight's.
"""

import triton
import triton.language as tl

BLOCK = 1024                                            # numbers of a program


@triton.jit
def adamw_kernel(weight, master, gradient, exp_avg, exp_avg_sq, count, scale, step_size, root,
                 BETA_1: tl.constexpr, BETA_2: tl.constexpr, EPS: tl.constexpr,
                 SPLIT: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr):
    """A step of BLOCK of `count` numbers. Grid (blocks,).

    SPLIT: weight and master are int16, a bf16 number's bits and its remainder; else master is fp32,
    and COPY says whether weight is another tensor, to be written too. step_size: learning rate over
    the first moment's bias correction; root: of the second's.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    if SPLIT:
        upper = tl.load(weight + at, mask=inside, other=0).to(tl.int32)
        bits = (upper << 16) + tl.load(master + at, mask=inside, other=0).to(tl.int32)
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = tl.load(master + at, mask=inside, other=0.0)
    g = tl.load(gradient + at, mask=inside, other=0.0) * scale
    mean = tl.load(exp_avg + at, mask=inside, other=0.0)
    square = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    mean += (1 - BETA_1) * (g - mean)
    square = BETA_2 * square + (1 - BETA_2) * g * g
    value -= step_size * mean / (tl.sqrt(square) / root + EPS)
    tl.store(exp_avg + at, mean, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)
    if SPLIT:
        bits = value.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        tl.store(weight + at, upper.to(tl.int16), mask=inside)
        tl.store(master + at, (bits - (upper << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(master + at, value, mask=inside)
        if COPY:
            tl.store(weight + at, value.to(weight.dtype.element_ty), mask=inside)


def triton_adamw(weight, state, gradient, step, learning_rate, scale, betas, eps):
    """One step, the `step`-th, with scale * gradient (fp32), of a weight in bf16 with a
    `remainder`, in fp16 with a `master`, or in fp32; all contiguous."""
    assert weight.is_contiguous() and gradient.is_contiguous()
    count, split = weight.numel(), "remainder" in state
    master = state.get("remainder", state.get("master", weight))
    if split:
        weight = weight.view(master.dtype)              # bits
    if count:
        adamw_kernel[triton.cdiv(count, BLOCK),](
            weight, master, gradient, state["exp_avg"], state["exp_avg_sq"], count, scale,
            learning_rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5, BETA_1=betas[0],
            BETA_2=betas[1], EPS=eps, SPLIT=split, COPY="master" in state, BLOCK=BLOCK)
