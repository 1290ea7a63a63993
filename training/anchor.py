"""The expressivity anchor (ours, not the paper's): role-play is held to the start model.

    loss += anchor_coef * mean over tokens of KL(start || policy)

on a few answers a step. The start model gave them to role-play questions, under training personas,
before training. The KL is exact, over the full vocabulary, and no reward is involved. A KL on the
problems' own tokens would buy character with accuracy; this one sees no problem. Questions and
personas are disjoint from those of the evaluation.

Two rivals, a flag away, to see which half of it does the work:
    --anchor-on solved   the same KL on training problems that the start model solves: rehearsal,
                         after DPH-RL (arXiv 2509.07430); which answers are kept is ours
    --anchor-loss ce     cross-entropy on the same answers, one token each where the KL sums over
                         the vocabulary
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import personas
from common.ranks import from_first, ranks
from model import Transformer, completion_hidden, completion_logprobs, pack
from rollout import Sampler, SamplingParams

CHUNK = 256                                             # tokens whose logits are held together


class Anchor:
    """The start model's answers, and its hidden states on them: a function of the seed.

    start: of the start model, not needed afterwards. job: a training.run.Job.
    `loss(model, step)` is the one that --anchor-loss names.
    """

    def __init__(self, start: Sampler, job):
        self.count, model = job.args.anchor_count, start.model
        prepare = solved if job.args.anchor_on == "solved" else role_play
        self.groups = prepare(start, job)
        if job.args.anchor_loss == "ce":
            self.loss = self.cross_entropy
            return
        self.loss, self.head = self.kl, model.head_weight.detach().clone()
        with torch.no_grad():
            self.hidden = [completion_hidden(model, pack([group], model)) for group in self.groups]

    def chosen(self, step: int) -> list[int]:
        """Step s takes the `count` groups from s * count on, and begins again after the last."""
        return [(step * self.count + i) % len(self.groups) for i in range(self.count)]

    def kl(self, model: Transformer, step: int) -> Tensor:
        """Mean over tokens of KL(start || policy) in nats, on a step's answers; a scalar, fp32.

        KL = sum_j p_j (log p_j - log q_j) over the vocabulary, at temperature 1: p of the start
        model (its kept `hidden` of an answer, through its kept `head`), q of `model`, with
        gradient.
        """
        chosen = self.chosen(step)
        hidden = completion_hidden(model, pack([self.groups[i] for i in chosen], model))
        before = torch.cat([self.hidden[i] for i in chosen])

        def divergence(before: Tensor, hidden: Tensor) -> Tensor:
            start = model.logits(before, self.head).log_softmax(-1, dtype=torch.float32)
            now = model.logits(hidden).log_softmax(-1, dtype=torch.float32)
            return (start.exp() * (start - now)).sum(-1)

        if len(hidden) > CHUNK:                         # long answers: logits again in the backward
            divergence = partial(checkpoint, divergence, use_reentrant=False)
        pieces = zip(before.split(CHUNK), hidden.split(CHUNK), strict=True)
        return torch.cat([divergence(*piece) for piece in pieces]).mean()

    def cross_entropy(self, model: Transformer, step: int) -> Tensor:
        """Mean over tokens of -log q(token of the start model's answer) in nats, as `kl`."""
        packed = pack([self.groups[i] for i in self.chosen(step)], model)
        return -completion_logprobs(model, packed, 1.0)[0].mean()


def role_play(start: Sampler, job) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt_ids, [answer]) for --anchor-answers role-play questions, under training personas."""
    args, pool, questions = job.args, job.pool, personas.load_roleplay("train")
    stride = 7 if len(pool) % 7 else 1                  # through the strata, and every persona
    prompts = []
    for i in range(args.anchor_answers):
        persona = pool[i * stride % len(pool)]
        question = questions[i % len(questions)]
        prompts.append(personas.prompt_ids(job.tokenizer, question, persona))
    params = SamplingParams(max_tokens=args.anchor_tokens, seed=args.seed)
    answers = start.generate(prompts, params, tokenizer=job.tokenizer)
    return [(prompts[c.index], [c.tokens]) for c in sorted(answers, key=lambda c: c.index)]


TRIES = 2                                               # answers to a problem, of which one is kept


def solved(start: Sampler, job) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt_ids, [answer]) for at most --anchor-answers training problems, of twice as many that
    are asked: the first of TRIES answers that the reward pays for and that was not cut off.

    Personas are drawn as in a step; answers at temperature 1, as the KL's. Rank 0 marks for all,
    since a time limit might judge otherwise on another. ValueError where none is solved.
    """
    args, problems = job.args, job.problems[:2 * job.args.anchor_answers]
    found = {}
    if ranks()[0] == 0:
        names = [f"anchor:{i}" for i in range(len(problems))]
        rows = personas.mix(job.pool, args.persona_prob, "prompt", names, 1, args.seed)
        speakers = [persona for persona, in rows]
        prompts = [personas.prompt_ids(job.tokenizer, problem.question, persona)
                   for problem, persona in zip(problems, speakers, strict=True)]
        params = SamplingParams(TRIES, args.max_new_tokens, seed=args.seed, stop=job.sampling.stop)
        answers = sorted(start.generate(prompts, params, tokenizer=job.tokenizer),
                         key=lambda c: (c.index, c.sample))
        marks = [job.rewarder.submit(problems[c.index], params.text(c.tokens, job.tokenizer),
                                     speakers[c.index]) for c in answers]
        for c, mark in zip(answers, marks, strict=True):
            if mark.result()[0] > 0 and not c.truncated:
                found.setdefault(c.index, (prompts[c.index], [c.tokens]))
    found = from_first(found)
    if not found:
        raise ValueError(f"--anchor-on solved: the start model solves none of {len(problems)} "
                         "training problems; give an easier --task, or --anchor-on roleplay")
    return list(found.values())[:args.anchor_answers]
