"""Weights in and out: the embedded model, Hugging Face folders and hub ids, GGUF files.

    sources.py      where the files are: the embedded model is fetched, parts are joined
    huggingface.py  folders read and written; what distinguishes one family from another
    gguf.py         llama.cpp's files, read
    templates.py    chat templates: for models that have none; where an answer stands and ends
    lora.py         adapters: added, left out, merged, saved for peft
    devices.py      where a model computes, and in which dtype
    parity.py       a lesson: our logits against transformers'
"""

import datetime
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from common.command import note, one_line
from model import Transformer
from weights import devices, gguf, huggingface, templates
from weights.devices import DEVICES, DTYPES, computes_bf16, pick_device, pick_dtype
from weights.huggingface import config_from_hf, save, state
from weights.sources import EMBEDDED, resolve

__all__ = ["DEVICES", "DTYPES", "EMBEDDED", "computes_bf16", "config_from_hf", "load",
           "load_beside", "pick_device", "pick_dtype", "resolve", "save", "state"]

# The day for chat templates that ask which day it is: the one that Llama 3.1's falls back on.
TODAY = datetime.date(2024, 7, 26)


def load(name: str, dtype: str = "auto", device: str = "auto", chat_template: str | None = None):
    """(Transformer in eval mode, tokenizer) of `smollm2-135m`, a folder, hub id or .gguf file.

    dtype: see `pick_dtype`; device: see `pick_device`; chat_template: in place of the model's own,
    see templates.py. Raises ValueError or OSError with one line that says what is wrong.
    """
    template = chat_template and templates.read(chat_template)  # refused before a fetch
    devices.keep_freed_memory()
    device = pick_device(device)
    pick_dtype(dtype, device)                           # refused before anything is fetched
    source = resolve(name)
    try:
        if source.suffix == ".gguf":
            hf_config, tensors = gguf.read(source)
            tokenizer = gguf.tokenizer(source)
        else:
            hf_config, tokenizer, tensors = huggingface.read(source)
        if template:
            templates.give(tokenizer, template)
        templates.stop_strings(tokenizer)               # refused now if they are broken
        pin_date(tokenizer)
        if templates.thinks(tokenizer):
            note(f"warning: {name} thinks before it answers: give --max-new-tokens room for both")
        with torch.device("meta"):                      # no memory until the dtype is known
            model = Transformer(config_from_hf(hf_config))
        model.c.stop_ids = stop_ids(source, hf_config, tokenizer)
        model.to(pick_dtype(dtype, device, hf_config.model_type)).to_empty(device=device)
        fill(model, tensors)
    except templates.Broken:
        raise
    except ImportError as error:
        raise ValueError(f"reading {name!r} needs a package: pip install {error.name}") from error
    except Exception as error:                          # each format's reader has its own kinds
        hint = ""
        if type(error) is not ValueError:               # ours say themselves what to do
            hint = " (a file may be cut short or of another kind: fetch it again)"
        raise ValueError(f"cannot load {name!r}: {one_line(error)}{hint}") from error
    model.hf_config = hf_config
    return model.eval(), tokenizer


def load_beside(name: str, tokenizer, dtype: str = "auto", device: str = "auto") -> Transformer:
    """A second model, which reads or writes the first one's token ids, and also stops where the
    first one's chat template ends a turn. Raises ValueError where its tokenizer is another."""
    model, other = load(name, dtype, device)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{name} has another tokenizer than the model beside it: "
                         "give one with equal token ids")
    model.c.stop_ids = sorted({*model.c.stop_ids, *templates.template_end(tokenizer)})
    return model


def pin_date(tokenizer) -> None:
    """Writes TODAY into the chat template in place of `strftime_now(...)`, so that a run resumed
    tomorrow has the same prompts (P37). A saved model keeps it.

    Raises ValueError for a format that is not written out.
    """
    def pinned(template: str) -> str:
        template = re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
                          lambda found: json.dumps(TODAY.strftime(found[2])), template)
        if "strftime_now(" in template:
            raise templates.Broken("the chat template computes a date that cannot be pinned: write "
                                   "the date into the template")
        return template

    template = tokenizer.chat_template
    if isinstance(template, dict):                      # several, by name
        tokenizer.chat_template = {name: pinned(text) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = pinned(template)


def fill(model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copies each tensor into the parameter of its name, one at a time.

    Raises ValueError on a missing, unknown or misshapen one, and on a head that is not the
    embeddings where the config says that it is.
    """
    parameters = dict(model.named_parameters())
    waiting = {parameter: name for name, parameter in parameters.items()}
    if model.c.tied:
        parameters["lm_head.weight"] = model.head_weight        # some files hold it twice
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in parameters:
                raise ValueError(f"unexpected weight {name} of shape {list(tensor.shape)}")
            target = parameters[name]
            if target.shape != tensor.shape:
                raise ValueError(f"weight {name} has shape {list(tensor.shape)}, "
                                 f"the config says {list(target.shape)}")
            if waiting.pop(target, None):
                target.copy_(tensor)
            elif not torch.equal(target, tensor.to(target)):
                raise ValueError("lm_head.weight is not embed_tokens.weight: set "
                                 "tie_word_embeddings to false in config.json")
            del tensor                                  # before the next one is read
    if waiting:
        first = next(iter(waiting.values()))
        raise ValueError(f"{len(waiting)} weights are missing, first {first}")


def stop_ids(source: Path, hf_config, tokenizer) -> list[int]:
    """Every id that ends a turn: the generation config's (Llama 3 lists several), the config's, the
    tokenizer's, and what the chat template puts behind an answer.

    Raises ValueError where the template has tokens that the model has no embeddings for.
    """
    found = [hf_config.eos_token_id, tokenizer.eos_token_id]
    generation = source / "generation_config.json"
    if generation.is_file():
        found.append(json.loads(generation.read_text()).get("eos_token_id"))
    around = sum(templates.around_answer(tokenizer), [])
    if around and max(around) >= hf_config.vocab_size:
        token = tokenizer.convert_ids_to_tokens(max(around))
        raise templates.Broken(
            f"the chat template has the token {token!r}, for which the model has no embedding (it "
            f"has {hf_config.vocab_size}): the template or the tokenizer is another's")
    found += templates.template_end(tokenizer)
    ids = set()
    for some in found:
        ids.update(some if isinstance(some, list) else [some])
    return sorted(ids - {None})
