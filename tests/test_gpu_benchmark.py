"""benchmarks/gpu.py dry-run on the CPU: every stage's rows, and what is left after a crash, a cut and a signal."""

import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GPU = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
STAGES = "card tests logprob decode train main experiment".split()
SCRIPT = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import gpu

def crash(report):
    with report.row("before the crash") as row:
        row |= {{"value": 1.0, "unit": "s"}}
    with report.row("a failure within a row") as row:
        raise ValueError("passed over")
    raise RuntimeError("on purpose")

def wrong(report):
    with report.row("a failure within a row") as row:
        raise ValueError("and no other")

def hang(report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with report.row("its child") as row:
        row |= {{"value": float(child.pid), "unit": "process"}}
    with report.row("before it hangs") as row:
        row |= {{"value": float(os.getpid()), "unit": "process"}}
    time.sleep(1000)

gpu.STAGES |= {{"crash": (crash, 60), "wrong": (wrong, 60), "hang": (hang, float(os.environ["HANGS"]))}}
sys.exit(gpu.main(script=__file__))
"""


def started(command, out, tiny_folder, stages, hangs=1000):
    return subprocess.Popen(
        [*command, "--out", str(out), "--device", "cpu", "--model", str(tiny_folder), "--stages", *stages],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HANGS": str(hangs)})


def values(entry) -> dict:
    return {row["what"]: row.get("value", row.get("note")) for row in entry["rows"]}


@pytest.fixture(scope="module")
def dry(tiny_folder, tmp_path_factory):
    """(summary, folder, stdout) of a run of all stages."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    run = started(GPU, out, tiny_folder, STAGES)
    printed, said = run.communicate(timeout=570)
    assert run.returncode == 0, printed + said
    return json.loads((out / "summary.json").read_text()), out, printed


@pytest.fixture
def more_stages(tmp_path):
    path = tmp_path / "more_stages.py"
    path.write_text(SCRIPT)
    return [sys.executable, str(path)]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_every_stage_ends_and_the_folder_holds_few_files(dry):
    summary, out, printed = dry
    assert {name: entry["state"] for name, entry in summary["stages"].items()} == dict.fromkeys(STAGES, "done")
    assert summary["versions"]["torch"] and summary["commit"] and "--device cpu" in summary["command"]
    assert {path.name for path in out.iterdir()} == {"summary.json", "README.md", "experiment.tar.gz"}
    assert printed.strip() in (out / "README.md").read_text()
    assert all(f"| **{name}** | done |" in printed for name in STAGES)


@pytest.mark.slow
def test_each_measurement_is_a_number_beside_its_floor_or_peer(dry):
    stages = dry[0]["stages"]
    for name in ("card", "logprob", "decode", "train"):
        rows = stages[name]["rows"]
        assert all(math.isfinite(row["value"]) for row in rows if "note" not in row)
        assert not any("failed" in row.get("note", "") for row in rows)
    to = {row.get("to") for name in ("logprob", "decode", "train") for row in stages[name]["rows"]}
    assert to >= {"of the matmul rate", "x the byte floor", "x our time"}
    logprob, decode = values(stages["logprob"]), stages["decode"]["rows"]
    assert logprob["ours, error against float64, 24 x 500 x 32"] < 1e-5
    assert any("graphs" in row["what"] and "needs a GPU" in row.get("note", "") for row in decode)


@pytest.mark.slow
def test_each_request_of_the_mixed_load_ends_at_its_own_length(dry):
    loads = [row for row in dry[0]["stages"]["decode"]["rows"] if "requests" in row["what"]]
    assert len(loads) == 2                              # 6 requests of 4 to 12 tokens
    assert all(24 < row["tokens_in"] < 72 and 24 < row["tokens_out"] < 72 for row in loads)
    assert len({row["tokens_out"] for row in loads}) == 1


@pytest.mark.slow
def test_the_main_job_and_the_arms_are_in_the_summary(dry):
    summary, out, _ = dry
    main = values(summary["stages"]["main"])
    assert main["python train.py"] > 0 and "mean_accuracy" in main
    assert any(what.startswith("phase train") for what in main)
    assert {"start", "rlvr-seed0"} <= values(summary["stages"]["experiment"]).keys()
    with tarfile.open(out / "experiment.tar.gz") as archive:
        assert {"experiment/start/results.json", "experiment/rlvr-seed0/results.json",
                "experiment/tables.md"} <= set(archive.getnames())


@pytest.mark.slow
def test_a_crash_and_a_cut_lose_no_measurement_and_stop_no_other_stage(more_stages, tmp_path, tiny_folder):
    run = started(more_stages, tmp_path / "out", tiny_folder, ["card", "crash", "wrong", "hang", "logprob"], hangs=20)
    printed, said = run.communicate(timeout=300)
    stages = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert run.returncode == 1, printed + said
    assert [stages[name]["state"] for name in ("card", "crash", "wrong", "hang", "logprob")] == [
        "done", "failed", "failed", "cut after 20 s", "done"]
    assert stages["crash"]["rc"] == 1 and stages["crash"]["error"] == "RuntimeError: on purpose"
    assert values(stages["crash"]) == {"before the crash": 1.0,
                                       "a failure within a row": "failed: ValueError: passed over"}
    assert all(gone(int(values(stages["hang"])[what])) for what in ("before it hangs", "its child"))
    assert "RuntimeError: on purpose" in printed and "before it hangs" in printed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_running_stage_and_still_gives_the_table(more_stages, tmp_path, tiny_folder, number):
    out = tmp_path / "out"
    run = started(more_stages, out, tiny_folder, ["hang", "card"])
    began = time.monotonic()
    while "before it hangs" not in ((out / "hang.json").read_text() if (out / "hang.json").exists() else ""):
        assert time.monotonic() - began < 120 and run.poll() is None
        time.sleep(0.1)
    run.send_signal(number)
    printed, _ = run.communicate(timeout=60)
    entry = json.loads((out / "summary.json").read_text())["stages"]["hang"]
    assert run.returncode == 128 + number and entry["state"] == "stopped"
    assert gone(int(values(entry)["before it hangs"])) and "| **hang** | stopped" in printed


@pytest.mark.slow
def test_a_second_run_keeps_the_first_ones_stages_and_reads_its_card(dry, tmp_path, tiny_folder):
    killed = dry[0]["stages"] | {"decode": {"state": "running", "commit": ""}}      # its command was
    (tmp_path / "decode.json").write_text('{"rows": [], "failed": ["of what it had"]}')
    for card in ("CPU", "another"):
        written = json.dumps(dry[0] | {"card": card, "stages": killed})
        (tmp_path / "summary.json").write_text(written)
        run = started([*GPU, "--minutes", "0.01"], tmp_path, tiny_folder, ["logprob"])
        said, left = run.communicate(timeout=120), (tmp_path / "summary.json").read_text()
        if card == "another":                           # measurements of a card that may be gone
            assert run.returncode == 2 and "give another --out" in str(said) and left == written
            continue
        stages = json.loads(left)["stages"]
        assert run.returncode == 0 and set(stages) == {*STAGES} and stages["card"] == dry[0]["stages"]["card"]
        assert stages["logprob"]["state"] == "not run: no time left"
        assert stages["decode"]["state"] == "stopped" and stages["decode"]["failed"] == ["of what it had"]


@pytest.mark.parametrize("flags, words", [
    (["--minutes", "-1"], "--minutes must be positive"), (["--stages", "cards"], "invalid choice"),
    (["--model", "/nowhere"], "no model at")])
def test_wrong_usage_is_one_line(script, flags, words, tmp_path):
    run = script("benchmarks/gpu.py", "--out", tmp_path, "--device", "cpu", *flags)
    assert run.returncode == 2 and words in run.stderr and len(run.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_line_says_how_to_dry_run(script, tmp_path):
    run = script("benchmarks/gpu.py", "--out", tmp_path)
    assert run.returncode == 2
    assert run.stderr == "gpu.py: no GPU here: --device cpu dry-runs every stage in small sizes\n"
