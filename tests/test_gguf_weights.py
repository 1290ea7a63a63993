"""GGUF files written here as llama.cpp's converter writes them, read back, and compared with transformers."""

import json
import weakref

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import weights
from rollout import SamplingParams, generate
from tests.conftest import stopping
from tests.test_model import logits_of, random_ids
from weights import gguf as gguf_weights
from weights import huggingface

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
GEMMA_ROPE = {"full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
              "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
FAMILIES = {                                            # transformers' model type, its settings, GGUF's name and keys
    "llama": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, "llama",
              {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    "llama3.1": ("llama", {"rope_parameters": LLAMA31, "tie_word_embeddings": True}, "llama",
                 {"rope.freq_base": 500000.0}),
    "mistral": ("mistral", {"sliding_window": 7}, "llama", {"attention.sliding_window": 7}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "qwen2", {}),
    "qwen3": ("qwen3", {}, "qwen3", {}),
    "gemma3": ("gemma3_text", {"sliding_window": 7, "query_pre_attn_scalar": 64, "rope_parameters": GEMMA_ROPE,
                               "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
               "gemma3", {"attention.sliding_window": 7, "attention.sliding_window_pattern": 2,
                          "rope.freq_base": 1000000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
}
ALL_KINDS = [Kind[name] for name in ("Q4_K", "F16", "Q5_0", "Q6_K", "BF16", "Q8_0", "Q5_K", "Q4_0", "Q4_1", "F32",
                                     "Q5_1")]


# -- a writer that does what llama.cpp's converter does ----------------------------------------------------------------


def quantised(weight: np.ndarray, kind: Kind, draw: np.random.Generator) -> np.ndarray:
    """weight in the kind's blocks. gguf can't write K-quants: those are random blocks with scales of a fit size."""
    if kind not in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        return gguf.quantize(weight, kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = draw.integers(0, 256, (weight.size // elements, size), dtype=np.uint8)
    scale = {Kind.Q4_K: 5e-4, Kind.Q5_K: 2.5e-4, Kind.Q6_K: 7e-5}[kind]
    at = slice(-2, None) if kind == Kind.Q6_K else slice(0, 2)
    blocks[:, at] = np.array([scale], np.float16).view(np.uint8)
    if kind != Kind.Q6_K:                               # the minimum that centres the weights
        blocks[:, 2:4] = np.array([scale * (7.5 if kind == Kind.Q4_K else 15.5)], np.float16).view(np.uint8)
    return blocks.reshape(len(weight), -1)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Llama's q and k as GGUF keeps them: the two halves of a head's rotary pairs side by side."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama31_factors(dim: int) -> np.ndarray:
    wavelength = 2 * np.pi * LLAMA31["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    smooth = (8192 / wavelength - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    return np.where(wavelength < 2048, 1, np.where(wavelength > 8192, 8, between)).astype(np.float32)


def writer_of(path, architecture: str, keys: dict, vocabulary: dict) -> gguf.GGUFWriter:
    """A writer with the architecture's keys (those of `split` and `general` in full) and the vocabulary's."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {key if key.startswith(("split", "general")) else f"{architecture}.{key}": v for key, v in keys.items()}
    for key, value in (keys | {f"tokenizer.{key}": value for key, value in vocabulary.items()}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]
        add(key, value)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def write(path, reference, architecture: str, keys: dict, vocabulary: dict, kind_of) -> None:
    """Writes the reference model, and rounds the reference itself to what the file holds."""
    config, draw = reference.config, np.random.default_rng(0)
    writer = writer_of(path, architecture, {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "attention.key_length": 64,
        "attention.value_length": 64, "rope.freq_base": 10000.0} | keys, vocabulary)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], 2)
    for index, (ours, p) in enumerate(reference.named_parameters()):
        stem, suffix = ours.rsplit(".", 1)
        offset = float(architecture == "gemma3" and stem.endswith("norm"))
        kind = kind_of(index, ours) if p.ndim == 2 else Kind.F32
        stored = quantised(p.detach().numpy() + np.float32(offset), kind, draw)
        with torch.no_grad():
            p.copy_(torch.from_numpy(gguf.dequantize(stored, kind) - np.float32(offset)))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.split(".")[-1])
        if architecture == "llama" and heads:
            stored = interleaved(stored, heads)
        shape = stored.shape if stored.dtype == np.uint8 else None
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", stored, raw_shape=shape, raw_dtype=kind)
    if config.model_type == "llama" and config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama31_factors(64))
    finish(writer)


def reference_of(model_type: str, settings: dict, vocab_size: int):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, vocab_size=vocab_size, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "norm" in name or "bias" in name else 0.05))
    return model


# -- vocabularies ----------------------------------------------------------------------------------------------------

TEXT = "Zoë counts 12345 pears; it's 3 more than 12342.\n\n  Then she'll say: “fine”, and rest."
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")


def byte_level(size: int) -> tuple[Tokenizer, dict]:
    """A byte-level BPE trained on a few words, and the same as GGUF's keys, filled up to `size` as converters do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    padding = [f"[PAD{i}]" for i in range(len(tokens), size)]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return tokenizer, {
        "ggml.model": "gpt2", "ggml.pre": "qwen2", "ggml.tokens": tokens + padding, "ggml.merges": merges,
        "ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3) + [5] * len(padding), "ggml.add_bos_token": False,
        "ggml.bos_token_id": 0, "ggml.eos_token_id": 0, "ggml.padding_token_id": 0, "chat_template": TEMPLATE}


def pieces() -> dict:
    """A small sentencepiece vocabulary as GGUF keeps one: special, byte and scored pieces."""
    words = list("▁abcdefghijklmnopqrstuvwxyz") + ["he", "ll", "hell", "hello", "▁hello", "wo", "▁wo"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokens += [f"<0x{i:02X}>" for i in range(256)] + words
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.tokens": tokens,
            "ggml.scores": [-float(i) for i in range(len(tokens))],
            "ggml.token_type": [3, 3, 3, 2, 3, 3] + [6] * 256 + [1] * len(words),
            "ggml.bos_token_id": 2, "ggml.eos_token_id": 1, "ggml.unknown_token_id": 3, "ggml.padding_token_id": 0,
            "chat_template": "{{ '<bos>' }}{% for m in messages %}{{ '<start_of_turn>' + m['content'] + "
                             "'<end_of_turn>' }}{% endfor %}"}


# -- whole files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(FAMILIES))
def loaded(request, tmp_path_factory):
    """(our model, tokenizer, transformers' model of the same dequantised weights); all eleven kinds are in use."""
    model_type, settings, architecture, keys = FAMILIES[request.param]
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    vocabulary = pieces() if architecture == "gemma3" else byte_level(320)[1]
    reference = reference_of(model_type, settings, len(vocabulary["ggml.tokens"]))
    keys = keys | {"general.name": "mistral" if model_type == "mistral" else "tiny"}
    write(path, reference, architecture, keys, vocabulary, lambda i, _: ALL_KINDS[i % len(ALL_KINDS)])
    model, tokenizer = weights.load(str(path), "float32")
    return model, tokenizer, reference


@torch.no_grad()
def test_a_gguf_model_equals_transformers_on_the_same_dequantised_weights(loaded):
    model, _, reference = loaded
    ids = random_ids(40)
    theirs = reference(torch.tensor([ids])).logits[0]
    assert (logits_of(model, ids) - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    done = next(generate(stopping(model), [ids], SamplingParams(max_tokens=16, temperature=0)))
    theirs = reference.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert done.tokens == theirs[0, len(ids):].tolist()


@torch.no_grad()
def test_a_gguf_model_is_saved_as_a_folder_that_transformers_reads(loaded, tmp_path):
    model, tokenizer, reference = loaded
    weights.save(model, tokenizer, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([random_ids(30)])
    assert torch.allclose(again(ids).logits, reference(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert weights.load(str(tmp_path / "m"), "float32")[0].c.stop_ids == model.c.stop_ids


# -- tokenizers ------------------------------------------------------------------------------------------------------


def file_of(tmp_path, vocabulary: dict, architecture: str = "qwen2", keys: dict | None = None,
            extra: dict | None = None):
    """A GGUF file with a vocabulary, the required keys and the `extra` tensors; nothing that could run."""
    path = tmp_path / "model.gguf"
    writer = writer_of(path, architecture, {
        "block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6} | (keys or {}), vocabulary)
    embeddings = np.ones((len(vocabulary["ggml.tokens"]), 64), np.float32)
    for name, tensor in ({"token_embd.weight": embeddings} | (extra or {})).items():
        writer.add_tensor(name, tensor)
    finish(writer)
    return path


def test_a_byte_level_tokenizer_and_its_template_come_back(tmp_path):
    trained, vocabulary = byte_level(340)
    tokenizer = gguf_weights.read_tokenizer(file_of(tmp_path, vocabulary))
    assert tokenizer(TEXT).input_ids == trained.encode(TEXT).ids and tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    chat = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids[0] == 1 and ids.count(2) == 1            # <|im_start|> and <|im_end|> are whole, and nothing precedes
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_sentencepiece_tokenizer_and_its_template_come_back(tmp_path):
    tokenizer = gguf_weights.read_tokenizer(file_of(tmp_path, pieces(), "gemma3"))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(
        [{"role": "user", "content": "a hello é"}], return_dict=False))
    assert tokens == ["<bos>", "<start_of_turn>", "a", "▁hello", "▁", "<0xC3>", "<0xA9>", "<end_of_turn>"]


def test_the_turns_end_stops_even_where_the_file_names_only_the_texts_end(tmp_path):
    config, _ = gguf_weights.read(file_of(tmp_path, byte_level(320)[1]))
    assert config.eos_token_id == [0, 2]                # <|endoftext|> from the file, <|im_end|> by name
    keys = {"attention.sliding_window": 8}
    config, _ = gguf_weights.read(file_of(tmp_path, pieces() | {"ggml.eot_token_id": 4}, "gemma3", keys))
    assert config.eos_token_id == [1, 4, 5]


def test_the_tokenizer_is_the_files_own_whatever_lies_beside_it(tmp_path, tiny_folder):
    path = file_of(tmp_path, byte_level(320)[1])
    alone = gguf_weights.read_tokenizer(path).get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    assert gguf_weights.read_tokenizer(path).get_vocab() == alone and len(alone) >= 320


# -- configs, refusals, memory ---------------------------------------------------------------------------------------


def test_gemma3_takes_from_its_size_what_the_file_does_not_say(tmp_path):
    keys = {"attention.sliding_window": 8, "block_count": 62, "attention.key_length": 32, "rope.freq_base": 1e6}
    config, _ = gguf_weights.read(file_of(tmp_path, pieces(), "gemma3", keys))
    assert [i for i, t in enumerate(config.layer_types) if t == "full_attention"] == list(range(5, 62, 6))
    assert config.query_pre_attn_scalar == 64 // 4      # 27B: hidden size per head, not head_dim = 32
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10000


def test_llama31_scaling_is_recovered_from_its_factors(tmp_path):
    keys = {"attention.key_length": 64, "rope.freq_base": 500000.0}
    path = file_of(tmp_path, byte_level(320)[1], "llama", keys, {"rope_freqs.weight": llama31_factors(64)})
    assert gguf_weights.read(path)[0].rope_parameters == LLAMA31
    strange = {"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        gguf_weights.read(file_of(tmp_path, byte_level(320)[1], "llama", keys, strange))


@pytest.mark.parametrize("architecture, keys, names", [
    ("qwen2moe", {}, "qwen2moe"), ("qwen2", {"expert_count": 8}, "qwen2.expert_count"),
    ("qwen2", {"attention.sliding_window": 8}, "qwen2.attention.sliding_window"),
    ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count"),
    ("qwen3", {"rope.scaling.type": "yarn"}, "yarn"), ("qwen3", {"split.count": 2}, "one part of several")])
def test_what_a_gguf_file_asks_for_and_we_lack_is_named(tmp_path, architecture, keys, names):
    with pytest.raises(ValueError, match=names):
        gguf_weights.read(file_of(tmp_path, byte_level(320)[1], architecture, keys))


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "enc.0.attn_q.weight", "blk.0.cross.attn_q.weight", "x"])
def test_p38_an_unknown_tensor_of_a_gguf_file_is_named(tmp_path, name):
    extra = {name: np.ones(4, np.float32)}
    with pytest.raises(ValueError, match=f"unexpected weight {name}$"):
        list(gguf_weights.read(file_of(tmp_path, byte_level(320)[1], "qwen2", {}, extra))[1])


def test_loading_drops_each_tensor_before_it_reads_the_next(tmp_path):
    """Reads one file as GGUF and one as safetensors, and looks at every earlier tensor when the next is asked for."""
    reference = reference_of("llama", {}, 320)
    write(tmp_path / "model.gguf", reference, "llama", {}, byte_level(320)[1], lambda *_: Kind.Q8_0)
    reference.save_pretrained(tmp_path)
    seen = []

    def watch(tensors):
        iterator = iter(tensors)
        while True:
            assert not any(ref() is not None for ref in seen)
            name, tensor = next(iterator, (None, None))
            if name is None:
                return
            seen.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    model, _ = weights.load(str(tmp_path / "model.gguf"), "float32")
    for tensors in (gguf_weights.read(tmp_path / "model.gguf")[1], huggingface.safetensors(tmp_path)):
        seen.clear()
        weights.fill(model, watch(tensors))
        assert len(seen) == len(list(model.parameters()))


@pytest.mark.slow
@torch.no_grad()
def test_a_qwen2_file_with_152k_tokens_and_mixed_kinds_equals_transformers(tmp_path):
    """As published Qwen2.5 files are: Q4_K in most places, Q6_K and Q5_0 in some, Q8_0 embeddings."""
    def kind_of(_, name):
        special = {"embed_tokens": Kind.Q8_0, "v_proj": Kind.Q6_K, "o_proj": Kind.Q5_0, "lm_head": Kind.Q6_K}
        return next((kind for part, kind in special.items() if part in name), Kind.Q4_K)

    trained, vocabulary = byte_level(151936)
    reference = reference_of("qwen2", {"tie_word_embeddings": True}, 151936)
    write(tmp_path / "model.gguf", reference, "qwen2", {}, vocabulary, kind_of)
    model, tokenizer = weights.load(str(tmp_path / "model.gguf"), "float32")
    ids = tokenizer(TEXT).input_ids + [151935, 100000]
    assert ids[:-2] == trained.encode(TEXT).ids and model.c.vocab_size == 151936
    theirs = reference(torch.tensor([ids])).logits[0]
    assert (logits_of(model, ids) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
