"""The sampler: against transformers, against the trainer's forward, alone and in company."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rollout
import weights
from model import completion_logprobs, pack
from rollout import Generation, filtered, generate, sample
from sampling.cache import Trunk, prefilled, shared_openings

ROOT = Path(__file__).resolve().parents[1]


def random_prompts(count: int, seed: int = 0, low: int = 1, high: int = 30) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 99) for _ in range(draw.randint(low, high))] for _ in range(count)]


def collected(*args, **kwargs) -> dict:
    return {(c.index, c.sample): c for c in generate(*args, **kwargs)}


def trainer_logprobs(model, prompts, done, n, temperature):
    groups = [(p, [done[i, j].tokens for j in range(n)]) for i, p in enumerate(prompts)]
    with torch.no_grad():
        return completion_logprobs(model, pack(groups, model), temperature)[0]


# -- what is sampled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.6, 1.0, 1.3])
def test_p2_logprobs_equal_the_trainers_at_every_temperature(tiny, temperature):
    model, prompts = tiny[0], random_prompts(5)
    done = collected(model, prompts, n=3, max_new_tokens=9, temperature=temperature, slots=4, seed=1)
    ours = [x for i in range(5) for j in range(3) for x in done[i, j].logprobs]
    theirs = trainer_logprobs(model, prompts, done, 3, temperature)
    assert (theirs - torch.tensor(ours)).abs().max() <= 1e-5


def test_p2_under_a_filter_the_models_own_logprobs_come_along(tiny):
    model, prompts = tiny[0], random_prompts(3)
    done = collected(model, prompts, max_new_tokens=9, temperature=0.7, top_k=5, model_logprobs=True)
    plain = trainer_logprobs(model, prompts, done, 1, 1.0)
    assert (plain - torch.tensor([x for i in range(3) for x in done[i, 0].model_logprobs])).abs().max() <= 1e-5
    assert all(a >= b for i in range(3) for a, b in zip(done[i, 0].logprobs, done[i, 0].model_logprobs, strict=True))


def test_p3_cached_decoding_equals_the_uncached_forward_in_every_family(family):
    ours = family[0]
    prompts = random_prompts(6, seed=4, low=12) + [[7] * 10 + p for p in random_prompts(3, seed=5, low=5)]
    for n in (1, 2):
        done = collected(ours, prompts, n=n, max_new_tokens=20, slots=5, stop_ids=[])
        theirs = trainer_logprobs(ours, prompts, done, n, 1.0)
        mine = torch.tensor([x for i in range(len(prompts)) for j in range(n) for x in done[i, j].logprobs])
        assert (theirs - mine).abs().max() <= 1e-5


def test_p4_p5_a_completion_ends_with_its_first_stop_token_or_is_truncated(tiny):
    model, stops = tiny[0], list(range(3, 30))
    done = collected(model, random_prompts(40), max_new_tokens=6, stop_ids=stops, seed=2).values()
    assert {c.truncated for c in done} == {True, False} and any(len(c.tokens) == 1 for c in done)
    for c in done:
        assert not set(c.tokens[:-1]) & set(stops) and len(c.tokens) == len(c.logprobs)
        assert c.truncated == (c.tokens[-1] not in stops)
        assert len(c.tokens) == 6 or not c.truncated    # a stop in the last slot is a stop, not a truncation


def test_p6_the_prompts_ids_reach_the_model_as_they_are(tiny, monkeypatch):
    model, prompts, seen = tiny[0], random_prompts(1), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward",
                        lambda self, ids, *rest: seen.append(ids.tolist()) or forward(self, ids, *rest))
    done = next(generate(model, prompts, max_new_tokens=4, stop_ids=[]))
    assert seen[0] == prompts[0] and [ids[0] for ids in seen[1:]] == done.tokens[:-1]


def test_p15_the_next_call_samples_from_the_new_weights(tiny_folder):
    model = weights.load(str(tiny_folder), "float32")[0]
    prompts = random_prompts(4)
    before = collected(model, prompts, max_new_tokens=8, temperature=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    after = collected(model, prompts, max_new_tokens=8, temperature=0)
    assert any(before[k].tokens != after[k].tokens for k in before)
    logprobs = trainer_logprobs(model, prompts, after, 1, 1.0)
    assert (logprobs - torch.tensor([x for i in range(4) for x in after[i, 0].logprobs])).abs().max() <= 1e-5


def test_p16_results_stay_with_their_prompts_through_retirement_and_refill(tiny):
    model, prompts = tiny[0], random_prompts(30, seed=3)
    stops = list(range(3, 40))                          # rows end at random times
    few = collected(model, prompts, n=3, max_new_tokens=15, stop_ids=stops, slots=7, seed=5)
    assert sorted(few) == [(i, j) for i in range(30) for j in range(3)]
    theirs = trainer_logprobs(model, prompts, few, 3, 1.0)          # wrong rows would have other log-probs
    assert (theirs - torch.tensor([x for key in sorted(few) for x in few[key].logprobs])).abs().max() <= 1e-5


def test_p3_rows_with_and_without_a_shared_opening_decode_side_by_side(tiny):
    model, alone = tiny[0], random_prompts(4, seed=8, low=9)
    prompts = [p for own, opening in zip(alone, random_prompts(4, seed=9, low=12), strict=True)
               for p in (own, opening + [5], opening + [6, 7])]
    assert {len(t.ids) > 0 for t in shared_openings(prompts)} == {True, False}
    done = collected(model, prompts, max_new_tokens=10, stop_ids=list(range(3, 12)))
    theirs = trainer_logprobs(model, prompts, done, 1, 1.0)
    assert (theirs - torch.tensor([x for i in range(12) for x in done[i, 0].logprobs])).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33])
def test_p18_cache_boundaries_equal_the_uncached_forward(tiny, length):
    model, prompts = tiny[0], random_prompts(2, low=length, high=length)
    done = collected(model, prompts, max_new_tokens=34, stop_ids=[])
    theirs = trainer_logprobs(model, prompts, done, 1, 1.0)
    assert (theirs - torch.tensor([x for i in range(2) for x in done[i, 0].logprobs])).abs().max() <= 1e-5


def test_p18_the_longest_allowed_prompt_works_and_one_more_is_refused(tiny):
    model = tiny[0]
    longest = model.c.max_positions - 3
    assert len(next(generate(model, [[5] * longest], max_new_tokens=3, stop_ids=[])).tokens) == 3
    with pytest.raises(ValueError, match="prompt 0 has"):
        generate(model, [[5] * (longest + 1)], max_new_tokens=3)


def test_p19_a_sample_is_the_same_alone_and_in_any_batch(tiny):
    model, prompts = tiny[0], random_prompts(12)
    crowd = collected(model, prompts, n=4, max_new_tokens=12, slots=64, seed=9)
    narrow = collected(model, prompts, n=4, max_new_tokens=12, slots=3, seed=9)
    alone = collected(model, [prompts[7]], n=4, max_new_tokens=12, seed=9, keys=[7])
    assert all(crowd[k].tokens == narrow[k].tokens for k in crowd)
    assert all(crowd[7, j].tokens == alone[0, j].tokens for j in range(4))
    assert len({tuple(crowd[7, j].tokens) for j in range(4)}) > 1


def test_first_tokens_follow_the_softmax(tiny):
    """Chi-square over 20,000 first tokens."""
    model, prompt, count = tiny[0], random_prompts(1)[0], 20_000
    packed = pack([(prompt, [])], model)
    with torch.no_grad():
        logits = model.logits(model(packed.input_ids, packed.tree.position_ids, packed.tree))[-1:]
    expected = (logits[0].double() / 0.7).softmax(-1) * count
    uniforms = torch.tensor(np.random.default_rng(0).random(count))
    tokens, _ = sample(logits.expand(count, -1), uniforms, 0.7)
    seen = torch.bincount(tokens, minlength=len(expected)).double()
    common = expected >= 5
    pairs = [(seen[common], expected[common]), (seen[~common].sum()[None], expected[~common].sum()[None])]
    chi2 = sum(((s - e).square() / e.clamp(min=1e-9)).sum() for s, e in pairs)
    freedom = int(common.sum())
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_inverse_cdf_hits_every_token_and_never_an_impossible_one():
    logits = torch.full((4, 700), -torch.inf)
    logits[:, [0, 255, 256, 699]] = 0.0
    tokens, logprobs = sample(logits, torch.tensor([0.0, 0.26, 0.51, 1 - 1e-16]), 1.0)
    assert tokens.tolist() == [0, 255, 256, 699] and torch.allclose(logprobs, torch.tensor(0.25).log())


def test_filters_keep_what_their_definitions_say():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = {name: filtered(logits, *f)[0].isfinite().tolist() for name, f in
            {"k": (2, 1.0, 0.0), "p": (0, 0.65, 0.0), "all": (0, 0.71, 0.0), "min": (0, 1.0, 0.45)}.items()}
    assert kept == {"k": [1, 1, 0, 0], "p": [1, 1, 0, 0], "all": [1, 1, 1, 0], "min": [1, 1, 1, 0]}


# -- sharing ----------------------------------------------------------------------------------------------------------


def test_prompts_that_open_alike_share_a_trunk_and_keep_their_last_token():
    persona = list(range(10, 22))
    prompts = [persona + [30], persona + [31, 32], [5, 6, 7], persona]
    trunks = shared_openings(prompts)
    assert trunks[0] is trunks[1] is trunks[3] and trunks[0].ids == persona[:-1] and trunks[0].users == 3
    assert trunks[2].ids == []


def test_each_distinct_prompt_token_is_prefilled_once(tiny, monkeypatch):
    model, persona = tiny[0], random_prompts(1, low=200, high=200)[0]
    prompts = [persona + [3 + i // 16, 4 + i % 16] for i in range(256)]
    tokens, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward",
                        lambda self, ids, *rest: tokens.append(len(ids)) or forward(self, ids, *rest))
    for n in (1, 3):
        tokens.clear()
        list(generate(model, prompts, n=n, max_new_tokens=1, slots=64))    # one new token: prefill is all there is
        assert sum(tokens) == prefilled(prompts) == 200 + 256 * 2


def test_many_prompts_of_random_lengths_finish_in_bounded_memory(tiny):
    model, prompts = tiny[0], random_prompts(10_000, high=12)
    widest = []

    class Watched(Generation):
        def admit(self):
            super().admit()
            widest.append((len(self.cache.row_kv[0][0]), len(self.cache.trunk_kv[0][0])))

    original, rollout.Generation = rollout.Generation, Watched
    try:
        count = sum(1 for _ in generate(model, prompts, max_new_tokens=2, slots=128))
    finally:
        rollout.Generation = original
    assert count == 10_000 and max(rows for rows, _ in widest) == 128 and max(t for _, t in widest) <= 256


# -- refusals and accidents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    ({"n": 0}, "n must"), ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0.0}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"stop_strings": ["x"]}, "tokenizer")])
def test_settings_that_cannot_work_are_refused_at_the_call(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny[0], [[3]], **settings)


def test_an_empty_prompt_is_refused_by_its_number(tiny):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(tiny[0], [[3], []])


def test_nan_logits_end_their_row_with_an_error_and_spare_the_others(tiny_folder):
    model = weights.load(str(tiny_folder), "float32")[0]
    with torch.no_grad():
        model.embed_tokens.weight[50, 0] = torch.nan    # tied: logit 50 is NaN everywhere, unless it is cut off
    model.c.tied = False
    model.lm_head = torch.nn.Linear(32, 99, bias=False)
    done = collected(model, [[50, 4], [5, 6]], max_new_tokens=3, stop_ids=[], temperature=1.0, seed=1)
    assert done[0, 0].error and not done[0, 0].tokens
    assert done[1, 0].error is None or 50 in done[1, 0].tokens


@pytest.mark.parametrize("n", [1, 2])
def test_nothing_of_a_broken_row_is_left_to_the_next_one_in_its_place(tiny_folder, n):
    model = weights.load(str(tiny_folder), "float32")[0]
    model.c.tied = False
    model.lm_head = torch.nn.Linear(32, 99, bias=False)
    with torch.no_grad():
        model.embed_tokens.weight[3] = torch.nan        # of the first prompt alone
    asked = {"max_new_tokens": 4, "stop_ids": [], "slots": n, "n": n, "seed": 1}
    done = collected(model, [[3, *range(10, 30)], [5, 6]], **asked)
    alone = collected(model, [[5, 6]], keys=[1], **asked)
    for j in range(n):
        assert done[0, j].error and done[1, j].error is None and done[1, j].tokens == alone[0, j].tokens


def test_stop_strings_end_a_completion(tiny):
    model, tokenizer = tiny
    plain = next(generate(model, [[5, 6]], max_new_tokens=12, stop_ids=[], seed=3))
    word = tokenizer.decode(plain.tokens[4:5])
    cut = next(generate(model, [[5, 6]], max_new_tokens=12, stop_ids=[], seed=3, stop_strings=[word],
                        tokenizer=tokenizer))
    assert cut.tokens == plain.tokens[:plain.tokens.index(plain.tokens[4]) + 1] and not cut.truncated


def test_the_command_writes_one_line_a_completion(tiny_folder, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('{"prompt": "w5 w6 w7"}\n{"messages": [{"role": "user", "content": "w9"}]}\n')
    command = [sys.executable, "rollout.py", "--model", tiny_folder, "--prompts", prompts, "--n", "2", "--out", out,
               "--max-new-tokens", "5", "--dtype", "float32"]
    subprocess.run(command, cwd=ROOT, check=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((x["index"], x["sample"]) for x in lines) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(x["tokens"]) == len(x["logprobs"]) <= 5 for x in lines)


def test_a_broken_prompt_line_is_named(tiny_folder, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "w5"}\n{"question": "?"}\n')
    command = [sys.executable, "rollout.py", "--model", tiny_folder, "--prompts", prompts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "line 2" in done.stderr and "Traceback" not in done.stderr


def test_a_trunk_is_dropped_with_its_last_user(tiny):
    generation = Generation(tiny[0], [[3] * 12, [3] * 11 + [4]], 1, 2, 0, [0, 1], 4, False)
    list(generation.run(lambda logits, u: sample(logits, u, 1.0), set(), (), None, None))
    assert generation.cache.placed == [] and isinstance(generation.rows, list) and Trunk([], 0).at == -1
