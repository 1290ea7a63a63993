"""The attention of a decode step: its definition in torch, its C++ and its Triton kernels, against
a plain loop in float64.

Triton's interpreter must be chosen before triton is imported. So the first pytest starts a second
one over this file, with TRITON_INTERPRET=1. There the same tests run on the Triton kernels.
"""

from itertools import product
from typing import NamedTuple

import pytest
import torch

from kernels import native
from kernels.decode_attention import Rows, decode_attention, torch_decode_attention
from tests.test_kernels import INTERPRETED, SHARED_LIMIT, in_interpreter, in_interpreter_pass, outside

once = pytest.mark.parametrize("written_in", ["torch"], indirect=True)     # whatever `decode` runs
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of relative_error; the definition rounds scores too
BOUNDS = dict(zip(DTYPES, (2e-6, 1e-3, 8e-3) if INTERPRETED else (8e-6, 4e-3, 3e-2), strict=True))
NAN = float("nan")


class Step(NamedTuple):
    """The tensors of a decode step, as `decode_attention` takes them."""
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    row_kv: tuple
    prefix_kv: tuple
    rows: Rows


@pytest.fixture(params=["triton"] if INTERPRETED else ["torch", "c++"], autouse=True)
def written_in(request):
    """The language that `decode` runs."""
    global LANGUAGE
    LANGUAGE = request.param
    if LANGUAGE == "c++" and not native.usable(torch.empty(0)):
        pytest.skip("needs a C++ compiler")


def sample(prefixes, prefix_lengths, lengths, heads=(4, 2), D=64, dtype=torch.float32,
           capacities=(40, 48), entries=3) -> Step:
    """A random step. What no row sees is NaN. capacities: tokens of a prefix, of a row. Row b of B
    has entry B - b."""
    generator = torch.Generator().manual_seed(0)
    B, (H, K), (P, T) = len(lengths), heads, capacities

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def poisoned(count, width, written):
        caches = normal(count, K, width, D), normal(count, K, width, D)
        for entry, length in enumerate(written):
            for cache in caches:
                cache[entry, :, length:] = NAN
        return caches

    seen = [max((n for at, n in zip(prefixes, prefix_lengths, strict=True) if at == entry),
                default=0) for entry in range(entries)]
    rows = Rows(*(torch.tensor(x, dtype=torch.int32)
                  for x in (range(B, 0, -1), lengths, prefixes, prefix_lengths)))
    return Step(normal(B, H, D) * 2, normal(B, K, D), normal(B, K, D),
                poisoned(B + 1, T, [0, *reversed(lengths)]), poisoned(entries, P, seen), rows)


def reference(step: Step, scale: float, window: int = 0) -> torch.Tensor:
    """Row by row and head by head, in float64: gather the visible tokens, then a softmax."""
    (B, H, _), K, out = step.q.shape, step.k.shape[1], torch.empty(step.q.shape).double()
    for b in range(B):
        entry, own, prefix_entry, before = (int(x[b]) for x in step.rows)
        for head in range(H):
            kv = head // (H // K)
            keys, values = (
                torch.cat([prefix[prefix_entry, kv, :before], row[entry, kv, :own], new[b, kv][None]]).double()
                for prefix, row, new in zip(step.prefix_kv, step.row_kv, step[1:3], strict=True))
            if window:
                keys, values = keys[-window:], values[-window:]
            out[b, head] = (keys @ step.q[b, head].double() * scale).softmax(0) @ values
    return out


def decode(step: Step, scale: float, window: int = 0) -> torch.Tensor:
    if LANGUAGE == "torch":
        return torch_decode_attention(*step, scale, window)
    if LANGUAGE == "c++":
        return decode_attention(*step, scale, window)
    from kernels.triton_decode_attention import triton_decode_attention
    return triton_decode_attention(*step, scale, window)


def relative_error(found, expected) -> float:
    """The largest over rows and heads: one wrong head may not hide among many."""
    found, expected = found.cpu().double(), expected.cpu()
    assert found.isfinite().all()
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def check(step: Step, window: int = 0, scale: float | None = None) -> None:
    scale = scale or step.q.shape[-1] ** -0.5
    expected = reference(step, scale, window)
    error = relative_error(decode(step, scale, window), expected)
    assert error < BOUNDS[step.q.dtype], error


# Rows that share a prefix, whose prefix is empty or partly theirs, that are empty themselves, both.
MIXED = dict(prefixes=[2, 0, 2, 1, 1, 0], prefix_lengths=[40, 7, 40, 0, 0, 7],
             lengths=[0, 33, 47, 5, 0, 1])


# --------------------------------------------------------------------------------------------------
# All three


@pytest.mark.parametrize("window", [0, 1, 6, 20, 60, 500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_equal_a_float64_loop_for_every_dtype_and_window(dtype, window):
    check(sample(**MIXED, dtype=dtype), window)


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1), (7, 1), (16, 2), (20, 1)], ids=str)
def test_both_take_any_head_size_and_number_of_grouped_queries(heads, D):
    for dtype in (torch.float32, torch.bfloat16):
        check(sample([0, 1], [37, 40], [40, 0], heads, D, dtype, entries=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_write_the_new_token_behind_the_rows_tokens_and_change_nothing_else(dtype):
    step = sample(**MIXED, dtype=dtype)
    expected = [cache.clone() for cache in (*step.row_kv, *step.prefix_kv)]
    for cache, new in zip(expected[:2], (step.k, step.v), strict=True):
        for b, (entry, length) in enumerate(zip(*step.rows[:2], strict=True)):
            cache[entry, :, length] = new[b]
    decode(step, 0.2)
    for cache, wanted in zip((*step.row_kv, *step.prefix_kv), expected, strict=True):
        assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))   # NaNs too


def test_both_take_caches_that_are_views_of_wider_storage_and_queries_of_any_strides():
    step = sample(**MIXED)
    expected = reference(step, 0.2, 30)
    wide = [torch.full((x.shape[0] + 2, 5, x.shape[2] + 9, 64), NAN)[2:, 1:3, 4:-5].copy_(x)
            for x in (*step.row_kv, *step.prefix_kv)]
    if LANGUAGE != "c++":           # tokens far apart, and values with other strides than the keys
        wide[1] = wide[1].transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in step[:3])
    assert not any(x.is_contiguous() for x in (q, k, v, *wide))
    step = Step(q, k, v, tuple(wide[:2]), tuple(wide[2:]), step.rows)
    assert relative_error(decode(step, 0.2, 30), expected) < BOUNDS[torch.float32]


def test_both_survive_scores_of_thousands():
    for step in (sample(**MIXED), long_step(torch.float32)):            # whole rows, and split ones
        found, expected = decode(step, 2000.0), reference(step, 2000.0)
        assert relative_error(found, expected) < 1e-3                   # of scores rounded in fp32


def test_p42_each_gives_the_same_bits_twice_and_for_a_row_in_another_place():
    step = long_step(torch.float16)
    other = sample(**MIXED, dtype=torch.float16)
    assert torch.equal(decode(step, 0.2), decode(step, 0.2))
    turned = Step(*(x.flip(0) for x in other[:3]), other.row_kv, other.prefix_kv,
                  Rows(*(x.flip(0) for x in other.rows)))
    assert torch.equal(decode(other, 0.2), decode(turned, 0.2).flip(0))


# --------------------------------------------------------------------------------------------------
# Triton


def long_step(dtype) -> Step:
    """Few rows of long caches: each is split, but for a window."""
    return sample([1, 0, 0], [700, 0, 900], [0, 1100, 640], dtype=dtype, entries=2,
                  capacities=(900, 1200))


@in_interpreter
@pytest.mark.parametrize("window", [0, 130, 650, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_splits_few_long_rows_and_merges_the_parts(dtype, window, monkeypatch):
    from kernels import triton_decode_attention as module
    assert module.number_of_splits(3 * 2, 900 + 1200) == 8 and module.number_of_splits(3 * 2, 7 * 256) == 4
    merge, splits = module.merge_kernel[3 * 4,], []

    def counted(*args, SPLITS, **flags):
        splits.append(SPLITS)
        merge(*args, SPLITS=SPLITS, **flags)

    monkeypatch.setattr(module, "merge_kernel", {(3 * 4,): counted})
    check(long_step(dtype), window)
    assert splits == {0: [8], 130: [], 650: [2], 1100: [4]}[window]


@in_interpreter
@pytest.mark.parametrize("window", [0, 650])
def test_triton_with_splits_writes_the_new_token_and_reads_no_cache_in_its_place(window):
    """The cache holds NaN where the new token goes. It is there afterwards, and was not read."""
    step = long_step(torch.float32)
    check(step, window)
    for b, (entry, length) in enumerate(zip(*step.rows[:2], strict=True)):
        for cache, new in zip(step.row_kv, (step.k, step.v), strict=True):
            assert torch.equal(cache[entry, :, length], new[b])
            assert cache[entry, :, length + 1:].isnan().all()


@in_interpreter
def test_triton_without_tensor_cores_takes_halves_too(monkeypatch):
    from kernels import triton_decode_attention as module
    monkeypatch.setattr(module, "this_chip", lambda: "sm_75")
    assert not module.tile(True, 2, 64, "sm_75")["TENSOR_CORES"]
    check(sample(**MIXED, dtype=torch.float16), 20)


@in_interpreter
@pytest.mark.parametrize("far", [(2 ** 30, 64, 16), (64, 2 ** 30, 16), (64, 16, 2 ** 30)], ids=str)
def test_triton_offsets_pass_2_to_the_31(far):
    """Entries, heads or tokens far apart, in 4 GB of addresses: untouched pages take no memory."""
    step = sample([2, 1, 0], [3, 0, 3], [0, 1, 2], (3, 3), 16, torch.float16, (3, 3))
    memory = torch.empty(2 ** 31 + 2 ** 13, dtype=torch.float16)
    caches = [memory[1024 * i:].as_strided((3, 3, 3, 16), (*far, 1)).copy_(x[-3:])
              for i, x in enumerate((*step.row_kv, *step.prefix_kv))]
    rows = step.rows._replace(entries=step.rows.entries - 1)
    check(step._replace(row_kv=tuple(caches[:2]), prefix_kv=tuple(caches[2:]), rows=rows))


@in_interpreter
def test_triton_gives_nan_and_writes_nothing_for_a_row_without_room():
    step = sample(**MIXED)
    step.rows.lengths[1] = 48
    before = [cache.clone() for cache in step.row_kv]
    out = decode(step, 0.2)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False, False, False, False]
    assert not out[[0, 2, 3, 4, 5]].isnan().any()
    for cache, old in zip(step.row_kv, before, strict=True):
        assert torch.equal(cache[4:6, :, :47].nan_to_num(9), old[4:6, :, :47].nan_to_num(9))
        assert cache[5, :, 33:].isnan().all()


@in_interpreter
def test_triton_refuses_mixed_dtypes_and_strided_heads():
    step = sample(**MIXED)
    assert decode(Step(*(x[:0] for x in step[:3]), *step[3:]), 0.2).shape == (0, 4, 64)
    for wrong in (step._replace(k=step.k.half()), step._replace(q=step.q[..., ::2])):
        with pytest.raises(ValueError, match="contiguous"):
            decode(wrong, 0.2)


@pytest.mark.slow
@once
@outside
def test_triton_kernels_pass_these_tests_in_the_interpreter():
    in_interpreter_pass(__file__)


@pytest.mark.slow
@once
@outside
@pytest.mark.parametrize("chip", [*SHARED_LIMIT, "sm_75"])
def test_triton_kernels_compile_ahead_of_time_without_spills(chip):
    ahead = pytest.importorskip("benchmarks.compile_kernels", exc_type=ImportError)
    half = "fp16" if chip == "sm_75" else "bf16"
    for dtype, D in product((half, "fp32"), (64, 128, 256)):
        compiled = ahead.compile_decode(ahead.decode.attend_kernel, chip, dtype, 8, D, 4)
        registers, spilled, shared = ahead.resources(compiled)
        assert spilled == 0 and 0 < registers < 256, (dtype, D)
        assert shared <= SHARED_LIMIT.get(chip, 64) * 1024, (dtype, D)
        code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        uses_tensor_cores = "mma.sync" in code or "v_mfma" in code
        assert uses_tensor_cores == (dtype != "fp32" and chip != "sm_75")
    merge = ahead.compile_decode(ahead.decode.merge_kernel, chip, half, 2, 256, 32)
    assert ahead.resources(merge)[1] == 0
