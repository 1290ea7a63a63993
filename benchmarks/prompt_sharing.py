"""What one shared copy of the prompt saves in training: a group of 8, prompt 120 tokens, completions 40.

    python benchmarks/prompt_sharing.py [--repeats 5]

Forward and backward of the embedded model with log-probs, shared against the padded batch (each completion with its own
prompt, all of one length, so that the padded batch wastes nothing on padding). Linear-layer FLOPs are counted from the
packed tokens. The last line is JSON: flops_ratio, time_ratio (medians of alternating runs).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import weights
from model import completion_logprobs, pack


def seconds(model, groups) -> float:
    start = time.perf_counter()
    completion_logprobs(model, pack(groups, model.c))[0].sum().backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    model, _ = weights.load(weights.EMBEDDED)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 49000, (120,), generator=draw).tolist()
    completions = torch.randint(3, 49000, (8, 40), generator=draw).tolist()
    shared, plain = [(prompt, completions)], [(prompt, [c]) for c in completions]
    tokens = {name: len(pack(groups, model.c).input_ids) for name, groups in (("shared", shared), ("plain", plain))}
    times: dict = {"shared": [], "plain": []}
    for repeat in range(args.repeats + 1):
        for name, groups in (("shared", shared), ("plain", plain)):
            taken = seconds(model, groups)
            if repeat:                                  # the first pass warms the matmul library
                times[name].append(taken)
            print(f"{name:7} {tokens[name]} tokens  {taken:.2f} s", file=sys.stderr)
    ratio = statistics.median(times["plain"]) / statistics.median(times["shared"])
    print(json.dumps({"flops_ratio": round(tokens["plain"] / tokens["shared"], 2), "time_ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
