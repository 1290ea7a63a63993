"""Base models: a chat template given by --chat-template, its stop strings, and what a saved model keeps of both."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import personas
import rollout
import tasks
import train
import weights
from common import files
from personas import Persona
from results import models
from rollout import SamplingParams, generate
from tests.conftest import make_reference, saved, stopping, tiny_tokenizer
from weights import parity, templates

PIRATE = Persona("pirate", "w90 w91", "harmful", "test")
SHORT = ["--steps", "1", "--prompts", "2", "--group-size", "2", "--max-new-tokens", "6", "--dtype", "float32",
         "--method", "rlvr"]
QUICK = [*SHORT, "--eval-problems", "2", "--eval-personas", "1"]


def bare_tokenizer(begins: bool = False):
    """One without a chat template. begins: it puts BOS before a text by itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model without a chat template."""
    return saved(tmp_path_factory.mktemp("base"), make_reference("llama3"), bare_tokenizer())


@pytest.fixture
def template(tmp_path):
    """A file with a template whose stop string the tiny model is sure to write soon: any of its words has a w."""
    path = tmp_path / "mine.jinja"
    path.write_text('{#- Mine. stop: ["w"] -#}{% for m in messages %}{{ m.content + " w3 " }}{% endfor %}')
    return path


def prompt(tokenizer, question: str, persona=None) -> str:
    return tokenizer.apply_chat_template(personas.messages(question, persona), tokenize=False,
                                         add_generation_prompt=True)


def test_plain_is_the_system_text_the_question_and_the_cue():
    tokenizer = bare_tokenizer()
    templates.give(tokenizer, "plain")
    assert prompt(tokenizer, "What?") == "Question: What?\nAnswer:"
    assert prompt(tokenizer, "What?", PIRATE) == "w90 w91\n\nQuestion: What?\nAnswer:"
    chat = [{"role": role, "content": text} for role, text in (("user", "A?"), ("assistant", "B."), ("user", "C?"))]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "Question: A?\nAnswer: B.\n\nQuestion: C?\nAnswer:"
    assert templates.stop_strings(tokenizer) == ("\nQuestion:",)


def test_a_few_shot_question_has_its_own_cue_which_plain_does_not_say_again():
    tokenizer = bare_tokenizer()
    templates.give(tokenizer, "plain")
    [asked] = tasks.put([tasks.Problem("What is 2 + 2?", "4", "0", "add")], "few-shot")
    assert prompt(tokenizer, asked.question) == asked.question
    assert asked.question.endswith("Question: What is 2 + 2?\nAnswer:")


@pytest.mark.parametrize("begins", [True, False])
def test_p6_plain_begins_with_one_bos_where_the_model_s_texts_do(begins):
    tokenizer = bare_tokenizer(begins)
    templates.give(tokenizer, "plain")
    ids = personas.prompt_ids(tokenizer, "w5", None)
    assert ids == tokenizer(prompt(bare_plain(), "w5")).input_ids and ids.count(1) == begins


def bare_plain():
    tokenizer = bare_tokenizer()
    templates.give(tokenizer, "plain")
    return tokenizer


def test_a_file_without_the_bos_that_texts_begin_with_is_warned_of(template, capsys):
    templates.give(bare_tokenizer(begins=True), str(template))
    assert "<s>" in capsys.readouterr().err
    templates.give(bare_tokenizer(), str(template))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("end, warned", [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)])
def test_a_template_that_always_thinks_first_is_warned_of(base, tmp_path, capsys, end, warned):
    path = tmp_path / "t.jinja"
    text = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}END{% endif %}"
    path.write_text(text.replace("END", end))
    weights.load(str(base), "float32", "cpu", str(path))
    assert ("thinks before it answers" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("text, says", [
    (None, "no file"), ("Question: answer", "no chat template"),
    ('{# stop: ["a", 3] #}{{ messages }}', "no JSON list"), ("{# stop: [a] #}{{ messages }}", "no JSON list"),
    ('{# stop: [""] #}{{ messages }}', "no JSON list"), (r'{# stop: "\nQ" #}{{ messages }}', "no JSON list"),
    (r'{# Mine. stops: ["\nQ"] #}{{ messages }}', "no JSON list"), ('{# stop: ["Q"]. #}{{ messages }}', "no JSON list"),
    ('{# stop: ["A"] #}{{ messages }}\n{# stop: ["B"] #}', "write one comment"), (b"{{ messages }} \xfc", "not UTF-8"),
    ("{{ messages[0]['content'] ", "cannot render"),
    ("{{ bos_token }}", "leaves out what the user says")])
def test_a_broken_template_is_refused_in_one_line_before_there_is_a_run_folder(base, tmp_path, capsys, text, says):
    path, out = tmp_path / "t.jinja", tmp_path / "run"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert train.main(["--model", str(base), "--chat-template", str(path), "--out", str(out), *QUICK]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and says in last and not out.exists() and "fetch it again" not in last


def test_what_is_no_jinja_is_refused_also_where_no_prompt_needs_a_template(base, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w3 w4"}')
    assert rollout.main(["--model", str(base), "--prompts", str(prompts), "--chat-template", "{{"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("rollout.py: the chat template cannot render a chat: ") and not told.out


def test_what_a_template_says_of_stops_elsewhere_are_no_stop_strings():
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = "{# Where to stop #}{{ messages[0].content + 'stop: x' }}{# the end #}"
    assert templates.stop_strings(tokenizer) == ()


def test_a_model_without_a_template_is_refused_by_a_line_that_names_the_flag(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", [])
    folder = str(base)
    for main, flags in ((train.main, ["--out", str(tmp_path / "run"), *QUICK]),
                        (evaluate.main, ["--limit", "1", "--out", str(tmp_path / "eval")]), (rollout.main, [])):
        assert main(["--model", folder, *flags]) == 2
        assert "--chat-template plain" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert rollout.main(["--model", folder, "--chat-template", "plain"]) == 0


def test_p4_p5_p7_a_completion_ends_at_the_template_s_stop_string_which_only_the_loss_sees(base):
    model, tokenizer = weights.load(str(base), "float32", "cpu", "plain")
    model, params = stopping(model), SamplingParams(max_tokens=12, seed=3)
    [free] = generate(model, [[5, 6]], params)
    assert free.truncated and len(free.tokens) == 12
    word = tokenizer.decode(free.tokens[4:5])
    first = free.tokens.index(free.tokens[4])
    tokenizer.chat_template = tokenizer.chat_template.replace(r"\nQuestion:", word)
    [cut] = generate(model, [[5, 6]], params, tokenizer=tokenizer)
    assert cut.tokens == free.tokens[:first + 1] and not cut.truncated and len(cut.logprobs) == first + 1
    assert params.text(cut.tokens, tokenizer).split() == tokenizer.decode(free.tokens[:first]).split()
    both = replace(params, stop=(tokenizer.decode(free.tokens[2:3]),))
    assert len(next(generate(model, [[5, 6]], both, tokenizer=tokenizer)).tokens) <= 3


def test_the_reward_and_the_transcripts_see_no_stop_string(base, template, tmp_path):
    out = tmp_path / "run"
    assert train.main(["--model", str(base), "--chat-template", str(template), "--out", str(out), *QUICK]) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines() if line]
    rows += [json.loads(line) for line in (out / "evaluation/after/transcripts.jsonl").read_text().splitlines()]
    ended = [row for row in rows if not row["truncated"]]
    assert ended and not any("w" in (row.get("completion") or row.get("answer") or "") for row in ended)


def test_the_template_is_kept_by_config_and_model_and_by_a_resumed_run(base, template, tmp_path, capsys):
    out, text = tmp_path / "run", template.read_text()
    run = ["--model", str(base), "--out", str(out), *SHORT, "--eval-problems", "0"]
    assert train.main([*run, "--chat-template", str(template)]) == 0
    assert json.loads((out / "config.json").read_text())["settings"]["chat_template"] == text
    saved = AutoTokenizer.from_pretrained(out / "model")
    assert saved.chat_template == text
    model, tokenizer = weights.load(str(out / "model"), "float32")
    expected = personas.prompt_ids(tokenizer, "w5 w6", PIRATE)
    assert saved.apply_chat_template(personas.messages("w5 w6", PIRATE), add_generation_prompt=True,
                                     return_dict=False) == expected
    assert evaluate.main(["--model", str(out / "model"), "--limit", "2", "--out", str(tmp_path / "eval")]) == 0

    other = tmp_path / "other.jinja"
    other.write_text(text + "{{ '' }}")
    assert train.main(["--resume", str(out), "--steps", "2", "--chat-template", str(other)]) == 2
    assert "--chat-template of a resumed run" in capsys.readouterr().err
    template.unlink()
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == text


def test_evaluations_under_two_templates_are_not_paired_and_one_is_read_back(base, template, tmp_path, capsys):
    """What a template says beside the prompt, as in a comment, makes no difference."""
    texts = {"mine": template.read_text()}
    texts |= {"same": texts["mine"].replace("Mine.", "Again."), "other": texts["mine"].replace("w3", "w4")}
    found = {}
    for name, text in texts.items():
        template.write_text(text)
        out = tmp_path / name
        assert train.main(["--model", str(base), "--chat-template", str(template), "--out", str(out), *QUICK]) == 0
        found[name] = json.loads((out / "evaluation/before/results.json").read_text())
        assert found[name]["stop"] == ["w"]
    evaluate.compare.check_comparable([found["mine"], found["same"]])
    old = {key: value for key, value in found["mine"].items() if key != "template"}
    evaluate.compare.check_comparable([old, found["other"]])
    with pytest.raises(ValueError, match="differ in 'template'"):
        evaluate.compare.check_comparable([found["mine"], found["other"]])
    assert train.main(["--resume", str(tmp_path / "mine"), "--steps", "2"]) == 0
    assert json.loads((tmp_path / "mine/evaluation/before/results.json").read_text()) == found["mine"]


def test_transformers_answers_as_we_do_with_the_saved_template(base, template, tmp_path):
    model, tokenizer = weights.load(str(base), "float32", "cpu", str(template))
    tokenizer.chat_template = tokenizer.chat_template.replace('["w"]', '["w7", "w8"]')
    weights.save(model, tokenizer, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    stops = list(templates.stop_strings(saved))
    assert stops == ["w7", "w8"]
    params, ended = SamplingParams(max_tokens=24, temperature=0.0), 0
    for question in ("w5 w6", "w40", "w61 w62 w63", "w17"):
        ids = saved.apply_chat_template(personas.messages(question, None), add_generation_prompt=True,
                                        return_dict=False)
        [ours] = generate(model, [personas.prompt_ids(tokenizer, question, None)], params, tokenizer=tokenizer)
        answer = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids):].tolist()
        assert answer[:len(ours.tokens)] == ours.tokens     # its own stop strings can't read a vocabulary of words
        ended += not ours.truncated and any(stop in saved.decode(ours.tokens) for stop in stops)
    assert ended


def test_gold_answers_stand_where_the_template_puts_an_answer(base, tiny, tmp_path):
    _, plain = weights.load(str(base), "float32", "cpu", "plain")
    assert templates.answer_lead(plain) == " " and templates.answer_lead(tiny[1]) == ""
    out = tmp_path / "run"
    assert train.main(["--model", str(base), "--chat-template", "plain", "--out", str(out), "--method", "sft",
                       "--steps", "1", "--prompts", "2", "--eval-problems", "0", "--dtype", "float32"]) == 0


def test_sft_goes_where_the_template_refuses_an_answer(base, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ {'user': 'w5 '}.get(m.role) + m.content }}{% endfor %}")
    assert train.main(["--model", str(base), "--chat-template", str(path), "--out", str(tmp_path / "run"), "--method",
                       "sft", "--steps", "1", "--prompts", "2", "--eval-problems", "0", "--dtype", "float32"]) == 0


def test_p4_a_gold_answer_is_learned_whole_though_a_stop_string_stands_in_it(base, template, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "w3", "answer": "w7"}\n' * 2)
    job = train.read(train.settings(["--model", str(base), "--chat-template", str(template), "--method", "sft",
                                     "--task", str(problems), "--prompts", "2", "--eval-problems", "0",
                                     "--reward", "tests.test_base:names_w7", "--dtype", "float32"]))
    with job.rewarder:
        batch, _ = next(train.rollouts(job, 0))
    assert set(batch.texts) == {"w7"} and batch.rewards.eq(1).all()     # the sentence's other words have no ids


def names_w7(problem, text: str, *, persona=None) -> float:
    return float("w7" in text)


def test_p5_the_start_model_ends_where_the_given_template_ends_a_turn(base, tmp_path):
    folder, path = shutil.copytree(base, tmp_path / "m"), tmp_path / "t.jinja"
    text = json.loads((folder / "tokenizer.json").read_text())
    text["added_tokens"].append(text["added_tokens"][0] | {"id": 98, "content": "w98"})
    (folder / "tokenizer.json").write_text(json.dumps(text))
    path.write_text("{% for m in messages %}{{ m.content + 'w98' }}{% endfor %}")
    model, tokenizer = weights.load(str(folder), "float32", "cpu", str(path))
    assert 98 not in weights.load(str(folder), "float32", "cpu")[0].c.stop_ids
    assert weights.load_beside(str(folder), tokenizer, "float32").c.stop_ids == model.c.stop_ids == [2, 98]


def test_parity_is_checked_without_a_template(base, capsys):
    parity.main(["--model", str(base)])
    assert "greedy tokens equal: 32 of 32" in capsys.readouterr().out


def test_a_base_model_s_gguf_is_asked_plainly_with_one_bos():
    path = files.cache_folder() / models.FILES[models.GEMMA][0]
    if not path.is_file():
        pytest.skip(f"{models.GEMMA} is not in the cache: python results/readers.py fetches it")
    tokenizer = weights.gguf.tokenizer(path)
    assert tokenizer.chat_template is None
    templates.give(tokenizer, "plain")
    ids = personas.prompt_ids(tokenizer, "What is 7 + 5?", None)
    assert ids == tokenizer("Question: What is 7 + 5?\nAnswer:").input_ids and ids.count(tokenizer.bos_token_id) == 1
