"""A worked example of grpo.py: advantages of four completions, and what each clip leaves of a gradient.

    python docs/losses.py
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpo  # noqa: E402
from common.command import Parser  # noqa: E402


def clip_gradient(loss: grpo.Loss, ratio: float, advantage: float) -> float:
    """d surrogate / d log pi of one token: what the clip leaves of ratio * advantage."""
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    value, _ = grpo.policy_loss(loss, logprob, 0 * one, advantage * one, torch.tensor([1]), one)
    value.backward()
    return -logprob.grad.item()


def main() -> None:
    Parser(description="Prints a worked example: advantages, and what the clip does.").parse_args()
    print("Advantages of a group with the rewards 1, 0, 0, 1:\n")
    for kind in grpo.CHOICES["advantage"]:
        advantages = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), kind)
        print(f"{kind:>10}  ", *(f"{a:+.3f}" for a in advantages[0]))
    columns = {
        "reinforce": grpo.Loss("reinforce", clip_low=math.inf, clip_high=math.inf),
        "clip 0.2": grpo.Loss("grpo"),
        "clip-higher": grpo.Loss("dapo", clip_high=0.28),
        "dual clip 3": grpo.Loss("grpo", dual_clip=3.0),
        "cispo <= 2": grpo.Loss("cispo", clip_low=1.0, clip_high=1.0),
    }
    print("\nGradient with respect to one token's log-prob, twelve cases:")
    print("\nadvantage  ratio", *(f"{title:>12}" for title in columns))
    for advantage in (1.0, -1.0):
        for ratio in (0.5, 0.9, 1.0, 1.25, 1.5, 4.0):
            cells = [clip_gradient(loss, ratio, advantage) + 0.0 for loss in columns.values()]
            print(f"{advantage:>+9.0f}{ratio:>7.2f}", *(f"{cell:>+12.2f}" for cell in cells))


if __name__ == "__main__":
    main()
