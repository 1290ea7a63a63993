"""kernels/native.cpp against float64, and its build. Its attention: test_decode_attention.py.

What kernels/triton_elementwise.py has in its place runs the same tests in Triton's interpreter, which must be chosen
before triton is imported: in a second pytest, with TRITON_INTERPRET=1.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import elementwise, native
from kernels.elementwise import (
    add_rms_norm,
    gated,
    rms_norm,
    rotate,
    torch_gated,
    torch_rms_norm,
    torch_rotate,
)
from sampling.draw import sample, sample_rows
from tests.test_kernels import INTERPRETED, in_interpreter_pass, outside, relative_errors

ROOT = Path(__file__).resolve().parents[1]
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 3e-3}    # a bf16 number is rounded by 1.6e-3 on average
compiled = pytest.mark.skipif(not INTERPRETED and not native.usable(torch.empty(0)), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def written_in_triton(monkeypatch):
    """In the second pytest."""
    if INTERPRETED:
        from kernels import triton_elementwise as theirs

        monkeypatch.setattr(elementwise, "fused", lambda x: True)
        for name in ("rotate", "gated", "gated_backward"):
            monkeypatch.setattr(elementwise, f"fused_{name}", getattr(theirs, f"triton_{name}"))


@pytest.fixture(params=BOUNDS, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def normal(*shape, seed=0, scale=1.0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * scale


def check(function, exact, dtype, *inputs, device="cpu", bound=0.0) -> None:
    """Outputs without a gradient, with one, and gradients, against `exact` in float64."""
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected, out = exact(*doubles), function(*inputs)
    slope = normal(*expected.shape[::-1], seed=9).to(device, dtype).permute(*reversed(range(expected.dim())))
    grads = torch.autograd.grad(out, inputs, slope)
    expected_grads = torch.autograd.grad(expected, doubles, slope.double())
    with torch.no_grad():
        assert torch.equal(function(*inputs), out)
    errors = relative_errors([x.double() for x in (out, *grads)], [expected, *expected_grads])
    assert all(error < (bound or BOUNDS[dtype]) for error in errors), errors
    assert [x.dtype for x in (out, *grads)] == [dtype] * (1 + len(grads))


@compiled
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 576), (300, 576), (7, 3, 64), (1, 8)], ids=str)
def test_rms_norm_and_its_gradients(shape, offset, dtype):
    x, weight = normal(*shape, scale=3), normal(shape[-1], seed=1)
    check(lambda x, w: rms_norm(x, w, 1e-5, offset),
          lambda x, w: torch_rms_norm(x, w, 1e-5, 0.0) if not offset else
          x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (w + offset), dtype, x, weight)


@compiled
def test_a_norm_that_adds_gives_the_sum_and_both_gradients(dtype):
    """Both outputs are used, as in a layer; and only the sum, as where a norm's result is not."""
    def ours(x, residual, weight):
        out, total = add_rms_norm(x, residual, weight, 1e-5)
        return torch.cat([out, 0.5 * total])

    def exact(x, residual, weight):
        total = (x + residual).to(dtype).double() if dtype != torch.float32 else x + residual
        total = x + residual + (total - x - residual).detach()          # the sum is rounded first
        return torch.cat([torch_rms_norm(total, weight, 1e-5), 0.5 * total])

    check(ours, exact, dtype, normal(40, 96), normal(40, 96, seed=1), normal(96, seed=2))
    check(lambda x, r: add_rms_norm(x, r, torch.ones(96, dtype=dtype), 1e-5)[1],
          lambda x, r: x + r, dtype, normal(40, 96), normal(40, 96, seed=1))


@compiled
def test_rotary_positions_and_their_gradients(dtype):
    table = torch.randn(50, 1, 64, generator=torch.Generator().manual_seed(3))
    check(lambda x: rotate(x, table), lambda x: torch_rotate(x, table.double()), dtype,
          normal(50, 9, 64))


@compiled
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_gate_and_its_gradients(activation, dtype):
    check(lambda g, u: gated(g, u, activation), lambda g, u: torch_gated(g, u, activation), dtype,
          normal(70, 300, scale=4), normal(70, 300, seed=1))
    wide = torch.tensor([[-3e4, -200.0, -90.0, 0.0, 90.0, 200.0, 3e4]]).to(dtype)
    found = gated(wide, torch.ones_like(wide), activation)
    assert torch.allclose(found, wide.clamp(min=0), atol=1e-30)         # far from 0: 0, or the gate
    huge = torch.tensor([[-1e13, -1e18, -1e30, -3e38]]).to(dtype).requires_grad_()
    found = gated(huge, torch.ones_like(huge), activation)
    slope = torch.autograd.grad(found.sum(), huge)[0]                   # of gelu's cube: beyond fp32
    assert not found.any() and not slope.any()


@compiled
def test_rows_of_a_wider_tensor_are_read_in_place(dtype):
    """As q, k and v are of one matmul's result."""
    wide = normal(20, 5 * 64).to(dtype)
    heads = wide[:, 64:256].view(20, 3, 64)
    weight, table = normal(64, seed=1).to(dtype), torch.randn(20, 1, 64)
    assert torch.equal(rms_norm(heads, weight, 1e-5), rms_norm(heads.contiguous(), weight, 1e-5))
    assert torch.equal(rotate(heads, table), rotate(heads.contiguous(), table))
    gate, up = wide[:, :160], wide[:, 160:]
    assert torch.equal(gated(gate, up, "silu"),
                       gated(gate.contiguous(), up.contiguous(), "silu"))
    part, narrow = wide.view(20, 5, 64)[..., :32], torch.randn(20, 1, 32)       # as with partial rotary positions
    assert torch.equal(rotate(part, narrow), rotate(part.contiguous(), narrow))
    across = wide.T.contiguous().T                                              # no dimension is contiguous
    assert torch.equal(rotate(across.view(20, 5, 64), table), rotate(wide.view(20, 5, 64), table))
    assert torch.equal(gated(across[:, :160], across[:, 160:], "silu"), gated(gate, up, "silu"))
    turned = wide.T
    assert torch.equal(rms_norm(turned, torch.ones(20).to(dtype), 1e-5),
                       rms_norm(turned.contiguous(), torch.ones(20).to(dtype), 1e-5))


@compiled
def test_nan_and_infinity_stay_in_their_row(dtype):
    x = normal(3, 64).to(dtype)
    x[1, 5] = torch.nan
    weight = torch.ones(64, dtype=dtype)
    for out in (rms_norm(x, weight, 1e-5), add_rms_norm(x, x, weight, 1e-5)[0],
                gated(x, x, "silu"), rotate(x[:, None], torch.ones(3, 1, 64))):
        broken = out.isnan().flatten(1).any(1)
        assert broken.tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(5, 3, 20), (2, 40, 128), (3, 1, 2), (0, 4, 64)], ids=str)
def test_any_number_of_heads_and_features(shape, dtype):
    """Also more than one program takes, and none."""
    table = torch.randn(shape[0], 1, shape[-1], generator=torch.Generator().manual_seed(3))
    check(lambda x: rotate(x, table), lambda x: torch_rotate(x, table.double()), dtype, normal(*shape))
    flat = normal(*shape).flatten(1)
    check(lambda g, u: gated(g, u, "silu"), lambda g, u: torch_gated(g, u, "silu"), dtype, flat, flat + 1)


IN_TRITON = (test_rotary_positions_and_their_gradients, test_the_gate_and_its_gradients,
             test_rows_of_a_wider_tensor_are_read_in_place, test_nan_and_infinity_stay_in_their_row,
             test_any_number_of_heads_and_features)


@pytest.mark.slow
@outside
def test_triton_kernels_pass_these_tests_in_the_interpreter():
    in_interpreter_pass(*(f"{__file__}::{test.__name__}" for test in IN_TRITON))


@pytest.mark.slow
@outside
def test_triton_kernels_compile_ahead_of_time_without_spills():
    ahead = pytest.importorskip("benchmarks.compile_kernels", exc_type=ImportError)
    kernels = (ahead.elementwise.rotate_kernel, ahead.elementwise.gated_kernel,
               ahead.elementwise.gated_backward_kernel, ahead.adamw_kernel)
    for kernel, chip, dtype in itertools.product(kernels, ahead.DECODE_TARGETS, ("bf16", "fp16", "fp32")):
        if (chip, dtype) != ("sm_75", "bf16"):
            compiled = ahead.compile_elementwise(kernel, chip, dtype)
            assert ahead.resources(compiled)[1] == 0, (kernel, chip, dtype)


@compiled
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_draw_is_that_of_torch(temperature, dtype):
    logits, rows = normal(400, 50_003, scale=3).to(dtype), 400
    uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = sample(logits, uniforms, temperature)
    wanted, wanted_logprobs = sample_rows(logits.float(), uniforms, temperature, 0, 1.0, 0.0)
    exact = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (logprobs - exact).abs().max() < 2e-6 * max(1.0, exact.abs().max())
    same = tokens == wanted
    assert same.all()
    assert torch.allclose(logprobs[same], wanted_logprobs[same], atol=1e-5)
    greedy, logprobs = sample(logits, uniforms, 0.0)
    exact = logits.double().log_softmax(-1).gather(1, greedy[:, None])[:, 0]
    assert torch.equal(logits.gather(1, greedy[:, None])[:, 0], logits.amax(-1))
    assert (logprobs - exact).abs().max() < 1e-5


@compiled
def test_a_draw_from_broken_logits_gives_nan_for_that_row(dtype):
    logits = normal(4, 1000).to(dtype)
    logits[1, 700], logits[2, 3] = torch.nan, torch.inf
    for temperature in (0.0, 0.7):
        tokens, logprobs = sample(logits, torch.full((4,), 0.5), temperature)
        assert logprobs.isfinite().tolist() == [True, False, False, True]
        assert ((tokens >= 0) & (tokens < 1000)).all()


@compiled
def test_each_function_gives_the_same_bits_on_one_thread_and_on_two(dtype):
    x, weight = normal(300, 576).to(dtype), torch.ones(576, dtype=dtype)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([rms_norm(x, weight, 1e-5), gated(x, x, "silu"),
                      *sample(x, torch.linspace(0, 0.999, 300), 1.0)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


SCRIPT = """
import torch
from kernels import native
x = torch.ones(2, 64)
print(native.usable(x), native.usable(x.double()), native.usable(x.half()))
"""


@compiled
def test_weights_of_another_dtype_are_not_misread(dtype):
    x, weight = normal(5, 64).to(dtype), normal(64, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-5), torch_rms_norm(x, weight, 1e-5))


@compiled
def test_weights_that_are_a_view_are_not_misread(dtype):
    wide = normal(64, 3, seed=1).to(dtype)
    for weight in (wide[:, 1], wide[:1, 0].expand(64)):
        x = normal(5, 64).to(dtype).requires_grad_()
        found, wanted = (rms_norm(x, w, 1e-5) for w in (weight, weight.contiguous()))
        assert torch.equal(found, wanted)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)))


@pytest.mark.parametrize("compiler, usable", [
    ("", False), ("no-such-compiler", False), ("false", False),
    pytest.param(None, True, marks=pytest.mark.slow),
    pytest.param("env LC_ALL=C c++", True, marks=pytest.mark.slow)])
def test_without_a_compiler_torch_takes_its_place(compiler, usable, tmp_path):
    """And a compiler that fails is said once."""
    if usable and not native.usable(torch.empty(0)):
        pytest.skip("needs a C++ compiler")
    env = os.environ | {"PERMIX_CACHE": str(tmp_path)}
    env.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT,
                          env=env | ({} if compiler is None else {"CXX": compiler}))
    assert done.stdout.split() == [str(usable), "False", "False"], done.stderr
    assert ("does not compile" in done.stderr) == (compiler == "false")
    assert len(list(tmp_path.iterdir())) == usable      # nothing half-written stays


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("left", [0, 1000, 20_000])
def test_a_damaged_library_in_the_cache_is_compiled_again(left, tmp_path):
    """Loaded, its missing pages would end the process (SIGBUS). And the cache may be the working
    directory, which dlopen doesn't search."""
    def usable():
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                              cwd=tmp_path, env=os.environ | {"PERMIX_CACHE": ".",
                                                              "PYTHONPATH": str(ROOT)})
        assert done.stdout.split() == ["True", "False", "False"], done
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    (name, whole), = usable().items()
    (tmp_path / name).write_bytes(whole[:left])
    again = usable()
    assert whole in again.values() and not again.get(name) == whole[:left]


def test_a_cache_folder_that_takes_no_library_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PERMIX_CACHE": str(tmp_path / "file")})
    assert done.stdout.split() == ["False"] * 3, done.stderr
