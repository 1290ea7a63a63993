"""The sampler's cache: keys and values of the tokens so far, and the attention that reads them.

Prompts that open alike (a persona's system message) share one *prefix*, and so do the n samples of
a prompt. A row's own entry holds only what comes behind its prefix. Live rows are contiguous: row i
of the batch is entry i. The decode step reads a prefix's keys once for all its rows, as one matmul.
flash-attn reads one entry per row, so there a row starts with a copy of its prefix.

Left out: paged memory. The cache grows by whole entries and by WIDTH tokens.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import PrefixAttention, bias, flash_attn_with_kvcache, uses_flash
from model import Transformer

MIN_SHARED = 8                                          # a shorter opening is not worth sharing
WIDTH = 32                                              # the cache grows by this many tokens


@dataclass(eq=False)                                    # two prefixes of the same ids are not one
class Prefix:
    """A run of tokens that several rows open with."""
    ids: list[int]
    users: int                                          # rows and waiting prompts that need it
    entry: int = -1                                     # its entry in the cache; -1: not there


def shared_openings(prompts: list[list[int]]) -> list[Prefix]:
    """A prefix for each prompt, one object for all that open alike; empty where nothing is shared.

    A prompt's last token is never in it. In sorted order a prompt joins the group before it while
    at least half of the group's opening remains shared.
    """
    group = Prefix([], 0)
    prefixes = [group] * len(prompts)
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        room = min(len(group.ids), len(prompts[i]) - 1)
        common = next((j for j in range(room) if group.ids[j] != prompts[i][j]), room)
        if common >= max(MIN_SHARED, len(group.ids) / 2 if group.users > 1 else 0):
            group.ids, group.users = group.ids[:common], group.users + 1
        else:
            group = Prefix(prompts[i][:-1], 1)
        prefixes[i] = group
    return [prefix if prefix.users > 1 else Prefix([], 1) for prefix in prefixes]


def prefilled(prompts: list[list[int]]) -> int:
    """How many tokens the sampler computes before it decodes: shared openings once."""
    prefixes = shared_openings(prompts)
    saved = sum(len(prefix.ids) for prefix in prefixes)
    return sum(map(len, prompts)) - saved + sum(len(prefix.ids) for prefix in set(prefixes))


class KeyValues:
    """One (keys, values) a layer: keys [entries, kv_heads, D, T], as the decode step's matmul wants
    them, and values [entries, kv_heads, T, D].

    For flash-attn both lie in memory as [entries, T, kv_heads, D], under the same shapes.
    """

    def __init__(self, model: Transformer, entries: int, flash: bool):
        self.c, self.dtype, self.device, self.flash = model.c, model.dtype, model.device, flash
        self.layers = self.empty(entries, 0)

    def empty(self, entries: int, width: int) -> list[tuple[Tensor, Tensor]]:
        K, D = self.c.num_kv_heads, self.c.head_dim
        kind = {"dtype": self.dtype, "device": self.device}
        layers = []
        for _ in range(self.c.num_layers):
            if self.flash:
                k, v = (torch.zeros(entries, width, K, D, **kind) for _ in range(2))
                layers.append((k.permute(0, 2, 3, 1), v.transpose(1, 2)))
            else:
                layers.append((torch.zeros(entries, K, D, width, **kind),
                               torch.zeros(entries, K, width, D, **kind)))
        return layers

    def grow(self, entries: int, width: int) -> None:
        """Makes room for so many entries of so many tokens, if need be; contents stay.

        Widths grow by steps, not by doubling: a decode step reads all of it, so copying it every
        WIDTH steps is cheap.
        """
        old = self.layers
        count, _, wide, _ = old[0][1].shape
        if entries <= count and width <= wide:
            return
        self.layers = self.empty(max(entries, 2 * count) if entries > count else count,
                                 max(wide, -(-width // WIDTH) * WIDTH))
        for (k, v), (new_k, new_v) in zip(old, self.layers, strict=True):
            new_k[:count, ..., :wide], new_v[:count, :, :wide] = k, v

    def copy(self, entry: int, target: "KeyValues", to: int, tokens: int | None = None) -> None:
        """An entry's first `tokens` (default: all) into entry `to` of target, which may be self."""
        for (k, v), (new_k, new_v) in zip(self.layers, target.layers, strict=True):
            new_k[to, ..., :tokens] = k[entry, ..., :tokens]
            new_v[to, :, :tokens] = v[entry, :, :tokens]

    def clear(self, entry: int) -> None:
        """Zeros an entry: a mask hides old numbers from the next user, but not old NaNs."""
        for k, v in self.layers:
            k[entry], v[entry] = 0, 0


class Place(NamedTuple):
    """Where a run of tokens is written: behind the first `start` tokens of an entry."""
    kv: KeyValues
    entry: int
    start: int


class Cache:
    """Prefixes and rows: who has which entry, and the attention of prefill and decode steps."""

    def __init__(self, model: Transformer, slots: int):
        self.c, self.device, self.slots = model.c, model.device, slots
        self.flash = uses_flash(model.head_weight)
        self.prefix_kv = KeyValues(model, 1, self.flash)
        self.row_kv = KeyValues(model, slots, self.flash)
        self.prefixes: list[Prefix] = []                # the prefix in each entry
        self.row_lengths = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.grid_key, self.grid = None, None           # see decode_step

    # -- entries -----------------------------------------------------------------------------------

    def add_prefix(self, prefix: Prefix, opening: Prefix) -> Place:
        """An entry for a prefix that opens with another one: where its other tokens are written."""
        prefix.entry = len(self.prefixes)
        self.prefixes.append(prefix)
        self.prefix_kv.grow(len(self.prefixes), len(prefix.ids))
        if opening.ids:
            self.prefix_kv.copy(opening.entry, self.prefix_kv, prefix.entry, len(opening.ids))
        return Place(self.prefix_kv, prefix.entry, len(opening.ids))

    def release(self, prefix: Prefix) -> None:
        """One user less; without any, the last prefix takes over the entry."""
        prefix.users -= 1
        if prefix.users or prefix.entry < 0:
            return
        last = self.prefixes.pop()
        if last is not prefix:
            self.prefix_kv.copy(last.entry, self.prefix_kv, prefix.entry)
            self.prefixes[prefix.entry], last.entry = last, prefix.entry
        self.prefix_kv.clear(len(self.prefixes))

    def add_row(self, row: int, prefix: Prefix, tokens: int) -> Place:
        """Row `row` starts on a prefix: where its `tokens` further prompt tokens are written."""
        start = len(prefix.ids) if self.flash else 0
        self.row_kv.grow(self.slots, start + tokens + 1)
        if start:
            self.prefix_kv.copy(prefix.entry, self.row_kv, row, start)
        self.row_lengths[row] = start + tokens
        return Place(self.row_kv, row, start)

    def move_row(self, source: int, target: int) -> None:
        self.row_kv.copy(source, self.row_kv, target)
        self.row_lengths[target] = self.row_lengths[source]

    # -- what a forward needs: (position_ids, attend) ----------------------------------------------

    def prefill_step(self, prefixes: list[Prefix], lengths: list[int], places: list[Place]):
        """For packed runs of tokens, each behind its prefix: (position_ids [N], attend).

        attend(layer, q, k, v) stores each run's k and v in its place, and attends to its prefix and
        the tokens before. Neighbours with the same prefix read it together.
        """
        runs = zip(prefixes, lengths, strict=True)
        groups = [list(group) for _, group in groupby(runs, key=lambda run: id(run[0]))]
        prefixes = [group[0][0] for group in groups]
        attention = PrefixAttention(
            [len(prefix.ids) for prefix in prefixes],
            [[length for _, length in group] for group in groups], self.c, self.device, cached=True)
        # An empty prefix is not in the cache. It gets entry 0, all of which its length hides.
        entries = torch.tensor([max(prefix.entry, 0) for prefix in prefixes], device=self.device)
        P = max(len(prefix.ids) for prefix in prefixes)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            runs = zip(places, lengths, k.split(lengths), v.split(lengths), strict=True)
            for (kv, entry, start), length, run_k, run_v in runs:
                keys, values = kv.layers[layer]
                keys[entry, :, :, start:start + length] = run_k.permute(1, 2, 0)
                values[entry, :, start:start + length] = run_v.transpose(0, 1)
            keys, values = self.prefix_kv.layers[layer]
            prefix_kv = keys[entries, :, :, :P].transpose(-1, -2), values[entries, :, :P]
            return attention(layer, q, k, v, prefix_kv)

        return attention.position_ids, attend

    def decode_step(self, prefixes: list[Prefix], B: int):
        """For one new token in each of B rows: (position_ids [B], attend).

        attend(layer, q, k, v) stores the new k and v behind each row's tokens and attends to all of
        them. prefixes: of the rows that decode; the others up to B only fill the batch.
        """
        self.row_kv.grow(self.slots, int(self.row_lengths[:B].max()) + 1)
        lengths = self.row_lengths[:B]
        if self.flash:
            return lengths, self.flash_attention
        key = [(prefix.entry, len(prefix.ids)) for prefix in prefixes], len(self.prefixes)
        if key != self.grid_key:                        # rows or prefixes have changed
            self.grid_key, self.grid = key, self.prefix_grid(prefixes)
        prefix_lengths, cell_rows, row_cells = self.grid
        prefix_lengths, row_cells = prefix_lengths[:B], row_cells[:B * self.c.num_kv_heads]
        rows, S = torch.arange(B, device=self.device), len(self.prefixes)
        P = self.prefix_kv.layers[0][1].shape[2] if S else 0
        T = self.row_kv.layers[0][1].shape[2]
        biases = {}                                     # by window, [B, 1, 1, P + T]
        for window in set(self.c.windows):
            found = bias(lengths[:, None], T, prefix_lengths, P, window, self.row_kv.dtype)
            biases[window] = found[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (_, K, D), g = k.shape, q.shape[1] // k.shape[1]
            row_k, row_v = (x[:B] for x in self.row_kv.layers[layer])
            row_k[rows, :, :, lengths], row_v[rows, :, lengths] = k, v
            q = (q * self.c.attn_scale).reshape(B * K, g, D)
            scores = q @ row_k.flatten(0, 1)                                    # [B * K, g, T]
            if S:                       # one matmul a prefix and kv head: all its rows at once
                prefix_k, prefix_v = (x[:S].flatten(0, 1) for x in self.prefix_kv.layers[layer])
                cells = q.index_select(0, cell_rows).view(S * K, -1, D)
                cells = (cells @ prefix_k).view(-1, g, P)
                scores = torch.cat([cells.index_select(0, row_cells), scores], -1)
            scores = scores.view(B, K, g, -1).add_(biases[self.c.windows[layer]])
            weights = scores.softmax(-1).view(B * K, g, -1)
            out = weights[..., P:] @ row_v.flatten(0, 1)
            if S:
                cells = weights[..., :P].index_select(0, cell_rows).view(S * K, -1, P)
                out += (cells @ prefix_v).view(-1, g, D).index_select(0, row_cells)
            return out.view(B, K * g, D)

        return prefix_lengths + lengths, attend

    def flash_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The decode step's attend through flash-attn 2 (arXiv 2307.08691), in one call."""
        B, (row_k, row_v) = len(q), self.row_kv.layers[layer]
        return flash_attn_with_kvcache(
            q[:, None], row_k[:B].permute(0, 3, 1, 2), row_v[:B].transpose(1, 2), k[:, None],
            v[:, None], cache_seqlens=self.row_lengths[:B].int(), **self.c.flash(layer))[:, 0]

    def prefix_grid(self, prefixes: list[Prefix]) -> tuple[Tensor, Tensor, Tensor]:
        """How rows find their prefixes in a grid of cells [prefixes, kv_heads, most rows of one].

        Returns each row's prefix length [slots], the (row, kv head) of every cell, and the cell of
        every (row, kv head) [slots * kv_heads]. A row without a prefix sits at the first one, all
        of which is hidden from it. Empty cells point at row 0, and rows that are not live at cell
        0; these results are never read.
        """
        members: list[list[int]] = [[] for _ in self.prefixes]
        lengths, cells = [0] * self.slots, [(0, 0)] * self.slots
        for row, prefix in enumerate(prefixes if self.prefixes else ()):
            entry = max(prefix.entry, 0)
            lengths[row], cells[row] = len(prefix.ids), (entry, len(members[entry]))
            members[entry].append(row)
        K, most = self.c.num_kv_heads, max(map(len, members), default=0)
        cell_rows = []
        for rows in members:
            rows = rows + [0] * (most - len(rows))
            cell_rows += [row * K + head for head in range(K) for row in rows]
        row_cells = [(entry * K + head) * most + j for entry, j in cells for head in range(K)]
        return tuple(torch.tensor(x, dtype=torch.long, device=self.device)
                     for x in (lengths, cell_rows, row_cells))
