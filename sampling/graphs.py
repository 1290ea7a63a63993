"""CUDA graphs of the decode step: one launch in place of the thousands of small ones that a step's operators are.

A graph replays recorded kernels on the memory they were recorded with. So it holds for one batch size (the sampler
rounds them up to multiples of 8) and for the cache's present storage. Each is recorded when its size first comes up and
again after the cache has grown, at the price of two ordinary steps; all share one pool of memory.

What a replay must find in its place is there: the tokens are copied into `tokens`, the rows' lengths are kept in
`cache.own`, keys and values are written into the cache, and the weights change in place alone. Nothing in the step may
read from the GPU or upload to it.

Left out: the prefill, whose shapes differ every time, and the drawing of tokens. **Not run on a GPU by us**: tested on
a CPU with a recorder that replays operators on the same memory. Hence `--cuda-graphs`, off by default.
"""

import torch
from torch import Tensor

from model import Transformer
from sampling.cache import Cache


class Graphs:
    """The decode step of B rows: (tokens [B]) -> hidden [B, H], valid until the next call. Raises ValueError where the
    cache is not read by flash-attn, whose kernel takes the rows' lengths from memory; ours has other shapes each step.
    """

    def __init__(self, model: Transformer, cache: Cache):
        if not cache.flash:
            raise ValueError("--cuda-graphs needs a GPU, flash-attn, and bfloat16 or float16")
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(cache.slots, dtype=torch.long, device=model.device)
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.storage, self.pool = None, None

    def __call__(self, tokens: Tensor) -> Tensor:
        B = len(tokens)
        self.tokens[:B] = tokens
        if self.storage is not self.cache.row_kv:       # it has grown: the recorded addresses are the old ones
            self.storage, self.recorded, self.pool = self.cache.row_kv, {}, None    # a pool ends with its last graph
        if B not in self.recorded:
            self.recorded[B] = self.record(B)
        graph, hidden = self.recorded[B]
        graph.replay()
        return hidden

    def record(self, B: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        def step():
            return self.model(self.tokens[:B], self.cache.own[:B], self.cache.flash_attention)

        step()                                          # libraries set themselves up in a first call, unrecorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):     # --overlap trains meanwhile
            hidden = step()
        self.pool = self.pool or graph.pool()
        return graph, hidden
