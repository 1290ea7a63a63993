"""Voice or length? Persona identification when only the first tokens of every reply are read.

    python results/length.py                                # after results/run.py, from its run folders

A reply that is shorter tells less of who speaks, in whatever voice. So the frozen start model names the persona again,
with the same rivals as in `evaluation.fidelity`, from the first 4, 8, ... tokens of each reply (shorter ones whole).
Where arms differ already at a cut that nearly all replies reach, the voice differs. The replies are tokenised from
their text again, without the end token: the ids that were sampled are not kept.

Kept: results/NAME/by_length.json (every run's share of replies traced, by question, and of replies that reach a cut),
and by_length.md, the table. Runs that are in it are not scored again.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import personas  # noqa: E402
import weights  # noqa: E402
from common.command import Parser, one_line  # noqa: E402
from common.files import rows, write_atomically  # noqa: E402
from evaluation import compare, measures  # noqa: E402
from evaluation.fidelity import blocks  # noqa: E402
from model import completion_logprobs, pack  # noqa: E402

CUTS = (4, 8, 16, 24, 48)                               # tokens; a reply has at most 48
DIFFERENCES = (("rlvr", "permix"), ("rlvr", "permix+anchor"), ("permix", "permix+anchor"))


@torch.no_grad()
def sums(scorer, groups: list[tuple[list[int], list[list[int]]]]) -> np.ndarray:
    """Log-probs of every completion's first 0, 1, ... tokens, [groups, completions, longest + 1]; the last one stays
    where a completion has ended."""
    logprobs, _ = completion_logprobs(scorer, pack(groups, scorer))
    lengths = [len(y) for _, ys in groups for y in ys]
    rows = [np.concatenate([[0.0], part.cpu().numpy().cumsum()]) for part in logprobs.double().split(lengths)]
    padded = [np.pad(row, (0, max(lengths) + 1 - len(row)), mode="edge") for row in rows]
    return np.array(padded).reshape(len(groups), len(groups[0][1]), -1)


def traced(scorer, tokenizer, replies: list[dict], people: list, k: int = 8, seed: int = 0) -> dict[int, list[float]]:
    """{cut: share of the replies to each question whose persona the scorer names from so many tokens}."""
    n, rng = len(people), np.random.default_rng(seed)
    if [row["persona"] for row in replies[:n]] != [p.name for p in people]:
        raise ValueError("the replies are of other personas: give their file as --personas")
    tables = {cut: np.zeros((len(replies) // n, n)) for cut in CUTS}
    for q in range(len(replies) // n):
        rows = replies[q * n:(q + 1) * n]
        prompts = [personas.prompt_ids(tokenizer, rows[0]["question"], persona) for persona in people]
        ys = [tokenizer(row["answer"], add_special_tokens=False).input_ids for row in rows]
        for members, candidates in blocks(n, min(k, n), rng):
            read = sums(scorer, [(prompts[c], [ys[p] for p in members]) for c in candidates])
            for cut, table in tables.items():
                table[q, members] = measures.identification(read[:, :, min(cut, read.shape[2] - 1)].T)[0]
    return {cut: table.mean(axis=1).round(4).tolist() for cut, table in tables.items()}


def table(runs: dict[str, dict]) -> str:
    """Arms and their differences by cut, as Markdown, from what by_length.json holds."""
    arms: dict[str, list] = {}
    for run in sorted(runs.values(), key=lambda run: (compare.ARMS.index(run["arm"]), run["training_seed"] or 0)):
        arms.setdefault(run["arm"], []).append(run)

    def draws(arm):
        """{cut: (value, draws)} as compare.arm_draws has them, of questions resampled and seeds spread."""
        out = {}
        for cut in map(str, CUTS):
            counts = [measures.resamples(len(run["traced"][cut])) for run in arms[arm]]
            each = [c @ np.array(run["traced"][cut]) / len(run["traced"][cut])
                    for c, run in zip(counts, arms[arm], strict=True)]
            out[cut] = measures.over_seeds([np.mean(run["traced"][cut]) for run in arms[arm]],
                                           [np.stack([x, x]) for x in each], 0)
        return out

    found = {arm: draws(arm) for arm in arms}
    lines = [["", "tokens a reply", *(f"first {cut}" for cut in CUTS)], ["---"] * (2 + len(CUTS))]
    for arm, got in found.items():
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, drawn in got.values()
                 for low, high in [np.clip(measures.interval(drawn), 0, 1)]]
        lines.append([arm, f"{np.mean([run['tokens'] for run in arms[arm]]):.0f}", *cells])
        reach = [np.mean([run["reach"][str(cut)] for run in arms[arm]]) for cut in CUTS]
        lines.append([f"{arm}: so long", "", *(f"{share:.0%}" for share in reach)])
    for a, b in [pair for pair in DIFFERENCES if set(pair) <= set(arms)]:
        cells = [f"{found[b][cut][0] - found[a][cut][0]:+.3f} [{low:+.3f}, {high:+.3f}]" for cut in found[a]
                 for low, high in [measures.interval(found[b][cut][1] - found[a][cut][1])]]
        lines.append([f"{b} - {a}", "", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> int:
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("runs/experiment"), help="run folders of results/run.py")
    p.add_argument("--arms", nargs="+", default=["start", "rlvr", "permix", "permix+anchor"], choices=compare.ARMS)
    p.add_argument("--start-model", default="smollm2-135m", help="the frozen scorer")
    p.add_argument("--personas", default="test", help="as in the evaluations")
    p.add_argument("--name", default="main", help="results are kept in results/NAME")
    try:
        read(p.parse_args())
    except (ValueError, OSError) as error:
        print(f"results/length.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def read(args) -> None:
    scorer, tokenizer = weights.load(args.start_model)
    people, kept = personas.load(args.personas), ROOT / "results" / args.name / "by_length.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(kept.read_text()) if kept.is_file() else {}
    for arm in args.arms:
        for folder in sorted(args.out.glob("start" if arm == "start" else f"{arm}-seed*/evaluation")):
            name = "start" if arm == "start" else folder.parent.name
            replies = [row for row in rows(folder / "transcripts.jsonl") if row["kind"] == "roleplay"]
            lengths = np.array([row["tokens"] for row in replies])
            run = runs.setdefault(name, {"arm": arm, "training_seed": compare.read_arm(folder)[1].get("training_seed")})
            run["tokens"], run["reach"] = lengths.mean(), {str(cut): (lengths >= cut).mean() for cut in CUTS}
            if "traced" not in run:
                found = traced(scorer, tokenizer, replies, people)
                run["traced"] = {str(cut): shares for cut, shares in found.items()}
            write_atomically(kept, json.dumps(runs) + "\n")
            print(name, {cut: f"{np.mean(x):.3f}" for cut, x in run["traced"].items()}, flush=True)
    markdown = table(runs)
    write_atomically(kept.with_suffix(".md"), markdown)
    print(markdown)


if __name__ == "__main__":
    sys.exit(main())
