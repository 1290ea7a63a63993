"""The sampler's cache: keys and values of the tokens so far, or the state of a gated DeltaNet.

Prompts that open alike (a persona's system message) share one *prefix*, and so do the n samples of
a prompt. A row's own entry holds only what comes behind its prefix. Nothing is moved: a decode step
is told which entries its rows have. What the rows then attend to: kernels/decode_attention.py.

The cache lives as long as its Sampler. It grows when a call needs more, and never shrinks.

Left out: paged memory. An entry has room for the longest row.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from kernels.attention import PrefixAttention
from kernels.decode_attention import Rows, decode_attention
from kernels.delta import delta_step, empty_states
from model import Transformer

MIN_SHARED = 8                                          # a shorter opening is not worth sharing
WIDTH = 32                  # tokens: what grows often has its CUDA graphs recorded often


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


def slots_for(model: Transformer, tokens: int) -> int:
    """Rows that a device decodes in little more time than one. On a GPU their keys and values may
    take a quarter of its memory. tokens: in the longest row, with its prompt."""
    if model.device.type != "cuda":
        return 192
    memory = torch.cuda.get_device_properties(model.device).total_memory
    return max(8, min(512, memory // 4 // row_bytes(model, tokens) // 8 * 8))


def row_bytes(model: Transformer, tokens: int) -> int:
    """Of a row of so many tokens: keys and values, and the states of gated DeltaNets."""
    states = sum(x.nbytes for _ in model.c.delta_layers
                 for x in empty_states(model.c.delta, 1, model.dtype, "meta"))
    return tokens * token_bytes(model) + states


def token_bytes(model: Transformer) -> int:
    """Of a token's keys and values in all layers."""
    c = model.c
    layers = c.num_layers - len(c.delta_layers)
    return 2 * layers * c.num_kv_heads * c.head_dim * model.dtype.itemsize


class KeyValues:
    """(keys, values) a layer, both [entries, kv_heads, T, D], and which entries are free. Of a
    gated DeltaNet: its kernels.delta.States.

    What an entry holds beyond its length is whatever was there. grown: how often the memory was
    replaced.
    """

    def __init__(self, model: Transformer):
        self.c, self.like = model.c, {"dtype": model.dtype, "device": model.device}
        self.entries, self.width, self.grown, self.free = 1, 0, 0, [0]
        self.layers = self.empty(1, 0)

    def empty(self, entries: int, width: int) -> list[tuple[Tensor, Tensor]]:
        shape, c = (entries, self.c.num_kv_heads, width, self.c.head_dim), self.c
        return [empty_states(c.delta, entries, **self.like) if i in c.delta_layers else
                (torch.empty(shape, **self.like), torch.empty(shape, **self.like))
                for i in range(c.num_layers)]

    def reserve(self, entries: int, width: int) -> None:
        """Makes room for so many entries of so many tokens, if need be; what is in use stays."""
        count = self.entries
        if entries <= count and width <= self.width:
            return
        self.grown += 1
        self.width = max(-(-width // WIDTH) * WIDTH, self.width)
        old = self.layers if len(self.free) < count else []
        self.layers = []                                # free before more is asked for
        self.entries = max(entries, count)
        self.layers = self.empty(self.entries, self.width)
        self.free += range(count, entries)
        for pair, grown in zip(old, self.layers, strict=False):
            for x, larger in zip(pair, grown, strict=True):
                larger[:count, :, :x.shape[2]] = x

    def take(self) -> int:
        """A free entry."""
        if not self.free:
            self.reserve(2 * self.entries, self.width)
        return self.free.pop()


class Cache:
    """The entries of rows and of prefixes, and the attention of prefill and decode steps."""

    def __init__(self, model: Transformer):
        self.c, self.device = model.c, model.device
        self.prefix_kv, self.row_kv = KeyValues(model), KeyValues(model)
        self.spare = 0                                  # a row entry for what no row needs

    def add_prefix(self, prefix: Prefix, opening: Prefix) -> None:
        """Takes an entry for a prefix. It opens with another one, which is copied."""
        prefix.entry, tokens = self.prefix_kv.take(), len(opening.ids)
        for i, layer in enumerate(self.prefix_kv.layers):
            for x in layer if tokens and i not in self.c.delta_layers else ():
                x[prefix.entry, :, :tokens] = x[opening.entry, :, :tokens]

    def start(self, entries: list[tuple[int, int]]) -> None:
        """Rows go on from their prefix's states. entries: of (prefix, row)."""
        if not (self.c.delta_layers and entries):
            return
        prefixes, rows = torch.tensor(entries, device=self.device).T
        for i in self.c.delta_layers:
            for own, x in zip(self.row_kv.layers[i], self.prefix_kv.layers[i], strict=True):
                own[rows] = x[prefixes]

    def release(self, prefix: Prefix) -> None:
        """One user less; the last one frees the entry."""
        prefix.users -= 1
        if not prefix.users and prefix.entry >= 0:
            self.prefix_kv.free.append(prefix.entry)

    # -- what a forward needs: (position_ids, attend) ----------------------------------------------

    def prefill_step(self, prefixes: list[Prefix], lengths: list[int], kv: KeyValues,
                     places: list[tuple[int, int]]):
        """For packed runs of tokens, each behind its prefix: (position_ids [N], attend).

        attend(layer, q, k, v) stores each run's k and v in `kv`, at its place (entry, start), and
        attends to its prefix and the tokens before. Neighbours with the same prefix read it
        together. attend.delta does the same with states.
        """
        runs = zip(prefixes, lengths, strict=True)
        groups = [list(group) for _, group in groupby(runs, key=lambda run: id(run[0]))]
        prefixes = [group[0][0] for group in groups]
        prefix_lengths = [len(prefix.ids) for prefix in prefixes]
        attention = PrefixAttention(
            prefix_lengths, [[length for _, length in group] for group in groups], self.c,
            self.device, cached=True)
        entries = torch.tensor([entry for (entry, _), length in zip(places, lengths, strict=True)
                                for _ in range(length)], device=self.device)
        at = torch.cat([torch.arange(start, start + length) for (_, start), length
                        in zip(places, lengths, strict=True)]).to(self.device)
        # An empty prefix is not in the cache. It gets entry 0, all of which is masked.
        sources = torch.tensor([max(prefix.entry, 0) for prefix in prefixes], device=self.device)
        P = max(prefix_lengths)
        unused = torch.arange(P) >= torch.tensor(prefix_lengths)[:, None]
        unused = unused[:, None, :, None].to(self.device)
        states = torch.tensor([entry for entry, _ in places], device=self.device)
        empty = torch.tensor([not length for length in prefix_lengths], device=self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for x, new in zip(kv.layers[layer], (k, v), strict=True):
                x[entries, :, at] = new
            prefix_kv = [x[sources, :, :P].masked_fill_(unused, 0)      # may be NaN
                         for x in self.prefix_kv.layers[layer]]
            return attention(layer, q, k, v, prefix_kv)

        def delta(layer: int, *inputs: Tensor) -> Tensor:
            before = [x[sources] for x in self.prefix_kv.layers[layer]]
            for x in before:
                x.movedim(0, -1).masked_fill_(empty, 0)
            out, after = attention.delta(layer, *inputs, before)
            for x, new in zip(kv.layers[layer], after, strict=True):
                x[states] = new
            return out

        attend.delta = delta
        return attention.position_ids, attend

    def decode_step(self, rows: Rows, widths: tuple[int, int] | None = None):
        """For one new token in each row: (position_ids [B], attend).

        attend(layer, q, k, v) stores the new k and v behind each row's tokens and attends to all of
        them. widths: how much of their entries the rows need, and of their prefixes; None: of all
        alike. With them the order of a sum does not depend on what the cache held before.
        """
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layers = self.row_kv.layers[layer], self.prefix_kv.layers[layer]
            if widths:                                  # narrow refuses what the cache has not
                layers = [[x.narrow(2, 0, width) for x in kv]
                          for kv, width in zip(layers, widths, strict=True)]
            return decode_attention(q, k, v, *layers, rows, self.c.attn_scale,
                                    self.c.windows[layer])

        def delta(layer: int, *inputs: Tensor) -> Tensor:
            return delta_step(*inputs, self.c.delta, self.row_kv.layers[layer],
                              rows.entries.long())

        attend.delta = delta
        return rows.prefix_lengths + rows.lengths, attend
