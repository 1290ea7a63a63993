"""Where a model computes, and in what: --device and --dtype."""

import ctypes
import os
import platform
import sys

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_IN_FP16 = ("gemma3_text",)                          # their activations leave fp16's range


def pick_device(name: str) -> str:
    """The torch device of one of DEVICES, for this process. `auto`: its GPU if torch sees one, else
    the CPU.

    Raises ValueError where the device is missing, or where torchrun has started more processes than
    there are GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch sees no Apple GPU here; try --device cpu")
    if name == "mps" and "LOCAL_RANK" in os.environ:
        raise ValueError("--device mps is for one process: leave out torchrun, "
                         "or give --device cpu")
    if name != "cuda":
        return name
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; try --device cpu, "
                         "or install a CUDA build of torch")
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= count:
        raise ValueError(f"torchrun started more processes than the {count} GPUs here: "
                         "lower --nproc-per-node, or give --device cpu")
    return f"cuda:{rank}"


def computes_bf16(device: str) -> bool:
    """Has the processor bf16 arithmetic? NVIDIA GPUs have it from capability 8.0 (A100) on.
    Others emulate it, slowly."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    cpu = torch.cpu
    return device == "cpu" and (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def pick_dtype(dtype: str, device: str, family: str = "") -> torch.dtype:
    """The torch dtype of `auto` or one of DTYPES. family: transformers' model_type.

    `auto`: bf16 where the processor computes in it; else fp16 on a GPU (T4), if the family
    can; else fp32. Raises ValueError for a bf16 that a GPU would only emulate.
    """
    gpu = device.startswith("cuda")
    if dtype == "bfloat16" and gpu and not computes_bf16(device):
        raise ValueError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} has no bf16 "
                         "arithmetic; give float16, float32 or another --device")
    if dtype != "auto":
        return DTYPES[dtype]
    if computes_bf16(device):
        return torch.bfloat16
    return torch.float16 if gpu and family not in NOT_IN_FP16 else torch.float32


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory rather than to return it, and limits matmul caches, those
    of child processes too.

    Each large tensor would otherwise touch fresh pages, which costs a CPU run about 15 % (measured
    on two cores). oneDNN keeps what it made for the last 1,024 shapes of matmuls, and torch as much
    again. Packed batches nearly always have new shapes, so that is of no use: it scatters over the
    heap, which was 0.85 GB larger after 14 steps of the main job, and growing. A few are kept
    instead; must be said before the first matmul.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)                       # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)                 # M_TRIM_THRESHOLD
