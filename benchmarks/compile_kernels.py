"""The Triton kernels compiled ahead of time for four chips: registers, spills and shared memory. Needs no GPU.

    python benchmarks/compile_kernels.py                    # a Markdown table of every kernel, dtype, tile and chip
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton_linear_logprob import backward_kernel, forward_kernel, tile

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # A100, H100, B200, MI300X
POINTERS = {"logsumexp", "slope", "curve", "at_target", "partials"}


def compile_kernel(kernel, target, dtype, chosen):
    """The compiled kernel for a chip of TARGETS. dtype: "bf16", "fp16" or "fp32"; chosen: as of tile()."""
    *blocks, warps, stages = chosen
    constants = dict(zip(("BLOCK_N", "BLOCK_V", "BLOCK_K"), blocks, strict=True), HAS_SOFTCAP=True, HAS_CURVE=True,
                     stride_hk=1, stride_wk=1)  # as the launcher specialises contiguous inputs
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"hidden": "*" + dtype, "weight": "*" + dtype, "grad_logits": "*" + dtype, "targets": "*i64",
             "inverse_temperature": "fp32", "softcap": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32" if name in POINTERS else "i32")
                 for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name] not in ("constexpr", "fp32")}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(num_warps=warps, num_stages=stages))


def resources(compiled):
    """(registers a thread, spilled bytes a thread, shared memory bytes a program) of a compiled kernel."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        count = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"])}
        return count["vgpr_count"], 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"]), shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
    count = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    return count["REG"], count["STACK"] + count["LOCAL"], shared  # spilled registers lie on the stack


def main():
    print("| kernel | dtype | tile N x V x K | warps, stages | chip | registers | spilled bytes | shared KiB |")
    print("|---|---|---|---|---|---:|---:|---:|")
    for kernel, dtype, chip in itertools.product((forward_kernel, backward_kernel), ("bf16", "fp32"), TARGETS):
        n, v, k, warps, stages = chosen = tile(kernel, dtype != "fp32", chip)
        registers, spilled, shared = resources(compile_kernel(kernel, chip, dtype, chosen))
        print(f"| {kernel.__name__} | {dtype} | {n} x {v} x {k} | {warps}, {stages} | {chip} | {registers} | {spilled} "
              f"| {shared / 1024:g} |", flush=True)


if __name__ == "__main__":
    main()
