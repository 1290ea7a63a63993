"""A lesson: where a model's parameters are, and how far its logits lie from transformers'.

    python -m weights.parity [--model M]

Both models hold the same weights, in fp32 on the CPU.
"""

from collections import Counter

import torch
from transformers import AutoModelForCausalLM

import weights
from common.command import Parser, one_line
from model import pack

PARTS = ("self_attn", "linear_attn", "mlp", "norm")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Count a model's parameters; compare its logits "
                                "with transformers'.")
    parser.add_argument("--model", default=weights.EMBEDDED,
                        help=f"as for train.py (default {weights.EMBEDDED})")
    try:
        model, _ = weights.load(parser.parse_args(argv).model, "float32", "cpu")
    except (ValueError, OSError) as error:
        parser.exit(2, f"parity.py: {one_line(error)}\n")

    ids = [7 * i % model.c.vocab_size for i in range(1, 33)]        # any will do
    counts = Counter()
    for name, parameter in model.named_parameters():
        part = next((part for part in PARTS if part in name), "embedding, head")
        counts[part] += parameter.numel()
    for part, count in [*counts.items(), ("all", counts.total())]:
        print(f"{part:16}{count:>14,}{count / counts.total():8.1%}")

    theirs = AutoModelForCausalLM.from_config(
        model.hf_config, dtype=torch.float32, attn_implementation="eager").eval()
    theirs.load_state_dict(weights.state(model), strict=not model.c.tied)   # ours has no tied head
    packed = pack([(ids, [])], model)
    logits = model.logits(model(packed.input_ids, packed.position_ids, packed.attend))
    reference = theirs(torch.tensor([ids])).logits[0]
    difference = (logits - reference).abs().max()
    same = (logits.argmax(-1) == reference.argmax(-1)).sum()
    print(f"logits of {len(ids)} tokens: max |ours - transformers| = {difference:.1e}; "
          f"greedy tokens equal: {same} of {len(ids)}")


if __name__ == "__main__":
    main()
