"""evaluate.py and evaluation/measures.py: every measure against a hand-computed table, brute force, or simulation."""

import copy
import itertools
import json
import math
import re
import shutil
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import model as model_module
import personas
import rollout
import tasks
import train
import weights
from common import files
from evaluation import answers, fidelity, judge, measures, rivals
from rollout import Sampler, SamplingParams
from tests.conftest import SHARED

ROOT = Path(__file__).resolve().parents[1]
#            a  b  c   personas; rows are items
TABLE = [[1, 1, 0],
         [1, 0, 0],
         [1, 1, 1],
         [1, 0, 0]]  # accuracies 1, 1/2, 1/4


def test_scores_equal_the_hand_computed_table():
    got = measures.table_scores(TABLE)
    mean = 1.75 / 3
    std = math.sqrt(((1 - mean) ** 2 + (0.5 - mean) ** 2 + (0.25 - mean) ** 2) / 3)
    want = {"pss": 0.25, "pss_mean_minus_std": mean - std, "pss_all_correct": 0.25, "worst_persona_accuracy": 0.25,
            "mean_accuracy": mean}
    assert got == pytest.approx(want)
    assert {*got, "no_persona_accuracy"} == set(measures.SCORES)


def test_pss_is_zero_when_every_persona_fails_and_one_when_all_are_equal():
    assert measures.pss(np.zeros(5)) == 0
    assert measures.pss(np.full(5, 0.2)) == 1
    assert measures.pss(np.array([[0, 0.5], [0.25, 0.5]])).tolist() == [0, 0.5]


@pytest.mark.parametrize("p", [1, 2, 5, 7])
def test_the_lottery_curve_equals_the_mean_over_all_subsets(p):
    accuracy = np.random.default_rng(p).random(p).round(1)  # rounded: ties occur
    brute = [np.mean([max(s) for s in itertools.combinations(accuracy, k)]) for k in range(1, p + 1)]
    assert measures.lottery(accuracy) == pytest.approx(brute)


def test_the_lottery_stays_exact_for_a_large_pool():
    weights = measures.draw_weights(160)
    assert weights.sum(axis=0) == pytest.approx(np.ones(160))
    assert measures.lottery(np.arange(160) / 160)[[0, 159]] == pytest.approx([79.5 / 160, 159 / 160])


def test_the_held_out_pick_equals_a_search_by_hand_over_the_same_halves():
    correct = (np.random.default_rng(0).random((9, 4)) < [0.2, 0.4, 0.6, 0.9]).astype(float)
    halves, rng = [], np.random.default_rng(3)
    for _ in range(20):
        order = rng.permutation(9)
        picking, scoring = correct[order[:4]].mean(0), correct[order[4:]].mean(0)
        rank = np.argsort(np.lexsort((rng.random(4), picking)))
        draws = [itertools.combinations(range(4), k) for k in range(1, 5)]
        halves.append([np.mean([scoring[max(s, key=rank.__getitem__)] for s in subsets]) for subsets in draws])
    assert measures.held_out_lottery(correct, seed=3, splits=20) == pytest.approx(np.mean(halves, axis=0))


def test_a_held_out_pick_gains_nothing_when_personas_do_not_differ():
    correct = (np.random.default_rng(1).random((400, 12)) < 0.5).astype(float)
    seen, held_out = measures.lottery(correct.mean(0))[-1], measures.held_out_lottery(correct)[-1]
    assert seen > 0.53 and abs(held_out - 0.5) < 0.03


def test_a_resampled_table_equals_the_loop_over_repeated_rows():
    table, counts = np.array(TABLE, dtype=float), measures.resamples(4, n=30, seed=5)
    got = measures.bootstrap(table, counts)
    for b, row in enumerate(counts.astype(int)):
        want = measures.table_scores(np.repeat(table, row, axis=0))
        assert {name: values[0, b] for name, values in got.items()} == pytest.approx(want)


def persona_tables(accuracies, n_items, runs, rng):
    """Simulated tables: an item's difficulty is shared by all personas, a persona moves the logit."""
    logits = np.log(np.array(accuracies) / (1 - np.array(accuracies)))
    for _ in range(runs):
        yield rng.random((n_items, len(logits))) < 1 / (1 + np.exp(-(rng.normal(size=(n_items, 1)) + logits)))


@pytest.mark.parametrize("accuracies", [
    np.linspace(0.06, 0.23, 24), np.linspace(0.4, 0.8, 24), np.full(24, 0.6), np.r_[0.3, np.full(22, 0.6), 0.85],
    [0.2, 0.5, 0.8]], ids=["the start model", "a trained model", "no persona effect", "two outliers", "three personas"])
def test_the_95_percent_intervals_cover_the_truth_in_simulation(accuracies):
    rng = np.random.default_rng(0)
    exact = np.mean([table.mean(axis=0) for table in persona_tables(accuracies, 100_000, 4, rng)], axis=0)
    truth = measures.table_scores(exact[None])
    covered = dict.fromkeys(("pss", "pss_mean_minus_std", "worst_persona_accuracy", "mean_accuracy"), 0)
    for run, table in enumerate(persona_tables(accuracies, 60, 300, rng)):
        draws = measures.bootstrap(table, measures.resamples(60, n=300, seed=run), seed=run)
        for name in covered:
            low, high = measures.interval(draws[name])
            covered[name] += low - 0.005 <= truth[name] <= high + 0.005
    assert all(0.88 <= hits / 300 <= 1 for hits in covered.values()), covered


def test_the_paired_interval_of_a_difference_covers_and_is_narrower_than_the_unpaired_one():
    rng, covered, narrower = np.random.default_rng(1), 0, 0
    for run in range(300):
        difficulty = rng.normal(size=(80, 1)) * 2
        a, b = (rng.random((80, 8)) < 1 / (1 + np.exp(-(difficulty + shift))) for shift in (0.0, 0.0))
        counts, other = measures.resamples(80, 300, run), measures.resamples(80, 300, run + 1000)
        first, second = measures.bootstrap(a, counts)["mean_accuracy"], measures.bootstrap(b, counts)["mean_accuracy"]
        low, high = measures.interval(first - second)
        covered += low <= 0 <= high
        apart = measures.interval(first - measures.bootstrap(b, other)["mean_accuracy"])
        narrower += high - low < apart[1] - apart[0]
    assert 0.9 <= covered / 300 <= 0.99 and narrower == 300


def test_shuffled_pss_has_the_distribution_of_all_ways_to_hand_out_each_items_answers():
    table = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=float)
    ways = [np.mean(rows, axis=0) for rows in itertools.product(*(itertools.permutations(row) for row in table))]
    exact = np.array([measures.pss(way) for way in ways])
    drawn = measures.pss(measures.shuffled_accuracy(table[None], 20_000))[:, 0]
    assert set(drawn.round(9)) == set(exact.round(9))
    for value in set(exact):
        assert np.isclose(drawn, value).mean() == pytest.approx(np.isclose(exact, value).mean(), abs=0.015)


def test_the_p_value_of_no_persona_effect_is_uniform_without_one_and_small_with_one():
    rng = np.random.default_rng(4)
    same = [measures.no_effect([table])["pss_shuffled_p"] for table in persona_tables(np.full(12, 0.5), 40, 60, rng)]
    assert np.mean(np.array(same) <= 0.05) <= 0.12 and 0.4 < np.mean(same) < 0.65  # ties round it up
    other = [measures.no_effect([table])["pss_shuffled_p"]
             for table in persona_tables(np.linspace(0.2, 0.6, 12), 60, 20, rng)]
    assert np.mean(np.array(other) <= 0.05) > 0.8


def test_several_runs_find_a_small_persona_effect_that_one_does_not():
    tables = list(persona_tables(np.linspace(0.42, 0.58, 12), 50, 20, np.random.default_rng(5)))
    assert measures.no_effect(tables)["pss_shuffled_p"] < 0.02 < np.median(
        [measures.no_effect([table])["pss_shuffled_p"] for table in tables])


def test_luck_that_several_runs_share_is_not_taken_for_a_persona_effect():
    """Seeds of one start model agree on which persona solves what: as many copies of a run say no more than one."""
    for table in persona_tables(np.full(12, 0.5), 40, 10, np.random.default_rng(6)):
        one, six = measures.no_effect([table]), measures.no_effect([table] * 6)
        assert one == pytest.approx(six)


@pytest.mark.parametrize("n_seeds", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_interval_over_training_seeds_covers_the_mean_of_all_seeds_in_simulation(n_seeds):
    rng, covered, spread = np.random.default_rng(n_seeds), 0, 0.1
    for run in range(400):
        levels = 0.5 + spread * rng.normal(size=n_seeds)  # what each seed's training came to
        tables = [(rng.random((60, 8)) < np.clip(level, 0, 1)).astype(float) for level in levels]
        draws = [measures.bootstrap(t, measures.resamples(60, 400, run), run)["mean_accuracy"] for t in tables]
        low, high = measures.interval(measures.over_seeds([t.mean() for t in tables], draws, seed=run)[1])
        covered += low <= 0.5 <= high
    assert 0.9 <= covered / 400 <= 0.99, covered / 400


def test_the_spread_of_training_seeds_is_students_t_and_one_seed_has_none():
    values = np.array([0.2, 0.5, 0.6])
    low, high = np.quantile(values @ measures.seed_spread(3, 200_000), [0.025, 0.975])
    half = 4.3027 * values.std(ddof=1) / np.sqrt(3)  # the 97.5 % point of t with 2 degrees of freedom
    assert [-low, high] == pytest.approx([half, half], rel=0.03)
    rng = np.random.default_rng(3)
    for n, t in ((2, 12.706), (3, 4.3027), (4, 3.1824), (6, 2.5706)):   # 97.5 % points, n - 1 degrees of freedom
        for values in rng.normal(size=(20, n)):
            low, high = np.quantile(values @ measures.seed_spread(n), [0.025, 0.975])
            half = t * values.std(ddof=1) / np.sqrt(n)
            assert [-low, high] == pytest.approx([half, half], rel=0.15 if n == 2 else 0.06)
    mean, draws = measures.over_seeds([0.2, 0.5, 0.6], np.zeros((3, 2, 2000)))
    half = 4.3027 * np.std([0.2, 0.5, 0.6], ddof=1) / np.sqrt(3)
    assert measures.interval(draws)[1] == pytest.approx(half, rel=0.06)
    assert not measures.seed_spread(1).any()


def test_wilson_equals_the_textbook_values_and_does_not_collapse_at_zero():
    assert measures.wilson(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-3)
    low, high = measures.wilson(0, 10)
    assert low == pytest.approx(0) and high == pytest.approx(0.2775, abs=1e-3)


@pytest.mark.parametrize("hits", range(6))
def test_pass_at_k_equals_the_mean_over_all_subsets_of_samples(hits):
    samples = [1] * hits + [0] * (5 - hits)
    for k in range(1, 6):
        brute = np.mean([max(s) for s in itertools.combinations(samples, k)])
        assert measures.pass_at_k(hits, 5, k) == pytest.approx(brute)


def test_identification_equals_the_hand_computed_posterior_and_ties_score_chance():
    logprobs = np.log([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [1 / 3, 1 / 3, 1 / 3], [0.0001, 0.0001, 0.9998]])
    hit, posterior = measures.identification(logprobs[:3])
    assert hit.tolist() == [1, 0, 1 / 3] and np.exp(posterior) == pytest.approx([0.6, 0.2, 1 / 3])
    hit, _ = measures.identification(np.log([[0.4, 0.4, 0.2], [0.1, 0.8, 0.1]]))
    assert hit.tolist() == [1 / 2, 1]


# ----------------------------------------------------------------------------------------------------------------------
# The loop, with a tiny random model behind the embedded model's tokenizer, and with the embedded model itself


@pytest.fixture(scope="module")
def tiny(embedded_tokenizer):
    """(a random 2-layer float32 model, the embedded model's tokenizer)."""
    torch.manual_seed(0)
    c = model_module.Config(vocab_size=len(embedded_tokenizer), hidden_size=32, intermediate_size=48, num_layers=2,
                            num_heads=4, num_kv_heads=2, head_dim=8, rms_eps=1e-5, max_positions=2048, tied=True,
                            attn_scale=8 ** -0.5, activation="silu", windows=[0, 0], rope=[{"rope_theta": 1e5}] * 2,
                            stop_ids=[2])
    model = model_module.Transformer(c)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4) if weight.dim() > 1 else torch.nn.init.ones_(weight)
    return model.eval(), embedded_tokenizer


def ready(pair):
    """(a sampler of the model, the tokenizer)"""
    return Sampler(pair[0]), pair[1]


Problem = namedtuple("Problem", "question answer id kind")


def voices(*descriptions):
    return [personas.Persona(name=d, text=f"You are {d}.", stratum="made up", split="test") for d in descriptions]


PROBLEMS = [Problem(f"What is {i} + {i}?", str(2 * i), f"sum-{i}", ("small", "large")[i > 2]) for i in range(1, 6)]
SPEAKERS = voices("a pirate", "a nurse", "a cook")
SHORT = evaluate.EvalParams(max_new_tokens=2)


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    params = evaluate.EvalParams(seed=3, max_new_tokens=6, samples=2, noise_floor=True)
    results = evaluate.evaluate(*ready(tiny), PROBLEMS, SPEAKERS, params, out,
                                {"model": "tiny", "task": "sums", "method": "start"})
    return results, out


def test_results_carry_what_the_design_names(evaluated):
    results, out = evaluated
    assert json.loads((out / "results.json").read_text()) == results
    for name in measures.SCORES:
        assert results[f"{name}_low"] <= results[name] + 1e-9 and results[name] <= results[f"{name}_high"] + 1e-9
    assert {"model", "task", "seed", "command", "commit", "seconds", "lottery", "noise_floor"} <= set(results)
    assert [row["name"] for row in results["personas"]] == ["none", "a pirate", "a nurse", "a cook"]
    assert all(row["n"] == 5 and row["stratum"] for row in results["personas"])
    for name in ("persona_sd", "pss_deconvolved"):
        assert results[f"{name}_low"] <= results[name] <= results[f"{name}_high"]
    # one stratum, one seed, and a model that is never right
    assert results["harmful_gap"] is results["persona_sd_common"] is results["persona_sd_logit"] is None
    assert "harmful personas cost in points: not measured" in evaluate.table_text(results)
    assert 0 < results["persona_sd_p"] <= 1 and results["pss_without_one"]["persona"] in results["correct"]
    assert len(results["lottery"]) == len(results["lottery_held_out"]) == 3  # none is no ticket of the lottery
    assert not list(out.glob("*.part"))


def test_p16_each_transcript_holds_the_answer_to_its_own_persona_and_problem(tiny, evaluated):
    rows = [json.loads(line) for line in (evaluated[1] / "transcripts.jsonl").read_text().splitlines()]
    greedy = [row for row in rows if row["temperature"] == 0]
    assert len(greedy) == 20 and len(rows) == 20 + 40
    for row in greedy[::3]:
        persona = next((p for p in SPEAKERS if p.name == row["persona"]), None)
        prompt = personas.prompt_ids(tiny[1], row["question"], persona)
        alone = next(rollout.generate(tiny[0], [prompt], SamplingParams(max_tokens=6, temperature=0.0)))
        assert tiny[1].decode(alone.tokens, skip_special_tokens=True) == row["answer"]


def test_each_personas_column_holds_the_verdicts_of_its_own_answers(tiny, monkeypatch):
    """The one who speaks is right about every third problem, each about others."""
    def right(i, who):
        return (i + who) % 3 == 0

    def answered(model, tokenizer, prompts, params, log=None):
        for ids in prompts:
            text = tokenizer.decode(ids)
            i = int(re.search(r"What is (\d+)", text)[1])
            who = next((n for n, voice in enumerate(SPEAKERS) if voice.text in text), 3)
            yield [(str(2 * i) if right(i, who) else "0", rollout.Completion(0, 0, [1], [0.0], False))]

    monkeypatch.setattr(answers, "sample", answered)
    got = evaluate.evaluate(*tiny, PROBLEMS, SPEAKERS, SHORT)
    assert got["correct"] == {name: "".join("01"[right(i, who)] for i in range(1, 6))
                              for who, name in enumerate([*(p.name for p in SPEAKERS), "none"])}


def test_answers_that_were_given_up_are_counted_and_told(tiny):
    """A model whose numbers overflow scores 0; that is not what it can do."""
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    results = evaluate.evaluate(Sampler(model), tiny[1], PROBLEMS[:2], SPEAKERS, SHORT)
    assert results["errors"] == 2 * 4 and "8 answers were given up" in evaluate.table_text(results)
    whole = evaluate.evaluate(*ready(tiny), PROBLEMS[:2], SPEAKERS, SHORT)
    assert whole["errors"] == 0 and "given up" not in evaluate.table_text(whole)
    assert f"pss would be {whole['pss_shuffled']:.3f}" in evaluate.table_text(whole)


def test_p26_evaluation_uses_the_training_template_verifier_and_sampler(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate.pool, "prompt_ids", lambda *a: seen.append(a[1:3]) or personas_prompt_ids(*a))
    monkeypatch.setattr(evaluate.rewards.Verifier, "submit",
                        lambda self, gold, answer, *more: submit(self, gold, f"It is {gold}.", *more))
    results = evaluate.evaluate(*ready(tiny), PROBLEMS, SPEAKERS, SHORT)
    assert results["mean_accuracy"] == 1 and results["pss"] == 1
    asked = [(problem.question, speaker) for speaker in (None, *SPEAKERS) for problem in PROBLEMS]
    assert seen == asked + asked[::len(PROBLEMS)]       # then the first problem's, for the digest of the template


personas_prompt_ids, submit = personas.prompt_ids, evaluate.rewards.Verifier.submit


def test_p26_pass_at_k_comes_with_intervals_and_rises_with_k(evaluated):
    got = rivals.pass_at_k([{"correct": c} for c in [0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0]], 2, 3, 0.7, 0)["k"]
    assert list(got) == ["1", "2", "3"] and list(evaluated[0]["pass_at_k"]["k"]) == ["1", "2"]
    assert [got[k]["none"] for k in got] == pytest.approx([1 / 3, 1 / 2, 1 / 2])  # items with 0 and 2 of 3 right
    assert got["1"]["personas"] == pytest.approx(1 / 2) and got["1"]["none_low"] == 0


def loud(problem, text, *, persona=None) -> float:
    """More than 1 for a persona's answer, less without one."""
    return len(text) + 1.0 if persona else 0.25


def test_a_users_reward_scores_the_answers_and_sees_who_speaks(tiny, tmp_path):
    params = evaluate.EvalParams(max_new_tokens=4, reward="tests.test_evaluate:loud")
    results = evaluate.evaluate(*ready(tiny), PROBLEMS, SPEAKERS, params, tmp_path)
    none, *others = [row["reward"] for row in results["personas"]]
    assert none == 0.25 and min(others) > 1 and results["mean_reward"] == pytest.approx(np.mean(others))
    rows = list(files.rows(tmp_path / "transcripts.jsonl"))
    assert all(row["reward"] == (0.25 if row["persona"] == "none" else len(row["answer"]) + 1) for row in rows)
    assert "tests.test_evaluate:loud, mean over personas" in evaluate.table_text(results)
    assert evaluate.main(["--reward", "tests.test_evaluate:absent"]) == 2


def test_an_evaluation_repeats_bit_for_bit_and_another_seed_samples_anew(tiny, evaluated):
    params = SamplingParams(2, max_tokens=6)
    first, again, other = (evaluate.ask(*ready(tiny), PROBLEMS, SPEAKERS, replace(params, seed=seed))
                           for seed in (3, 3, 4))
    assert first == again and [r["answer"] for r in first] != [r["answer"] for r in other]


def test_an_interrupted_evaluation_goes_on_and_samples_nothing_twice(tiny, tmp_path, monkeypatch):
    asked, real, params = [], Sampler.generate, evaluate.EvalParams(1, max_new_tokens=4, samples=2)

    def interrupted(sampler, prompts, sampling, **more):
        several = sampling.n == 2
        for done in itertools.islice(real(sampler, prompts, sampling, **more), 13 if several else None):
            asked.append((sampling.n, done.index))
            yield done
        if several:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(*ready(tiny), PROBLEMS, SPEAKERS, params, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["answers.jsonl.part"] and len(asked) == 20 + 13
    with (tmp_path / "answers.jsonl.part").open("a") as file:
        file.write('\n{"call": 1, "tok')  # as a kill in the middle of a write would leave it
    calls = []
    monkeypatch.setattr(Sampler, "generate", lambda sampler, prompts, sampling, **more:
                        calls.append((sampling.n, len(prompts))) or real(sampler, prompts, sampling, **more))
    resumed = evaluate.evaluate(*ready(tiny), PROBLEMS, SPEAKERS, params, tmp_path)
    assert calls[0] == (1, 0) and calls[1][0] == 2 and 20 - 13 // 2 <= calls[1][1] < 20
    whole = evaluate.evaluate(*ready(tiny), PROBLEMS, SPEAKERS, params, tmp_path / "whole")
    assert resumed | {"seconds": 0} == whole | {"seconds": 0} and not list(tmp_path.glob("*.part"))
    lines = [(folder / "transcripts.jsonl").read_text() for folder in (tmp_path, tmp_path / "whole")]
    assert lines[0] == lines[1]


def test_answers_of_other_weights_or_other_settings_are_not_taken_for_these(tiny, tmp_path):
    model, tokenizer = tiny
    prompts = [personas.prompt_ids(tokenizer, "Well?", persona) for persona in SPEAKERS]
    seen, weight = [], next(model.parameters())
    for seed, change in ((0, 0.0), (1, 0.0), (0, 1e-3)):
        with torch.no_grad():
            weight.add_(change)
        answers.sample(Sampler(model), tokenizer, prompts, SamplingParams(max_tokens=3, seed=seed), tmp_path / "log")
        seen.append(len(list(files.rows(tmp_path / "log"))))
    with torch.no_grad():
        weight.sub_(1e-3)
    assert seen == [3, 6, 9]


@pytest.mark.parametrize("problems, speakers", [([], SPEAKERS), (PROBLEMS, []), (PROBLEMS, SPEAKERS + SPEAKERS[:1]),
                                                (PROBLEMS, voices("none"))])
def test_an_evaluation_of_nothing_or_of_two_personas_with_one_name_is_refused(tiny, problems, speakers):
    with pytest.raises(ValueError, match="personas with different names"):
        evaluate.evaluate(*ready(tiny), problems, speakers, SHORT)


def vote(*answers):
    """Transcripts of one item whose gold answer is 5."""
    return [{"id": "1", "extracted": a, "correct": a == "5", "tokens": 10} for a in answers]


@pytest.mark.parametrize("answers, right", [(("5", "5", "4"), 1), (("4", "5", "4"), 0), (("", "", "5"), 1),
                                            (("", ""), 0), (("5", "4"), 1), (("4", "5"), 0)])
def test_the_majority_wins_abstentions_do_not_count_and_the_first_wins_a_tie(answers, right):
    assert measures.majority(vote(*answers)) == right


def test_rivals_are_charged_for_every_token_they_spend():
    rows = [{"id": str(i), "extracted": "5", "correct": persona != 1, "tokens": 10 * (1 + persona)}
            for persona in range(3) for i in range(4)]
    got = {row["name"]: (row["accuracy"], row["tokens_per_item"]) for row in rivals.rivals(rows, rows[:8], 2, 0)}
    assert got == {"no persona": (1, 10), "a persona at random": (0.5, 25),
                   "best of 2 personas, picked on a held-out half": (1, 50 + 25),
                   "majority of 2 personas": (1, 50), "majority of 2 samples without persona": (1, 30)}


def test_a_search_among_more_personas_is_charged_for_them():
    rows = [{"id": str(i), "extracted": "5", "correct": True, "tokens": 10} for _ in range(1 + 5) for i in range(4)]
    search = [row for row in rivals.rivals(rows, [], 5, 0) if row["name"].startswith("best of")]
    assert [(row["name"].split()[2], row["accuracy"], row["tokens_per_item"]) for row in search] == [
        ("2", 1, 2 * 10 + 10), ("4", 1, 4 * 10 + 10), ("5", 1, 5 * 10 + 10)]


def test_a_sum_of_logprobs_equals_the_plain_forward_of_prompt_and_completion(tiny):
    groups = [([5, 9, 2], [[7, 8], [1]]), ([4, 4, 4, 6], [[3, 2, 1, 9]])]
    want = []
    for prompt, completions in groups:
        for completion in completions:
            packed = model_module.pack([(prompt + completion[:-1], [completion[-1:]])], tiny[0])
            last = model_module.completion_logprobs(tiny[0], packed)[0].item()
            head = fidelity.total_logprobs(tiny[0], [(prompt, [completion[:-1]])])[0] if len(completion) > 1 else 0
            want.append(head + last)
    assert fidelity.total_logprobs(tiny[0], groups) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("n, k", [(8, 8), (24, 8), (11, 4), (5, 2)])
def test_candidates_are_k_different_personas_and_each_persona_is_asked_about_once(n, k):
    got = list(fidelity.blocks(n, k, np.random.default_rng(0)))
    assert sorted(np.concatenate([members for members, _ in got])) == list(range(n))
    for members, candidates in got:
        assert len(set(candidates)) == k and list(candidates[:len(members)]) == list(members)


def played(model, tokenizer, speakers, questions, start_model, max_new_tokens=5):
    params = fidelity.Fidelity(questions, start_model, max_new_tokens=max_new_tokens)
    return fidelity.fidelity(Sampler(model), tokenizer, speakers, params)


def test_identification_is_exactly_chance_where_all_personas_read_alike(tiny):
    alike = [personas.Persona(name=str(i), text="You are someone.", stratum="x", split="test") for i in range(8)]
    got, rows = played(*tiny, alike, ["How are you?", "Who is there?"], tiny[0])
    assert got["persona_identification"] == pytest.approx(1 / 8) == got["chance"]
    assert got["log_posterior"] == pytest.approx(math.log(1 / 8), abs=1e-4) and len(rows) == 16


def test_identification_is_at_chance_on_answers_given_without_a_persona(tiny, monkeypatch):
    asked, real = [f"Question {i}?" for i in range(12)], answers.sample

    def without_persona(sampler, tokenizer, prompts, *settings):
        bare = [personas.prompt_ids(tokenizer, question, None) for question in asked for _ in range(8)]
        assert len(bare) == len(prompts)
        return real(sampler, tokenizer, bare, *settings)

    monkeypatch.setattr(answers, "sample", without_persona)
    speakers = voices(*"pirate nurse cook judge monk clown spy king".split())
    got, _ = played(*tiny, speakers, asked, tiny[0])
    assert abs(got["persona_identification"] - 1 / 8) < 0.11  # 96 answers: three standard deviations


def test_the_model_reads_its_own_answers_beside_the_start_model(tiny, tiny_folder):
    """A model that has drifted: two readers, two tables, and each transcript has what both have read."""
    drifted, tokenizer = weights.load(str(tiny_folder), "float32", "cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in drifted.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    speakers = [personas.Persona(f"p{i}", f"w{i} w{i + 40}", "x", "test") for i in (10, 20, 30, 40)]    # words it knows
    got, rows = played(drifted, tokenizer, speakers, ["w5 w6"], tiny[0])
    assert got["self_log_posterior"] != got["log_posterior"] and set(fidelity.SCORES) == set(got["tables"])
    for row in rows:
        own = row["candidates"].index(row["persona"])
        for scores, hit in ((row["by_start"], row["persona_identification"]), (row["by_self"],
                                                                             row["self_identification"])):
            assert hit == (scores[own] == max(scores))
    alike, rows = played(*tiny, speakers, ["w5 w6"], tiny[0])
    assert alike["self_identification"] == alike["persona_identification"]
    assert all(row["by_start"] == row["by_self"] for row in rows)


@pytest.mark.slow
def test_the_embedded_model_plays_its_characters_well_enough_to_be_recognised():
    embedded = weights.load(weights.EMBEDDED)
    speakers = voices("a pirate captain", "a five-year-old child", "a nuclear physicist", "a medieval knight",
                      "a chef from Naples", "a cowboy in Texas", "a drill sergeant", "a Buddhist monk")
    got, _ = played(*embedded, speakers, ["How was your day?", "What are you afraid of?"], embedded[0], 24)
    assert got["persona_identification"] >= 0.8 and got["style_shift_low"] > 0 and got["candidates"] == 8


@pytest.mark.parametrize("flags, said", [
    (["--task", "nowhere.jsonl"], "nowhere.jsonl"), (["--personas", "no.jsonl"], "no.jsonl"),
    (["--limit", "0"], "at least 1"), (["--compare", "one"], "at least two"),
    (["--compare", "a", "b", "--roles", "x"], "one name"), (["--max-new-tokens", "0"], "at least 1"),
    (["--fidelity", "-1"], "at least 0"), (["--samples", "-2"], "at least 0"), (["--limit", "-3"], "--limit must be"),
    (["--temperature", "-1", "--samples", "2"], "above 0"), (["--temperature", "nan", "--samples", "2"], "above 0"),
    (["--temperature", "inf", "--noise-floor"], "above 0"), (["--temperature", "0.3"], "--samples or --noise-floor"),
    (["--seed", "-1"], "at least 0"), (["--fidelity", "65"], "at most 64"), (["--start-model", "x"], "--fidelity"),
    (["--model", ""], "--model is empty"), (["--method", " "], "--method is empty"), (["--reward", ""], "is empty"),
    (["--reward", "nothing"], "module:function"), (["--reward-seconds", "5"], "without --reward"),
    (["--reward", "rewards:correctness", "--reward-seconds", "nan"], "above 0"),
    (["--judge-price", "0", "nan"], "--judge-price must be"),
    (["--judge-concurrency", "0"], "at least 1"), (["--judge", "http://x"], "--judge does nothing without"),
    (["--judge-model", "x"], "--personagym"), (["--judge", "x", "--personagym", "no.jsonl"], "must be a URL"),
    (["--personagym", "no.jsonl"], "no file no.jsonl"), (["--personagym", ""], "--personagym is empty"),
    (["--task", "aritmetic"], "did you mean arithmetic"), (["--personas", "tset"], "no personas called 'tset'"),
    (["--roles", "a", "b"], "--roles does nothing without --compare"), (["--device", "cuda"], "--device cuda"),
    (["--compare", "a", "b", "--model", "x"], "--compare does not read --model"),
    (["--fidelity", "--personas", "ONE"], "--fidelity needs 2 personas"),
    (["--compare", "no_a", "no_b"], "no_a"), (["--model", "/nowhere/model"], "nowhere")])
def test_a_users_mistake_is_one_line_and_exit_2(flags, said, capsys, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"name": "a", "text": "You are a.", "stratum": "x"}\n')
    flags = [str(tmp_path / "one.jsonl") if flag == "ONE" else flag for flag in flags]
    assert evaluate.main([*flags, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and not (tmp_path / "out").exists()


def test_an_evaluation_is_of_one_process_and_replaces_no_other_models(tiny_folder, tmp_path, monkeypatch, capsys):
    flags = ["--limit", "2", "--max-new-tokens", "3", "--out", str(tmp_path / "out"), "--model"]
    for name in ("a", "b"):
        shutil.copytree(tiny_folder, tmp_path / name)
    assert evaluate.main([*flags, str(tmp_path / "a")]) == evaluate.main([*flags, str(tmp_path / "a")]) == 0
    before = (tmp_path / "out/results.json").read_bytes()
    capsys.readouterr()
    assert evaluate.main([*flags, str(tmp_path / "b")]) == 2 and (tmp_path / "out/results.json").read_bytes() == before
    assert f"holds an evaluation of model {tmp_path / 'a'}: give another --out" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    for program, own in ((evaluate, flags[:-1]), (rollout, [])):
        assert program.main([*own, "--model", str(tmp_path / "a")]) == 2
        assert "start it with python" in capsys.readouterr().err


def test_an_answer_longer_than_the_model_and_an_out_that_is_a_file_are_refused(tiny_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    flags = ["--model", str(tiny_folder), "--max-new-tokens", "512", "--out"]
    for out, said in ((tmp_path / "out", "has 512 positions"), (tmp_path / "file", "lies in, a file"),
                      (tmp_path / "file/out", "lies in, a file")):
        assert evaluate.main([*flags, str(out)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_start_model_is_asked_as_train_py_asks(tiny_folder, tmp_path, monkeypatch):
    told, own = [], tmp_path / "own.jsonl"
    own.write_text('{"question": "w1?", "answer": "w1"}\n')
    monkeypatch.setattr(evaluate, "evaluate", lambda *given: told.append((given[6]["prompt"], given[4].max_new_tokens)))
    for task in (str(own), "facts"):
        evaluate.one_arm(evaluate.parse(["--model", str(tiny_folder), "--task", task, "--dtype", "float32"]))
        trained = train.settings(["--task", task])
        assert told[-1] == (trained.prompt, trained.max_new_tokens)
    assert told == [("short", 48), ("plain", 32)]


def test_a_users_files_are_evaluated_whole_and_the_file_of_the_run_only_where_it_was_not_trained_on(
        tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder, tmp_path / "run/model")
    task, who = tmp_path / "sums.jsonl", tmp_path / "who.jsonl"
    task.write_text("".join(json.dumps({"question": f"w{i}?", "answer": f"w{i}"}) + "\n" for i in range(20)))
    who.write_text("".join(json.dumps({"name": f"w{i}", "text": f"w{i}.", "stratum": "x", "split": split}) + "\n"
                           for i, split in ((7, "train"), (8, "test"), (9, "test"))))
    held_out = [problem.id for problem in tasks.load(str(task), "test")]
    assert 0 < len(held_out) < 20
    warning = f"warning: the model was trained on all of {task}\n"
    every, told = [str(i) for i in range(1, 21)], ["--trained-on", str(task)]
    for trained, other, flags, ids, said in (
            ("arithmetic", None, [], every, ""), ("arithmetic", None, told, held_out, ""),
            (str(task), None, [], held_out, ""), (str(task), "x.jsonl", [], held_out, warning)):
        settings = {"method": "permix", "seed": 0, "task": trained, "eval_task": other}
        (tmp_path / "run/config.json").write_text(json.dumps({"settings": settings}))
        (tmp_path / "run/metrics.jsonl").touch()
        flags += ["--out", str(tmp_path / "out"), "--max-new-tokens", "2", "--dtype", "float32"]
        assert evaluate.main(["--model", str(tmp_path / "run/model"), "--task", str(task), "--personas", str(who),
                              *flags]) == 0
        results = json.loads((tmp_path / "out/results.json").read_text())
        assert [item["id"] for item in results["items"]] == ids
        assert list(results["correct"]) == ["none", "w8", "w9"]
        assert capsys.readouterr().err == (f"{said}{task}: {len(ids)} problems, golds: {len(ids)} text; "
                                           f"{who}: 2 personas, 2 x\n")


def test_p29_an_unknown_flag_is_an_error_and_help_fits_a_screen_or_two(script):
    got = script("evaluate.py", "--personnas", "x")
    assert got.returncode == 2 and "personnas" in got.stderr
    with pytest.raises(SystemExit, match="0"):
        evaluate.parse(["--help"])


@pytest.mark.parametrize("prompt", tasks.PROMPTS)
def test_a_problem_is_put_as_the_prompt_style_says(prompt):
    problem = tasks.Problem(question="1 + {1}?", answer="2", id="1", kind="sum")
    (got,) = tasks.put([problem], prompt)
    assert got.question == tasks.PROMPTS[prompt].replace("{question}", "1 + {1}?").replace("{{}}", "{}")
    assert (got.answer, got.id, got.kind) == ("2", "1", "sum")


def test_the_few_shot_examples_are_right_and_of_no_task_that_is_evaluated():
    for question, answer in tasks.EXAMPLES:
        gold = answer.split("The answer is ")[1].rstrip(".")
        assert evaluate.rewards.verify(gold, answer).verdict == "correct" and question in tasks.PROMPTS["few-shot"]
        assert all(eval(left) == int(right) for left, right in re.findall(r"([\d+*/ -]+) = (\d+)", answer))
    asked = {problem.question for problem in tasks.load("arithmetic", "all", 0, 300)}
    for file in SHARED.glob("*.jsonl") if SHARED.exists() else ():
        asked |= {row.get("question") or row.get("problem") for row in files.rows(file)}
    assert not asked & {question for question, _ in tasks.EXAMPLES}


def test_a_judge_that_only_babbles_is_counted_reported_and_called_unusable(tiny, tmp_path):
    asked = [{"persona": persona, "task": task, "question": "Well?"} for persona in ("A nurse", "A pirate")
             for task in judge.TASKS]
    gym = judge.PersonaGym(asked, judge.local(*ready(tiny)), "tiny", tmp_path / "new", max_new_tokens=3)
    got = judge.personagym(*ready(tiny), gym)
    rows = list(files.rows(tmp_path / "new/personagym.jsonl"))
    assert [row["question"] for row in rows] == ["Well?"] * 10 and {row["score"] for row in rows} == {1}
    assert got["unparsed"] == 18 and got["persona_score"] == 1 and got["usable"] is False and got["judge"] == "tiny"


def test_the_ranks_sample_a_share_each_and_all_get_every_answer(tiny, tmp_path, monkeypatch):
    """Also those that rank 0's log holds already: rank 1 has no log."""
    model, tokenizer = tiny
    prompts, params, log = [[3, 4, n] for n in range(5, 12)], SamplingParams(2, max_tokens=3), tmp_path / "log"
    alone = answers.sample(Sampler(model), tokenizer, prompts, params, log)
    kept = [row for row in files.rows(log) if row["index"] in (1, 4)]
    log.write_text("".join(json.dumps(row) + "\n" for row in kept))
    here, meet, sent, shares = threading.local(), threading.Barrier(2, timeout=60), [], {}

    def broadcast(box):
        sent.extend(box if here.rank == 0 else [])
        meet.wait()
        box[0] = copy.deepcopy(sent[-1])

    def gather(parts, mine):
        shares[here.rank] = mine
        meet.wait()
        parts[:] = [shares[0], shares[1]]

    def of_rank(rank):
        here.rank = rank
        sampler = Sampler(copy.deepcopy(model))
        return answers.sample(sampler, tokenizer, prompts, params, None if rank else log)

    for name, fake in (("is_initialized", lambda: True), ("get_world_size", lambda: 2), ("all_gather_object", gather),
                       ("get_rank", lambda: here.rank), ("broadcast_object_list", broadcast)):
        monkeypatch.setattr(answers.dist, name, fake)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(of_rank, range(2)))
    assert [sorted({c.index for c in shares[rank]}) for rank in (0, 1)] == [[0, 3, 6], [2, 5]]
    for answered in found:
        assert [[text for text, _ in row] for row in answered] == [[text for text, _ in row] for row in alone]
