"""What one shared copy of the prompt saves in training: a group of 8, prompt 120 tokens, completions 40.

    python benchmarks/prompt_sharing.py [--repeats 5] [--group 8 --prompt 120 --completion 40]

Forward and backward of the embedded model, log-probs included, against the padded batch: each completion behind its own
copy of the prompt, all rows of one length (so that it wastes nothing on padding; real batches do), causal attention
over whole rows, the same fused head on the completion tokens alone. Both give the same log-probs (the gap is printed).
FLOPs are counted by hooks on the linear layers as they run. The last line is JSON: flops_ratio, time_ratio (medians of
alternating runs).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import weights
from common.command import positive
from kernels import linear_logprob
from model import completion_logprobs, pack


def shared(model, prompt: list[int], completions: list[list[int]]) -> Tensor:
    return completion_logprobs(model, pack([(prompt, completions)], model))[0]


def padded(model, prompt: list[int], completions: list[list[int]]) -> Tensor:
    packed = pack([(prompt + completion[:-1], []) for completion in completions], model)
    hidden = model(packed.input_ids, packed.position_ids, packed.attend)
    hidden = hidden.view(len(completions), -1, hidden.shape[-1])[:, len(prompt) - 1:].flatten(0, 1)
    return linear_logprob(hidden, model.head_weight, torch.tensor(completions).flatten(), 1.0, model.c.softcap)[0]


def counted_flops(model, way, *batch) -> int:
    """2 * rows * in * out of every linear layer that runs in one forward of `way`."""
    found = []

    def count(layer, inputs, output):
        found.append(2 * inputs[0].shape[0] * layer.weight.numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    way(model, *batch)
    for hook in hooks:
        hook.remove()
    return sum(found)


def seconds(model, way, *batch) -> float:
    start = time.perf_counter()
    way(model, *batch).sum().backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=positive, default=5)
    p.add_argument("--group", type=positive, default=8)
    p.add_argument("--prompt", type=positive, default=120)
    p.add_argument("--completion", type=positive, default=40)
    args = p.parse_args()
    model, _ = weights.load(weights.EMBEDDED, device="cpu")
    draw = torch.Generator().manual_seed(0)
    batch = (torch.randint(3, 49000, (args.prompt,), generator=draw).tolist(),
             torch.randint(3, 49000, (args.group, args.completion), generator=draw).tolist())
    with torch.no_grad():
        gap = (shared(model, *batch) - padded(model, *batch)).abs().max().item()
        flops = {way: counted_flops(model, way, *batch) for way in (shared, padded)}
    times: dict = {shared: [], padded: []}
    for repeat in range(args.repeats + 1):
        for way in (shared, padded):
            taken = seconds(model, way, *batch)
            if repeat:                                  # the first pass warms the matmul library
                times[way].append(taken)
            print(f"{way.__name__}  {flops[way] / 1e9:.0f} GFLOP forward  {taken:.2f} s", file=sys.stderr)
    ratio = statistics.median(times[padded]) / statistics.median(times[shared])
    print(json.dumps({"flops_ratio": round(flops[padded] / flops[shared], 2), "time_ratio": round(ratio, 2),
                      "largest_logprob_gap": round(gap, 6), "dtype": str(model.dtype), "repeats": args.repeats,
                      "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
