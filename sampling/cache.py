"""The sampler's cache: keys and values of the tokens so far, and the decode step's attention to them.

Prompts that open alike (a persona's system message) share one *trunk*, and so do the n samples of a prompt; an entry of
`row_kv` holds what a row has of its own. Live rows are contiguous, row i of the batch in entry i. The decode step reads
a trunk's keys once for all its rows, as one matmul; flash-attn, which reads one cache a row, gets a copy instead.

Left out: paged memory. The cache grows by whole entries and by WIDTH tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import bias, flash_attn_with_kvcache, uses_flash
from model import Transformer

MIN_SHARED = 8                                          # a common opening shorter than this is not worth a trunk
WIDTH = 32                                              # the cache grows by this many tokens


@dataclass
class Trunk:
    """A run of tokens that several rows open with."""
    ids: list[int]
    users: int                                          # rows and waiting prompts that need it
    at: int = -1                                        # its place in the cache; -1: not there


def shared_openings(prompts: list[list[int]]) -> list[Trunk]:
    """A trunk for each prompt, one object for all that open alike; a prompt's last token is never in it.

    In sorted order a prompt joins the group before it while at least half of the group's opening remains shared.
    """
    trunks, group = [Trunk([], 0)] * len(prompts), Trunk([], 0)
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        room = min(len(group.ids), len(prompts[i]) - 1)
        common = next((j for j in range(room) if group.ids[j] != prompts[i][j]), room)
        if common >= max(MIN_SHARED, len(group.ids) / 2 if group.users > 1 else 0):
            group.ids, group.users = group.ids[:common], group.users + 1
        else:
            group = Trunk(prompts[i][:-1], 1)
        trunks[i] = group
    return [t if t.users > 1 else Trunk([], 1) for t in trunks]


def prefilled(prompts: list[list[int]]) -> int:
    """How many tokens the sampler computes before it decodes: shared openings once."""
    trunks = shared_openings(prompts)
    return (sum(len(prompt) - len(trunk.ids) for prompt, trunk in zip(prompts, trunks, strict=True))
            + sum(len(trunk.ids) for trunk in {id(t): t for t in trunks}.values()))


class Cache:
    """Per layer keys [entries, kv_heads, D, T], transposed as the decode matmul wants them, and values [.., T, D].

    For flash-attn both lie in memory as it wants them, [entries, T, kv_heads, D], under the same shapes.
    """

    def __init__(self, model: Transformer, slots: int):
        self.c, self.dtype, self.device, self.slots = model.c, model.dtype, model.device, slots
        self.flash = uses_flash(model.head_weight)
        self.trunk_kv, self.row_kv = self.empty(1, 0), self.empty(0, 0)
        self.placed: list[Trunk] = []                   # the trunk in each entry
        self.own = torch.zeros(slots, dtype=torch.long, device=model.device)    # tokens in each row's entry
        self.cells: tuple | None = None                 # which trunk each row reads; None: rows or trunks have changed

    # -- what is kept ----------------------------------------------------------------------------------------------

    def empty(self, count: int, width: int) -> list[tuple[Tensor, Tensor]]:
        K, D = self.c.num_kv_heads, self.c.head_dim

        def zeros(*shape):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        if self.flash:
            return [(zeros(count, width, K, D).permute(0, 2, 3, 1), zeros(count, width, K, D).transpose(1, 2))
                    for _ in range(self.c.num_layers)]
        return [(zeros(count, K, D, width), zeros(count, K, width, D)) for _ in range(self.c.num_layers)]

    def grown(self, store: list, count: int, width: int) -> list:
        """The same contents with room for `count` entries of `width` tokens, if need be.

        Widths grow by steps, not by doubling: a decode step reads all of it, so copying it every WIDTH steps is cheap.
        """
        have, wide = store[0][1].shape[0], store[0][1].shape[2]
        if count <= have and width <= wide:
            return store
        new = self.empty(max(count, 2 * have) if count > have else have, max(wide, -(-width // WIDTH) * WIDTH))
        for (k, v), (new_k, new_v) in zip(store, new, strict=True):
            new_k[:have, ..., :wide], new_v[:have, :, :wide] = k, v
        return new

    @staticmethod
    def write(store: list, at: int, start: int, layers: list[tuple[Tensor, Tensor]], tokens: slice) -> None:
        """Copies the packed keys and values [N, kv_heads, D] of `tokens` behind the first `start` of entry `at`."""
        for (k, v), (new_k, new_v) in zip(store, layers, strict=True):
            new_k, new_v = new_k[tokens], new_v[tokens]
            k[at, :, :, start:start + len(new_k)] = new_k.permute(1, 2, 0)
            v[at, :, start:start + len(new_v)] = new_v.transpose(0, 1)

    @staticmethod
    def copy(source: list, at: int, target: list, to: int, tokens: int | None = None) -> None:
        """The first `tokens` (default: all) of entry `at` of one store into entry `to` of the same or the other."""
        for (k, v), (new_k, new_v) in zip(source, target, strict=True):
            new_k[to, ..., :tokens], new_v[to, :, :tokens] = k[at, ..., :tokens], v[at, :, :tokens]

    @staticmethod
    def clear(store: list, at: int) -> None:
        """Entry `at` without what it held: a mask hides numbers from the next one there, but not NaNs."""
        for k, v in store:
            k[at], v[at] = 0, 0

    def place(self, trunk: Trunk) -> None:
        """An entry for a trunk, to be written."""
        trunk.at, self.cells = len(self.placed), None
        self.placed.append(trunk)
        self.trunk_kv = self.grown(self.trunk_kv, len(self.placed), len(trunk.ids))

    def release(self, trunk: Trunk) -> None:
        """One user less; without any the trunk's entry goes to the last one."""
        trunk.users, self.cells = trunk.users - 1, None
        if trunk.users or trunk.at < 0:
            return
        last = self.placed.pop()
        if last is not trunk:
            self.copy(self.trunk_kv, last.at, self.trunk_kv, trunk.at)
            self.placed[trunk.at], last.at = last, trunk.at
        self.clear(self.trunk_kv, len(self.placed))

    def extend(self, trunk: Trunk, opening: Trunk, kept: list, tokens: slice) -> None:
        """Places a trunk that opens with another one and goes on with `tokens` of the packed keys and values `kept`."""
        self.place(trunk)
        if opening.ids:
            self.copy(self.trunk_kv, opening.at, self.trunk_kv, trunk.at)
        self.write(self.trunk_kv, trunk.at, len(opening.ids), kept, tokens)

    def start_row(self, at: int, trunk: Trunk, kept: list | None, tokens: slice) -> None:
        """Entry `at` becomes a row on a trunk, with `tokens` of `kept` of its own."""
        own = tokens.stop - tokens.start
        copied = len(trunk.ids) if self.flash else 0
        self.row_kv = self.grown(self.row_kv, self.slots, copied + own + 1)
        if copied:
            self.copy(self.trunk_kv, trunk.at, self.row_kv, at, copied)
        if kept:
            self.write(self.row_kv, at, copied, kept, tokens)
        self.own[at], self.cells = copied + own, None

    def move_row(self, source: int, target: int) -> None:
        self.copy(self.row_kv, source, self.row_kv, target)
        self.own[target] = self.own[source]

    def reader(self, trunks: list[Trunk]):
        """layer -> keys and values [trunks, kv_heads, P, D], P the longest's length. An empty trunk, not in the
        cache, gets those of entry 0: its length hides them all."""
        at, P = torch.tensor([max(t.at, 0) for t in trunks], device=self.device), max(len(t.ids) for t in trunks)

        def read(layer: int) -> tuple[Tensor, Tensor]:
            k, v = self.trunk_kv[layer]
            return k[at, :, :, :P].transpose(-1, -2), v[at, :, :P]

        return read

    # -- what a decode step reads ----------------------------------------------------------------------------------

    def decode_step(self, trunks: list[Trunk], B: int):
        """(position_ids [B], attend): attend(layer, q, k, v) stores the new token's k and v and attends to all before
        it. trunks: of the rows that decode; the others up to B are there for the shape alone."""
        self.row_kv = self.grown(self.row_kv, self.slots, int(self.own[:B].max()) + 1)
        if self.flash:
            return self.own[:B], self.flash_attention
        rows, own = torch.arange(B, device=self.device), self.own[:B]
        if self.cells is None or self.cells[0] != len(trunks):
            self.cells = len(trunks), *self.trunk_cells(trunks)
        _, trunk_length, to_grid, from_grid = self.cells
        S, P, T = len(self.placed), self.trunk_kv[0][0].shape[-1] if self.placed else 0, self.row_kv[0][0].shape[-1]
        trunk_length, from_grid = trunk_length[:B], from_grid[:B * self.c.num_kv_heads]
        biases = {window: bias(own[:, None], T, trunk_length, P, window, self.dtype)[:, None]
                  for window in set(self.c.windows)}                            # [B, 1, 1, P + T]

        def attend(layer, q, k, v):
            (_, K, D), g = k.shape, q.shape[1] // k.shape[1]
            own_k, own_v = (x[:B] for x in self.row_kv[layer])
            own_k[rows, :, :, own], own_v[rows, :, own] = k, v
            q = (q * self.c.attn_scale).reshape(B * K, g, D)
            scores = q @ own_k.flatten(0, 1)                                    # [B * K, g, T]
            if S:                                       # one matmul a trunk and kv head: all its rows' queries at once
                trunk_k, trunk_v = (x[:S].flatten(0, 1) for x in self.trunk_kv[layer])
                grid = q.index_select(0, to_grid).view(S * K, -1, D)
                on_trunk = (grid @ trunk_k).view(-1, g, P).index_select(0, from_grid)
                scores = torch.cat([on_trunk, scores], -1)
            weights = scores.view(B, K, g, -1).add_(biases[self.c.windows[layer]]).softmax(-1).view(B * K, g, -1)
            out = weights[..., P:] @ own_v.flatten(0, 1)
            if S:
                grid = weights[..., :P].index_select(0, to_grid).view(S * K, -1, P)
                out += (grid @ trunk_v).view(-1, g, D).index_select(0, from_grid)
            return out.view(B, K * g, D)

        return trunk_length + own, attend

    def flash_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One call that appends k and v to the rows' caches and attends to them (flash-attn 2, arXiv 2307.08691)."""
        B, (own_k, own_v) = len(q), self.row_kv[layer]
        return flash_attn_with_kvcache(
            q[:, None], own_k[:B].permute(0, 3, 1, 2), own_v[:B].transpose(1, 2), k[:, None], v[:, None],
            cache_seqlens=self.own[:B].int(), **self.c.flash(layer))[:, 0]

    def trunk_cells(self, trunks: list[Trunk]) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's trunk length [slots], and where (row, kv head) and (trunk, kv head, member) find each other: the
        row of every cell of a grid [trunks, kv_heads, widest], and the cell of every row [slots * kv_heads].

        A row without a trunk sits at the first one, all of which it is hidden from. Empty cells point at row 0 and
        rows that are not live at cell 0; what comes of that is not read.
        """
        members: list[list[int]] = [[] for _ in self.placed]
        length, cell = [0] * self.slots, [(0, 0)] * self.slots
        for i, trunk in enumerate(trunks if self.placed else ()):
            at = max(trunk.at, 0)
            length[i], cell[i] = len(trunk.ids), (at, len(members[at]))
            members[at].append(i)
        heads, widest = range(self.c.num_kv_heads), max(map(len, members), default=0)
        to_grid = [i * len(heads) + h for rows in members for h in heads for i in rows + [0] * (widest - len(rows))]
        from_grid = [(at * len(heads) + h) * widest + j for at, j in cell for h in heads]
        return tuple(torch.tensor(x, dtype=torch.long, device=self.device) for x in (length, to_grid, from_grid))
