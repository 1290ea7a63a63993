"""The two readers of role-play answers, on answers in which what can be found was planted."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import personas
import weights
from common import files
from evaluation import answers, fidelity, measures
from personas import Persona
from results import models, readers, transcripts
from rollout import Sampler
from weights import sources

K = 6
TEXTS = [f"You are w{i} w{i + 1} w{i + 2}." for i in range(10, 10 + 3 * K, 3)]
PEOPLE = {f"p{i}": Persona(f"p{i}", text, "", "test") for i, text in enumerate(TEXTS)}
LETTERS = "abcdefghijklmnopqrst"


def planted(signal: float, questions: int = 12, words: int = 20, seed: int = 0) -> list[dict]:
    """Rows of K personas in one block: each word is the persona's own with chance `signal`, else
    one of twenty that all share. A persona's own five words are not in its text."""
    rng, rows = np.random.default_rng(seed), []
    own = [[f"{a}{b}" for b in LETTERS[:5]] for a in LETTERS[:K]]
    common = [f"z{letter}" for letter in LETTERS]
    for q in range(questions):
        for i, name in enumerate(PEOPLE):
            drawn = [rng.choice(own[i] if rng.random() < signal else common) for _ in range(words)]
            rows.append({"persona": name, "question": f"w{40 + q}", "kind": "roleplay",
                         "answer": " ".join(drawn), "candidates": list(PEOPLE)})
    return rows


def found(rows, people=PEOPLE, train=None):
    """{variant: mean identification} by n-grams."""
    read = readers.ngram_reader(train, people)(rows)
    return {name: readers.identified(*x)["identification"].mean() for name, x in read.items()}


# -- n-grams ---------------------------------------------------------------------------------------


def test_ngrams_find_a_planted_signal_also_where_words_of_persona_texts_are_masked():
    got = found(planted(0.5))
    assert got[""] > 0.95 and got[", masked"] > 0.95


def test_answers_without_signal_and_shuffled_labels_are_at_chance():
    shuffled = readers.controlled(planted(0.5), "shuffled", PEOPLE)
    for rows in (planted(0), shuffled):
        tables = readers.identified(*readers.ngram_reader(None, PEOPLE)(rows)[""])
        low, high = measures.interval(measures.crossed(tables["identification"]))
        assert low < 1 / K < high < 0.5


def test_swapped_labels_are_at_or_below_chance():
    rows = planted(0.5)
    swapped = readers.controlled(rows, "swapped", PEOPLE)
    assert all(a["answer"] != b["answer"] for a, b in zip(rows, swapped, strict=True))
    assert found(swapped, train=rows)[""] < 0.05        # whoever wrote the answer wins


def test_an_echo_of_the_persona_text_wins_only_until_its_words_are_masked():
    got = found(readers.controlled(planted(0.5), "echo", PEOPLE))
    assert got[""] == 1 and got[", masked"] == pytest.approx(1 / K)
    rows = planted(0)
    for row in rows:
        row["answer"] += f" {PEOPLE[row['persona']].text}"
    assert found(rows)[""] > 0.9 and found(rows)[", masked"] < 0.4


def test_inflected_words_of_a_persona_text_are_masked_with_their_punctuation():
    words = readers.stems("a salty buccaneer of the seas")
    assert readers.without(words, "Two Buccaneers', (salty) sea-dogs; seas!") == "Two sea-dogs;"


def test_sixteen_words_lose_little_where_every_word_tells():
    rows = planted(0.4, words=48)
    cut = readers.controlled(rows, "16-words", PEOPLE)
    assert all(len(row["answer"].split()) == 16 for row in cut)
    assert found(cut)[""] > found(rows)[""] - 0.1 > 0.8


def test_ngrams_never_learn_from_the_question_that_they_read():
    """Words that name the persona, but other ones for each question."""
    rows = planted(0)
    told = [row | {"answer": row["persona"] * 3 + row["question"]} for row in rows]
    assert found(told)[""] > 0.95                       # the characters of the name are shared
    for i, row in enumerate(told):
        row["answer"] = LETTERS[i % 20] * 3 + LETTERS[i // 20] * 5
    assert found(told)[""] < 0.4
    with pytest.raises(ValueError, match="two questions"):
        readers.read_by_ngrams(told[:K], told[:K])


def test_ngrams_learn_from_given_answers_in_place_of_the_runs_own():
    rows = planted(0.5, seed=1)
    other = [row | {"answer": "zz"} for row in planted(0)]
    assert found(rows, train=planted(0.5, seed=2))[""] > 0.95
    assert found(rows, train=other)[""] == pytest.approx(1 / K)


def test_a_persona_with_longer_answers_does_not_draw_those_of_others():
    long, short = planted(0.25, words=200), planted(0.25, words=12)
    rows = [a if a["persona"] == "p0" else b for a, b in zip(long, short, strict=True)]
    tables = readers.identified(*readers.ngram_reader(None, PEOPLE)(rows)[""])
    assert tables["identification_raw"][:, 1:].mean() > 0.6


# -- scores to hits --------------------------------------------------------------------------------


def test_what_a_candidate_gets_of_any_answer_is_subtracted_by_length():
    rows, sizes = planted(0), np.arange(12 * K) % 9 + 1
    scores = np.tile(np.eye(K), (12, 1)) * 3 * sizes[:, None]
    liked = scores + 5 * sizes[:, None] * (np.arange(K) == 2)
    assert readers.table(rows, scores).mean() == 1
    assert readers.table(rows, liked).mean() == pytest.approx(1 / K)    # one text wins them all
    assert readers.table(rows, readers.without_prior(rows, liked, sizes)).mean() == 1


def test_a_candidate_is_not_paid_for_reading_among_unlikely_answers():
    """p0's blocks hold answers that nobody is likely to give; its rivals are in easier ones too."""
    blocks = [("p0", "p1"), ("p2", "p3")], [("p0", "p2"), ("p1", "p3")]
    rows = [{"persona": name, "question": str(q), "candidates": list(block)}
            for q, pair in enumerate(blocks) for block in pair for name in block]
    rows.sort(key=lambda row: (row["question"], row["persona"]))
    scores = np.array([[(name == row["persona"]) - 50 * ("p0" in row["candidates"])
                        for name in row["candidates"]] for row in rows])
    fair = readers.without_prior(rows, scores, np.ones(len(rows)))
    assert readers.table(rows, fair).mean() == 1


def test_an_answer_without_text_is_a_tie():
    rows = planted(0.5)
    rows[3]["answer"] = ""
    tables = readers.identified(*readers.ngram_reader(None, PEOPLE)(rows)[""])
    assert tables["identification"][0, 3] == pytest.approx(1 / K)
    assert tables["identification_raw"][0, 3] == pytest.approx(1 / K)


def test_a_table_with_a_hole_is_refused():
    rows = planted(0)
    for wrong in (rows[1:], rows + rows[:1]):
        with pytest.raises(ValueError, match="every question once"):
            readers.table(wrong, np.zeros((len(wrong), K)))


# -- a second model --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True])
def test_a_model_reads_as_each_answer_alone_under_each_candidate(tiny, base, monkeypatch):
    """Also where a block borrows rivals, and an answer is empty; a base model gets plain text."""
    model, tokenizer = tiny
    if base:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    rows = [row | {"candidates": ["p4", "p1", "p0"], "answer": "w9 w8 w7"}
            for row in planted(0, questions=2) if row["persona"] in ("p0", "p1")]
    rows[1]["answer"] = ""
    rows[2]["candidates"] = ["p2", "p3", "p0"]
    scores, sizes = readers.read_by_model(model, tokenizer, rows, PEOPLE)
    assert sizes.tolist() == [3, 0, 3, 3] and (scores[1] == 0).all()
    for row, read in zip(rows, scores, strict=True):
        for name, value in zip(row["candidates"], read, strict=True):
            text = PEOPLE[name].text
            prompt = (tokenizer(f"{text}\n\nQuestion: {row['question']}\nAnswer:").input_ids if base
                      else evaluate.pool.prompt_ids(tokenizer, row["question"], PEOPLE[name]))
            alone = [tokenizer(row["answer"], add_special_tokens=False).input_ids]
            want = fidelity.total_logprobs(model, [(prompt, alone)])[0]
            assert value == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("template, wanted", [(None, " Hm."), ("chat", "Hm.")])
def test_an_answer_opens_with_a_space_only_after_plain_text(monkeypatch, template, wanted):
    """"Answer:" and a word without a space is text that no base model has seen."""
    class Tokenizer:
        chat_template, seen = template, []

        def __call__(self, text, add_special_tokens):
            self.seen.append(text)
            return SimpleNamespace(input_ids=[5])

    monkeypatch.setattr(readers, "asked", lambda *_: [3])
    monkeypatch.setattr(readers, "total_logprobs", lambda _, groups: np.zeros(len(groups)))
    rows = [planted(0)[0] | {"answer": " Hm.\n"}]
    readers.read_by_model(None, Tokenizer(), rows, PEOPLE)
    assert Tokenizer.seen == [wanted]


SPOKEN = {
    "buccaneer": ("Arr matey, the storm be fierce, but the rum be good!",
                  "I were born on a ship, matey, and the sea raised me. Arr!"),
    "three-year-old": ("I played with my dinosaurs! Why is the sky blue? Why?",
                       "My mommy's house. I have a big green dinosaur there. Why?"),
    "auditor": ("I went through the accounts again and checked every total twice.",
                "A small town; I checked the receipts of my father's shop.")}


@pytest.mark.slow
def test_an_answer_under_another_persona_scores_lower(embedded):
    people = {p.name: p for p in personas.load("test") if p.name in SPOKEN}
    questions = ["How was your day?", "Tell me about the place where you grew up."]
    rows = [{"persona": name, "question": question, "answer": said[q], "candidates": list(SPOKEN)}
            for q, question in enumerate(questions) for name, said in SPOKEN.items()]
    got = {}
    for name, told in (("own", rows), ("swapped", readers.controlled(rows, "swapped", people))):
        got[name] = readers.identified(told, *readers.read_by_model(*embedded, told, people))
    for score in ("identification", "identification_raw"):
        assert got["swapped"][score].mean() < 1 / 3 < 0.8 < got["own"][score].mean()


def test_gemma_reads_like_a_language_model():
    path = files.cache_folder() / models.FILES[models.GEMMA][0]
    if not path.is_file():
        pytest.skip(f"{models.GEMMA} is not in the cache: python results/readers.py fetches it")
    assert sources.sha256(path) == models.FILES[models.GEMMA][1] and models.resolve(models.GEMMA) == str(path)
    model, tokenizer = weights.load(str(path), "float32", "cpu")
    pirate, nurse = (Persona(x, f"You are a {x}.", "", "test") for x in ("pirate", "nurse"))
    rows = [{"persona": who, "question": "How was your day?", "answer": said,
             "candidates": ["pirate", "nurse"]}
            for who, said in (("pirate", "Arr, we sank a galleon and buried her gold."),
                              ("nurse", "Long. I looked after twelve patients on the ward."))]
    scores, _ = readers.read_by_model(model, tokenizer, rows, {"pirate": pirate, "nurse": nurse})
    assert scores[0, 0] > scores[0, 1] + 2 and scores[1, 1] > scores[1, 0] + 2
    assert readers.asked(tokenizer, "Who?", nurse)[0] == tokenizer.bos_token_id


# -- all runs --------------------------------------------------------------------------------------


def kept_run(folder, arm, seed, rows):
    """An evaluation as results/run.py keeps it."""
    folder.mkdir(parents=True)
    results = {"method": arm, "training_seed": seed, "items": [{"id": "1", "kind": "sum"}],
               "personas": [{"name": name, "stratum": name} for name in ("none", "pirate")],
               "correct": {"none": "1", "pirate": "0"}, "lottery": []}
    (folder / "results.json").write_text(json.dumps(results))
    rows = [row | {"id": row["question"]} for row in rows]
    text = json.dumps(transcripts.compact(rows))
    transcripts.write_gzip(folder / transcripts.KEPT, text)


@pytest.fixture
def experiment(tmp_path):
    """(results folder with a start model and two arms of two seeds, --personas file)."""
    folder = tmp_path / "facts"
    kept_run(folder / "start", "start", None, planted(0.5))
    for seed in (0, 1):
        kept_run(folder / f"rlvr-seed{seed}" / "step-12", "rlvr", seed, planted(0, seed=seed + 1))
        kept_run(folder / f"permix-seed{seed}" / "step-12", "permix", seed, planted(0.5, seed=seed))
    people = tmp_path / "people.jsonl"
    people.write_text("\n".join(json.dumps({"name": p.name, "text": p.text, "stratum": "x"})
                                for p in PEOPLE.values()))
    return folder, ["--personas", str(people)]


def test_arms_of_an_experiment_are_told_apart(experiment, capsys):
    folder, flags = experiment
    assert readers.main([str(folder), "--reader", "ngrams", *flags]) == 0
    out = capsys.readouterr().out
    for label in ("start ", "rlvr step-12 ", "rlvr - start step-12 ", "permix - rlvr step-12 "):
        assert out.count("\n" + label) == 2             # whole and masked
    kept = json.loads((folder / "readers.json").read_text())
    assert kept.keys() == {"ngrams", "ngrams, masked"}
    got = readers.arms(kept["ngrams"])
    assert list(got) == [("", "start"), ("step-12", "rlvr"), ("step-12", "permix")]
    fall = readers.claims.difference(got["", "start"], got["step-12", "rlvr"])["identification"]
    assert fall["high"] < -0.1


def test_a_run_is_read_again_only_where_its_answers_changed(experiment, monkeypatch):
    folder, flags = experiment
    read, plain = [], readers.read_by_ngrams
    monkeypatch.setattr(readers, "read_by_ngrams", lambda *x: read.append(1) or plain(*x))
    for expected in (10, 0):                            # five runs, each whole and masked
        readers.main([str(folder), "--reader", "ngrams", *flags])
        assert len(read) == expected
        read.clear()
    file = folder / "start" / transcripts.KEPT
    rows = transcripts.read(file.parent)
    rows[0]["answer"] = "Hm."
    transcripts.write_gzip(file, json.dumps(transcripts.compact(rows)))
    readers.main([str(folder), "--reader", "ngrams", *flags])
    assert len(read) == 2
    readers.main([str(folder), "--reader", "ngrams", "--control", "shuffled", *flags])
    assert {"ngrams", "ngrams, shuffled"} < json.loads((folder / "readers.json").read_text()).keys()
    for seed, expected in (("0", 10), ("0", 0), ("7", 10)):         # another seed is another shuffle
        read.clear()
        readers.main([str(folder), "--reader", "ngrams", "--control", "swapped", "--seed", seed, *flags])
        assert len(read) == expected


def test_two_experiments_are_not_read_as_one(experiment, capsys):
    folder, flags = experiment
    for name, task in (("start", "facts"), ("rlvr-seed0/step-12", "arithmetic")):
        file = folder / name / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"task": task}))
    assert readers.main([str(folder), "--reader", "ngrams", *flags]) == 2
    assert "evaluations of ?, arithmetic, facts: give the folder of one" in capsys.readouterr().err


def test_a_model_in_a_folder_reads_an_experiment(experiment, tiny_folder, capsys):
    folder, flags = experiment
    flags += ["--reader", str(tiny_folder), "--questions", "2"]
    assert readers.main([str(folder), *flags]) == 0
    kept = json.loads((folder / "readers.json").read_text())
    kept = kept[f"{tiny_folder}, 2 questions"]
    assert len(kept) == 5 and np.shape(kept["start"]["identification"]) == (2, K)
    assert "chance 0.167" in capsys.readouterr().out


def test_rows_that_keep_no_candidates_get_those_of_the_evaluation(tiny, tmp_path, monkeypatch):
    """With the evaluation's seed, and also where the last block borrows."""
    done = SimpleNamespace(tokens=[7, 8], truncated=False, error=None)
    said = [("w7 w8", done)]
    monkeypatch.setattr(answers, "sample", lambda m, t, prompts, *_: [said for _ in prompts])
    people = list(PEOPLE.values())[:5]
    params = fidelity.Fidelity(["w40", "w41"], tiny[0], candidates=4)
    _, rows = fidelity.fidelity(Sampler(tiny[0]), tiny[1], people, params, seed=3)
    want = [row.pop("candidates") for row in rows]
    (tmp_path / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["candidates"] for row in readers.answers(tmp_path, k=4, seed=3)] == want


@pytest.mark.parametrize("flags, told", [
    (["nowhere", "--reader", "ngrams"], "keeps no answers"),
    (["FOLDER", "--reader", "nowhere"], "no model at 'nowhere'"),
    (["FOLDER", "--reader", "ngrams", "--questions", "0"], "--questions must be at least 1"),
    (["FOLDER", "--reader", "ngrams", "--personas", "test"], "no text of 'p0'"),
    (["FOLDER", "--reader", "gemma3-270m", "--train", "FILE"], "--train is what --reader ngrams learns from"),
    (["SILENT", "--reader", "ngrams"], "holds no answers to open questions"),
    (["FOLDER", "--reader", "ngrams", "--train", "FILE"], "line 1: no answer")])
def test_a_mistake_is_one_line(experiment, tmp_path, capsys, flags, told):
    folder, people = experiment
    file = tmp_path / "train.jsonl"
    file.write_text('{"persona": "p0", "question": "w40"}\n')
    silent = shutil.copytree(folder, tmp_path / "silent")
    for kept in silent.rglob("transcripts*"):
        kept.unlink()
    for part in silent.rglob("results.json"):
        (part.parent / "transcripts.jsonl").write_text('{"kind": "sum"}\n')
    named = {"FOLDER": str(folder), "FILE": str(file), "SILENT": str(silent)}
    flags = [named.get(flag, flag) for flag in flags]
    assert readers.main([*people, *flags]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
