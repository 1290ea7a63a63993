"""GB that training takes on one GPU, counted on models without weights: what fits on which card.

    python benchmarks/memory.py

The state, the cache and the logits as `--memory` counts them before a run. The activations are what
a forward of one completion keeps on torch's meta device, where attention computes nothing and keeps
what FlashAttention keeps. 1 GB more is for the GPU's context, CUDA graphs and workspaces, a guess.
Counted, not run.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import attention  # noqa: E402
from model import Transformer  # noqa: E402
from training import memory  # noqa: E402
from training.policy import Policy  # noqa: E402
from weights import lora  # noqa: E402
from weights.huggingface import config_from_hf  # noqa: E402

PROMPT, NEW, GROUP, SLOTS, MICRO_TOKENS = 150, 512, 8, 32, 2048
CARDS, OUTSIDE = (16, 24, 40, 80), 1.0                  # GB
VOCAB = 151936
MODELS = {      # hidden, intermediate, layers, heads, key-value heads, tied
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, True),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, True),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, False),
}
WAYS = {      # LoRA's rank, moments in 8 bits
    "all weights": (0, False),
    "all weights, `adamw8bit`": (0, True),
    "LoRA, rank 16": (16, False),
}


class Kept(torch.autograd.Function):
    """Attention of packed sequences that computes nothing and keeps what FlashAttention keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out


def empty_model(kind, hidden, intermediate, layers, heads, kv_heads, tied) -> Transformer:
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        tie_word_embeddings=tied, **({"head_dim": 128} if kind == "qwen3" else {}))
    with torch.device("meta"):
        return Transformer(config_from_hf(config)).bfloat16()


def parts(model: Transformer, rank: int, eight_bit: bool) -> dict[str, float]:
    """Bytes by part, as training.memory.estimate has them."""
    model.checkpointing = True
    if rank:
        lora.add(model, rank, 32.0, list(lora.TARGETS), 0)
    policy = Policy(model, 1e-5, 0, eight_bit=eight_bit)
    args = SimpleNamespace(slots=SLOTS, prompts=SLOTS, group_size=GROUP, overlap=False,
                           async_save=False)
    job = SimpleNamespace(args=args, reference=None, author=model, held_out=None)
    with (mock.patch.object(attention, "uses_varlen", lambda q: True),
          mock.patch.object(attention, "varlen", lambda q, k, v, *_, **__: Kept.apply(q, k, v))):
        each = memory.activation_bytes(model, PROMPT, 1, NEW) / (PROMPT + NEW)
    with mock.patch.object(memory, "outside_tensors", lambda *_: 0):    # of this process
        return memory.estimate(policy, job, MICRO_TOKENS * each, PROMPT + NEW)


def table() -> str:
    lines = ["| model | trained | weights, masters, moments | gradients | activations | cache | "
             "peak, GB | card |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for name, shape in MODELS.items():
        for way, how in WAYS.items():
            gb = {part: size / 1e9 for part, size in parts(empty_model(*shape), *how).items()}
            state = gb["weights"] + gb["masters"] + gb["moments"]
            peak = gb["peak"] + OUTSIDE
            card = next((f"{card} GB" for card in CARDS if peak <= card), "more")
            numbers = state, gb["gradients"], gb["activations"], gb["cache"], peak
            lines.append(f"| {name} | {way} | {' | '.join(f'{x:.1f}' for x in numbers)} | {card} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
