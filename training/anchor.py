"""The expressivity anchor (ours, not the paper's): role-play is held to the start model.

    loss += anchor_coef * mean over tokens of KL(start || policy)

on a few answers a step. The start model gave them to role-play questions, under training personas,
before training. The KL is exact, over the full vocabulary, and no reward is involved. A KL on the
problems' own tokens would buy character with accuracy; this one never sees a problem. Questions and
personas are disjoint from those of the evaluation.
"""

import torch
from torch import Tensor

import personas
from model import Transformer, completion_hidden, pack
from rollout import Sampler, SamplingParams


class Anchor:
    """The start model's answers, and its hidden states on them: a function of the seed.

    start: of the start model. Neither is needed afterwards.
    """

    def __init__(self, start: Sampler, tokenizer, pool: list[personas.Persona], args):
        self.count = args.anchor_count
        questions = personas.load_roleplay("train")
        stride = 7 if len(pool) % 7 else 1              # through the strata, and every persona
        prompts = []
        for i in range(args.anchor_answers):
            persona = pool[i * stride % len(pool)]
            question = questions[i % len(questions)]
            prompts.append(personas.prompt_ids(tokenizer, question, persona))
        params = SamplingParams(max_tokens=args.anchor_tokens, seed=args.seed)
        answers = sorted(start.generate(prompts, params, tokenizer=tokenizer),
                         key=lambda c: c.index)
        self.groups = [(prompts[c.index], [c.tokens]) for c in answers]
        model = start.model
        self.head = model.head_weight.detach().clone()
        with torch.no_grad():
            self.hidden = [completion_hidden(model, pack([group], model)) for group in self.groups]

    def kl(self, model: Transformer, step: int) -> Tensor:
        """Mean over tokens of KL(start || policy) in nats, on a step's answers; a scalar, fp32.

        KL = sum_j p_j (log p_j - log q_j) over the vocabulary, at temperature 1: p of the start
        model (its kept `hidden` of an answer, through its kept `head`), q of `model`, with
        gradient. Step s takes the `count` groups from s * count on, and begins again after the
        last.
        """
        chosen = [(step * self.count + i) % len(self.groups) for i in range(self.count)]
        hidden = completion_hidden(model, pack([self.groups[i] for i in chosen], model))
        before = torch.cat([self.hidden[i] for i in chosen])
        start = model.logits(before, self.head).log_softmax(-1, dtype=torch.float32)
        now = model.logits(hidden).log_softmax(-1, dtype=torch.float32)
        return (start.exp() * (start - now)).sum(-1).mean()
