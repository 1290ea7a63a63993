"""Gated DeltaNet (Yang et al., arXiv 2412.06464): linear attention, of Qwen3.5.

A head keeps a state S [key_dim, value_dim] in place of keys and values. Each token lets it decay,
then corrects what it holds under the token's key, and reads it:

    S <- exp(g) S,    S <- S + k (beta (v - k^T S))^T,    o = q^T S        g <= 0, 0 < beta < 1

q, k and v come through a short causal convolution, whose last inputs are kept too. So a decode step
(`delta_step`) costs the same however long the text is.

Training and prefill take chunks of 64 tokens (`chunked`). With G the running sum of g in a chunk,
D[i, j] = exp(G_i - G_j) for j <= i, and S its state at the beginning, the corrections u are the
solution of a triangular system (the UT transform of arXiv 2406.06484):

    u_i = beta_i (v_i - exp(G_i) k_i^T S - sum over j < i of D[i, j] (k_i . k_j) u_j)
    o_i = exp(G_i) q_i^T S + sum over j <= i of D[i, j] (q_i . k_j) u_j

All systems are solved at once. Then states are handed from chunk to chunk. The chunks form a tree:
a completion's first goes on from its prompt's last, and gradients meet there again (`Chunks`).

Decays, states and their products are in fp32, whatever the model computes in (float64 stays).
Left out: a fused kernel, and a backward by hand, which would keep fewer activations.
"""

from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.elementwise import gated, rms_norm, wide
from kernels.moves import Gather, Move, copies_of

torch.backends.cudnn.allow_tf32 = False                 # fp32 is fp32, in the convolution too
CHUNK = 64
States = tuple[Tensor, Tensor]      # inputs of the convolution [entries, conv - 1, channels] in the
                                    # model's dtype; S [entries, value_heads, key_dim, value_dim]


@dataclass(frozen=True)
class DeltaSizes:
    key_heads: int                                      # of q and k; each serves as many of v
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int                                           # tokens that the convolution sees

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


def empty_states(sizes: DeltaSizes, entries: int, dtype: torch.dtype, device) -> States:
    S = entries, sizes.value_heads, sizes.key_dim, sizes.value_dim
    return (torch.zeros(entries, sizes.conv - 1, sizes.channels, dtype=dtype, device=device),
            torch.zeros(S, dtype=torch.promote_types(dtype, torch.float32), device=device))


class GatedDeltaNet(nn.ModuleDict):
    """The layer, with the names that it has in a checkpoint. See the top of this file."""

    INPUTS = "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"

    def __init__(self, hidden_size: int, sizes: DeltaSizes, eps: float):
        H, width = sizes.value_heads, sizes.value_heads * sizes.value_dim
        outputs = dict(zip(self.INPUTS, (sizes.channels, width, H, H), strict=True))
        super().__init__({name: nn.Linear(hidden_size, out, False) for name, out in outputs.items()}
                         | {"out_proj": nn.Linear(width, hidden_size, False),
                            "conv1d": nn.Conv1d(sizes.channels, sizes.channels, sizes.conv,
                                                groups=sizes.channels, bias=False),
                            "norm": nn.RMSNorm(sizes.value_dim, eps)})
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor, linear, mix) -> Tensor:
        """x [N, hidden]. linear(x, *modules): the layers' outputs; mix(qkv, g, beta, weight): what
        the tokens read, [N, value_heads, value_dim]."""
        qkv, z, b, a = linear(x, *(self[name] for name in self.INPUTS))
        g = -wide(self.A_log).exp() * F.softplus(wide(a) + self.dt_bias)
        out = mix(qkv, g, wide(b.sigmoid()), self["conv1d"].weight)
        out = rms_norm(out, self["norm"].weight, self["norm"].eps).flatten(1)
        return linear(gated(z, out, "silu"), self["out_proj"])[0]


def heads(x: Tensor, sizes: DeltaSizes) -> list[Tensor]:
    """q, k, v [..., value_heads, D] in fp32 of what the convolution gave, [..., channels].

    q and k have length 1. q is also divided by sqrt(key_dim).
    """
    width = sizes.key_heads * sizes.key_dim
    q, k, v = wide(F.silu(x)).split([width, width, sizes.channels - 2 * width], -1)
    q, k = (y.unflatten(-1, (sizes.key_heads, sizes.key_dim)) for y in (q, k))
    q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    q, k = (y.repeat_interleave(sizes.value_heads // sizes.key_heads, -2) for y in (q, k))
    return [q * sizes.key_dim ** -0.5, k, v.unflatten(-1, (sizes.value_heads, sizes.value_dim))]


# --------------------------------------------------------------------------------------------------
# The decode step


def delta_step(x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, sizes: DeltaSizes,
               states: States, entries: Tensor) -> Tensor:
    """One token in each of B rows: [B, value_heads, value_dim]. Changes the rows' states in place.

    x [B, channels]; g, beta [B, value_heads] fp32; weight [channels, 1, conv]; entries [B].
    """
    before, S = states
    inputs = torch.cat([before[entries], x[:, None]], 1)
    before[entries] = inputs[:, 1:]
    x = (wide(inputs) * wide(weight[:, 0].T)).sum(1).to(x.dtype)
    q, k, v = (y[:, :, None] for y in heads(x, sizes))                          # [B, H, 1, D]
    state = S[entries] * g.exp()[..., None, None]
    state = state + k.mT @ ((v - k @ state) * beta[..., None, None])
    S[entries] = state
    return (q @ state)[:, :, 0].to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Training and prefill


class Chunks:
    """Where the tokens of prefixes and completions lie in chunks, and which chunk follows which.

    Chunks are sorted by depth, their distance from the root; a depth is computed at once. `places`
    [chunks, conv - 1 + W] are a chunk's tokens and those before it that the convolution sees, as
    rows of: a row of zeros, the cached prefixes' last inputs, the packed tokens.
    """

    def __init__(self, prefix_lengths: list[int], completion_lengths: list[list[int]],
                 cached: bool, conv: int, device):
        lengths = [*([] if cached else prefix_lengths), *chain(*completion_lengths)]
        self.before, self.width = conv - 1, min(CHUNK, max(lengths))
        self.lines, self.parents, self.depths, self.ends, self.tails = [], [], [], [], []
        first = 1 + cached * self.before * len(prefix_lengths)
        starts = accumulate(lengths, initial=first)
        # what a completion goes on from: its prefix's last inputs, last chunk and depth
        if cached:
            openings = [(torch.arange(self.before) + 1 + i * self.before, i, 0)
                        for i in range(len(prefix_lengths))]
        else:
            nothing = torch.zeros(self.before, dtype=torch.long), 0, 0
            openings = [self.add(next(starts), length, *nothing) for length in prefix_lengths]
            self.ends, self.tails = [], []
        for opening, row in zip(openings, completion_lengths, strict=True):
            for length in row:
                start = next(starts)
                if length:
                    self.add(start, length, *opening)
        self.sort(first + sum(lengths), cached and len(prefix_lengths), device)

    def add(self, start: int, length: int, before: Tensor, parent: int, depth: int):
        """A prefix or completion behind what it goes on from: (its last inputs, last chunk, depth
        of a chunk behind it)."""
        count, chunk = -(-length // self.width), len(self.depths)
        line = torch.cat([before, torch.arange(start, start + length)])
        padded = F.pad(line, (0, count * self.width - length))
        self.lines.append(padded.unfold(0, self.before + self.width, self.width))
        self.parents += [parent, *range(chunk, chunk + count - 1)]
        self.depths += range(depth, depth + count)
        self.ends.append(chunk + count - 1)
        self.tails.append(line[length:])
        return self.tails[-1], self.ends[-1], depth + count

    def sort(self, rows: int, roots: int, device) -> None:
        """rows: that `places` chooses from. roots: states that the first chunks go on from."""
        depths, parents = torch.tensor(self.depths), torch.tensor(self.parents)
        order, self.counts = depths.argsort(stable=True), depths.bincount().tolist()
        rank = order.argsort()
        places = torch.cat(self.lines)[order]
        self.ends = rank[torch.tensor(self.ends, dtype=torch.long)].to(device)
        self.tails = torch.stack(self.tails).to(device) if self.tails else None
        inside = places[:, self.before:].flatten()
        real = inside.nonzero()[:, 0]
        self.index = real[inside[real].argsort()].to(device)    # of each packed token
        self.places = places.flatten().to(device)
        self.copies = copies_of(self.places, rows)
        # for each depth: which of the states before its chunks go on from; None: from each
        self.steps = []
        bounds = [*accumulate(self.counts, initial=0)]
        for depth, (start, end) in enumerate(pairwise(bounds)):
            size = self.counts[depth - 1] if depth else roots or end
            keys = parents[order[start:end]]
            if depth:
                keys = rank[keys] - bounds[depth - 1]
            elif not roots:
                keys = torch.arange(end)
            if torch.equal(keys, torch.arange(size)):
                self.steps.append(None)
            else:
                self.steps.append((keys.to(device), copies_of(keys.to(device), size)))


def delta_net(x: Tensor, g: Tensor, beta: Tensor, weight: Tensor, sizes: DeltaSizes,
              chunks: Chunks, before: States | None = None):
    """What N packed tokens read, [N, value_heads, value_dim].

    x [N, channels]; g, beta [N, value_heads] fp32; weight [channels, 1, conv]. before: the cached
    prefixes' states; with them it returns (that, the completions' states at their ends).
    """
    start = x.new_zeros(1, sizes.channels)
    rows = torch.cat([start, x] if before is None else [start, before[0].flatten(0, 1), x])
    W, shape = chunks.width, (-1, chunks.before + chunks.width, sizes.channels)
    inputs = Gather.apply(rows, chunks.places, chunks.copies).view(shape)
    conv = F.conv1d(inputs.mT, weight, groups=sizes.channels).mT
    q, k, v = (y.transpose(1, 2) for y in heads(conv, sizes))                   # [chunks, H, W, D]
    size = len(conv) * W
    g, beta = (Move.apply(y, chunks.index, size, True).view(-1, W, y.shape[1]).mT[..., None]
               for y in (g, beta))                                              # [chunks, H, W, 1]
    out, states = chunked(q, k, v, g, beta, chunks, before and before[1])
    out = Move.apply(out.transpose(1, 2).flatten(0, 1), chunks.index, 0, False).to(x.dtype)
    return out if before is None else (out, (rows[chunks.tails], torch.cat(states)[chunks.ends]))


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: Chunks,
            state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """(what each token reads [chunks, H, W, value_dim], the states after the chunks of each depth).

    q, k, v [chunks, H, W, D]; g, beta [chunks, H, W, 1], 0 for padding, which so changes nothing.
    state: what the first chunks go on from; None: from nothing.
    """
    total = g.cumsum(2)
    later = torch.ones(chunks.width, chunks.width, dtype=torch.bool, device=q.device).triu(1)
    decay = (total - total.mT).masked_fill(later, -torch.inf).exp()
    system = (k * beta) @ k.mT * decay
    sides = torch.cat([v, k * total.exp()], -1) * beta
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own, read = solved.split([v.shape[-1], k.shape[-1]], -1)
    within, q = q @ k.mT * decay, q * total.exp()
    k, whole = k * (total[:, :, -1:] - total).exp(), total[:, :, -1:].exp()
    if state is None:
        state = q.new_zeros(chunks.counts[0], v.shape[1], k.shape[-1], v.shape[-1])
    out, states = [], []
    parts = zip(*(x.split(chunks.counts) for x in (q, k, own, read, within, whole)), strict=True)
    for step, (q, k, own, read, within, whole) in zip(chunks.steps, parts, strict=True):
        if step:
            state = Gather.apply(state, *step)
        u = own - read @ state
        out.append(q @ state + within @ u)
        state = state * whole + k.mT @ u
        states.append(state)
    return torch.cat(out), states
