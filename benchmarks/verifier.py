"""benchmarks/verifier.py: rewards.py beside Math-Verify (dev dependency): right verdicts, false positives, time.

Two sets: the labelled corpora (tests/verifier_corpus.jsonl, and the prose of tests/verifier_prose.jsonl that needs no
question), every disagreement listed on stderr; and real gold answers (GSM8K and MATH-500, in a box), where only time is
compared. Math-Verify parses both texts for each pair, as a trainer
would have it do; its time limits are left on. Ends in one JSON line on stdout.

    python benchmarks/verifier.py [--repeats 3] [--data ../shared/data] [--golds 1000]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.command import positive  # noqa: E402
from rewards import verify  # noqa: E402


def math_verify_judge():
    """Math-Verify as (gold, answer) -> bool, or None where it is not installed."""
    try:
        import math_verify
    except ImportError:
        return None, None
    from importlib.metadata import version

    logging.disable(logging.ERROR)

    def judge(gold: str, answer: str) -> bool:
        return bool(math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(answer)))

    return judge, version("math-verify")


def timed(judge, pairs: list[tuple[str, str]], repeats: int) -> tuple[list[bool], list[float]]:
    """Verdicts, and for each pair the least milliseconds over `repeats` runs."""
    verdicts, times = [], [float("inf")] * len(pairs)
    for repeat in range(repeats):
        for i, pair in enumerate(pairs):
            start = time.perf_counter()
            right = judge(*pair)
            times[i] = min(times[i], 1000 * (time.perf_counter() - start))
            if repeat == 0:
                verdicts.append(right)
    return verdicts, times


def percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"mean_ms": round(sum(times) / len(times), 3), "p50_ms": round(ordered[len(times) // 2], 3),
            "p99_ms": round(ordered[int(len(times) * 0.99)], 3), "max_ms": round(ordered[-1], 1)}  # fmt: skip


def score(labels: list[bool], verdicts: list[bool]) -> dict[str, float]:
    right = sum(a == b for a, b in zip(labels, verdicts, strict=True))
    return {"pairs": len(labels), "right": round(right / len(labels), 4),
            "false_positives": sum(v and not a for a, v in zip(labels, verdicts, strict=True)),
            "false_negatives": sum(a and not v for a, v in zip(labels, verdicts, strict=True))}  # fmt: skip


def gold_pairs(folder: Path, limit: int) -> dict[str, list[tuple[str, str]]]:
    """{set: [(gold, completion)]}: GSM8K golds against their own solutions, MATH-500 golds in a box."""
    sets = {}
    if (folder / "gsm8k_train.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "gsm8k_train.jsonl").open(encoding="utf-8")][:limit]
        sets["gsm8k"] = [(row["answer"].split("####")[1].strip(), row["answer"]) for row in rows]
        rows = [json.loads(line) for line in (folder / "math500_half.jsonl").open(encoding="utf-8")]
        sets["math500"] = [(row["answer"], f"So the answer is $\\boxed{{{row['answer']}}}$.") for row in rows]
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=3, help="runs per pair; the fastest counts")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder with the gold answers")
    parser.add_argument("--golds", type=positive, default=1000, help="GSM8K golds to time")
    args = parser.parse_args()
    rows = [json.loads(line) for name in ("corpus", "prose")
            for line in (ROOT / f"tests/verifier_{name}.jsonl").open(encoding="utf-8")]
    rows = [row for row in rows if "question" not in row]
    sets = {"corpus": [(row["gold"], row["answer"]) for row in rows], **gold_pairs(args.data, args.golds)}
    labels = [row["correct"] for row in rows]
    other, version = math_verify_judge()
    judges = {"ours": lambda gold, answer: verify(gold, answer).verdict == "correct"}
    if other:
        judges[f"math-verify {version}"] = other
    result: dict = {name: {} for name in judges}
    verdicts = {}
    for name, judge in judges.items():
        for part, pairs in sets.items():
            found, times = timed(judge, pairs, args.repeats)
            result[name][part] = percentiles(times) | score(labels if part == "corpus" else [True] * len(pairs), found)
            if part == "corpus":
                verdicts[name] = found
    for i, row in enumerate(rows):
        said = {name: found[i] for name, found in verdicts.items()}
        if set(said.values()) != {row["correct"]}:
            print(json.dumps({**row, **said}, ensure_ascii=False), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
