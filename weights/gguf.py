"""llama.cpp's GGUF files read as Hugging Face has them: the config, the tokenizer, the tensors.

The config is built from the file's own keys. A key that is not known here is an error that names
it: nothing that could change the computation is skipped. transformers builds the tokenizer and its
chat template; the `gguf` package parses the file and dequantises the blocks. llama.cpp's converter
(convert_hf_to_gguf.py) made three changes, which are undone:

    llama and Mistral (called llama there)   rows of q and k reordered: it rotates neighbours
                                             (0, 1), (2, 3), .., Hugging Face halves (i, i + D/2)
    Llama 3.1 and later                      rope scaling kept as a tensor of factors, not as the
                                             numbers behind it
    Gemma 3                                  norms stored as 1 + w

Left out: files that llama.cpp itself has split, architectures not named in ARCHITECTURES, and
Unicode normalisation in the tokenizer (Qwen's NFC), which GGUF does not record.
"""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.command import one_line
from common.files import cache_folder
from model import inverse_frequencies
from weights.sources import GGUF_FILE

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
REQUIRED = {                                            # the file's key: Hugging Face's field
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "final_logit_softcapping": "final_logit_softcapping",
    "attn_logit_softcapping": "attn_logit_softcapping"}
READ_APART = {
    "attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "vocab_size"}
WINDOWS = {
    "llama": {"attention.sliding_window"},
    "gemma3": {"attention.sliding_window", "attention.sliding_window_pattern",
               "rope.freq_base_swa"}}
# Files often lack these among the ids that end a text.
TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"}


def read(path: Path):
    """(transformers config, iterator of (our name, fp32 tensor)) of a GGUF file.

    Raises ValueError naming the architecture, key or weight that is not supported, KeyError for a
    key that is missing.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:                         # its own refusal of a torn file
        raise OSError(one_line(error)) from error
    values = {name: field.contents() for name, field in reader.fields.items()
              if not name.endswith((".merges", ".scores", ".token_type"))}
    if values.get("split.count", 1) > 1:
        raise ValueError("it is one part of several: join them with llama.cpp's "
                         "llama-gguf-split --merge")
    weights = {raw.name: raw for raw in reader.tensors}
    config = read_config(values, weights)
    return config, read_tensors(weights, config)


def tokenizer(path: Path):
    """The file's tokenizer and chat template. The embedded model's is kept beside it: taking it out
    of the file costs seconds."""
    from transformers import PreTrainedTokenizerFast

    if path != cache_folder() / GGUF_FILE:
        return read_tokenizer(path)
    parsed = path.with_suffix(".parsed")
    if not parsed.is_dir():
        with tempfile.TemporaryDirectory(dir=parsed.parent) as folder:
            read_tokenizer(path).save_pretrained(Path(folder, "new"))
            with suppress(OSError):                     # another process was first
                Path(folder, "new").rename(parsed)
    return PreTrainedTokenizerFast.from_pretrained(parsed, local_files_only=True)


def read_tokenizer(path: Path):
    """As the file has it, anew."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations import ggml

    converters = getattr(ggml, "GGUF_TO_FAST_CONVERTERS", {})   # of transformers up to 5.17 or so
    if "llama" in converters:
        converters.setdefault("mistral", converters["llama"])   # which that table lacks
    # In a folder of its own: transformers would prefer a tokenizer.json beside the file.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.gguf").symlink_to(path.resolve())
        return PreTrainedTokenizerFast.from_pretrained(
            folder, gguf_file="model.gguf", local_files_only=True)


# -----------------------------------------------------------------------------------------------
# Config


def read_config(values: dict, weights: dict):
    """The transformers config that the file's keys and tensor shapes describe."""
    from transformers import AutoConfig

    architecture = values["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; "
                         f"supported: {', '.join(ARCHITECTURES)}. Use the Hugging Face folder")
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in values.items()
           if name.startswith(prefix)}
    known = REQUIRED.keys() | OPTIONAL.keys() | READ_APART | WINDOWS.get(architecture, set())
    if unknown := sorted(own.keys() - known):
        key = unknown[0]
        raise ValueError(f"GGUF key {prefix}{key}={own[key]!r} is not supported")
    fields = {field: own[key] for key, field in REQUIRED.items()}
    fields |= {field: own[key] for key, field in OPTIONAL.items() if key in own}
    heads = fields["num_attention_heads"]
    fields.setdefault("num_key_value_heads", heads)
    head_dim = fields.setdefault("head_dim", fields["hidden_size"] // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise ValueError(f"GGUF key {prefix}{key}={own[key]} is not supported "
                             f"(only {head_dim}, a head)")
    fields |= special_ids(values)
    fields["vocab_size"] = int(weights["token_embd.weight"].shape[1])
    fields["tie_word_embeddings"] = "output.weight" not in weights
    factors = weights["rope_freqs.weight"].data if "rope_freqs.weight" in weights else None
    fields["rope_parameters"] = read_rope(own, head_dim, factors)
    if architecture == "gemma3":
        return AutoConfig.for_model("gemma3_text", **fields | gemma_fields(own, fields))
    if architecture == "llama" and own.get("attention.sliding_window"):
        window = own["attention.sliding_window"]
        return AutoConfig.for_model("mistral", **fields, sliding_window=window)
    biased = architecture == "llama" and "blk.0.attn_q.bias" in weights
    return AutoConfig.for_model(architecture, **fields, attention_bias=biased)


def gemma_fields(own: dict, fields: dict) -> dict:
    """What llama.cpp's gemma3 code knows without reading it from the file.

    Every sixth layer is global, the local ones rotate with base 10000 unscaled, and the 27B model
    (62 layers) scales its queries by the hidden size per head.
    """
    layers = fields["num_hidden_layers"]
    local = own.get("attention.sliding_window_pattern", 6)
    if not isinstance(local, list):
        local = [(i + 1) % local != 0 for i in range(layers)]
    per_head = fields["hidden_size"] // fields["num_attention_heads"]
    local_rope = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
    return {
        "sliding_window": own["attention.sliding_window"],
        "layer_types": ["sliding_attention" if x else "full_attention" for x in local],
        "query_pre_attn_scalar": per_head if layers == 62 else fields["head_dim"],
        "rope_parameters": {"full_attention": fields["rope_parameters"],
                            "sliding_attention": local_rope}}


def read_rope(own: dict, head_dim: int, factors: np.ndarray | None) -> dict:
    """Rope parameters. `factors` [head_dim / 2] divide the frequencies: Llama 3.1's scaling.

    Raises ValueError where they are not.
    """
    rope = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    scaling = own.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"rope scaling {scaling!r} is not supported in GGUF files "
                         "(linear, Llama 3.1's)")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": own["rope.scaling.factor"]}
    if factors is None:
        return rope
    llama3 = rope | {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    implied = inverse_frequencies(head_dim, rope) / inverse_frequencies(head_dim, llama3)
    if scaling == "linear" or not np.allclose(implied.numpy(), factors, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not the scaling of Llama 3.1 to 3.3; "
                         "use the Hugging Face folder")
    return llama3


def special_ids(values: dict) -> dict:
    """bos, pad and every id that ends a completion: the file's, and the ends of a turn by name."""
    ids = {name: values.get(f"tokenizer.ggml.{name}_token_id")
           for name in ("bos", "padding", "eos", "eot", "eom")}
    ends = {ids["eos"], ids["eot"], ids["eom"]} - {None}
    ends |= {i for i, token in enumerate(values["tokenizer.ggml.tokens"]) if token in TURN_ENDS}
    return {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"],
            "eos_token_id": sorted(ends) or None}


# -----------------------------------------------------------------------------------------------
# Tensors

NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm"}


def read_tensors(weights: dict, config) -> Iterator[tuple[str, Tensor]]:
    """(our name, fp32 tensor), one at a time: drop a tensor before you ask for the next."""
    gemma = config.model_type == "gemma3_text"
    layer_names = LAYER_NAMES | (GEMMA_NAMES if gemma else {})
    heads = {}                                          # of the parts whose rows are reordered
    if config.model_type in ("llama", "mistral"):
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, raw in weights.items():
        if name == "rope_freqs.weight":                 # read with the config
            continue
        match name.split("."):
            case ["blk", layer, part, kind] if part in layer_names:
                ours = f"layers.{layer}.{layer_names[part]}"
            case [part, kind] if part in NAMES:
                ours = NAMES[part]
            case _:
                raise ValueError(f"unexpected weight {name}")
        offset = 1.0 if gemma and part.endswith("norm") else 0.0
        yield f"{ours}.{kind}", dequantised(raw, heads.get(part, 0), offset)


def dequantised(raw, heads: int, offset: float) -> Tensor:
    """The stored tensor as an fp32 one of its own, less `offset`.

    Rows of q and k (`heads` > 0) are put back in Hugging Face's order while they are still
    quantised, which saves a second fp32 copy.
    """
    import gguf

    rows = raw.data
    if heads:
        rows = rows[np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2).ravel()]
    array = gguf.dequantize(rows, raw.tensor_type)
    if not array.flags.writeable:                       # fp32: a view of the file
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor - offset if offset else tensor
