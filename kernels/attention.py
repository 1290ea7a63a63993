"""Attention over groups: a shared prefix (the prompt) and its completions.

A completion's token sees the prefix and the tokens before it in the same completion. The prefix is
computed once for its n completions, in the gradient as well. Tokens are packed; padding exists only
in here. On a CPU, and without flash-attn, prefixes and completions are padded for two matmuls. On
CUDA in bf16 or fp16 it is one call of flash-attn.

This is the attention of training and prefill. The decode step's is in sampling/cache.py.
"""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:                                     # no GPU, or not installed: padded matmuls
    flash_attn_varlen_func = flash_attn_with_kvcache = None


class Move(torch.autograd.Function):
    """Copies rows between the packed and the padded layout.

    The index is one-to-one, so the backward is a copy as well. Autograd's own would be an
    index_add, many times slower on a CPU.
    """

    @staticmethod
    def forward(ctx, x, index, size, to_padded):
        ctx.index, ctx.size, ctx.to_padded = index, x.shape[0], to_padded
        if to_padded:
            return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        moved = Move.apply(grad.contiguous(), ctx.index, ctx.size, not ctx.to_padded)
        return moved, None, None, None


class PrefixAttention:
    """Attention over B groups, each a prefix and up to n completions. It is a forward's `attend`.

    The packed order is: every prefix, then every completion. With `cached` the prefixes are not in
    the pack; each call is given their keys and values. c: the model's Config.
    """

    def __init__(self, prefix_lengths: list[int], completion_lengths: list[list[int]], c, device,
                 cached: bool = False):
        self.prefix_lengths, self.completion_lengths = prefix_lengths, completion_lengths
        self.c, self.device, self.cached, self.masks = c, device, cached, {}
        n = max(map(len, completion_lengths), default=0)
        rows = [length for row in completion_lengths for length in row + [0] * (n - len(row))]
        P, C = max(prefix_lengths), max(rows, default=0)
        self.shape = len(prefix_lengths), n, P, C
        self.prefix_tokens = 0 if cached else sum(prefix_lengths)
        self.prefix_index = flat_index(prefix_lengths, P, device)
        self.completion_index = flat_index(rows, C, device)
        positions = [] if cached else [torch.arange(length) for length in prefix_lengths]
        for start, row in zip(prefix_lengths, completion_lengths, strict=True):
            positions += [torch.arange(start, start + length) for length in row]
        self.position_ids = torch.cat(positions).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, prefix_kv=None) -> Tensor:
        """q [N, heads, D], k and v [N, kv_heads, D] -> [N, heads, D].

        prefix_kv: with `cached`, the prefixes' keys and values, each [B, kv_heads, P, D].
        """
        if uses_flash(q):
            return self.flash(layer, q, k, v, prefix_kv)
        B, n, P, C = self.shape
        K, T, window = k.shape[1], self.prefix_tokens, self.c.windows[layer]
        q = q * self.c.attn_scale
        out = []
        if not self.cached:
            prefix_q, prefix_k, prefix_v = (pad(x[:T], self.prefix_index, (B, 1, P, K))
                                            for x in (q, k, v))
            prefix_k, prefix_v = prefix_k.squeeze(3), prefix_v.squeeze(3)       # [B, K, 1, P, D]
            mask = self.mask(q.dtype, window, of_prefix=True)
            out.append(unpad(attention(prefix_q, prefix_k, prefix_v, mask), self.prefix_index))
            prefix_kv = prefix_k.squeeze(2), prefix_v.squeeze(2)                # [B, K, P, D]
        if C:
            queries, keys, values = (pad(x[T:], self.completion_index, (B, n, C, K))
                                     for x in (q, k, v))
            mask = self.mask(q.dtype, window, of_prefix=False)
            padded = attention(queries, keys.squeeze(3), values.squeeze(3), mask, *prefix_kv)
            out.append(unpad(padded, self.completion_index))
        return torch.cat(out) if len(out) > 1 else out[0]

    def mask(self, dtype: torch.dtype, window: int, of_prefix: bool) -> Tensor:
        """0 where a query sees a key, -inf elsewhere, made once for each kind of layer.

        Prefixes: [1, 1, 1, 1, P, P]. Completions: [B, 1, 1, 1, C, P + C]. Padding is on the right:
        the causal rule hides it from every real query, and no row is empty.
        """
        if (window, of_prefix) not in self.masks:
            _, _, P, C = self.shape
            before, width, P = ([0], P, 0) if of_prefix else (self.prefix_lengths, C, P)
            before = torch.tensor(before, device=self.device)
            at = torch.arange(width, device=self.device)[None]
            found = bias(at, width, before, P, window, dtype)
            self.masks[window, of_prefix] = found[:, None, None, None]
        return self.masks[window, of_prefix]

    def flash(self, layer: int, q: Tensor, k: Tensor, v: Tensor, prefix_kv) -> Tensor:
        """One varlen call (flash-attn 2, arXiv 2307.08691): each prefix and completion a sequence.

        A completion has more keys than queries. flash-attn >= 2.1 aligns the causal mask and the
        window to the last of both. So a token sees the prefix and what precedes it.
        """
        if self.cached:
            k, v = (torch.cat([cached.transpose(1, 2).flatten(0, 1), packed])
                    for cached, packed in zip(prefix_kv, (k, v), strict=True))
        keys, *lengths = self.sequences
        # In fp32, so that a prefix's gradient is summed over its completions in fp32.
        k, v = (x.float()[keys].to(x.dtype) for x in (k, v))
        return flash_attn_varlen_func(q, k, v, *lengths, deterministic=True,
                                      **self.c.flash(layer))

    @cached_property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """flash-attn's (keys, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k).

        keys: which keys each sequence sees, one sequence after the other. Cached prefixes are no
        sequences of their own; they are right-padded rows before the packed keys.
        """
        B, _, P, _ = self.shape
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


def uses_flash(q: Tensor) -> bool:
    """flash-attn 2 is for half precision on the A100 and later."""
    return (flash_attn_varlen_func is not None and q.is_cuda
            and q.dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(q.device)[0] >= 8)


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


def pad(x: Tensor, index: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Packed [tokens, heads, D] -> [B, kv_heads, rows, heads / kv_heads, width, D], zeros at the
    right. shape: (B, rows, width, kv_heads)."""
    B, rows, width, K = shape
    padded = Move.apply(x, index, B * rows * width, True)
    return padded.view(B, rows, width, K, -1, x.shape[-1]).permute(0, 3, 1, 4, 2, 5)


def unpad(x: Tensor, index: Tensor) -> Tensor:
    """`pad` reversed: -> [tokens, heads, D]."""
    return Move.apply(x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1, 2), index, 0, False)


def flat_index(lengths: list[int], width: int, device) -> Tensor:
    """Where the tokens of right-padded rows of these lengths stand in a flat [rows * width]."""
    spans = [torch.arange(i * width, i * width + length) for i, length in enumerate(lengths)]
    return torch.cat(spans or [torch.empty(0, dtype=torch.long)]).to(device)
