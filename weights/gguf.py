"""llama.cpp's GGUF files read as Hugging Face has them: the config, the tokenizer, the tensors.

The config is built from the file's own keys, and a key that is not known here is an error that names it: nothing that
could change the computation is skipped. transformers builds the tokenizer and its chat template; the `gguf` package
parses the file and dequantises the blocks. What llama.cpp's converter (convert_hf_to_gguf.py) did is undone:

    llama, and Mistral, which it calls llama    rows of q and k reordered: it rotates neighbours (0, 1), (2, 3), ..,
                                                Hugging Face rotates halves (i, i + D/2)
    Llama 3.1 and later                         rope scaling kept as a tensor of factors, not as the numbers behind it
    Gemma 3                                     norms stored as 1 + w

Left out: files in several parts, architectures not named in ARCHITECTURES, and Unicode normalisation in the tokenizer
(Qwen's NFC), which GGUF does not record.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import inverse_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
REQUIRED = {                                            # the file's key -> Hugging Face's config field
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
            "final_logit_softcapping": "final_logit_softcapping", "attn_logit_softcapping": "attn_logit_softcapping"}
READ_APART = {"attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
              "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size"}
WINDOWS = {"llama": {"attention.sliding_window"},
           "gemma3": {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}}
TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"}      # often missing from the file's eos id


def read(path: Path):
    """(transformers config, iterator of (our name, fp32 tensor)) of a GGUF file. Raises ValueError naming the
    architecture, key or weight that is not supported; KeyError for a key that is missing."""
    import gguf

    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()
              if not name.endswith((".merges", ".scores", ".token_type"))}
    if values.get("split.count", 1) > 1:
        raise ValueError("it is one part of several: join them with llama.cpp's llama-gguf-split --merge")
    weights = {raw.name: raw for raw in reader.tensors}
    config = read_config(values, weights)
    return config, read_tensors(weights, config)


def read_tokenizer(path: Path):
    """The file's tokenizer and chat template, from a folder of its own so that no neighbouring file is read instead."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations import ggml

    converters = getattr(ggml, "GGUF_TO_FAST_CONVERTERS", {})                   # of transformers up to 5.17 or so
    if "llama" in converters:
        converters.setdefault("mistral", converters["llama"])                   # whose table lacks it
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.gguf").symlink_to(path.resolve())
        return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="model.gguf", local_files_only=True)


# ----------------------------------------------------------------------------------------------------------------------
# Config


def read_config(values: dict, weights: dict):
    """The transformers config that the file's keys and tensor shapes describe."""
    from transformers import AutoConfig

    architecture = values["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; "
                         f"supported: {', '.join(ARCHITECTURES)}. Use the Hugging Face folder")
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    known = REQUIRED.keys() | OPTIONAL.keys() | READ_APART | WINDOWS.get(architecture, set())
    if unknown := sorted(own.keys() - known):
        raise ValueError(f"GGUF key {architecture}.{unknown[0]}={own[unknown[0]]!r} is not supported")
    fields = {field: own[key] for key, field in REQUIRED.items()}
    fields |= {field: own[key] for key, field in OPTIONAL.items() if key in own}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    head_dim = fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise ValueError(f"GGUF key {architecture}.{key}={own[key]} is not supported (only {head_dim}, a head)")
    fields |= token_ids(values) | {"vocab_size": int(weights["token_embd.weight"].shape[1]),
                                   "tie_word_embeddings": "output.weight" not in weights}
    factors = weights["rope_freqs.weight"].data if "rope_freqs.weight" in weights else None
    rope = read_rope(own, head_dim, factors)
    kind = architecture
    if architecture == "gemma3":
        kind, fields = "gemma3_text", fields | gemma_fields(own, fields, rope)
    elif architecture == "llama" and own.get("attention.sliding_window"):
        kind, fields = "mistral", fields | {"sliding_window": own["attention.sliding_window"], "rope_parameters": rope}
    else:
        biased = architecture == "llama" and "blk.0.attn_q.bias" in weights
        fields |= {"rope_parameters": rope, "attention_bias": biased}
    return AutoConfig.for_model(kind, **fields)


def gemma_fields(own: dict, fields: dict, rope: dict) -> dict:
    """What llama.cpp's gemma3 code knows without reading it from the file: every sixth layer is global, the local ones
    rotate with base 10000 unscaled, and the 27B model (62 layers) scales its queries by the hidden size per head."""
    layers, pattern = fields["num_hidden_layers"], own.get("attention.sliding_window_pattern", 6)
    local = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(layers)]
    per_head = fields["hidden_size"] // fields["num_attention_heads"]
    return {"sliding_window": own["attention.sliding_window"],
            "layer_types": ["sliding_attention" if x else "full_attention" for x in local],
            "query_pre_attn_scalar": per_head if layers == 62 else fields["head_dim"],
            "rope_parameters": {"full_attention": rope, "sliding_attention": {
                "rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}}}


def read_rope(own: dict, head_dim: int, factors: np.ndarray | None) -> dict:
    """Rope parameters. `factors` [head_dim / 2] divide the frequencies; they are Llama 3.1's scaling or an error."""
    rope = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    scaling = own.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"rope scaling {scaling!r} is not supported in GGUF files (linear, Llama 3.1's)")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": own["rope.scaling.factor"]}
    if factors is None:
        return rope
    llama3 = rope | {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    implied = inverse_frequencies(head_dim, rope) / inverse_frequencies(head_dim, llama3)
    if scaling == "linear" or not np.allclose(implied.numpy(), factors, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not the scaling of Llama 3.1 to 3.3; use the Hugging Face folder")
    return llama3


def token_ids(values: dict) -> dict:
    """bos, pad and every id that ends a completion: the file's, and the ends of a turn known by name."""
    ids = {name: values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", "eos", "eot", "eom")}
    named = [i for i, token in enumerate(values["tokenizer.ggml.tokens"]) if token in TURN_ENDS]
    ends = sorted({i for i in (ids["eos"], ids["eot"], ids["eom"], *named) if i is not None})
    return {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"], "eos_token_id": ends or None}


# ----------------------------------------------------------------------------------------------------------------------
# Tensors

NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GEMMA_NAMES = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"}


def read_tensors(weights: dict, config):
    """Yields (our name, fp32 tensor), one at a time; the caller drops a tensor before it asks for the next."""
    gemma = config.model_type == "gemma3_text"
    layer_names = LAYER_NAMES | (GEMMA_NAMES if gemma else {})
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if config.model_type not in ("llama", "mistral"):
        heads = {}
    for name, raw in weights.items():
        if name == "rope_freqs.weight":                 # read with the config
            continue
        *layer, part, kind = name.split(".")
        ours = f"layers.{layer[1]}.{layer_names.get(part)}" if layer else NAMES.get(part)
        if part not in (layer_names if layer else NAMES):
            raise ValueError(f"unexpected weight {name}")
        yield f"{ours}.{kind}", dequantised(raw, heads.get(part, 0), 1.0 if gemma and part.endswith("norm") else 0.0)


def dequantised(raw, heads: int, offset: float) -> Tensor:
    """The stored tensor as a fp32 one of its own. Rows of q and k (`heads` > 0) are put back in Hugging Face's order
    while they are still quantised, which spares a second fp32 copy."""
    import gguf

    rows = raw.data
    if heads:
        rows = rows[np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2).ravel()]
    array = gguf.dequantize(rows, raw.tensor_type)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())     # fp32 is a view of the file
    return tensor - offset if offset else tensor
