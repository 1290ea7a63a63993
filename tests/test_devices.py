"""Where it computes: what --device and --dtype choose, and that host and device never mix.

The tests named test_pretended_... run on a GPU made of CPU memory (tests/pretended.py), in a second pytest that the
first one starts. What only a real GPU can show is in test_gpu.py.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import rollout
import train
import weights
from kernels import attention, native
from rollout import SamplingParams, generate
from sampling import draw
from tests.conftest import masters, stopping
from tests.test_model import groups_of, random_ids
from tests.test_train import FAST, REWARD, metrics, same, tensors
from training import monitor
from training.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
PRETENDED = os.environ.get("PRETENDED_GPU") == "1"
on_it = pytest.mark.skipif(not PRETENDED, reason="runs in the second pytest, with PRETENDED_GPU=1")
outside = pytest.mark.skipif(PRETENDED, reason="runs in the first pytest")


# -- memory ------------------------------------------------------------------------------------------------------------

SHAPES = """
import ctypes, torch
from weights import devices
devices.keep_freed_memory()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc, used = ctypes.CDLL(None), []
libc.mallinfo2.restype = Info
weight = torch.randn(96, 64, dtype=torch.bfloat16)
for n in range(40, 840):
    torch.randn(n, 64, dtype=torch.bfloat16) @ weight.t()
    used.append(libc.mallinfo2().uordblks)
print(used[-1] - used[0])
"""


@outside
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 counts what it gave")
@pytest.mark.skipif(not weights.devices.computes_bf16("cpu"), reason="here bf16 is not oneDNN's")
def test_matmuls_of_ever_new_shapes_take_no_memory_for_good():
    """459 MB where oneDNN and torch keep what they made for each shape, 27 with the limits."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    done = subprocess.run([sys.executable, "-c", SHAPES], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    assert int(done.stdout) < 60e6


# -- what is chosen ----------------------------------------------------------------------------------------------------


@outside
@pytest.mark.parametrize("capability, family, dtype", [
    ((7, 0), "llama", torch.float16), ((7, 5), "qwen3", torch.float16), ((7, 5), "gemma3_text", torch.float32),
    ((8, 0), "llama", torch.bfloat16), ((9, 0), "gemma3_text", torch.bfloat16)])
def test_auto_never_takes_bf16_where_a_gpu_only_emulates_it(monkeypatch, capability, family, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert weights.pick_dtype("auto", "cuda:0", family) == dtype
    assert weights.pick_dtype("float32", "cuda:0", family) == torch.float32


@outside
def test_a_bf16_that_would_be_emulated_is_refused_by_the_cards_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 has no bf16"):
        weights.pick_dtype("bfloat16", "cuda:0")


@outside
def test_auto_takes_the_gpu_of_this_process_and_cpu_stays_on_the_cpu(monkeypatch):
    assert weights.pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert weights.pick_device("auto") == weights.pick_device("cuda") == "cuda:1"
    assert weights.pick_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more processes than the 2 GPUs"):
        weights.pick_device("auto")


@outside
@pytest.mark.parametrize("main, flags", [(train.main, []), (rollout.main, []), (evaluate.main, [])])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line_and_exit_code_2(main, flags, device, tiny_folder, tmp_path, capsys):
    out = [] if main is rollout.main else ["--out", str(tmp_path / "out")]
    assert main(["--model", str(tiny_folder), "--device", device, *out, *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"--device {device}" in said[0] and "--device cpu" in said[0]
    assert not (tmp_path / "out").exists()


@outside
def test_load_asks_for_the_dtype_by_family_and_refuses_before_it_reads(tiny_folder, monkeypatch):
    asked, pick = [], weights.pick_dtype
    monkeypatch.setattr(weights, "pick_dtype", lambda *args: asked.append(args) or pick(*args))
    weights.load(str(tiny_folder), "auto", "cpu")
    assert asked == [("auto", "cpu"), ("auto", "cpu", "llama")]
    monkeypatch.setattr(weights, "pick_dtype", lambda dtype, device: (_ for _ in ()).throw(ValueError("none here")))
    with pytest.raises(ValueError, match="^none here$"):
        weights.load("/nowhere", "bfloat16", "cpu")


@outside
def test_every_model_of_a_command_goes_to_its_device(tiny_folder, tmp_path, monkeypatch):
    asked, load = [], weights.load
    monkeypatch.setattr(weights, "load", lambda *args: asked.append(args[1:3]) or load(*args))
    other = str(shutil.copytree(tiny_folder, tmp_path / "other"))
    sheet = tmp_path / "gym.jsonl"
    sheet.write_text("\n".join(json.dumps({"persona": f"w{i}", "questions": dict.fromkeys(
        evaluate.judge.TASKS, ["w5 w6?"])}) for i in (10, 20)))
    flags = ["--model", str(tiny_folder), "--device", "cpu", "--dtype", "float32"]
    assert train.main([*flags, *FAST, *REWARD, "--method", "distill", "--teacher", other, "--steps", "1", "--out",
                       str(tmp_path / "run")]) == 0
    assert evaluate.main([*flags, "--limit", "2", "--max-new-tokens", "4", "--fidelity", "1", "--start-model", other,
                          "--personagym", str(sheet), "--judge-model", other, "--out", str(tmp_path / "out")]) == 0
    assert asked == [("float32", "cpu")] * 5            # model and teacher; model, reader and judge


@outside
@pytest.mark.parametrize("device, backend, chosen", [("cpu", "gloo", []), ("cuda:1", "cpu:gloo,cuda:nccl", ["cuda:1"])])
def test_ranks_meet_over_what_their_device_needs(monkeypatch, device, backend, chosen):
    met, devices = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("training.policy.dist.rendezvous", lambda url: iter([(None, 1, 2)]))
    monkeypatch.setattr("training.policy.dist.PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr("training.policy.dist.init_process_group", lambda name, **more: met.append(name))
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    train.join(device)
    assert met == [backend] and devices == chosen


@outside
def test_a_resumed_run_computes_in_the_dtype_that_auto_meant_and_may_change_its_device(tiny_folder, tmp_path):
    flags = ["--model", str(tiny_folder), *FAST, *REWARD, "--dtype", "auto", "--steps", "1", "--out"]
    assert train.main([*flags, str(tmp_path / "run")]) == 0
    told = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert told["dtype"] in weights.DTYPES and told["device"] == "auto"
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2", "--device", "cpu"]) == 0


@outside
@pytest.mark.parametrize("capability, dtype, triton", [((7, 5), torch.float16, False), ((8, 0), torch.float16, True),
                                                       ((9, 0), torch.float32, True), ((9, 0), torch.float64, False)])
def test_triton_is_for_gpus_from_the_a100_on(monkeypatch, capability, dtype, triton):
    from kernels import linear_logprob
    module = sys.modules[linear_logprob.__module__]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert module.uses_triton(SimpleNamespace(dtype=dtype, device="cuda:0")) == triton


@outside
def test_a_clock_waits_before_it_reads_the_time(monkeypatch):
    monkeypatch.setattr(torch.cpu, "synchronize", lambda *_: time.sleep(0.05))
    model = SimpleNamespace(device=torch.device("cpu"))
    watch = SimpleNamespace(seconds={}, first=0, policy=SimpleNamespace(model=model))
    with monitor.Monitor.phase(watch, "phase"):
        pass
    assert watch.seconds["phase"] >= 0.05


@outside
def test_tests_and_what_they_start_see_no_gpu():
    assert torch.cuda.is_available.__module__ == "tests.conftest" and not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


# -- fp16's loss scale -------------------------------------------------------------------------------------------------


def policy_in(dtype: str, folder):
    return Policy(weights.load(str(folder), dtype, "cpu")[0], 1e-3, 0)


def gradient(policy, size: float = 1.0) -> torch.Tensor:
    """The gradient that the masters get for `size` times a small loss, through the loss scale and back."""
    logprobs = train.completion_logprobs(policy.model, train.pack(groups_of(), policy.model))[0]
    policy.backward(size * logprobs.mean())
    return torch.cat([g.flatten() for g in policy.reduced()]) / policy.loss_scale


@outside
def test_the_loss_scale_saves_gradients_that_fp16_would_lose(tiny_folder):
    exact = gradient(policy_in("float32", tiny_folder), 1e-6)
    scaled, plain = policy_in("float16", tiny_folder), policy_in("float16", tiny_folder)
    plain.loss_scale = 1.0
    assert (gradient(scaled, 1e-6) - exact).norm() <= 0.01 * exact.norm()
    assert (gradient(plain, 1e-6) - exact).norm() > 0.5 * exact.norm()


@outside
def test_a_step_that_overflows_is_skipped_and_counted_and_halves_the_scale(tiny_folder):
    policy = policy_in("float16", tiny_folder)
    before, scale = [m.clone() for m in masters(policy)], policy.loss_scale
    policy.gradients = list(gradient(policy, 1e6).split([p.numel() for p in policy.parameters]))
    assert policy.step(1.0) != policy.step(1.0)         # nan or inf, then 0: nothing is left of the broken one
    assert policy.skipped == 1 and policy.loss_scale == scale / 2 and policy.optimizer.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, masters(policy), strict=True))


@outside
def test_the_scale_doubles_after_enough_good_steps_and_never_falls_below_1(tiny_folder, monkeypatch):
    monkeypatch.setattr("training.policy.GROWTH", 3)
    policy = policy_in("float16", tiny_folder)
    scales = []
    for finite in (True, True, True, True, False, True, True, True):
        policy.rescale(finite)
        scales.append(policy.loss_scale / 2 ** 16)
    assert scales == [1, 1, 2, 2, 1, 1, 1, 2]           # three good ones in a row
    for finite, bound in ((False, 1), (True, 2 ** 24)):
        for _ in range(100):
            policy.rescale(finite)
        assert policy.loss_scale == bound


@outside
def test_a_batch_without_a_gradient_says_nothing_of_the_scale(tiny_folder):
    policy = policy_in("float16", tiny_folder)
    assert policy.step(1.0) == 0 and policy.good_steps == policy.skipped == 0


@outside
def test_steps_that_overflow_are_counted_one_by_one_and_break_no_run(tiny_folder, tmp_path, monkeypatch):
    """Imitation's loss is large: fp16 overflows until its scale has come down."""
    monkeypatch.setattr(monitor, "MAX_BROKEN", 1)
    flags = ["--model", str(tiny_folder), *FAST, "--reward", "tests.test_train:flat_reward", "--method", "sft"]
    assert train.main([*flags, "--dtype", "float16", "--out", str(tmp_path / "run")]) == 0
    found = [(m["skipped_steps"], m["loss_scale"]) for m in metrics(tmp_path / "run")]
    assert found[0][0] == 1 and found[-1][0] == 0
    assert found[-1][1] == 2.0 ** 16 / 2 ** sum(skipped for skipped, _ in found)


@outside
def test_p20_a_run_in_fp16_goes_on_with_its_scale(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("training.policy.GROWTH", 2)
    flags = ["--model", str(tiny_folder), *FAST, *REWARD, "--dtype", "float16", "--device", "cpu"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert train.main([*flags, "--out", str(tmp_path / "two"), "--steps", "3"]) == 0
    assert train.main(["--resume", str(tmp_path / "two"), "--steps", "4"]) == 0
    assert metrics(tmp_path / "two") == metrics(tmp_path / "whole")
    assert same(tensors(tmp_path / "two"), tensors(tmp_path / "whole"))
    assert [m["loss_scale"] for m in metrics(tmp_path / "two")] == [2.0 ** 16, 2.0 ** 17, 2.0 ** 17, 2.0 ** 18]


# -- the pretended GPU ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@outside
def test_host_and_device_never_mix_in_a_second_pytest_on_a_pretended_gpu():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
                          capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PRETENDED_GPU": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture
def counts(monkeypatch, request):
    """Within it every model is loaded onto the pretended GPU: one of capability 9.0, or of the test's own."""
    from tests import pretended

    modes = pretended.use(monkeypatch, getattr(request, "param", (9, 0)))
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield pretended.COUNTS


@on_it
def test_pretended_mixing_is_an_error_that_names_the_operator(counts):
    from tests.pretended import DEVICE, Mixed

    there, here, number = torch.ones(3, device=DEVICE), torch.ones(3), torch.tensor(2.0)
    for mix in (lambda: there + here, lambda: here @ there, lambda: there[torch.tensor([0, 2])],
                lambda: torch.cat([there, here]), lambda: torch.where(here > 0, there, there),
                lambda: number.add_(there.sum()), lambda: torch.stack([there.sum(), number])):
        with pytest.raises(Mixed, match="on the host"):
            mix()
    assert (there + number).sum().item() == 9 and (there.cpu() + here).tolist() == [2, 2, 2]
    assert counts["reads"] == 2                         # of .item() and of .cpu()


def sampled(model, n: int, **settings) -> dict:
    """Shared openings, lone prompts, few slots: rows leave and others take their place."""
    opening = random_ids(20)
    prompts = [opening + random_ids(5, 1), opening + random_ids(9, 2), random_ids(6, 3), opening + random_ids(3, 4)]
    params = SamplingParams(n, max_tokens=12, **settings)
    done = generate(stopping(model, range(12)), prompts, params, slots=3)
    return {(c.index, c.sample): (c.tokens, c.truncated) for c in done}


@on_it
def test_pretended_sampling_equals_the_cpus_in_every_family(family, counts):
    ours, _, folder = family
    assert sampled(weights.load(str(folder), "float32")[0], 2) == sampled(ours, 2)


@on_it
@pytest.mark.parametrize("more", [{"top_k": 9, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0}])
def test_pretended_sampling_of_single_samples_equals_the_cpus_with_every_filter(tiny, tiny_folder, counts, more):
    assert sampled(weights.load(str(tiny_folder), "float32")[0], 1, **more) == sampled(tiny[0], 1, **more)


@on_it
def test_pretended_decoding_reads_no_more_values_for_more_rows(tiny_folder, counts):
    model, found = weights.load(str(tiny_folder), "float32")[0], []
    for rows in (2, 16):
        counts["reads"] = 0
        list(generate(stopping(model), [random_ids(5)], SamplingParams(rows, max_tokens=30)))
        found.append(counts["reads"])
    assert found[0] == found[1] <= 3 * 30 + 2           # tokens, log-probs and the longest row, a step


@on_it
def test_pretended_rows_are_drawn_in_one_go(tiny_folder, counts, monkeypatch):
    calls, model = [], weights.load(str(tiny_folder), "float32")[0]
    sample_rows = draw.sample_rows
    monkeypatch.setattr(draw, "sample_rows",
                        lambda *args: calls.append(len(args[0])) or sample_rows(*args))
    list(generate(stopping(model), [random_ids(5)], SamplingParams(16, max_tokens=3)))
    assert calls == [16, 16, 16]


@on_it
@pytest.mark.parametrize("counts", [(7, 5)], indirect=True)
def test_pretended_training_on_a_gpu_before_the_a100_takes_the_cpus_steps_and_torchs_log_probs(
        tiny_folder, tmp_path, counts, monkeypatch):
    flags = ["--model", str(tiny_folder), *FAST, *REWARD, "--steps", "2", "--kl-coef", "0.1", "--entropy-coef", "0.1"]
    assert train.main([*flags, "--out", str(tmp_path / "there")]) == 0 and counts["kernels"] == 0
    monkeypatch.setattr(weights, "pick_device", lambda name: "cpu")
    assert train.main([*flags, "--out", str(tmp_path / "here")]) == 0
    for there, here in zip(metrics(tmp_path / "there"), metrics(tmp_path / "here"), strict=True):
        assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-5)


@on_it
@pytest.mark.parametrize("more", [
    [], ["--dtype", "bfloat16"], ["--dtype", "float16"],
    ["--kl-coef", "0.1", "--kl", "k1", "--kl-in", "reward", "--overlong-buffer", "2"],
    ["--loss", "dapo", "--kl-coef", "0.1", "--entropy-coef", "0.01", "--dynamic-sampling", "1"],
    ["--loss", "gspo", "--inner-epochs", "2", "--correction", "mask"], ["--method", "distill"], ["--method", "sft"],
    ["--mix", "rollout", "--minibatches", "2"], ["--anchor-coef", "0.5", "--anchor-answers", "6"],
    ["--memory", "9"], ["--profile"], ["--async-save"]], ids=" ".join)
def test_pretended_training_takes_the_cpus_steps(tiny_folder, tmp_path, monkeypatch, counts, more):
    flags = ["--model", str(tiny_folder), *FAST, *REWARD, "--steps", "3" if "--profile" in more else "2", *more]
    assert train.main([*flags, "--out", str(tmp_path / "there")]) == 0
    assert counts["kernels"] > 0 and counts["synchronized"] >= 3 * 2    # sample, train, step: each waits for the device
    assert bool(counts["varlen"]) == ("float16" in str(more))
    monkeypatch.setattr(weights, "pick_device", lambda name: "cpu")
    monkeypatch.setattr(attention, "uses_varlen", lambda q: q.dtype != torch.float32)  # the same stand-in here
    monkeypatch.setattr(native, "usable", lambda x: False)                      # C++ rounds less often
    assert train.main([*flags, "--out", str(tmp_path / "here")]) == 0
    close = 0.02 if "float16" in str(more) else 1e-5
    for there, here in zip(metrics(tmp_path / "there"), metrics(tmp_path / "here"), strict=True):
        assert there["reward"] == here["reward"] and there["grad_norm"] == pytest.approx(here["grad_norm"], rel=close)


@on_it
def test_pretended_runs_go_on_where_they_stopped(tiny_folder, tmp_path, counts):
    flags = ["--model", str(tiny_folder), *FAST, *REWARD]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert train.main([*flags, "--out", str(tmp_path / "two"), "--steps", "2"]) == 0
    assert train.main(["--resume", str(tmp_path / "two"), "--steps", "4"]) == 0
    assert metrics(tmp_path / "two") == metrics(tmp_path / "whole")
    assert same(tensors(tmp_path / "two"), tensors(tmp_path / "whole"))


@on_it
def test_pretended_evaluation_fidelity_and_judge_stay_on_the_device(tiny_folder, tmp_path, counts):
    sheet = tmp_path / "gym.jsonl"
    sheet.write_text("\n".join(json.dumps({"persona": f"w{i}", "questions": {task: ["w5 w6?"] for task in
                               evaluate.judge.TASKS}}) for i in (10, 20)))
    assert evaluate.main(["--model", str(tiny_folder), "--limit", "3", "--max-new-tokens", "5", "--fidelity", "2",
                          "--samples", "2", "--noise-floor", "--personagym", str(sheet), "--judge-model",
                          str(tiny_folder), "--out", str(tmp_path / "out")]) == 0
    fidelity = json.loads((tmp_path / "out" / "results.json").read_text())["fidelity"]
    assert 0 <= fidelity["persona_identification"] <= 1 and fidelity["personagym"]["calls"] > 0
    assert counts["kernels"] > 0


@on_it
@pytest.mark.parametrize("dtype, close, counts, varlen", [
    ("bfloat16", 0.1, (9, 0), True), ("float16", 0.02, (8, 0), True), ("float16", 0.02, (7, 5), False),
    ("float32", 1e-5, (9, 0), False)], indirect=["counts"])
def test_pretended_attention_in_half_precision_is_one_varlen_call_a_layer_from_the_a100_on(
        family, dtype, close, counts, varlen):
    ours, _, folder = family
    model = weights.load(str(folder), dtype)[0]
    logprobs = train.completion_logprobs(model, train.pack(groups_of(), model))[0]
    assert counts["varlen"] == (model.c.num_layers - len(model.c.delta_layers) if varlen else 0)
    logprobs.sum().backward()
    plain = train.completion_logprobs(ours, train.pack(groups_of(), ours))[0]
    assert (logprobs.detach().cpu() - plain.detach()).abs().mean() <= close
    assert all(p.grad.device == model.device for p in model.parameters())
