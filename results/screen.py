"""Go or no-go: is there a persona lottery here that training could remove, before any is trained?

    python results/screen.py --model smollm2-135m --task facts --personas test --out runs/screen
    python results/screen.py ... --out runs/screen --pilot runs/rlvr/evaluation   # after a pilot

One evaluation of the start model, or the one that --out holds already. Go, if all of these hold:

- `persona_sd` is at least 8 points: the true spread of accuracy over personas, luck taken out.
- At least 5 personas carry it. The 4 that carry most are left out, one after the other, each the
  one without which it falls furthest; 40 % of it must stay. If k personas lie equally far from many
  others that are alike, sqrt((k - 4) / k) stays: 45 % with five, nothing with four.
- Mean accuracy is 0.25 to 0.6: something to learn from, and no ceiling.
- Under 10 % of the answers are cut off. Else the lottery is one of length.
- With --pilot: after a pilot run of RLVR at least 4 points are left. Where RLVR alone removes the
  lottery, persona mixing has nothing to gain.

The numbers are ours, chosen before the runs. Left out: intervals. A screen is a cheap look, and the
experiment has its own.

Exit code 0 for go, 1 for no-go, 2 where the question cannot be asked.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import personas  # noqa: E402
from common.command import Parser, one_line  # noqa: E402
from evaluation import compare, lottery, report  # noqa: E402
from results import models  # noqa: E402

LEAST_SD, PILOT_SD = 0.08, 0.04  # persona_sd, as accuracies
CARRIERS, SHARE = 5, 0.4  # personas that carry it; what must stay without all but one of them
ACCURACY = (0.25, 0.6)
CUT_OFF = 0.1  # share of the answers


def without_carriers(table, names: list[str]) -> tuple[float, list[str]]:
    """(persona_sd without them, the 4 personas that carry most) of a table [N, P] of 0 and 1.

    The most extreme ones are extreme by luck too, so what stays is rather too small than too large.
    """
    table, names, gone = np.asarray(table, dtype=float), list(names), []
    for _ in range(CARRIERS - 1):
        worst = int(lottery.without_each([table], lottery.persona_sd).argmin())
        table = np.delete(table, worst, axis=1)
        gone.append(names.pop(worst))
    return lottery.persona_sd([table]), gone


def checks(results: dict, pilot: dict | None = None) -> list[tuple[bool, str]]:
    """(holds, in words) of each rule, for the start model's results and those of a pilot of RLVR.

    ValueError where there are too few problems or personas, or the two cannot be paired.
    """
    tables, _, names = compare.persona_tables([results])
    if tables.shape[1] < 3 or len(names) < CARRIERS + 1:
        raise ValueError(f"a screen needs 3 problems and {CARRIERS + 1} personas")
    spread = lottery.persona_sd(tables)
    left, gone = without_carriers(tables[0], names)
    mean, cut = tables.mean(), results["truncated_fraction"]
    low, high = ACCURACY
    out = [
        (spread >= LEAST_SD,
         f"persona_sd is {100 * spread:.1f} points (at least {100 * LEAST_SD:.0f})"),
        (spread > 0 and left >= SHARE * spread,
         f"without {', '.join(gone)} it is {100 * left:.1f} (at least {100 * SHARE:.0f} % of it)"),
        (low <= mean <= high, f"mean accuracy is {mean:.3f} ({low} to {high})"),
        (cut < CUT_OFF,
         f"{100 * cut:.1f} % of the answers are cut off (under {100 * CUT_OFF:.0f} %)")]
    if pilot:
        compare.check_comparable([results, pilot])
        after = lottery.persona_sd(compare.persona_tables([pilot])[0])
        out.append((after >= PILOT_SD, f"after the pilot persona_sd is {100 * after:.1f} points "
                                       f"(at least {100 * PILOT_SD:.0f})"))
    return out


def text(results: dict, found: list[tuple[bool, str]]) -> str:
    """A line a persona from worst to best, a line a rule, and the verdict."""
    head = ["persona", "stratum", "accuracy", "of finished", "tokens", "cut off"]
    rows = sorted(results["personas"], key=lambda row: row["accuracy"])
    table = [[row["name"], row["stratum"], shown(row["accuracy"]), shown(row["accuracy_finished"]),
              f"{row['tokens']:.1f}", f"{row['truncated']:.2f}"] for row in rows]
    rules = [f"{'holds' if holds else 'FAILS'}  {words}" for holds, words in found]
    verdict = "go" if all(holds for holds, _ in found) else "no-go"
    return "\n".join([report.aligned([head, *table]), "", *rules, verdict])


def shown(share: float | None) -> str:
    return "–" if share is None else f"{share:.3f}"


def evaluated(args) -> dict:
    """The start model's results, those in --out where it holds some. ValueError where those are
    not of what the flags ask."""
    file = args.out / "results.json"
    if not file.is_file():
        return evaluate.one_arm(evaluate.parse([
            "--model", models.resolve(args.model), "--task", args.task, "--personas", args.personas,
            "--prompt", args.prompt, "--limit", str(args.problems), "--out", str(args.out),
            "--max-new-tokens", str(args.max_new_tokens)]))
    results = json.loads(file.read_text(encoding="utf-8"))
    if "tokens" not in results["personas"][0]:
        raise ValueError(f"{file} does not say how long answers are: give another --out")
    asked = {key: getattr(args, key) for key in ("model", "task", "prompt", "max_new_tokens")}
    names = [persona.name for persona in evaluate.pool.load(args.personas, "test")]
    known = len(evaluate.tasks.load(args.task, "test", 0, args.problems, whole=True))   # a file may have fewer
    there = results | {"problems": len(results["items"]), "personas": list(results["correct"])[1:],
                       "model": models.named(results["model"])}
    for key, value in (asked | {"problems": known, "personas": names}).items():
        if there.get(key) != value:
            raise ValueError(f"{file} is of other {key}: ask for those, or give another --out")
    return results


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help=f"start model, as for evaluate.py, or {models.QWEN}")
    add("--task", default="facts", help="as for evaluate.py")
    add("--personas", default="test", help=f"{', '.join(personas.POOLS)}, or a .jsonl file")
    add("--problems", type=int, default=100, help="held-out problems")
    add("--max-new-tokens", type=int, default=32, help="longest answer")
    add("--prompt", default="plain", choices=sorted(evaluate.tasks.PROMPTS), help="how it is put")
    add("--out", type=Path, required=True, help="folder of the evaluation, made or read")
    add("--pilot", type=Path, metavar="DIR", help="evaluation of a pilot of RLVR, asked the same")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    try:
        pilot = compare.read_arm(args.pilot)[1] if args.pilot else None
        results = evaluated(args)
        found = checks(results, pilot)
        print(text(results, found))
    except (ValueError, OSError) as error:
        print(f"screen.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0 if all(holds for holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
