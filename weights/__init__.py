"""Weights in and out: the embedded model, Hugging Face folders and hub ids, GGUF files.

    sources.py      where the files are: the embedded model is fetched, parts are joined
    huggingface.py  folders read and written; what distinguishes one family from another
    gguf.py         llama.cpp's files, read
    devices.py      where a model computes, and in which dtype
    parity.py       a lesson: our logits against transformers'
"""

import json
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from common.command import one_line
from model import Transformer
from weights import devices, gguf, huggingface
from weights.devices import DEVICES, DTYPES, computes_bf16, pick_device, pick_dtype
from weights.huggingface import config_from_hf, save, state
from weights.sources import EMBEDDED, GGUF_FILE, cache_folder, embedded_model, resolve, sha256

__all__ = [
    "DEVICES", "DTYPES", "EMBEDDED", "cache_folder", "computes_bf16", "config_from_hf",
    "embedded_model", "load", "load_beside", "pick_device", "pick_dtype", "resolve", "save",
    "sha256", "state"]


def load(name: str, dtype: str = "auto", device: str = "auto"):
    """(Transformer in eval mode, tokenizer) of `smollm2-135m`, a folder, hub id or .gguf file.

    dtype: see `pick_dtype`; device: see `pick_device`. Raises ValueError or OSError with one line
    that says what is wrong.
    """
    devices.keep_freed_memory()
    device = pick_device(device)
    pick_dtype(dtype, device)                           # refused before anything is fetched
    source = resolve(name)
    try:
        if source.suffix == ".gguf":
            hf_config, tensors = gguf.read(source)
            tokenizer = gguf_tokenizer(source)
        else:
            hf_config, tokenizer, tensors = huggingface.read(source)
        with torch.device("meta"):                      # no memory until the dtype is known
            model = Transformer(config_from_hf(hf_config))
        model.to(pick_dtype(dtype, device, hf_config.model_type)).to_empty(device=device)
        fill(model, tensors)
    except ImportError as error:
        raise ValueError(f"reading {name!r} needs a package: pip install {error.name}") from error
    except Exception as error:                          # each format's reader has its own kinds
        raise ValueError(f"cannot load {name!r}: {one_line(error)} (a file may be cut short or of "
                         "another kind: fetch it again)") from error
    model.hf_config = hf_config
    model.c.stop_ids = stop_ids(source, hf_config, tokenizer)
    return model.eval(), tokenizer


def load_beside(name: str, tokenizer, dtype: str = "auto", device: str = "auto") -> Transformer:
    """A second model, which reads or writes the first one's token ids. Raises ValueError where its
    tokenizer is another."""
    model, other = load(name, dtype, device)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{name} has another tokenizer than the model beside it: "
                         "give one with equal token ids")
    return model


def gguf_tokenizer(path: Path):
    """The tokenizer of a .gguf file. The embedded model's is kept beside it: taking it out of the
    file costs seconds."""
    from transformers import PreTrainedTokenizerFast

    if path != cache_folder() / GGUF_FILE:
        return gguf.read_tokenizer(path)
    parsed = path.with_suffix(".parsed")
    if not parsed.is_dir():
        with tempfile.TemporaryDirectory(dir=parsed.parent) as folder:
            gguf.read_tokenizer(path).save_pretrained(Path(folder, "new"))
            with suppress(OSError):                     # another process was first
                Path(folder, "new").rename(parsed)
    return PreTrainedTokenizerFast.from_pretrained(parsed, local_files_only=True)


def fill(model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copies each tensor into the parameter of its name, one at a time.

    Raises ValueError on a missing, unknown or misshapen one.
    """
    waiting = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            if name == "lm_head.weight" and model.c.tied:
                continue                                # a copy of the embeddings
            if name not in waiting:
                raise ValueError(f"unexpected weight {name} of shape {list(tensor.shape)}")
            target = waiting.pop(name)
            if target.shape != tensor.shape:
                raise ValueError(f"weight {name} has shape {list(tensor.shape)}, "
                                 f"the config says {list(target.shape)}")
            target.copy_(tensor)
            del tensor                                  # before the next one is read
    if waiting:
        raise ValueError(f"{len(waiting)} weights are missing, first {next(iter(waiting))}")


def stop_ids(source: Path, hf_config, tokenizer) -> list[int]:
    """Every id that ends a turn: the generation config's (Llama 3 lists several), the config's, the
    tokenizer's."""
    found = [hf_config.eos_token_id, tokenizer.eos_token_id]
    generation = source / "generation_config.json"
    if generation.is_file():
        found.append(json.loads(generation.read_text()).get("eos_token_id"))
    ids = set()
    for some in found:
        ids.update(some if isinstance(some, list) else [some])
    return sorted(ids - {None})
