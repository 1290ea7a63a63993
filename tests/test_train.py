"""The loop on a tiny model: what is learned from, resumed, refused and written."""

import dataclasses
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem

import grpo
import train
import weights
from common import files
from model import completion_hidden
from rollout import Sampler
from sampling.cache import row_bytes
from tests.conftest import make_reference, masters
from training import memory, monitor
from training import run as run_module
from training.checkpoints import Checkpoints
from training.memory import activation_bytes, estimate
from training.minibatches import micro_tokens_for
from training.policy import SHARDED, Policy
from training.settings import parser

ROOT = Path(__file__).resolve().parents[1]
FAST = ["--steps", "4", "--prompts", "2", "--group-size", "4", "--max-new-tokens", "6", "--eval-problems", "0",
        "--dtype", "float32", "--learning-rate", "1e-3", "--temperature", "1.0", "--truncated", "keep",
        "--save-every", "1"]
REWARD = ["--reward", "tests.test_train:word_reward"]


def word_reward(problem, text: str, *, persona=None) -> float:
    """1 where the text holds an even number of words below w50: learnable, and noisy at the start."""
    return float(sum(int(word[1:]) < 50 for word in re.findall(r"w\d+", text)) % 2 == 0)


def flat_reward(problem, text: str, *, persona=None) -> float:
    return 1.0


def nan_reward(problem, text: str, *, persona=None) -> float:
    return float("nan")


def no_reward(problem, text: str, *, persona=None) -> None:
    """A reward that forgets to return."""


CALLS = []


def reward_that_breaks_later(problem, text: str, *, persona=None) -> float:
    """Well at the call that tries it, and not at the next one."""
    CALLS.append(problem.id)
    return 1.0 if len(CALLS) == 1 else [1.0]


def run(folder, out, *more) -> int:
    return train.main(["--model", str(folder), "--out", str(out), *FAST, *REWARD, *more])


def metrics(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def tensors(out) -> dict:
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- the step --------------------------------------------------------------------------------------------------------


def arguments(folder, *more):
    return train.settings(["--model", str(folder), *FAST, *REWARD, *more])


def one_batch(folder, *more):
    """A job and a batch with unlike rewards, as the loop makes them: 4 problems, over all ranks."""
    job = train.anchored(train.read(arguments(folder, "--prompts", "4", *more)))
    with job.rewarder:
        return job, next(train.rollouts(job, 0))[0]


def step_on(job, batch, learning_rate=1e-3) -> dict:
    """The metrics of one step."""
    return train.learn(Policy(job.model, learning_rate, 0), batch, job, 0)


def gradients_of(job, batch, scale: float = 1.0) -> list[torch.Tensor]:
    """The whole gradient of each optimizer step on a batch, as the optimizer would meet it.

    In place of such a step the last norm's weight is multiplied by `scale`."""
    policy, found = Policy(job.model, 1e-3, 0), []

    def step(max_norm):
        parts = [policy.over_ranks(g, SHARDED, p) for g, p in zip(policy.reduced(), policy.parameters, strict=True)]
        found.append(torch.cat([(g.full_tensor() if policy.mesh else g).flatten() for g in parts]).double())
        policy.model.norm.weight.detach().mul_(scale)
        return 0.0

    policy.step = step
    train.learn(policy, batch, job, 0)
    return found


def gradient_of(job, batch) -> torch.Tensor:
    return gradients_of(job, batch)[0]


def part(batch, groups: slice):
    """Some groups of a batch as one of their own."""
    G = batch.rewards.shape[1]
    rows = slice(groups.start * G, groups.stop * G)
    values = (getattr(batch, f.name) for f in dataclasses.fields(batch))
    return train.Rollout(*(v[rows if len(v) > len(batch.problems) else groups] for v in values))


def test_p10_the_gradient_does_not_depend_on_the_micro_batch(tiny_folder):
    whole = gradient_of(*one_batch(tiny_folder, "--micro-tokens", "100000"))
    assert whole.norm() > 0
    for limit in ("1", "120"):
        other = gradient_of(*one_batch(tiny_folder, "--micro-tokens", limit))
        assert (other - whole).norm() <= 1e-6 * whole.norm()


def test_p10_the_gradient_does_not_depend_on_prompt_sharing(tiny_folder):
    """The same completions, each with its own copy of the prompt."""
    job, batch = one_batch(tiny_folder)
    shared = gradient_of(job, batch)
    batch.groups = [(prompt, [c]) for prompt, cs in batch.groups for c in cs]
    plain = gradient_of(job, batch)
    assert (shared - plain).norm() <= 1e-6 * shared.norm()


def test_sft_learns_from_one_gold_answer_what_it_learns_from_several(tiny_folder):
    assert train.settings(["--method", "sft"]).group_size == 1
    flags = "--method", "sft", "--reward", "tests.test_train:flat_reward", "--group-size"
    one, several = (gradient_of(*one_batch(tiny_folder, *flags, n)) for n in "14")
    assert (one - several).norm() <= 1e-6 * one.norm() > 0


def test_p32_sft_is_cross_entropy_of_the_plain_logits_at_any_temperature(tiny_folder):
    job, batch = one_batch(tiny_folder, "--method", "sft", "--temperature", "0.3",
                           "--reward", "tests.test_train:flat_reward")
    packed, found = train.pack(batch.groups, job.model), gradient_of(job, batch)
    logits = job.model.logits(completion_hidden(job.model, packed))
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, packed.targets), job.model.parameters())
    plain = torch.cat([g.flatten() for g in plain])
    assert (found - plain).norm() <= 1e-6 * plain.norm() > 0


def test_distillation_learns_a_teachers_text_at_the_temperature_it_was_sampled_at(tiny_folder):
    """So the start model, its own teacher, is where it should be: its sampler and its trainer agree."""
    job, batch = one_batch(tiny_folder, "--method", "distill", "--temperature", "0.3",
                           "--reward", "tests.test_train:flat_reward")
    (micro,), = train.minibatches(batch, batch.rewards, batch.kept, job)
    _, sums = train.micro_loss(job.model, micro, job.loss, job.temperature)
    assert sums["gap"] / sums["trained_tokens"] <= 1e-5


def test_a_gold_answer_ends_as_the_chat_template_ends_a_turn(tiny_folder):
    """Not with the tokenizer's EOS, if the template has a stop id of its own; with the EOS if it has none."""
    job = train.read(arguments(tiny_folder, "--method", "sft"))
    assert next(train.gold_completions(job, job.problems, 1)).tokens[-1] == 2
    job.tokenizer.chat_template = "{% for m in messages %}{{ '<s> ' + m['content'] + ' w7 w8 ' }}{% endfor %}"
    assert next(train.gold_completions(job, job.problems, 1)).tokens[-1] == 2
    job.model.c.stop_ids = [2, 7]
    assert next(train.gold_completions(job, job.problems, 1)).tokens[-1] == 7
    job.model.c.stop_ids = [9]
    with pytest.raises(ValueError, match="stops this model"):
        next(train.gold_completions(job, job.problems, 1))


def moved_and_anchored(folder):
    """A job whose anchor has a gradient, and a batch of it."""
    job, batch = one_batch(folder, "--anchor-coef", "0.5", "--anchor-answers", "6", "--anchor-tokens", "5")
    job.model.norm.weight.detach().mul_(1.3)
    return job, batch


def on_two_ranks(function, folder, out) -> None:
    """Calls a function of this file in two processes under torchrun."""
    call = f"from tests.test_train import {function.__name__} as f; f({str(folder)!r}, {str(out)!r})"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                    "--no-python", sys.executable, "-c", call], cwd=ROOT, check=True, timeout=300, capture_output=True)


def write_gradient(folder: str, out: str) -> None:
    """What one of two ranks runs in the test below."""
    torch.distributed.init_process_group("gloo")
    gradient = gradient_of(*moved_and_anchored(folder))
    if train.ranks()[0] == 0:
        torch.save(gradient, out)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_p10_the_gradient_does_not_depend_on_the_number_of_ranks(tiny_folder, tmp_path):
    on_two_ranks(write_gradient, tiny_folder, tmp_path / "g")
    one, two = gradient_of(*moved_and_anchored(tiny_folder)), torch.load(tmp_path / "g")
    assert (two - one).norm() <= 1e-6 * one.norm() > 0


def rank_0_reward(problem, text: str, *, persona=None) -> float:
    return float(os.environ.get("RANK", "0") == "0")


def write_rehearsed(folder: str, out: str) -> None:
    """What both ranks of the test below run: what each rank's anchor holds."""
    torch.distributed.init_process_group("gloo")
    job = train.anchored(train.read(arguments(folder, "--anchor-coef", "0.5", "--anchor-on", "solved",
                                              "--anchor-answers", "3", "--reward", "tests.test_train:rank_0_reward")))
    Path(out, str(train.ranks()[0])).write_text(json.dumps(job.anchor.groups))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_rehearse_what_rank_0_found_solved(tiny_folder, tmp_path):
    on_two_ranks(write_rehearsed, tiny_folder, tmp_path)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first == second and 0 < len(first) <= 3


def test_p9_dynamic_sampling_counts_only_the_groups_with_unequal_rewards(tiny_folder):
    """DAPO: the gradient is that of a batch of the informative groups alone, normaliser included."""
    job, batch = one_batch(tiny_folder)
    batch.rewards = torch.tensor([[1.0] * 4, [0.0] * 4, [1.0, 0, 0, 0], [1.0, 1, 0, 0]])
    job.args.dynamic_sampling = 1
    whole = gradient_of(job, batch)
    job.args.dynamic_sampling = 0
    alone = gradient_of(job, part(batch, slice(2, 4)))
    assert (whole - alone).norm() <= 1e-6 * alone.norm() > 0


@pytest.mark.parametrize("reward, rounds", [("word_reward", 1), ("flat_reward", 4)])
def test_dynamic_sampling_stops_when_enough_groups_have_a_gradient(tiny_folder, reward, rounds):
    _, batch = one_batch(tiny_folder, "--dynamic-sampling", "3", "--group-size", "8",
                            "--reward", f"tests.test_train:{reward}")
    assert len(batch.rewards) == 4 * rounds == len({p.id for p in batch.problems})
    assert len(batch.groups) == len(batch.personas) == 4 * rounds and len(batch.completions) == 32 * rounds


def some_reward(problem, text: str, *, persona=None) -> float:
    return word_reward(problem, text) if len(problem.question) % 2 else 1.0


def test_dynamic_sampling_goes_on_until_there_are_as_many_groups_with_a_gradient_as_prompts(tiny_folder):
    _, batch = one_batch(tiny_folder, "--dynamic-sampling", "9", "--group-size", "8", "--reward",
                         "tests.test_train:some_reward")
    before, found = (grpo.informative(rewards).sum() for rewards in (batch.rewards[:-4], batch.rewards))
    assert 0 < before < 4 <= found


def test_the_overlong_penalty_tells_long_completions_of_equal_rewards_apart(tiny_folder):
    job, batch = one_batch(tiny_folder, "--overlong-buffer", "5")
    batch.rewards[:] = 1.0
    batch.groups[0][1][0][3:] = []                      # its tokens are the completion's own list
    batch.completions[0].logprobs[3:] = []
    batch.lengths[0, 0] = 3
    assert batch.lengths[0].tolist() == [3, 6, 6, 6]
    assert train.penalties(batch, job)[0].tolist() == pytest.approx([-0.4, -1, -1, -1])
    metrics = step_on(job, batch)
    assert metrics["grad_norm"] > 0 and metrics["reward"] == 1.0        # the verifier's reward is what is logged


def test_a_kl_in_the_reward_is_the_log_ratio_of_the_sampled_tokens(tiny_folder):
    job, batch = one_batch(tiny_folder, "--kl-coef", "0.5", "--kl", "k1", "--kl-in", "reward", "--micro-tokens", "100")
    assert train.penalties(batch, job).abs().max() <= 1e-4              # the policy still is the start model
    with torch.no_grad():
        job.reference.norm.weight.mul_(0.5)
    packed = train.pack(batch.groups, job.reference)
    reference = train.completion_logprobs(job.reference, packed, job.args.temperature)[0].detach()
    sampled = torch.tensor([x for c in batch.completions for x in c.logprobs])
    gaps = (sampled - reference).split(batch.lengths.flatten().tolist())
    assert train.penalties(batch, job).flatten() == pytest.approx(-0.5 * torch.stack([g.sum() for g in gaps]), abs=1e-4)


@pytest.mark.parametrize("more", [["--inner-epochs", "2"], ["--minibatches", "2"]])
def test_p11_the_ratio_is_1_on_the_first_step_of_a_batch_and_moves_on_the_second(tiny_folder, more):
    """The second step's ratio is to the weights of before the first, also on groups that the first did not see."""
    narrow, clipped = ["--clip-low", "1e-6", "--clip-high", "1e-6"], []
    for flags, loss in (([], grpo.Loss(clip_low=1e-6, clip_high=1e-6)), ([*more, *narrow], None)):
        job, batch = one_batch(tiny_folder, *flags)
        job = dataclasses.replace(job, loss=loss or job.loss)
        clipped.append(step_on(job, batch, 1e-2)["clip_fraction"])
    assert clipped[0] == 0 and clipped[1] > 0


def test_a_minibatch_has_the_gradient_of_a_batch_of_its_groups(tiny_folder):
    """PPO's way: an optimizer step each, with the token counts of their own groups."""
    job, batch = one_batch(tiny_folder, "--minibatches", "2", "--inner-epochs", "2")
    several = gradients_of(job, batch)
    one, _ = one_batch(tiny_folder)
    halves = [gradient_of(one, part(batch, slice(first, first + 2))) for first in (0, 2)]
    assert len(several) == 4
    for gradient, half in zip(several, halves * 2, strict=True):
        assert (gradient - half).norm() <= 1e-6 * half.norm() > 0


class FakeAnchor:
    def __init__(self):
        self.steps = []

    def loss(self, model, step):
        self.steps.append(step)
        return 0 * model.norm.weight.sum() + 1.0


def test_every_optimizer_step_has_anchor_answers_of_its_own_and_their_mean_is_logged(tiny_folder):
    job, batch = one_batch(tiny_folder, "--minibatches", "2", "--anchor-coef", "0.1", "--anchor-answers", "2",
                           "--anchor-tokens", "2")
    job = dataclasses.replace(job, anchor=FakeAnchor())
    policy = Policy(job.model, 1e-3, 0)
    logged = [train.learn(policy, batch, job, step)["anchor_kl"] for step in (0, 1)]
    assert job.anchor.steps == [0, 1, 2, 3] and logged == [1.0, 1.0]


SPEAKERS = []


def listening_reward(problem, text: str, *, persona=None) -> float:
    SPEAKERS.append(persona)
    return word_reward(problem, text)


def test_the_reward_is_told_who_speaks_in_each_completion(tiny_folder):
    SPEAKERS.clear()
    job, batch = one_batch(tiny_folder, "--mix", "rollout", "--persona-prob", "0.6", "--slots", "1",
                         "--reward", "tests.test_train:listening_reward")
    spoken = [persona for row in batch.personas for persona in row]
    assert Counter(SPEAKERS[1:]) == Counter(spoken) and len(set(spoken)) > 4         # the first call tries it
    for persona, (prompt, _), problem in zip(spoken, batch.groups, [p for p in batch.problems for _ in range(4)],
                                             strict=True):
        assert prompt == train.personas.prompt_ids(job.tokenizer, problem.question, persona)


def test_another_turn_samples_anew_from_the_same_prompt(tiny_folder):
    job = train.read(arguments(tiny_folder, "--method", "rlvr", "--prompts", "1"))
    job = dataclasses.replace(job, problems=job.problems[:1])
    with job.rewarder:
        first, second = (train.roll_out(Sampler(job.model), job, turn) for turn in (0, 1))
    assert first.groups[0][0] == second.groups[0][0] and first.texts != second.texts


def test_a_flat_group_is_trained_on_where_there_is_a_kl(tiny_folder):
    job, batch = one_batch(tiny_folder, "--kl-coef", "0.5")
    batch.rewards[:] = 1.0
    with torch.no_grad():
        job.reference.norm.weight.mul_(0.5)
    assert step_on(job, batch)["grad_norm"] > 0


def test_the_largest_gradient_norm_of_a_batch_is_logged_and_one_that_is_not_finite_is_never_hidden(tiny_folder):
    job, batch = one_batch(tiny_folder, "--minibatches", "2")
    batch.rewards[2:] = 1.0                             # nothing to learn in the second part
    assert step_on(job, batch)["grad_norm"] > 0
    policy, norms = Policy(job.model, 1e-3, 0), iter([float("nan"), 0.5])
    policy.step = lambda max_norm: next(norms)
    assert math.isnan(train.learn(policy, batch, job, 0)["grad_norm"])


def test_a_stop_string_ends_completions_in_training_and_in_evaluation(tiny_folder, tmp_path):
    """Every word ends a completion: one token each, and none is cut off."""
    out, stops = tmp_path / "run", [flag for i in range(3, 99) for flag in ("--stop", f"w{i}")]
    assert run(tiny_folder, out, "--steps", "1", "--eval-problems", "2", "--eval-personas", "1", *stops) == 0
    assert metrics(out)[0]["completion_length"] <= 2 and metrics(out)[0]["truncated_fraction"] == 0
    after = json.loads((out / "evaluation" / "after" / "results.json").read_text())
    assert len(after["stop"]) == 96 and after["truncated_fraction"] == 0 and after["tokens_per_answer"] <= 2


def test_an_old_runs_name_of_the_advantage_is_understood(tiny_folder, tmp_path):
    assert run(tiny_folder, tmp_path / "run", "--steps", "1", "--loss", "grpo") == 0
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"advantage": "std"', '"advantage": "std_sample"'))
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 0


@pytest.mark.parametrize("change", [
    {"steps": "many"}, {"steps": 2.5}, {"loss": "ppo"}, {"learning_rate": [1]}, {"overlap": "no"}, {"method": "dance"},
    {"stop": "abc"}, {"group_size": True}, {"model": 3}, {"task": None}, {"eval_task": 5}, {"device": {}}])
def test_a_config_json_that_somebody_wrote_into_is_refused_by_the_name_of_the_setting(tmp_path, change):
    told = vars(train.settings([]))
    (tmp_path / "config.json").write_text(json.dumps({"settings": told}))
    assert vars(train.settings(["--resume", str(tmp_path)])) == told | {"resume": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps({"settings": told | change}))
    with pytest.raises(ValueError, match=f"config.json has .* for {next(iter(change))}, which"):
        train.settings(["--resume", str(tmp_path)])


def test_a_checkpoint_of_another_model_is_told_in_one_line(tiny_folder, tmp_path, capsys):
    start, out = shutil.copytree(tiny_folder, tmp_path / "start"), tmp_path / "run"
    assert run(start, out, "--steps", "1") == 0
    make_reference("llama").save_pretrained(start)
    assert train.main(["--resume", str(out), "--steps", "2"]) == 2
    assert "step-000001 does not fit this model, or is broken" in capsys.readouterr().err


def test_the_runs_own_model_is_no_start_model(tiny_folder, tmp_path, capsys):
    own = shutil.copytree(tiny_folder, tmp_path / "run" / "model")
    assert run(own, tmp_path / "run") == 2
    assert "choose another --out" in capsys.readouterr().err


def test_p13_the_reference_sees_the_same_persona(tiny_folder):
    """Under the same prompt the start model is the policy itself: its first KL is 0. Under another it is not."""
    job, batch = one_batch(tiny_folder, "--kl-coef", "0.1")
    assert step_on(job, batch)["kl"] == 0
    assert step_on(job, batch)["kl"] > 0


def test_p14_sampler_and_trainer_agree_and_the_gap_is_logged(tiny_folder):
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 5e-2)):
        assert step_on(*one_batch(tiny_folder, "--dtype", dtype))["sampler_trainer_gap"] <= bound


@pytest.mark.parametrize("policy, rewarded", [("zero", False), ("mask", False), ("keep", True)])
def test_p7_a_truncated_completion_is_worth_what_the_policy_says(tiny_folder, policy, rewarded):
    job = train.read(arguments(tiny_folder, "--truncated", policy))
    job.model.c.stop_ids = []                           # so that all completions are cut off
    metrics = step_on(job, train.roll_out(Sampler(job.model), job, 0))
    assert metrics["truncated_fraction"] == 1 and (metrics["grad_norm"] > 0) == rewarded


def test_p8_equal_rewards_move_nothing(tiny_folder):
    job, batch = one_batch(tiny_folder)
    batch.rewards[:] = 1.0
    before = [p.clone() for p in job.model.parameters()]
    assert step_on(job, batch)["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))


def test_p30_master_weights_keep_steps_that_bf16_would_lose(tiny_folder):
    model = weights.load(str(tiny_folder), "bfloat16")[0]
    policy = Policy(model, 1e-6, 0)
    before = [m.clone() for m in masters(policy)]
    for _ in range(3):
        policy.gradients = [torch.randn_like(m) for m in masters(policy)]
        policy.step(1.0)
    moved = [(a != b).float().mean() for a, b in zip(before, masters(policy), strict=True)]
    assert all(m.dtype == torch.float32 for m in masters(policy)) and min(moved) > 0.9
    assert all(torch.equal(p, m.to(p.dtype)) for p, m in zip(policy.parameters, masters(policy), strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_folder):
    model = weights.load(str(tiny_folder), "float32")[0]
    policy, before = Policy(model, 1e-3, 0), [p.clone() for p in model.parameters()]
    policy.gradients = [torch.full_like(m, torch.nan) for m in masters(policy)]
    policy.step(1.0)
    assert policy.optimizer.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_anchor_starts_at_zero_and_grows_as_the_policy_moves(tiny_folder):
    job = train.anchored(train.read(arguments(tiny_folder, "--anchor-coef", "0.5", "--anchor-answers", "6",
                                              "--anchor-tokens", "5")))
    policy = Policy(job.model, 1e-4, 0)
    assert job.anchor.kl(job.model, 0).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        job.model.norm.weight.mul_(1.5)
    moved = job.anchor.kl(job.model, 0).item()
    assert moved > 1e-3
    for _ in range(10):
        policy.backward(0.5 * job.anchor.kl(job.model, 0))
        policy.step(1.0)
    assert job.anchor.kl(job.model, 0).item() < moved


def test_the_start_model_is_that_of_the_model_flag_whatever_a_checkpoint_holds(tiny_folder, tmp_path):
    """The KL's reference and the anchor's answers do not move with the policy, also after a resume."""
    flags = ["--kl-coef", "0.1", "--anchor-coef", "0.1", "--anchor-answers", "4", "--anchor-tokens", "4"]
    assert run(tiny_folder, tmp_path / "run", *flags) == 0
    fresh = train.anchored(train.read(arguments(tiny_folder, *flags)))
    again = train.anchored(train.read(train.settings(["--resume", str(tmp_path / "run"), "--steps", "5"])))
    policy = Policy(again.model, 1e-3, 0)
    assert Checkpoints(tmp_path / "run" / "checkpoints", 1).load(policy) == 4
    assert again.anchor.groups == fresh.anchor.groups
    pairs = zip(again.reference.parameters(), fresh.reference.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not torch.equal(again.model.norm.weight,
                                                                           again.reference.norm.weight)


# -- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """The folder of an undisturbed run, to compare with: not to be written into."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny_folder, out) == 0
    return out


def test_a_run_leaves_its_folder_and_the_same_seed_gives_the_same_run(whole, tiny_folder, tmp_path, capsys):
    a, b = whole, tmp_path / "b"
    assert run(tiny_folder, b) == 0
    lines = re.findall(r"^step (\d)/4: reward [\d.]+, accuracy [\d.]+, [\d.]+ s$", capsys.readouterr().err, re.M)
    assert "".join(lines) == "1234"
    assert metrics(a) == metrics(b) and same(tensors(a), tensors(b))
    assert [m["step"] for m in metrics(a)] == [0, 1, 2, 3]
    for name in ("config.json", "samples.jsonl", "curves.png", "model/config.json", "model/tokenizer.json"):
        assert (a / name).stat().st_size > 0
    assert sorted(p.name for p in (a / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_p20_a_resumed_run_is_the_same_run(tiny_folder, tmp_path, dtype):
    """In bf16 the masters are not the model."""
    flags = ["--dtype", dtype, "--warmup", "4"]         # which goes on too
    assert run(tiny_folder, tmp_path / "whole", *flags) == 0
    assert run(tiny_folder, tmp_path / "half", "--steps", "2", *flags) == 0
    assert train.main(["--resume", str(tmp_path / "half"), "--steps", "4"]) == 0
    assert metrics(tmp_path / "half") == metrics(tmp_path / "whole")
    assert same(tensors(tmp_path / "half"), tensors(tmp_path / "whole"))


def test_p20_a_torn_checkpoint_is_passed_over_for_the_one_before(whole, tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "torn", "--steps", "3") == 0
    newest = tmp_path / "torn" / "checkpoints" / "step-000003" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train.main(["--resume", str(tmp_path / "torn"), "--steps", "4"]) == 0
    assert "cannot be read" in capsys.readouterr().err
    assert metrics(tmp_path / "torn") == metrics(whole) and same(tensors(tmp_path / "torn"), tensors(whole))


def test_a_torn_checkpoint_does_not_push_out_a_whole_one(tiny_folder, tmp_path):
    policy, folder = Policy(weights.load(str(tiny_folder), "float32")[0], 1e-3, 1), tmp_path / "checkpoints"
    (folder / "step-000040").mkdir(parents=True)
    for step in (19, 20):
        Checkpoints(folder, keep=1).save(policy, step)
    assert [path.name for path in folder.iterdir()] == ["step-000020"]


def interrupt(folder, out, how, *more, until=None) -> tuple[int, str]:
    """Runs in another process until two checkpoints stand, or `until()`, then sends the signal: (exit code, stderr).

    SIGINT is set back first: a test suite that a shell runs in the background inherits it as ignored."""
    until = until or (lambda: len(list((out / "checkpoints").glob("step-*"))) > 1)
    command = [sys.executable, "train.py", "--model", folder, "--out", out, *FAST, *REWARD, *more]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and not until():
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait(), process.stderr.read()


def late_reward(problem, text: str, *, persona=None) -> float:
    """The 25th call, in the fourth step of FAST, hangs."""
    SPEAKERS.append(persona)
    if len(SPEAKERS) == 25:
        Path(os.environ["HANGS"]).touch()
        time.sleep(100)
    return word_reward(problem, text)


@pytest.mark.slow
@pytest.mark.parametrize("how, code, more", [(signal.SIGTERM, 143, ["--dynamic-sampling", "1"]),
                                             (signal.SIGINT, 130, ["--overlap", "--async-save"])])
def test_a_signal_waits_for_no_hanging_reward_and_saves_the_steps_that_are_done(tiny_folder, tmp_path, monkeypatch,
                                                                                how, code, more):
    monkeypatch.setenv("HANGS", str(tmp_path / "hangs"))
    flags = ["--steps", "2000", "--save-every", "1000", "--reward", "tests.test_train:late_reward",
             "--reward-seconds", "100", *more]
    start, (found, errors) = time.time(), interrupt(tiny_folder, tmp_path / "run", how, *flags,
                                                    until=(tmp_path / "hangs").exists)
    done = len(metrics(tmp_path / "run"))
    assert found == code and done >= 1 and "Traceback" not in errors and time.time() - start < 60
    assert f"--resume {tmp_path / 'run'} goes on after step {done}\n" in errors
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:06d}").is_dir()


@pytest.mark.parametrize("signals, done", [(1, 2), (2, 1)])
def test_ctrl_c_lets_a_checkpoint_end_and_a_second_one_does_not(tiny_folder, tmp_path, monkeypatch, capsys, signals,
                                                                done):
    to_send = [signal.SIGINT] * signals

    def write(*args):
        while "step-000002" in args[1].name and to_send:
            os.kill(os.getpid(), to_send.pop())
        return write_item(*args)

    signal.signal(signal.SIGINT, signal.default_int_handler)            # pytest in the background ignores it
    write_item = filesystem._write_item
    monkeypatch.setattr(filesystem, "_write_item", write)
    assert run(tiny_folder, tmp_path / "run") == 130
    assert f"goes on after step {done}\n" in capsys.readouterr().err
    kept = [f"step-{step:06d}" for step in range(1, done + 1)]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == kept


@pytest.mark.parametrize("more", [[], ["--async-save"]])
def test_a_disk_that_fills_is_one_line_and_leaves_the_last_checkpoint(tiny_folder, tmp_path, capsys, more):
    """A limit on the size of files stands for the disk: a resumed run's checkpoint would be larger."""
    assert run(tiny_folder, tmp_path / "run", "--steps", "2") == 0
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4", *more]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: ") and "File too large" in said and said.endswith("goes on after step 2")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--async-save"], ["--dtype", "bfloat16"], ["--lora-rank", "4"],
                                  ["--dtype", "bfloat16", "--optimizer", "adamw8bit"]], ids=" ".join)
def test_p20_a_run_killed_again_and_again_ends_as_the_uninterrupted_one(wide_folder, tmp_path, more):
    """kill -9 at random moments, checkpoint writing included; the environment's KILLS says how often."""
    out, draw, kills = tmp_path / "killed", random.Random(0), int(os.environ.get("KILLS", 1))
    steps = 20 * (kills + 1)
    flags = ["--steps", str(steps), "--keep", "1", *more]
    assert run(wide_folder, tmp_path / "whole", *flags) == 0
    command = [sys.executable, "train.py", "--model", wide_folder, "--out", out, *FAST, *REWARD, *flags]
    while kills:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (out / "metrics.jsonl").is_file():
            time.sleep(0.01)
        before = len((out / "metrics.jsonl").read_text().splitlines())
        while process.poll() is None and len((out / "metrics.jsonl").read_text().splitlines()) <= before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None, "the run was over before it could be killed"
        process.kill()
        process.wait()
        kills, command = kills - 1, [sys.executable, "train.py", "--resume", out]
    assert train.main(["--resume", str(out)]) == 0
    assert metrics(out) == metrics(tmp_path / "whole") and same(tensors(out), tensors(tmp_path / "whole"))
    shards = Path("checkpoints") / f"step-{steps:06d}" / "__0_0.distcp"         # masters, moments and counters
    assert (out / shards).read_bytes() == (tmp_path / "whole" / shards).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how, number, more", [(signal.SIGTERM, 143, []), (signal.SIGINT, 130, []),
                                               (signal.SIGHUP, 129, []),
                                               (signal.SIGTERM, 143, ["--async-save", "--save-every", "3"])])
def test_p20_a_signal_saves_the_steps_that_are_done_and_the_run_goes_on_from_there(tiny_folder, tmp_path, how,
                                                                                   number, more):
    assert run(tiny_folder, tmp_path / "whole", "--steps", "30") == 0
    out = tmp_path / "terminated"
    code, errors = interrupt(tiny_folder, out, how, "--steps", "30", *more)
    assert code == number and f"--resume {out}" in errors and "Traceback" not in errors
    done = len(metrics(out))
    assert 2 <= done < 30 and (out / "checkpoints" / f"step-{done:06d}").is_dir()
    assert train.main(["--resume", str(out)]) == 0
    assert metrics(out) == metrics(tmp_path / "whole") and same(tensors(out), tensors(tmp_path / "whole"))


def test_p20_a_run_that_samples_ahead_is_one_step_off_policy_corrected_and_resumes_as_it_was(tiny_folder, tmp_path):
    flags = ["--overlap", "--save-every", "3", "--steps", "6"]
    assert run(tiny_folder, tmp_path / "whole", *flags) == 0
    assert run(tiny_folder, tmp_path / "half", *flags[:-1], "3") == 0
    assert train.main(["--resume", str(tmp_path / "half"), "--steps", "6"]) == 0
    assert metrics(tmp_path / "half") == metrics(tmp_path / "whole")
    assert same(tensors(tmp_path / "half"), tensors(tmp_path / "whole"))
    assert [m["lag"] for m in metrics(tmp_path / "whole")] == [0, 1, 1, 0, 1, 1]
    for m in metrics(tmp_path / "whole"):               # the samples are of the weights before the last step
        assert m["sampler_trainer_gap"] is None or (m["sampler_trainer_gap"] > 1e-4) == (m["lag"] == 1)
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())["settings"]
    assert settings["correction"] == "truncate"


def test_sampling_ahead_changes_nothing_where_the_weights_stand_still(tiny_folder, tmp_path):
    flags = ["--save-every", "4", "--learning-rate", "1e-30", "--correction", "truncate"]
    assert run(tiny_folder, tmp_path / "ahead", "--overlap", *flags) == 0
    assert run(tiny_folder, tmp_path / "plain", *flags) == 0
    ahead, plain = ([{k: v for k, v in m.items() if k != "lag"} for m in metrics(tmp_path / name)]
                    for name in ("ahead", "plain"))
    assert ahead == plain


@pytest.mark.slow
def test_the_profile_names_phases_floors_and_operators(tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "run", "--profile", "--progress") == 0
    said = capsys.readouterr().err
    assert "4/4" in said and "4/4: reward" not in said  # the bar takes the place of the lines
    assert "operators of one step:" in said and "aten::" in said
    for phase in ("sample", "train", "step"):
        seconds, floor, ratio = map(float, re.search(rf"  {phase} +([\d.]+) +([\d.]+) +([\d.]+)x", said).groups())
        assert seconds > 0 and ratio > 1 and floor <= seconds


def torchrun(folder, out, *more, reward="tests.test_train:word_reward", nproc=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc, "train.py",
               "--model", folder, "--out", out, *FAST, "--reward", reward, *more]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, 4])
def test_several_ranks_take_the_same_step_as_one(tiny_folder, tmp_path, nproc):
    flags = ["--steps", "1", "--max-grad-norm", "1e9", "--prompts", "4", "--eval-problems", "3", "--eval-personas", "3"]
    assert run(tiny_folder, tmp_path / "one", *flags) == 0
    done = torchrun(tiny_folder, tmp_path / "two", *flags, nproc=nproc)
    assert done.returncode == 0 and done.stderr.count("golds: ") == 2       # of rank 0 alone
    one, two = metrics(tmp_path / "one")[0], metrics(tmp_path / "two")[0]
    assert one["reward"] == two["reward"] and one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
    for name, tensor in tensors(tmp_path / "one").items():
        assert (tensor - tensors(tmp_path / "two")[name]).abs().max() <= 1e-5, name
    one, two = (json.loads((tmp_path / x / "evaluation/before/results.json").read_text()) for x in ("one", "two"))
    assert one["personas"] == two["personas"]           # which the ranks have sampled together


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--shard", "1"], ["--shard", "2"], ["--async-save"], ["--optimizer", "adamw8bit"],
                                  ["--lora-rank", "4"]], ids=" ".join)
def test_p20_a_run_goes_on_with_another_number_of_ranks(wide_folder, tmp_path, more):
    """Masters and moments sharded over two ranks, or replicated: read back by one. Equal up to summation order."""
    near = 5e-4 if "adamw8bit" in more else 1e-4        # moments that round to their other neighbour
    alone = more if more[0] in ("--optimizer", "--lora-rank") else []
    assert run(wide_folder, tmp_path / "one", "--steps", "4", *alone) == 0
    assert torchrun(wide_folder, tmp_path / "two", "--steps", "2", *more).returncode == 0
    assert train.main(["--resume", str(tmp_path / "two"), "--steps", "4", "--shard", "0"]) == 0
    assert [m["reward"] for m in metrics(tmp_path / "two")] == [m["reward"] for m in metrics(tmp_path / "one")]
    for name, tensor in tensors(tmp_path / "one").items():
        assert (tensor - tensors(tmp_path / "two")[name]).abs().max() <= near, name


def dies_once(problem, text: str, *, persona=None) -> float:
    """Rank 1 is killed at its first reward after a checkpoint, the first time round."""
    import os

    import torch.distributed as dist

    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_life and dist.is_initialized() and dist.get_rank() == 1 and list(ROOT_OF_RUN.glob("checkpoints/step-*")):
        os.kill(os.getpid(), signal.SIGKILL)
    return word_reward(problem, text)


ROOT_OF_RUN = Path(os.environ.get("RUN_THAT_DIES", "/nowhere"))


@pytest.mark.slow
def test_a_mistake_that_rank_0_meets_is_one_line_of_each_rank(tmp_path):
    done = torchrun("/nowhere/model", tmp_path / "run")
    assert done.returncode and "no model at '/nowhere/model'" in done.stderr
    assert "train.py: another rank has died" in done.stderr and "barrier" not in done.stderr


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_the_run_finishes(tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "restarted"
    monkeypatch.setenv("RUN_THAT_DIES", str(out))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1", "train.py", "--model", tiny_folder, "--out", out, *FAST, "--reward",
               "tests.test_train:dies_once"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming after step" in done.stderr          # it did begin twice
    assert re.search(r"train.py: another rank has died.* goes on after step \d\n", done.stderr)
    assert [m["step"] for m in metrics(out)] == [0, 1, 2, 3] and (out / "model" / "config.json").is_file()


def told_to_stop(problem, text: str, *, persona=None) -> float:
    """Rank 1 alone gets SIGTERM, in the second of its 4 rewards of the third step."""
    SPEAKERS.append(persona)
    if torch.distributed.get_rank() and len(SPEAKERS) == 10:
        os.kill(os.getpid(), signal.SIGTERM)
    return word_reward(problem, text)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_saves(tiny_folder, tmp_path):
    done = torchrun(tiny_folder, tmp_path / "run", "--save-every", "100", reward="tests.test_train:told_to_stop")
    assert done.returncode == 1 and f"--resume {tmp_path / 'run'} goes on after step 2\n" in done.stderr
    assert len(metrics(tmp_path / "run")) == 2 and (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


def rank_1_only(problem, text: str, *, persona=None) -> float:
    """Rank 0 gets nothing but zero-variance groups."""
    import torch.distributed as dist

    return word_reward(problem, text) if dist.get_rank() else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, 4])
def test_p21_a_rank_with_nothing_to_train_on_hangs_nobody(tiny_folder, tmp_path, nproc):
    done = torchrun(tiny_folder, tmp_path / "starved", "--prompts", 4, reward="tests.test_train:rank_1_only",
                    nproc=nproc)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(metrics(tmp_path / "starved")) == 4


def test_p27_arms_see_the_same_problems_in_the_same_order(whole, tiny_folder, tmp_path):
    assert run(tiny_folder, tmp_path / "rlvr", "--method", "rlvr") == 0
    permix, rlvr = ([json.loads(line)["question"] for line in (out / "samples.jsonl").read_text().splitlines()]
                    for out in (whole, tmp_path / "rlvr"))
    assert permix == rlvr


@pytest.mark.parametrize("more", [["--mix", "rollout", "--minibatches", "3", "--dual-clip", "3"],
                                  ["--loss", "dapo", "--kl-coef", "0.1", "--entropy-coef", "0.01"],
                                  ["--loss", "dapo", "--dynamic-sampling", "1", "--overlong-buffer", "2"],
                                  ["--method", "distill"],
                                  ["--method", "sft", "--mix", "rollout", "--persona-prob", "0.5"],
                                  ["--anchor-coef", "0.5", "--anchor-answers", "6", "--recompute"],
                                  *(pytest.param(more, marks=pytest.mark.slow) for more in [
                                      ["--loss", "gspo"], ["--loss", "cispo"], ["--kl-coef", "0.1", "--kl", "k1"],
                                      ["--stop", "w9", "--stop", "w8 w7"], ["--correction", "truncate"],
                                      ["--anchor-coef", "0.5", "--anchor-on", "solved", "--anchor-loss", "ce"],
                                      ["--method", "sft"]])])
def test_every_arm_and_variant_runs(tiny_folder, tmp_path, more):
    assert run(tiny_folder, tmp_path / "run", "--steps", "2", "--save-every", "2", *more) == 0
    found, start = metrics(tmp_path / "run"), weights.load(str(tiny_folder), "float32")[0]
    assert [m["skipped_steps"] for m in found] == [0, 0] and max(m["grad_norm"] for m in found) > 0
    assert not torch.equal(tensors(tmp_path / "run")["model.norm.weight"], start.norm.weight)


def test_p28_memory_does_not_grow(tiny_folder, tmp_path, monkeypatch):
    """Live tensors after 12 steps are those after 4."""
    import gc

    counts, record = [], monitor.record

    def watch(*args):
        gc.collect()
        counts.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
        record(*args)

    monkeypatch.setattr(monitor, "record", watch)
    gc.collect()
    gc.freeze()                                         # what the tests before have left is not looked at
    run(tiny_folder, tmp_path / "run", "--steps", "12")
    gc.unfreeze()
    assert max(counts[8:]) <= max(counts[2:5])


def test_p28_memory_is_estimated_and_micro_batches_are_sized_to_fit(tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "run", "--steps", "1", "--memory", "9") == 0
    said = capsys.readouterr().err
    parts = dict(re.findall(r"(\w+) (\d+\.\d+)", said.split("estimated GB: ")[1].splitlines()[0]))
    assert {"weights", "moments", "gradients", "activations", "cache", "process", "peak"} <= parts.keys()
    assert 0 < float(parts["peak"]) <= 9
    assert run(tiny_folder, tmp_path / "none", "--memory", "0.0001") == 2
    assert "--recompute" in capsys.readouterr().err


def test_p28_where_sampling_takes_most_the_micro_batches_still_fill_what_training_may_take(tiny_folder, capsys,
                                                                                              monkeypatch):
    monkeypatch.setattr(memory, "outside_tensors", lambda *_: 0)        # pytest's own
    job = train.read(arguments(tiny_folder, "--memory", "0.2"))
    policy, job.model.c.vocab_size = Policy(job.model, 1e-3, 0), 1_000_000
    train.plan(policy, job)
    parts = {name: float(size) for name, size in re.findall(r"(\w+) (\d+\.\d+)", capsys.readouterr().err)}
    assert parts["logits"] > 0.09 and parts["activations"] > 0.16 and 0.17 < parts["peak"] <= 0.2


def test_p20_what_memory_gave_is_kept_by_a_resumed_run_until_memory_is_given_anew_or_unset(tiny_folder, tmp_path,
                                                                                           monkeypatch):
    out, held = tmp_path / "run", [0]
    monkeypatch.setattr(memory, "outside_tensors", lambda *_: held[0])

    def micro_tokens(*more) -> int:
        assert train.main([*more, "--eval-problems", "0"]) == 0
        return json.loads((out / "config.json").read_text())["settings"]["micro_tokens"]

    start = ["--model", str(tiny_folder), "--out", str(out), *FAST, *REWARD, "--memory", "0.3", "--steps"]
    first, held[0] = micro_tokens(*start, "1"), 3 * 10 ** 6
    shutil.rmtree(out)
    assert micro_tokens(*start, "1") == first           # 1 % more is held: the same
    resume, held[0] = ["--resume", str(out), "--steps"], 15 * 10 ** 7
    assert micro_tokens(*resume, "2") == first == micro_tokens(*resume, "3", "--micro-tokens", "7")
    assert micro_tokens(*resume, "4", "--memory", "0.3") < 0.6 * first
    assert micro_tokens(*resume, "5", "--micro-tokens", "70", "--unset", "memory") == 70
    assert micro_tokens(*resume, "6", "--memory", "0.3") > 70
    chosen = micro_tokens_for(weights.load(str(tiny_folder), "float32")[0])
    assert micro_tokens(*resume, "7", "--unset", "memory") == chosen == micro_tokens(*resume, "8")


def test_an_older_runs_config_stands_for_todays_defaults_of_what_is_fixed(tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(tiny_folder, out, "--steps", "1", "--eval-problems", "0") == 0
    config = json.loads((out / "config.json").read_text())
    for name in ("chat_template", "optimizer", "lora_rank", "lora_alpha", "lora_targets", "memory"):
        del config["settings"][name]
    (out / "config.json").write_text(json.dumps(config))
    for flag, value in (("chat-template", "plain"), ("lora-rank", "2"), ("optimizer", "adamw8bit"),
                        ("lora-alpha", "nan")):
        assert train.main(["--resume", str(out), "--steps", "2", f"--{flag}", value]) == 2
        assert f"--{flag} of a resumed run is " in capsys.readouterr().err
        assert json.loads((out / "config.json").read_text()) == config
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0


def test_a_refused_resume_leaves_the_run_as_it_was(tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(tiny_folder, out, "--steps", "3", "--eval-problems", "0") == 0
    before = (out / "config.json").read_bytes()
    assert train.main(["--resume", str(out), "--steps", "2"]) == 2
    assert "run has 3 steps already: give --steps 3 or more" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before and train.main(["--resume", str(out)]) == 0


def test_a_runs_slots_are_those_of_its_longest_row_whichever_step_has_it(tiny_folder, tmp_path, monkeypatch):
    """Fixed by the first call's rows, they would take all memory once a longer prompt comes."""
    (tmp_path / "p.jsonl").write_text('{"question": "w5", "answer": "1"}\n{"question": "%s", "answer": "1"}\n'
                                      % ("w7 " * 90))
    flags = ("--task", str(tmp_path / "p.jsonl"), "--eval-problems", "0", "--max-new-tokens", "8", "--persona-prob")
    for probability, room in (("1", 10), ("0", 0)):     # the longest persona, or none
        job = train.read(arguments(tiny_folder, *flags, probability))
        asked = []
        monkeypatch.setattr(run_module, "slots_for", lambda model, tokens, asked=asked: asked.append(tokens) or 4)
        sampler = job.sampler(job.model, job.longest_prompt)
        assert sampler.slots == 4 and 98 + room < asked[0] < 98 + room + 200
        job.rewarder.close()


def test_a_run_without_a_whole_checkpoint_is_not_begun_again_over_what_it_left(tiny_folder, tmp_path, capsys):
    """As of a copy without checkpoints, or with torn ones."""
    out = tmp_path / "run"
    assert run(tiny_folder, out, "--steps", "2", "--eval-problems", "0", "--keep", "1") == 0
    before, shards = metrics(out), out / "checkpoints/step-000002"
    (shards / "__0_0.distcp").write_bytes(b"torn")
    for says in ("has a model, but no whole checkpoint", "no checkpoint in .* is whole", ""):
        assert train.main(["--resume", str(out), "--steps", "3"]) == (2 if says else 0)
        assert re.search(says, capsys.readouterr().err)
        if says:
            assert metrics(out) == before
        shutil.rmtree(out / "model" if says.startswith("has") else shards, ignore_errors=not says)


def test_a_run_whose_model_was_moved_goes_on_with_it(tiny_folder, tmp_path, capsys):
    old, new = tmp_path / "old" / "model", tmp_path / "new" / "model"
    shutil.copytree(tiny_folder, old)
    assert run(old, tmp_path / "run", "--steps", "1", "--eval-problems", "0") == 0
    shutil.copytree(old, new)
    again = ["--resume", str(tmp_path / "run"), "--steps", "2", "--model"]
    assert train.main([*again, str(new)]) == 2 and "start a new run" in capsys.readouterr().err   # both are there
    shutil.rmtree(old)
    assert train.main([*again, str(tiny_folder)]) == 2 and train.main([*again, str(new)]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["settings"]["model"] == str(new) and config["resumed"][0]["changed"]["model"] == [str(old), str(new)]


def test_p28_activations_are_counted_as_they_are(tiny_folder):
    """What a forward keeps: in 4 layers some 8 to 40 vectors of the hidden size; recomputing keeps less."""
    model, tokens, vector = weights.load(str(tiny_folder), "float32")[0], 16 + 4 * 4, 32 * 4
    full = activation_bytes(model, 16, 4, 4)
    assert 4 * 8 * vector < full / tokens < 4 * 40 * vector
    assert activation_bytes(model, 16, 4, 64) / (16 + 4 * 64) > full / tokens   # scores: longer rows keep more a token
    model.checkpointing = True
    assert full / 4 < activation_bytes(model, 16, 4, 4) < 0.6 * full


@pytest.mark.parametrize("recompute", [False, True])
def test_p28_a_further_completion_keeps_as_much_as_the_second(tiny_folder, recompute):
    """So the plan needs no forward of a group that training would cut into parts."""
    model = weights.load(str(tiny_folder), "float32")[0]
    model.checkpointing = recompute
    one, two, eight = (activation_bytes(model, 9, n, 6) for n in (1, 2, 8))
    assert one + 7 * (two - one) == pytest.approx(eight, rel=0.02)


def test_p28_the_evaluations_cache_counts_and_what_the_process_holds_beside_tensors(tiny_folder):
    def parts(*more):
        job = train.read(arguments(tiny_folder, *more))
        return estimate(Policy(job.model, 1e-3, 0), job, 0, 200)

    small, large = (parts("--eval-problems", n, "--eval-personas", "9") for n in ("1", "200"))
    rows = 192 * row_bytes(weights.load(str(tiny_folder), "float32")[0], 200)
    assert large["peak"] - small["peak"] > 0.5 * rows
    assert 1e8 < small["process"] < 1e10


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--model", "/nowhere/model"], "no model at"), (["--task", "gsm9k"], "did you mean gsm8k"),
    (["--persona-prob", "1.5"], "between 0 and 1"), (["--group-size", "1"], "siblings"),
    (["--steps", "0"], "between 1 and"), (["--resume", "/nowhere/run"], "not a run folder"),
    (["--reward", "nothing"], "module:function"), (["--reward", "tests.test_train:nan_reward"], "finite"),
    (["--method", "rlvr", "--persona-prob", "0.5"], "no personas"), (["--resume", ""], "empty"),
    (["--personas", "/nowhere.jsonl"], "nowhere"), (["--prompts", "200000", "--group-size", "8"], "million"),
    (["--kl-coef", "0.1", "--kl-in", "reward"], "only k1"),
    (["--dual-clip", "1", "--minibatches", "2"], "above 1 + clip_high"),
    (["--clip-high", "0.28"], "the ratio is 1"), (["--dual-clip", "3"], "--minibatches 2"),
    (["--loss", "reinforce", "--minibatches", "2"], "no ratio"), (["--minibatches", "3"], "2 groups"),
    (["--overlap", "--dynamic-sampling", "1"], "cannot go with"), (["--overlap", "--profile"], "choose one"),
    (["--personas", "test"], "of the evaluation"), (["--method", "sft", "--dynamic-sampling", "1"], "unequal"),
    (["--overlap", "--method", "sft"], "imitates"), (["--method", "sft", "--correction", "truncate"], "cross-entropy"),
    (["--method", "distill", "--inner-epochs", "2"], "cross-entropy"), (["--teacher", "smollm2-135m"], "distill")])
def test_a_users_mistake_is_one_line_and_exit_code_2(tiny_folder, tmp_path, capsys, flags, message):
    assert train.main(["--model", str(tiny_folder), "--out", str(tmp_path / "run"), *FAST, *flags]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1] and errors[-1].startswith("train.py: ")


def test_what_the_flags_name_is_refused_before_there_is_a_run_folder(tiny_folder, tmp_path, capsys, monkeypatch):
    """A teacher that speaks other ids, personas of the evaluation, a tracker that is not there."""
    teacher = shutil.copytree(tiny_folder, tmp_path / "teacher")
    text = (teacher / "tokenizer.json").read_text()
    (teacher / "tokenizer.json").write_text(text.replace('"w50"', '"other"'))
    near = vars(train.personas.load("test")[3]) | {"split": "train"}
    near["text"] = near["text"].upper().replace(" ", "  ").rstrip(".")
    (tmp_path / "mine.jsonl").write_text(json.dumps(near))
    (tmp_path / "a.jsonl").write_text('{"question": "w3 w4?", "answer": "w5"}')
    (tmp_path / "b.jsonl").write_text('{"question": " W3 w4", "answer": "w5"}')
    evaluates = ["--eval-problems", "1"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    long, unread = tmp_path / "long.jsonl", tmp_path / "unread.jsonl"
    ask = json.dumps({"question": "w3", "answer": "7"}) + "\n"
    long.write_text(ask.replace("w3", "w3 " * 600) + ask)
    unread.write_text(3 * ask.replace("7", r"\\frac{1}{"))
    for flags, said in ((["--method", "distill", "--teacher", str(teacher)], "another tokenizer"),
                        (["--personas", str(tmp_path / "mine.jsonl")], "1 of the evaluation's personas"),
                        ([*evaluates, "--eval-pool", "train"], "144 of the evaluation's personas"),
                        ([*evaluates, "--task", str(tmp_path / "a.jsonl"), "--eval-task", str(tmp_path / "b.jsonl")],
                         "1 of the evaluation's 1 questions are trained on"),
                        (["--eval-problems", "0", "--task", str(tmp_path / "a.jsonl"),
                          "--eval-task", str(tmp_path / "b.jsonl")], "1 of the evaluation's 1 questions"),
                        (["--personas", "conflict-test"], "30 of the evaluation's personas"),
                        (["--personas", "paraphrases-test"], "24 of the evaluation's personas"),
                        (["--tracker", "wandb"], "pip install wandb"),
                        (["--max-new-tokens", "500"], "--max-new-tokens 500 that exceeds the model's 512"),
                        (["--eval-task", str(long), "--eval-problems", "2"], "problem 1 has up to 6"),
                        (["--anchor-coef", "0.1", "--anchor-tokens", "500"], "--anchor-tokens 500"),
                        (["--task", str(unread), "--reward", "rewards:correctness"], "can be correct"),
                        (["--reward", "tests.test_train:no_reward"], "no_reward failed on problem"),
                        (["--eval-problems", "3", "--eval-personas", "25"], "test has 24"),
                        (["--memory", "1e-9"], "too little")):
        assert run(tiny_folder, tmp_path / "run", *flags) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_two_processes_do_not_train_in_one_folder(tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(tiny_folder, out, "--steps", "1") == 0
    config = (out / "config.json").read_text()
    with files.claim(out):
        assert train.main(["--resume", str(out), "--steps", "2"]) == 2
    assert "another process works in" in capsys.readouterr().err and (out / "config.json").read_text() == config
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0      # which gives the lock back


def test_a_run_that_fails_before_its_first_step_leaves_a_folder_that_can_be_used_again(tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    CALLS.clear()
    assert run(tiny_folder, out, "--reward", "tests.test_train:reward_that_breaks_later") == 2
    assert "reward_that_breaks_later failed on problem" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert run(tiny_folder, out, "--steps", "1") == 0


@pytest.mark.parametrize("value", ["-1", "nan", "-inf", "1000000000000000000000"])
@pytest.mark.parametrize("flag", [a.option_strings[0] for a in parser()._actions if a.type in (int, float)])
def test_a_number_that_no_run_can_mean_is_refused_by_the_name_of_its_flag(capsys, flag, value):
    """At once: only what means "no limit" may be as large as it likes."""
    if value[0] == "1" and flag in ("--max-grad-norm", "--reward-seconds"):
        return
    with pytest.raises((ValueError, SystemExit)) as refusal:
        train.settings([f"{flag}={value}"])
    said = capsys.readouterr().err + str(refusal.value)
    assert flag in said and (isinstance(refusal.value, ValueError) or refusal.value.code == 2)


def test_weights_that_are_not_finite_are_refused(tiny_folder, tmp_path, capsys):
    model, tokenizer = weights.load(str(tiny_folder), "float32")
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    weights.save(model, tokenizer, tmp_path / "broken")
    for start, more in ((tmp_path / "broken", []), (tiny_folder, ["--method", "distill", "--teacher"])):
        assert run(start, tmp_path / "run", *more, *[str(tmp_path / "broken")][:len(more)]) == 2
        assert "broken are not all finite" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_disk_too_full_for_the_checkpoints_is_refused(tiny_folder, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert run(tiny_folder, tmp_path / "run") == 2
    assert "make room" in capsys.readouterr().err


def test_the_checkpoints_that_a_resumed_run_has_already_need_no_more_room(tiny_folder, tmp_path, monkeypatch):
    assert run(tiny_folder, tmp_path / "run", "--save-every", "1", "--keep", "3", "--steps", "3") == 0
    usage = shutil.disk_usage(tmp_path)
    policy = Policy(weights.load(str(tiny_folder), "float32")[0], 1e-3, 1)
    room = 17 * sum(p.numel() for p in policy.parameters)                       # one more, and the model
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=room))
    Checkpoints(tmp_path / "run" / "checkpoints", 3).check_disk(policy)
    with pytest.raises(ValueError, match="make room"):
        Checkpoints(tmp_path / "checkpoints", 3).check_disk(policy)


def test_a_resumed_run_compares_like_with_like_when_it_is_evaluated_otherwise(tiny_folder, tmp_path, capsys):
    few = ["--eval-problems", "2", "--eval-personas", "2"]
    assert run(tiny_folder, tmp_path / "run", "--steps", "1", *few) == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2", "--eval-problems", "3",
                       "--max-new-tokens", "5"]) == 0
    before, after = (json.loads((tmp_path / "run" / "evaluation" / when / "results.json").read_text())
                     for when in ("before", "after"))
    assert before["items"] == after["items"] and len(after["items"]) == 3 and before["steps"] == 0
    assert before["max_new_tokens"] == after["max_new_tokens"] == 5
    assert (before["method"], after["method"]) == ("start", "permix")
    for when, title in (("before", "before training: "), ("after", "permix after 2 steps: ")):
        page = (tmp_path / "run" / "evaluation" / when / "report.html").read_text()
        assert f"<title>{title}" in page and ("permix" in page.split("<footer>")[0]) == (when == "after")
        assert "no system prompt" not in page and "own system prompt, if any" in page
    page = (tmp_path / "run" / "evaluation" / "report.html").read_text()
    assert "<th>start</th><th>permix</th><th>permix - start</th>" in page
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "3", "--unset", "reward"]) == 0
    assert "no page of start and trained: " in capsys.readouterr().err         # their rewards are no pair
    assert not (tmp_path / "run" / "evaluation" / "report.html").exists()


def test_files_of_ones_own_are_trained_and_evaluated_on_whole_or_split_between_them(tiny_folder, tmp_path, capsys):
    for name, first in (("a", 3), ("b", 23)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"question": f"w{i} w{i + 1}?", "answer": f"w{i}"}) + "\n" for i in range(first, first + 20)))
    (tmp_path / "who.jsonl").write_text("".join(
        json.dumps({"name": f"w{i}", "text": f"w{i}.", "stratum": "x", "split": ("train", "test")[i % 2]}) + "\n"
        for i in range(3, 9)))
    a, b, who = (str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "who"))
    flags = ["--task", a, "--personas", who, "--eval-pool", who, "--eval-problems", "50"]
    for more, sizes in ((["--eval-task", b], (20, 20)), ([], (15, 5)), (["--eval-task", a], (15, 5))):
        job = train.read(arguments(tiny_folder, *flags, *more))
        assert (len(job.problems), len(job.held_out[0])) == sizes
        assert [[p.name for p in pool] for pool in (job.pool, job.held_out[1])] == [["w4", "w6", "w8"],
                                                                                   ["w3", "w5", "w7"]]
        said = capsys.readouterr().err
        assert f"{a}: {sizes[0]} problems, golds: {sizes[0]} text; {who}: 3 personas, 3 x\nevaluation: " in said


def test_a_resumed_run_takes_no_step_back_and_samples_ahead_only_corrected(tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "run", "--steps", "2") == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "1"]) == 2
    assert "has 2 steps already" in capsys.readouterr().err
    assert train.settings(["--resume", str(tmp_path / "run"), "--overlap"]).correction == "truncate"
    assert train.settings(["--resume", str(tmp_path / "run")]).correction == "none"


def test_a_resumed_run_stays_in_its_folder(tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "run", "--steps", "1") == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--out", str(tmp_path / "other"), "--steps", "2"]) == 2
    assert "its own folder" in capsys.readouterr().err and not (tmp_path / "other").exists()
    for folder in ("checkpoints", "model"):             # as of a run that was killed before its first checkpoint
        shutil.rmtree(tmp_path / "run" / folder)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert "resuming after step 0" in capsys.readouterr().err


def test_gradients_that_stay_broken_stop_the_run_with_its_checkpoints_intact(tiny_folder, tmp_path, capsys,
                                                                             monkeypatch):
    assert run(tiny_folder, tmp_path / "run", "--steps", "2") == 0
    monkeypatch.setattr(Policy, "step", lambda self, max_norm: float("nan"))
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "20", "--save-every", "100"]) == 2
    errors = capsys.readouterr().err
    assert "5 gradients in a row" in errors and errors.count("was skipped") == 5
    assert len(metrics(tmp_path / "run")) == 7
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json").is_file()


@pytest.mark.parametrize("more", [[], ["--method", "distill"]])
def test_a_run_without_one_finite_step_does_not_end_well(tiny_folder, tmp_path, capsys, more):
    """However short it is. The weights are finite, their logits are not: no completion can be sampled."""
    model, tokenizer = weights.load(str(tiny_folder), "float32")
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    weights.save(model, tokenizer, tmp_path / "broken")
    assert run(tmp_path / "broken", tmp_path / "run", "--steps", "2", *more) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "2 steps in a row had no finite logits" in errors[-1]
    assert any("8 completions were given up" in line for line in errors)
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_have_become_infinite_are_not_saved(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Policy, "step", lambda self, max_norm:
                        self.parameters[0].data.fill_(math.inf).sum().sign().item())
    assert run(tiny_folder, tmp_path / "run") == 2
    assert "no longer finite" in capsys.readouterr().err and not (tmp_path / "run" / "checkpoints").exists()


def test_a_resumed_run_records_what_was_changed_and_takes_flags_back(tiny_folder, tmp_path, capsys):
    out, more = tmp_path / "run", ["--recompute", "--stop", "w9", "--entropy-coef", "0.01"]
    assert run(tiny_folder, out, "--steps", "1", *more) == 0
    unset = [flag for name in ("recompute", "stop", "reward") for flag in ("--unset", name)]
    assert train.main(["--resume", str(out), "--steps", "2", *unset, "--entropy-coef", "0"]) == 0
    assert "resuming after step 1" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    (entry,) = config["resumed"]
    assert entry["after"] == 1 and entry["changed"] == {
        "steps": [1, 2], "recompute": [True, False], "stop": [["w9"], []], "entropy_coef": [0.01, 0.0],
        "reward": ["tests.test_train:word_reward", "rewards:correctness"]}
    assert config["settings"]["entropy_coef"] == 0 and config["settings"]["unset"] == []
    for name, said in (("recompile", "no such flag"), ("model", "--model of a resumed run")):
        assert train.main(["--resume", str(out), "--unset", name]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "run", "--steps", "1") == 0
    assert run(tiny_folder, tmp_path / "run") == 2
    assert "--resume" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused_before_the_anchor_is_prepared(tiny_folder, tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr("training.run.Anchor", lambda *_: prepared.append(True))
    assert run(tiny_folder, tmp_path / "run", "--steps", "1") == 0
    assert run(tiny_folder, tmp_path / "run", "--anchor-coef", "0.1") == 2 and not prepared


def test_a_distillation_with_a_kl_has_one_start_model(tiny_folder):
    job = train.read(arguments(tiny_folder, "--method", "distill", "--kl-coef", "0.1"))
    assert job.author is job.reference is not job.model and job.imitates


def test_p29_an_unknown_flag_is_an_error():
    with pytest.raises(SystemExit) as stop:
        train.main(["--learning_rate_typo", "1"])
    assert stop.value.code == 2


@pytest.mark.parametrize("flags, defaults", [
    ([], (0.7, 8, 12, 32, "plain", 3e-5)), (["--method", "rlvr"], (0.0, 8, 12, 32, "plain", 3e-5)),
    (["--method", "sft", "--task", "gsm8k"], (0.0, 1, 64, 48, "short", 6e-5))])
def test_the_defaults_are_those_that_help_names_by_method_and_task(flags, defaults):
    args = train.settings(flags)
    assert defaults == (args.persona_prob, args.group_size, args.prompts, args.max_new_tokens, args.prompt,
                        args.learning_rate)


def test_p31_a_clip_that_cannot_act_is_said_at_the_start(capsys):
    train.settings(["--loss", "gspo"])
    assert "the clip of gspo does nothing" in capsys.readouterr().err
    train.settings(["--loss", "gspo", "--minibatches", "2"])
    train.settings([])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flags, work", [
    (["--kl", "k1"], ["--kl-coef", "0.1"]), (["--kl-in", "reward", "--kl", "k1"], ["--kl-coef", "0.1"]),
    (["--method", "rlvr", "--mix", "rollout"], ["--method", "permix"]),
    (["--method", "rlvr", "--personas", "conflict-train"], ["--anchor-coef", "0.1"]),
    (["--method", "sft", "--temperature", "1"], ["--method", "distill"]),
    (["--method", "sft", "--truncated", "keep"], ["--method", "rlvr"]),
    (["--method", "sft", "--stop", "x", "--eval-problems", "0"], ["--eval-problems", "1"]),
    (["--anchor-count", "2"], ["--anchor-coef", "0.1"]), (["--anchor-answers", "9"], ["--anchor-coef", "0.1"]),
    (["--anchor-tokens", "9"], ["--anchor-coef", "0.1"]), (["--anchor-on", "solved"], ["--anchor-coef", "0.1"]),
    (["--anchor-loss", "ce"], ["--anchor-coef", "0.1"]), (["--micro-tokens", "9", "--memory", "1"], ["--memory", "0"]),
    (["--shard", "1"], ["--shard", "0"]), (["--no-cuda-graphs", "--device", "cpu"], ["--device", "auto"]),
    (["--overlap", "--save-every", "1"], ["--save-every", "2"]), (["--profile", "--steps", "2"], ["--steps", "3"]),
    (["--eval-personas", "3", "--eval-problems", "0"], ["--eval-problems", "1"]),
    (["--unset", "kl"], None), (["--warmup", "50"], ["--steps", "50"])])
def test_p31_a_flag_without_work_is_named_at_the_start(capsys, flags, work):
    train.settings(flags)
    said = re.findall(r"--[\w-]+(?= does nothing| 50 is longer)", capsys.readouterr().err)
    assert said and set(said) <= set(flags)
    if work:
        train.settings([*flags, *work])
        assert capsys.readouterr().err == ""


def test_no_flags_help_tells_its_default_twice():
    for action in parser()._actions:
        assert (action.help or "").count("(default") <= 1 and "None" not in (action.help or ""), action.dest
