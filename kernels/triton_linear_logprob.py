"""The log-prob and entropy of kernels/linear_logprob.py on a GPU: two Triton kernels, two library
matmuls. Mathematics: kernels/README.md.

Forward. One program owns BLOCK_N tokens and one split of the vocabulary, and walks the split in
tiles of BLOCK_V columns. A tile's logits live in registers and leave four numbers per token: the
largest logit m, s = sum exp(x - m), d = sum exp(x - m) (x - m), and the target's logit. The splits
are merged at the end, as in flash-decoding; without them 1,500 tokens would occupy 12 of the 132
processors of an H100.

Backward. For one chunk of the vocabulary at a time a kernel computes the logit tiles again. It
writes d logits, rounded to the input dtype as tensor cores take it anyway. Two library matmuls with
fp32 results follow: d hidden += d logits @ weight and d weight = d logits.T @ hidden. The chunk
fits the L2 cache. There are two alternatives. One kernel that adds its share of both gradients to
memory atomically (cut-cross-entropy) needs no chunk, but gives another result every run. Two
kernels that each compute the logits make the backward pass a third longer.

Logits are rounded to the input dtype before the softmax, as a linear layer rounds them, so that
log-probs agree with a sampler's. No gradient is skipped. `python benchmarks/compile_kernels.py`
compiles every kernel for four chips and prints registers, spills and shared memory. It needs no
GPU.
"""

import functools
import os

import torch
import triton
import triton.language as tl

from kernels.torch_linear_logprob import row_coefficients

CHUNK_BYTES = 32 * 2**20      # of d logits at once: fits the L2 of an A100 (40 MB), H100 (50 MB)
PROGRAMS = 512                # of the forward pass: about four for each processor of an H100
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOWEST = tl.constexpr(-1e30)  # below every logit; finite: exp(LOWEST - m) is 0, so is 0 * LOWEST


@triton.jit
def _round(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts bits off where a GPU rounds
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _logit_tile(hidden, weight, rows, columns, n_tokens, vocab, hidden_size,
                stride_hn, stride_hk, stride_wv, stride_wk,
                BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """Raw logits [BLOCK_N, BLOCK_V] in fp32, rounded to the input dtype."""
    k = tl.arange(0, BLOCK_K)
    # 64-bit: row * stride passes 2^31 at 256k columns x 8,192 features
    hidden_tile = hidden + rows.to(tl.int64)[:, None] * stride_hn + k[None, :] * stride_hk
    weight_tile = weight + columns.to(tl.int64)[None, :] * stride_wv + k[:, None] * stride_wk
    logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        inside = k < hidden_size - start
        h = tl.load(hidden_tile, mask=(rows < n_tokens)[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight_tile, mask=(columns < vocab)[None, :] & inside[:, None], other=0.0)
        if INTERPRETED:  # the interpreter holds bf16 in integers, and would multiply those
            h, w = h.to(tl.float32), w.to(tl.float32)
        # fp32 inputs stay fp32: tf32 keeps 10 bits
        logits = tl.dot(h, w, logits, input_precision="ieee")
        hidden_tile += BLOCK_K * stride_hk
        weight_tile += BLOCK_K * stride_wk
    return _round(logits, hidden.dtype.element_ty).to(tl.float32)


@triton.jit
def _softcap(x, softcap):
    return softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # c tanh(x / c)


@triton.jit
def forward_kernel(hidden, weight, targets, partials, n_tokens, vocab, hidden_size,
                   stride_hn, stride_hk, stride_wv, stride_wk,
                   inverse_temperature, softcap, split_columns, HAS_SOFTCAP: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """partials [splits, 4, N]: m = max, sum exp(x - m), sum exp(x - m) (x - m), target logit.
    Grid (tokens, splits)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    target = tl.load(targets + rows, mask=rows < n_tokens, other=-1).to(tl.int32)
    largest = tl.zeros((BLOCK_N,), dtype=tl.float32) + LOWEST
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dot = tl.zeros((BLOCK_N,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_N,), dtype=tl.float32)
    stop = tl.minimum((split + 1) * split_columns, vocab)
    for start in range(split * split_columns, stop, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        x = _logit_tile(hidden, weight, rows, columns, n_tokens, stop, hidden_size,
                        stride_hn, stride_hk, stride_wv, stride_wk, BLOCK_N, BLOCK_V, BLOCK_K)
        if HAS_SOFTCAP:
            x = _softcap(x, softcap)
        x = tl.where((columns < stop)[None, :], x * inverse_temperature, LOWEST)
        target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), axis=1)
        new_largest = tl.maximum(largest, tl.max(x, axis=1))
        x -= new_largest[:, None]
        exp = tl.exp(x)
        shift = largest - new_largest  # the sums so far are relative to the old maximum
        decay = tl.exp(shift)
        dot = decay * (dot + shift * total) + tl.sum(exp * x, axis=1)
        total = decay * total + tl.sum(exp, axis=1)
        largest = new_largest
    out = partials + split.to(tl.int64) * 4 * n_tokens + rows
    tl.store(out, largest, mask=rows < n_tokens)
    tl.store(out + n_tokens, total, mask=rows < n_tokens)
    tl.store(out + 2 * n_tokens, dot, mask=rows < n_tokens)
    tl.store(out + 3 * n_tokens, target_logit, mask=rows < n_tokens)


@triton.jit
def backward_kernel(hidden, weight, targets, logsumexp, slope, curve, at_target, grad_logits,
                    n_tokens, vocab, hidden_size, stride_hn, stride_hk, stride_wv, stride_wk,
                    inverse_temperature, softcap, first_column, n_columns,
                    HAS_SOFTCAP: tl.constexpr, HAS_CURVE: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """grad_logits [N, n_columns] for the words from first_column on. Grid (tokens, columns)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = first_column + local
    x = _logit_tile(hidden, weight, rows, columns, n_tokens, vocab, hidden_size,
                    stride_hn, stride_hk, stride_wv, stride_wk, BLOCK_N, BLOCK_V, BLOCK_K)
    if HAS_SOFTCAP:
        x = _softcap(x, softcap)
    real = rows < n_tokens
    log_p = x * inverse_temperature - tl.load(logsumexp + rows, mask=real, other=0.0)[:, None]
    factor = tl.load(slope + rows, mask=real, other=0.0)[:, None]
    if HAS_CURVE:
        factor += tl.load(curve + rows, mask=real, other=0.0)[:, None] * log_p
    grad = tl.exp(log_p) * factor
    target = tl.load(targets + rows, mask=real, other=-1).to(tl.int32)
    gain = tl.load(at_target + rows, mask=real, other=0.0)
    # before rounding: where p is near 1 the two terms nearly cancel
    grad += tl.where(columns[None, :] == target[:, None], gain[:, None], 0.0)
    if HAS_SOFTCAP:
        grad *= 1.0 - (x / softcap) * (x / softcap)
    out = grad_logits + rows.to(tl.int64)[:, None] * n_columns + local[None, :]
    inside = real[:, None] & (local < n_columns)[None, :]
    tl.store(out, _round(grad, grad_logits.dtype.element_ty), mask=inside)


# -----------------------------------------------------------------------------------------------
# Launching


def triton_linear_logprob(hidden, weight, targets, temperature=1.0, softcap=None):
    """As kernels.linear_logprob, which checks the arguments. A target outside [0, V) gives NaN."""
    return TritonLinearLogprob.apply(hidden, weight, targets, temperature, softcap)


class TritonLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap):
        targets = targets.contiguous()
        (n_tokens, hidden_size), vocab = hidden.shape, weight.shape[0]
        splits = max(1, min(PROGRAMS * 128 // max(1, n_tokens), triton.cdiv(vocab, 1024)))
        split_columns = triton.cdiv(triton.cdiv(vocab, splits), 256) * 256  # whole tiles
        splits = triton.cdiv(vocab, split_columns)
        partials = hidden.new_empty(splits, 4, n_tokens, dtype=torch.float32)
        if n_tokens:
            launch(
                forward_kernel, lambda tile: (triton.cdiv(n_tokens, tile["BLOCK_N"]), splits),
                hidden.element_size() == 2, hidden, weight, targets, partials, n_tokens, vocab,
                hidden_size, *hidden.stride(), *weight.stride(), 1.0 / temperature, softcap or 0.0,
                split_columns, HAS_SOFTCAP=softcap is not None)
        largest, total, dot, target_logit = partials.unbind(1)
        overall = largest.amax(0)
        shift = largest - overall
        decay = shift.exp()
        dot = (decay * (dot + shift * total)).sum(0)
        total = (decay * total).sum(0)
        logsumexp = total.log() + overall
        in_vocab = (targets >= 0) & (targets < vocab)
        logprobs = torch.where(in_vocab, target_logit.sum(0) - logsumexp, torch.nan)
        entropy = total.log() - dot / total
        ctx.save_for_backward(hidden, weight, targets, entropy, logsumexp)
        ctx.settings = temperature, softcap
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, entropy, logsumexp = ctx.saved_tensors
        temperature, softcap = ctx.settings
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        (n_tokens, hidden_size), vocab = hidden.shape, weight.shape[0]
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        slope, curve = row_coefficients(grad_logprobs, grad_entropy, entropy, temperature)
        at_target = grad_logprobs / temperature
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = None
        if needs_weight:
            grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        step = max(1, CHUNK_BYTES // (256 * hidden.element_size() * max(1, n_tokens))) * 256
        for start in range(0, vocab if n_tokens else 0, step):
            columns = min(step, vocab - start)
            grad = hidden.new_empty(n_tokens, columns)  # d logits of the chunk, in the input dtype
            launch(
                backward_kernel,
                lambda tile, columns=columns: (triton.cdiv(n_tokens, tile["BLOCK_N"]),
                                               triton.cdiv(columns, tile["BLOCK_V"])),
                hidden.element_size() == 2, hidden, weight, targets, logsumexp, slope,
                slope if curve is None else curve, at_target, grad, n_tokens, vocab, hidden_size,
                *hidden.stride(), *weight.stride(), 1.0 / temperature, softcap or 0.0, start,
                columns, HAS_SOFTCAP=softcap is not None, HAS_CURVE=curve is not None)
            if needs_hidden:
                grad_hidden += mm_fp32(grad, weight[start:start + columns])
            if needs_weight:
                grad_weight[start:start + columns] = mm_fp32(grad.t(), hidden)
        if needs_hidden:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None


def launch(kernel, grid, half, *args, **flags):
    """Runs a kernel with the tile for its dtype on this chip."""
    if INTERPRETED:  # any tile will do
        kernel[grid](*args, **flags, BLOCK_N=16, BLOCK_V=64, BLOCK_K=32)
    else:
        n, v, k, warps, stages = tile(kernel, half, this_chip())
        kernel[grid](*args, **flags, BLOCK_N=n, BLOCK_V=v, BLOCK_K=k, num_warps=warps,
                     num_stages=stages)


def tile(kernel, half, chip):
    """(BLOCK_N, BLOCK_V, BLOCK_K, warps, stages): the largest that spills no register (see README).

    A rule, not a timing: another tile sums in another order, and a resumed run has to be the same
    run (P42).
    """
    if not half:
        return 64, 128, 32, 8, 2
    return 64 if chip == "sm_100" and kernel is forward_kernel else 128, 128, 64, 8, 3


@functools.cache
def this_chip():
    """The name that `tile` needs: only sm_100 has tiles of its own."""
    blackwell = torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 10
    return "sm_100" if blackwell else None


def mm_fp32(a, b):
    """a @ b in fp32. cuBLAS may otherwise add partial sums of a long reduction in bf16."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
