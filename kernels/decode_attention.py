"""The attention of a decode step: one new token in each of B rows.

A row sees its prefix (stored once for all rows that share it), its own tokens, and the new one. The
same mathematics stands here three times: in plain torch below, which defines it; in Triton for GPUs
(triton_decode_attention.py); in C++ for CPUs (native.cpp).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native

LayerCache = tuple[Tensor, Tensor]                       # keys, values [entries, kv_heads, T, D]


class Rows(NamedTuple):
    """What each of B rows sees, in memory that a CUDA graph can read again: int32 [B] each."""
    entries: Tensor                                     # which entry holds the row's own tokens
    lengths: Tensor                                     # how many, before the new one
    prefixes: Tensor                                    # which entry holds the row's prefix
    prefix_lengths: Tensor                              # how many of its tokens; 0: no prefix


def decode_attention(q: Tensor, k: Tensor, v: Tensor, row_kv: LayerCache, prefix_kv: LayerCache,
                     rows: Rows, scale: float, window: int = 0) -> Tensor:
    """q [B, heads, D], k and v [B, kv_heads, D] of the new tokens -> [B, heads, D].

    Each row writes its k and v into its entry of row_kv, behind its tokens, and attends. scale: of
    the scores. window: how many positions a token sees, itself included; 0: all.
    """
    if q.is_cuda and q.dtype != torch.float64:
        from kernels.triton_decode_attention import triton_decode_attention

        return triton_decode_attention(q, k, v, row_kv, prefix_kv, rows, scale, window)
    if q.shape[-1] not in (64, 128, 256) or not native.usable(q):
        return torch_decode_attention(q, k, v, row_kv, prefix_kv, rows, scale, window)
    (q, B, heads, D), (k, _, K, _), v = native.rows(q), native.rows(k), native.rows(v)[0]
    out = torch.empty(B, heads, D, dtype=q.dtype)
    native.run("decode", 32 * out.numel(), q, q, k, v, out, *row_kv, *prefix_kv, *rows, B, K,
               heads // K, D, q.stride(0), k.stride(0), v.stride(0), *row_kv[0].stride()[:2],
               *prefix_kv[0].stride()[:2], window, scale)
    return out


def torch_decode_attention(q: Tensor, k: Tensor, v: Tensor, row_kv: LayerCache,
                           prefix_kv: LayerCache, rows: Rows, scale: float, window: int = 0,
                           ) -> Tensor:
    """The definition of `decode_attention`. It copies each row's keys and values, and is slow.

    Row b first writes k[b], v[b] in place, at token lengths[b] of entries[b] of row_kv. It then
    sees prefix_lengths[b] tokens of its prefix's entry and lengths[b] + 1 of its own, at positions
    0, 1, ..., and of these the last `window` (0: all). out[b] = softmax(scale q K^T) V; heads /
    kv_heads neighbouring heads of q share one of K and V. What an entry holds beyond its length may
    be NaN.
    """
    (B, K, D), P, T = k.shape, prefix_kv[0].shape[2], row_kv[0].shape[2]
    entries, lengths, prefixes = rows.entries.long(), rows.lengths.long(), rows.prefixes.long()
    for cache, new in zip(row_kv, (k, v), strict=True):
        cache[entries, :, lengths] = new
    keys, values = (torch.cat([shared[prefixes], own[entries]], 2)              # [B, K, P + T, D]
                    for shared, own in zip(prefix_kv, row_kv, strict=True))
    before, own = rows.prefix_lengths[:, None], rows.lengths[:, None]
    key = torch.arange(P, device=q.device).expand(B, P)
    new = before + torch.arange(T, device=q.device)
    hidden = torch.cat([key >= before, new > before + own], 1)                  # [B, P + T]
    if window:
        hidden |= torch.cat([key, new], 1) <= before + own - window
    scores = (q * scale).view(B, K, -1, D) @ keys.transpose(-1, -2)             # [B, K, g, P + T]
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    values = values.masked_fill(hidden[:, None, :, None], 0)    # what nobody wrote may be NaN
    return (weights @ values).reshape(q.shape)
