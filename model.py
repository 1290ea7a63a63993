"""The transformer: one readable decoder for training, prefill and decode. Weights: weights/.

A Llama-type decoder (RMSNorm, rotary positions, grouped-query attention, gated MLP). The families
differ only in the numbers and switches of `Config`, which weights/huggingface.py reads. There are
no subclasses:

    Llama 2/3, SmolLM2/3, Mistral   the plain type; rope scaling, NoPE layers, sliding windows
    Qwen2/2.5, Qwen3                bias on q, k, v; RMSNorm on the heads of q and k
    Qwen3.5 (text)                  gated DeltaNets between layers of gated attention
    Gemma 3 (text)                  (1 + w) norms around each block, scaled embeddings, local layers
    OLMo 2                          norms after the blocks only, RMSNorm over all of q and k

**Tokens are packed**: the linear layers see [N, H], every token once and no padding. Attention is
handed in as a function `attend(layer, q, k, v)`, so the model knows nothing of batches or caches.
That function is in kernels/attention.py (training) and in sampling/cache.py (prefill, decoding).
Its `delta` does the same for gated DeltaNets.

Left out: mixture of experts, multimodal towers, tensor parallelism. `python -m weights.parity`
counts the parameters by part and compares the logits with transformers' on the same weights.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import linear_logprob
from kernels.attention import PrefixAttention
from kernels.delta import DeltaSizes, GatedDeltaNet
from kernels.elementwise import add_rms_norm, gated, rms_norm, rotate
from kernels.moves import embed

# -----------------------------------------------------------------------------------------------
# Config: what distinguishes one family from another


@dataclass
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_positions: int
    tied: bool                                          # the head is the embeddings
    activation: str                                     # silu | gelu_tanh
    windows: list[int]                                  # per layer: positions it sees; 0 = all
    rope: list[dict | None]                             # per layer: parameters; None = NoPE
    attn_scale: float                                   # of the scores; often 1/sqrt(head_dim)
    embed_scale: float = 1.0                            # Gemma: sqrt(H)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""                                   # head (Qwen3, Gemma 3) | all (OLMo 2)
    pre_norm: bool = True                               # before attention and MLP (not OLMo 2)
    post_norm: bool = False                             # after them (Gemma 3, OLMo 2)
    norm_offset: float = 0.0                            # Gemma stores w - 1
    attn_gate: bool = False                             # q_proj also gives what gates the output
    delta: DeltaSizes | None = None                     # of the gated DeltaNets
    delta_layers: list[int] = field(default_factory=list)
    softcap: float | None = None                        # softcap * tanh(logits / softcap)
    stop_ids: list[int] = field(default_factory=list)   # tokens that end a completion


# -----------------------------------------------------------------------------------------------
# Rotary positions (Su et al., arXiv 2104.09864)


def inverse_frequencies(head_dim: int, rope: dict) -> Tensor:
    """theta^(-2i/d) [d / 2] fp32, with `linear` or `llama3` scaling; d numbers of a head turn.

    Raises ValueError for other scalings.
    """
    head_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    base = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return base
    if kind == "linear":
        return base / rope["factor"]
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported (default, linear, llama3)")
    # Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, others interpolated.
    turns = rope["original_max_position_embeddings"] * base / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (keep + (1 - keep) / rope["factor"])


# -----------------------------------------------------------------------------------------------
# The decoder. Parameters carry Hugging Face's names (without the leading "model.").


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, offset: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size) - offset)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the norm of x + delta, x + delta)"""
        return add_rms_norm(x, delta, self.weight, self.eps, self.offset)


class LoRALinear(nn.Linear):
    """A frozen linear layer with a low-rank update (LoRA, arXiv 2106.09685):
    x W^T + scale (x A^T) B^T, A [rank, in], B [out, rank]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.updated(x, super().forward(x))

    def updated(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


class Layer(nn.Module):
    """reordered: the model's, see Transformer.reordered_weights."""

    def __init__(self, c: Config, index: int, reordered: dict):
        super().__init__()
        self.c, self.index, self.reordered = c, index, reordered
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        norm = partial(RMSNorm, eps=c.rms_eps, offset=c.norm_offset)
        if index in c.delta_layers:
            self.linear_attn = GatedDeltaNet(c.hidden_size, c.delta, c.rms_eps)
        else:
            self.self_attn = nn.ModuleDict({
                "q_proj": nn.Linear(c.hidden_size, q * (1 + c.attn_gate), bias=c.qkv_bias),
                "k_proj": nn.Linear(c.hidden_size, kv, bias=c.qkv_bias),
                "v_proj": nn.Linear(c.hidden_size, kv, bias=c.qkv_bias),
                "o_proj": nn.Linear(q, c.hidden_size, bias=c.o_bias)})
            if c.qk_norm:
                per_head = c.qk_norm == "head"
                self.self_attn["q_norm"] = norm(c.head_dim if per_head else q)
                self.self_attn["k_norm"] = norm(c.head_dim if per_head else kv)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias),
            "up_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias),
            "down_proj": nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)})
        # `post_attention_layernorm` precedes the MLP, unless there are norms after the blocks.
        if c.pre_norm:
            self.input_layernorm = norm(c.hidden_size)
        if c.pre_norm and c.post_norm:
            self.pre_feedforward_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)
        if c.post_norm:
            self.post_feedforward_layernorm = norm(c.hidden_size)

    @property
    def mixer(self) -> nn.ModuleDict:
        return self.linear_attn if self.index in self.c.delta_layers else self.self_attn

    def linears(self) -> list[list[nn.Linear]]:
        """The linear layers; those that share an input stand together."""
        mix = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
        if self.index in self.c.delta_layers:
            mix = GatedDeltaNet.INPUTS, ["out_proj"]
        names = [*mix, ["gate_proj", "up_proj"], ["down_proj"]]
        parts = {**self.mixer, **self.mlp}
        return [[parts[name] for name in together] for together in names]

    def linear(self, x: Tensor, *modules: nn.Linear) -> tuple[Tensor, ...]:
        """x through one or several linear layers that share it (q, k, v; gate, up)."""
        if modules[0] not in self.reordered or torch.is_grad_enabled():
            return tuple(m(x) for m in modules)
        weight, bias = self.reordered[modules[0]]
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        parts = y.split_with_sizes([m.out_features for m in modules], -1)
        return tuple(m.updated(x, part) if isinstance(m, LoRALinear) else part
                     for m, part in zip(modules, parts, strict=True))

    def attention(self, x: Tensor, table: Tensor | None, attend) -> Tensor:
        c, a = self.c, self.mixer
        if self.index in c.delta_layers:
            return a(x, self.linear, partial(attend.delta, self.index))
        q, k, v = self.linear(x, a["q_proj"], a["k_proj"], a["v_proj"])
        if c.attn_gate:                                 # of each head in turn, queries and gates
            q, gate = q.view(len(x), -1, 2 * c.head_dim).chunk(2, -1)
        if c.qk_norm == "all":
            q, k = a["q_norm"](q), a["k_norm"](k)
        q, k, v = (y.view(len(x), -1, c.head_dim) for y in (q, k, v))           # [N, heads, D]
        if c.qk_norm == "head":
            q, k = a["q_norm"](q), a["k_norm"](k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        out = attend(self.index, q, k, v)                                   # [N, num_heads, D]
        if c.attn_gate:
            out = out * gate.sigmoid()
        return self.linear(out.flatten(1), a["o_proj"])[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear(x, self.mlp["gate_proj"], self.mlp["up_proj"])
        return self.linear(gated(gate, up, self.c.activation), self.mlp["down_proj"])[0]

    def forward(self, x: Tensor, delta: Tensor | None, table: Tensor | None, attend,
                ) -> tuple[Tensor, Tensor]:
        """The residual stream is x + delta. The next norm adds them, in the same pass."""
        if self.c.pre_norm and not self.c.post_norm:                        # Llama, Mistral, Qwen
            h, x = self.input_layernorm.add(x, delta)
            h, x = self.post_attention_layernorm.add(x, self.attention(h, table, attend))
            return x, self.feed_forward(h)
        x = x if delta is None else x + delta                               # Gemma 3 | OLMo 2
        h = self.input_layernorm(x) if self.c.pre_norm else x
        x = x + self.post_attention_layernorm(self.attention(h, table, attend))
        h = self.pre_feedforward_layernorm(x) if self.c.pre_norm else x
        return x, self.post_feedforward_layernorm(self.feed_forward(h))


class Transformer(nn.Module):
    """forward(input_ids [N], position_ids [N], attend) -> hidden [N, H] after the final norm."""

    def __init__(self, c: Config):
        super().__init__()
        self.c, self.hf_config = c, None
        self.checkpointing = False                      # recompute layers: less memory, 4/3 time
        self.reordered: dict = {}                       # see reordered_weights
        self.frequencies: list[Tensor | None] = []      # of each layer's rope
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i, self.reordered) for i in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_eps, c.norm_offset)
        if not c.tied:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.c.tied else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend) -> Tensor:
        x = embed(self.embed_tokens.weight, input_ids)
        if self.c.embed_scale != 1.0:                   # rounded to the dtype, as Gemma was trained
            x = x * torch.tensor(self.c.embed_scale, dtype=x.dtype)
        tables = self.rotary_tables(position_ids)
        delta = None
        for layer, table in zip(self.layers, tables, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing is random, so the state of the random generators is not kept: on a GPU,
                # reading it would mean to wait.
                x, delta = checkpoint(layer, x, delta, table, attend, use_reentrant=False,
                                      preserve_rng_state=False)
            else:
                x, delta = layer(x, delta, table, attend)
        return self.norm.add(x, delta)[0]

    def rotary_tables(self, position_ids: Tensor) -> list[Tensor | None]:
        """Each layer's cosines and sines [N, 1, D] fp32, for `rotate`; None for NoPE. Layers with
        the same rope parameters share them."""
        ropes = self.c.rope
        if not self.frequencies:            # kept: a CUDA graph can't take what comes from the host
            self.frequencies = [rope and inverse_frequencies(self.c.head_dim, rope).to(self.device)
                                for rope in ropes]
        tables = {id(None): None}
        for rope, frequencies in zip(ropes, self.frequencies, strict=True):
            if id(rope) not in tables:
                angles = position_ids[:, None, None].float() * frequencies
                tables[id(rope)] = torch.cat([angles.cos(), angles.sin()], -1)
        return [tables[id(rope)] for rope in ropes]

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """[N, V] in the model's dtype; soft-capped where the family does that, then in fp32.

        For the few rows of the sampler and the anchor; the loss uses kernels.linear_logprob.
        head [V, H]: a weight to use in place of the model's own.
        """
        if head is None and "head" in self.reordered and not torch.is_grad_enabled():
            logits = torch.ops.mkldnn._linear_pointwise(
                hidden, self.reordered["head"], None, "none", [], "")
        else:
            logits = F.linear(hidden, self.head_weight if head is None else head)
        cap = self.c.softcap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)

    @contextmanager
    def reordered_weights(self, copies: dict):
        """Within it, the linear layers run on `copies`, which `reorder` made; outside, nobody does:
        a sampler that waits between two tokens hands no old weights to another forward."""
        self.reordered.update(copies)
        try:
            yield
        finally:
            self.reordered.clear()

    def reorder(self) -> dict:
        """Copies of the linear layers' weights in another memory layout, (weight, bias) each.

        oneDNN, the CPU's matmul library, multiplies small batches faster in its own (blocked)
        layout: 1.4x at 64 rows in bf16, 2x at 8. Other devices and dtypes keep the plain layout,
        and get no copies.
        """
        if self.device.type != "cpu" or self.dtype != torch.bfloat16 \
                or not torch.backends.mkldnn.is_available() \
                or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return {}
        reorder, copies = torch.ops.mkldnn._reorder_linear_weight, {}
        for layer in self.layers:
            for modules in layer.linears():
                weight, bias = torch.cat([x.weight.detach() for x in modules]), None
                if modules[0].bias is not None:
                    bias = torch.cat([x.bias.detach() for x in modules])
                copies[modules[0]] = reorder(weight, 64), bias
        copies["head"] = reorder(self.head_weight.detach(), 64)
        return copies


# -----------------------------------------------------------------------------------------------
# From prompts and completions to log-probs


@dataclass
class Packed:
    """Groups ready for one forward. M counts all completion tokens, in the order (group,
    completion, token)."""
    input_ids: Tensor                                   # [N] every prompt, then every completion
    position_ids: Tensor                                # [N]
    attend: PrefixAttention
    hidden_index: Tensor                                # [M] the position that predicts the token
    targets: Tensor                                     # [M]
    lengths: list[int]                                  # [R] tokens of each, its last one too


def pack(groups: list[tuple[list[int], list[list[int]]]], model: Transformer) -> Packed:
    """groups: (prompt_ids, [completion_ids, ...]), packed where `model` is.

    A completion's last token is only ever a target, never an input. Its first is predicted by the
    prompt's last position, which all n share. So the inputs are every prompt, then every completion
    without its last token: `PrefixAttention` is told these lengths, in this order, and gives the
    positions. An empty completion has length 0 and no target. Raises ValueError on an empty prompt.
    """
    if not all(prompt for prompt, _ in groups):
        raise ValueError("a prompt has no tokens")
    inputs = [[completion[:-1] for completion in completions] for _, completions in groups]
    attend = PrefixAttention([len(prompt) for prompt, _ in groups],
                             [[len(ids) for ids in row] for row in inputs], model.c, model.device)
    hidden_index, last, start = [], -1, attend.prefix_tokens
    for prompt, completions in groups:
        last += len(prompt)
        for completion in completions:
            if completion:
                hidden_index += [last, *range(start, start + len(completion) - 1)]
                start += len(completion) - 1
    completions = [completion for _, row in groups for completion in row]
    ids = [t for prompt, _ in groups for t in prompt]
    ids += [t for row in inputs for completion in row for t in completion]
    targets = [t for completion in completions for t in completion]
    ids, hidden_index, targets = (torch.tensor(x, dtype=torch.long, device=model.device)
                                  for x in (ids, hidden_index, targets))
    lengths = [len(completion) for completion in completions]
    return Packed(ids, attend.position_ids, attend, hidden_index, targets, lengths)


def chunks(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive items of at most `limit` tokens together, or one that is longer, as (first,
    last + 1)."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            yield first, i
            first, total = i, 0
        total += size
    if sizes:
        yield first, len(sizes)


def completion_hidden(model: Transformer, packed: Packed) -> Tensor:
    """[M, H]: the hidden state that predicts each completion token."""
    return model(packed.input_ids, packed.position_ids, packed.attend)[packed.hidden_index]


def completion_logprobs(model: Transformer, packed: Packed, temperature: float = 1.0,
                        ) -> tuple[Tensor, Tensor]:
    """Log-prob of each completion token and entropy of its distribution, [M] fp32, at the
    sampler's temperature."""
    hidden = completion_hidden(model, packed)
    return linear_logprob(hidden, model.head_weight, packed.targets, temperature, model.c.softcap)
