"""The decode step's attention on a GPU, as kernels/decode_attention.py defines it: two Triton
kernels. Mathematics and expected time: kernels/README.md.

One program owns one row, one kv head with its g query heads, and one split of the tokens that the
row sees. It walks the part of the split that lies in the row's prefix, then the part in the row's
own cache, a block of tokens at a time, with an online softmax in fp32 (Milakov & Gimelshein 2018,
arXiv 1805.02867). Programs of neighbouring rows run side by side. Rows of a group so find their
prefix in the L2 cache.

Split 0 starts with the new token, which it takes from k and v, and writes it into the cache. No
program reads the cache at that position, so no order of programs matters. With one split the first
kernel writes the result. With more, a second kernel merges the partial results (flash-decoding, Dao
et al. 2023).

Entries and lengths are read in the kernels, and the grid depends on shapes alone. A CUDA graph can
so replay a step with other lengths (P35). Left out: paged caches, softcaps, a backward pass.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.triton_linear_logprob import INTERPRETED, LOWEST, _round

PROGRAMS = 512                # about four for each processor of an H100
SPLIT_TOKENS = 256            # a split is not planned for fewer
MOST_SPLITS = 32
LOG2_E = 1.4426950408889634


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # the interpreter holds bf16 in integers, and would multiply those
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def _scores(q, k, TENSOR_CORES: tl.constexpr):
    """q [G, D], k [T, D] -> [G, T] in fp32."""
    if TENSOR_CORES:
        scores = _dot(q, tl.trans(k))
    else:
        scores = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], axis=2)
    return scores


@triton.jit
def _weighted_sum(weights, v, TENSOR_CORES: tl.constexpr):
    """weights [G, T] in fp32, v [T, D] -> [G, D] in fp32."""
    if TENSOR_CORES:  # they take both in one dtype
        out = _dot(_round(weights, v.dtype), v)
    else:
        out = tl.sum(weights[:, :, None] * v.to(tl.float32)[None, :, :], axis=1)
    return out


@triton.jit
def _walk(q, largest, total, out, keys, values, start, stop, stride_kt, stride_vt, scale,
          HEAD_DIM: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_T: tl.constexpr,
          BLOCK_D: tl.constexpr):
    """Adds tokens [start, stop) of one entry and kv head to the softmax sums of every query."""
    d = tl.arange(0, BLOCK_D)
    for first in range(start, stop, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        # never past `stop`: nobody may have written there, and NaN * 0 is NaN
        inside = (t < stop)[:, None] & (d < HEAD_DIM)[None, :]
        at = t.to(tl.int64)[:, None]
        k = tl.load(keys + at * stride_kt + d[None, :], mask=inside, other=0.0)
        v = tl.load(values + at * stride_vt + d[None, :], mask=inside, other=0.0)
        scores = tl.where((t < stop)[None, :], _scores(q, k, TENSOR_CORES) * scale, LOWEST)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)  # the sums so far are relative to the old maximum
        total = decay * total + tl.sum(weights, axis=1)
        out = decay[:, None] * out + _weighted_sum(weights, v, TENSOR_CORES)
        largest = new_largest
    return largest, total, out


@triton.jit
def _new_token(q, k, v, key_at, value_at, fits, scale, out, HEAD_DIM: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """Writes the new token into the cache. Returns its scores [G] and out + its value [G, D]."""
    d = tl.arange(0, BLOCK_D)
    new_k = tl.load(k + d, mask=d < HEAD_DIM, other=0.0)
    new_v = tl.load(v + d, mask=d < HEAD_DIM, other=0.0)
    write = d < tl.where(fits, HEAD_DIM, 0)
    tl.store(key_at + d, new_k, mask=write)
    tl.store(value_at + d, new_v, mask=write)
    scores = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], axis=1) * scale
    # a row without room gives NaN: raising an error would stall the GPU
    return scores, out + tl.where(fits, new_v.to(tl.float32), float("nan"))[None, :]


@triton.jit
def attend_kernel(q, k, v, row_keys, row_values, prefix_keys, prefix_values,
                  entries, lengths, prefixes, prefix_lengths, results, sums,
                  scale, window, capacity,
                  stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
                  stride_rke, stride_rkh, stride_rkt, stride_rve, stride_rvh, stride_rvt,
                  stride_pke, stride_pkh, stride_pkt, stride_pve, stride_pvh, stride_pvt,
                  GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
                  TENSOR_CORES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """One split of a row and kv head. scale: times log2(e). Grid (B, kv_heads, SPLITS).

    results: [B, heads, D], final, with one split; else [B, heads, SPLITS, D] in fp32, not yet
    divided by the sum of weights, and sums [B, heads, 2, SPLITS] holds (largest score, sum).
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    real = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    row64, head64 = row.to(tl.int64), head.to(tl.int64)
    entry, prefix = tl.load(entries + row).to(tl.int64), tl.load(prefixes + row).to(tl.int64)
    before, own = tl.load(prefix_lengths + row), tl.load(lengths + row)
    fits = (own >= 0) & (own < capacity)
    own = tl.where(fits, own, 0)
    q += row64 * stride_qb + (head64 * GROUP + g)[:, None] * stride_qh + d[None, :]
    queries = tl.load(q, mask=real, other=0.0)

    largest = tl.zeros((BLOCK_G,), dtype=tl.float32) + LOWEST
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    row_keys += entry * stride_rke + head64 * stride_rkh
    row_values += entry * stride_rve + head64 * stride_rvh
    if split == 0:
        new_k = k + row64 * stride_kb + head64 * stride_kh
        new_v = v + row64 * stride_vb + head64 * stride_vh
        at = own.to(tl.int64)
        largest, out = _new_token(queries, new_k, new_v, row_keys + at * stride_rkt,
                                  row_values + at * stride_rvt, fits, scale, out, HEAD_DIM, BLOCK_D)
        total += 1.0

    # positions [first, before + own) are seen, besides the new token; each split takes its share
    first = tl.where(window > 0, tl.maximum(before + own + 1 - window, 0), 0)
    share = tl.cdiv(tl.cdiv(before + own - first, SPLITS), BLOCK_T) * BLOCK_T  # whole blocks
    start = first + split * share
    stop = tl.minimum(start + share, before + own)
    prefix_keys += prefix * stride_pke + head64 * stride_pkh
    prefix_values += prefix * stride_pve + head64 * stride_pvh
    largest, total, out = _walk(queries, largest, total, out, prefix_keys, prefix_values, start,
                                tl.minimum(stop, before), stride_pkt, stride_pvt, scale, HEAD_DIM,
                                TENSOR_CORES, BLOCK_T, BLOCK_D)
    largest, total, out = _walk(queries, largest, total, out, row_keys, row_values,
                                tl.maximum(start - before, 0), stop - before, stride_rkt,
                                stride_rvt, scale, HEAD_DIM, TENSOR_CORES, BLOCK_T,
                                BLOCK_D)

    query = (row64 * tl.num_programs(1) + head) * GROUP + g
    if SPLITS == 1:
        out = _round(out / total[:, None], results.dtype.element_ty)
    else:
        tl.store(sums + query * 2 * SPLITS + split, largest, mask=g < GROUP)
        tl.store(sums + (query * 2 + 1) * SPLITS + split, total, mask=g < GROUP)
    tl.store(results + ((query * SPLITS + split) * HEAD_DIM)[:, None] + d[None, :], out, mask=real)


@triton.jit
def merge_kernel(partial, sums, results, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
                 BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """partial [queries, SPLITS, D] and sums [queries, 2, SPLITS] -> results [queries, D].

    Grid (queries,). A split without a token has largest = LOWEST and weighs nothing.
    """
    query = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    sums += query * 2 * SPLITS + s
    largest = tl.load(sums, mask=s < SPLITS, other=LOWEST)
    total = tl.load(sums + SPLITS, mask=s < SPLITS, other=0.0)
    weights = tl.exp2(largest - tl.max(largest, axis=0))
    out = tl.load(partial + ((query * SPLITS + s) * HEAD_DIM)[:, None] + d[None, :],
                  mask=(s < SPLITS)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    out = tl.sum(weights[:, None] * out, axis=0) / tl.sum(weights * total, axis=0)
    tl.store(results + query * HEAD_DIM + d, _round(out, results.dtype.element_ty),
             mask=d < HEAD_DIM)


# --------------------------------------------------------------------------------------------------
# Launching


def triton_decode_attention(q, k, v, row_kv, prefix_kv, rows, scale, window=0):
    """As kernels.decode_attention, on a GPU, in bf16, fp16 or fp32. Softmax and sums are in fp32.

    q [B, heads, D], k and v [B, kv_heads, D], caches [entries, kv_heads, T, D]: one dtype, any
    strides but for the last dimension, which is contiguous; else ValueError. Lengths and entries
    are not checked, as that would stall the GPU. A row whose length has reached the capacity of
    row_kv writes nothing, and its result is NaN.
    """
    caches = *row_kv, *prefix_kv
    if any(x.stride(-1) != 1 or x.dtype != q.dtype for x in (q, k, v, *caches)):
        raise ValueError("one dtype and a contiguous last dimension expected")
    (B, heads, D), K, capacity = q.shape, k.shape[1], row_kv[0].shape[2]
    results = q.new_empty(q.shape)
    if not B:
        return results
    half, seen = q.element_size() == 2, prefix_kv[0].shape[2] + capacity
    splits = number_of_splits(B * K, min(seen, window) if window else seen)
    partial, sums = results, results
    if splits > 1:
        partial = q.new_empty(B, heads, splits, D, dtype=torch.float32)
        sums = q.new_empty(B, heads, 2, splits, dtype=torch.float32)
    settings = tile(half, heads // K, D, this_chip())
    strides = [stride for x in (q, k, v, *caches) for stride in x.stride()[:-1]]
    attend_kernel[B, K, splits](
        q, k, v, *caches, *rows, partial, sums, scale * LOG2_E, window, capacity, *strides,
        GROUP=heads // K, HEAD_DIM=D, SPLITS=splits, **settings)
    if splits > 1:
        merge_kernel[B * heads,](partial, sums, results, HEAD_DIM=D, SPLITS=splits,
                                 BLOCK_S=triton.next_power_of_2(splits),
                                 BLOCK_D=settings["BLOCK_D"])
    return results


def number_of_splits(programs: int, tokens: int) -> int:
    """How many share one row's tokens: a rule of shapes, not a timing (P42). A power of two, as
    each number is compiled anew."""
    most = max(1, min(PROGRAMS // programs, tokens // SPLIT_TOKENS, MOST_SPLITS))
    return 1 << most.bit_length() - 1


def tile(half: bool, group: int, head_dim: int, chip: str | None) -> dict[str, int]:
    """Blocks, warps and stages of attend_kernel for g = `group`: a rule that spills no register.

    Tensor cores take 16 queries. Those beyond g are zeros and cost no memory traffic. fp32 is
    multiplied without them, since they would cut it to tf32. So is fp16 on GPUs before the A100,
    where Triton does not use them.
    """
    D = max(16, triton.next_power_of_2(head_dim))
    G = triton.next_power_of_2(group)
    tensor_cores = half and chip != "sm_75"
    if tensor_cores:
        G = max(16, G)
        T = min(64, max(16, 4096 // D))
    else:                     # products [G, T, D] lie in registers
        T = min(64, max(1, min(2048, 16384 // G) // D))
    stages = 3 if tensor_cores and chip != "gfx942" else 2
    return {"TENSOR_CORES": tensor_cores, "BLOCK_G": G, "BLOCK_T": T, "BLOCK_D": D,
            "num_warps": 4, "num_stages": stages}


@functools.cache
def this_chip() -> str | None:
    """The name that `tile` needs: of AMD's GPUs, and of Nvidia's before the A100."""
    if INTERPRETED:
        return None
    if torch.version.hip:
        return "gfx942"
    return "sm_75" if torch.cuda.get_device_capability()[0] < 8 else None
