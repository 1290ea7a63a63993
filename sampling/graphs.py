"""CUDA graphs of the decode step: one launch in place of the thousands of its small operators.

A graph replays recorded kernels on the memory they were recorded with. So it holds for one batch
size (the sampler rounds them up to multiples of 8) and for the cache's present memory. It is
recorded when its size first comes up, and again after the cache has grown, at the price of two
ordinary steps. All graphs share one pool of memory.

A replay must find its inputs in their place. So the tokens are copied into `tokens`, the rows'
lengths stay in `cache.row_lengths`, keys and values are written into the cache, and the weights
change in place only. Nothing in the step may read from the GPU or upload to it.

Left out: the prefill, whose shapes differ every time, and the draw. **Not run on a GPU by us**:
tested on a CPU with a recorder that replays operators on the same memory. Hence `--cuda-graphs`,
off by default.
"""

import torch
from torch import Tensor

from model import Transformer
from sampling.cache import Cache


class Graphs:
    """The decode step of B rows: tokens [B] -> hidden [B, H], valid until the next call.

    Raises ValueError where flash-attn does not read the cache. Its kernel takes the rows' lengths
    from memory; our own attention has other shapes each step.
    """

    def __init__(self, model: Transformer, cache: Cache):
        if not cache.flash:
            raise ValueError("--cuda-graphs needs a GPU, flash-attn, and bfloat16 or float16")
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(cache.slots, dtype=torch.long, device=model.device)
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.layers, self.pool = None, None

    def __call__(self, tokens: Tensor) -> Tensor:
        B = len(tokens)
        self.tokens[:B] = tokens
        layers = self.cache.row_kv.layers
        if self.layers is not layers:                   # grown: the recorded addresses are gone
            self.layers, self.recorded, self.pool = layers, {}, None    # no graph, no pool
        if B not in self.recorded:
            self.recorded[B] = self.record(B)
        graph, hidden = self.recorded[B]
        graph.replay()
        return hidden

    def record(self, B: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        step = self.tokens[:B], self.cache.row_lengths[:B], self.cache.flash_attention
        self.model(*step)                               # libraries set themselves up, unrecorded
        graph = torch.cuda.CUDAGraph()
        # thread_local: with --overlap another thread trains meanwhile
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            hidden = self.model(*step)
        self.pool = self.pool or graph.pool()
        return graph, hidden
