"""native.cpp compiled for this machine, once, where there is a C++ compiler.

Without one, and in float64, the callers' plain torch does the same, slower. The library lies in the
user's cache under a name made of its source, the compiler's flags and the processor, and of its own
bytes: a file damaged since is not loaded, which could end the process, but compiled again. CXX
names another compiler; an empty CXX means none.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common.files import cache_folder

SOURCE = Path(__file__).with_name("native.cpp")
WIDE = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared",
         "-fPIC"]
FUNCTIONS = {                                           # their pointers, integers and floats
    "rms_norm": "pppppp" "iiii" "ff", "rms_norm_backward": "ppppppp" "ii" "f",
    "rotate": "ppp" "iiii" "f", "gated": "ppp" "iiiii", "gated_backward": "ppppp" "iii",
    "decode": "pppppppppppp" "iiiiiiiiiiii" "f", "draw": "pppp" "ii" "f",
    "join": "ppp" "i", "split": "ppp" "i"}
WORTH_A_THREAD = 2 ** 14                                # numbers; for fewer, waking it takes longer


def usable(x: Tensor) -> bool:
    return x.device.type == "cpu" and library(x.dtype) is not None


def run(function: str, work: int, like: Tensor, *arguments) -> None:
    """Calls a function of native.cpp for like's dtype, on as many threads as `work` numbers need.

    arguments: tensors (None: a null pointer), ints and floats, in its order, without the last
    (threads).
    """
    threads = max(1, min(torch.get_num_threads(), work // WORTH_A_THREAD))
    getattr(library(like.dtype), function)(
        *[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments], threads)


def rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, N, heads, D) of x [N, D] or [N, heads, D]: rows may stand apart, the rest may not."""
    shape, strides = x.shape, x.stride()
    D, heads = shape[-1], shape[1] if len(shape) == 3 else 1
    if strides[-1] != 1 or heads > 1 and strides[1] != D:
        x = x.contiguous()
    return x, shape[0], heads, D


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if dtype not in TYPES or not compiler or not shutil.which(compiler[0]):
        return None
    # torch's own OpenMP, or two pools of threads would wait for each other's cores
    openmp = [str(path) for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*")]
    for parallel in (["-fopenmp", *openmp], ["-fopenmp-simd"], []):
        command = [*compiler, *FLAGS, *WIDE, *parallel, "-D", f"T={TYPES[dtype]}", str(SOURCE)]
        key = digest(repr((SOURCE.read_text(), command, processor())).encode())
        with suppress(OSError, RuntimeError):           # no home, or a folder that takes no library
            folder = cache_folder().absolute()          # dlopen looks elsewhere for a bare name
            whole = (path for path in folder.glob(f"native-{key}-*.so")
                     if path.stem.endswith(digest(path.read_bytes())))
            if target := next(whole, None) or compiled(command, folder, f"native-{key}"):
                return loaded(target)
    print("kernels/native.cpp does not compile here: a CPU runs slower without it", file=sys.stderr)
    return None


def loaded(target: Path) -> ctypes.CDLL:
    found, kinds = ctypes.CDLL(str(target)), {"p": ctypes.c_void_p, "i": ctypes.c_long,
                                              "f": ctypes.c_float}
    for name, arguments in FUNCTIONS.items():
        getattr(found, name).argtypes = [kinds[kind] for kind in arguments + "i"]
    return found


def compiled(command: list[str], folder: Path, name: str) -> Path | None:
    """folder/name-<digest of the library>.so, or None where the compiler fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        out = Path(beside) / "native.so"
        if subprocess.run([*command, "-o", str(out)], capture_output=True).returncode:
            return None
        return out.replace(folder / f"{name}-{digest(out.read_bytes())}.so")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:                                     # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
