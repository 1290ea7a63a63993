"""Time and extra memory of log-prob and entropy with both gradients: the fused path against the ways it replaces.

    python benchmarks/logprob.py                 # issue-size: 2,048 tokens, 151,936 words, hidden size 896; minutes
    python benchmarks/logprob.py --tokens 256 --vocab 20000 --hidden 128

Every method runs in a process of its own. Extra memory is the peak resident size above what the inputs took, less
the two gradients that every method returns. Time is the smallest of the repeats, forward and backward, after one
warm-up. Methods without entropy are compared with log_softmax + gather without entropy. Gradient error is |a - b| /
|b| (norms), the larger of d hidden and d weight, against log_softmax + gather in fp32 on the same inputs. Ends in
one JSON line: the ratios of `fused` to `log_softmax`, entropy included, worst over the dtypes.

Liger's and cut-cross-entropy's torch paths (pip install --no-deps liger-kernel cut-cross-entropy) run where they
are installed.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common.command import positive  # noqa: E402
from kernels import linear_logprob  # noqa: E402

PEERS = {"liger": "liger_kernel", "cut_cross_entropy": "cut_cross_entropy"}
WITH_ENTROPY = ("log_softmax", "checkpointed_chunks", "fused")
LOGPROB_ONLY = ("log_softmax", "cross_entropy", "liger", "cut_cross_entropy", "fused")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def log_softmax(hidden, weight, targets, entropy):
    logp = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1) if entropy else None


def cross_entropy(hidden, weight, targets, entropy):
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none"), None


def checkpointed_chunks(hidden, weight, targets, entropy, rows=128):
    parts = [checkpoint(log_softmax, h, weight, t, entropy, use_reentrant=False)
             for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def liger(hidden, weight, targets, entropy):
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, targets[None])[0].squeeze(0), None


def cut_cross_entropy(hidden, weight, targets, entropy):
    from cut_cross_entropy import linear_cross_entropy
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile"), None


def fused(hidden, weight, targets, entropy):
    return linear_logprob(hidden, weight, targets)


# ----------------------------------------------------------------------------------------------------------------------

def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Largest resident size while the block runs, read every 2 ms (the system's own high-water mark only rises)."""

    def __enter__(self):
        self.peak, self.running = resident_bytes(), True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.002)

    def __exit__(self, *error):
        self.running = False
        self.thread.join()


def measure(method, dtype, entropy, tokens, hidden_size, vocab, repeats, gradients):
    """Seconds, extra bytes; the gradients of the last repeat go to the file `gradients`."""
    torch.manual_seed(0)  # inputs are bf16 numbers in either dtype, so that one fp32 gradient is the reference for both
    hidden = torch.randn(tokens, hidden_size).bfloat16().to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(vocab, hidden_size) * 3 / hidden_size**0.5).bfloat16().to(DTYPES[dtype]).requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    slope, curve = torch.randn(tokens), torch.randn(tokens) * 0.1

    def step():
        logprobs, ent = globals()[method](hidden, weight, targets, entropy)
        loss = (slope * logprobs).sum() + ((curve * ent).sum() if entropy else 0.0)
        return torch.autograd.grad(loss, (hidden, weight))

    globals()[method](hidden[:2], weight, targets[:2], entropy)  # imports and compilation
    before, seconds = resident_bytes(), []
    with PeakMemory() as memory:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            grads = step()
            seconds.append(time.perf_counter() - start)
            if len(seconds) <= repeats:
                del grads
    torch.save(grads, gradients)
    outputs = sum(grad.nbytes for grad in grads)
    return dict(seconds=min(seconds[1:]), extra_mb=round((memory.peak - before - outputs) / 1e6, 1))


def in_own_process(args, method, dtype, entropy, gradients):
    command = [sys.executable, __file__, "--child", json.dumps([method, dtype, entropy]), "--gradients", gradients]
    for name in ("tokens", "hidden", "vocab", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return dict(failed=(run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1][:200])
    return json.loads(run.stdout.splitlines()[-1])


def relative_error(gradients, reference):
    pairs = zip(torch.load(gradients), torch.load(reference), strict=True)
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)


def compare(args, folder):
    rows = []
    for entropy, methods in ((True, WITH_ENTROPY), (False, LOGPROB_ONLY)):
        reference = f"{folder}/reference.pt"
        for dtype in sorted(args.dtypes, key=list(DTYPES).index):
            for method in methods:
                if method in PEERS and importlib.util.find_spec(PEERS[method]) is None:
                    continue
                gradients = reference if (dtype, method) == ("fp32", "log_softmax") else f"{folder}/gradients.pt"
                row = dict(method=method, dtype=dtype, entropy=entropy)
                row |= in_own_process(args, method, dtype, entropy, gradients)
                if "failed" not in row and os.path.exists(reference):
                    row["grad_rel_error"] = relative_error(gradients, reference)
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    return rows


def summary(rows):
    """memory_ratio, time_ratio and max_grad_rel_error of `fused` with entropy; the rows themselves beside them."""
    find = {(row["method"], row["dtype"]): row for row in rows if row["entropy"]}
    pairs = [(find["fused", dtype], find["log_softmax", dtype]) for method, dtype in find if method == "fused"]
    return dict(memory_ratio=max(a["extra_mb"] / b["extra_mb"] for a, b in pairs),
                time_ratio=max(a["seconds"] / b["seconds"] for a, b in pairs),
                max_grad_rel_error=max((a["grad_rel_error"] for a, _ in pairs if a["dtype"] == "fp32"), default=None),
                threads=torch.get_num_threads(), rows=rows)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--hidden", type=positive, default=896, help="hidden size")
    parser.add_argument("--vocab", type=positive, default=151936)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sizes = args.tokens, args.hidden, args.vocab, args.repeats
        print(json.dumps(measure(*json.loads(args.child), *sizes, args.gradients)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(summary(compare(args, folder))))


if __name__ == "__main__":
    main()
