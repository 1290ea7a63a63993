"""Who wrote this? Two readers of kept role-play answers that took no part in the training.

    python results/readers.py results/facts --reader ngrams            # D, a text classifier
    python results/readers.py results/facts --reader gemma3-270m       # C, of another family
    python results/readers.py results/facts --reader ngrams --control shuffled

`evaluation.fidelity` has the start model and the policy name the persona of an answer. The start
model favours an arm that stays near it. The policy reads its own answers. So two more read here,
and choose among the same rivals:

    C   a second model: log p(answer | question, persona), with its own tokenizer and chat template.
        A base model has no template and gets plain text.
    D   n-grams: multinomial naive Bayes (McCallum and Nigam 1998) over words, pairs of words, and
        3 to 5 characters. It learns from the answers to the other questions: of the same run, or of
        another family (--train). It reads twice. The second time every word of any persona's text
        is cut out of all answers. The loss is the echo at most, since common words go too.

`identification` is primary: from each score the candidate's mean over the answers is subtracted,
per unit of text. `identification_raw` is without. Some persona texts make any answer likely, and
win whatever is said. That is the reader's taste in texts and tells nothing of the answer.

Kept in NAME/readers.json: by reader and run, a table [questions, personas] of hits. A run that is
there is not read again. Controls change answers or labels; CONTROLS says what must come out.

Left out: the posterior. Naive Bayes takes n-grams that overlap for independent, so it is too sure.
"""

import json
import re
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import personas  # noqa: E402
import weights  # noqa: E402
from common import files  # noqa: E402
from common.command import Parser  # noqa: E402
from evaluation import claims, compare, measures, report  # noqa: E402
from evaluation.fidelity import blocks, total_logprobs  # noqa: E402
from results import models, transcripts  # noqa: E402

BUCKETS = 2**18                 # of the hashed n-grams
PRIOR = 10_000                  # n-grams of all personas' text, added to each persona's counts
WORD = re.compile(r"[^\W_]+")
PAIRS = (("start", "rlvr"), ("start", "permix"), ("rlvr", "permix"), ("rlvr+paraphrases", "permix"),
         ("permix", "permix+anchor"), ("rlvr", "rlvr+anchor"))

# --------------------------------------------------------------------------------------------------
# Answers


def answers(folder: Path, k: int = 8, seed: int = 0) -> list[dict]:
    """The role-play rows of an evaluation folder, kept or not, each with its `candidates`.

    Rows without them, of older runs, get blocks as `evaluation.fidelity` draws them from `seed`.
    """
    kept = (folder / transcripts.KEPT).is_file()
    found = transcripts.read(folder) if kept else files.rows(folder / transcripts.TRANSCRIPTS)
    rows = [row for row in found if row["kind"] == "roleplay"]
    if all("candidates" in row for row in rows):
        return rows
    rng, out = np.random.default_rng(seed), []
    for group in by(rows, "question").values():
        told = {}
        for members, candidates in blocks(len(group), min(k, len(group)), rng):
            told |= dict.fromkeys(members.tolist(), [group[c]["persona"] for c in candidates])
        out += [row | {"candidates": told[i]} for i, row in enumerate(group)]
    return out


def by(rows: list[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Rows grouped by the values of these fields, as strings."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(str(row[field]) for field in fields)].append(row)
    return dict(groups)


# --------------------------------------------------------------------------------------------------
# C: a second model

def asked(tokenizer, question: str, persona) -> list[int]:
    """Prompt ids by the reader's chat template; of a base model, which has none, by plain text."""
    if tokenizer.chat_template:
        return personas.prompt_ids(tokenizer, question, persona)
    return tokenizer(f"{persona.text}\n\nQuestion: {question}\nAnswer:").input_ids


def read_by_model(model, tokenizer, rows: list[dict], people: dict):
    """(log p(answer | question, candidate) [A, k] in nats, tokens [A]); people: {name: Persona}."""
    space = "" if tokenizer.chat_template else " "
    texts = [row["answer"].strip() for row in rows]
    ids = [tokenizer(space + text, add_special_tokens=False).input_ids if text else []
           for text in texts]
    places = by([row | {"place": i} for i, row in enumerate(rows)], "question", "candidates")
    scores = np.zeros((len(rows), len(rows[0]["candidates"])))
    for group in places.values():                       # a block: the same rivals read together
        at, names = [row["place"] for row in group], group[0]["candidates"]
        prompts = [asked(tokenizer, group[0]["question"], people[name]) for name in names]
        read = total_logprobs(model, [(prompt, [ids[i] for i in at]) for prompt in prompts])
        scores[at] = read.reshape(len(names), len(at)).T
    return scores, np.array([len(y) for y in ids])


# --------------------------------------------------------------------------------------------------
# D: n-grams


def stems(text: str) -> set[str]:
    """Its words, lower case, cut to 5 letters: an inflected word is an echo too."""
    return {word[:5] for word in WORD.findall(text.lower())}


def without(words: set[str], text: str) -> str:
    """The text without the chunks (between spaces) that have one of these stems."""
    return " ".join(chunk for chunk in text.split() if not stems(chunk) & words)


def ngrams(text: str) -> np.ndarray:
    """Buckets of its words, pairs of words, and 3 to 5 characters in a row, with repetition."""
    text = " ".join(text.lower().split())
    words = WORD.findall(text)
    grams = words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
    padded = f" {text} " if text else ""
    grams += [f"_{padded[i:i + n]}" for n in (3, 4, 5) for i in range(len(padded) - n + 1)]
    return np.array([zlib.crc32(gram.encode()) % BUCKETS for gram in grams], dtype=int)


def read_by_ngrams(rows: list[dict], train: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(log p(n-grams | candidate) [A, k], n-grams [A]), never trained on the question that is read.

    train: rows with persona, question, answer. ValueError where they have no answer of a candidate
    to another question.
    """
    seen = [row | {"ngrams": ngrams(row["answer"])} for row in train]
    read = [ngrams(row["answer"]) for row in rows]
    scores = np.zeros((len(rows), len(rows[0]["candidates"])))
    for question in {row["question"] for row in rows}:
        rates = ngram_rates([row for row in seen if row["question"] != question])
        for i in [i for i, row in enumerate(rows) if row["question"] == question]:
            names = rows[i]["candidates"]
            if missing := set(names) - rates.keys():
                raise ValueError(f"no answer of {sorted(missing)[0]!r} to train on but to "
                                 f"{question!r}: give answers to two questions or more")
            for j, name in enumerate(names):
                scores[i, j] = np.log(rates[name][read[i]]).sum()
    return scores, np.array([len(x) for x in read])


def ngram_rates(rows: list[dict]) -> dict[str, np.ndarray]:
    """{persona: p(n-gram) [BUCKETS]}, smoothed towards the rates of all personas together.

    That is Dirichlet smoothing (Zhai and Lafferty 2001). Equal counts added to all buckets would
    favour the persona with the longest answers.
    """
    counts = {name: np.bincount(np.concatenate([row["ngrams"] for row in group]), minlength=BUCKETS)
              for (name,), group in by(rows, "persona").items()}
    pooled = sum(counts.values(), np.full(BUCKETS, 0.01))    # no bucket has the rate 0
    prior = PRIOR * pooled / pooled.sum()
    return {name: (each + prior) / (each.sum() + PRIOR) for name, each in counts.items()}


# --------------------------------------------------------------------------------------------------
# Who is named


def without_prior(rows: list[dict], scores: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Scores [A, k] less what a candidate gets of any answer: its mean distance from its rivals
    over all answers, per unit of text (`sizes` [A]). So an answer without text stays a tie."""
    apart, out = scores - scores.mean(axis=1, keepdims=True), scores.astype(float)
    names, size = np.array([row["candidates"] for row in rows]), sizes[:, None] + 0 * scores
    for name in np.unique(names):
        at = names == name
        out[at] -= apart[at].sum() / max(size[at].sum(), 1) * size[at]
    return out


def table(rows: list[dict], scores: np.ndarray) -> np.ndarray:
    """Hits [questions, personas] in the order of the rows; t candidates that tie share one.

    ValueError unless every persona answered every question once.
    """
    who = list(dict.fromkeys(row["persona"] for row in rows))
    questions = list(dict.fromkeys(row["question"] for row in rows))
    out = np.full((len(questions), len(who)), np.nan)
    for row, read in zip(rows, scores, strict=True):
        own_first = np.roll(read, -row["candidates"].index(row["persona"]))[None]
        at = questions.index(row["question"]), who.index(row["persona"])
        out[at] = measures.identification(own_first)[0][0]
    if np.isnan(out).any() or out.size < len(rows):
        raise ValueError("every persona has to answer every question once")
    return out


def identified(rows: list[dict], scores: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Both tables of hits of one run."""
    return {"identification": table(rows, without_prior(rows, scores, sizes)),
            "identification_raw": table(rows, scores)}


# --------------------------------------------------------------------------------------------------
# Controls: answers or labels changed, so that what must come out is known

CONTROLS = {
    "swapped": "answers are said to be by the next of their block: below chance, as their author "
               "wins; n-grams that learn from them too: chance",
    "shuffled": "labels are shuffled within blocks: chance",
    "echo": "every answer is its persona's text: n-grams name it, and are at chance once masked",
    "16-words": "answers are cut after 16 words: little is lost",
}


def controlled(rows: list[dict], control: str, people: dict, seed: int = 0) -> list[dict]:
    """The rows of one of CONTROLS, in the same order."""
    if control == "echo":
        return [row | {"answer": people[row["persona"]].text} for row in rows]
    if control == "16-words":
        return [row | {"answer": " ".join(row["answer"].split()[:16])} for row in rows]
    rng, moved = np.random.default_rng(seed), {}
    for group in by(rows, "question", "candidates").values():
        order = np.roll(range(len(group)), 1)
        if control == "shuffled":
            order = rng.permutation(len(group))
        for row, i in zip(group, order, strict=True):
            moved[row["question"], row["persona"]] = group[i]["answer"]
    return [row | {"answer": moved[row["question"], row["persona"]]} for row in rows]


# --------------------------------------------------------------------------------------------------
# All runs of an experiment


def ngram_reader(train: list[dict] | None, people: dict):
    """rows -> {"": read whole, ", masked": without words of persona texts}; each is (rows, scores,
    sizes). train: see read_by_ngrams; None: the run's own answers."""
    def reader(rows):
        told = {name for row in rows for name in row["candidates"]}
        echoes = set().union(*(stems(f"{name} {people[name].text}") for name in told))
        out = {}
        for name, words in (("", set()), (", masked", echoes)):
            kept, seen = ([row | {"answer": without(words, row["answer"])} for row in each]
                          for each in (rows, train or rows))
            out[name] = kept, *read_by_ngrams(kept, seen)
        return out
    return reader


def training_rows(path: Path) -> list[dict]:
    """Answers to learn from; rows of another kind than role-play are passed over."""
    rows = []
    for _, where, row in files.numbered(path, "persona, question and answer"):
        if missing := {"persona", "question", "answer"} - row.keys():
            raise ValueError(f"{where}: no {sorted(missing)[0]}")
        if row.get("kind", "roleplay") == "roleplay":
            rows.append(row)
    return rows


def make_reader(args, train: list[dict] | None, people: dict):
    """ngram_reader, or rows -> {"": (rows, scores, sizes)} by a model as weights.load has it."""
    if args.reader == "ngrams":
        return ngram_reader(train, people)
    model, tokenizer = weights.load(models.resolve(args.reader), args.dtype, args.device)
    return lambda rows: {"": (rows, *read_by_model(model, tokenizer, rows, people))}


def evaluations(folder: Path) -> list[Path]:
    """Folders in it with an evaluation and its answers. ValueError where there is none."""
    names = transcripts.KEPT, transcripts.TRANSCRIPTS
    found = sorted({path.parent for name in names for path in folder.rglob(name)
                    if path.with_name("results.json").is_file()})
    if not found:
        raise ValueError(f"{folder} keeps no answers: give a results folder whose runs have "
                         f"results.json and {transcripts.KEPT}")
    return found


def read_all(args, train: list[dict] | None, name: str, people: dict) -> dict:
    """{reader: {run: its arm, checkpoint, seed and tables}}: this reader's part of --out, to which
    the runs that it has not read are added. ValueError where a persona is not among `people`, or
    there are two tasks."""
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    texts, reader = {name: person.text for name, person in people.items()}, None
    found = {folder: compare.read_arm(folder) for folder in evaluations(args.folder)}
    of = {results.get("task", "?") for _, results in found.values()}
    if len(of) > 1:
        raise ValueError(f"{args.folder} holds evaluations of {', '.join(sorted(of))}: give the "
                         "folder of one experiment")
    for folder, (arm, results) in found.items():
        rows = answers(folder, seed=args.seed)
        asked_of = list(dict.fromkeys(row["question"] for row in rows))[:args.questions]
        rows = [row for row in rows if row["question"] in asked_of]
        if not rows:
            continue                                    # an evaluation without role-play
        run = folder.relative_to(args.folder).as_posix()
        asked = [rows, train, texts, args.seed if args.control else 0]
        same = zlib.crc32(json.dumps(asked).encode())           # what changed is read again
        if kept.get(name, {}).get(run, {}).get("answers") == same:
            continue
        if unknown := {name for row in rows for name in row["candidates"]} - people.keys():
            raise ValueError(f"no text of {sorted(unknown)[0]!r}: give the evaluation's --personas")
        rows = controlled(rows, args.control, people, args.seed) if args.control else rows
        reader = reader or make_reader(args, train, people)     # once something is to be read
        told = {"arm": arm, "at": folder.name if folder.name.startswith("step-") else "",
                "training_seed": results.get("training_seed"), "answers": same,
                "chance": 1 / len(rows[0]["candidates"])}
        for variant, read in reader(rows).items():
            tables = {k: t.round(3).tolist() for k, t in identified(*read).items()}
            kept.setdefault(name + variant, {})[run] = told | tables
        files.write_atomically(args.out, json.dumps(kept, separators=(",", ":")) + "\n")
    return {reader: runs for reader, runs in kept.items() if reader in (name, f"{name}, masked")}


def arms(runs: dict) -> dict:
    """{(checkpoint, arm): {score: (mean, draws [2, B])}}, questions and personas drawn anew, and
    seeds spread; by checkpoint, then as compare.ARMS orders them."""
    groups = defaultdict(list)
    for run in sorted(runs.values(), key=lambda run: run["training_seed"] or 0):
        groups[run["at"], run["arm"]].append(run)
    out = {}
    for key in sorted(groups, key=lambda key: (len(key[0]), key[0], compare.rank((key[1], {}, 0)))):
        out[key] = {}
        for score in ("identification", "identification_raw"):
            drawn = [np.stack([measures.crossed(run[score])] * 2) for run in groups[key]]
            means = [np.mean(run[score]) for run in groups[key]]
            out[key][score] = measures.over_seeds(means, drawn)
    return out


def lines(found: dict) -> list[list[str]]:
    """A table of arms with 95 % intervals, then of the differences of PAIRS at each checkpoint."""
    out = [["", "identification", "without subtraction"]]
    for (at, arm), scores in found.items():
        shown = [(value, *np.clip(measures.interval(drawn), 0, 1))
                 for value, drawn in scores.values()]
        out.append([f"{arm} {at}".strip(), *("{:.3f} [{:.3f}, {:.3f}]".format(*x) for x in shown)])
    for at in dict.fromkeys(at for at, arm in found if arm != "start"):
        for first, second in PAIRS:
            a, b = found.get((at, first), found.get(("", first))), found.get((at, second))
            if a and b:
                apart = [(d["difference"], d["low"], d["high"])
                         for d in claims.difference(a, b).values()]
                out.append([f"{second} - {first} {at}".strip(),
                            *("{:+.3f} [{:+.3f}, {:+.3f}]".format(*x) for x in apart)])
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line; a user's mistake is one line on stderr and exit 2."""
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path, help="results/NAME, or any folder of evaluations")
    p.add_argument("--reader", required=True, help=f"ngrams, {', '.join(models.FILES)}, or a model as for train.py")
    p.add_argument("--train", type=Path, help="answers for ngrams to learn from, as .jsonl")
    p.add_argument("--control", choices=CONTROLS, help="; ".join(map(": ".join, CONTROLS.items())))
    p.add_argument("--questions", type=int, help="only the first so many (default: all)")
    p.add_argument("--personas", default="test", help="as in the evaluations")
    p.add_argument("--seed", type=int, default=0, help="of shuffles, and of rivals not kept")
    p.add_argument("--dtype", default="auto", choices=["auto", *weights.DTYPES])
    p.add_argument("--device", default="auto", choices=weights.DEVICES)
    p.add_argument("--out", type=Path, help="default: readers.json in the folder")
    args = p.parse_args(argv)
    args.out = args.out or args.folder / "readers.json"
    try:
        people = {person.name: person for person in personas.load(args.personas)}
        if args.questions is not None and args.questions < 1:
            raise ValueError(f"--questions must be at least 1, not {args.questions}")
        if args.train and args.reader != "ngrams":
            raise ValueError("--train is what --reader ngrams learns from; another reader does not")
        train = training_rows(args.train) if args.train else None
        name = args.reader + (f" trained on {args.train.stem}" if train else "")
        name += f", {args.questions} questions" if args.questions else ""
        name += f", {args.control}" if args.control else ""
        if not (found := read_all(args, train, name, people)):
            raise ValueError(f"{args.folder} holds no answers to open questions: --fidelity asks them")
    except (ValueError, OSError, EOFError) as error:            # EOFError: a .gz cut short
        print(f"results/readers.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for label, runs in found.items():
        chance = next(iter(runs.values()))["chance"]
        print(f"{label} (chance {chance:.3f})\n{report.aligned(lines(arms(runs)))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
