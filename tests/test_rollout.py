"""The sampler: against transformers, against the trainer's forward, alone and in company."""

import copy
import gc
import json
import random
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rollout
import weights
from model import completion_logprobs, pack
from rollout import Generation, Sampler, SamplingParams, generate
from sampling.cache import prefilled, shared_openings, slots_for
from sampling.draw import filtered, sample, sample_rows
from tests.conftest import stopping

ROOT = Path(__file__).resolve().parents[1]


def random_prompts(count: int, seed: int = 0, low: int = 1, high: int = 30) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 99) for _ in range(draw.randint(low, high))] for _ in range(count)]


def collected(model, prompts, keys=None, slots=64, tokenizer=None, **settings) -> dict:
    """Completions by (index, sample). settings: of SamplingParams."""
    done = generate(model, prompts, SamplingParams(**settings), keys=keys, slots=slots,
                    tokenizer=tokenizer)
    return {(c.index, c.sample): c for c in done}


def trainer_logprobs(model, prompts, done, n, temperature):
    groups = [(p, [done[i, j].tokens for j in range(n)]) for i, p in enumerate(prompts)]
    with torch.no_grad():
        return completion_logprobs(model, pack(groups, model), temperature)[0]


# -- what is sampled -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.6, 1.0, 1.3])
def test_p2_logprobs_equal_the_trainers_at_every_temperature(tiny, temperature):
    model, prompts = tiny[0], random_prompts(5)
    done = collected(model, prompts, slots=4, n=3, max_tokens=9, temperature=temperature, seed=1)
    ours = [x for i in range(5) for j in range(3) for x in done[i, j].logprobs]
    theirs = trainer_logprobs(model, prompts, done, 3, temperature)
    assert (theirs - torch.tensor(ours)).abs().max() <= 1e-5


def test_p2_under_a_filter_logprobs_are_of_the_distribution_sampled_from(tiny):
    model, prompts = tiny[0], random_prompts(3)
    done = collected(model, prompts, max_tokens=9, temperature=0.7, top_k=5)
    for i, prompt in enumerate(prompts):
        tokens = done[i, 0].tokens
        packed = pack([(prompt + tokens[:-1], [])], model)
        with torch.no_grad():
            hidden = model(packed.input_ids, packed.position_ids, packed.attend)
            logits = model.logits(hidden[len(prompt) - 1:]) / 0.7
        best = logits.topk(5).values                    # the filter keeps these alone
        mine = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (mine >= best[:, -1]).all()
        theirs = mine - best.logsumexp(-1)
        assert (theirs - torch.tensor(done[i, 0].logprobs)).abs().max() <= 1e-5


def test_p3_cached_decoding_equals_the_uncached_forward_in_every_family(family):
    ours = stopping(family[0])
    prompts = random_prompts(6, seed=4, low=12)
    prompts += [[7] * 10 + p for p in random_prompts(3, seed=5, low=5)]
    for n in (1, 2):
        done = collected(ours, prompts, slots=5, n=n, max_tokens=20)
        theirs = trainer_logprobs(ours, prompts, done, n, 1.0)
        mine = torch.tensor([x for key in sorted(done) for x in done[key].logprobs])
        assert (theirs - mine).abs().max() <= 1e-5


def test_p4_p5_a_completion_ends_with_its_first_stop_token_or_is_truncated(tiny):
    stops = list(range(3, 30))
    model = stopping(tiny[0], stops)
    done = collected(model, random_prompts(40), max_tokens=6, seed=2).values()
    assert {c.truncated for c in done} == {True, False} and any(len(c.tokens) == 1 for c in done)
    for c in done:
        assert not set(c.tokens[:-1]) & set(stops) and len(c.tokens) == len(c.logprobs)
        assert c.truncated == (c.tokens[-1] not in stops)
        assert len(c.tokens) == 6 or not c.truncated    # a stop in the last slot too


def test_p6_the_prompts_ids_reach_the_model_as_they_are(tiny, monkeypatch):
    model, prompts, seen = stopping(tiny[0]), random_prompts(1), []
    forward = type(model).forward

    def watched(self, ids, *rest):
        seen.append(ids.tolist())
        return forward(self, ids, *rest)

    monkeypatch.setattr(type(model), "forward", watched)
    done = next(generate(model, prompts, SamplingParams(max_tokens=4)))
    assert seen[0] == prompts[0] and [ids[0] for ids in seen[1:]] == done.tokens[:-1]


def test_p15_the_next_call_samples_from_the_new_weights(tiny_folder):
    model = weights.load(str(tiny_folder), "float32")[0]
    prompts = random_prompts(4)
    before = collected(model, prompts, max_tokens=8, temperature=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    after = collected(model, prompts, max_tokens=8, temperature=0)
    assert any(before[k].tokens != after[k].tokens for k in before)
    theirs = trainer_logprobs(model, prompts, after, 1, 1.0)
    mine = torch.tensor([x for i in range(4) for x in after[i, 0].logprobs])
    assert (theirs - mine).abs().max() <= 1e-5


def test_p16_results_stay_with_their_prompts_through_retirement_and_refill(tiny):
    model = stopping(tiny[0], range(3, 40))             # rows end at random times
    prompts = random_prompts(30, seed=3)
    few = collected(model, prompts, slots=7, n=3, max_tokens=15, seed=5)
    assert sorted(few) == [(i, j) for i in range(30) for j in range(3)]
    theirs = trainer_logprobs(model, prompts, few, 3, 1.0)      # wrong rows would have other ones
    mine = torch.tensor([x for key in sorted(few) for x in few[key].logprobs])
    assert (theirs - mine).abs().max() <= 1e-5


def test_p3_rows_with_and_without_a_shared_opening_decode_side_by_side(tiny):
    model, prompts = stopping(tiny[0], range(3, 12)), []
    openings = random_prompts(4, seed=9, low=12)
    for alone, opening in zip(random_prompts(4, seed=8, low=9), openings, strict=True):
        prompts += [alone, opening + [5], opening + [6, 7]]
    assert {len(prefix.ids) > 0 for prefix in shared_openings(prompts)} == {True, False}
    done = collected(model, prompts, max_tokens=10)
    theirs = trainer_logprobs(model, prompts, done, 1, 1.0)
    mine = torch.tensor([x for i in range(12) for x in done[i, 0].logprobs])
    assert (theirs - mine).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33])
def test_p18_cache_boundaries_equal_the_uncached_forward(tiny, length):
    model, prompts = stopping(tiny[0]), random_prompts(2, low=length, high=length)
    done = collected(model, prompts, max_tokens=34)
    theirs = trainer_logprobs(model, prompts, done, 1, 1.0)
    mine = torch.tensor([x for i in range(2) for x in done[i, 0].logprobs])
    assert (theirs - mine).abs().max() <= 1e-5


def test_p18_the_longest_allowed_prompt_works_and_one_more_is_refused(tiny):
    model, params = stopping(tiny[0]), SamplingParams(max_tokens=3)
    longest = model.c.max_positions - 3
    assert len(next(generate(model, [[5] * longest], params)).tokens) == 3
    with pytest.raises(ValueError, match="prompt 0 has"):
        generate(model, [[5] * (longest + 1)], params)


def test_p19_a_sample_is_the_same_alone_and_in_any_batch(tiny):
    model, prompts = tiny[0], random_prompts(12)
    settings = {"n": 4, "max_tokens": 12, "seed": 9}
    crowd = collected(model, prompts, slots=64, **settings)
    narrow = collected(model, prompts, slots=3, **settings)
    alone = collected(model, [prompts[7]], keys=[7], **settings)
    assert all(crowd[k].tokens == narrow[k].tokens for k in crowd)
    assert all(crowd[7, j].tokens == alone[0, j].tokens for j in range(4))
    assert len({tuple(crowd[7, j].tokens) for j in range(4)}) > 1


def test_first_tokens_follow_the_softmax(tiny):
    """Chi-square over 20,000 first tokens."""
    model, prompt, count = tiny[0], random_prompts(1)[0], 20_000
    packed = pack([(prompt, [])], model)
    with torch.no_grad():
        hidden = model(packed.input_ids, packed.position_ids, packed.attend)
        logits = model.logits(hidden)[-1:]
    expected = (logits[0].double() / 0.7).softmax(-1) * count
    uniforms = torch.tensor(np.random.default_rng(0).random(count))
    tokens, _ = sample(logits.expand(count, -1), uniforms, 0.7)
    seen = torch.bincount(tokens, minlength=len(expected)).double()
    common = expected >= 5
    pairs = [(seen[common], expected[common]),
             (seen[~common].sum()[None], expected[~common].sum()[None])]
    chi2 = sum(((s - e).square() / e.clamp(min=1e-9)).sum() for s, e in pairs)
    freedom = int(common.sum())
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_inverse_cdf_hits_every_token_and_never_an_impossible_one():
    logits = torch.full((4, 700), -torch.inf)
    logits[:, [0, 255, 256, 699]] = 0.0
    tokens, logprobs = sample(logits, torch.tensor([0.0, 0.26, 0.51, 1 - 1e-16]), 1.0)
    assert tokens.tolist() == [0, 255, 256, 699]
    assert torch.allclose(logprobs, torch.tensor(0.25).log())


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (9, 1.0), (0, 0.8)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_row_takes_the_first_token_whose_float64_cdf_passes_its_uniform(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 50_003, generator=generator)      # fp32 sums go wrong here, not at 5,003
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    tokens, logprobs = sample_rows(logits, uniforms, temperature, top_k, top_p, 0.0)
    assert tokens.dtype == torch.long and logprobs.dtype == torch.float32
    log_p = filtered(logits / temperature, top_k, top_p, 0.0).double().log_softmax(-1)
    wanted = torch.searchsorted(log_p.exp().cumsum(-1), uniforms[:, None], right=True)[:, 0]
    assert torch.equal(tokens, wanted)
    exact = log_p.gather(1, tokens[:, None])[:, 0].float()
    assert torch.allclose(logprobs, exact, rtol=0, atol=1e-5)


def test_rows_that_are_not_finite_and_tokens_that_are_impossible():
    logits = torch.full((3, 700), -torch.inf)
    logits[:, [255, 256]] = 0.0
    logits[2, 5] = torch.nan
    ends = torch.tensor([0.0, 1 - 1e-16, 0.5], dtype=torch.float64)
    tokens, logprobs = sample_rows(logits, ends, 1.0, 0, 1.0, 0.0)
    assert tokens[:2].tolist() == [255, 256] and 0 <= tokens[2] < 700
    assert torch.allclose(logprobs[:2], torch.tensor(0.5).log()) and logprobs[2].isnan()
    logits = torch.randn(200, 5003, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 5002]] = -torch.inf
    ends = torch.full((200,), 1 - 1e-16, dtype=torch.float64)
    assert sample_rows(logits, ends, 1.0, 0, 1.0, 0.0)[1].isfinite().all(), "a token of p = 0 was drawn"


def test_filters_keep_what_their_definitions_say():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_k, top_p, min_p, kept in [(2, 1.0, 0.0, [1, 1, 0, 0]), (0, 0.65, 0.0, [1, 1, 0, 0]),
                                      (0, 0.71, 0.0, [1, 1, 1, 0]), (0, 1.0, 0.45, [1, 1, 1, 0])]:
        assert filtered(logits, top_k, top_p, min_p)[0].isfinite().tolist() == kept
    logits, half = torch.randn(5, 300), torch.full((5,), 0.5, dtype=torch.float64)
    tokens, logprobs = sample(logits, half, 0.0, min_p=0.5)         # greedy: of the model itself, whatever is filtered
    assert torch.equal(tokens, logits.argmax(-1)) and torch.allclose(logprobs, logits.log_softmax(-1).amax(-1))


# -- sharing -------------------------------------------------------------------------------------


def test_prompts_that_open_alike_share_a_prefix_and_keep_their_last_token():
    persona = list(range(10, 22))
    prompts = [persona + [30], persona + [31, 32], [5, 6, 7], persona]
    prefixes = shared_openings(prompts)
    assert prefixes[0] is prefixes[1] is prefixes[3]
    assert prefixes[0].ids == persona[:-1] and prefixes[0].users == 3
    assert prefixes[2].ids == []


def test_each_distinct_prompt_token_is_prefilled_once(tiny, monkeypatch):
    model, persona = tiny[0], random_prompts(1, low=200, high=200)[0]
    prompts = [persona + [3 + i // 16, 4 + i % 16] for i in range(256)]
    tokens, forward = [], type(model).forward

    def watched(self, ids, *rest):
        tokens.append(len(ids))
        return forward(self, ids, *rest)

    monkeypatch.setattr(type(model), "forward", watched)
    for n in (1, 3):
        tokens.clear()
        list(generate(model, prompts, SamplingParams(n, max_tokens=1)))     # nothing but prefill
        assert sum(tokens) == prefilled(prompts) == 200 + 256 * 2


def test_many_prompts_of_random_lengths_finish_in_bounded_memory(tiny):
    model, prompts = tiny[0], random_prompts(10_000, high=12)
    widest = []

    class Watched(Generation):
        def admit(self):
            super().admit()
            stores = self.cache.row_kv, self.cache.prefix_kv
            widest.append([len(store.layers[0][0]) for store in stores])

    original, rollout.Generation = rollout.Generation, Watched
    try:
        count = sum(1 for _ in generate(model, prompts, SamplingParams(max_tokens=2), slots=128))
    finally:
        rollout.Generation = original
    assert count == 10_000
    assert max(rows for rows, _ in widest) == 129 and max(count for _, count in widest) <= 256


# -- refusals and accidents ----------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    ({"n": 0}, "--n must"), ({"temperature": -1.0}, "--temperature"),
    ({"temperature": float("nan")}, "--temperature"), ({"temperature": 1e-40}, "--temperature"),
    ({"top_k": -1}, "--top-k"), ({"top_p": 0.0}, "--top-p"), ({"min_p": 1.5}, "--min-p"),
    ({"seed": -1}, "--seed"), ({"seed": 10**19}, "--seed"),
    ({"max_tokens": 0}, "--max-new-tokens"), ({"stop": ("x", "")}, "--stop must not be empty")])
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_a_call_that_cannot_work_is_refused_before_it_runs(tiny):
    with pytest.raises(ValueError, match="need the tokenizer"):
        generate(tiny[0], [[3]], SamplingParams(stop=("x",)))
    with pytest.raises(ValueError, match="slots"):
        generate(tiny[0], [[3]], slots=-1)


@pytest.mark.parametrize("prompt, says", [
    ([], "is empty"), ([3, 99], "has the token id 99, but the model has embeddings for 99 tokens"),
    ([3] * 500, "has 500 tokens; with 64 new ones")])
def test_p36_a_prompt_that_the_model_cannot_take_is_refused_by_its_number(tiny, prompt, says):
    with pytest.raises(ValueError, match=f"prompt 1 {says}"):
        generate(tiny[0], [[3], prompt])


def test_nan_logits_end_their_row_with_an_error_and_spare_the_others(tiny_folder):
    model = weights.load(str(tiny_folder), "float32")[0]
    with torch.no_grad():
        model.embed_tokens.weight[50, 0] = torch.nan    # tied: logit 50 would be NaN too
    model.c.tied = False
    model.lm_head = torch.nn.Linear(32, 99, bias=False)
    done = collected(stopping(model), [[50, 4], [5, 6]], max_tokens=3, seed=1)
    assert done[0, 0].error and not done[0, 0].tokens
    assert done[1, 0].error is None or 50 in done[1, 0].tokens


@pytest.mark.parametrize("n", [1, 2])
def test_nothing_of_a_broken_row_is_left_to_the_next_one_in_its_place(tiny_folder, n):
    model = weights.load(str(tiny_folder), "float32")[0]
    model.c.tied = False
    model.lm_head = torch.nn.Linear(32, 99, bias=False)
    with torch.no_grad():
        model.embed_tokens.weight[3] = torch.nan        # of the first prompt alone
    asked, model = {"slots": n, "n": n, "max_tokens": 4, "seed": 1}, stopping(model)
    done = collected(model, [[3, *range(10, 30)], [5, 6]], **asked)
    alone = collected(model, [[5, 6]], keys=[1], **asked)
    for j in range(n):
        assert done[0, j].error and done[1, j].error is None
        assert done[1, j].tokens == alone[0, j].tokens


def test_stop_strings_end_a_completion(tiny):
    model, tokenizer = stopping(tiny[0]), tiny[1]
    params = SamplingParams(max_tokens=12, seed=3)
    plain = next(generate(model, [[5, 6]], params))
    assert plain.truncated
    params = replace(params, stop=(tokenizer.decode(plain.tokens[4:5]),))
    cut = next(generate(model, [[5, 6]], params, tokenizer=tokenizer))
    assert cut.tokens == plain.tokens[:plain.tokens.index(plain.tokens[4]) + 1]
    assert not cut.truncated


def test_the_command_writes_one_line_a_completion(script, tiny_folder, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    message = {"role": "user", "content": "w9"}
    prompts.write_text('{"prompt": "w5 w6 w7"}\n' + json.dumps({"messages": [message]}) + "\n")
    done = script("rollout.py", "--model", tiny_folder, "--prompts", prompts, "--n", 2, "--out", out,
                  "--max-new-tokens", 5, "--dtype", "float32")
    assert done.returncode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((x["index"], x["sample"]) for x in lines) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(x["tokens"]) == len(x["logprobs"]) <= 5 for x in lines)


def refusal(capsys, *flags) -> str:
    """What rollout.py says on stderr: one line, with exit code 2."""
    try:
        code = rollout.main([str(flag) for flag in flags])
    except SystemExit as error:                         # argparse's
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1
    return said


USER = {"role": "user", "content": "w5"}


@pytest.mark.parametrize("line, says", [
    ({"question": "?"}, "give either"), ({"prompt": 3}, "give either"), ([1], "not an object"),
    ({"prompt": "w5", "messages": [USER]}, "give either"), ({"messages": []}, "give either"),
    ({"messages": "w5"}, "give either"), ({"messages": [3]}, "give either"),
    ({"messages": [USER | {"content": 3}]}, "give either"), ({"messages": [[USER]]}, "give either"),
    ({"messages": [{"content": "w5"}]}, "give either"), ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "\ud800"}, ""), ({"messages": [USER | {"content": "\ud800"}]}, ""),
    ({"prompt": "w5 " * 510}, "the prompt has 510 tokens; with 3 new ones")])
def test_a_broken_prompt_line_is_named(tiny_folder, tmp_path, capsys, line, says):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('\n{"prompt": "w5"}\n' + json.dumps(line) + "\n")
    said = refusal(capsys, "--model", tiny_folder, "--prompts", prompts, "--max-new-tokens", 3)
    assert f"{prompts}, line 3: {says}" in said


def test_a_file_without_prompts_is_refused(tiny_folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("\n\n")
    assert "is empty" in refusal(capsys, "--model", tiny_folder, "--prompts", tmp_path / "p.jsonl")
    assert "a flag is empty" in refusal(capsys, "--model", tiny_folder, "--prompts", "")


@pytest.mark.parametrize("flag, value", [
    ("--n", 10**8), ("--seed", -1),
    ("--slots", -1), ("--slots", "nan"), ("--n", 0), ("--n", "inf"), ("--max-new-tokens", 0),
    ("--max-new-tokens", "1e9"), ("--temperature", "nan"), ("--temperature", "inf"),
    ("--temperature", -1), ("--top-k", -1), ("--top-p", "nan"), ("--min-p", "inf"),
    ("--seed", "nan"), ("--stop", ""), ("--stop", "\udcff"), ("--persona", "\udcff"),
    ("--persona", "You are a pirate."), ("--out", ROOT), ("--out", "/nowhere/out.jsonl"),
    ("--out", __file__), ("--dtype", "int8"), ("--device", "tpu")])
def test_a_flag_that_cannot_work_is_named_before_the_model_is_loaded(capsys, flag, value):
    assert flag in refusal(capsys, "--model", "/nowhere", "--prompts", __file__, flag, value)


@pytest.mark.parametrize("flag, value", [("--n", 3), ("--top-k", 5), ("--top-p", 0.9), ("--min-p", 0.1)])
def test_a_flag_that_does_nothing_in_greedy_decoding_is_refused(capsys, flag, value):
    flags = ["--model", "/nowhere", "--prompts", __file__, "--temperature", 0]
    assert flag in refusal(capsys, *flags, flag, value)


def test_a_chat_without_a_terminal_ends(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert rollout.main(["--model", str(tiny_folder)]) == 0 and not capsys.readouterr().out


def test_an_absurd_limit_is_told_of_and_an_absurd_number_of_slots_costs_nothing(
        tiny_folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w5"}\n')
    flags = ["--model", tiny_folder, "--prompts", tmp_path / "p.jsonl", "--max-new-tokens"]
    assert "--max-new-tokens" in refusal(capsys, *flags, 100000)
    for n in (1, 2):
        assert rollout.main([str(flag) for flag in [*flags, 2, "--slots", 10**9, "--n", n]]) == 0


def test_a_row_longer_than_its_entry_is_an_error_not_a_write_beyond_it(tiny):
    sampler = Sampler(tiny[0], slots=2)
    list(sampler.generate([[3, 4]], SamplingParams(max_tokens=3)))
    inputs = torch.tensor([[5], [0], [99], [0], [0]], dtype=torch.int32)        # 99 tokens long
    with pytest.raises(RuntimeError, match="length"), torch.inference_mode():
        sampler.step(inputs, (100, 0))


@pytest.mark.parametrize("tokens", [200, 2000])
def test_rows_on_a_gpu_depend_on_its_memory_and_on_the_longest_row(tiny, monkeypatch, tokens):
    model = SimpleNamespace(c=tiny[0].c, dtype=torch.bfloat16, device=torch.device("cuda"))
    row = 2 * model.c.num_layers * model.c.num_kv_heads * model.c.head_dim * 2 * tokens
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=4 * row * 100))
    assert slots_for(model, tokens) == 96 and slots_for(model, tokens // 100) == 512


@pytest.mark.parametrize("n", [1, 2])
def test_a_prefix_is_dropped_with_its_last_user(tiny, n):
    prompts = [[3] * 12, [3] * 11 + [4]]
    sampler = Sampler(tiny[0], slots=4)
    assert len(list(sampler.generate(prompts, SamplingParams(n, max_tokens=2)))) == 2 * n
    for kv in (sampler.cache.row_kv, sampler.cache.prefix_kv):
        count = len(kv.layers[0][0])
        assert sorted(kv.free) == list(range(count))[:count - (kv is sampler.cache.row_kv)]


def test_more_slots_than_completions_take_no_more_memory(tiny):
    sampler = Sampler(tiny[0], slots=10**9)
    list(sampler.generate(random_prompts(3), SamplingParams(n=2, max_tokens=2)))
    assert [len(kv.layers[0][0]) for kv in (sampler.cache.row_kv, sampler.cache.prefix_kv)] == [6 + 1, 3 + 1]


def test_two_calls_of_one_sampler_at_once_are_refused_and_an_abandoned_one_does_no_harm(tiny):
    sampler, params = Sampler(tiny[0], slots=4), SamplingParams(max_tokens=6)
    prompts = random_prompts(9)
    expected = [c.tokens for c in sampler.generate(prompts, params)]
    first = sampler.generate(prompts, params)
    next(first)
    assert [c.tokens for c in sampler.generate(prompts, params)] == expected
    with pytest.raises(RuntimeError, match="another call"):
        list(first)


def test_a_call_that_goes_on_after_another_began_takes_nothing_from_it(tiny):
    """Rows that end in the same step as the one handed out are no longer the first call's."""
    model, prompts = stopping(tiny[0]), random_prompts(4)
    sampler, long = Sampler(model, slots=2), SamplingParams(max_tokens=9)
    expected = sorted(c.tokens for c in sampler.generate(prompts, long))
    first = sampler.generate(prompts, SamplingParams(max_tokens=3))
    next(first)                                         # of two that end together
    second = sampler.generate(prompts, long)
    found = [next(second)]
    with pytest.raises(RuntimeError, match="another call"):
        list(first)
    assert sorted(c.tokens for c in (*found, *second)) == expected


def test_p15_a_call_that_waits_between_two_tokens_hands_no_old_weights_to_another_forward(tiny):
    model = copy.deepcopy(tiny[0]).bfloat16()           # rearranged weights, where oneDNN takes bf16
    packed = pack([([3, 4, 5], [[6, 7, 8]])], model)
    waiting = generate(model, random_prompts(3), SamplingParams(max_tokens=2))
    with torch.no_grad():
        next(waiting)
        for p in model.parameters():
            p.mul_(0.5)
        during = completion_logprobs(model, packed)[0]
        waiting.close()
        assert torch.equal(during, completion_logprobs(model, packed)[0])
        copy.deepcopy(model)                            # an opaque copy would refuse this


def test_a_sampler_goes_as_soon_as_nobody_holds_it(tiny):
    """With its cache, which no collector of cycles has to find: on a GPU that would be after memory has run out."""
    sampler = Sampler(tiny[0], slots=4)
    gone = weakref.ref(sampler), weakref.ref(sampler.cache)
    gc.disable()
    try:
        list(sampler.generate(random_prompts(5), SamplingParams(n=2, max_tokens=3)))
        del sampler
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_room_for_prompts_is_made_for_those_there_are(tiny):
    """And not for as many as the slots could hold, which a large --slots makes terabytes."""
    sampler = Sampler(tiny[0], slots=10**9)
    assert len(list(sampler.generate([[3, 4]] * 2, SamplingParams(n=2, max_tokens=2)))) == 4
    assert sampler.cache.prefix_kv.entries <= 3 and sampler.cache.row_kv.entries <= 5
