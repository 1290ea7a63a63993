"""The anchor's cheapest rival: the weights between a start model and a trained one, not trained.

    python results/interpolate.py --start smollm2-135m --trained runs/rlvr/model --share 0.5 --out runs/half
    python evaluate.py --model runs/half --start-model smollm2-135m --fidelity --method "rlvr 0.5" --out runs/half/it

start + share * (trained - start), weight by weight in fp32 (WiSE-FT, arXiv 2109.01903): 0 is the
start model, 1 the trained one. Does a way back to the start model keep as much character for as
little accuracy as the anchor does?
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import weights  # noqa: E402
from common.command import Parser, one_line  # noqa: E402


@torch.no_grad()
def interpolate(start, trained, share: float):
    """`trained`, moved to start + share * (trained - start). ValueError where their weights differ
    in name or shape."""
    shapes = [{name: one.shape for name, one in model.named_parameters()} for model in (start, trained)]
    if shapes[0] != shapes[1]:
        raise ValueError("the two models have weights of other names or shapes: give a model and "
                         "what was trained from it")
    for one, other in zip(start.parameters(), trained.parameters(), strict=True):
        other.copy_(torch.lerp(one, other, share))
    return trained


def main(argv=None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--start", default="smollm2-135m", help="as for evaluate.py --model")
    parser.add_argument("--trained", required=True, help="a model that was trained from it")
    parser.add_argument("--share", type=float, default=0.5, help="of the way to the trained one")
    parser.add_argument("--out", type=Path, required=True, help="a Hugging Face folder, made")
    args = parser.parse_args(argv)
    try:
        if not 0 <= args.share <= 1:
            raise ValueError(f"--share must lie in [0, 1], not {args.share}")
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"--out {args.out} is there already: give the name of a new folder")
        start, _ = weights.load(args.start, "float32", "cpu")
        trained, tokenizer = weights.load(args.trained, "float32", "cpu")
        weights.save(interpolate(start, trained, args.share), tokenizer, args.out)
    except (ValueError, OSError) as error:
        print(f"interpolate.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
