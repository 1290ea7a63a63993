"""Qwen3.5: its gated DeltaNets against transformers and a loop, around chunks of 64, in packs, in the cache.

What every family has to pass is elsewhere: see FAMILIES in conftest.py.
"""

import copy
import json
from itertools import accumulate

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

import rollout
import train
import weights
from kernels.delta import Chunks, DeltaSizes, delta_net, delta_step, empty_states
from model import Transformer, completion_logprobs, pack
from rollout import Sampler, SamplingParams
from sampling.cache import row_bytes
from tests.conftest import FAMILIES, SIZES, make_reference, saved, stopping, tiny_tokenizer
from tests.test_model import logits_of, random_ids
from tests.test_train import FAST, REWARD, metrics
from weights import lora

LENGTHS = [1, 2, 63, 64, 65, 130]
ONE = DeltaSizes(2, 4, 8, 12, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("qwen35"), make_reference("qwen3_5"))


@pytest.fixture(scope="module")
def ours(folder):
    return stopping(weights.load(str(folder), "float32", "cpu")[0])


@pytest.fixture(scope="module")
def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def double(ours):
    return copy.deepcopy(ours).double()


def drawn(tokens: int, seed: int = 0):
    """What a layer mixes: x, g, beta, and the convolution's weight, in float64."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, ONE.channels, generator=draw, dtype=torch.float64)
    g = -0.1 * torch.rand(tokens, ONE.value_heads, generator=draw, dtype=torch.float64)
    beta = torch.rand(tokens, ONE.value_heads, generator=draw, dtype=torch.float64)
    weight = torch.randn(ONE.channels, 1, ONE.conv, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x, g, beta, weight


def stepped(x, g, beta, weight, states=None):
    """(outputs, states) of the recurrence, a token at a time."""
    states, entry = states or empty_states(ONE, 1, torch.float64, "cpu"), torch.tensor([0])
    steps = zip(x.split(1), g.split(1), beta.split(1), strict=True)
    return torch.cat([delta_step(*step, weight, ONE, states, entry) for step in steps]), states


# -- the mathematics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_the_recurrence_is_the_papers_written_out(length):
    x, g, beta, weight = drawn(length)
    found, (_, state) = stepped(x, g, beta, weight)
    S = torch.zeros(ONE.value_heads, ONE.key_dim, ONE.value_dim, dtype=torch.float64)
    padded = torch.cat([torch.zeros(ONE.conv - 1, ONE.channels, dtype=torch.float64), x])
    for t in range(length):
        y = torch.nn.functional.silu((padded[t:t + ONE.conv] * weight[:, 0].T).sum(0))
        q, k, v = y[:16].view(2, 8), y[16:32].view(2, 8), y[32:].view(4, 12)
        for head in range(4):
            a, b = (z[head // 2] / (z[head // 2].square().sum() + 1e-6).sqrt() for z in (q, k))
            S[head] *= g[t, head].exp()
            S[head] += torch.outer(b, beta[t, head] * (v[head] - b @ S[head]))
            assert (found[t, head] - a @ S[head] / 8 ** 0.5).abs().max() <= 1e-12
    assert (state[0] - S).abs().max() <= 1e-12


def test_chunks_equal_the_recurrence_behind_cached_prefixes_of_any_length():
    """Groups of runs, behind nothing, behind fewer tokens than the convolution sees, and behind many."""
    prefixes, rows = [0, 2, 130], [[1, 63, 64], [65, 2], [130, 3, 128]]
    chunks = Chunks(prefixes, rows, True, ONE.conv, "cpu")
    inputs = drawn(sum(map(sum, rows)))
    before = [stepped(*drawn(length, seed=i + 1))[1] if length else empty_states(ONE, 1, torch.float64, "cpu")
              for i, length in enumerate(prefixes)]
    states = [torch.cat(x) for x in zip(*before, strict=True)]
    out, after = delta_net(*inputs, ONE, chunks, states)
    lengths = [(i, length) for i, row in enumerate(rows) for length in row]
    ends = [*accumulate(length for _, length in lengths)]
    for run, ((group, length), end) in enumerate(zip(lengths, ends, strict=True)):
        own = [x[end - length:end] for x in inputs[:3]]
        expected, states = stepped(*own, inputs[3], [x.clone() for x in before[group]])
        assert (out[end - length:end] - expected).abs().max() <= 1e-12
        assert all((x[run] - y[0]).abs().max() <= 1e-12 for x, y in zip(after, states, strict=True))


# -- against transformers ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_equal_transformers_around_chunks(ours, reference, length):
    ids = random_ids(length)
    assert (logits_of(ours, ids) - reference(torch.tensor([ids])).logits[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_greedy_tokens_behind_prompts_around_chunks_equal_transformers(ours, reference):
    prompts = [random_ids(n, n) for n in LENGTHS]
    done = rollout.generate(ours, prompts, SamplingParams(max_tokens=64, temperature=0), slots=4)
    for completion in done:
        prompt = prompts[completion.index]
        theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False,
                                    eos_token_id=None)
        assert completion.tokens == theirs[0, len(prompt):].tolist()


@pytest.mark.parametrize("lengths", [(1, 64), (63, 2), (64, 65), (65, 70)])
def test_gradients_around_chunks_equal_transformers(ours, reference, lengths):
    prompt, completion = (random_ids(n, n) for n in lengths)
    for model in (ours, reference):
        model.zero_grad()
    completion_logprobs(ours, pack([(prompt, [completion])], ours))[0].mean().backward()
    logprobs = reference(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
    logprobs[torch.arange(len(completion)), torch.tensor(completion)].mean().backward()
    theirs = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for name, p in ours.named_parameters():
        assert (p.grad - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


# -- packed, shared ----------------------------------------------------------------------------------------------------

GROUPS = [(random_ids(p, p), [random_ids(c, 7 * p + c) for c in cs]) for p, cs in
          ((1, [66, 0, 2]), (63, [1, 3]), (64, [65]), (65, [129, 64]), (130, [5, 5, 5]), (2, []))]


def test_shared_prompts_equal_repeated_and_single_ones_and_so_do_all_gradients(double):
    count = sum(len(c) for _, cs in GROUPS for c in cs)
    weight = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for batches in ([GROUPS], [[(p, [c]) for p, cs in GROUPS for c in cs]],
                    [[(p, [c])] for p, cs in GROUPS for c in cs]):
        double.zero_grad()
        logprobs = torch.cat([completion_logprobs(double, pack(batch, double))[0] for batch in batches])
        (logprobs * weight).sum().backward()
        found.append((logprobs.detach(), [p.grad for p in double.parameters()]))
    (shared, grads), *others = found
    for logprobs, more in others:
        assert (logprobs - shared).abs().max() <= 1e-6              # log-probs are kept in fp32
        assert all((x - y).norm() <= 1e-10 * x.norm() for x, y in zip(grads, more, strict=True))


def test_gradients_flow_through_the_state_of_a_shared_prompt(double):
    """To the prompt's first token, 130 before: neither the convolutions reach it, nor attention, which is shut off."""
    model, seen = copy.deepcopy(double), []
    for i in {*range(4)} - {*model.c.delta_layers}:
        model.layers[i].self_attn["o_proj"].weight.data.zero_()
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logprobs = completion_logprobs(model, pack([(random_ids(130), [[5, 6, 7], [8, 9, 10]])], model))[0]
    for i in (2, 5):                                    # a token of each completion
        assert torch.autograd.grad(logprobs[i], seen[0], retain_graph=True)[0][0].norm() > 0


def test_p17_sequences_of_a_pack_leak_nothing_into_each_other(ours):
    before = completion_logprobs(ours, pack(GROUPS, ours))[0]
    (prompt, (first, *others)), *rest = GROUPS
    after = completion_logprobs(ours, pack([(prompt, [[t % 90 + 4 for t in first], *others]), *rest], ours))[0]
    assert torch.equal(before[len(first):], after[len(first):])
    assert not torch.equal(before[:len(first)], after[:len(first)])
    other = completion_logprobs(ours, pack([*GROUPS[:3], ([9] * 65, GROUPS[3][1]), *GROUPS[4:]], ours))[0]
    start = sum(len(c) for _, cs in GROUPS[:3] for c in cs)
    assert torch.equal(before[:start], other[:start]) and torch.equal(before[start + 193:], other[start + 193:])


def test_recomputed_layers_give_the_same_gradients(ours):
    model, found = copy.deepcopy(ours), []
    for model.checkpointing in (False, True):
        model.zero_grad()
        completion_logprobs(model, pack(GROUPS, model))[0].sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- cached ------------------------------------------------------------------------------------------------------------


def prompts_around(opening: int) -> list[list[int]]:
    """Prompts of every length, and some that share an opening."""
    shared = random_ids(opening, 50)
    return [*(random_ids(n, 100 + n) for n in LENGTHS), *(shared + random_ids(n, 200 + n) for n in (1, 3, 64, 70))]


def gap(model, prompts, done) -> float:
    """The largest difference of the sampler's log-probs from the uncached forward's."""
    found = []
    for c in done:
        theirs = completion_logprobs(model, pack([(prompts[c.index], [c.tokens])], model))[0]
        found.append((theirs.detach() - torch.tensor(c.logprobs)).abs().max())
    return max(found)


@pytest.mark.parametrize("opening", [8, 63, 64, 65, 130])
@pytest.mark.parametrize("n", [1, 3])
def test_p3_p18_cached_decoding_equals_the_uncached_forward_at_every_boundary(ours, n, opening):
    """Few slots: rows leave and enter, in an order that lengths make."""
    prompts = prompts_around(opening)
    done = list(rollout.generate(stopping(ours, range(3)), prompts, SamplingParams(n, max_tokens=70), slots=7))
    assert len(done) == n * len(prompts) and gap(ours, prompts, done) <= 1e-5


@pytest.mark.parametrize("n", [1, 2])
def test_a_sampler_that_lives_on_reads_no_state_of_another_call(ours, n):
    prompts, params = prompts_around(20), SamplingParams(n, max_tokens=9)
    sampler = Sampler(stopping(ours, range(20)), slots=5)
    expected = {(c.index, c.sample): c.tokens for c in sampler.generate(prompts, params)}
    with torch.inference_mode():
        for kv in (sampler.cache.row_kv, sampler.cache.prefix_kv):
            for x in (x for layer in kv.layers for x in layer):
                x.fill_(torch.nan)
    assert {(c.index, c.sample): c.tokens for c in sampler.generate(prompts, params)} == expected


def test_p19_a_sample_is_the_same_alone_and_in_a_batch(ours):
    prompts, params = prompts_around(30), SamplingParams(2, max_tokens=12)
    together = {(c.index, c.sample): c.tokens for c in rollout.generate(ours, prompts, params, slots=6)}
    for i, prompt in enumerate(prompts):
        for c in rollout.generate(ours, [prompt], params, slots=1, keys=[i]):
            assert c.tokens == together[i, c.sample]


class Counted(TorchDispatchMode):
    """Numbers that operators give out, and take in."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.numbers += sum(x.numel() for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("kind, grows", [("linear_attention", False), ("full_attention", True)])
def test_a_decode_step_costs_the_same_however_long_the_text_is(kind, grows, monkeypatch):
    settings = SIZES | FAMILIES["qwen3_5"] | {"layer_types": [kind] * 4}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = Transformer(weights.config_from_hf(config)).eval()
    monkeypatch.setattr(rollout, "bucket", lambda rows: rows)
    counts, step = [], Sampler.step

    def counted(*args):
        with Counted() as mode:
            out = step(*args)
        counts.append(mode.numbers)
        return out

    monkeypatch.setattr(Sampler, "step", counted)
    list(rollout.generate(model, [random_ids(7), random_ids(300)], SamplingParams(max_tokens=30), slots=1))
    assert len(counts) == 2 * 29 and (len(set(counts)) > 1) == grows


def test_states_are_fp32_in_a_bf16_model_and_counted_as_memory(folder):
    model = weights.load(str(folder), "bfloat16", "cpu")[0]
    sampler = Sampler(stopping(model), slots=3)
    prompts = prompts_around(20)
    done = list(sampler.generate(prompts, SamplingParams(2, max_tokens=12)))
    conv, state = sampler.cache.row_kv.layers[0]
    assert (conv.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert row_bytes(model, 10) - row_bytes(model, 0) == 10 * 2 * 2 * 2 * 16 * 2            # two layers have keys
    assert row_bytes(model, 0) == sum(x[0].nbytes for i in (0, 2) for x in sampler.cache.row_kv.layers[i])
    with torch.no_grad():
        drift = [(completion_logprobs(model, pack([(prompts[c.index], [c.tokens])], model))[0]
                  - torch.tensor(c.logprobs)).abs().mean() for c in done]
    assert max(drift) <= 0.1


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_a_vision_tower_and_a_draft_head_is_read_as_its_text_model_and_saved_alone(tmp_path):
    """As Qwen/Qwen3.5-0.8B comes: its config inside another one that says that the head is tied, its names behind
    `model.language_model.`, beside `model.visual.` and `mtp.`"""
    text = SIZES | FAMILIES["qwen3_5"]
    text.pop("model_type")
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 32, "num_position_embeddings": 16}
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    both = Qwen3_5ForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    both.save_pretrained(tmp_path / "both")
    tiny_tokenizer().save_pretrained(tmp_path / "both")
    written = json.loads((tmp_path / "both" / "config.json").read_text())
    del written["text_config"]["tie_word_embeddings"]
    (tmp_path / "both" / "config.json").write_text(json.dumps(written))
    tensors = load_file(tmp_path / "both" / "model.safetensors")
    assert {"model.language_model.layers.0.linear_attn.A_log"} < tensors.keys()
    assert any(name.startswith("model.visual.") for name in tensors)
    save_file(tensors | {"mtp.fc.weight": torch.zeros(3, 3), "mtp.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)},
              tmp_path / "both" / "model.safetensors", {"format": "pt"})
    model, tokenizer = weights.load(str(tmp_path / "both"), "float32")
    weights.save(model, tokenizer, tmp_path / "text")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    assert type(alone).__name__ == "Qwen3_5ForCausalLM" and model.c.tied
    ids = random_ids(70)
    with torch.no_grad():
        mine = logits_of(model, ids)
        for theirs in (both, alone):
            assert (mine - theirs(input_ids=torch.tensor([ids])).logits[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("sizes", [
    {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
     "num_key_value_heads": 2, "linear_num_value_heads": 16},
    {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 8,
     "num_key_value_heads": 2, "linear_num_value_heads": 16},
    {"hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
     "num_key_value_heads": 4, "linear_num_value_heads": 32}], ids=["0.8B", "2B", "4B"])
def test_names_and_shapes_are_transformers_at_every_size(sizes):
    config = AutoConfig.for_model("qwen3_5_text", tie_word_embeddings=True, **sizes)
    with torch.device("meta"):
        model, reference = Transformer(weights.config_from_hf(config)), AutoModelForCausalLM.from_config(config)
    theirs = {name.removeprefix("model."): p.shape for name, p in reference.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == theirs


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe", "qwen3_moe", "qwen3_vl"])
def test_relatives_are_refused_by_name(kind):
    config = AutoConfig.for_model(kind).get_text_config()
    with pytest.raises(ValueError, match=f"architecture '{kind}") as error:
        weights.config_from_hf(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family, change, names", [
    ("qwen3_5_text", {"hidden_act": "gelu_pytorch_tanh"}, "only silu"),
    ("qwen3_5_text", {"layer_types": ["sliding_attention"] * 32}, "sliding_attention"),
    ("qwen3", {"layer_types": ["linear_attention"] * 32}, "linear_attention")])
def test_what_no_released_model_has_is_refused_by_name(family, change, names):
    config = AutoConfig.for_model(family)
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=names):
        weights.config_from_hf(config)


def test_a_prompt_with_an_image_is_refused_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}))
    assert rollout.main(["--model", str(folder), "--prompts", str(tmp_path / "p.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "no images" in error and error.count("\n") == 1


# -- adapters, training ------------------------------------------------------------------------------------------------


def test_adapters_of_gated_deltanets_train_merge_and_are_left_out(folder, tmp_path):
    model, tokenizer = weights.load(str(folder), "float32", "cpu")
    before = logits_of(model, random_ids(70)).detach()
    lora.add(model, 2, 4.0, list(lora.TARGETS), seed=0)
    assert {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj", "self_attn.q_proj"} <= {
        name.split(".", 2)[2] for name in lora.adapters(model)}
    for m in lora.adapters(model).values():
        m.lora_B.data.normal_(0, 0.1)
    adapted = logits_of(model, random_ids(70))
    assert (adapted - before).abs().max() > 0.01
    assert torch.equal(logits_of(lora.without(model), random_ids(70)), before)
    done = list(rollout.generate(stopping(model), [random_ids(65)], SamplingParams(2, max_tokens=9)))
    assert gap(model, [random_ids(65)], done) <= 1e-5               # P34
    adapted.logsumexp(-1).sum().backward()
    assert all(m.lora_A.grad.norm() > 0 for m in lora.adapters(model).values())
    weights.save(model, tokenizer, tmp_path / "merged")
    merged = weights.load(str(tmp_path / "merged"), "float32", "cpu")[0]
    assert (logits_of(merged, random_ids(70)) - adapted).abs().max() <= 1e-4


def test_adapter_targets_that_a_model_has_not_are_refused(tiny_folder, capsys):
    flags = ["--model", str(tiny_folder), *FAST, *REWARD, "--lora-rank", "2", "--lora-targets", "in_proj_qkv"]
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert "in_proj_qkv" in error and error.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--dtype", "bfloat16", "--recompute"], ["--lora-rank", "2", "--memory", "9"]],
                         ids=" ".join)
def test_training_runs_and_its_sampler_and_trainer_agree(folder, tmp_path, more):
    flags = ["--model", str(folder), *FAST, *REWARD, "--steps", "2", *more, "--out", str(tmp_path / "out")]
    assert train.main(flags) == 0
    for line in metrics(tmp_path / "out"):
        assert line["grad_norm"] > 0 and line["sampler_trainer_gap"] <= (0.1 if "bfloat16" in more else 1e-5)
