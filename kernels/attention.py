"""Tree attention: a group is a trunk (the shared prompt) and its branches (the completions).

A branch token sees the trunk and what precedes it in its own branch. The trunk is computed once for its n branches, in
the gradient as well; nothing is padded but in here. On a CPU, and where flash-attn is not installed, trunks and
branches are padded for two matmuls; on CUDA in bf16 or fp16 it is one call of flash-attn. This is the attention of
training and prefill; the sampler's, on its cache, is in cache.py.
"""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:                                     # no GPU, or not installed: the padded attention below
    flash_attn_varlen_func = flash_attn_with_kvcache = None


class Move(torch.autograd.Function):
    """Copies rows between the packed and the padded layout. The index is one-to-one, so the backward is a copy as well
    (autograd's own would be an index_add, many times slower on a CPU)."""

    @staticmethod
    def forward(ctx, x, index, size, to_padded):
        ctx.index, ctx.size, ctx.to_padded = index, x.shape[0], to_padded
        if to_padded:
            return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return Move.apply(grad.contiguous(), ctx.index, ctx.size, not ctx.to_padded), None, None, None


class Tree:
    """Attention over B groups, each a trunk and up to n branches. The packed order is: every trunk, then every branch.

    Use it as `attend`. For prefill: with `keep`, the keys and values of every layer stay in `self.kept`; with `cached`,
    a function layer -> (k, v) [B, kv_heads, P, D], the trunks are not in the pack but come from a cache. c: the model's
    Config.
    """

    def __init__(self, trunk_lengths: list[int], branch_lengths: list[list[int]], c, device,
                 keep: bool = False, cached=None):
        self.c, self.kept, self.masks, self.cached = c, [] if keep else None, {}, cached
        B, n = len(trunk_lengths), max(map(len, branch_lengths), default=0)
        P, C = max(trunk_lengths), max((length for row in branch_lengths for length in row), default=0)
        self.shape, self.lengths = (B, n, P, C), (trunk_lengths, branch_lengths)
        self.trunk_lengths = torch.tensor(trunk_lengths, device=device)
        self.trunk_tokens = 0 if cached else sum(trunk_lengths)
        self.trunk_index = flat_index(trunk_lengths, P, device)
        self.branch_index = flat_index([x for row in branch_lengths for x in row + [0] * (n - len(row))], C, device)
        starts_ends = [] if cached else [(0, t) for t in trunk_lengths]
        starts_ends += [(t, t + x) for t, row in zip(trunk_lengths, branch_lengths, strict=True) for x in row]
        self.position_ids = torch.cat([torch.arange(*se) for se in starts_ends]).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, heads, D], k and v [N, kv_heads, D] -> [N, heads, D]."""
        if self.kept is not None:
            self.kept.append((k, v))
        if uses_flash(q):
            return self.flash(layer, q, k, v)
        B, n, P, C = self.shape
        K, D, T, window = k.shape[1], k.shape[2], self.trunk_tokens, self.c.windows[layer]
        q = q * self.c.attn_scale

        def pad(x, index, rows, width):                                         # -> [B, kv_heads, rows, g, width, D]
            return Move.apply(x, index, B * rows * width, True).view(B, rows, width, K, -1, D).permute(0, 3, 1, 4, 2, 5)

        def unpad(x, index):                                                    # and back to [tokens, heads, D]
            return Move.apply(x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1, 2), index, 0, False)

        out = []
        if self.cached:
            trunk_k, trunk_v = self.cached(layer)
        else:
            trunk_q, trunk_k, trunk_v = (pad(x[:T], self.trunk_index, 1, P) for x in (q, k, v))
            trunk_k, trunk_v = trunk_k.squeeze(3), trunk_v.squeeze(3)           # [B, K, 1, P, D]
            trunk = attention(trunk_q, trunk_k, trunk_v, self.mask(q.dtype, window, False))
            out.append(unpad(trunk, self.trunk_index))
            trunk_k, trunk_v = trunk_k.squeeze(2), trunk_v.squeeze(2)
        if C:
            branch_q, branch_k, branch_v = (pad(x[T:], self.branch_index, n, C) for x in (q, k, v))
            branch = attention(branch_q, branch_k.squeeze(3), branch_v.squeeze(3), self.mask(q.dtype, window, True),
                               trunk_k, trunk_v)
            out.append(unpad(branch, self.branch_index))
        return torch.cat(out) if len(out) > 1 else out[0]

    def mask(self, dtype: torch.dtype, window: int, branch: bool) -> Tensor:
        """0 where a query sees a key, -inf elsewhere. Trunk: [1, 1, 1, 1, P, P]. Branch: [B, 1, 1, 1, C, P + C].

        Padding is on the right, so a real query never meets it under the causal rule, and no row is empty.
        """
        if (window, branch) not in self.masks:
            (_, _, P, C), trunks = self.shape, self.trunk_lengths
            width, trunks, P = (C, trunks, P) if branch else (P, torch.zeros_like(trunks[:1]), 0)
            at = torch.arange(width, device=trunks.device)[None]
            self.masks[window, branch] = bias(at, width, trunks, P, window, dtype)[:, None, None, None]
        return self.masks[window, branch]

    def flash(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One varlen call (flash-attn 2, arXiv 2307.08691) in which each trunk and each branch is a sequence.

        A branch has more keys than queries, and flash-attn >= 2.1 aligns the causal mask and the window to the last of
        both: precisely "the trunk, then what precedes it in its own branch".
        """
        if self.cached:
            k, v = (torch.cat([trunk.transpose(1, 2).flatten(0, 1), own])
                    for trunk, own in zip(self.cached(layer), (k, v), strict=True))
        keys, *lengths = self.sequences
        k, v = (x.float()[keys].to(x.dtype) for x in (k, v))    # so a trunk's gradient is summed over branches in fp32
        return flash_attn_varlen_func(q, k, v, *lengths, deterministic=True, **self.c.flash(layer))     # P42

    @cached_property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """(which keys each sequence sees, one after the other; cu_seqlens_q; cu_seqlens_k; max_seqlen_q; max_seqlen_k).

        Trunks taken from a cache are right-padded rows before the packed keys, and no sequences of their own.
        """
        (trunks, branches), (B, _, P, _) = self.lengths, self.shape
        starts = [i * P for i in range(B)] if self.cached else [0, *accumulate(trunks)][:-1]
        own = B * P if self.cached else sum(trunks)
        found = [] if self.cached else [(t, [(s, s + t)]) for s, t in zip(starts, trunks, strict=True)]
        for start, trunk, row in zip(starts, trunks, branches, strict=True):
            for length in filter(None, row):
                found.append((length, [(start, start + trunk), (own, own + length)]))
                own += length
        q_lengths = [length for length, _ in found]
        k_lengths = [sum(stop - start for start, stop in spans) for _, spans in found]
        keys = torch.cat([torch.arange(*span) for _, spans in found for span in spans]).to(self.position_ids.device)
        ends = [torch.tensor([0, *accumulate(x)], dtype=torch.int32).to(keys.device) for x in (q_lengths, k_lengths)]
        return keys, *ends, max(q_lengths), max(k_lengths)


def uses_flash(q: Tensor) -> bool:
    """flash-attn 2 is for half precision on the A100 and later."""
    return (flash_attn_varlen_func is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(q.device)[0] >= 8)


def bias(at: Tensor, T: int, trunk: Tensor, P: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key of its trunk or its own, -inf elsewhere: [B, C, P + T].

    at [B or 1, C]: the queries' places among the T keys of their own; trunk [B]: lengths, of P at most. A key is seen
    from its own position on, and less than `window` positions behind, if there is one.
    """
    length, key = trunk[:, None, None], torch.arange(P, device=at.device)
    back = torch.where(key < length, length + at[..., None] - key, -1)         # query position - key position
    own = (at[..., None] - torch.arange(T, device=at.device)).expand(*back.shape[:2], T)
    back = torch.cat([back, own], -1)
    hidden = (back < 0) | (back >= window) if window else back < 0
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, trunk_k=None, trunk_v=None) -> Tensor:
    """softmax(q K^T + mask) V. q [B, K, n, g, C, D] scaled; own keys k, v [B, K, n, T, D]; trunk keys [B, K, P, D].

    All n * g * C queries of a group read the trunk's keys at once: the large matmul that makes sharing pay.
    """
    B, K, n, g, C, D = q.shape
    q = q.reshape(B, K, n, g * C, D)
    scores = (q @ k.transpose(-1, -2)).view(B, K, n, g, C, -1)
    if trunk_k is None:
        return ((scores + mask).softmax(-1).view(B, K, n, g * C, -1) @ v).view(B, K, n, g, C, D)
    P = trunk_k.shape[2]
    on_trunk = (q.reshape(B, K, n * g * C, D) @ trunk_k.transpose(-1, -2)).view(B, K, n, g, C, P)
    on_trunk, on_own = (torch.cat([on_trunk, scores], -1) + mask).softmax(-1).split([P, scores.shape[-1]], -1)
    out = (on_own.reshape(B, K, n, g * C, -1) @ v).view(B, K, n * g * C, D)
    return (out + on_trunk.reshape(B, K, n * g * C, P) @ trunk_v).view(B, K, n, g, C, D)


def flat_index(lengths: list[int], width: int, device) -> Tensor:
    """Where the tokens of right-padded rows of these lengths stand in a flat [rows * width] layout."""
    return torch.cat([torch.arange(i * width, i * width + x) for i, x in enumerate(lengths)]
                     or [torch.empty(0, dtype=torch.long)]).to(device)
