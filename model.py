"""The transformer: one readable decoder for training, prefill and decode. Its weights come and go through weights.py.

A Llama-type decoder (RMSNorm, rotary positions, grouped-query attention, gated MLP). The families differ only in the
numbers and switches of `Config`, which weights.py reads from the Hugging Face config; there are no subclasses:

    Llama 2/3, SmolLM2/3, Mistral     the plain type; `llama3` rope scaling, NoPE layers, sliding windows
    Qwen2/2.5, Qwen3                  bias on q, k, v; RMSNorm on the heads of q and k
    Gemma 3 (text)                    (1 + w) norms before and after each block, embeddings times sqrt(H), local layers
    OLMo 2                            norms after the blocks only, RMSNorm over all of q and k

**Tokens are packed**: the linear layers see [N, H], every token once and no padding. Attention is handed in as a
function `attend(layer, q, k, v)`, so the model knows nothing of batches or caches: attention.py for training and
prefill, cache.py for the sampler.

Left out: mixture of experts, multimodal towers, tensor parallelism.

`python model.py` counts the parameters by part and compares the logits with transformers' on the same weights.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.files import Parser, one_line
from kernels import linear_logprob
from kernels.attention import PrefixAttention

# ----------------------------------------------------------------------------------------------------------------------
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
    tied: bool
    activation: str                                     # silu | gelu_tanh
    windows: list[int]                                  # per layer: how many positions back it sees; 0 = all
    rope: list[dict | None]                             # per layer: rope parameters; None = no positions (NoPE)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""                                   # "" | head (Qwen3, Gemma 3) | all (OLMo 2)
    pre_norm: bool = True                               # norm before attention and MLP (not OLMo 2)
    post_norm: bool = False                             # norm after them (Gemma 3, OLMo 2)
    norm_offset: float = 0.0                            # Gemma stores w - 1
    embed_scale: float = 1.0                            # Gemma: sqrt(H)
    attn_scale: float = 0.0                             # default 1/sqrt(head_dim)
    softcap: float | None = None                        # softcap * tanh(logits / softcap)
    stop_ids: list[int] = field(default_factory=list)   # tokens that end a completion

    @property
    def scale(self) -> float:
        """Of the attention scores."""
        return self.attn_scale or self.head_dim ** -0.5

    def flash(self, layer: int) -> dict:
        """What every call of flash-attn is told about a layer."""
        window = self.windows[layer]
        return {"softmax_scale": self.scale, "causal": True, "window_size": (window - 1, 0) if window else (-1, -1)}


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions (Su et al., arXiv 2104.09864)


def inverse_frequencies(head_dim: int, rope: dict) -> Tensor:
    """theta^(-2i/d) [head_dim / 2] fp32, with `linear` or `llama3` scaling. Raises ValueError for other scalings."""
    base = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return base
    if kind == "linear":
        return base / rope["factor"]
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported (default, linear, llama3)")
    # Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between interpolated.
    turns = rope["original_max_position_embeddings"] * base / (2 * math.pi)     # full turns within the original length
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (keep + (1 - keep) / rope["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, heads, D] turned by cos, sin [N, 1, D]; the first half of `sin` is negated (rotate_half without a copy)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


# ----------------------------------------------------------------------------------------------------------------------
# The decoder. Parameters carry Hugging Face's names (without the leading "model.").


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, offset: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size) - offset)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if not self.offset:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        scaled = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float() + self.offset, self.eps)
        return scaled.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, c: Config, index: int):
        super().__init__()
        self.c, self.index = c, index
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def norm(size):
            return RMSNorm(size, c.rms_eps, c.norm_offset)

        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(c.hidden_size, q, bias=c.qkv_bias),
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
        # Where there are norms after the blocks, `post_attention_layernorm` is one of them; else it precedes the MLP.
        if c.pre_norm:
            self.input_layernorm = norm(c.hidden_size)
        if c.pre_norm and c.post_norm:
            self.pre_feedforward_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)
        if c.post_norm:
            self.post_feedforward_layernorm = norm(c.hidden_size)
        self.blocked: dict | None = None                # weights rearranged for small batches; see Transformer.blocked

    def linear(self, x: Tensor, *modules: nn.Linear) -> tuple[Tensor, ...]:
        """x through one or several linear layers that share it (q, k, v; gate, up)."""
        if self.blocked is None or torch.is_grad_enabled():
            return tuple(m(x) for m in modules)
        y = blocked_linear(x, *self.blocked[modules[0]])
        return y.split([m.out_features for m in modules], -1) if len(modules) > 1 else (y,)

    def attention(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, attend) -> Tensor:
        c, a = self.c, self.self_attn
        q, k, v = self.linear(x, a["q_proj"], a["k_proj"], a["v_proj"])
        if c.qk_norm == "all":
            q, k = a["q_norm"](q), a["k_norm"](k)
        q, k, v = (y.view(len(x), -1, c.head_dim) for y in (q, k, v))            # [N, heads, D]
        if c.qk_norm == "head":
            q, k = a["q_norm"](q), a["k_norm"](k)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(self.index, q, k, v)                                       # [N, num_heads, D]
        return self.linear(out.flatten(1), a["o_proj"])[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear(x, self.mlp["gate_proj"], self.mlp["up_proj"])
        gate = F.silu(gate) if self.c.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.linear(gate * up, self.mlp["down_proj"])[0]

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, attend) -> Tensor:
        if self.c.pre_norm and not self.c.post_norm:    # Llama, Mistral, Qwen
            x = x + self.attention(self.input_layernorm(x), cos, sin, attend)
            return x + self.feed_forward(self.post_attention_layernorm(x))
        pre_attn = self.input_layernorm(x) if self.c.pre_norm else x            # Gemma 3 | OLMo 2
        x = x + self.post_attention_layernorm(self.attention(pre_attn, cos, sin, attend))
        pre_mlp = self.pre_feedforward_layernorm(x) if self.c.pre_norm else x
        return x + self.post_feedforward_layernorm(self.feed_forward(pre_mlp))


class Transformer(nn.Module):
    """forward(input_ids [N], position_ids [N], attend) -> hidden [N, H] after the final norm; see `head_weight`."""

    def __init__(self, c: Config):
        super().__init__()
        self.c, self.hf_config = c, None
        self.checkpointing = False                      # recompute layers in the backward: less memory, 4/3 the time
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_eps, c.norm_offset)
        if not c.tied:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.blocked_head: tuple | None = None

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
        x = self.embed_tokens(input_ids)
        if self.c.embed_scale != 1.0:
            x = x * torch.tensor(self.c.embed_scale, dtype=x.dtype)     # rounded to the dtype, as Gemma was trained
        tables = self.rotary_tables(position_ids, x.dtype)
        for layer, rope in zip(self.layers, self.c.rope, strict=True):
            cos, sin = tables[id(rope)]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False,
                               preserve_rng_state=False)        # nothing is random, and a GPU's state costs a wait
            else:
                x = layer(x, cos, sin, attend)
        return self.norm(x)

    @cached_property
    def frequencies(self) -> list[Tensor | None]:
        """Of each layer; computed once, since a CUDA graph can't take what comes from the host."""
        return [rope and inverse_frequencies(self.c.head_dim, rope).to(self.device) for rope in self.c.rope]

    def rotary_tables(self, position_ids: Tensor, dtype: torch.dtype) -> dict[int, tuple]:
        """cos and (half negated) sin [N, 1, D] for each distinct set of rope parameters, computed in fp32."""
        tables = {id(None): (None, None)}
        for rope in self.c.rope:
            if id(rope) not in tables:
                angles = position_ids[:, None, None].float() * self.frequencies[self.c.rope.index(rope)]
                cos, sin = angles.cos(), angles.sin()
                tables[id(rope)] = torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
        return tables

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """The head's matmul alone, [N, V] in the compute dtype."""
        return blocked_linear(hidden, *self.blocked_head) if self.blocked_head else F.linear(hidden, self.head_weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] fp32, for the few rows of the sampler and the anchor; the loss uses kernels.linear_logprob."""
        return self.capped(self.raw_logits(hidden))

    def capped(self, logits: Tensor) -> Tensor:
        """Raw logits as the model means them: fp32, soft-capped where its family does that."""
        logits, cap = logits.float(), self.c.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @contextmanager
    def blocked(self):
        """Within it, linear layers run on copies blocked for small batches: 1.4x at 64 rows in bf16 on a CPU, 2x at 8.

        The copies are made on entry and dropped on exit, so they can't outlive a weight update. A no-op elsewhere.
        """
        if self.device.type == "cpu" and self.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() \
                and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            for layer in self.layers:
                a, m = layer.self_attn, layer.mlp
                same_input = ((a["q_proj"], a["k_proj"], a["v_proj"]), (a["o_proj"],),
                              (m["gate_proj"], m["up_proj"]), (m["down_proj"],))
                layer.blocked = {modules[0]: blocked_weight(modules) for modules in same_input}
            self.blocked_head = torch.ops.mkldnn._reorder_linear_weight(self.head_weight.detach(), 64), None
        try:
            yield
        finally:
            self.blocked_head = None
            for layer in self.layers:
                layer.blocked = None


def blocked_weight(modules: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """The modules' weights stacked, in the blocked layout of the CPU's matmul library, and their biases."""
    weight = torch.cat([m.weight.detach() for m in modules])
    bias = None if modules[0].bias is None else torch.cat([m.bias.detach() for m in modules])
    return torch.ops.mkldnn._reorder_linear_weight(weight, 64), bias


def blocked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# ----------------------------------------------------------------------------------------------------------------------
# From prompts and completions to log-probs


@dataclass
class Packed:
    """Groups ready for one forward. M counts all completion tokens, in the order (group, completion, token)."""
    input_ids: Tensor                                   # [N] every prompt, then every completion
    position_ids: Tensor                                # [N]
    attend: PrefixAttention
    hidden_index: Tensor                                # [M] the packed position whose hidden state predicts the token
    targets: Tensor                                     # [M]
    lengths: list[int]                                  # tokens of each completion


def pack(groups: list[tuple[list[int], list[list[int]]]], model: Transformer) -> Packed:
    """groups: (prompt_ids, [completion_ids, ...]), packed where `model` is. A completion's last token is only ever a
    target, never an input; its first is predicted by the prompt's last position, which all n share. Raises ValueError
    on an empty prompt."""
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

    def tensor(values):
        return torch.tensor(values, dtype=torch.long, device=model.device)

    return Packed(tensor(ids), attend.position_ids, attend, tensor(hidden_index), tensor(targets),
                  [len(y) for y in completions])


def chunks(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive items of at most `limit` tokens together, or of one that is longer, as (first, last + 1)."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            yield first, i
            first, total = i, 0
        total += size
    if sizes:
        yield first, len(sizes)


def completion_logprobs(model: Transformer, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each completion token and entropy of its distribution, [M] fp32, at the sampler's temperature."""
    hidden = model(packed.input_ids, packed.position_ids, packed.attend)[packed.hidden_index]
    return linear_logprob(hidden, model.head_weight, packed.targets, temperature, model.c.softcap)


# ----------------------------------------------------------------------------------------------------------------------
# A short lesson


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Prints where the parameters are, and how far the logits lie from transformers' on the same weights in fp32."""
    from transformers import AutoModelForCausalLM

    import personas  # here, since weights.py imports this file
    import weights

    parser = Parser(description="Count a model's parameters; compare its logits with transformers'.")
    parser.add_argument("--model", default=weights.EMBEDDED, help=f"as for train.py (default {weights.EMBEDDED})")
    try:
        model, tokenizer = weights.load(parser.parse_args(argv).model, "float32", "cpu")
        ids = torch.tensor(personas.prompt_ids(tokenizer, "What is 6 + 7?", None))
    except (ValueError, OSError) as error:
        parser.exit(2, f"model.py: {one_line(error)}\n")
    counts = Counter()
    for name, w in model.named_parameters():
        counts[next((part for part in ("self_attn", "mlp", "norm") if part in name), "embedding, head")] += w.numel()
    for part, count in [*counts.items(), ("all", counts.total())]:
        print(f"{part:16}{count:>14,}{count / counts.total():8.1%}")
    theirs = AutoModelForCausalLM.from_config(model.hf_config, dtype=torch.float32, attn_implementation="eager").eval()
    theirs.load_state_dict(weights.state(model), strict=not model.c.tied)       # a tied head is not among ours
    packed = pack([(ids.tolist(), [])], model)
    logits = model.logits(model(packed.input_ids, packed.position_ids, packed.attend))
    reference = theirs(ids[None]).logits[0]
    print(f"logits of {len(ids)} tokens: max |ours - transformers| = {(logits - reference).abs().max():.1e}; greedy "
          f"tokens equal: {(logits.argmax(-1) == reference.argmax(-1)).sum()} of {len(ids)}")


if __name__ == "__main__":
    main()
