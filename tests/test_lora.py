"""Adapters: against peft and float64, in sampler and trainer alike, saved, resumed."""

import copy
import json

import pytest
import torch

import train
import weights
from model import LoRALinear, completion_logprobs, pack
from rollout import SamplingParams, generate
from tests.test_train import FAST, REWARD, metrics, one_batch, run, same, tensors
from training.policy import Policy
from weights import lora

FLAGS = ["--lora-rank", "4", "--lora-alpha", "8", "--learning-rate", "1e-2"]
GROUPS = [([3, 4, 5, 6], [[7, 8, 9], [10, 11, 12, 13]]), ([14, 15], [[16, 17, 18, 19, 20]])]


def adapted(folder, dtype: str = "float32", rank: int = 4):
    """A model whose adapters change its output."""
    model, tokenizer = weights.load(str(folder), dtype, "cpu")
    lora.add(model, rank, 8.0, lora.TARGETS, seed=0)
    generator = torch.Generator().manual_seed(1)
    for m in lora.adapters(model).values():
        m.lora_B.data.copy_(torch.randn(m.lora_B.shape, generator=generator) * 0.1)
    return model, tokenizer


def loss_of(model) -> torch.Tensor:
    logprobs, entropy = completion_logprobs(model, pack(GROUPS, model))
    return logprobs.sum() + entropy.sum()


def test_logits_and_gradients_equal_pefts_on_the_same_adapter(tiny_folder, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    from transformers import AutoModelForCausalLM

    model, _ = adapted(tiny_folder)
    lora.save(model, str(tiny_folder), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
    packed = pack([(ids[0].tolist(), [])], model)
    mine = model.logits(model(packed.input_ids, packed.position_ids, packed.attend))
    logits = theirs(ids).logits[0]
    assert (mine - logits).abs().max() <= 1e-5
    mine.log_softmax(-1)[:, 5].sum().backward()
    logits.log_softmax(-1)[:, 5].sum().backward()
    grads = {name.removeprefix("base_model.model.model.").replace(".default.weight", ""): p.grad
             for name, p in theirs.named_parameters() if p.requires_grad}
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained.keys() and len(grads) == 2 * 7 * len(model.layers)
    for name, grad in trained.items():
        assert (grad - grads[name]).norm() <= 1e-5 * grad.norm() > 0, name


def test_gradients_equal_those_of_a_weight_written_out_in_float64(tiny_folder):
    model, _ = adapted(tiny_folder)
    loss_of(model).backward()
    exact = weights.load(str(tiny_folder), "float32", "cpu")[0].double()
    pairs = {}
    for name, m in lora.adapters(model).items():
        a, b = (x.detach().double().requires_grad_() for x in (m.lora_A, m.lora_B))
        pairs[name] = a, b
        place = exact.get_submodule(name)
        merged = place.weight.detach() + m.scale * b @ a
        del place.weight
        place.weight = merged
    loss_of(exact).backward()
    for name, m in lora.adapters(model).items():
        for mine, (theirs) in zip((m.lora_A, m.lora_B), pairs[name], strict=True):
            assert (mine.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm() > 0, name


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 0.06)])
def test_p34_sampler_and_trainer_run_the_adapter_before_and_after_a_step_and_after_a_resume(tiny_folder, dtype, bound):
    model, _ = adapted(tiny_folder, dtype)
    policy = Policy(model, 1e-2, 0)

    def gap(model) -> float:
        prompts = [prompt for prompt, _ in GROUPS]
        done = sorted(generate(model, prompts, SamplingParams(2, max_tokens=6)), key=lambda c: (c.index, c.sample))
        groups = [(p, [c.tokens for c in done if c.index == i]) for i, p in enumerate(prompts)]
        with torch.no_grad():
            theirs = completion_logprobs(model, pack(groups, model))[0]
        return (theirs - torch.tensor([x for c in done for x in c.logprobs])).abs().max().item()

    plain = lora.without(model)
    before = [p.clone() for p in plain.parameters()]
    assert gap(model) <= bound and abs(loss_of(model) - loss_of(plain)) > 0.5
    policy.backward(loss_of(model))
    assert policy.step(1.0) > 0 and gap(model) <= bound
    state, (again, _) = copy.deepcopy(policy.state()), adapted(tiny_folder, dtype, rank=4)
    resumed = Policy(again, 1e-2, 0)
    for name, kept in resumed.state().items():
        for key, x in kept.items() if isinstance(kept, dict) else ():
            x.copy_(state[name][key])
    assert gap(again) <= bound and torch.equal(loss_of(again), loss_of(model))
    assert all(torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))     # the base is frozen


@pytest.mark.parametrize("more", [["--lora-rank", "8"], ["--lora-alpha", "4"], ["--lora-targets", "q_proj"],
                                  ["--optimizer", "adamw8bit"], ["--unset", "lora-rank"]], ids=" ".join)
def test_what_is_trained_and_how_is_one_thing_for_a_whole_run(tiny_folder, tmp_path, capsys, more):
    assert run(tiny_folder, tmp_path / "run", "--steps", "1", *FLAGS) == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2", *more]) == 2
    assert f"{more[-1] if more[0] == '--unset' else more[0][2:]} of a resumed run is" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_p20_a_run_with_adapters_resumes_as_the_same_run_and_saves_two_folders(tiny_folder, tmp_path, dtype):
    flags = [*FLAGS, "--dtype", dtype, "--kl-coef", "0.1"]
    assert run(tiny_folder, tmp_path / "whole", *flags) == 0
    assert run(tiny_folder, tmp_path / "half", "--steps", "2", *flags) == 0
    assert train.main(["--resume", str(tmp_path / "half"), "--steps", "4"]) == 0
    assert metrics(tmp_path / "half") == metrics(tmp_path / "whole") and metrics(tmp_path / "half")[-1]["kl"] > 0
    assert same(tensors(tmp_path / "half"), tensors(tmp_path / "whole"))
    config = json.loads((tmp_path / "half" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == str(tiny_folder)


def test_the_merged_folder_answers_as_the_model_with_its_adapters(tiny_folder, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    weights.save(model, tokenizer, tmp_path / "merged")
    assert abs(loss_of(weights.load(str(tmp_path / "merged"), "float32")[0]) - loss_of(model)) <= 1e-4


def test_the_start_model_beside_adapters_takes_no_memory_and_only_the_adapters_are_trained(tiny_folder):
    job, batch = one_batch(tiny_folder, *FLAGS, "--kl-coef", "0.1")
    there = {p.data_ptr() for p in job.model.parameters()}
    assert {p.data_ptr() for p in job.reference.parameters()} < there
    assert not any(isinstance(m, LoRALinear) for m in job.reference.modules())
    policy = Policy(job.model, 1e-2, 0)
    assert all("lora_" in name for name in policy.names) and len(policy.names) == 2 * 7 * len(job.model.layers)
    before = {name: p.clone() for name, p in job.model.named_parameters()}
    assert train.learn(policy, batch, job, 0)["grad_norm"] > 0
    moved = {name for name, p in job.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_B" in name for name in moved)        # A's gradient is 0 while B is


def test_few_targets_get_adapters_and_unknown_ones_are_refused(tiny_folder, capsys):
    model, _ = weights.load(str(tiny_folder), "float32", "cpu")
    lora.add(model, 2, 8.0, ["q_proj", "down_proj"], 0)
    assert {name.rpartition(".")[2] for name in lora.adapters(model)} == {"q_proj", "down_proj"}
    assert train.main(["--model", str(tiny_folder), *FAST, *REWARD, "--lora-rank", "2", "--lora-targets", "q"]) == 2
    assert "--lora-targets q" in capsys.readouterr().err
    assert train.main(["--model", str(tiny_folder), *FAST, *REWARD, "--lora-rank", "5000"]) == 2
    assert "--lora-rank 5000 is more than the 32 that the smaller side of q_proj has" in capsys.readouterr().err
