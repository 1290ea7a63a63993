"""The stages of benchmarks/gpu.py: what each measures, on a GPU in full sizes, on a CPU in small ones."""

import inspect
import json
import platform
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import weights
from benchmarks.logprob import cross_entropy, fused, log_softmax
from common import files
from common.command import one_line
from model import Transformer, completion_logprobs, pack
from rollout import Sampler, SamplingParams
from sampling.cache import row_bytes, token_bytes
from training.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
RANDOM, SAMPLES = "Qwen3-0.6B's shape", 8               # random weights; completions of a prompt
TINY_RUN = ["--steps", "2", "--prompts", "2", "--group-size", "2", "--max-new-tokens", "4"]
SIZES = {
    "cuda": SimpleNamespace(
        copy=2**32, matmul=8192, repeats=7, rows=(64, 256, 512), prompt=100, new=128, groups=7,
        logprob=((1500, 49152, 576), (2048, 151936, 896), (8192, 151936, 2048)),    # N, V, H
        requests=256, lengths=(100, 1024), slow=40,
        shape={"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
               "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
               "head_dim": 128, "max_position_embeddings": 40960},
        main=[], experiment=["--arms", "rlvr", "permix", "permix+anchor", "--seeds", "0"]),
    "cpu": SimpleNamespace(
        copy=2**24, matmul=256, repeats=2, rows=(8, 16), prompt=10, new=4, groups=2,
        logprob=((24, 500, 32),), requests=6, lengths=(4, 12), slow=1,
        shape={"vocab_size": 500, "hidden_size": 32, "intermediate_size": 48,
               "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "head_dim": 16, "max_position_embeddings": 512},
        main=[*TINY_RUN, "--eval-problems", "2", "--eval-personas", "1"],
        experiment=["--arms", "rlvr", "--seeds", "0", "--problems", "2", "--questions", "2",
                    *TINY_RUN])}

# --------------------------------------------------------------------------------------------------
# A stage's report, and how things are timed


class Skip(Exception):
    """A measurement that cannot be made here; the message is what its row says."""


class Report:
    """A stage's rows, each {what, value, unit, ratio, to, seconds, ...}, or a note for a value."""

    def __init__(self, args):
        self.args, self.device, self.size = args, args.device, SIZES[args.device]
        self.end, self.rows, self.failed = time.monotonic() + args.seconds, [], []
        self.dtype = torch.float32
        if self.device == "cuda":
            bf16 = torch.cuda.get_device_capability() >= (8, 0)
            self.dtype = torch.bfloat16 if bf16 else torch.float16
        self.write()

    def write(self) -> None:
        text = json.dumps({"rows": self.rows, "failed": self.failed}, indent=1)
        files.write_atomically(self.args.out / f"{self.args.stage}.json", text)

    def left(self) -> float:
        return self.end - time.monotonic()

    @contextmanager
    def row(self, what: str, required: bool = True):
        """Yields the row to fill, and writes it whatever happens. required: a failure fails the
        stage; a peer's does not."""
        row, began = {"what": what}, time.perf_counter()
        try:
            yield row
        except Skip as reason:
            row["note"] = str(reason)
        except ImportError as error:
            row["note"] = f"not installed ({one_line(error)})"
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        except Exception as error:                      # the others are still worth their time
            traceback.print_exc()
            row["note"] = f"failed: {type(error).__name__}: {one_line(error)}"
            self.failed += [f"{what} {row['note']}"] * required
        row["seconds"] = round(time.perf_counter() - began, 2)
        self.rows.append(row)
        self.write()
        if self.device == "cuda":
            with suppress(RuntimeError):                # a broken context breaks this too
                torch.cuda.empty_cache()

    def need(self, seconds: float) -> None:
        if self.left() < seconds:
            raise Skip("no time left")

    def timed(self, work, warm: int = 2, repeats: int = 0) -> float:
        """Median seconds of a call: CUDA events, which see the host's part too, or the clock."""
        seconds = []
        for _ in range(warm + (repeats or self.size.repeats)):
            began = time.perf_counter()
            if self.device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
            work()
            if self.device == "cuda":
                end.record()
                end.synchronize()
            taken = time.perf_counter() - began
            seconds.append(start.elapsed_time(end) / 1e3 if self.device == "cuda" else taken)
        return median(seconds[warm:])

    def peak_gb(self, work) -> float | None:
        """The most memory that a call takes above what there was before, its results included."""
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9


# --------------------------------------------------------------------------------------------------
# card, tests


def copy_speed(report: Report) -> float:
    """GB read and written a second."""
    size = report.size.copy
    if report.device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 3)
    source = torch.rand(size // 4, device=report.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / report.timed(lambda: target.copy_(source), 10, 20) / 1e9


def matmul_rate(report: Report, dtype: torch.dtype) -> float:
    """TFLOP/s on random data (zeros can go faster), once the clocks have risen."""
    n = report.size.matmul
    a, b = (torch.randn(n, n, device=report.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / report.timed(lambda: a @ b, 10, 20) / 1e12


def card(report: Report) -> None:
    with report.row("card") as row:
        row["note"] = platform.processor() or platform.machine()
        if report.device == "cuda":
            p = torch.cuda.get_device_properties(0)
            row["note"] = (f"{p.name}, compute capability {p.major}.{p.minor}, "
                           f"{p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} "
                           f"multiprocessors, {getattr(p, 'L2_cache_size', 0) / 2**20:.0f} MiB L2, "
                           f"tf32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}")
    with report.row("copy") as row:
        row |= {"value": copy_speed(report), "unit": "GB/s"}
    for dtype in dict.fromkeys((report.dtype, torch.float32)):
        with report.row(f"matmul {dtype}") as row:
            row |= {"value": matmul_rate(report, dtype), "unit": "TFLOP/s"}


def rates(report: Report) -> tuple[float, float]:
    """(bytes a second, FLOPs a second in the compute dtype): `card`'s, or measured now."""
    stages = json.loads((report.args.out / "summary.json").read_text())["stages"]
    found = {row["what"]: row.get("value") for row in stages.get("card", {}).get("rows", [])}
    speed = found.get("copy") or copy_speed(report)
    rate = found.get(f"matmul {report.dtype}") or matmul_rate(report, report.dtype)
    return speed * 1e9, rate * 1e12


KERNELS = "p22 or p42 or decode_attention or varlen or rotary or adamw"    # of tests/test_gpu.py


def tests(report: Report) -> None:
    """The kernels' tests in a process of their own: an illegal access there fails all that follows.

    Near the end of its time pytest is interrupted, and so still says what has failed.
    """
    # Most of the time goes into compiling. The largest test takes 14 GB, and each process 0.5.
    room = report.device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 40e9
    workers = ["-n", "6", "--dist", "worksteal"] if room and find_spec("xdist") else []
    for part, chosen, share in (("kernels", KERNELS, 0.6), ("all else", f"not ({KERNELS})", 1)):
        with report.row(f"tests/test_gpu.py, {part}") as row:
            command = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py", "-k", chosen, "-rfE", "--tb=short",
                       "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", *workers]
            with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT) as running:
                alarm = threading.Timer(share * (report.left() - 10), running.send_signal, [signal.SIGINT])
                alarm.start()
                for line in running.stdout:
                    print(line, end="")
                    if line.startswith(("FAILED ", "ERROR ")):
                        row.setdefault("failures", []).append(line.strip())
                alarm.cancel()
            row["note"] = line.strip()                  # "7 passed, 2 skipped in 3.21s"
            if running.returncode:
                report.failed.append(line.strip())


# --------------------------------------------------------------------------------------------------
# logprob


def linear_cross_entropy(hidden, weight, targets, entropy):
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has none")
    chunked = {}
    if "options" in inspect.signature(F.linear_cross_entropy).parameters:
        chunked["options"] = torch.nn.LinearCrossEntropyOptions()   # without: all logits at once
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="sum", **chunked), None


def liger(hidden, weight, targets, entropy):
    from liger_kernel.transformers import fused_linear_cross_entropy as module

    return -module.LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets), None


# function, has it entropy, matmuls of forward and backward
METHODS = {"ours": (fused, True, 4), "log_softmax": (log_softmax, True, 3),
           "cross_entropy": (cross_entropy, False, 3), "liger": (liger, False, 3),
           "torch's linear_cross_entropy": (linear_cross_entropy, False, 3)}
FORWARD, ENTROPY = "forward", "with gradients, and entropy's"
WRONG = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}    # relative error


def logprob(report: Report) -> None:
    _, rate = rates(report)
    for N, V, H in report.size.logprob:
        torch.manual_seed(0)
        cast, at = {"device": report.device, "dtype": report.dtype}, f"{N} x {V} x {H}"
        hidden = torch.randn(N, H, **cast).requires_grad_()
        weight = (torch.randn(V, H, **cast) * (3 / H**0.5)).requires_grad_()
        inputs = hidden, weight, torch.randint(V, (N,), device=report.device)
        with report.row(f"ours, error against float64, {at}") as row:
            row |= errors(*inputs)
            if not row["value"] < WRONG[report.dtype]:                      # NaN is wrong too
                raise ValueError(f"the relative error is {row['value']:.1e}")
        for kind in (FORWARD, "with gradients", ENTROPY):
            ours = None
            for name, (method, has_entropy, matmuls) in METHODS.items():
                if kind == ENTROPY and not has_entropy:
                    continue
                with report.row(f"{name}, {kind}, {at}", name == "ours") as row:
                    report.need(5)

                    def work(method=method, kind=kind, inputs=inputs):
                        with torch.set_grad_enabled(kind != FORWARD):
                            logprobs, entropy = method(*inputs, kind == ENTROPY)
                        if kind != FORWARD:
                            loss = logprobs.sum() + (entropy.sum() if kind == ENTROPY else 0)
                            torch.autograd.grad(loss, inputs[:2])

                    seconds = report.timed(work)
                    flops = 2 * N * V * H * (1 if kind == FORWARD else matmuls)
                    row |= {"value": seconds * 1e3, "unit": "ms", "tflops": flops / seconds / 1e12,
                            "peak_gb": report.peak_gb(work)}
                    if name == "ours":
                        ours = seconds
                        row |= {"ratio": flops / seconds / rate, "to": "of the matmul rate"}
                    elif ours:
                        row |= {"ratio": seconds / ours, "to": "x our time"}


def errors(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict:
    """|ours - reference| / |reference| of log-probs, entropy and both gradients. Ours runs at full
    size, but only 64 tokens have a gradient, so these alone are computed in float64."""
    at = torch.randperm(len(hidden), device=hidden.device)[:64]
    slope, curve = torch.zeros(2, len(hidden), device=hidden.device)
    slope[at], curve[at] = torch.randn(2, len(at), device=hidden.device)
    logprobs, entropy = fused(hidden, weight, targets, True)
    grads = torch.autograd.grad((slope * logprobs + curve * entropy).sum(), (hidden, weight))
    got = logprobs[at], entropy[at], grads[0][at], grads[1]
    h, w = (x.detach().double().requires_grad_() for x in (hidden[at], weight))
    log_p = (h @ w.t()).log_softmax(-1)
    logprobs, entropy = log_p.gather(1, targets[at, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    grads = torch.autograd.grad((slope[at] * logprobs + curve[at] * entropy).sum(), (h, w))
    names, wanted = ("logprob", "entropy", "d hidden", "d weight"), (logprobs, entropy, *grads)
    error = {name: ((a - b).norm() / b.norm()).item()
             for name, a, b in zip(names, got, wanted, strict=True)}
    return {"value": torch.tensor(list(error.values())).max().item(), "unit": "at most", **error}


# --------------------------------------------------------------------------------------------------
# decode


def random_model(report: Report) -> Transformer:
    from transformers import Qwen3Config

    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**report.size.shape, rope_parameters=rope, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Transformer(weights.config_from_hf(config))
    model.to(report.dtype).to_empty(device=report.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)
    model.hf_config = config
    return model.eval()


def models(report: Report) -> dict[str, Transformer]:
    """By name. The embedded one is not always to be had: it needs its file and gguf."""
    name, dtype, found = report.args.model, str(report.dtype).removeprefix("torch."), {}
    with report.row(f"load {name}", required=False) as row:
        found[name] = weights.load(name, dtype, report.device)[0]
        row["note"] = f"{sum(p.numel() for p in found[name].parameters()):,} weights"
    with report.row(f"make {RANDOM}") as row:
        found[RANDOM] = random_model(report)
        row["note"] = f"{sum(p.numel() for p in found[RANDOM].parameters()):,} random weights"
    return found


def drawn(model: Transformer, lengths: list[int]) -> list[list[int]]:
    """Random prompts."""
    draw = random.Random(0)
    return [[draw.randrange(3, model.c.vocab_size) for _ in range(n)] for n in lengths]


def decode(report: Report) -> None:
    (bandwidth, _), size, best, found = rates(report), report.size, {}, models(report)
    for name, model in found.items():
        model.c.stop_ids = []                           # rows have one length
        read = sum(p.nbytes for p in model.parameters())
        if not model.c.tied:                            # of the embeddings a few rows
            read -= model.embed_tokens.weight.nbytes
        for rows in size.rows:
            prompts = drawn(model, [size.prompt] * (rows // SAMPLES))
            # each prompt's cache once, and each row's own, on average half of what it will be
            tokens = len(prompts) * size.prompt + rows * size.new / 2
            floor = (read + tokens * token_bytes(model)) / bandwidth
            for graphs in (False, True):
                with report.row(f"{name}, {rows} rows{', CUDA graphs' * graphs}") as row:
                    report.need(size.slow / 2)

                    sampler = Sampler(model, rows, graphs)
                    if graphs and not sampler.graphs:
                        raise Skip("CUDA graphs: needs a GPU")

                    def sample(new, sampler=sampler, prompts=prompts):
                        list(sampler.generate(prompts, SamplingParams(SAMPLES, new)))

                    whole = report.timed(lambda: sample(size.new), 1, 3)    # noqa: B023
                    first = report.timed(lambda: sample(1), 1, 3)           # noqa: B023
                    step = (whole - first) / (size.new - 1)
                    row |= {"value": step * 1e3, "unit": "ms a step", "ratio": step / floor,
                            "to": "x the byte floor", "floor_ms": floor * 1e3,
                            "prefill_ms": first * 1e3, "tokens_a_second": rows * size.new / whole}
                    best[name, rows] = min(whole, best.get((name, rows), whole))
    for name, model in found.items():
        mixed_load(report, name, model)
    for name, model in found.items():
        for rows in size.rows[:2]:
            with report.row(f"{name}, {rows} rows, transformers", required=False) as row:
                report.need(size.slow)
                prompts = drawn(model, [size.prompt] * (rows // SAMPLES))
                seconds = transformers_seconds(report, model, prompts)
                row |= {"value": rows * size.new / seconds, "unit": "tokens/s"}
                if (name, rows) in best:
                    row |= {"ratio": seconds / best[name, rows], "to": "x our time"}


def mixed_load(report: Report, name: str, model: Transformer) -> None:
    """Requests of many lengths, decoded together. generate has one length limit, so on_token ends
    each at its own: it is called before the sampler looks for a stop token, and puts one there."""
    size, draw = report.size, random.Random(1)
    low, high = size.lengths
    prompts = drawn(model, [draw.randint(low, high) for _ in range(size.requests)])
    lengths, slots = [draw.randint(low, high) for _ in prompts], size.requests
    if report.device == "cuda":                         # of the longest rows
        room = torch.cuda.mem_get_info()[0] / 1.5
        slots = max(8, min(slots, int(room / row_bytes(model, 2 * high)) // 8 * 8))
    sampler, (due, planned, done) = Sampler(model, slots), ({}, [], [])

    def load() -> None:
        due.clear(), done.clear()
        planned[:] = lengths
        done.extend(sampler.generate(prompts, SamplingParams(max_tokens=high), on_token=end))

    def end(tokens: list[int]) -> None:
        if len(tokens) == 1:
            due[id(tokens)] = planned.pop()
        if report.left() < 10:
            raise Skip(f"no time left after {len(done)} of {size.requests} requests")
        if len(tokens) == due[id(tokens)]:
            tokens[-1] = -1

    with report.row(f"{name}, {size.requests} requests, {low} to {high} tokens in and out") as row:
        report.need(3 * size.slow)
        model.c.stop_ids = [-1]
        seconds = report.timed(load, 2, 1)              # two compile, and record all graphs
        given, made = sum(map(len, prompts)), sum(len(c.tokens) for c in done)
        row |= {"value": made / seconds, "unit": "tokens/s out", "tokens_in": given, "slots": slots,
                "tokens_out": made, "tokens_a_second": (given + made) / seconds}


def transformers_seconds(report: Report, model: Transformer, prompts: list[list[int]]) -> float:
    from transformers import AutoModelForCausalLM

    with torch.device(report.device):
        peer = AutoModelForCausalLM.from_config(model.hf_config, dtype=model.dtype,
                                                attn_implementation="sdpa").eval()
    peer.load_state_dict(weights.state(model), strict=not model.c.tied)     # ours has no tied head
    ids = torch.tensor([p for p in prompts for _ in range(SAMPLES)], device=report.device)
    settings = {"max_new_tokens": report.size.new, "do_sample": True, "temperature": 1.0,
                "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": 0}

    def sample():
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert out.shape[1] == ids.shape[1] + report.size.new

    return report.timed(sample, 1, 2)


# --------------------------------------------------------------------------------------------------
# train, main, experiment


def train(report: Report) -> None:
    """The learning half of a step: forward and backward of a micro-batch, then the optimizer."""
    (bandwidth, rate), size = rates(report), report.size
    for name, model in models(report).items():
        learning, stepping = [], []
        with report.row(f"{name}, forward and backward") as row:
            report.need(size.slow / 4)
            if report.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            policy = Policy(model, 1e-6, 0)
            groups = [(prompt, drawn(model, [size.new] * SAMPLES))
                      for prompt in drawn(model, [size.prompt] * size.groups)]
            packed = pack(groups, model)
            N, M = len(packed.input_ids), len(packed.targets)
            advantages = torch.randn(M, device=report.device)

            def learn(model=model, policy=policy, groups=groups, advantages=advantages):
                logprobs, _ = completion_logprobs(model, pack(groups, model))
                policy.backward(-(advantages * logprobs).mean())

            for _ in range(2 + size.repeats):           # two to warm up; a step needs a gradient
                learning.append(report.timed(learn, 0, 1))
                stepping.append(report.timed(lambda: policy.step(1.0), 0, 1))   # noqa: B023
            seconds = median(learning[2:])
            body = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
            floor = 6 * (body * N + model.head_weight.numel() * M) / rate
            row |= {"value": N / seconds, "unit": "tokens/s", "ratio": floor / seconds,
                    "to": "of the matmul rate", "ms": seconds * 1e3, "floor_ms": floor * 1e3,
                    "packed_tokens": N, "trained_tokens": M}
            if report.device == "cuda":
                row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if len(stepping) == 2 + size.repeats:
            with report.row(f"{name}, optimizer step") as row:
                # weights, remainders and moments in and out; gradients in, and again for the norm
                traffic = 2 * (2 + 2 + 8) + 2 * 4
                floor = traffic * sum(p.numel() for p in model.parameters()) / bandwidth
                row |= {"value": median(stepping[2:]) * 1e3, "unit": "ms", "to": "x the byte floor",
                        "ratio": median(stepping[2:]) / floor, "floor_ms": floor * 1e3}


def main_job(report: Report) -> None:
    out, began = Path(tempfile.mkdtemp()) / "run", time.perf_counter()
    with report.row("python train.py") as row:
        command = ["train.py", "--model", report.args.model, "--out", str(out), "--device",
                   report.device]
        limit = max(1, report.left() - 5)               # to report what a run that is cut got to
        try:
            subprocess.run([sys.executable, *command, *report.size.main], cwd=ROOT, check=True,
                           timeout=limit)
        except subprocess.TimeoutExpired as cut:
            raise RuntimeError(f"cut after {limit:.0f} s") from cut
        row |= {"value": time.perf_counter() - began, "unit": "s"}
    metrics = list(files.rows(out / "metrics.jsonl"))
    for phase in metrics[0]["seconds"] if metrics else ():
        with report.row(f"phase {phase}, median of {len(metrics)} steps") as row:
            row |= {"value": median(m["seconds"][phase] for m in metrics) * 1e3, "unit": "ms"}
    before, after = (out / "evaluation" / when / "results.json" for when in ("before", "after"))
    if after.is_file():
        before, after = (json.loads(path.read_text()) for path in (before, after))
        for key in ("mean_accuracy", "no_persona_accuracy", "worst_persona_accuracy", "pss"):
            with report.row(key) as row:
                row |= {"value": after[key], "unit": f"after, {before[key]:.3f} before"}


def experiment(report: Report) -> None:
    """A row an arm as soon as it is evaluated. Cut by the time, it has done what it could."""
    folder, seen, ended = Path(tempfile.mkdtemp()), set(), None
    kept = folder / "kept"                              # absolute, so it is not put into results/
    command = ["results/run.py", "--model", report.args.model, "--out", folder / "runs", "--name",
               kept, *report.size.experiment]
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT) as running:
        while ended is None and report.left() > 10:
            time.sleep(0.5)
            ended = running.poll()
            for path in sorted(set(kept.glob("*/results.json")) - seen):
                with suppress(ValueError):              # half copied: the next turn
                    got = json.loads(path.read_text())
                    seen.add(path)
                    archive(kept, report.args.out)
                    with report.row(path.parent.name) as row:
                        row["value"], row["unit"] = got["mean_accuracy"], f"and pss {got['pss']}"
        running.kill()
    if kept.is_dir():
        archive(kept, report.args.out)
    with report.row("results/run.py") as row:
        row["note"] = f"{len(seen)} evaluated{'; cut by the time' * (ended is None)}"
        if ended:
            raise RuntimeError(f"exit {ended}, see the log")


def archive(folder: Path, out: Path) -> None:
    with tarfile.open(out / "experiment.part", "w:gz") as file:
        file.add(folder, "experiment")
    (out / "experiment.part").replace(out / "experiment.tar.gz")
