"""The decoder against transformers and against itself: packed, padded, prompt-shared, cached."""

import copy
import gc
import importlib
import inspect
import itertools
import math
import re
import sys
import weakref
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

import model as model_module
import personas
import tasks
import weights
from kernels import attention, native
from kernels.decode_attention import torch_decode_attention
from kernels.moves import embed
from model import Transformer, chunks, completion_logprobs, pack
from rollout import Sampler, SamplingParams, generate
from sampling import cache
from sampling.graphs import Graphs
from tests.conftest import stopping
from weights import parity


def logits_of(model, ids: list[int]) -> torch.Tensor:
    packed = pack([(ids, [])], model)
    return model.logits(model(packed.input_ids, packed.position_ids, packed.attend))


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 99, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def groups_of(seed: int = 0):
    """Three groups of unlike sizes; completions of length 0, 1 and more."""
    sizes = [(9, [5, 1, 8]), (3, [0, 4]), (14, [7])]
    return [(random_ids(p, seed + i), [random_ids(c, seed + 10 * i + j) for j, c in enumerate(cs)])
            for i, (p, cs) in enumerate(sizes)]


# -- against transformers ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_transformers(family):
    ours, reference, _ = family
    ids = random_ids(40)
    assert (logits_of(ours, ids) - reference(torch.tensor([ids])).logits[0]).abs().max() <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_greedy_continuation_equals_transformers(family):
    """Quick are its two halves: equal logits above, and p3 in test_rollout.py, cached decoding against a forward."""
    ours, reference, _ = family
    prompts = [random_ids(n, n) for n in (5, 23)]
    params = SamplingParams(max_tokens=64, temperature=0)
    done = sorted(generate(stopping(ours), prompts, params), key=lambda c: c.index)
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None)
        assert completion.tokens == theirs[0, len(prompt):].tolist()


def test_gradients_of_every_parameter_equal_transformers(family):
    ours, reference, _ = family
    prompt, completion = random_ids(12), random_ids(20, 1)
    ours.zero_grad()
    completion_logprobs(ours, pack([(prompt, [completion])], ours))[0].mean().backward()
    reference.zero_grad()
    ids = torch.tensor([prompt + completion])
    logprobs = reference(ids).logits[0, len(prompt) - 1:-1].log_softmax(-1)
    logprobs[torch.arange(20), torch.tensor(completion)].mean().backward()
    theirs = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for name, p in ours.named_parameters():
        assert (p.grad - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


@torch.no_grad()
def test_a_saved_folder_is_the_same_model_to_transformers(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, reference, folder = family
    weights.save(ours, AutoTokenizer.from_pretrained(folder), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([random_ids(30)])
    assert torch.equal(again(ids).logits, type(again).from_pretrained(folder, dtype=torch.float32)(ids).logits)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
@torch.no_grad()
def test_the_embedded_models_greedy_tokens_equal_transformers(embedded, tmp_path, count=8, length=40):
    """In fp32 on the same dequantised weights; transformers decodes one left-padded batch. The slowest test here, so it
    is kept short: count=20 and length=64, run once by hand, gave 1,280 equal tokens of 1,280."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = embedded
    weights.save(model, tokenizer, tmp_path / "smol")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "smol", dtype=torch.float32)
    problems, speakers = tasks.load("arithmetic", limit=count), [None, *personas.load("test")]
    prompts = [personas.prompt_ids(tokenizer, problem.question, speakers[i % len(speakers)])
               for i, problem in enumerate(problems)]
    assert (logits_of(model, prompts[0]) - reference(torch.tensor(prompts[:1])).logits[0]).abs().max() <= 1e-3
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    theirs = reference.generate(ids, attention_mask=seen, max_new_tokens=length, min_new_tokens=length, do_sample=False,
                                eos_token_id=None, pad_token_id=2)[:, longest:].tolist()
    params = SamplingParams(max_tokens=length, temperature=0)
    done = sorted(generate(stopping(model), prompts, params), key=lambda c: c.index)
    assert len(prompts) == count and [c.tokens for c in done] == theirs


# -- against itself --------------------------------------------------------------------------------------------------


def test_p1_a_label_moves_only_its_own_logprob(tiny):
    model = tiny[0].double()
    try:
        prompt, completion = random_ids(6), random_ids(5, 1)
        before = completion_logprobs(model, pack([(prompt, [completion])], model))[0]
        whole = logits_of(model, prompt + completion).log_softmax(-1)
        at = torch.arange(5, 10)
        assert torch.allclose(before.double(), whole[at, torch.tensor(completion)].double(), atol=1e-6)
        changed = completion[:-1] + [completion[-1] % 90 + 5]
        after = completion_logprobs(model, pack([(prompt, [changed])], model))[0]
        assert torch.equal(before[:-1], after[:-1]) and before[-1] != after[-1]
    finally:
        model.float()


def test_p3_packed_padded_shared_and_single_forwards_agree(family):
    ours, reference, _ = family
    groups = groups_of()
    shared = completion_logprobs(ours, pack(groups, ours))[0]
    plain = completion_logprobs(ours, pack([(p, [c]) for p, cs in groups for c in cs], ours))[0]
    single = [completion_logprobs(ours, pack([(p, [c])], ours))[0] for p, cs in groups for c in cs]
    assert (shared - plain).abs().max() <= 1e-5 and (shared - torch.cat(single)).abs().max() <= 1e-5
    start = 0
    for prompt, completion in ((p, c) for p, cs in groups for c in cs if c):
        left = 32 - len(prompt) - len(completion)       # transformers, left padded with junk
        ids = torch.tensor([[50] * left + prompt + completion])
        seen = torch.tensor([[0] * left + [1] * (32 - left)])
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        logits = reference(ids, attention_mask=seen, position_ids=positions).logits[0, left + len(prompt) - 1:-1]
        theirs = logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]
        assert (shared[start:start + len(completion)] - theirs).abs().max() <= 1e-5
        start += len(completion)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_p10_gradients_of_shared_prompts_equal_those_of_the_plain_batch(family, dtype, close):
    model, groups = copy.deepcopy(family[0]).to(dtype), groups_of()
    if dtype == torch.float32 and (model.c.delta_layers or not model.c.pre_norm):
        pytest.skip("fp32 rounds to 1.2e-6 or 1.5e-6 here")
    weight = torch.randn(sum(len(c) for _, cs in groups for c in cs), generator=torch.Generator().manual_seed(0))

    def gradients(batches):
        model.zero_grad()
        logprobs = torch.cat([completion_logprobs(model, pack(batch, model))[0] for batch in batches])
        (logprobs * weight).sum().backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    shared = gradients([groups])
    for other in ([[(p, [c]) for p, cs in groups for c in cs]], [[group] for group in groups],
                  [[(p, [c])] for p, cs in groups for c in cs]):
        assert (gradients(other) - shared).norm() <= close * shared.norm()


def test_p17_sequences_of_a_pack_do_not_see_each_other(tiny):
    model = tiny[0]
    groups = groups_of()
    before = completion_logprobs(model, pack(groups, model))[0]
    (prompt, (first, *others)), *rest = groups
    changed = [(prompt, [[t % 90 + 4 for t in first], *others]), *rest]
    after = completion_logprobs(model, pack(changed, model))[0]
    assert torch.equal(before[len(first):], after[len(first):]), \
        "changing one completion moved another: look at the order of input_ids and of hidden_index"
    assert not torch.equal(before[:len(first)], after[:len(first)])


def test_recomputing_layers_changes_no_gradient(tiny):
    model, packed = tiny[0], pack(groups_of(), tiny[0])
    found = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        completion_logprobs(model, packed)[0].sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    model.checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_prompt_is_forwarded_once_for_its_completions(tiny):
    prompt, completions = random_ids(120), [random_ids(40, i) for i in range(8)]
    packed = pack([(prompt, completions)], tiny[0])
    assert len(packed.input_ids) == 120 + 8 * 39        # a completion's last token is only ever a target
    assert packed.lengths == [40] * 8
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        pack([([], [[5]])], tiny[0])


def test_llama3_scaling_keeps_short_and_slows_long_wavelengths():
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    plain = model_module.inverse_frequencies(64, {"rope_theta": 10000.0})
    scaled = model_module.inverse_frequencies(64, rope)
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 16], plain[wavelength < 16])
    assert torch.allclose(scaled[wavelength > 64], plain[wavelength > 64] / 8)


def test_small_batch_weights_give_the_same_output_and_are_gone_afterwards(tiny):
    model = Transformer(tiny[0].c).to(torch.bfloat16)
    ids = random_ids(20)
    with torch.no_grad():
        before = logits_of(model, ids)
        with model.reordered_weights(model.reorder()):
            inside = logits_of(model, ids)
        after = logits_of(model, ids)
    assert torch.equal(before, after) and not model.reordered
    assert (inside - before).abs().max() <= 0.05 * before.abs().max()


def test_small_batch_weights_are_gone_after_an_exception_and_after_a_generation_closed_early(tiny):
    model = Transformer(tiny[0].c).to(torch.bfloat16).eval()
    with pytest.raises(RuntimeError), model.reordered_weights({"head": None}):
        raise RuntimeError
    assert not model.reordered
    for end in ("close", "throw"):
        tokens = generate(model, [[3, 4], [5, 6]], SamplingParams(max_tokens=4))
        next(tokens)
        assert not model.reordered                      # nor while it waits
        with suppress(RuntimeError):
            tokens.close() if end == "close" else tokens.throw(RuntimeError)
        assert not model.reordered


@pytest.mark.parametrize("limit", [1, 7, 10, 100])
def test_chunks_hold_every_item_once_in_order_and_only_a_longer_item_passes_the_limit(limit):
    sizes = [3, 4, 1, 9, 2, 5, 5, 0, 6]
    found = list(chunks(sizes, limit))
    assert [i for first, last in found for i in range(first, last)] == list(range(9)) and list(chunks([], limit)) == []
    for (first, last), (_, after) in zip(found, [*found[1:], (0, 0)], strict=True):
        assert sum(sizes[first:last]) <= limit or last - first == 1 or not sum(sizes[first + 1:last])
        assert not after or sum(sizes[first:last + 1]) > limit          # and none could have been longer


# -- padding -----------------------------------------------------------------------------------------------------------


def heads_of(attend, c, dtype=torch.float64) -> list[torch.Tensor]:
    """Random q, k and v of a layer, packed as attend wants them."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(len(attend.position_ids), heads, c.head_dim, generator=random, dtype=dtype)
            .to(attend.device).requires_grad_() for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]


@pytest.mark.parametrize("cached", [False, True])
def test_groups_of_unlike_sizes_are_not_padded_to_each_other(tiny, monkeypatch, cached):
    """60 lone prompts and 29 behind one opening, in prefill; and prompts with completions, of which one has 29."""
    c, plain, computed = tiny[0].c, attention.attention, []
    groups = [(0 if cached else 50, [40 + 7 * i % 90]) for i in range(60)]
    groups.insert(31, (30, [5 + i % 20 for i in range(29)]))
    prefix_kv = torch.randn(2, len(groups), c.num_kv_heads, 30, c.head_dim, dtype=torch.float64) if cached else None

    def counted(q, k, v, mask, *prefix):
        computed.append(q.shape[0] * q.shape[2] * q.shape[4] * mask.shape[-1])              # B, n, C, P + T
        return plain(q, k, v, mask, *prefix)

    def run(groups, inputs=None, prefix_kv=None):
        attend = attention.PrefixAttention(*map(list, zip(*groups, strict=True)), c, "cpu", cached)
        inputs = inputs or heads_of(attend, c)
        out = attend(0, *inputs, prefix_kv)
        return inputs, [out, *torch.autograd.grad((out * out.detach().cos()).sum(), inputs)]

    def of_each_group(x):
        prefixes, rows = [0 if cached else P for P, _ in groups], [sum(row) for _, row in groups]
        parts = x.split(prefixes + rows)
        return [torch.cat(both) for both in zip(parts[:len(groups)], parts[len(groups):], strict=True)]

    monkeypatch.setattr(attention, "attention", counted)
    inputs, together = run(groups, prefix_kv=prefix_kv)
    real = sum(sum(C * (P + C) for C in row) + (0 if cached else P * P) for P, row in groups)
    assert sum(computed) <= 3 * real and len(computed) <= (4 if cached else 8)
    inputs, together = ([of_each_group(x) for x in found] for found in (inputs, together))
    for i, group in enumerate(groups):
        kv = prefix_kv[:, i:i + 1, :, :group[0]] if cached else None
        _, alone = run([group], [x[i] for x in inputs], kv)
        assert all((x[i] - y).abs().max() <= 1e-12 for x, y in zip(together, alone, strict=True))


def test_groups_of_like_sizes_share_one_matmul(tiny):
    prefixes = [20, 24, 31, 28]
    attend = attention.PrefixAttention(prefixes, [[30, 44], [52, 10], [60, 60], [41, 3]], tiny[0].c, "cpu")
    assert attend.buckets == [([0, 1, 2, 3], 2, 60, 31)]


# -- flash-attn --------------------------------------------------------------------------------------------------------


def varlen_stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                    return_attn_probs=False, block_table=None):
    """flash_attn_varlen_func as flash-attn >= 2.1 documents it, in plain torch: a query i of a sequence sees the keys
    from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right."""
    assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert q.dtype == k.dtype == v.dtype and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for cu, longest, tokens in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == len(tokens) and cu.is_contiguous()
        assert type(longest) is int and longest == cu.diff().max() and cu.diff().min() > 0
    assert dropout_p == softcap == 0 and causal and deterministic and type(window_size) is tuple
    left, out = window_size[0] if window_size[0] >= 0 else 10 ** 6, []
    dtype, (q, k, v) = q.dtype, (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    for i in range(len(cu_seqlens_q) - 1):
        a = q[cu_seqlens_q[i]:cu_seqlens_q[i + 1]]
        b, c = (x[cu_seqlens_k[i]:cu_seqlens_k[i + 1]].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        key = torch.arange(len(b), device=q.device)
        at = torch.arange(len(a), device=q.device)[:, None] + len(b) - len(a)
        seen = (key <= at) & (key >= at - left)
        scores = torch.einsum("qhd,khd->hqk", a, b) * softmax_scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), c))
    return torch.cat(out).to(dtype)


def use_torch_stand_in(monkeypatch) -> list:
    """varlen_attn in plain torch, with the signature of the real one: a keyword that torch does not have is a
    TypeError. Its callers go through all of the choice of a backend. Returns a list that grows with each call."""
    module = importlib.import_module("torch.nn.attention.varlen")
    signature, calls = inspect.signature(module.varlen_attn), []

    def varlen_attn(*args, **kwargs):
        calls.append(args)
        given = signature.bind(*args, **kwargs).arguments
        packed = [given.pop(x) for x in ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")]
        assert all(x.shape[2] <= 256 and x.shape[2] % 8 == 0 for x in packed[:3]) and type(given["scale"]) is float
        assert given.pop("enable_gqa", "enable_gqa" not in signature.parameters)
        scale, (left, right) = given.pop("scale"), given.pop("window_size")
        assert not given and right == 0
        return varlen_stand_in(*packed, softmax_scale=scale, causal=True, window_size=(left, 0), deterministic=True)

    varlen_attn.__signature__ = signature
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(attention, "torch_varlen", attention.torch_varlen.__wrapped__)       # unlike it, not cached
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    return calls


@pytest.fixture
def flash(monkeypatch):
    """Sends the model through its varlen call, flash-attn's or torch's; the list counts the calls."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return varlen_stand_in(*args, **kwargs)

    def switch(on, package=True):
        nonlocal calls
        if package:
            monkeypatch.setattr(attention, "flash_attn_varlen_func", counted)
        elif on:
            calls = use_torch_stand_in(monkeypatch)
        monkeypatch.setattr(attention, "uses_varlen", lambda q: on)
        return calls

    return switch


@pytest.mark.parametrize("package", [True, False], ids=["flash-attn", "torch"])
def test_one_varlen_call_a_layer_gives_the_same_logprobs_and_gradients(family, flash, package):
    model, groups, found = family[0], [*groups_of(), (random_ids(4), [])], []
    for on in (False, True):
        calls = flash(on, package)
        model.zero_grad()
        logprobs = completion_logprobs(model, pack(groups, model))[0]
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        found.append((logprobs, {name: p.grad.double().clone() for name, p in model.named_parameters()}))
    assert len(calls) == model.c.num_layers - len(model.c.delta_layers)
    (logprobs, grads), (flash_logprobs, flash_grads) = found
    assert (logprobs - flash_logprobs).abs().max() <= 1e-5
    for name, grad in grads.items():
        assert (grad - flash_grads[name]).norm() <= 1e-5 * grad.norm(), name


def test_recomputing_layers_changes_no_gradient_of_the_varlen_path(tiny, flash):
    flash(True, package=False)
    test_recomputing_layers_changes_no_gradient(tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_a_shared_prefix_are_summed_in_fp32(tiny, dtype):
    """3,001 ones: bf16 would count to 256 and stay there, fp16 to 2,048."""
    attend = attention.PrefixAttention([3, 2], [[1] * 3000, [4]], tiny[0].c, "cpu")
    x = torch.ones(len(attend.position_ids), 2, 8, dtype=dtype, requires_grad=True)
    attention.Gather.apply(x, attend.sequences[0], attend.copies).sum().backward()
    copies = torch.tensor([3001.0] * 3 + [2.0] * 2 + [1.0] * 3004).to(dtype)
    assert torch.equal(x.grad, copies[:, None, None].expand_as(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p10_an_embeddings_gradient_is_exact_however_often_its_token_comes(dtype):
    """In bf16 torch's sum of 3,000 ones stays at 256."""
    weight = torch.zeros(9, 4, dtype=dtype, requires_grad=True)
    ids = torch.tensor([5] * 3000 + [2, 7, 2])
    out = embed(weight, ids)
    assert torch.equal(out, F.embedding(ids, weight))
    out.sum().backward()
    counts = torch.zeros(9).index_add_(0, ids, torch.ones(len(ids))).to(dtype)
    assert torch.equal(weight.grad, counts[:, None].expand_as(weight))


def test_torchs_varlen_attn_is_taken_with_what_its_version_knows_and_refused_without_a_window(monkeypatch):
    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        pass

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1)):
        pass

    module = importlib.import_module("torch.nn.attention.varlen")
    found, ours = attention.torch_varlen.__wrapped__, module.varlen_attn
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert found() == ours or (found().func, found().keywords) == (ours, {"enable_gqa": True})
    monkeypatch.setattr(module, "varlen_attn", of_2_11)
    assert found() == of_2_11
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert found() is None
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert found() is None
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(module, "varlen_attn", of_2_10)
    assert found() is None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)         # torch < 2.10
    assert found() is None


@pytest.mark.parametrize("dtype, chip, is_cuda, D, taken", [
    (torch.bfloat16, (8, 0), True, 64, True), (torch.float16, (9, 0), True, 256, True),
    (torch.bfloat16, (12, 0), True, 128, True), (torch.float32, (9, 0), True, 64, False),
    (torch.float16, (7, 5), True, 64, False), (torch.bfloat16, (9, 0), False, 64, False),
    (torch.bfloat16, (9, 0), True, 264, False), (torch.bfloat16, (9, 0), True, 100, False)])
def test_the_varlen_call_is_for_half_precision_on_an_a100_or_later_and_head_sizes_it_has(
        monkeypatch, dtype, chip, is_cuda, D, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
    q = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="cuda:0", shape=(5, 4, D))
    for package, own in itertools.product((varlen_stand_in, None), repeat=2):
        monkeypatch.setattr(attention, "flash_attn_varlen_func", package)
        monkeypatch.setattr(attention, "torch_varlen", lambda own=own: own)
        assert attention.uses_varlen(q) == (taken and bool(package or own))


@pytest.mark.parametrize("n", [1, 3])
def test_prefill_through_the_varlen_call_gives_the_same_tokens(family, flash, n):
    """Prompts with a common opening, which the sampler computes first and caches, and one without it; fewer slots than
    completions, so that rows leave and others take their place."""
    opening, found = random_ids(20), []
    prompts = [opening + random_ids(5, 1), opening + random_ids(9, 2), random_ids(6, 3), opening + random_ids(3, 4)]
    model, params = stopping(family[0], range(20)), SamplingParams(n, max_tokens=12)
    for on in (False, True):
        calls = flash(on)
        done = list(generate(model, prompts, params, slots=3))
        found.append({(c.index, c.sample): c for c in done})
    plain, flashed = found
    assert calls and len(plain) == n * len(prompts)
    assert {key: c.tokens for key, c in plain.items()} == {key: c.tokens for key, c in flashed.items()}
    for key, c in plain.items():
        assert np.allclose(c.logprobs, flashed[key].logprobs, atol=1e-5)


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


class RecordedGraph:
    """What torch.cuda.CUDAGraph does, on a CPU: replays operators on the very memory they were recorded with."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def pool(self):
        return "pool"

    def replay(self):
        self.replays += 1
        for operator, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(operator(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():    # views and what was changed in place are there already
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """torch.cuda.graph's part: its operators go into the graph. Reading a value from the GPU is an error. A recording
    runs nothing: what its operators changed in the cache is put back."""

    def __init__(self, graph, pool, capture_error_mode):
        super().__init__()
        self.graph = graph

    def __enter__(self):
        assert not gc.isenabled()
        self.before = [(x, x.clone()) for x in tree_leaves([kv.layers for kv in self.memory])]
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, old in self.before:
            x.copy_(old)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator is not torch.ops.aten._local_scalar_dense.default, "a recording cannot read from the GPU"
        out = operator(*args, **(kwargs or {}))
        self.graph.calls.append((operator, args, kwargs or {}, out))
        return out


def test_recorded_decode_steps_give_the_same_tokens(family, monkeypatch):
    """As CUDA graphs would: batches of 8 and 16 rows, rows that leave and others in their place, a cache that grows."""
    opening, made = random_ids(20), []
    prompts = [opening + random_ids(5, 1), opening + random_ids(9, 2), random_ids(6, 3), opening + random_ids(3, 4)]
    model, params = stopping(family[0], range(4)), SamplingParams(5, max_tokens=40)
    plain = {(c.index, c.sample): c for c in generate(model, prompts, params, slots=16)}

    def graph():
        made.append(RecordedGraph())
        return made[-1]

    monkeypatch.setattr(native, "usable", lambda x: False)                      # C++ cannot be recorded here
    monkeypatch.setattr(cache, "decode_attention", torch_decode_attention)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    sampler = Sampler(model, slots=16)
    sampler.graphs, Recording.memory = Graphs(sampler.cache), (sampler.cache.row_kv, sampler.cache.prefix_kv)
    step, plainly = Sampler.step, []

    def logged(self, inputs):
        B = inputs.shape[1]
        if _get_current_dispatch_mode() is None:
            plainly.append(B)
        assert B in plainly                             # once before it is recorded: libraries set themselves up
        return step(self, inputs)

    monkeypatch.setattr(Sampler, "step", logged)
    for tokens in (12, 40):                             # the second call needs wider entries
        done = sampler.generate(prompts, replace(params, max_tokens=tokens))
        replayed = {(c.index, c.sample): c for c in done}
        assert {key: c.tokens[:tokens] for key, c in plain.items()} == {key: c.tokens for key, c in replayed.items()}
    assert len(made) > 2 and max(graph.replays for graph in made) > 5           # two sizes, and again once it had grown
    assert 2 <= len(plainly) <= len(made) + 2
    gone = weakref.ref(sampler)
    del sampler, done
    assert gone() is None                               # its graphs do not hold it


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, names", [
    ({"model_type": "mixtral"}, "mixtral"), ({"hidden_act": "relu"}, "relu"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"layer_types": ["chunked_attention"] * 32}, "chunked_attention")])
def test_what_is_not_supported_is_named(change, names):
    from transformers import LlamaConfig

    config = LlamaConfig()
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=names):
        weights.config_from_hf(config)


def test_an_empty_prompt_is_refused(tiny):
    with pytest.raises(ValueError, match="no tokens"):
        pack([([], [[3, 4]])], tiny[0])


# -- the lesson ----------------------------------------------------------------------------------------------------


def test_the_lesson_counts_every_parameter_and_agrees_with_transformers(family, capsys):
    ours, _, folder = family
    parity.main(["--model", str(folder)])
    *_, total, logits = capsys.readouterr().out.splitlines()
    assert total.split() == ["all", f"{sum(p.numel() for p in ours.parameters()):,}", "100.0%"]
    difference, same, count = re.search(r"= (\S+); .* (\d+) of (\d+)", logits).groups()
    assert float(difference) <= 1e-5 and same == count


def test_the_lesson_refuses_a_missing_model_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        parity.main(["--model", "/no/such/folder"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
