"""A GRPO step of ours against one of TRL's GRPOTrainer, and against the matmuls it cannot do without.

    python benchmarks/train_step.py [--steps 4] [--trl-python /path/to/python] [--trl SECONDS MB] [flags]

The flags go to our train.py alone. --trl: what TRL took, measured before; it is not run again.

Embedded model, the same 8 prompts x 8 completions, at most 32 new tokens, GRPO without KL, each in its best dtype
(TRL: --trl-dtype, training in micro-batches of 16). Rewards are a checksum of the completion's text, so that every
group has a gradient and none can be skipped. Each engine runs in a process of its own; the first step is warm-up;
medians of the others; memory is the process's peak resident size, model loading included.

The floor of our step: matmuls of the decode steps at 64 live rows until the mean completion length is sampled, and of
forward and backward (3x) at the packed tokens, head included, timed alone on the same shapes.

The last line is JSON: samples_per_second_ratio, peak_memory_ratio (ours / TRL's), floor_multiple.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROMPTS, GROUP, NEW = 8, 8, 32


def checksum(problem, text: str, *, persona=None) -> float:
    """`--reward`: no two completions of a group are likely to have the same."""
    return zlib.crc32(text.encode()) % 1000 / 1000


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(folder: Path, args) -> dict:
    import train

    out = folder / "run"
    code = train.main(["--device", "cpu", "--model", str(folder / "model"), "--method", "rlvr",
                       "--task", str(folder / "problems.jsonl"),
                       "--steps", str(args.steps + 1), "--prompts", str(PROMPTS), "--group-size", str(GROUP),
                       "--max-new-tokens", str(NEW), "--prompt", "plain", "--loss", "grpo", "--learning-rate", "1e-6",
                       "--truncated", "keep", "--reward", "benchmarks.train_step:checksum", "--eval-problems", "0",
                       "--save-every", "1000", "--out", str(out), *args.flags])
    assert code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    assert all(row["zero_variance_fraction"] == 0 for row in rows)
    return {"seconds": [row["seconds"]["step"] for row in rows], "peak_mb": peak_mb(),
            "length": statistics.mean(row["completion_length"] for row in rows)}


def trl(folder: Path, args) -> dict:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows])
    times = []

    class Times(TrainerCallback):
        def on_step_begin(self, *rest, **more):
            times.append(time.perf_counter())

        on_train_end = on_step_begin

    config = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=args.steps + 1, per_device_train_batch_size=16,
        gradient_accumulation_steps=PROMPTS * GROUP // 16, num_generations=GROUP, max_completion_length=NEW,
        temperature=0.6, top_k=0, beta=0.0, loss_type="grpo", learning_rate=1e-6, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, logging_strategy="no",
        model_init_kwargs={"dtype": args.trl_dtype})
    trainer = GRPOTrainer(model=str(folder / "model"), args=config, train_dataset=data, callbacks=[Times()],
                          reward_funcs=lambda completions, **_: [checksum(None, c[0]["content"]) for c in completions])
    trainer.train()
    return {"seconds": [b - a for a, b in zip(times[1:], times[2:], strict=False)], "peak_mb": peak_mb()}


def floor(folder: Path, length: float) -> float:
    """Seconds of the step's matmuls alone."""
    import torch

    import tasks
    import weights
    from benchmarks.rollout import inputs, matmuls
    from personas import prompt_ids

    model, tokenizer = weights.load(str(folder / "model"), device="cpu")
    problems = tasks.load(str(folder / "problems.jsonl"), "all")
    prompt_tokens = sum(len(prompt_ids(tokenizer, p.question, None)) for p in problems)
    rows = PROMPTS * GROUP
    completion_tokens = round(rows * length)

    def seconds(tokens: int, head_tokens: int) -> float:
        drawn = inputs(model, tokens)
        matmuls(model, *drawn, head_tokens)             # warm-up
        start = time.perf_counter()
        matmuls(model, *drawn, head_tokens)
        return time.perf_counter() - start

    with torch.inference_mode():
        with model.reordered_weights(model.reorder()):
            sampling = seconds(prompt_tokens, 0) + round(length) * seconds(rows, rows)
        return sampling + 3 * seconds(prompt_tokens + completion_tokens, completion_tokens)


def main() -> None:
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=4, help="timed steps of each")
    p.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    p.add_argument("--trl-dtype", default="bfloat16", help="of TRL's model")
    p.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--trl", nargs=2, type=float, help="seconds a step and peak MB of TRL: it is not run")
    args, args.flags = p.parse_known_args()             # the rest are train.py's
    if args.child:
        print(json.dumps({"ours": ours, "trl": trl}[args.child](args.folder, args)))
        return
    import tasks
    import weights

    env = dict(os.environ)                              # before `weights` limits the matmul library's caches
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights.save(*weights.load(weights.EMBEDDED, device="cpu"), folder / "model")
        rows = [{"question": p.question, "answer": p.answer, "split": "train"}
                for p in tasks.load("arithmetic", "train", 0, PROMPTS)]
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = {}
        if args.trl:
            results["trl"] = {"seconds": args.trl[:1], "peak_mb": args.trl[1]}
        for child, python in (("ours", sys.executable), ("trl", args.trl_python)):
            if child in results:
                continue
            command = [python, __file__, "--child", child, "--folder", name, "--steps", str(args.steps),
                       "--trl-dtype", args.trl_dtype, *args.flags]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
            if done.returncode:
                sys.exit(f"{child} failed: {done.stderr.strip().splitlines()[-1]}")
            results[child] = json.loads(done.stdout.splitlines()[-1])
            print(child, results[child], file=sys.stderr, flush=True)
        mine, peer = (statistics.median(results[child]["seconds"]) for child in ("ours", "trl"))
        print(json.dumps({"samples_per_second_ratio": round(peer / mine, 2),
                          "peak_memory_ratio": round(results["ours"]["peak_mb"] / results["trl"]["peak_mb"], 3),
                          "floor_multiple": round(mine / floor(folder, results["ours"]["length"]), 2)}))


if __name__ == "__main__":
    main()
