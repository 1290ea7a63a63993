"""What the flags, the prompts and the papers say is what reaches the weights: each test computes it in its own way."""

import copy
import inspect
import json
import math
import random
import statistics
from collections import defaultdict
from functools import cache
from operator import attrgetter
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import grpo
import personas
import tasks
import train
import training.minibatches
import training.run
import weights
from evaluation import fidelity
from model import completion_hidden, pack
from rollout import Sampler, SamplingParams
from tests.conftest import SIZES, masters
from tests.test_train import arguments, gradients_of, one_batch, step_on
from training import anchor, monitor
from training.policy import Policy
from training.settings import FLAGS

DISTANCE = 1e-5                                         # relative, between fp32 and the formula in float64


# -- the gradient of a step ------------------------------------------------------------------------------------------

SHIFTS = (0.0, 0.3, -0.3, 1.2, -1.2, 0.1)               # sampler above trainer: ratios on both sides of [0.5, 2]
REFERENCE, MOVED = 0.7, 1.3                             # the last norm's weight of the start model, after a step
STEPS = "--temperature 0.6 --inner-epochs 2 --micro-tokens 90 "
WANTED = {"loss": "grpo", "advantage": "mean", "normaliser": "token", "clip_low": 0.2, "clip_high": 0.2,
          "dual_clip": None, "correction": "none", "kl_coef": 0.0, "kl": "k3", "kl_in": "loss", "entropy_coef": 0.0,
          "overlong_buffer": 0, "temperature": 0.6, "inner_epochs": 2, "method": "permix"}
CASES = [
    "", "--advantage rloo --normaliser sequence", "--advantage std --normaliser constant --clip-low 0.05",
    "--clip-high 0.02 --dual-clip 1.03", "--loss reinforce --inner-epochs 1", "--loss grpo", "--loss dr_grpo",
    "--loss dapo --clip-high 0.3", "--loss gspo --clip-low 0.02 --clip-high 0.02", "--loss cispo --clip-high 0.05",
    "--correction truncate", "--correction mask", "--loss gspo --correction truncate",
    "--kl-coef 0.3", "--kl-coef 0.3 --kl k1", "--kl-coef 0.3 --kl k2", "--entropy-coef 0.2",
    "--kl-coef 0.3 --kl k1 --kl-in reward", "--overlong-buffer 5", "--truncated mask", "--truncated zero",
    "--mix rollout --persona-prob 0.5 --micro-tokens 60 --entropy-coef 0.2",
    "--method sft --temperature 1 --inner-epochs 1", "--method distill --temperature 1 --inner-epochs 1"]


def told(flags: str) -> dict:
    """What the flags of a case say, over a paper's numbers, over the defaults."""
    given = dict(zip(flags.split()[::2], flags.split()[1::2], strict=True))
    given = {name[2:].replace("-", "_"): value for name, value in given.items()}
    recipe = grpo.RECIPES.get(given.get("loss"), {})
    numbers = {name: float(value) for name, value in given.items() if isinstance(WANTED.get(name), float | int)}
    numbers |= {"dual_clip": float(given["dual_clip"])} if "dual_clip" in given else {}
    return WANTED | recipe | given | numbers


@cache
def plain(folder, scale: float = 1.0):
    """transformers' model in float64, with another last norm."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.model.norm.weight.detach().mul_(scale)
    return model


def read_out(model, rows, temperature):
    """[(log-probs [L], entropies [L])] of each (prompt, completion): right-padded, where nothing looks."""
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.tensor([prompt + completion + [0] * (longest - len(prompt) - len(completion))
                        for prompt, completion in rows])
    log_p, out = (model(ids).logits / temperature).log_softmax(-1), []
    for (prompt, completion), row in zip(rows, log_p, strict=True):
        row = row[len(prompt) - 1:len(prompt) + len(completion) - 1]
        out.append((row.gather(-1, torch.tensor(completion)[:, None])[:, 0], -(row.exp() * row).sum(-1)))
    return out


def advantages_of(rewards, want):
    """Of one group, a list."""
    mean, G = statistics.fmean(rewards), len(rewards)
    scale = {"mean": 1.0, "rloo": G / (G - 1), "std": 1 / (statistics.stdev(rewards) or 1)}[want["advantage"]]
    return [(reward - mean) * scale for reward in rewards]


def surrogate(want, now, old, advantage):
    """[L] what a completion's tokens add to the objective, before weights and correction."""
    log_ratio = now - old
    if want["loss"] == "gspo":
        log_ratio = log_ratio.mean().expand_as(now)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - want["clip_low"], 1 + want["clip_high"])
    if want["loss"] == "reinforce":
        return now * advantage
    if want["loss"] == "cispo":
        return bounded.detach() * advantage * now
    smaller = torch.minimum(ratio * advantage, bounded * advantage)
    if want["dual_clip"] and advantage < 0:
        smaller = smaller.clamp(min=want["dual_clip"] * advantage)
    return smaller


def corrected(want, old, sampled):
    over = (old - sampled).sum().expand_as(old) if want["loss"] == "gspo" else old - sampled
    ratio = over.exp()
    if want["correction"] == "mask":
        return ratio * ((ratio >= 0.5) & (ratio <= 2))
    return ratio.clamp(max=2) if want["correction"] == "truncate" else torch.ones_like(ratio)


def divergence(want, now, old, start):
    d = start - now
    if want["kl"] == "k1":
        return -d * (now - old).exp()
    return d ** 2 / 2 if want["kl"] == "k2" else d.exp() - 1 - d


def formula(model, behind, start, batch, want):
    """The loss of an optimizer step by the papers, a completion at a time. behind: the model before the batch."""
    rows = [(prompt, completion) for prompt, group in batch.groups for completion in group]
    T, G = want["temperature"], batch.rewards.shape[1]
    with torch.no_grad():
        old, reference = ([logprobs for logprobs, _ in read_out(m, rows, T)] for m in (behind, start))
    sampled = [torch.tensor(c.logprobs, dtype=torch.float64) for c in batch.completions]
    rewards, kept = batch.rewards.flatten().tolist(), batch.kept.flatten().tolist()
    imitates = want["method"] in ("sft", "distill")
    for i, (_, completion) in enumerate(rows):
        if want["overlong_buffer"]:
            rewards[i] += max(-1, min(0, (6 - want["overlong_buffer"] - len(completion)) / want["overlong_buffer"]))
        if want["kl_in"] == "reward":
            rewards[i] -= want["kl_coef"] * (sampled[i] - reference[i]).sum().item()
        kept[i] = kept[i] and (not imitates or rewards[i] > 0)
    tokens, count = sum(len(c) for (_, c), k in zip(rows, kept, strict=True) if k), sum(kept)
    total = torch.zeros((), dtype=torch.float64)
    for i, (now, entropy) in enumerate(read_out(model, rows, T)):
        if not kept[i]:
            continue
        first = i // G * G
        advantage = rewards[i] if imitates else advantages_of(rewards[first:first + G], want)[i - first]
        gain = surrogate(want, now, old[i], advantage) * corrected(want, old[i], sampled[i])
        gain = gain + want["entropy_coef"] * entropy
        if want["kl_in"] == "loss":
            gain = gain - want["kl_coef"] * divergence(want, now, old[i], reference[i])
        weight = {"token": 1 / tokens, "sequence": 1 / (len(now) * count), "constant": 1 / (6 * count)}
        total = total - (weight[want["normaliser"]] * gain).sum()
    return total


@pytest.fixture
def many_stops(monkeypatch):
    """A sixth of all words end a completion, so that lengths differ."""
    load = weights.load

    def loaded(*args):
        model, tokenizer = load(*args)
        model.c.stop_ids = [2, *range(3, 20)]
        return model, tokenizer

    monkeypatch.setattr(weights, "load", loaded)


def crossed(number: int) -> str:
    """Flags of the cases above, thrown together as far as the settings let them."""
    rng = random.Random(number)
    while True:
        loss = rng.choice(list(grpo.RECIPES))
        flags = f"--loss {loss} --mix {rng.choice(['prompt', 'rollout'])} --persona-prob {rng.choice([0, 0.5, 1])} " \
                f"--micro-tokens {rng.choice([1, 60, 5000])} --temperature {rng.choice([0.6, 1.0, 1.4])}"
        others = [f"--advantage {rng.choice(['mean', 'std', 'rloo'])}", "--entropy-coef 0.2",
                  f"--correction {rng.choice(['truncate', 'mask'])}",
                  f"--normaliser {rng.choice(['token', 'sequence', 'constant'])}",
                  "--overlong-buffer 5", f"--truncated {rng.choice(['mask', 'zero', 'keep'])}", "--dual-clip 1.6",
                  f"--kl-coef 0.3 --kl {rng.choice(['k1', 'k2', 'k3'])} --kl-in {rng.choice(['loss', 'reward'])}"]
        flags = " ".join([flags, *(other for other in others if rng.random() < 0.5),
                          *(["--inner-epochs 1"] if loss == "reinforce" else [])])
        try:
            train.settings([*STEPS.split(), *flags.split()], quiet=True)
        except ValueError:
            continue
        return flags


@pytest.mark.parametrize("flags", [*CASES, *(pytest.param(crossed(number), marks=pytest.mark.slow)
                                             for number in range(40))])
def test_the_gradient_of_each_optimizer_step_is_that_of_the_papers_formula(tiny_folder, many_stops, flags):
    """At another temperature, with lengths that differ, a flat group, a sampler that is off, a moved start model."""
    want = told(flags)
    job, batch = one_batch(tiny_folder, *(STEPS + flags).split())
    lengths = {len(c.tokens) for c in batch.completions}
    assert len(lengths) > 1 or want["method"] == "sft"
    if want["method"] in ("permix", "distill"):
        batch.rewards[0] = torch.tensor([1.0, 0, 0, 0]) * batch.kept[0]
        batch.rewards[1] = 0.5                          # a flat group
    for i, completion in enumerate(batch.completions):
        completion.logprobs = [x + SHIFTS[(i + t) % 6] for t, x in enumerate(completion.logprobs)]
    if job.reference:
        job.reference.norm.weight.detach().mul_(REFERENCE)
    found = gradients_of(job, batch, MOVED)
    assert len(found) == want["inner_epochs"]
    behind, start, names = plain(tiny_folder), plain(tiny_folder, REFERENCE), dict(job.model.named_parameters())
    for gradient, model in zip(found, (behind, plain(tiny_folder, MOVED)), strict=False):
        parameters = dict(model.named_parameters())
        exact = torch.autograd.grad(formula(model, behind, start, batch, want),
                                    [parameters[f"model.{name}"] for name in names])
        exact = torch.cat([g.flatten() for g in exact])
        assert (gradient - exact).norm() <= DISTANCE * exact.norm() > 0


def test_the_gap_that_is_logged_is_the_mean_distance_of_both_log_probs(tiny_folder):
    job, batch = one_batch(tiny_folder, "--temperature", "0.6")
    for completion in batch.completions:
        completion.logprobs = [x + (-0.1) ** (t % 2) * 0.1 ** ((t + 1) % 2) for t, x in enumerate(completion.logprobs)]
    assert step_on(job, batch)["sampler_trainer_gap"] == pytest.approx(0.1, abs=1e-5)


# -- flags -----------------------------------------------------------------------------------------------------------


def zero_reward(problem, text: str, *, persona=None) -> float:
    return 0.0


# a flag: its value here, where it acts (what is called, with which argument), and what it is there
ARRIVALS = {
    "method": ("permix", "learn", "job.imitates", False), "seed": ("3", "batch", "seed", 3),
    "task": ("facts", "load_task", "task", "facts"), "steps": ("2", "learn", "step", 1),
    "persona-prob": ("0.9", "mix", "prob", 0.9), "mix": ("rollout", "mix", "mode", "rollout"),
    "personas": ("conflict-train", "load_personas", "which", "conflict-train"), "prompts": ("3", "batch", "size", 3),
    "group-size": ("2", "mix", "group_size", 2), "max-new-tokens": ("5", "generate", "params.max_tokens", 5),
    "temperature": ("0.9", "micro_loss", "temperature", 0.9), "stop": ("w9", "generate", "params.stop", ("w9",)),
    "prompt": ("cot", "put", "prompt", "cot"), "dynamic-sampling": ("1", "batch", "rounds", 2),
    "reward": ("tests.test_wiring:zero_reward", "Rewarder", "spec", "tests.test_wiring:zero_reward"),
    "reward-seconds": ("7", "Rewarder", "time_limit_s", 7), "truncated": ("mask", "truncation", "policy", "mask"),
    "overlong-buffer": ("2", "overlong_penalty", "buffer", 2), "loss": ("cispo", "micro_loss", "loss.name", "cispo"),
    "advantage": ("rloo", "group_advantages", "kind", "rloo"), "clip-low": ("0.9", "micro_loss", "loss.clip_low", 0.9),
    "normaliser": ("constant", "token_weights", "kind", "constant"), "kl": ("k2", "kl", "kind", "k2"),
    "clip-high": ("3", "micro_loss", "loss.clip_high", 3), "correction": ("mask", "sampler_correction", "kind", "mask"),
    "kl-coef": ("0.1", "micro_loss", "loss.kl_coef", 0.1), "warmup": ("3", "Policy", "warmup", 3),
    "entropy-coef": ("0.02", "micro_loss", "loss.entropy_coef", 0.02), "shard": ("1", "Policy", "shard", 1),
    "anchor-coef": ("0.3", "learn", "job.args.anchor_coef", 0.3), "anchor-count": ("2", "packed", "answers", 2),
    "anchor-answers": ("3", "generate", "answers", 3), "anchor-tokens": ("4", "generate", "params.max_tokens", 4),
    "learning-rate": ("2e-3", "Policy", "learning_rate", 2e-3), "max-grad-norm": ("0.5", "optimize", "max_norm", 0.5),
    "inner-epochs": ("2", "optimize", "number", 8), "minibatches": ("2", "optimize", "number", 8),
    "dtype": ("bfloat16", "Policy", "model.dtype", torch.bfloat16), "device": ("cpu", "load_model", "device", "cpu"),
    "micro-tokens": ("300", "chunks", "limit", 300), "recompute": (None, "Policy", "model.checkpointing", True),
    "slots": ("5", "Sampler", "slots", 5), "no-cuda-graphs": (None, "Sampler", "cuda_graphs", False),
    "eval-task": ("arithmetic", "load_task", "task", "arithmetic"), "eval-problems": ("4", "load_task", "limit", 4),
    "eval-pool": ("conflict-test", "load_personas", "which", "conflict-test"),
    "eval-personas": ("3", "few", "count", 3), "save-every": ("1", "save", "step", 1),
    "keep": ("7", "Checkpoints", "keep", 7), "async-save": (None, "Checkpoints", "background", True),
    "progress": (None, "tqdm", "disable", False), "optimizer": ("adamw8bit", "Policy", "eight_bit", True),
    "lora-rank": ("3", "add", "rank", 3), "lora-alpha": ("6", "add", "alpha", 6),
    "lora-targets": ("q_proj", "add", "targets", ["q_proj"]),
}
ELSEWHERE = {"model", "chat-template", "columns", "out", "resume", "unset", "overlap", "teacher", "memory", "tracker",
             "profile", "kl-in", "dual-clip", "anchor-on", "anchor-loss"}


def spy(monkeypatch, seen, owner, name, known_as=None):
    """Keeps the arguments of each call by name; the calls go through."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        calls = seen[known_as or name]
        told = bound.arguments | bound.kwargs
        calls.append(SimpleNamespace(**told, number=len(calls) + 1))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture(scope="module")
def seen(tiny_folder, tmp_path_factory):
    """All calls of a run with a distinct value of each flag that goes with the others."""
    seen = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((train, ("learn", "micro_loss", "Policy", "Checkpoints")), (tasks, ("batch", "put")),
                             (personas, ("mix", "few")), (training.run, ("Rewarder",)),
                             (monitor, ("tqdm",)),
                             (grpo, ("truncation", "overlong_penalty", "group_advantages", "token_weights", "kl",
                                     "sampler_correction")), (train.Checkpoints, ("save",))):
            for name in names:
                spy(patch, seen, owner, name)
        spy(patch, seen, tasks, "load", "load_task")
        spy(patch, seen, personas, "load", "load_personas")
        spy(patch, seen, weights, "load", "load_model")
        spy(patch, seen, training.run.lora, "add")
        spy(patch, seen, Sampler, "generate")
        spy(patch, seen, Sampler, "__init__", "Sampler")
        spy(patch, seen, Policy, "step", "optimize")
        spy(patch, seen, training.minibatches, "chunks")
        spy(patch, seen, anchor, "pack", "packed")
        flags = [x for name, (value, *_) in ARRIVALS.items() for x in (f"--{name}", value) if x is not None]
        out = tmp_path_factory.mktemp("seen") / "run"
        assert train.main(["--model", str(tiny_folder), "--out", str(out), *flags]) == 0
    for call in seen["generate"]:
        call.answers = len(call.prompts)
    for call in seen["packed"]:
        call.answers = len(call.groups)
    return seen


@pytest.mark.parametrize("flag", ARRIVALS)
def test_p29_a_flag_arrives_where_it_acts(seen, flag):
    _, where, argument, value = ARRIVALS[flag]
    assert value in [attrgetter(argument)(call) for call in seen[where]]


def test_p29_every_flag_is_one_whose_arrival_is_tested():
    """Those of ELSEWHERE by the cases above (kl-in, dual-clip), by the test below, or by what they do."""
    assert {name for name, *_ in FLAGS} == ARRIVALS.keys() | ELSEWHERE


def test_the_teacher_writes_what_distill_learns(tiny_folder, tmp_path):
    model, tokenizer = weights.load(str(tiny_folder), "float32")
    model.norm.weight.detach().mul_(0.5)
    weights.save(model, tokenizer, tmp_path / "teacher")
    job, batch = one_batch(tiny_folder, "--method", "distill", "--teacher", str(tmp_path / "teacher"), "--temperature",
                           "1", "--kl-coef", "0.1")
    assert torch.equal(job.author.norm.weight, model.norm.weight) and job.reference is not job.author
    for group, written in zip(batch.groups, batch.completions[::4], strict=True):
        logprobs = train.completion_logprobs(model, pack([group], model))[0].tolist()
        assert logprobs[:len(written.tokens)] == pytest.approx(written.logprobs, abs=1e-4)


# -- the rows of a roll-out ------------------------------------------------------------------------------------------


def name_reward(problem, text: str, *, persona=None) -> float:
    """Another number for each problem, text and persona."""
    return crc32(f"{problem.id}|{text}|{persona and persona.name}".encode()) % 1000 / 1000


@pytest.fixture(scope="session")
def wordy(embedded_tokenizer, tmp_path_factory):
    """The folder of a tiny random model behind the embedded model's tokenizer: prompts that can be read."""
    folder, tokenizer = tmp_path_factory.mktemp("wordy"), embedded_tokenizer
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("llama", **sizes | {"tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("more", [["--mix", "prompt"], ["--mix", "rollout", "--prompt", "cot"], ["--prompt", "short"],
                                  ["--method", "sft", "--temperature", "1"], ["--dynamic-sampling", "1"]])
def test_p16_p27_each_row_has_its_own_question_persona_text_and_reward(wordy, more):
    """Few slots: completions finish out of order."""
    rho = ["--persona-prob", "0.5"]
    job, batch = one_batch(wordy, "--slots", "3", *rho, *more, "--reward", "tests.test_wiring:name_reward")
    style = more[more.index("--prompt") + 1] if "--prompt" in more else "plain"
    asked = {p.id: p for p in tasks.load("arithmetic", "train", 0)}
    B, G = batch.rewards.shape
    prompts = [prompt for prompt, group in batch.groups for _ in group]
    texts = [job.tokenizer.decode(ids, skip_special_tokens=True) for _, group in batch.groups for ids in group]
    assert B == len(batch.problems) == len(batch.personas) and len(prompts) == B * G
    assert texts == batch.texts and [c.tokens for c in batch.completions] == [c for _, g in batch.groups for c in g]
    speakers = [persona for row in batch.personas for persona in row]
    assert None in speakers and any(speakers)
    for i, persona in enumerate(speakers):
        problem, prompt = batch.problems[i // G], job.tokenizer.decode(prompts[i])
        question = tasks.PROMPTS[style].format(question=asked[problem.id].question)
        assert problem.answer == asked[problem.id].answer and question in prompt
        assert [p for p in personas.load("train") if p.text in prompt] == ([persona] if persona else [])
        assert batch.rewards[i // G, i % G].item() == pytest.approx(name_reward(problem, texts[i], persona=persona))
        if job.imitates:                                # the gold answer, and where it ends
            assert texts[i] == f"The answer is {problem.answer}."
            assert batch.completions[i].tokens[-1] == job.tokenizer.eos_token_id


def test_p26_the_evaluation_asks_test_problems_of_test_personas_as_training_asks_its_own(tiny_folder):
    job = train.read(arguments(tiny_folder, "--eval-problems", "7", "--eval-personas", "5", "--prompt", "cot"))
    problems, speakers = job.held_out
    assert problems == tasks.put(tasks.load("arithmetic", "test", 0, 7), "cot")
    assert len(speakers) == 5 and {p.text for p in speakers} < {p.text for p in personas.load("test")}
    assert not {p.id for p in problems} & {p.id for p in job.problems}
    assert not {p.text for p in speakers} & {p.text for p in job.pool}


def test_the_sampler_gets_the_temperature_and_another_seed_in_each_step_round_and_run(tiny_folder, monkeypatch):
    calls = defaultdict(list)
    spy(monkeypatch, calls, Sampler, "generate")
    for seed in ("0", "1"):
        args = arguments(tiny_folder, "--dynamic-sampling", "2", "--temperature", "0.6", "--seed", seed, "--steps", "3",
                         "--reward", "tests.test_train:flat_reward")
        job = train.read(args)
        with job.rewarder:
            list(train.rollouts(job, 0))
    calls = calls["generate"]
    assert len(calls) == len({call.params.seed for call in calls}) == 2 * 3 * 3
    for call in calls:
        assert call.params.temperature == 0.6 and call.params.n == 4 and call.params.top_p == 1
        assert len(set(call.keys)) == len(call.prompts)


def test_the_ranks_share_a_steps_problems_and_their_samples_are_those_of_one_rank(tiny_folder, monkeypatch):
    def rolled(rank, world):
        monkeypatch.setattr(train, "ranks", lambda: (rank, world))
        job = train.read(arguments(tiny_folder, "--prompts", "4"))
        with job.rewarder:
            batch = train.roll_out(Sampler(job.model), job, 0)
        return [p.id for p in batch.problems], batch.personas, [c.tokens for c in batch.completions]

    one, first, second = rolled(0, 1), rolled(0, 2), rolled(1, 2)
    assert one == tuple(a + b for a, b in zip(first, second, strict=True))


def test_a_soft_cap_bends_the_sampler_s_logits_and_the_trainer_s(tiny_folder):
    model = weights.load(str(tiny_folder), "float32")[0]
    model.c.softcap = 0.5
    done = next(Sampler(model).generate([[5, 6, 7]], SamplingParams(max_tokens=6, temperature=0.6)))
    group = [([5, 6, 7], [done.tokens])]
    plain = completion_hidden(model, pack(group, model)) @ model.head_weight.T
    exact = (0.5 * (plain.double() / 0.5).tanh() / 0.6).log_softmax(-1).gather(-1, torch.tensor(done.tokens)[:, None])
    trainer = train.completion_logprobs(model, pack(group, model), 0.6)[0]
    assert done.logprobs == pytest.approx(exact[:, 0].tolist(), abs=1e-4)
    assert trainer.tolist() == pytest.approx(exact[:, 0].tolist(), abs=1e-4)


def test_p15_a_step_samples_from_the_weights_that_the_step_before_has_left(tiny_folder):
    """In bf16 too, where the sampler works on rearranged copies of the weights."""
    for dtype, close in (("float32", 1e-4), ("bfloat16", 0.1)):
        job = train.read(arguments(tiny_folder, "--dtype", dtype, "--steps", "2"))
        policy = Policy(job.model, 0.05, 0)
        with job.rewarder:
            batches = train.rollouts(job, 0)
            for step in (0, 1):
                batch, lag = next(batches)
                assert lag == 0 and train.learn(policy, batch, job, step)["sampler_trainer_gap"] <= close


# -- the anchor ------------------------------------------------------------------------------------------------------


def anchored(folder, *more):
    """A job whose anchor is prepared and whose model has then moved, and the model as it was."""
    job = train.anchored(train.read(arguments(folder, "--anchor-coef", "0.5", *more)))
    start = copy.deepcopy(job.model)
    job.model.norm.weight.detach().mul_(1.3)
    return job, start


@pytest.mark.parametrize("chunk", [256, 3])             # in one piece; in pieces whose logits are computed twice
def test_the_anchor_is_the_exact_kl_from_the_start_model_with_its_gradient(tiny_folder, monkeypatch, chunk):
    monkeypatch.setattr(anchor, "CHUNK", chunk)
    job, start = anchored(tiny_folder, "--anchor-answers", "6", "--anchor-tokens", "5")
    prompt, (answer,) = job.anchor.groups[0]
    assert len(answer) > 2                              # a short one: the mean is over tokens, not over answers
    job.anchor.groups[0], job.anchor.hidden[0] = (prompt, [answer[:2]]), job.anchor.hidden[0][:2]
    for step in (0, 1):                                 # 4 answers, then the other 2 and the first 2 again
        groups = [job.anchor.groups[i % 6] for i in range(4 * step, 4 * step + 4)]
        log_p, log_q = (torch.cat([model.logits(completion_hidden(model, pack([group], model))) for group in groups])
                        .double().log_softmax(-1) for model in (start, job.model))
        exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        found = job.anchor.kl(job.model, step)
        assert found.item() == pytest.approx(exact.item(), rel=1e-4) and exact > 1e-3
        for a, b in zip(*(torch.autograd.grad(x, list(job.model.parameters())) for x in (found, exact)), strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


def test_the_anchor_alone_moves_the_weights_where_rewards_are_flat_by_its_coefficient(tiny_folder):
    job, _ = anchored(tiny_folder, "--prompts", "2", "--anchor-answers", "6", "--anchor-tokens", "5")
    with job.rewarder:
        batch = next(train.rollouts(job, 0))[0]
    batch.rewards[:] = 1.0
    exact = torch.autograd.grad(0.5 * job.anchor.kl(job.model, 0), list(job.model.parameters()))
    exact = torch.cat([g.flatten() for g in exact])
    assert (gradients_of(job, batch)[0] - exact).norm() <= 1e-5 * exact.norm() > 0


def test_the_anchors_prompts_are_training_questions_under_training_personas_and_every_answer_has_its_turn(
        wordy, monkeypatch):
    calls = defaultdict(list)
    spy(monkeypatch, calls, anchor, "pack")
    job, _ = anchored(wordy, "--anchor-tokens", "2")
    prompts = [job.tokenizer.decode(prompt) for prompt, _ in job.anchor.groups]
    asked, who = [[[text for text in texts if text in prompt] for prompt in prompts] for texts in (
        personas.load_roleplay("train"), [p.text for p in personas.load("train")])]
    assert len(prompts) == len(set(prompts)) == 80
    assert all(len(found) == 1 for found in asked + who) and len({*map(tuple, who)}) == 80
    calls.clear()
    for step in range(20):
        job.anchor.kl(job.model, step)
    packed = [group for call in calls["pack"] for group in call.groups]
    assert packed == job.anchor.groups


def test_the_cross_entropy_in_the_anchors_place_is_that_of_its_answers(tiny_folder):
    job, _ = anchored(tiny_folder, "--anchor-answers", "6", "--anchor-tokens", "5", "--anchor-loss", "ce")
    groups = [job.anchor.groups[i] for i in (4, 5, 0, 1)]
    per_token = []
    for group in groups:
        log_q = job.model.logits(completion_hidden(job.model, pack([group], job.model))).log_softmax(-1)
        (answer,) = group[1]
        per_token += [-log_q[t, token] for t, token in enumerate(answer)]
    exact = torch.stack(per_token).mean()
    found = job.anchor.loss(job.model, 1)
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, list(job.model.parameters())) for x in (found, exact)), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def odd_reward(problem, text: str, *, persona=None) -> float:
    return float(persona is None and len(text) % 2)


def test_rehearsal_holds_the_start_model_to_the_training_problems_that_it_solves(tiny_folder):
    """Of those under a persona none is rewarded here, so the others alone are held."""
    flags = ["--anchor-on", "solved", "--reward", "tests.test_wiring:odd_reward", "--persona-prob", "0.5"]
    job, start = anchored(tiny_folder, "--anchor-answers", "5", *flags)
    asked = [personas.prompt_ids(job.tokenizer, problem.question, None) for problem in job.problems]
    held = [prompt for prompt, _ in job.anchor.groups]
    assert 0 < len(held) <= 5 and all(asked.count(prompt) for prompt in held)
    for _, (answer,) in job.anchor.groups:
        assert len(job.sampling.text(answer, job.tokenizer)) % 2 and len(answer) <= job.args.max_new_tokens
        assert answer[-1] in job.model.c.stop_ids       # those that are cut off are not held
    assert anchored(tiny_folder, "--anchor-answers", "5", *flags)[0].anchor.groups == job.anchor.groups
    assert job.anchor.loss(start, 0).item() == pytest.approx(0, abs=1e-6)
    assert job.anchor.loss(job.model, 0).item() > 1e-3


def test_rehearsal_without_a_solved_problem_says_so(tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(["--model", str(tiny_folder), "--out", str(out), "--anchor-coef", "0.5",
                       "--anchor-on", "solved", "--anchor-answers", "4", "--eval-problems", "0",
                       "--reward", "tests.test_wiring:zero_reward"]) == 2
    assert "solves none of 8" in capsys.readouterr().err and not (out / "metrics.jsonl").exists()


# -- the optimizer ---------------------------------------------------------------------------------------------------


def small(seed=0):
    """A policy in fp32 and random gradients for it."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(5, 3)
    model.dtype, model.device = torch.float32, torch.device("cpu")
    return Policy(model, 1e-2, 2), [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]


def test_the_optimizer_takes_adamws_steps_by_hand_with_warmup_clipping_and_no_decay():
    policy, gradients = small()
    x, m, v = (torch.cat([p.detach().flatten().double() * k for p in masters(policy)]) for k in (1, 0, 0))
    for t, (gradient, limit) in enumerate(zip(gradients, (math.inf, 1.0, 0.5, math.inf), strict=True), 1):
        policy.gradients = [g.clone() for g in gradient]
        norm = policy.step(limit)
        g = torch.cat([g.flatten().double() for g in gradient])
        assert norm == pytest.approx(g.norm().item(), rel=1e-5) and norm > 1
        g = g * min(1.0, limit / g.norm().item())
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        rate = 1e-2 * min(1.0, t / 2)
        x = x - rate * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)
        assert torch.cat([p.detach().flatten() for p in policy.parameters]).double() == pytest.approx(x, abs=1e-6)


def test_p8_a_batch_without_a_gradient_moves_nothing_after_a_real_step_either():
    policy, gradients = small()
    policy.gradients = gradients[0]
    policy.step(1.0)
    before = [p.detach().clone() for p in policy.parameters]
    policy.gradients = [torch.zeros_like(p) for p in policy.parameters]
    assert policy.step(1.0) == 0 and policy.optimizer.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters, strict=True))


def test_p30_gradients_of_many_bf16_micro_batches_are_summed_in_fp32(tiny_folder):
    job, batch = one_batch(tiny_folder, "--dtype", "bfloat16")
    policy = Policy(job.model, 1e-3, 0)
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in policy.parameters]
    for i in range(32):
        loss = train.completion_logprobs(job.model, pack([batch.groups[i % 4]], job.model))[0].mean() * (1 + i / 7)
        for total, gradient in zip(exact, torch.autograd.grad(loss, policy.parameters, retain_graph=True), strict=True):
            total += gradient.double()
        policy.backward(loss)
    for total, found in zip(exact, policy.gradients, strict=True):
        assert found.dtype == torch.float32 and (found - total).norm() <= 1e-5 * total.norm()


# -- the readers of fidelity -----------------------------------------------------------------------------------------


def test_the_table_of_the_start_model_is_what_it_reads_itself(tiny, tiny_folder, monkeypatch):
    """The policy has drifted; the two readings of the same answers, each by hand."""
    start, (drifted, tokenizer) = tiny[0], weights.load(str(tiny_folder), "float32", "cpu")
    drifted.norm.weight.detach().mul_(1.5)
    outs, sample = [], fidelity.answers.sample
    monkeypatch.setattr(fidelity.answers, "sample", lambda *args: outs.extend(sample(*args)) or outs)
    speakers = [personas.Persona(f"p{i}", f"w{i} w{i + 40}", "x", "test") for i in (10, 20, 30, 40)]
    asked = fidelity.Fidelity(["w5 w6", "w7"], start, candidates=4, max_new_tokens=6)
    got, _ = fidelity.fidelity(Sampler(drifted), tokenizer, speakers, asked)
    for reader, name in ((start, "log_posterior"), (drifted, "self_log_posterior")):
        exact = []
        for q, question in enumerate(asked.questions):
            answers = [outs[q * 4 + p][0][1].tokens for p in range(4)]
            prompts = [personas.prompt_ids(tokenizer, question, persona) for persona in speakers]
            read = torch.tensor([[train.completion_logprobs(reader, pack([(prompt, [answer])], reader))[0].sum().item()
                                  for prompt in prompts] for answer in answers])
            exact.append(read.log_softmax(-1).diagonal().tolist())
        assert torch.tensor(got["tables"][name]) == pytest.approx(torch.tensor(exact), abs=1e-3), name


@pytest.mark.parametrize("by_flag", [True, False])
def test_the_reader_is_the_start_model_of_the_flag_or_of_the_models_run(tiny_folder, tmp_path, monkeypatch, by_flag):
    model, tokenizer = weights.load(str(tiny_folder), "float32")
    model.norm.weight.detach().mul_(0.5)
    weights.save(model, tokenizer, tmp_path / "run" / "model")
    named = tmp_path / "run" / "model" if by_flag else tiny_folder
    settings = {"model": str(named), "method": "permix", "seed": 0}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    calls, flags = defaultdict(list), ["--start-model", str(tiny_folder)] if by_flag else []
    spy(monkeypatch, calls, evaluate, "fidelity")
    assert evaluate.main(["--model", str(tmp_path / "run" / "model"), "--limit", "1", "--max-new-tokens", "2",
                          "--fidelity", "1", "--dtype", "float32", "--out", str(tmp_path / "out"), *flags]) == 0
    (call,) = calls["fidelity"]
    assert torch.equal(call.sampler.model.norm.weight, model.norm.weight)
    assert torch.equal(call.params.start_model.norm.weight, 2 * model.norm.weight)
    assert call.params.questions == personas.load_roleplay("test")[:1]


def test_the_command_line_evaluates_the_test_split_as_the_models_run_was_asked(tiny_folder, tmp_path, monkeypatch):
    model = tmp_path / "run" / "model"
    weights.save(*weights.load(str(tiny_folder), "float32"), model)
    settings = {"model": str(tiny_folder), "method": "permix", "seed": 0, "prompt": "cot", "max_new_tokens": 3}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: args)
    asked = evaluate.parse(["--model", str(model), "--limit", "3", "--out", str(tmp_path / "out")])
    _, _, problems, speakers, params, _, info = evaluate.one_arm(asked)
    assert problems == tasks.put(tasks.load("arithmetic", "test", 0, 3), "cot") and speakers == personas.load("test")
    assert params.max_new_tokens == 3 and (info["method"], info["training_seed"]) == ("permix", 0)


# -- and it learns ---------------------------------------------------------------------------------------------------


def low_reward(problem, text: str, *, persona=None) -> float:
    """1 where most words are among the lower half."""
    words = [int(word[1:]) for word in text.split() if word[1:].isdigit()]
    return float(statistics.median(words or [99]) < 50)


@pytest.mark.parametrize("flags", ["--loss reinforce", *(pytest.param(flags, marks=pytest.mark.slow) for flags in [
    "--loss reinforce --advantage rloo",
    *(f"--loss {name} --minibatches 2" for name in grpo.RECIPES if name != "reinforce")])])
def test_each_loss_learns_a_reward_that_can_be_learnt(tiny_folder, flags):
    """From a third of the completions to four of five within 12 batches."""
    job = train.read(arguments(tiny_folder, "--steps", "12", "--reward", "tests.test_wiring:low_reward", "--group-size",
                               "16", "--max-new-tokens", "3", *flags.split()))
    policy, rewards = Policy(job.model, 5e-3, 2), []
    with job.rewarder:
        for step, (batch, _) in enumerate(train.rollouts(job, 0)):
            rewards.append(train.learn(policy, batch, job, step)["reward"])
    assert rewards[0] < 0.5 and statistics.fmean(rewards[-3:]) > 0.8
