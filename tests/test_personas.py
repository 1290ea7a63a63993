"""personas.py: the pool and its splits, the PerMix draw (P27), the prompt's token ids (P6)."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import personas
import tasks
from personas import Persona
from training import checks

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
POOL = [Persona(f"p{i}", f"You are person {i}.", "neutral", "train") for i in range(5)]
KEYS = [f"{step}:{i}" for step in range(1000) for i in range(20)]


def write(folder: Path, *lines: dict | str) -> str:
    path = folder / "people.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# The pool


def test_the_pool_has_three_strata_in_both_splits_and_eight_test_personas_of_each():
    count = Counter((p.stratum, p.split) for p in personas.load("all"))
    strata = ("expert", "neutral", "harmful")
    assert set(count) == {(stratum, split) for stratum in strata for split in ("train", "test")}
    assert all(count[stratum, "test"] == 8 and count[stratum, "train"] >= 40 for stratum, _ in count)
    assert sum(count.values()) >= 160


def test_p26_training_and_test_personas_share_no_name_and_no_text():
    train, test = personas.load("train"), personas.load("test")
    for field in ("name", "text"):
        a, b = ({re.sub(r"\W+", " ", getattr(p, field)).lower().strip() for p in pool} for pool in (train, test))
        assert len(a) == len(train) and len(b) == len(test) and not a & b
    assert {*train, *test} == set(personas.load("all"))


def test_p26_training_and_test_personas_are_no_near_copies_either():
    def words(persona):
        return set(re.findall(r"\w+", persona.text.lower())) - {"you", "are", "a", "an", "the", "and", "of"}

    for a in personas.load("train"):
        for b in personas.load("test"):
            assert len(words(a) & words(b)) < 0.5 * len(words(a) | words(b)), (a, b)


def test_every_persona_is_addressed_in_at_most_a_few_sentences():
    for persona in personas.load("all"):
        assert persona.text.startswith("You are ") and persona.text[-1] in ".!?" and len(persona.text) < 250
        assert len(persona.name) <= 24


def test_p26_role_play_questions_of_the_anchor_and_of_the_evaluation_are_disjoint():
    train, test = personas.load_roleplay("train"), personas.load_roleplay("test")
    assert len(train) >= 24 and len(test) >= 60 and len({*train, *test}) == len(train) + len(test)
    assert not [question for question in train + test if re.search(r"\d", question)]


def test_a_user_s_file_is_read_in_its_order_and_split_where_its_lines_say_so(tmp_path):
    lines = [{"name": name, "text": f"You are {name}.", "stratum": "mine"} for name in "ba"]
    whole = [Persona(name, f"You are {name}.", "mine", "test") for name in "ba"]
    path = write(tmp_path, lines[0], "", lines[1])
    assert personas.load(path) == personas.load(path, "train") == personas.load(path, "test") == whole
    path = write(tmp_path, lines[0] | {"split": "train"}, lines[1] | {"split": "test"})
    assert [personas.load(path, split)[0].name for split in ("train", "test")] == ["b", "a"]
    assert len(personas.load(path)) == 2 and personas.counts("who", whole) == "who: 2 personas, 2 mine"
    with pytest.raises(ValueError, match="1 of 2 lines have a `split`"):
        personas.load(write(tmp_path, lines[0] | {"split": "train"}, lines[1]), "train")
    with pytest.raises(ValueError, match="no line has the `split` test"):
        personas.load(write(tmp_path, lines[0] | {"split": "train"}), "test")


def test_personagym_s_format_is_read_as_it_is(tmp_path):
    path = write(tmp_path, {"persona": "A nurse from Oslo who sings", "questions": {"Toxicity": ["q"]}})
    name = "A nurse from Oslo who sings"
    assert personas.load(path) == [Persona(name, "You are a nurse from Oslo who sings.", "personagym", "test")]


def test_the_real_personagym_file_is_read():
    path = SHARED / "personagym_half.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = personas.load(str(path))
    assert len(found) == 100 and {p.stratum for p in found} == {"personagym"}
    assert all(re.fullmatch(r"You are .+[^.]\.", p.text) for p in found)


@pytest.mark.parametrize("bad, says", [
    ({"name": "x", "stratum": "s"}, "no text"), ({"text": "You are x.", "stratum": "s"}, "no name"),
    ({"name": "x", "text": " ", "stratum": "s"}, "no text"), ({"name": "x", "text": "You are x."}, "no stratum"),
    ({"name": "x", "text": "t", "stratum": "s", "split": "dev"}, "neither train nor test"),
    ({"name": "x", "text": "t", "stratum": "s", "kind": 3}, "kind must be a string"),
    ({"name": "x", "text": "t", "stratum": "none"}, "no stratum may be named none"),
    ({"name": "none", "text": "t", "stratum": "s"}, "no persona may be named none"), ({"nmae": "x"}, "no name"),
    ({"name": "x", "text": "You are \ud800.", "stratum": "s"}, "half a character"),
    ({"persona": "", "questions": {}}, "no name"), ({"persona": 3, "questions": {}}, "no name"),
    ({"name": "a", "text": "You are a.", "stratum": "s"}, "second persona named 'a'"),
    ('{"name": ', "not JSON"), ('["x"]', "not an object"),
])
def test_a_bad_line_is_an_error_of_one_line_that_names_file_and_number(tmp_path, bad, says):
    path = write(tmp_path, {"name": "a", "text": "You are a.", "stratum": "s"}, "", bad)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: ")) as error:
        personas.load(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_empty_file_and_an_unknown_split_are_errors(tmp_path):
    with pytest.raises(ValueError, match="give train, test, all, conflict-train, .* or a .jsonl file"):
        personas.load("tset")
    with pytest.raises(ValueError, match="is empty"):
        personas.load(write(tmp_path, ""))
    with pytest.raises(ValueError, match="no role-play split"):
        personas.load_roleplay("dev")


# ----------------------------------------------------------------------------------------------------------------------
# The harder pools: conflict personas, paraphrases of the default prompt


TRAIN, TEST = ([name for name in personas.POOLS if name.endswith(split)] for split in personas.SPLITS)
CONFLICT, PARAPHRASES = (personas.load(f"{file}-train") + personas.load(f"{file}-test")
                         for file in ("conflict", "paraphrases"))


def test_the_conflict_pool_has_48_to_train_on_and_24_to_test_beside_six_ordinary_ones():
    count = Counter((p.split, p.stratum) for p in CONFLICT)
    assert count == {("train", "conflict"): 48, ("test", "conflict"): 24, ("test", "neutral"): 3, ("test", "expert"): 3}


def test_the_paraphrases_are_48_to_train_on_and_24_to_test():
    assert Counter((p.split, p.stratum) for p in PARAPHRASES) == {("train", "default"): 48, ("test", "default"): 24}


def test_p26_no_kind_of_conflict_is_both_trained_and_tested_and_each_has_two_personas():
    kinds = {split: Counter(p.kind for p in CONFLICT if p.split == split and p.stratum == "conflict")
             for split in personas.SPLITS}
    assert len(kinds["train"]) == 24 and len(kinds["test"]) == 12 and not set(kinds["train"]) & set(kinds["test"])
    assert {*kinds["train"].values(), *kinds["test"].values()} == {2} and "" not in kinds["train"] | kinds["test"]
    assert {p.kind for p in CONFLICT if p.stratum != "conflict"} == {"ordinary"}


def test_the_first_24_conflict_personas_to_train_on_are_of_24_kinds():
    assert len({p.kind for p in personas.few(personas.load("conflict-train"), 24)}) == 24


def test_conflict_and_ordinary_personas_are_60_to_120_tokens_long(embedded_tokenizer):
    lengths = {p.name: len(embedded_tokenizer(p.text).input_ids) for p in CONFLICT}
    assert {name: n for name, n in lengths.items() if not 60 <= n <= 120} == {}


def test_no_conflict_persona_or_paraphrase_holds_a_number_that_an_answer_could_copy():
    number = re.compile(r"\d|\b(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|dozen|hundred|"
                        r"thousand|half|zero)s?\b", re.I)
    assert [p.name for p in CONFLICT + PARAPHRASES if number.search(p.text)] == []


def test_a_conflict_persona_says_who_it_is_and_what_it_never_does():
    for p in CONFLICT:
        assert p.text.startswith("You are ") and "never" in p.text and p.text[-1] in ".?" and len(p.name) <= 24


def test_p26_names_and_texts_differ_over_all_files_and_splits():
    everyone = [p for name in TRAIN + TEST for p in personas.load(name)]
    for field in ("name", "text"):
        assert len({re.sub(r"\W+", " ", getattr(p, field)).lower().strip() for p in everyone}) == len(everyone)


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


@pytest.mark.parametrize("names, most", [                # the largest measured: 0.04 and 0.22
    (("conflict-train", "conflict-test"), 0.06), (("paraphrases-train", "paraphrases-test"), 0.25)])
def test_p26_no_text_to_test_shares_its_word_trigrams_with_a_text_to_train_on(names, most):
    """Short prompts that all say "you are a helpful assistant" share more of them than long ones do."""
    train, test = ([trigrams(p.text) for p in personas.load(name)] for name in names)
    assert max(len(a & b) / len(a | b) for a in train for b in test) < most


def test_pools_joined_by_plus_are_loaded_in_their_order_and_each_once():
    both = personas.load("conflict-test+test")
    assert both == [*personas.load("conflict-test"), *personas.load("test")]
    for name in ("test+test", "test+nobody", "test+"):
        with pytest.raises(ValueError, match="several joined by"):
            personas.load(name)


def test_p26_no_text_of_any_test_pool_can_be_trained_on():
    held_out = {p.text for p in personas.held_out()}
    assert len(held_out) == 24 + 30 + 24
    assert all({p.text for p in personas.load(name)} <= held_out for name in TEST)
    assert not any({p.text for p in personas.load(name)} & held_out for name in TRAIN)


def test_p26_near_copies_of_a_test_persona_are_seen():
    text = personas.load("test")[0].text
    near = [Persona(str(i), other, "x", "train") for i, other in enumerate(
        [text, text.upper(), f"  {text[:-1]} ", text.replace(" ", ", "), text + " You sing."])]
    for persona in near[:4]:
        with pytest.raises(ValueError, match=f"1 of the .* trained on, such as {persona.name}: "):
            personas.check_disjoint([persona, near[4]], personas.held_out())
    personas.check_disjoint(near[4:], personas.held_out())


def test_a_kind_survives_a_file_of_one_s_own(tmp_path):
    path = write(tmp_path, *(vars(p) for p in CONFLICT))
    assert personas.load(path) == CONFLICT


@pytest.mark.parametrize("pool", ["conflict-train", "paraphrases-train"])
def test_p27_the_mixer_draws_everybody_of_these_pools_too(pool):
    people = personas.load(pool)
    drawn = [group[0] for group in personas.mix(people, 0.7, "prompt", KEYS[:2000], 8, seed=0)]
    assert set(drawn) == {None, *people} and within(drawn.count(None), len(drawn), 0.3)


# ----------------------------------------------------------------------------------------------------------------------
# P27: the mixer


def within(count: int, n: int, p: float) -> bool:
    """Four standard deviations of a binomial around its mean."""
    return abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("mode, keys, group_size", [("prompt", KEYS, 3), ("rollout", KEYS[:2500], 8)])
@pytest.mark.parametrize("prob", [0.0, 0.25, 0.7, 1.0])
def test_p27_nobody_speaks_with_one_minus_rho_and_each_persona_as_often_as_another(mode, keys, group_size, prob):
    groups = personas.mix(POOL, prob, mode, keys, group_size, seed=0)
    draws = [persona for group in groups for persona in (group[:1] if mode == "prompt" else group)]
    count = Counter(persona.name if persona else None for persona in draws)
    assert len(draws) == 20_000 and within(count[None], len(draws), 1 - prob)
    assert all(within(count[persona.name], len(draws), prob / len(POOL)) for persona in POOL)


def test_p27_completions_of_one_group_draw_independently_in_rollout_mode():
    groups = personas.mix(POOL, 1.0, "rollout", KEYS, 2, seed=0)
    pairs = Counter((a.name, b.name) for a, b in groups)
    assert len(pairs) == 25 and all(within(count, len(groups), 1 / 25) for count in pairs.values())


def test_p27_neighbouring_problems_and_steps_draw_independently():
    drawn = [group[0].name for group in personas.mix(POOL, 1.0, "prompt", KEYS, 1, seed=0)]
    for lag in (1, 20):                                 # the next problem, the same place in the next step
        alike = sum(a == b for a, b in zip(drawn, drawn[lag:], strict=False))
        assert within(alike, len(drawn) - lag, 1 / len(POOL))


def test_p27_a_group_shares_its_persona_in_prompt_mode_and_not_in_rollout_mode():
    assert all(len(set(group)) == 1 for group in personas.mix(POOL, 0.7, "prompt", KEYS[:200], 8, seed=0))
    assert all(len(set(group)) > 1 for group in personas.mix(POOL, 0.7, "rollout", KEYS[:200], 24, seed=0))


@pytest.mark.parametrize("mode", personas.MODES)
def test_p27_a_draw_depends_on_seed_and_key_not_on_the_batch_the_rank_or_the_order(mode):
    together = dict(zip(KEYS[:40], personas.mix(POOL, 0.7, mode, KEYS[:40], 4, seed=5), strict=True))
    backwards = personas.mix(POOL, 0.7, mode, KEYS[:40][::-1], 4, seed=5)
    random.seed(99)                                     # the global generator has no part in it
    for key, group in zip(KEYS[:40][::-1], backwards, strict=True):
        assert personas.mix(POOL, 0.7, mode, [key], 4, seed=5) == [group] == [together[key]]
    assert list(together.values()) != personas.mix(POOL, 0.7, mode, KEYS[:40], 4, seed=6)


def test_p27_a_larger_group_only_adds_completions():
    small = personas.mix(POOL, 0.7, "rollout", KEYS[:50], 4, seed=0)
    assert [group[:4] for group in personas.mix(POOL, 0.7, "rollout", KEYS[:50], 16, seed=0)] == small


def test_p27_a_draw_is_the_same_in_another_process():
    code = ("import personas; "
            "print([p and p.name for p, in personas.mix(personas.load('train'), 0.7, 'prompt', range(60), 1, 3)])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    here = personas.mix(personas.load("train"), 0.7, "prompt", range(60), 1, 3)
    assert out.strip() == str([p and p.name for p, in here])


def test_p27_arms_of_different_rho_speak_alike_where_both_speak():
    few, many = (personas.mix(POOL, prob, "rollout", KEYS[:300], 4, seed=0) for prob in (0.3, 0.8))
    spoken = [(a, b) for few_group, many_group in zip(few, many, strict=True)
              for a, b in zip(few_group, many_group, strict=True) if a is not None]
    assert len(spoken) > 200 and all(a == b for a, b in spoken)


def test_p27_arms_see_the_same_problems_in_the_same_order():
    problems = tasks.load("arithmetic", "train", limit=40)

    def arm(prob, mode):
        seen = []
        for step in range(12):
            seen += tasks.batch(problems, step, 6, seed=0)
            personas.mix(POOL, prob, mode, [f"{step}:{i}" for i in range(6)], 4, seed=0)
        return seen

    assert arm(0.0, "prompt") == arm(0.7, "prompt") == arm(1.0, "rollout")


@pytest.mark.parametrize("pool, prob, mode", [
    (POOL, 0.5, "promt"), (POOL, -0.1, "prompt"), (POOL, 1.1, "prompt"), (POOL, float("nan"), "prompt"),
    ([], 0.5, "prompt"), ([], 0.5, "rollout")])
def test_a_mix_that_makes_no_sense_is_refused(pool, prob, mode):     # in words of one's own: it is homework
    with pytest.raises(ValueError):
        personas.mix(pool, prob, mode, KEYS[:2], 4, seed=0)


def test_plain_rlvr_needs_no_pool():
    assert personas.mix([], 0.0, "prompt", KEYS[:2], 3, seed=0) == [[None] * 3] * 2


# ----------------------------------------------------------------------------------------------------------------------
# The prompt

LLAMA = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LLAMA
DROPS_SYSTEM = LLAMA.replace("in messages %}", "in messages if m['role'] != 'system' %}")
PERSONA = Persona("pirate", "You are a pirate.", "neutral", "test")


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts a BOS before every text that it encodes, as Llama's do."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def test_p6_the_prompt_has_one_bos_where_encoding_its_text_again_would_give_two():
    tokenizer = tokenizer_with(LLAMA)
    ids = personas.prompt_ids(tokenizer, "2 + 2?", PERSONA)
    text = "<s><|system|>You are a pirate.</s><|user|>2 + 2?</s><|assistant|>"
    assert type(ids) is list and ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == text
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *ids]


def test_without_a_persona_the_prompt_is_the_question_alone():
    tokenizer = tokenizer_with(LLAMA)
    assert tokenizer.decode(personas.prompt_ids(tokenizer, "2 + 2?", None)) == "<s><|user|>2 + 2?</s><|assistant|>"


@pytest.mark.parametrize("template", ["Q: {{ messages[0].content }}\nA:", "{{ {'user': 'Q: '}.get(messages[0].role) + "
                         "messages[0].content }}\nA:"], ids=["shows the first alone", "a TypeError"])
def test_p6_no_persona_takes_the_question_s_place(template):
    tokenizer = tokenizer_with(template)
    ids = personas.prompt_ids(tokenizer, "2 + 2?", PERSONA)
    assert tokenizer.decode(ids) == "Q: You are a pirate.\n\n2 + 2?\nA:"


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["raises", "drops it"])
def test_p6_where_a_template_has_no_system_role_the_persona_opens_the_first_user_message(template):
    tokenizer = tokenizer_with(template)
    ids = personas.prompt_ids(tokenizer, "2 + 2?", PERSONA)
    assert tokenizer.decode(ids) == "<s><|user|>You are a pirate.\n\n2 + 2?</s><|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["raises", "drops it"])
def test_p6_in_a_longer_chat_the_persona_opens_the_first_message_and_what_was_said_stays(template):
    tokenizer = tokenizer_with(template)
    chat = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Ahoy"},
            {"role": "assistant", "content": "Arr"}, {"role": "user", "content": "2 + 2?"}]
    said = [dict(message) for message in chat]
    text = "<s><|user|>You are a pirate.\n\nAhoy</s><|assistant|>Arr</s><|user|>2 + 2?</s><|assistant|>"
    assert tokenizer.decode(personas.chat_ids(tokenizer, chat)) == text and chat == said


def test_a_model_that_thinks_unless_told_otherwise_is_told_otherwise():
    template = LLAMA + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    ids = personas.prompt_ids(tokenizer_with(template), "2 + 2?", None)
    assert tokenizer_with(template).decode(ids) == "<s><|user|>2 + 2?</s><|assistant|><think></think>"


def test_p36_a_template_that_asks_twice_has_half_the_room():
    """Of a byte-level tokenizer, in which no token is longer than a byte."""
    job = SimpleNamespace(args=SimpleNamespace(max_new_tokens=8), model=SimpleNamespace(c=SimpleNamespace()))
    job.tokenizer = tokenizer_with("{% for m in messages %}{{ m.content }}\n{{ m.content }}{% endfor %}")
    asked, job.model.c.max_positions = [tasks.Problem("x" * 50, "", "0", "")], 50 + 1 + 50 + 8
    checks.check_room(job, asked, [], "max_new_tokens")
    job.model.c.max_positions -= 1
    with pytest.raises(ValueError, match="problem 0 has up to 101 tokens"):
        checks.check_room(job, asked, [], "max_new_tokens")


def test_a_tokenizer_without_a_chat_template_is_refused_in_one_line():
    with pytest.raises(ValueError, match="no chat template.*--chat-template plain"):
        personas.prompt_ids(tokenizer_with(None), "2 + 2?", None)


@pytest.mark.parametrize("template", [
    "<s>Hello", "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"])
def test_a_template_that_leaves_out_the_question_is_refused(template):
    with pytest.raises(ValueError, match="leaves out what the user says"):
        personas.prompt_ids(tokenizer_with(template), "2 + 2?", personas.Persona("a", "You are A.", "x", "train"))


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ 'x' + 3 }}", "{% if %}"])
def test_a_template_that_cannot_render_a_chat_is_told_in_one_line(template):
    with pytest.raises(ValueError, match="^the chat template cannot render this chat: .+$"):
        personas.prompt_ids(tokenizer_with(template), "2 + 2?", None)


def test_p27_the_prompt_of_a_group_includes_its_persona():
    tokenizer = tokenizer_with(LLAMA)
    prompts = {tuple(personas.prompt_ids(tokenizer, "2 + 2?", persona)) for persona in [None, *POOL]}
    assert len(prompts) == len(POOL) + 1
    [group] = personas.mix(POOL, 1.0, "prompt", ["0:0"], 6, seed=0)
    assert len({tuple(personas.prompt_ids(tokenizer, "2 + 2?", persona)) for persona in group}) == 1


def test_p6_the_embedded_model_s_prompt_is_what_its_template_says(embedded_tokenizer):
    tokenizer = embedded_tokenizer
    with_persona = tokenizer.decode(personas.prompt_ids(tokenizer, "2 + 2?", PERSONA))
    user = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert with_persona == f"<|im_start|>system\nYou are a pirate.<|im_end|>\n{user}"
    nobody = tokenizer.decode(personas.prompt_ids(tokenizer, "2 + 2?", None))
    assert nobody.endswith(user) and "named SmolLM" in nobody and nobody.count("<|im_start|>system") == 1


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_the_command_shows_a_batch_under_both_mixes(script):
    out = script("personas.py", "--persona-prob", "1").stdout
    groups = personas.mix(personas.load("train"), 1.0, "prompt", ["0:0"], 1, 0)
    assert "mixed per prompt" in out and "mixed per rollout" in out and out.count(groups[0][0].name) >= 4


@pytest.mark.parametrize("flags, says", [(["--persona-prob", "2"], "must lie in"), (["--rho", "1"], "unrecognized")])
def test_a_user_s_mistake_ends_in_exit_code_2_and_no_traceback(script, flags, says):
    done = script("personas.py", *flags)
    assert done.returncode == 2 and says in done.stderr and not done.stdout
