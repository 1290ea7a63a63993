"""Hugging Face folders, read and written: the config with its families, the safetensors.

transformers reads configs, tokenizers and chat templates. Its modelling code is not used.
Parameters carry Hugging Face's names already, so reading safetensors is a copy by name. A new
family is a row of ARCHITECTURES and a case of `differences`. What no other family has is also a
field of model.Config and a line that uses it.

Left out: pickled weights (.bin, .pt), which execute code when opened.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from common.files import whole_folder
from kernels.delta import DeltaSizes
from model import Config, Transformer, inverse_frequencies
from weights.lora import merged

ARCHITECTURES = {                                       # model_type: what a saved config names
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM"}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MUST_BE = {"attn_logit_softcapping": None, "use_bidirectional_attention": False,
           "partial_rotary_factor": 1.0}
LEFT_OUT = ("vision_tower.", "multi_modal_projector.", "visual.", "mtp.")   # images; drafts


def read(folder: Path):
    """(transformers config, tokenizer, iterator of (our name, tensor)) of a folder."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    text = config.get_text_config()                     # of Gemma 3 from 4B on, without its images
    if config.model_type == "qwen3_5":                  # says it beside its text config, or in it
        text.tie_word_embeddings |= config.tie_word_embeddings
    text.eos_token_id = getattr(config, "eos_token_id", None) or text.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return text, tokenizer, safetensors(folder)


def config_from_hf(hf) -> Config:
    """A transformers config as ours. Raises ValueError that names what is not supported."""
    kind = hf.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not supported; "
                         f"supported: {', '.join(ARCHITECTURES)}")
    for name, value in MUST_BE.items():
        if getattr(hf, name, value) not in (value, None):
            raise ValueError(f"{kind}: config field {name}={getattr(hf, name)!r} is not supported "
                             f"(only {value!r})")
    activation = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if activation not in ACTIVATIONS:
        raise ValueError(f"{kind}: activation {activation!r} is not supported "
                         f"({', '.join(ACTIVATIONS)})")
    windows, rope = per_layer(hf)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    bias = bool(getattr(hf, "attention_bias", False))
    config = Config(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        rms_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings,
        tied=bool(hf.tie_word_embeddings),
        activation=ACTIVATIONS[activation],
        windows=windows,
        rope=rope,
        attn_scale=head_dim ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        softcap=getattr(hf, "final_logit_softcapping", None))
    return replace(config, **differences(hf))


def differences(hf) -> dict:
    """What sets a family apart from Llama, as fields of Config."""
    match hf.model_type:
        case "qwen2":
            return {"qkv_bias": True}
        case "qwen3":
            return {"qk_norm": "head"}
        case "qwen3_5_text":
            if hf.hidden_act != "silu":
                raise ValueError(f"{hf.model_type}: activation {hf.hidden_act!r} is not supported "
                                 "(only silu)")
            sizes = DeltaSizes(hf.linear_num_key_heads, hf.linear_num_value_heads,
                               hf.linear_key_head_dim, hf.linear_value_head_dim,
                               hf.linear_conv_kernel_dim)
            linear = [i for i, t in enumerate(hf.layer_types) if t == "linear_attention"]
            return {"qk_norm": "head", "norm_offset": 1.0, "attn_gate": True, "delta": sizes,
                    "delta_layers": linear}
        case "olmo2":
            return {"qk_norm": "all", "pre_norm": False, "post_norm": True}
        case "gemma3_text":
            return {"qk_norm": "head", "post_norm": True, "norm_offset": 1.0,
                    "embed_scale": math.sqrt(hf.hidden_size),
                    "attn_scale": hf.query_pre_attn_scalar ** -0.5}
    return {}


def per_layer(hf) -> tuple[list[int], list[dict | None]]:
    """Each layer's window (0: it sees all) and rope parameters (None: no positions).

    Raises ValueError for a layer type or a rope scaling that is not supported.
    """
    kind = hf.model_type
    slides = kind == "mistral" and hf.sliding_window
    default = "sliding_attention" if slides else "full_attention"
    types = getattr(hf, "layer_types", None) or [default] * hf.num_hidden_layers
    of_qwen35 = kind == "qwen3_5_text"
    known = {"full_attention", "linear_attention" if of_qwen35 else "sliding_attention"}
    if unknown := set(types) - known:
        raise ValueError(f"{kind}: layer types {sorted(unknown)} are not supported")
    windows = [hf.sliding_window if t == "sliding_attention" else 0 for t in types]
    rope = [hf.rope_parameters.get(t, hf.rope_parameters) for t in types]   # by type, or one set
    for i, used in enumerate(getattr(hf, "no_rope_layers", None) or []):
        rope[i] = rope[i] if used else None
    rope = [None if t == "linear_attention" else r for t, r in zip(types, rope, strict=True)]
    for parameters in filter(None, rope):
        inverse_frequencies(2, parameters)              # refuses unknown scalings before it is late
        if parameters.get("partial_rotary_factor", 1.0) != 1.0 and not of_qwen35:
            raise ValueError(f"{kind}: rope parameter partial_rotary_factor is not supported "
                             "(only 1.0)")
    return windows, rope


def safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor), one at a time."""
    from safetensors import safe_open

    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():                                 # in several files
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{len(missing)} of {len(files)} weight files are missing, first "
                         f"{folder / missing[0]}")
    for file in files:
        with safe_open(folder / file, "pt") as archive:
            for name in archive.keys():
                ours = name.replace("language_model.", "").removeprefix("model.")
                computed = ours.endswith("rotary_emb.inv_freq")             # Llama 2 stores these
                if not computed and not ours.startswith(LEFT_OUT):
                    yield ours, archive.get_tensor(name)


def state(model: Transformer) -> dict[str, Tensor]:
    """The parameters on the CPU, by the names they have in a Hugging Face checkpoint. Adapters are
    merged into the weights that they update."""
    tensors = {}
    for name, parameter in merged(model):
        theirs = name if name.startswith("lm_head") else f"model.{name}"
        tensors[theirs] = parameter.detach().to("cpu").contiguous()
    return tensors


def save(model: Transformer, tokenizer, folder: str | Path) -> None:
    """Writes a plain Hugging Face folder in the model's dtype: config, generation config,
    safetensors, tokenizer with its template. It appears whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_folder(Path(folder)) as part:
        model.hf_config.dtype = model.dtype
        ends = model.c.stop_ids or None                 # none is null, not []
        model.hf_config.eos_token_id = ends
        model.hf_config.architectures = [ARCHITECTURES[model.hf_config.model_type]]
        model.hf_config.save_pretrained(part)
        try:
            save_file(state(model), part / "model.safetensors", {"format": "pt"})
        except SafetensorError as error:                # a full disk
            raise OSError(f"{folder} could not be written ({error})") from error
        tokenizer.save_pretrained(part)
        generation = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
        (part / "generation_config.json").write_text(json.dumps(generation))
