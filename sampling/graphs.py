"""CUDA graphs of the decode step: one launch in place of the thousands of its small operators.

A graph replays recorded kernels on the memory they were recorded with. So it holds for one number
of rows (a *bucket*) and for the cache's present memory, which it does not keep alive. It is
recorded when its bucket comes up a second time, and anew after the cache has grown. The first time
is an ordinary step, in which libraries set themselves up. All graphs share one pool of memory.

A replay must find its inputs in their place. So what changes from step to step is copied into
`inputs`, keys and values are written into the cache, and the weights change in place only. Nothing
in the step may read from the GPU or upload to it.

Left out: the prefill, whose shapes differ every time, and the draw. **Not run on a GPU by us**:
tested on a CPU with a recorder that replays operators on the same memory.
"""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from sampling.cache import Cache


def bucket(rows: int) -> int:
    """The next of few batch sizes: a new one costs the CPU's matmul library a kernel, and a GPU a
    graph."""
    step = 8 if rows <= 64 else 16
    return -(-rows // step) * step


class Graphs:
    """The decode step of B rows: (step, inputs [5, B]) -> hidden [B, H], valid until the next call.

    step: the function that is recorded, from inputs on the device to hidden states; always the same
    one. It is not kept, so that a Sampler, its cache and its graphs go as soon as nobody holds it.
    """

    def __init__(self, cache: Cache):
        self.cache, self.grown = cache, None

    def __call__(self, step: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        B, kv = inputs.shape[1], (self.cache.row_kv, self.cache.prefix_kv)
        if self.grown != (grown := [x.grown for x in kv]):
            self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
            self.grown, self.pool = grown, None                         # no graph, no pool
            self.inputs = torch.zeros(5, bucket(kv[0].entries), dtype=torch.int32,
                                      device=self.cache.device)
        if B not in self.recorded:                      # many buckets come up only once
            self.recorded[B] = None
            return step(inputs)
        self.inputs[:, :B] = inputs
        graph, hidden = self.recorded[B] = self.recorded[B] or self.record(step, self.inputs[:, :B])
        graph.replay()
        return hidden

    def record(self, step, inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()                    # an old graph that is collected now would end the recording
        try:
            # thread_local: with --overlap another thread trains meanwhile
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                hidden = step(inputs)
        finally:
            if collects:
                gc.enable()
        self.pool = self.pool or graph.pool()
        return graph, hidden
