"""The Triton kernels compiled ahead of time for five chips: registers, spills, shared memory.

Needs no GPU.

    python benchmarks/compile_kernels.py      # Markdown tables of the matmuls' and the decode step's kernels
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

from kernels import triton_decode_attention as decode
from kernels import triton_elementwise as elementwise
from kernels.triton_adamw import adamw_kernel
from kernels.triton_linear_logprob import backward_kernel, forward_kernel, tile

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # A100, H100, B200, MI300X
DECODE_TARGETS = {"sm_75": ("cuda", 75, 32), **TARGETS}     # T4 as well
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


def compile_decode(kernel, target, dtype, group, head_dim, splits):
    """A compiled kernel of the decode step for a chip of DECODE_TARGETS.

    group: query heads of one kv head. splits: programs that share a row; 1: no merge_kernel.
    """
    chosen = decode.tile(dtype != "fp32", group, head_dim, target)
    options = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    constants = dict(chosen, GROUP=group, HEAD_DIM=head_dim, SPLITS=splits,
                     BLOCK_S=triton.next_power_of_2(splits))
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(("entries", "lengths", "prefixes", "prefix_lengths"), "*i32") | {
        "sums": "*fp32", "partial": "*fp32", "scale": "fp32", "window": "i32", "capacity": "i32"}
    if kernel is decode.attend_kernel and splits > 1:
        types["results"] = "*fp32"
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        other = "i32" if name.startswith("stride") else "*" + dtype
        signature[name] = "constexpr" if name in constants else types.get(name, other)
        if name not in (*constants, "scale", "window", "capacity"):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(*DECODE_TARGETS[target]), options=options)


def compile_elementwise(kernel, target, dtype):
    """A compiled kernel of triton_elementwise.py or triton_adamw.py for a chip of DECODE_TARGETS; heads of 128."""
    constants = {"HALF": 64, "BLOCK_H": 16, "BLOCK_D": 64, "SILU": False, "BLOCK": elementwise.BLOCK, "BETA_1": 0.9,
                 "BETA_2": 0.95, "EPS": 1e-8, "SPLIT": dtype == "bf16", "COPY": dtype == "fp16"}
    types = dict.fromkeys(("heads", "stride_n", "stride_h", "D", "stride_gate", "stride_up", "count"), "i32") | {
        **dict.fromkeys(("table", "master", "gradient", "exp_avg", "exp_avg_sq"), "*fp32"),
        **dict.fromkeys(("direction", "scale", "step_size", "root"), "fp32")}
    if kernel is adamw_kernel and dtype == "bf16":
        types |= {"weight": "*i16", "master": "*i16"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*" + dtype)
                 for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    constants = {name: value for name, value in constants.items() if name in signature}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget(*DECODE_TARGETS[target]))


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
    print("\n| dtype | D | chip | tile queries x tokens | registers | spilled bytes | shared KiB |")
    print("|---|---:|---|---|---:|---:|---:|")
    for dtype, head_dim, chip in itertools.product(("bf16", "fp16", "fp32"), (64, 128, 256),
                                                   DECODE_TARGETS):
        if (dtype, chip) == ("bf16", "sm_75"):              # it has no bf16
            continue
        chosen = decode.tile(dtype != "fp32", 2, head_dim, chip)
        registers, spilled, shared = resources(
            compile_decode(decode.attend_kernel, chip, dtype, 2, head_dim, 1))
        print(f"| {dtype} | {head_dim} | {chip} | {chosen['BLOCK_G']} x {chosen['BLOCK_T']} "
              f"| {registers} | {spilled} | {shared / 1024:.3g} |", flush=True)


if __name__ == "__main__":
    main()
