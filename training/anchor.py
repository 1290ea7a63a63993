"""The expressivity anchor (ours, not the paper's): open role-play is held to the start model, problems are left to the
verifier.

    loss += anchor_coef * mean over tokens of KL(start || policy)

on a few answers a step, that the start model gave to role-play questions under training personas before training. The
KL is exact, over the full vocabulary, and no reward is involved. A KL on the problems' own tokens would buy character
with accuracy; this one never sees a problem. Questions and personas are disjoint from the evaluation's.
"""

import torch
from torch import Tensor

import personas
from model import Transformer, pack
from rollout import SamplingParams, generate
from training.policy import Policy, ranks


class Anchor:
    """The start model's answers and its hidden states on them. Prepared once; a function of the seed."""

    def __init__(self, model: Transformer, tokenizer, pool: list[personas.Persona], args):
        questions = personas.load_roleplay("train")
        stride = 7 if len(pool) % 7 else 1              # through the strata, and every persona
        pairs = [(pool[i * stride % len(pool)], questions[i % len(questions)]) for i in range(args.anchor_answers)]
        prompts = [personas.prompt_ids(tokenizer, question, persona) for persona, question in pairs]
        params = SamplingParams(max_tokens=args.anchor_tokens, seed=args.seed)
        outs = generate(model, prompts, params, slots=args.slots)
        self.groups = [(prompts[out.index], [out.tokens]) for out in sorted(outs, key=lambda out: out.index)]
        self.head = model.head_weight.detach().clone()
        with torch.no_grad():
            self.hidden = [self.hidden_states(model, [group]) for group in self.groups]     # [tokens, H] each

    @staticmethod
    def hidden_states(model: Transformer, groups) -> Tensor:
        packed = pack(groups, model)
        return model(packed.input_ids, packed.position_ids, packed.attend)[packed.hidden_index]

    def __call__(self, policy: Policy, step: int, coefficient: float, count: int) -> float:
        """Adds the gradient of coefficient * mean KL over the step's `count` answers; returns the mean KL per token."""
        chosen = [(step * count + i) % len(self.groups) for i in range(count)]
        model = policy.model
        hidden = self.hidden_states(model, [self.groups[i] for i in chosen])
        start = model.capped(torch.cat([self.hidden[i] for i in chosen]) @ self.head.T).log_softmax(-1)
        now = model.logits(hidden).log_softmax(-1)
        divergence = (start.exp() * (start - now)).sum(-1).mean()
        policy.backward(coefficient * divergence / ranks()[1])          # every rank computes it; ranks are summed
        return divergence.item()
