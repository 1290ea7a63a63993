"""Shared by all tests: tiny random models of every family, the embedded model, and the data folder.

Tests run on the CPU, also where there is a GPU: all but those of test_gpu.py see none, nor do the processes they start.
"""

import copy
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")            # no test may wait for a network
if "PYTEST_XDIST_WORKER" in os.environ:                 # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import weights
from training.adamw import master_of

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 2, "tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
GEMMA_ROPE = {"full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
              "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True, "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_5": {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"] * 2,
                "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                "linear_value_head_dim": 12, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 7, "query_pre_attn_scalar": 24,
               "rope_parameters": GEMMA_ROPE,
               "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
               "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0]},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 99)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = ("{% for m in messages %}{{ '<s> ' + m['content'] + ' ' }}{% endfor %}"
                          "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}")
    return fast


def masters(policy):
    """A rank's rows of the weights in fp32: copies, except of fp32 weights."""
    return [master_of(*pair) for pair in zip(policy.optimizer.weights, policy.optimizer.state, strict=True)]


def make_reference(family: str, **sizes):
    """A random transformers model with weights large enough that every norm, bias and scale matters."""
    torch.manual_seed(0)
    settings = SIZES | FAMILIES[family] | sizes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "norm" in name or "bias" in name else 0.1))
            if "A_log" in name:
                p.sub_(4)                               # else a DeltaNet forgets within a token
    return model


def saved(folder, reference, tokenizer=None):
    """A transformers model and a tokenizer (tiny_tokenizer's) in a folder -> the folder."""
    reference.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def stopping(model, stop_ids=()):
    """The same model and weights with other stop tokens; none by default."""
    other = copy.copy(model)
    other.c = replace(model.c, stop_ids=list(stop_ids))
    return other


@pytest.fixture(scope="module", autouse=True)
def no_gpu(request):
    if request.module.__name__.endswith("test_gpu"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")        # for the processes that a test starts
        yield


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a file as `python NAME FLAGS` would, but in this process: (returncode, stdout, stderr)."""
    def run(name: str, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """(our model, transformers' model, folder), for each family in turn."""
    reference = make_reference(request.param)
    folder = saved(tmp_path_factory.mktemp(request.param), reference)
    return weights.load(str(folder), "float32", "cpu")[0], reference, folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("tiny"), make_reference("llama3"))


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory):
    """As tiny_folder, in bf16 and with matrices wide enough for moments of 8 bits."""
    reference = make_reference("llama3", hidden_size=64, intermediate_size=128).bfloat16()
    return saved(tmp_path_factory.mktemp("wide"), reference)


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """(model, tokenizer) of a small llama in fp32."""
    return weights.load(str(tiny_folder), "float32", "cpu")


@pytest.fixture(scope="session")
def embedded_path():
    try:
        return weights.resolve(weights.EMBEDDED)
    except ValueError as error:
        pytest.skip(f"the embedded model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def embedded_tokenizer(embedded_path):
    """The embedded model's, without its weights, which take seconds to read."""
    return weights.gguf.tokenizer(embedded_path)


@pytest.fixture(scope="session")
def embedded(embedded_path):
    """(model, tokenizer): SmolLM2-135M-Instruct in fp32."""
    return weights.load(weights.EMBEDDED, "float32", "cpu")
