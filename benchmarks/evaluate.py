"""How long does an evaluation take, and how long do the same prompts take through transformers.generate?

    python benchmarks/evaluate.py --personas 24 --problems 50          # one JSON line on stdout

Ours: every persona x problem, greedy, through the sampler of this project (`whole_seconds`: all that evaluate.py does,
verifier and plots included). Theirs: the same model as a Hugging Face folder, the same token ids, greedy, left-padded
batches of 64 sorted by length (kinder than arrival order), in the faster of float32 and bfloat16. Theirs runs on every
n-th prompt (--sample) and is scaled up; ours runs whole. Same threads for both.

equal_answers is reported, not asserted: in bfloat16 near ties turn with any change of shape. Of 96 answers of 32 tokens
all were equal in float32; in bfloat16 ours agreed with float32 in 57 %, transformers' in 55 %, and those with their own
at a batch size of 1 (32 answers) in 78 %.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import personas as pool  # noqa: E402
import tasks  # noqa: E402
import weights  # noqa: E402
from common.command import positive  # noqa: E402
from evaluation import answers  # noqa: E402
from rollout import Sampler, SamplingParams  # noqa: E402


def ours(model, tokenizer, prompts, max_new_tokens):
    """(wall and CPU seconds, texts, generated tokens) through our sampler."""
    start = clocks()
    greedy = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
    outs = answers.sample(Sampler(model), tokenizer, prompts, greedy)
    return clocks() - start, [out[0][0] for out in outs], sum(len(out[0][1].tokens) for out in outs)


def clocks():
    """[wall, CPU] seconds; the CPU's, over all threads, are what a busy machine disturbs least."""
    return np.array([time.perf_counter(), time.process_time()])


@torch.no_grad()
def theirs(folder, dtype, tokenizer, prompts, max_new_tokens, stop_ids, batch=64):
    """(wall and CPU seconds, texts in the order of prompts) through transformers.generate."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    pad = stop_ids[0]
    order, texts, start = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}, clocks()
    for first in range(0, len(order), batch):
        part = order[first:first + batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in part])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad,
                             eos_token_id=stop_ids)
        texts |= dict(zip(part, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True))
    return clocks() - start, [texts[i] for i in range(len(prompts))]


def main():
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--personas", type=positive, default=24, help="how many of the test personas")
    parser.add_argument("--problems", type=positive, default=50)
    parser.add_argument("--max-new-tokens", type=positive, default=32)
    parser.add_argument("--sample", type=positive, default=4, help="theirs runs every n-th prompt")
    args = parser.parse_args()
    problems = tasks.load(args.task, "test", 0, args.problems)
    personas = [None, *pool.load("test")[:args.personas]]
    model, tokenizer = weights.load(args.model, device="cpu")
    prompts = [pool.prompt_ids(tokenizer, problem.question, p) for p in personas for problem in problems]
    seconds, texts, tokens = ours(model, tokenizer, prompts, args.max_new_tokens)
    part = prompts[::args.sample]
    other = {}
    with tempfile.TemporaryDirectory() as folder:
        weights.save(model, tokenizer, folder)
        for dtype in ("float32", "bfloat16"):
            other[dtype] = theirs(folder, dtype, tokenizer, part, args.max_new_tokens, model.c.stop_ids)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        params = evaluate.EvalParams(max_new_tokens=args.max_new_tokens)
        results = evaluate.evaluate(Sampler(model), tokenizer, problems, personas[1:], params, folder)
        whole = time.perf_counter() - start
    name, (their_seconds, their_texts) = min(other.items(), key=lambda pair: pair[1][0][1])
    scaled = their_seconds * len(prompts) / len(part)
    same = sum(a == b for a, b in zip(texts[::args.sample], their_texts, strict=True)) / len(part)
    print(json.dumps({
        "benchmark": "evaluate", "model": args.model, "dtype": str(model.dtype).split(".")[1],
        "threads": torch.get_num_threads(), "prompts": len(prompts), "generated_tokens": tokens,
        "seconds": round(seconds[0], 1), "cpu_seconds": round(seconds[1], 1), "whole_seconds": round(whole, 1),
        "transformers_seconds": round(scaled[0], 1), "transformers_cpu_seconds": round(scaled[1], 1),
        "transformers_dtype": name, "vs_transformers": round(scaled[0] / seconds[0], 2),
        "vs_transformers_cpu": round(scaled[1] / seconds[1], 2), "equal_answers": round(same, 3),
        "mean_accuracy": round(results["mean_accuracy"], 3), "pss": round(results["pss"], 3)}))


if __name__ == "__main__":
    main()
