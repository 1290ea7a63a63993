"""The sampler against transformers.generate and against its own matmul floor, on the embedded model.

    python benchmarks/rollout.py [--repeats 3] [--vllm PYTHON]

Two settings, log-probs on for both engines. `equal`: 8 prompts x 8 samples, 64 new tokens, nothing stops. `longtail`:
32 prompts x 4 samples, up to 128 new tokens, stop tokens that make the mean length about 0.3 of that and half of the
completions shorter than 20; only tokens of completions count. transformers runs in its better dtype of fp32 and bf16.
The floor is the time of the linear layers' matmuls alone for the same live rows, in our layout, in the same run.
Engines alternate; medians are reported. vLLM runs in a virtual environment of its own: vllm_peer.py.

The last line is JSON: vs_transformers_equal, vs_transformers_longtail, vs_vllm (equal lengths; null: not measured),
vs_vllm_longtail, floor_fraction.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM

import personas
import tasks
import weights
from common.command import positive
from rollout import SamplingParams, generate

STOPS = ["?", " to"]


def prompts_of(tokenizer, count: int) -> list[list[int]]:
    problems, pool = tasks.load("arithmetic", "train", 0, count), personas.load("train")
    return [personas.prompt_ids(tokenizer, p.question, pool[i]) for i, p in enumerate(problems)]


def ours(model, prompts, n, new_tokens, stops) -> tuple[int, float]:
    model.c.stop_ids = stops
    start = time.perf_counter()
    tokens = sum(len(c.tokens) for c in generate(model, prompts, SamplingParams(n, new_tokens)))
    return tokens, time.perf_counter() - start


@torch.inference_mode()
def theirs(model, prompts, n, new_tokens, stops, batch=64) -> tuple[int, float]:
    """Left-padded batches of `batch` rows with log-probs of the sampled tokens."""
    start, tokens = time.perf_counter(), 0
    rows = [p for p in prompts for _ in range(n)]
    for first in range(0, len(rows), batch):
        part = rows[first:first + batch]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = model.generate(ids, attention_mask=seen, max_new_tokens=new_tokens, do_sample=True, temperature=1.0,
                             top_k=0, eos_token_id=stops or None, pad_token_id=0, output_logits=True,
                             return_dict_in_generate=True)
        new = out.sequences[:, width:]
        for step, logits in enumerate(out.logits):
            logits.log_softmax(-1).gather(1, new[:, step:step + 1])
        ended = torch.isin(new, torch.tensor(stops or [-1]))
        tokens += int(torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1]).sum())
    return tokens, time.perf_counter() - start


@contextmanager
def vllm(python: str, folder: str):
    """vLLM in processes of its own, as a function like `ours`. They are stopped while others run: waiting for work,
    they took a third of our speed."""
    command = [python, Path(__file__).with_name("vllm_peer.py"), folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as peer:
        def run(_, prompts, n, new_tokens, stops) -> tuple[int, float]:
            asked = {"prompts": prompts, "n": n, "new_tokens": new_tokens, "stops": stops}
            os.killpg(peer.pid, signal.SIGCONT)
            print(json.dumps(asked), file=peer.stdin, flush=True)
            answer = json.loads(peer.stdout.readline())
            os.killpg(peer.pid, signal.SIGSTOP)
            return tuple(answer)
        try:
            yield run
        finally:
            os.killpg(peer.pid, signal.SIGCONT)
            peer.stdin.close()


def inputs(model, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `matmuls` multiplies, drawn before the clock starts."""
    return tuple(torch.randn(tokens, size, dtype=model.dtype) for size in
                 (model.c.hidden_size, model.c.intermediate_size))


def matmuls(model, x: torch.Tensor, wide: torch.Tensor, head_tokens: int) -> None:
    """x [N, H] and wide [N, intermediate] through every layer's matmuls, the first `head_tokens` through the head's."""
    for layer in model.layers:
        a, m = layer.self_attn, layer.mlp
        layer.linear(x, a["q_proj"], a["k_proj"], a["v_proj"])
        layer.linear(x, a["o_proj"])
        layer.linear(x, m["gate_proj"], m["up_proj"])
        layer.linear(wide, m["down_proj"])
    if head_tokens:
        head = model.reordered.get("head")
        if head is None:
            torch.nn.functional.linear(x[:head_tokens], model.head_weight)
        else:
            torch.ops.mkldnn._linear_pointwise(x[:head_tokens], head, None, "none", [], "")


@torch.inference_mode()
def floor(model, prompt_tokens: int, rows: int, steps: int) -> float:
    """Seconds in the linear layers' matmuls alone: one prefill of the prompts, then `steps` decode steps."""
    prefill, decode = inputs(model, prompt_tokens), inputs(model, rows)
    with model.reordered_weights(model.reorder()):
        matmuls(model, *decode, rows)                   # warm-up
        start = time.perf_counter()
        matmuls(model, *prefill, 0)
        for _ in range(steps):
            matmuls(model, *decode, rows)
        return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=positive, default=3)
    p.add_argument("--vllm", metavar="PYTHON", help="the Python of a virtual environment with vLLM")
    args = p.parse_args()
    model, tokenizer = weights.load(weights.EMBEDDED, device="cpu")
    stops = sorted({tokenizer(s).input_ids[-1] for s in STOPS} | set(model.c.stop_ids))
    settings = {"equal": (prompts_of(tokenizer, 8), 8, 64, []), "longtail": (prompts_of(tokenizer, 32), 4, 128, stops)}
    engines, speed = {"ours": (ours, model)}, {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        weights.save(model, tokenizer, folder)
        for dtype in (torch.float32, torch.bfloat16):
            engines[f"transformers {dtype}"] = theirs, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if args.vllm:
            engines["vllm"] = stack.enter_context(vllm(args.vllm, folder)), None
            for setting in settings.values():           # its first batches are slow
                engines["vllm"][0](None, *setting)
        for name, setting in settings.items():
            for _ in range(args.repeats):
                for engine, (run, m) in engines.items():
                    tokens, seconds = run(m, *setting)
                    speed.setdefault((name, engine), []).append(tokens / seconds)
                    print(f"{name:9} {engine:28} {tokens / seconds:7.1f} tok/s  {tokens} tokens", file=sys.stderr)
                if name == "equal" and model.dtype == torch.bfloat16:
                    seconds = floor(model, sum(map(len, setting[0])), 64, 63)
                    speed.setdefault(("equal", "floor"), []).append(64 * 64 / seconds)
    best = {key: statistics.median(values) for key, values in speed.items()}

    def against(name: str, *peers: str) -> float | None:
        found = [best[name, peer] for peer in peers if (name, peer) in best]
        return round(best[name, "ours"] / max(found), 3) if found else None

    peers = [engine for engine in engines if engine.startswith("transformers")]
    print(json.dumps({"vs_transformers_equal": against("equal", *peers),
                      "vs_transformers_longtail": against("longtail", *peers), "vs_vllm": against("equal", "vllm"),
                      "vs_vllm_longtail": against("longtail", "vllm"), "floor_fraction": against("equal", "floor")}))


if __name__ == "__main__":
    main()
