"""One command that checks and measures everything on a machine with a GPU, the most telling first.

    python benchmarks/gpu.py --out DIR                          # all stages, in at most 8 minutes
    python benchmarks/gpu.py --out DIR --stages card decode     # two; others' results in DIR stay
    python benchmarks/gpu.py --out DIR --device cpu --model FOLDER      # a dry run in small sizes

    card        copy bandwidth and matmul rate: the floors by which the other stages divide
    tests       tests/test_gpu.py
    logprob     the fused log-prob: error, time, memory, beside what it replaces
    decode      a decode step beside the bytes it must read; a load of mixed lengths; transformers
    train       a micro-batch forward and backward, and the optimizer, beside their floors
    main        the main job: python train.py
    experiment  arms of results/run.py, as far as the minutes go

Each stage is a process group of its own with a time limit. It writes DIR/STAGE.json after each
measurement, so a crash or a cut loses nothing. Once it has ended, that file and the end of its
output move into DIR/summary.json. So at the end DIR holds that file, README.md with the table, and
experiment.tar.gz: few, as some machines give few files back. A measurement that fails is a row that
says why: out of memory, not installed and refused are findings, all else fails the stage.

Exit status: 0 all stages have ended or had no time, 1 one failed or was cut, 2 wrong usage.
What each stage measures is in gpu_stages.py. Left out: several GPUs, hardware counters, and TRL
(benchmarks/train_step.py has it, on a CPU).
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import weights  # noqa: E402
from benchmarks import gpu_stages  # noqa: E402
from common import files  # noqa: E402
from common.command import Parser, one_line  # noqa: E402

# name -> (function of a report, its most seconds). A script may add its own and call main.
STAGES = {"card": (gpu_stages.card, 60), "tests": (gpu_stages.tests, 240),
          "logprob": (gpu_stages.logprob, 120), "decode": (gpu_stages.decode, 200),
          "train": (gpu_stages.train, 150), "main": (gpu_stages.main_job, 400),
          "experiment": (gpu_stages.experiment, 3600)}
LEAST = 5                                               # seconds; with less no stage is started


def run_stage(name: str, seconds: float, args, script: str, entry: dict) -> None:
    """Fills the stage's entry of the summary however the stage ends, and leaves no process."""
    began, report = time.monotonic(), args.out / f"{name}.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, script, "--stage", name, "--seconds", seconds, "--out", args.out,
               "--device", args.device, "--model", args.model]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    with tempfile.TemporaryDirectory(prefix="permix-", ignore_cleanup_errors=True) as folder, \
            open(f"{folder}/log", "wb") as log:
        # A group, but no session: what ends this program's session shall end its stages too.
        process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
            env=os.environ | hidden | {"TMPDIR": folder, "PYTHONUNBUFFERED": "1"})
        entry["state"] = "stopped"
        try:
            process.wait(seconds)
            entry["state"] = "failed" if process.returncode else "done"
        except subprocess.TimeoutExpired:
            entry["state"] = f"cut after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            entry |= {"rc": process.wait(), "seconds": round(time.monotonic() - began, 1)}
            entry["log"] = Path(log.name).read_text(errors="replace").strip()[-4000:]
            if entry["state"] != "done":
                entry["error"] = (entry["log"].splitlines() or ["no output"])[-1][:300]
            if report.is_file():
                entry |= json.loads(report.read_text())
            for torn in args.out.glob("*.part"):
                torn.unlink()


def facts(args) -> dict:
    """The machine, and the program that measures."""
    query = ["nvidia-smi", "-i", "0", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver, versions = "CPU", "", {"python": platform.python_version()}
    if args.device == "cuda":
        try:
            name, driver = subprocess.check_output(query, text=True).strip().split(", ")
        except (OSError, ValueError, subprocess.CalledProcessError):        # another maker's
            name = torch.cuda.get_device_name()
    for package in ("torch", "triton", "transformers"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"card": name, "driver": driver, "versions": versions, "commit": files.commit(),
            "command": shlex.join([sys.executable, *sys.argv])}


def earlier(out: Path, card: str) -> dict:
    """The stages that `out` holds. One that was killed with its command keeps what it had written.
    ValueError where they are of another card."""
    if not (out / "summary.json").exists():
        return {}
    before = json.loads((out / "summary.json").read_text())
    if before["card"] != card:
        raise ValueError(f"it holds results of another card, {before['card']}: give another --out")
    stages = before["stages"]
    for name, entry in stages.items():
        if entry["state"] == "running" and (out / f"{name}.json").is_file():
            entry |= {"state": "stopped"} | json.loads((out / f"{name}.json").read_text())
    return stages


def table(summary: dict) -> str:
    lines = [("stage", "what", "value", "ratio", "s"), ("---", "---", "---:", "---:", "---:")]
    for name, entry in summary["stages"].items():
        state = ": ".join(entry[key] for key in ("state", "error") if key in entry)
        lines.append((f"**{name}**", state, "", "", entry.get("seconds", "")))
        for row in entry.get("rows", []):
            value, ratio = row.get("value"), row.get("ratio")
            if value is not None:
                value = f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"
                value += f" {row['unit']}"
            ratio = "" if ratio is None else f"{ratio:.3g} {row['to']}"
            words = "; ".join(filter(None, (value, row.get("note"))))
            lines.append(("", row["what"], words, ratio, row["seconds"]))
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def write(summary: dict, out: Path) -> None:
    about = "\n\n".join(f"{key}: {summary[key]}" for key in summary if key != "stages")
    files.write_atomically(out / "README.md", f"{about}\n\n{table(summary)}")
    files.write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    for name, entry in summary["stages"].items():
        if entry["state"] != "running":                 # it is in the summary
            (out / f"{name}.json").unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    p = Parser(description="Check and measure everything on a machine with a GPU.")
    p.add_argument("--out", type=Path, required=True, help="folder of the results")
    p.add_argument("--minutes", type=float, default=8, help="of all stages together, at most")
    p.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="STAGE",
                   help="run in the order given")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: small sizes")
    p.add_argument("--model", default=weights.EMBEDDED, help="in the embedded model's place")
    p.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)       # this one, in here
    p.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None, script: str = __file__) -> int:
    """script: what is run again for each stage."""
    p = parser()
    args = p.parse_args(argv)
    if args.stage:
        if hasattr(signal, "alarm"):                    # should the command that started it be gone by then
            signal.alarm(int(args.seconds) + 30)
        report = gpu_stages.Report(args)
        STAGES[args.stage][0](report)
        print(*report.failed, sep="\n", file=sys.stderr)
        return int(bool(report.failed))
    if args.device == "cuda" and not torch.cuda.is_available():
        p.exit(2, "gpu.py: no GPU here: --device cpu dry-runs every stage in small sizes\n")
    if not args.minutes > 0:
        p.error(f"--minutes must be positive, not {args.minutes}")
    args.out, summary, code = args.out.resolve(), facts(args) | {"stages": {}}, 0
    try:
        if args.model != weights.EMBEDDED:              # without the embedded one its rows say why
            weights.resolve(args.model)
    except ValueError as error:
        p.exit(2, f"gpu.py: {one_line(error)}\n")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        summary["stages"] = earlier(args.out, summary["card"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        p.exit(2, f"gpu.py: {args.out} cannot take these results: {one_line(error)}\n")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    end = time.monotonic() + 60 * args.minutes
    try:
        for name in args.stages:
            entry = summary["stages"][name] = {"state": "running", "commit": summary["commit"]}
            write(summary, args.out)
            seconds = min(STAGES[name][1], end - time.monotonic() - 1)
            if seconds < LEAST:
                entry["state"] = "not run: no time left"
                continue
            print(f"{name}, at most {seconds:.0f} s", file=sys.stderr, flush=True)
            run_stage(name, seconds, args, script, entry)
            code |= entry["state"] != "done"
    finally:
        print(table(summary), flush=True)               # also where the disk is full
        write(summary, args.out)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
