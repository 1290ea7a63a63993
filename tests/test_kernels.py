"""The fused linear log-prob against plain torch: values, gradients, precision, edges (pitfall P22).

Triton's kernels run here in Triton's interpreter, which must be chosen before triton is imported: the tests named
test_p22_triton_... run in a second pytest that the first one starts. Real compilation, without a GPU, is tested
beside them.
"""

import itertools
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_logprob

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the second pytest, with TRITON_INTERPRET=1")
outside = pytest.mark.skipif(INTERPRETED, reason="runs in the first pytest")
HALF = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def reference(hidden, weight, targets, temperature=1.0, softcap=None, dtype=torch.float64):
    """Both outputs with every logit in memory, through autograd; the softmax in at least fp32."""
    logits = F.linear(hidden.to(dtype), weight.to(dtype)).to(torch.promote_types(dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = F.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, targets[:, None].long())[:, 0], -(logp.exp() * logp).sum(1)


def sample(n, hidden_size, vocab, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, hidden_size, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab, hidden_size, generator=generator, dtype=torch.float64) * hidden_size**-0.5
    targets = torch.randint(vocab, (n,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def outputs_and_gradients(function, hidden, weight, targets, *args, entropy=True, **kwargs):
    """(logprobs, entropy, d hidden, d weight) in float64, for incoming gradients that differ from token to token."""
    logprobs, ent = function(hidden, weight, targets, *args, **kwargs)
    slope = torch.linspace(-1.0, 2.0, len(targets), dtype=torch.float64)
    loss = (slope * logprobs).sum() + ((slope.flip(0) * ent).sum() if entropy else 0.0)
    results = logprobs, ent, *torch.autograd.grad(loss, (hidden, weight))
    return [result.detach().double() for result in results]


def relative_errors(results, expected):
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(results, expected, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# torch

@outside
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("memory_budget", [0, 2**20])
def test_p22_gradients_of_both_outputs_pass_gradcheck_chunked_or_kept(temperature, softcap, memory_budget):
    hidden, weight, targets = sample(4, 3, 97)  # a budget of 0: one token, or 64 columns, at a time
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, targets, temperature, softcap, memory_budget), (hidden, weight))


@outside
@pytest.mark.parametrize("which", [0, 1])
def test_p22_either_output_alone_gives_the_gradients_of_autograd(which):
    hidden, weight, targets = sample(7, 5, 130)
    ours = torch.autograd.grad(linear_logprob(hidden, weight, targets)[which].sum(), (hidden, weight))
    expected = torch.autograd.grad(reference(hidden, weight, targets)[which].sum(), (hidden, weight))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@outside
def test_p22_each_input_alone_gets_its_gradient():
    hidden, weight, targets = sample(7, 5, 130)
    both = torch.autograd.grad(linear_logprob(hidden, weight, targets)[0].sum(), (hidden, weight))
    only_hidden, = torch.autograd.grad(linear_logprob(hidden, weight.detach(), targets)[0].sum(), (hidden,))
    only_weight, = torch.autograd.grad(linear_logprob(hidden.detach(), weight, targets)[0].sum(), (weight,))
    assert torch.equal(only_hidden, both[0]) and torch.equal(only_weight, both[1])


@outside
@pytest.mark.parametrize("memory_budget", [2**16, 2**24])
@pytest.mark.parametrize("dtype", list(HALF))
def test_p22_errors_stay_within_twice_those_of_plain_torch_in_the_same_dtype(dtype, memory_budget):
    hidden, weight, targets = sample(300, 64, 1000, dtype, scale=3.0)
    expected = outputs_and_gradients(reference, hidden, weight, targets, 0.7)
    plain = relative_errors(outputs_and_gradients(reference, hidden, weight, targets, 0.7, dtype=dtype), expected)
    ours = relative_errors(outputs_and_gradients(
        linear_logprob, hidden, weight, targets, 0.7, memory_budget=memory_budget), expected)
    assert all(a <= 2 * b + 1e-7 for a, b in zip(ours, plain, strict=True)), (ours, plain)


@outside
def test_p22_d_hidden_is_summed_in_fp32_over_many_chunks():
    hidden, weight, targets = sample(20, 64, 8000, torch.bfloat16)
    whole, chunked = (outputs_and_gradients(linear_logprob, hidden, weight, targets, memory_budget=budget)[2]
                      for budget in (2**24, 0))
    assert (chunked - whole).norm() <= 0.004 * whole.norm()


@outside
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p14_logprobs_have_the_very_bits_of_logsumexp_over_the_whole_row(dtype, temperature):
    hidden, weight, targets = sample(65, 64, 50000, dtype, scale=3.0)
    with torch.no_grad():
        logits = F.linear(hidden, weight).float() / temperature
        expected = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
        assert torch.equal(linear_logprob(hidden, weight, targets, temperature)[0], expected)


@outside
def test_without_gradients_the_values_are_the_same_and_no_graph_is_kept():
    hidden, weight, targets = sample(9, 8, 100, torch.float32)
    with_graph = linear_logprob(hidden, weight, targets)
    with torch.no_grad():
        without = linear_logprob(hidden, weight, targets)
    assert all(a.grad_fn is not None and b.grad_fn is None and torch.equal(a, b)
               for a, b in zip(with_graph, without, strict=True))


@outside
def test_backward_can_run_twice_and_a_zero_entropy_gradient_changes_nothing():
    hidden, weight, targets = sample(9, 8, 100, torch.bfloat16)
    logprobs, entropy = linear_logprob(hidden, weight, targets)
    first = torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logprobs.sum() + 0.0 * entropy.sum(), (hidden, weight))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@outside
@pytest.mark.parametrize("message, change", [
    ("hidden", dict(hidden=torch.zeros(3, 5))), ("hidden", dict(weight=torch.zeros(9, 4, 1))),
    ("dtype", dict(weight=torch.zeros(9, 4, dtype=torch.bfloat16))), ("targets", dict(targets=torch.zeros(2).long())),
    ("targets", dict(targets=torch.tensor([0, 9, 1]))), ("targets", dict(targets=torch.tensor([0, -1, 1]))),
    ("targets", dict(targets=torch.zeros(3))), ("temperature", dict(temperature=0.0)), ("softcap", dict(softcap=-1.0))])
def test_p22_inputs_that_do_not_fit_are_refused_with_their_name(message, change):
    inputs = dict(hidden=torch.zeros(3, 4), weight=torch.zeros(9, 4), targets=torch.zeros(3).long()) | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**inputs)


# ----------------------------------------------------------------------------------------------------------------------
# both paths: the torch path in the first pytest, Triton's interpreter in the second

def path():
    if not INTERPRETED:
        return linear_logprob
    from kernels.triton_linear_logprob import triton_linear_logprob
    return triton_linear_logprob


def close_to_reference(hidden, weight, targets, *args, tolerance=1e-5):
    expected = outputs_and_gradients(reference, hidden, weight, targets, *args)
    errors = relative_errors(outputs_and_gradients(path(), hidden, weight, targets, *args), expected)
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("n, hidden_size, vocab", [(1, 16, 32), (16, 32, 64), (17, 33, 65), (5, 7, 31), (33, 40, 301)])
def test_p22_both_paths_handle_tails_of_tokens_features_and_vocabulary(n, hidden_size, vocab):
    close_to_reference(*sample(n, hidden_size, vocab, torch.float32), 0.7)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", list(HALF))
def test_p22_both_paths_handle_every_dtype_with_and_without_softcap(dtype, softcap):
    close_to_reference(*sample(20, 24, 100, dtype), 1.3, softcap, tolerance=HALF[dtype])


def test_p22_both_paths_find_targets_at_the_edges_of_blocks():
    hidden, weight, _ = sample(10, 16, 1100, torch.float32)
    close_to_reference(hidden, weight, torch.tensor([0, 63, 64, 65, 767, 768, 1023, 1024, 1098, 1099]))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_p22_both_paths_survive_extreme_logits(size):
    hidden, weight = torch.zeros(4, 16, requires_grad=True), torch.zeros(70, 16, requires_grad=True)
    with torch.no_grad():  # logits: `size` at word 65, 0 elsewhere, so that p is 1 there or spread over all the others
        hidden[:, 0], weight[65, 0] = 1.0, size
    results = outputs_and_gradients(path(), hidden, weight, torch.tensor([65, 0, 64, 69]))
    expected = outputs_and_gradients(reference, hidden, weight, torch.tensor([65, 0, 64, 69]))
    assert all(torch.isfinite(result).all() for result in results)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-3) for a, b in zip(results, expected, strict=True))


def test_p22_both_paths_take_inputs_of_any_strides():
    hidden, weight, targets = sample(12, 20, 90, torch.float32)
    expected = outputs_and_gradients(path(), hidden, weight, targets)
    hidden, weight = (x.detach().repeat_interleave(2, 1).t().contiguous().t()[:, ::2].requires_grad_()
                      for x in (hidden, weight))
    strided = torch.stack((targets, targets), 1)[:, 1]
    assert not (hidden.is_contiguous() or weight.is_contiguous() or strided.is_contiguous())
    errors = relative_errors(outputs_and_gradients(path(), hidden, weight, strided), expected)
    assert max(errors) < 1e-6, errors


def test_p22_both_paths_answer_no_tokens_with_no_logprobs_and_zero_gradients():
    hidden, weight, targets = sample(0, 16, 64, torch.bfloat16)
    logprobs, entropy, grad_hidden, grad_weight = outputs_and_gradients(path(), hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,) and grad_hidden.shape == (0, 16) and not grad_weight.any()


def test_p22_both_paths_take_targets_of_32_bits():
    hidden, weight, targets = sample(6, 16, 64, torch.float32)
    assert torch.equal(path()(hidden, weight, targets.int())[0], path()(hidden, weight, targets)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Triton

@in_interpreter
@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize("entropy", [True, False])
def test_p22_triton_errors_stay_within_twice_those_of_plain_torch_in_the_same_dtype(dtype, entropy):
    hidden, weight, targets = sample(20, 32, 1100, dtype, scale=3.0)  # 1,100 words: two splits of the vocabulary
    expected = outputs_and_gradients(reference, hidden, weight, targets, 0.7, entropy=entropy)
    plain = outputs_and_gradients(reference, hidden, weight, targets, 0.7, dtype=dtype, entropy=entropy)
    ours = outputs_and_gradients(path(), hidden, weight, targets, 0.7, entropy=entropy)
    plain, ours = relative_errors(plain, expected), relative_errors(ours, expected)
    assert all(a <= 2 * b + 1e-7 for a, b in zip(ours, plain, strict=True)), (ours, plain)


@in_interpreter
def test_p22_triton_agrees_with_torch_to_the_last_bits_of_fp32():
    hidden, weight, targets = sample(20, 32, 1100, torch.bfloat16, scale=3.0)
    expected = outputs_and_gradients(linear_logprob, hidden, weight, targets, 0.7, 5.0)
    assert max(relative_errors(outputs_and_gradients(path(), hidden, weight, targets, 0.7, 5.0), expected)) < 1e-3


@in_interpreter
def test_p22_triton_backward_in_many_chunks_equals_one(monkeypatch):
    from kernels import triton_linear_logprob as module
    hidden, weight, targets = sample(20, 16, 1100, torch.float32)
    whole = outputs_and_gradients(path(), hidden, weight, targets)
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)  # 256 columns at a time
    assert max(relative_errors(outputs_and_gradients(path(), hidden, weight, targets), whole)) < 1e-6


@in_interpreter
def test_p22_triton_answers_nan_for_a_target_outside_the_vocabulary():
    hidden, weight, _ = sample(3, 16, 64, torch.float32)
    logprobs, _ = path()(hidden, weight, torch.tensor([64, 5, -100]))
    assert logprobs.isnan().tolist() == [True, False, True]


@in_interpreter
def test_p22_triton_offsets_pass_2_to_the_31():
    hidden, weight, targets = sample(4, 16, 3, torch.float16)
    expected = outputs_and_gradients(path(), hidden, weight, targets)
    addresses = torch.empty(2**31 + 16, dtype=torch.float16)  # 4 GB of them; only pages touched take memory
    far_apart = addresses.as_strided((3, 16), (2**30, 1)).copy_(weight.detach()).requires_grad_()
    assert max(relative_errors(outputs_and_gradients(path(), hidden, far_apart, targets), expected)) < 1e-6


def in_interpreter_pass(*nodes: str) -> None:
    """Runs these files or tests in a second pytest, in which Triton's kernels are interpreted."""
    pytest.importorskip("triton")
    if release("triton") < [3, 7] and release("numpy") >= [2, 4]:
        pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4: it takes arrays for numbers")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[1], env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.slow
@outside
def test_p22_triton_kernels_pass_these_tests_in_the_interpreter():
    in_interpreter_pass(__file__)


def release(package):
    return [int(part) for part in version(package).split(".")[:2]]


SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB that one program may use


@pytest.mark.slow
@outside
@pytest.mark.parametrize("chip", list(SHARED_LIMIT))
def test_p22_triton_kernels_compile_ahead_of_time_without_spills(chip):
    ahead = pytest.importorskip("benchmarks.compile_kernels", exc_type=ImportError)
    for kernel, dtype in itertools.product((ahead.forward_kernel, ahead.backward_kernel), ("bf16", "fp32")):
        tile = ahead.tile(kernel, dtype != "fp32", chip)
        registers, spilled, shared = ahead.resources(ahead.compile_kernel(kernel, chip, dtype, tile))
        assert spilled == 0 and shared <= SHARED_LIMIT[chip] * 1024 and 0 < registers <= 256, (kernel, dtype, tile)
