"""What only a GPU can show: our kernels, the forward, the sampler, a training step and a resumed run, on one.

Skipped where there is no GPU. GPU_TESTS_ON_CPU=1 runs them on the CPU instead: a rehearsal of the tests themselves,
which says nothing about a GPU.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import train
import weights
from kernels import attention, elementwise, linear_logprob
from kernels.attention import PrefixAttention
from kernels.decode_attention import Rows, decode_attention
from model import completion_logprobs, pack
from rollout import Sampler, SamplingParams, generate
from tests import test_adamw as adamw_tests
from tests import test_decode_attention as decode_tests
from tests import test_native as native_tests
from tests.conftest import make_reference, stopping
from tests.test_kernels import outputs_and_gradients, reference, relative_errors, sample
from tests.test_model import groups_of, heads_of, random_ids, use_torch_stand_in
from tests.test_rollout import random_prompts, trainer_logprobs
from tests.test_train import FAST, REWARD, metrics, same, tensors
from training import monitor
from training.adamw import master_of

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda:0" if GPU else "cpu"
pytestmark = pytest.mark.skipif(not GPU and "GPU_TESTS_ON_CPU" not in os.environ, reason="no GPU")
HALF = torch.bfloat16 if weights.computes_bf16(DEVICE) else torch.float16
HALVES = [HALF] if HALF == torch.float16 else [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}        # of log-probs, on tiny random models


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def loaded(folder, dtype: torch.dtype = torch.float32):
    return weights.load(str(folder), name(dtype), "cuda" if GPU else "cpu")[0]


def memory_gb() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 1e9 if GPU else 0.0


# -- kernels -----------------------------------------------------------------------------------------------------------


def on_gpu(*sizes, **more):
    hidden, weight, targets = sample(*sizes, **more)
    return *(x.detach().to(DEVICE).requires_grad_() for x in (hidden, weight)), targets.to(DEVICE)


def double_slopes(function, hidden, weight, targets, *args, entropy=True, **kwargs):
    """`outputs_and_gradients` with its incoming gradients on the GPU."""
    with torch.device(DEVICE):
        return outputs_and_gradients(function, hidden, weight, targets, *args, entropy=entropy, **kwargs)


@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "logprob"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [0.6, 1.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_p22_the_kernels_err_no_more_than_twice_what_plain_torch_errs(dtype, temperature, softcap, entropy):
    inputs = on_gpu(300, 64, 1000, dtype, scale=3.0)
    expected = double_slopes(reference, *inputs, temperature, softcap, entropy=entropy)
    plain = double_slopes(reference, *inputs, temperature, softcap, dtype=dtype, entropy=entropy)
    ours = double_slopes(linear_logprob, *inputs, temperature, softcap, entropy=entropy)
    plain, ours = relative_errors(plain, expected), relative_errors(ours, expected)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, plain, strict=True)), (ours, plain)


@pytest.mark.parametrize("size", [(1, 16, 32), (17, 33, 65), (5, 7, 31), (129, 40, 301), (1500, 576, 49152)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=name)
def test_p22_the_kernels_handle_tails_of_tokens_features_and_vocabulary(dtype, size):
    inputs = on_gpu(*size, dtype)
    expected = double_slopes(reference, *inputs, 0.7)
    plain = relative_errors(double_slopes(reference, *inputs, 0.7, dtype=dtype), expected)
    ours = relative_errors(double_slopes(linear_logprob, *inputs, 0.7), expected)
    assert all(a <= 2 * b + 1e-5 for a, b in zip(ours, plain, strict=True)), (ours, plain)


def test_p22_the_kernels_answer_no_tokens_strides_and_targets_outside_the_vocabulary():
    hidden, weight, targets = on_gpu(0, 16, 64, HALF)
    assert double_slopes(linear_logprob, hidden, weight, targets)[0].shape == (0,)
    hidden, weight, targets = on_gpu(12, 20, 90, torch.float32)
    expected = double_slopes(linear_logprob, hidden, weight, targets)
    strided = [x.detach().repeat_interleave(2, 1).t().contiguous().t()[:, ::2].requires_grad_()
               for x in (hidden, weight)]
    assert max(relative_errors(double_slopes(linear_logprob, *strided, targets), expected)) < 1e-5
    if GPU and torch.cuda.get_device_capability()[0] >= 8:
        outside = torch.where(torch.arange(12, device=DEVICE) == 3, 90, targets)
        assert linear_logprob(hidden, weight, outside)[0].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.skipif(memory_gb() < 14, reason="needs a GPU of 14 GB")
def test_p22_offsets_of_the_kernels_pass_2_to_the_31():
    """A weight whose rows lie 2^30 numbers apart; and more logits than 2^31, of which no tensor may be made."""
    hidden, weight, targets = on_gpu(4, 16, 3, torch.float16)
    memory = torch.empty(2 ** 31 + 16, dtype=torch.float16, device=DEVICE)
    far_apart = memory.as_strided((3, 16), (2 ** 30, 1)).copy_(weight.detach()).requires_grad_()
    found = [linear_logprob(hidden.detach(), w, targets) for w in (weight, far_apart)]      # d hidden is cuBLAS's
    found = [(*out, torch.autograd.grad(out[0].sum() + out[1].sum(), w)[0])
             for out, w in zip(found, (weight, far_apart), strict=True)]
    assert max(relative_errors(*([x.detach().double() for x in out] for out in reversed(found)))) < 1e-5
    del memory, far_apart, found
    hidden, weight, targets = on_gpu(16384, 64, 151936, HALF)
    rows = [0, 8191, 14135, 14136, 16383]               # 14,136 x 151,936 is just above 2^31
    want = reference(hidden[rows], weight, targets[rows], 0.7)
    got = linear_logprob(hidden, weight, targets, 0.7)
    assert all((a[rows].double() - b).abs().max() <= 0.05 for a, b in zip(got, want, strict=True))
    slope = torch.zeros(16384, device=DEVICE).index_fill_(0, torch.tensor(rows, device=DEVICE), 1.0)
    grads = torch.autograd.grad((slope * got[0]).sum(), (hidden, weight))
    wanted = torch.autograd.grad(want[0].sum(), (hidden, weight))
    assert max(relative_errors([g.double() for g in grads], [g.double() for g in wanted])) < 0.02


def test_p42_the_kernels_give_the_same_bits_every_time():
    inputs = on_gpu(700, 64, 5000, HALF)
    first, second = (double_slopes(linear_logprob, *inputs, 0.7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rotary_positions_and_the_gate_are_their_definitions(dtype, activation):
    """In one kernel each."""
    bound, table = {torch.float32: 1e-6, torch.bfloat16: 3e-3}.get(dtype, 1e-3), torch.randn(50, 1, 128, device=DEVICE)
    assert elementwise.fused(table.to(dtype)) or not GPU
    native_tests.check(lambda x: elementwise.rotate(x, table), lambda x: elementwise.torch_rotate(x, table.double()),
                       dtype, native_tests.normal(50, 9, 128), device=DEVICE, bound=bound)
    native_tests.check(lambda g, u: elementwise.gated(g, u, activation),
                       lambda g, u: elementwise.torch_gated(g, u, activation), dtype,
                       native_tests.normal(70, 1300, scale=4), native_tests.normal(70, 1300, seed=1),
                       device=DEVICE, bound=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_adamw_takes_the_cpus_steps(dtype):
    start = [adamw_tests.normal(*shape, seed=i).to(dtype) for i, shape in enumerate([(50, 64), (3, 1025)])]
    here, there = ([w.clone().to(device) for w in start] for device in ("cpu", DEVICE))
    states = [adamw_tests.few_steps(weights).state for weights in (here, there)]
    for a, b, s, t, w in zip(here, there, *states, start, strict=True):
        a, b = master_of(a, s), master_of(b, t).cpu()
        assert (a - b).norm() < 1e-3 * (a - w.float()).norm()


@pytest.mark.skipif(memory_gb() < 14, reason="needs a GPU of 14 GB")
def test_p22_offsets_of_rotary_positions_and_the_gate_pass_2_to_the_31():
    """Rows that lie 2^30 numbers apart."""
    memory, table = torch.empty(2 ** 31 + 64, dtype=HALF, device=DEVICE), torch.randn(3, 1, 32, device=DEVICE)
    far_apart = memory.as_strided((3, 64), (2 ** 30, 1)).copy_(torch.randn(3, 64))
    near = far_apart.clone()
    for function in (lambda x: elementwise.rotate(x.unflatten(1, (2, 32)), table),
                     lambda x: elementwise.gated(x[:, :32], x[:, 32:], "silu")):
        assert torch.equal(function(far_apart), function(near))


@pytest.mark.skipif(memory_gb() < 60, reason="needs a GPU of 60 GB")
def test_adamw_steps_more_than_2_to_the_31_numbers():
    weight = torch.zeros(2 ** 31 + 64, dtype=HALF, device=DEVICE)
    adamw_tests.AdamW([weight]).step([torch.ones(weight.shape, device=DEVICE)], 1.0, 1.0)
    assert (weight == -1).all()


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def varlen(monkeypatch):
    """Skips where the varlen call is not taken; on a CPU a stand-in is, which makes no choice by the device."""
    if GPU and not attention.uses_varlen(torch.empty(1, 1, 64, dtype=HALF, device=DEVICE)):
        pytest.skip("needs an A100 or later, and torch 2.11 or flash-attn")
    if not GPU:
        use_torch_stand_in(monkeypatch)
        monkeypatch.setattr(attention, "uses_varlen", lambda q: q.dtype in (torch.bfloat16, torch.float16))


def attended(attend, q, k, v, prefix_kv=None) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v of a loss that weighs every number differently."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(0, *inputs, prefix_kv)
    slope = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [x.detach() for x in (out, *torch.autograd.grad(out, inputs, slope))]


@pytest.mark.parametrize("window", [0, 48])
@pytest.mark.parametrize("heads, kv_heads, D", [(9, 3, 64), (4, 4, 128), (4, 1, 256), (6, 2, 16)])
@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_p10_the_varlen_call_errs_no_more_than_twice_what_padded_matmuls_err(varlen, monkeypatch, dtype, heads,
                                                                             kv_heads, D, window):
    """Prefixes and completions of 1 to 300 tokens, shorter and longer than a tile; 40 share a prefix."""
    c = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_dim=D, attn_scale=0.7 * D ** -0.5,
                        windows=[window])
    attends = [PrefixAttention([200, 1, 33], [[5, 300, 1, 0, 129], [64] * 40, []], c, DEVICE) for _ in range(3)]
    half = [x.to(dtype) for x in heads_of(attends[0], c)]
    ours = attended(attends[0], *half)
    exact = attended(attends[1], *(x.double() for x in half))
    monkeypatch.setattr(attention, "uses_varlen", lambda q: False)
    plain = relative_errors([x.double() for x in attended(attends[2], *half)], exact)
    ours = relative_errors([x.double() for x in ours], exact)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, plain, strict=True)), (ours, plain)
    assert max(ours) <= {torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_p3_the_varlen_call_reads_cached_prefixes(varlen, dtype):
    c = SimpleNamespace(num_heads=9, num_kv_heads=3, head_dim=64, attn_scale=0.125, windows=[0, 20])
    attend, padded = (PrefixAttention([70, 0, 150], [[5, 40], [1], [200, 3, 17]], c, DEVICE, cached=True)
                      for _ in range(2))
    half = [x.to(dtype) for x in heads_of(attend, c)]
    prefix_kv = torch.randn(2, 3, 3, 150, 64, device=DEVICE).to(dtype)
    for layer in (0, 1):
        exact = padded(layer, *(x.double() for x in half), prefix_kv.double())
        (error,) = relative_errors([attend(layer, *half, prefix_kv).double()], [exact])
        assert error <= {torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]


def test_p42_the_varlen_call_gives_the_same_bits_where_torch_is_told_to(varlen):
    """Of sequences with many key tiles, whose dq is else added up in any order."""
    c = SimpleNamespace(num_heads=9, num_kv_heads=3, head_dim=64, attn_scale=0.125, windows=[0])
    attend = PrefixAttention([500, 300], [[700] * 4, [900, 30]], c, DEVICE)
    half = [x.to(HALF) for x in heads_of(attend, c)]
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (attended(attend, *half) for _ in range(5 if GPU else 2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# -- the attention of a decode step ------------------------------------------------------------------------------------


def to_gpu(step: decode_tests.Step) -> decode_tests.Step:
    pairs = (tuple(x.to(DEVICE) for x in pair) for pair in (step.row_kv, step.prefix_kv))
    return decode_tests.Step(*(x.to(DEVICE) for x in step[:3]), *pairs, Rows(*(x.to(DEVICE) for x in step.rows)))


def decode_error(step: decode_tests.Step, window: int = 0) -> float:
    """Of decode_attention against float64, as a share of what the dtype allows. A CPU's matmuls also round scores."""
    scale = step.q.shape[-1] ** -0.5
    error = decode_tests.relative_error(decode_attention(*to_gpu(step), scale, window),
                                        decode_tests.reference(step, scale, window))
    return error / decode_tests.BOUNDS[step.q.dtype] * (4 if GPU else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_decode_attention_equals_float64_for_head_sizes_groups_windows_and_splits(dtype):
    for window in (0, 1, 20, 60, 650, 1000):
        assert decode_error(decode_tests.sample(**decode_tests.MIXED, dtype=dtype), window) < 1
        assert decode_error(decode_tests.long_step(dtype), window) < 1
    for D in (64, 80, 96, 128, 256):
        for heads in ((3, 3), (6, 2), (4, 1), (7, 1), (16, 2), (20, 1)):
            assert decode_error(decode_tests.sample([0, 1], [37, 40], [40, 0], heads, D, dtype, entries=2)) < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_decode_attention_equals_float64_at_the_size_of_qwen3_with_256_rows(dtype):
    """32 prompts of 200 to 300 tokens, 8 rows of each, up to 511 tokens a row; 16 heads, 8 kv heads of 128."""
    most, generator = 511 if GPU else 20, torch.Generator().manual_seed(1)
    prefixes = [row // 8 for row in range(256)]
    prompts = torch.randint(200, 301, (32,), generator=generator)[prefixes].tolist()
    lengths = torch.randint(most + 1, (256,), generator=generator).tolist()
    step = decode_tests.sample(prefixes, prompts, lengths, (16, 8), 128, dtype, (300, most + 1), entries=32)
    assert decode_error(step) < 1
    assert torch.equal(*(decode_attention(*to_gpu(step), 0.1) for _ in range(2)))       # P42


@pytest.mark.parametrize("window", [0, 25])
@pytest.mark.parametrize("few", [False, True], ids=["whole", "split"])
def test_p35_a_cuda_graph_of_decode_attention_replays_with_other_lengths_and_prefixes(few, window):
    if few:
        shapes = dict(dtype=HALF, entries=2, capacities=(900, 1200))
        steps = [([1, 0, 0], [700, 0, 900], [0, 1100, 640]), ([0, 1, 1], [5, 900, 900], [1199, 3, 0]),
                 ([0, 0, 1], [0, 0, 1], [1, 0, 700])]
    else:
        shapes = dict(dtype=HALF)
        steps = [tuple(decode_tests.MIXED.values()), ([0, 0, 0, 2, 2, 1], [9, 9, 9, 40, 40, 0], [47, 1, 0, 0, 12, 30]),
                 ([1] * 6, [0] * 6, [0] * 6)]
    steps = [decode_tests.sample(*step, **shapes) for step in steps]
    memory, out = to_gpu(steps[0]), torch.empty_like(steps[0].q, device=DEVICE)

    def run_step():
        out.copy_(decode_attention(*memory, 0.2, window))

    run_step()                                          # compiles
    replay = run_step
    if GPU:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_step()
        replay = graph.replay
    for step in (*steps[1:], steps[0]):
        expected, there = decode_tests.reference(step, 0.2, window), to_gpu(step)
        for old, new in zip((*memory[:3], *memory.row_kv, *memory.prefix_kv, *memory.rows),
                            (*there[:3], *there.row_kv, *there.prefix_kv, *there.rows), strict=True):
            old.copy_(new)
        replay()
        assert decode_tests.relative_error(out, expected) < decode_tests.BOUNDS[HALF]
        for cache, new in zip(memory.row_kv, memory[1:3], strict=True):
            at = enumerate(zip(step.rows.entries.tolist(), step.rows.lengths.tolist(), strict=True))
            assert all(torch.equal(cache[entry, :, length], new[b]) for b, (entry, length) in at)


# -- the forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_p3_packed_and_prompt_shared_forwards_equal_the_cpus_padded_one_in_fp32(family, dtype):
    ours, _, folder = family
    groups = groups_of()
    with torch.no_grad():
        single = [completion_logprobs(ours, pack([(p, [c])], ours))[0] for p, cs in groups for c in cs]
        shared, model = torch.cat(single), loaded(folder, dtype)
        for batch in (groups, [(p, [c]) for p, cs in groups for c in cs]):
            error = (completion_logprobs(model, pack(batch, model))[0].cpu() - shared).abs()
            assert error.mean() <= CLOSE[dtype] and error.max() <= 10 * CLOSE[dtype]


def test_p10_gradients_of_every_parameter_equal_the_cpus(family):
    ours, _, folder = family
    there, groups = loaded(folder), groups_of()
    for model in (ours, there):
        model.zero_grad()
        logprobs = completion_logprobs(model, pack(groups, model))[0]
        (logprobs * torch.linspace(-1, 1, len(logprobs), device=model.device)).sum().backward()
    for (key, p), q in zip(ours.named_parameters(), there.parameters(), strict=True):
        assert (p.grad - q.grad.cpu()).norm() <= 1e-4 * p.grad.norm(), key


@torch.no_grad()
def test_greedy_tokens_equal_transformers_in_every_family(family, request):
    _, reference_model, folder = family
    kind = request.node.callspec.params["family"]
    model, theirs = loaded(folder), make_reference(kind).to(DEVICE)
    prompts = [random_ids(n, n) for n in (5, 23)]
    params = SamplingParams(max_tokens=48, temperature=0)
    done = sorted(generate(stopping(model), prompts, params), key=lambda c: c.index)
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        out = theirs.generate(ids, max_new_tokens=48, min_new_tokens=48, do_sample=False, eos_token_id=None)
        assert completion.tokens == out[0, len(prompt):].tolist()


# -- the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", [1, 3])
def test_p14_sampler_and_trainer_agree_in_every_family_and_dtype(family, dtype, n):
    model = loaded(family[2], dtype)
    prompts = random_prompts(6, seed=4, low=12) + [[7] * 10 + p for p in random_prompts(3, seed=5, low=5)]
    found = generate(stopping(model), prompts, SamplingParams(n, 20, 0.6), slots=5)
    done = {(c.index, c.sample): c for c in found}
    mine = torch.tensor([x for i in range(len(prompts)) for j in range(n) for x in done[i, j].logprobs])
    error = (trainer_logprobs(model, prompts, done, n, 0.6).cpu() - mine).abs()
    assert error.mean() <= 2 * CLOSE[dtype] and not any(c.error for c in done.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_p35_128_prompts_of_many_lengths_through_few_slots_decode_as_they_do_alone(tiny_folder, dtype):
    """Rows leave at random times and others take their place. In half precision a sample may turn where two tokens are
    nearly alike, so there the log-probs are compared with the trainer's."""
    model, prompts = loaded(tiny_folder, dtype), random_prompts(128, seed=7, high=120)
    model, params = stopping(model, range(3, 9)), SamplingParams(max_tokens=40, seed=3)
    crowd = {(c.index, c.sample): c for c in generate(model, prompts, params, slots=16)}
    assert len(crowd) == 128 and not any(c.error for c in crowd.values())
    assert 20 < len({len(c.tokens) for c in crowd.values()})
    if dtype == torch.float32:
        for i in range(0, 128, 9):
            (alone,) = generate(model, prompts[i:i + 1], params, keys=[i])
            assert alone.tokens == crowd[i, 0].tokens
    theirs = trainer_logprobs(model, prompts, crowd, 1, 1.0).cpu()
    error = (theirs - torch.tensor([x for i in range(128) for x in crowd[i, 0].logprobs])).abs()
    assert error.isfinite().all() and error.mean() <= CLOSE[dtype]


def test_p35_cuda_graphs_give_the_same_tokens(tiny_folder):
    model, found = loaded(tiny_folder, HALF), []
    model, params = stopping(model, range(3, 9)), SamplingParams(2, max_tokens=40, temperature=0)
    for on in (False, True):
        done = Sampler(model, 16, on).generate(random_prompts(128, seed=7, high=120), params)
        found.append({(c.index, c.sample): c.tokens for c in done})
    assert found[0] == found[1]


# -- training, resuming, evaluating ------------------------------------------------------------------------------------


def run(folder, out, *more) -> list[dict]:
    assert train.main(["--model", str(folder), "--out", str(out), *FAST, *REWARD, *more]) == 0
    return metrics(out)


@pytest.mark.parametrize("more", [[], ["--kl-coef", "0.1", "--entropy-coef", "0.01"], ["--mix", "rollout"],
                                  ["--anchor-coef", "0.5", "--anchor-answers", "6"], ["--recompute"]], ids=" ".join)
def test_a_training_step_is_the_cpus(tiny_folder, tmp_path, more):
    there = run(tiny_folder, tmp_path / "there", "--steps", "2", *more)
    here = run(tiny_folder, tmp_path / "here", "--steps", "2", "--device", "cpu", *more)
    for a, b in zip(there, here, strict=True):
        assert a["reward"] == b["reward"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for key, tensor in tensors(tmp_path / "there").items():
        # AdamW's first steps are signs: where a gradient is noise around 0, a weight may go the other way
        assert ((tensor - tensors(tmp_path / "here")[key]).abs() > 1e-4).float().mean() <= 0.01, key


@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_training_in_half_precision_follows_fp32(tiny_folder, tmp_path, dtype):
    half = run(tiny_folder, tmp_path / "half", "--dtype", name(dtype), "--steps", "1")
    full = run(tiny_folder, tmp_path / "full", "--steps", "1")
    assert half[0]["grad_norm"] == pytest.approx(full[0]["grad_norm"], rel=0.1)
    assert half[0]["sampler_trainer_gap"] <= CLOSE[dtype] and half[0]["skipped_steps"] == 0


@pytest.mark.parametrize("more", [[], ["--dtype", name(HALF)], ["--async-save"], ["--overlap", "--save-every", "2"],
                                  ["--loss", "gspo", "--inner-epochs", "2"]], ids=" ".join)
def test_p20_a_resumed_run_is_the_same_run(tiny_folder, tmp_path, more):
    whole = run(tiny_folder, tmp_path / "whole", *more)
    run(tiny_folder, tmp_path / "two", *more, "--steps", "2")
    assert train.main(["--resume", str(tmp_path / "two"), "--steps", "4"]) == 0
    assert metrics(tmp_path / "two") == whole and same(tensors(tmp_path / "two"), tensors(tmp_path / "whole"))


def test_p28_memory_does_not_grow(tiny_folder, tmp_path, monkeypatch):
    peaks, record = [], monitor.record

    def watch(*args):
        peaks.append(torch.cuda.max_memory_allocated() if GPU else 0)       # of this step alone
        record(*args)
        if GPU:
            torch.cuda.reset_peak_memory_stats()

    monkeypatch.setattr(monitor, "record", watch)
    run(tiny_folder, tmp_path / "run", "--steps", "12")
    assert max(peaks[8:]) <= 1.05 * max(peaks[2:6])


def test_two_gpus_take_the_same_step_as_one(tiny_folder, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    one = run(tiny_folder, tmp_path / "one", "--steps", "1", "--prompts", "4")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
               "--model", str(tiny_folder), "--out", str(tmp_path / "two"), *FAST, *REWARD, "--steps", "1",
               "--prompts", "4"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    two = metrics(tmp_path / "two")
    assert one[0]["reward"] == two[0]["reward"]
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-4)


def test_device_cpu_leaves_the_gpu_alone_and_auto_takes_it(tiny_folder, tmp_path):
    if GPU:
        assert weights.load(str(tiny_folder))[0].device == torch.device(DEVICE)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    evaluated = "--eval-problems", "2", "--eval-personas", "1"
    run(tiny_folder, tmp_path / "run", "--device", "cpu", "--steps", "1", *evaluated)
    assert not GPU or torch.cuda.max_memory_allocated() == before


def test_evaluation_with_fidelity_and_a_judge_runs_on_the_gpu(tiny_folder, tmp_path, monkeypatch):
    devices, load = [], weights.load
    monkeypatch.setattr(weights, "load", lambda *args: devices.append(load(*args)) or devices[-1])
    sheet = tmp_path / "gym.jsonl"
    sheet.write_text("\n".join(json.dumps({"persona": f"w{i}", "questions": dict.fromkeys(
        evaluate.judge.TASKS, ["w5 w6?"])}) for i in (10, 20)))
    assert evaluate.main(["--model", str(tiny_folder), "--limit", "3", "--max-new-tokens", "5", "--fidelity", "2",
                          "--personagym", str(sheet), "--judge-model", str(tiny_folder), "--out",
                          str(tmp_path / "out")]) == 0
    assert {model.device for model, _ in devices} == {torch.device(DEVICE)} and len(devices) == 2


def test_a_clock_waits_for_what_the_gpu_still_does():
    x = torch.randn(2048, 2048, device=DEVICE)
    watch = SimpleNamespace(seconds={}, first=0, policy=SimpleNamespace(model=x))
    for phase in ("warm", "timed"):
        with monitor.Monitor.phase(watch, phase):
            for _ in range(10 if phase == "warm" else 50):
                y = x @ x
    start = time.perf_counter()
    float(y[0, 0])                                      # nothing is left to wait for
    assert time.perf_counter() - start < 0.5 * watch.seconds["timed"]
