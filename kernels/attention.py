"""Attention over groups: a shared prefix (the prompt) and its completions.

A completion's token sees the prefix and the tokens before it in the same completion. The prefix is
computed once for its n completions, in the gradient as well. Tokens are packed; padding exists only
in here. The mathematics stands in `attention`: matmuls over padded groups. On CUDA in bf16 or fp16
one call of FlashAttention 2 (arXiv 2307.08691) gives the same: `varlen`.

This is the attention of training and prefill. The decode step's is in decode_attention.py.
"""

from functools import cache, cached_property, partial
from inspect import signature
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.delta import Chunks, States, delta_net
from kernels.moves import Gather, Move, copies_of

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:                                     # most machines: torch has its kernels too
    flash_attn_varlen_func = None


class Bucket(NamedTuple):
    """Groups that are padded together, to n completions of C tokens behind P tokens of prefix."""
    groups: list[int]
    n: int
    C: int
    P: int


class PrefixAttention:
    """Attention over groups, each a prefix and its completions. It is a forward's `attend`.

    The packed order is: every prefix, then every completion. With `cached` the prefixes are not in
    the pack; each call is given their keys and values. c: the model's Config.
    """

    def __init__(self, prefix_lengths: list[int], completion_lengths: list[list[int]], c, device,
                 cached: bool = False):
        self.prefix_lengths, self.completion_lengths = prefix_lengths, completion_lengths
        self.c, self.device, self.cached, self.masks = c, device, cached, {}
        self.prefix_tokens = 0 if cached else sum(prefix_lengths)
        self.buckets = buckets(prefix_lengths, completion_lengths, cached)
        self.entries = [torch.tensor(bucket.groups, device=device) for bucket in self.buckets]
        prefixes, rows = {}, {}                         # of each group: (start, length) when padded
        prefix_end = row_end = 0
        for groups, n, C, P in self.buckets:
            for i in groups:
                starts = (row_end + j * C for j in range(n))
                rows[i] = [*zip(starts, completion_lengths[i], strict=False)]
                prefixes[i] = prefix_end, prefix_lengths[i]
                prefix_end, row_end = prefix_end + P, row_end + n * C
        self.prefix_index = flat_index((prefixes[i] for i in sorted(prefixes)), device)
        self.completion_index = flat_index(chain(*(rows[i] for i in sorted(rows))), device)
        positions = [] if cached else [torch.arange(length) for length in prefix_lengths]
        for start, row in zip(prefix_lengths, completion_lengths, strict=True):
            positions += [torch.arange(start, start + length) for length in row]
        self.position_ids = torch.cat(positions).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, prefix_kv=None) -> Tensor:
        """q [N, heads, D], k and v [N, kv_heads, D] -> [N, heads, D].

        prefix_kv: with `cached`, the prefixes' keys and values, each [B, kv_heads, P, D].
        """
        if uses_varlen(q):
            return self.packed(layer, q, k, v, prefix_kv)
        T, prefixes, out = self.prefix_tokens, [prefix_kv], []
        q = q * self.c.attn_scale
        if not self.cached:
            prefix_out, prefixes = self.padded(layer, q[:T], k[:T], v[:T])
            out.append(prefix_out)
        elif len(self.buckets) > 1:
            prefixes = [[x[:, :, :bucket.P].index_select(0, entries) for x in prefix_kv]
                        for bucket, entries in zip(self.buckets, self.entries, strict=True)]
        if len(q) > T:
            out.append(self.padded(layer, q[T:], k[T:], v[T:], prefixes)[0])
        return joined(out)

    def padded(self, layer: int, q: Tensor, k: Tensor, v: Tensor, prefixes=None):
        """Attention of the prefixes, or of the completions: with each bucket's `prefixes`, k and v.

        Returns the output and each bucket's k and v, [B, kv_heads, P, D] if it is of the prefixes.
        """
        index = self.completion_index if prefixes else self.prefix_index
        shapes = [(len(groups), *((n, C) if prefixes else (1, P)), k.shape[1])
                  for groups, n, C, P in self.buckets]
        parts, kept, out = [pad(x, index, shapes) for x in (q, k, v)], [], []
        for i, (queries, *kv) in enumerate(zip(*parts, strict=True)):
            keys, values = (x.squeeze(3) for x in kv)                           # [B, K, n, T, D]
            kept.append((keys.squeeze(2), values.squeeze(2)))
            if queries.numel():
                mask = self.mask(i, q.dtype, self.c.windows[layer], of_prefix=not prefixes)
                before = prefixes[i] if prefixes else ()
                out.append(attention(queries, keys, values, mask, *before))
        return unpad(out, index), kept

    def mask(self, i: int, dtype: torch.dtype, window: int, of_prefix: bool) -> Tensor:
        """0 where a query sees a key, -inf elsewhere, made once for each kind of layer.

        Of bucket i's prefixes: [1, 1, 1, 1, P, P]. Of its completions: [B, 1, 1, 1, C, P + C].
        Padding is on the right: the causal rule hides it from every real query, and no row is
        empty.
        """
        if (i, window, of_prefix) not in self.masks:
            groups, _, C, P = self.buckets[i]
            before, width, P = ([0], P, 0) if of_prefix else (
                [self.prefix_lengths[group] for group in groups], C, P)
            before = torch.tensor(before, device=self.device)
            at = torch.arange(width, device=self.device)[None]
            found = bias(at, width, before, P, window, dtype)
            self.masks[i, window, of_prefix] = found[:, None, None, None]
        return self.masks[i, window, of_prefix]

    def packed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, prefix_kv) -> Tensor:
        """One varlen call: each prefix and each completion, behind its prefix, is a sequence."""
        if self.cached:
            k, v = (torch.cat([cached.transpose(1, 2).flatten(0, 1), packed])
                    for cached, packed in zip(prefix_kv, (k, v), strict=True))
        k, v = (Gather.apply(x, self.sequences[0], self.copies) for x in (k, v))
        return varlen(q, k, v, *self.sequences[1:], scale=self.c.attn_scale,
                      window=self.c.windows[layer])

    def delta(self, layer: int, x: Tensor, g: Tensor, beta: Tensor, weight: Tensor,
              before: States | None = None):
        """What the tokens read in a gated DeltaNet: see kernels.delta.delta_net."""
        return delta_net(x, g, beta, weight, self.c.delta, self.chunks, before)

    @cached_property
    def chunks(self) -> Chunks:
        return Chunks(self.prefix_lengths, self.completion_lengths, self.cached, self.c.delta.conv,
                      self.device)

    @cached_property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """(keys, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) of a varlen call.

        keys: which keys each sequence sees, one sequence after the other. Cached prefixes are no
        sequences of their own; they are right-padded rows before the packed keys.
        """
        B, P = len(self.prefix_lengths), max(self.prefix_lengths)
        starts = [0, *accumulate([P] * B if self.cached else self.prefix_lengths)]
        end, spans, q_lengths, k_lengths = starts[-1], [], [], []
        if not self.cached:
            spans += zip(starts[:-1], starts[1:], strict=True)
            q_lengths += self.prefix_lengths
            k_lengths += self.prefix_lengths
        groups = zip(starts[:-1], self.prefix_lengths, self.completion_lengths, strict=True)
        for start, prefix, row in groups:
            for length in filter(None, row):
                spans += [(start, start + prefix), (end, end + length)]
                q_lengths.append(length)
                k_lengths.append(prefix + length)
                end += length
        keys = torch.cat([torch.arange(*span) for span in spans]).to(self.device)
        ends = [torch.tensor([0, *accumulate(x)], dtype=torch.int32).to(self.device)
                for x in (q_lengths, k_lengths)]
        return keys, *ends, max(q_lengths), max(k_lengths)

    @cached_property
    def copies(self) -> tuple[Tensor, Tensor]:
        return copies_of(self.sequences[0], len(self.position_ids))


def buckets(prefix_lengths: list[int], completion_lengths: list[list[int]],
            cached: bool) -> list[Bucket]:
    """Sorts groups into few buckets, none with over twice the scores of its groups on their own.

    Equal groups share one. A lone prompt keeps apart from an opening of 29 prompts.
    """
    def scores(n, C, P):
        return n * C * (P + C) + (0 if cached else P * P)

    sizes = [(len(row), max(row, default=0), P)
             for P, row in zip(prefix_lengths, completion_lengths, strict=True)]
    found, alone = [], 0
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        groups, *most = found[-1] if found else ([], 0, 0, 0)
        merged, alone = map(max, most, sizes[i]), alone + scores(*sizes[i])
        bucket = Bucket([*groups, i], *merged)
        if groups and len(bucket.groups) * scores(*bucket[1:]) > 2 * alone:
            bucket, alone = Bucket([i], *sizes[i]), scores(*sizes[i])
            found.append(bucket)
        else:
            found[-1:] = [bucket]
    return [Bucket(sorted(groups), *most) for groups, *most in found]


def varlen(q: Tensor, k: Tensor, v: Tensor, *lengths, scale: float, window: int) -> Tensor:
    """Causal attention of packed sequences: q [N, heads, D], k, v [M, kv_heads, D] -> like q.

    lengths: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k). A completion has more keys
    than queries. The kernels align the causal mask and the window to the last of both (mask.h: key
    <= query + seqlen_k - seqlen_q). So a token sees the prefix and what precedes it.

    flash-attn comes first where it is installed: the order in which its backward adds dq can be
    fixed in the call. torch's adds atomically, in any order, unless the whole process is under
    torch.use_deterministic_algorithms(True), which asks for CUBLAS_WORKSPACE_CONFIG=:4096:8 too.
    The gradients of k and v have one order in both.
    """
    window_size = window - 1, 0                         # (-1, 0): no window, causal
    if flash_attn_varlen_func:
        return flash_attn_varlen_func(q, k, v, *lengths, softmax_scale=scale, causal=True,
                                      window_size=window_size, deterministic=True)
    return torch_varlen()(q, k, v, *lengths, scale=scale, window_size=window_size)


@cache
def torch_varlen():
    """torch's own varlen_attn, or None where it can't do this: before torch 2.11 (no scale, no
    window) and on ROCm (its mask is aligned to the first query and key).

    Imported at its first use: it brings torch._dynamo, which takes a second.
    """
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:                                 # before 2.10
        return None
    known = signature(varlen_attn).parameters
    if "window_size" not in known:
        return None
    # 2.11 takes fewer heads of k and v than of q as they are; from 2.12 on it wants to be told.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def uses_varlen(q: Tensor) -> bool:
    """What FlashAttention 2 takes, if there is one: bf16 or fp16 on an A100 or later. Padded
    matmuls do the rest."""
    return (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(q.device)[0] >= 8
            and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
            and (flash_attn_varlen_func or torch_varlen()) is not None)


def bias(at: Tensor, T: int, prefix_lengths: Tensor, P: int, window: int, dtype) -> Tensor:
    """0 where a query sees a key, -inf elsewhere: [B, C, P + T], keys of the prefix first.

    at [B or 1, C]: the queries' places among the T keys behind the prefix. prefix_lengths [B], of
    at most P. A key is seen from its own position on, and less than `window` positions later, if
    there is a window.
    """
    length, key = prefix_lengths[:, None, None], torch.arange(P, device=at.device)
    back = torch.where(key < length, length + at[..., None] - key, -1)  # query minus key position
    behind = (at[..., None] - torch.arange(T, device=at.device)).expand(*back.shape[:2], T)
    back = torch.cat([back, behind], -1)
    hidden = (back < 0) | (back >= window) if window else back < 0
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix_k=None, prefix_v=None):
    """softmax(q K^T + mask) V. q [B, K, n, g, C, D] is scaled, k and v are [B, K, n, T, D].

    prefix_k, prefix_v [B, K, P, D]: all n * g * C queries of a group read them at once, in one
    large matmul. That is what makes sharing pay.
    """
    B, K, n, g, C, D = q.shape
    q = q.reshape(B, K, n, g * C, D)
    scores = (q @ k.transpose(-1, -2)).view(B, K, n, g, C, -1)
    if prefix_k is None:
        weights = (scores + mask).softmax(-1).view(B, K, n, g * C, -1)
        return (weights @ v).view(B, K, n, g, C, D)
    P = prefix_k.shape[2]
    q = q.reshape(B, K, n * g * C, D)
    prefix_scores = (q @ prefix_k.transpose(-1, -2)).view(B, K, n, g, C, P)
    weights = (torch.cat([prefix_scores, scores], -1) + mask).softmax(-1)
    prefix_weights, weights = weights.split([P, scores.shape[-1]], -1)
    out = (weights.reshape(B, K, n, g * C, -1) @ v).view(B, K, n * g * C, D)
    return (out + prefix_weights.reshape(B, K, n * g * C, P) @ prefix_v).view(B, K, n, g, C, D)


def pad(x: Tensor, index: Tensor, shapes: list[tuple[int, int, int, int]]) -> list[Tensor]:
    """Packed [tokens, heads, D] -> a tensor for each of shapes (B, rows, width, kv_heads):
    [B, kv_heads, rows, heads / kv_heads, width, D], zeros at the right."""
    sizes = [B * rows * width for B, rows, width, _ in shapes]
    padded = Move.apply(x, index, sum(sizes), True)
    parts = padded.split(sizes) if len(sizes) > 1 else [padded]
    return [part.view(*shape, x.shape[1] // shape[3], x.shape[2]).permute(0, 3, 1, 4, 2, 5)
            for part, shape in zip(parts, shapes, strict=True)]


def unpad(parts: list[Tensor], index: Tensor) -> Tensor:
    """`pad` reversed: -> [tokens, heads, D]."""
    flat = [x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1, 2) for x in parts]
    return Move.apply(joined(flat), index, 0, False)


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def flat_index(spans, device) -> Tensor:
    """All places in spans of (start, length), one after the other."""
    places = [torch.arange(start, start + length) for start, length in spans]
    return torch.cat(places or [torch.empty(0, dtype=torch.long)]).to(device)
