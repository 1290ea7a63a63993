"""Who speaks: the persona pool, the PerMix mixer, and the chat prompt with the persona in it.

A persona is a system prompt ("You are a pirate ..."). PerMix-RLVR (arXiv 2604.08986) mixes personas into the training
prompts. The abstract does not say how, so the scheme is ours: with probability rho (`--persona-prob`) a persona from
the training pool opens the prompt, otherwise nobody does. rho = 0 is plain RLVR.

    mode "prompt"   one draw per problem: the G completions of a group share the persona, hence the prompt (main arm)
    mode "rollout"  one draw per completion: the group's reward baseline runs across personas (ablation)

A draw is a function of (seed, key, sample) alone, not of batch, rank or order. It first takes u ~ U(0, 1) and compares
it with rho, then picks the persona: the arms are nested, what speaks at rho = 0.25 speaks at rho = 0.5 too.

The main pool is data/personas.jsonl: three strata (expert, neutral, harmful: what they promise for mathematics, not
what was measured). Two more pools are for a harder lottery. Each persona of data/conflict.jsonl rules out the usual
answer in its own manner (verse, binary, questions only), its `kind`. The kinds of train and test differ, and kinds that
are akin, such as all languages or all ways to write a number, lie on one side. Six ordinary characters of the same
length are tested beside them. data/paraphrases.jsonl says "helpful assistant" in other words: variation that means
nothing. In every pool train and test are disjoint.

Left out: weights on personas and curricula over rho, since one draw is enough to compare arms, and personas generated
by the thousand, since nobody would have read them.
"""

import itertools
import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateError

from common.command import Parser
from common.files import numbered

DATA = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "test")
MODES = ("prompt", "rollout")


@dataclass(frozen=True)
class Persona:
    name: str                                           # short and unique: the label in tables and plots
    text: str                                           # the system prompt
    stratum: str
    split: str
    kind: str = ""                                      # of a conflict persona: how it speaks (verse, lies ...)


# ----------------------------------------------------------------------------------------------------------------------
# The pool

POOLS = {                                               # what --personas takes: a file in data/, and splits of it
    "train": ("personas.jsonl", ("train",)),
    "test": ("personas.jsonl", ("test",)),
    "all": ("personas.jsonl", SPLITS),
    "conflict-train": ("conflict.jsonl", ("train",)),
    "conflict-test": ("conflict.jsonl", ("test",)),
    "paraphrases-train": ("paraphrases.jsonl", ("train",)),
    "paraphrases-test": ("paraphrases.jsonl", ("test",)),
}


def load(which: str = "test") -> list[Persona]:
    """The personas of one of POOLS, or of a .jsonl file, in the order of the file.

    A file has lines {"name", "text", "stratum"} with an optional "split" (default test) and "kind", or PersonaGym's
    {"persona", "questions"} (arXiv 2407.18416). Raises ValueError naming file and line.
    """
    file, splits = POOLS.get(which, (which, SPLITS))
    path = DATA / file if which in POOLS else Path(file)
    found: dict[str, Persona] = {}
    if not path.is_file():
        raise ValueError(f"no personas called {which!r}: give {', '.join(POOLS)}, or a .jsonl file")
    for _, where, row in numbered(path, "name, text and stratum"):
        persona = from_row(where, row)
        if persona.name in found:
            raise ValueError(f"{where}: a second persona named {persona.name!r}; names must differ")
        found[persona.name] = persona
    if not found:
        raise ValueError(f"{path} is empty")
    return [p for p in found.values() if p.split in splits]


def held_out_texts() -> set[str]:
    """The texts of all test pools. Nobody may train on them (P26)."""
    return {p.text for name in POOLS if name.endswith("test") for p in load(name)}


def load_roleplay(split: str) -> list[str]:
    """Open questions to answer in character, no mathematics in them; train feeds the anchor, test the evaluation."""
    if split not in SPLITS:
        raise ValueError(f"no role-play split {split!r}; choose from {', '.join(SPLITS)}")
    return [row["question"] for _, _, row in numbered(DATA / "roleplay.jsonl", "question") if row["split"] == split]


def few(pool: list[Persona], count: int) -> list[Persona]:
    """`count` personas, evenly from the strata, in the pool's order within each."""
    by_stratum = defaultdict(list)
    for persona in pool:
        by_stratum[persona.stratum].append(persona)
    turns = [p for row in itertools.zip_longest(*by_stratum.values()) for p in row if p]
    return turns[:count]


def from_row(where: str, row: dict) -> Persona:
    if "persona" in row and "name" not in row:
        row = {"name": row["persona"], "text": you_are(str(row["persona"])), "stratum": "personagym"}
    row = {"split": "test", "kind": ""} | row
    for field in ("name", "text", "stratum", "split"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"{where}: no {field}; a persona has name, text and stratum, each a string")
    if row["split"] not in SPLITS:
        raise ValueError(f"{where}: split {row['split']!r} is neither train nor test")
    if not isinstance(row["kind"], str):
        raise ValueError(f"{where}: kind must be a string, not {row['kind']!r}")
    return Persona(row["name"], row["text"], row["stratum"], row["split"], row["kind"])


def you_are(description: str) -> str:
    """PersonaGym describes ("A nurse from Oslo"); a system prompt addresses ("You are a nurse from Oslo.")."""
    if description.startswith("You are"):
        return description
    article = description.startswith(("A ", "An ", "The "))
    return f"You are {description[0].lower() + description[1:] if article else description}".rstrip(".") + "."


# ----------------------------------------------------------------------------------------------------------------------
# PerMix


def mix(personas: Sequence[Persona], prob: float, mode: str, keys: Sequence[str], group_size: int,
        seed: int) -> list[list[Persona | None]]:
    """Who speaks in each completion: one inner list of `group_size` per key, None where nobody does.

    keys: what names a problem in the run, for example "step:index". Raises ValueError for a bad mode, a prob outside
    [0, 1], or an empty pool with prob > 0.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mixing mode {mode!r}; choose from {', '.join(MODES)}")
    if not 0 <= prob <= 1:
        raise ValueError(f"the persona probability must lie in [0, 1], not {prob}")
    if prob > 0 and not personas:
        raise ValueError("no persona to mix in: the pool is empty")
    if mode == "prompt":
        return [[draw(personas, prob, key, 0, seed)] * group_size for key in keys]
    return [[draw(personas, prob, key, sample, seed) for sample in range(group_size)] for key in keys]


def draw(personas: Sequence[Persona], prob: float, key: str, sample: int, seed: int) -> Persona | None:
    rng = random.Random(f"{seed}|{key}|{sample}")       # of a string: through SHA-512, the same in every process
    if rng.random() >= prob:
        return None
    return personas[int(rng.random() * len(personas))]  # rng.choice is not promised to stay the same across versions


# ----------------------------------------------------------------------------------------------------------------------
# The prompt


def messages(question: str, persona: Persona | None) -> list[dict[str, str]]:
    """The conversation so far."""
    system = [{"role": "system", "content": persona.text}] if persona else []
    return [*system, {"role": "user", "content": question}]


def prompt_ids(tokenizer, question: str, persona: Persona | None) -> list[int]:
    """Token ids of a question under a persona. Without one the template's own default stays: SmolLM2's inserts "You are
    a helpful AI assistant named SmolLM ...", and that is what "no persona" means for it."""
    return chat_ids(tokenizer, messages(question, persona))


def chat_ids(tokenizer, chat: list[dict[str, str]]) -> list[int]:
    """Token ids up to where the answer begins, as the model's chat template gives them: never text encoded again,
    which would put a second BOS in front. Where a template has no system role, the system message goes before the first
    question, a blank line between. Models that can think before they answer (Qwen3, SmolLM3) are asked not to: length
    limits like ours would cut them off while they do. Raises ValueError if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use an instruction-tuned model")
    if len(chat) > 1 and chat[0]["role"] == "system" and not has_system_role(tokenizer):
        (system, first), rest = chat[:2], chat[2:]
        chat = [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, enable_thinking=False)


@lru_cache(maxsize=8)
def has_system_role(tokenizer) -> bool:
    """Whether a system message shows in the rendered prompt. Some templates refuse it, some drop it silently."""
    probe = Persona("probe", "xyzzy", "probe", "test")
    try:
        return probe.text in tokenizer.apply_chat_template(messages("Hello", probe), tokenize=False)
    except TemplateError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# A short lesson


def main() -> None:
    parser = Parser(description="Draw a batch under both mixing modes and print who speaks.")
    parser.add_argument("--persona-prob", type=float, default=0.7, help="rho, the chance of a persona (default 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    args = parser.parse_args()
    try:
        print(lesson(load("train"), args.persona_prob, args.seed))
    except ValueError as error:
        print(f"personas.py: {error}", file=sys.stderr)
        sys.exit(2)


def lesson(pool: list[Persona], prob: float, seed: int, size: int = 4) -> str:
    """4 problems x 4 completions under both modes, then the two kinds of prompt."""
    keys = [f"0:{i}" for i in range(size)]
    lines = [f"{len(pool)} training personas, rho = {prob}, seed {seed}; a row is a problem, a column a completion"]
    for mode in MODES:
        lines += ["", f"mixed per {mode}"]
        for key, group in zip(keys, mix(pool, prob, mode, keys, size, seed), strict=True):
            lines.append(f"  {key:5}" + "".join(f"{persona.name if persona else '-':22}" for persona in group).rstrip())
    lines += ["", "the prompt, without and with a persona"]
    return "\n".join(lines + [f"  {json.dumps(messages('What is 6 + 7?', who))}" for who in (None, pool[0])])


if __name__ == "__main__":
    main()
