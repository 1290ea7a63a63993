"""Fidelity without a judge: does an answer to an open question still tell its persona?

An answer y ~ pi(. | q, s) is read by a model: log p(y | q, s') for k candidates s'. The reader is
right when the answer's own persona wins. Two models read:

    the frozen start model    `persona_identification`, `log_posterior`: drift from the start model
    the policy itself         `self_identification`, `self_log_posterior`: how much its answers
                              depend on the persona, however far it has drifted

`style_shift` is the mean per token of log pi(y | q, s) - log pi(y | q, no persona), by the policy.
The candidates come in blocks of k personas, which are each other's rivals. The blocks are drawn
anew for each question. All measures are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import personas as pool
from evaluation import answers, measures
from model import Transformer, completion_logprobs, pack
from rollout import SamplingParams

SCORES = ("persona_identification", "log_posterior", "self_identification", "self_log_posterior",
          "style_shift")


@dataclass(frozen=True)
class Fidelity:
    """What is asked, and who reads the answers. ValueError without a question."""
    questions: Sequence[str]
    start_model: Transformer                            # the frozen reader
    candidates: int = 8                                 # k, among which it names the persona
    max_new_tokens: int = 48
    reader: str = ""                                    # the start model's name

    def __post_init__(self):
        if not self.questions:
            raise ValueError("fidelity needs at least 1 question")


def fidelity(sampler, tokenizer, personas, params, seed=0, log=None):
    """The scores of SCORES, with intervals over questions and personas -> (dict, transcripts).

    params: a `Fidelity`. Each transcript has its candidates and both readers' log-probs. ValueError
    below 2 personas.
    """
    model, n, questions = sampler.model, len(personas), params.questions
    k = min(params.candidates, n)
    if k < 2:
        raise ValueError("fidelity needs at least 2 personas")
    prompts = [[pool.prompt_ids(tokenizer, question, persona) for persona in [*personas, None]]
               for question in questions]
    sampling = SamplingParams(max_tokens=params.max_new_tokens, temperature=0.9, top_p=0.9,
                              seed=seed)
    spoken = [ids for row in prompts for ids in row[:n]]
    outs = answers.sample(sampler, tokenizer, spoken, sampling, log)
    tables = {name: np.zeros((len(questions), n)) for name in SCORES}
    rows, rng = [], np.random.default_rng(seed)
    for q, question in enumerate(questions):
        replies = [out[0] for out in outs[q * n:(q + 1) * n]]
        completions = [done.tokens for _, done in replies]
        read = {}                                       # persona -> what both readers said
        for members, candidates in blocks(n, k, rng):
            by_start, by_self, shift = read_block(model, params.start_model, prompts[q],
                                                  completions, members, candidates)
            found = *measures.identification(by_start), *measures.identification(by_self), shift
            for table, values in zip(tables.values(), found, strict=True):
                table[q, members] = values
            names = [personas[c].name for c in candidates]
            for p, first, second in zip(members, by_start, by_self, strict=True):
                read[p] = {"candidates": names, "by_start": first.round(3).tolist(),
                           "by_self": second.round(3).tolist()}
        for p, (text, done) in enumerate(replies):
            row = {"persona": personas[p].name, "id": f"roleplay-{q}", "kind": "roleplay",
                   "question": question, "answer": text, "tokens": len(done.tokens)}
            rows.append(row | {name: table[q, p] for name, table in tables.items()} | read[p])
    scores = measures.with_intervals(
        {name: table.mean() for name, table in tables.items()},
        {name: measures.crossed(table, seed) for name, table in tables.items()})
    return scores | {"reader": params.reader, "chance": 1 / k, "candidates": k,
                     "questions": list(questions),
                     "tables": {name: t.round(4).tolist() for name, t in tables.items()}}, rows


def blocks(n, k, rng):
    """n personas in random blocks -> pairs of (members, candidates), arrays of indices.

    A block has k candidates, its members first. A block with fewer members borrows candidates.
    """
    order = rng.permutation(n)
    for start in range(0, n, k):
        members = order[start:start + k]
        yield members, np.concatenate([members, order[:k - len(members)]])


def read_block(model, start_model, prompts, completions, members, candidates):
    """(log-probs by the start model, by the model itself, style shift) of a block's answers to one
    question: [members, candidates] twice, then [members].

    prompts: ids under every persona, and without one at the end. completions: ids, by persona.
    """
    written = [completions[p] for p in members]
    groups = [(prompts[c], written) for c in candidates]
    by_start = by_self = total_logprobs(start_model, groups).reshape(len(candidates), -1).T
    if model is not start_model:
        by_self = total_logprobs(model, groups).reshape(len(candidates), -1).T
    plain = total_logprobs(model, [(prompts[-1], written)])
    return by_start, by_self, (np.diagonal(by_self) - plain) / [max(len(y), 1) for y in written]


@torch.no_grad()
def total_logprobs(model, groups):
    """log p(completion | prompt), summed over its tokens [M].

    groups: pairs of prompt_ids and a list of completion_ids.
    """
    logprobs, _ = completion_logprobs(model, pack(groups, model))
    lengths = [len(completion) for _, completions in groups for completion in completions]
    return np.array([part.sum().item() for part in logprobs.cpu().double().split(lengths)])
