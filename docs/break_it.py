"""A break-it lab: puts one realistic mistake at a time into a copy of the code. Who notices?

    python docs/break_it.py P8           a pitfall: in words, as a diff, and how its test turns red
    python docs/break_it.py P8 --run     trains with and without it, 16 short steps each: both curves
    python docs/break_it.py 57           the 57th mistake, and what pytest says of it
    python docs/break_it.py P8 P9 57     several in a table: which test noticed each
    python docs/break_it.py              all of them

docs/break_it.txt holds the mistakes. First comes one for each pitfall of docs/pitfalls.md, then
others. A mistake begins with `@ file | what is wrong`, a pitfall's with its number before the file.
Then come marked lines:

    -   the line that is there
    +   the one that takes its place
    !   the tests to run, perhaps with NAME=value before them; else those which the pitfall links
    ?   of a pitfall: the metrics that `--run` shows beside the reward
    $   of a pitfall: flags of train.py for `--run`
    ~   of a pitfall: why there is nothing for `--run` to show

A mistake that no test notices is printed as ALIVE, and the exit code is 1. Your files are never
touched: tests and training run in a copy. Each pytest starts as a fork of this process, where torch
is imported already. Left out: mistakes in two places at once, and files that git does not know.
"""

import difflib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.command import Parser  # noqa: E402

sys.path.remove(str(ROOT))

LIMIT = 300                                             # seconds until a test is taken to hang
TRAIN = ("--method rlvr --prompts 4 --max-new-tokens 16 --learning-rate 6e-5 --seed 0 "
         "--eval-problems 0 --keep 1")                  # of --run; a pitfall's own flags come behind
PARAGRAPH = r"^(\*\*P(\d+) .*?)(?=^\*\*P\d|\Z)"         # of docs/pitfalls.md


@dataclass
class Mistake:
    pitfall: str                                        # "P8"; "" for the others
    file: str
    what: str
    old: str
    new: str
    tests: str                                          # as they are given to pytest
    metrics: list[str]                                  # that give it away, beside the reward
    flags: str                                          # of train.py
    no_run: str                                         # why --run would show nothing

    def broken(self, text: str) -> str:
        """The file's text with the mistake in it. ValueError unless it fits in one place."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} places for the mistake "
                             f"'{self.what}': was its line edited here?")
        return text.replace(self.old, self.new)


def pitfalls() -> dict[str, tuple[str, str]]:
    """The page of pitfalls: {"P8": (its words, the tests that it links)}."""
    page, found = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8"), {}
    for words, number in re.findall(PARAGRAPH, page, re.M | re.S):
        links = re.findall(r'\[test\]\(\.\./(tests/\w+\.py)#L\d+ "(\w+)"\)', words)
        words = re.sub(r",?\s*\[test\]\([^)]*\)", "", words).replace("**", "")
        found[f"P{number}"] = words.strip(), " ".join("::".join(link) for link in links)
    return found


def read() -> list[Mistake]:
    """The mistakes of docs/break_it.txt, each in a paragraph of its own."""
    found, linked = [], pitfalls()
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.splitlines()
        at, what = lines[0].removeprefix("@ ").split(" | ")
        *pitfall, file = at.split()
        told = ["\n".join(line[2:] for line in lines[1:] if line[0] == mark) for mark in "-+!?$~"]
        pitfall = "".join(pitfall)
        old, new, tests, metrics, flags, no_run = told
        found.append(Mistake(pitfall, file, what, old, new,
                             tests or linked.get(pitfall, ("", ""))[1], metrics.split(), flags, no_run))
    return found


def copy(folder: Path) -> None:
    """What git tracks, as it is here, without the results."""
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if not name.startswith("results/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


# --------------------------------------------------------------------------------------------------
# Which test notices?


def warm_up() -> None:
    """Imports once what every fork would import, without what libraries say of each other."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import matplotlib.pyplot  # noqa: F401
        import torch.distributed.checkpoint  # noqa: F401
        import torch.distributed.tensor  # noqa: F401
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def run(tests: str, folder: Path, log: Path, limit: int = LIMIT, asserts: str = "plain",
        ) -> int | None:
    """pytest's exit code, None after `limit` seconds. What it says goes to `log`; with asserts =
    "rewrite", the values of a failed assertion too."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(folder)
        sys.path[0] = str(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "common"]:
            del sys.modules[name]                       # ours: the folder has its own
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        import pytest

        words, assigned = shlex.split(tests), re.compile(r"[A-Z_]+=")
        os.environ |= dict(word.split("=", 1) for word in words if assigned.match(word))
        tests = [word for word in words if not assigned.match(word)]
        quick = f"-x -q --assert={asserts} -p no:cacheprovider -p no:hypothesispytest".split()
        code = pytest.main([*tests, *quick, "-m", ""])         # slow ones too
        sys.stdout.flush()
        os._exit(int(code))
    for _ in range(limit * 10):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def write(place: Path, text: str) -> None:
    """Writes a module, and removes its bytecode: two mistakes of a second may have equal sizes."""
    place.write_text(text, encoding="utf-8")
    for compiled in (place.parent / "__pycache__").glob(f"{place.stem}.*"):
        compiled.unlink()


def verdict(mistake: Mistake, folder: Path) -> tuple[str, str]:
    """("noticed", by which test), ("ALIVE", "") or ("broken", why), and what pytest said in folder/log."""
    place, log = folder / mistake.file, folder / "log"
    text = place.read_text(encoding="utf-8")
    log.write_text("")
    write(place, mistake.broken(text))
    code = run(mistake.tests, folder, log)
    write(place, text)
    said = log.read_text(encoding="utf-8")
    failed = re.search(r"^(?:FAILED|ERROR) .*?::(\S+)", said, re.M)
    if code is None or code < 0:
        return "noticed", "it hangs" if code is None else "it crashes"
    if code == 1 and failed:
        return "noticed", f"by {failed[1]}"
    if code == 0:
        return "ALIVE", "" if re.search(r"\d passed", said) else "its tests are skipped here"
    return "broken", f"pytest ended with {code}"


def table(mistakes: dict[str, Mistake], folder: Path) -> bool:
    """Prints which test noticed each. Were all noticed?"""
    noticed = 0
    for name, mistake in mistakes.items():
        word, why = verdict(mistake, folder)
        noticed += word == "noticed"
        print(f"{name:>3} {word:7} {mistake.file}: {mistake.what}   {why}", flush=True)
    print(f"{noticed} of {len(mistakes)} noticed")
    return noticed == len(mistakes)


def show(mistake: Mistake, folder: Path) -> bool:
    """Prints one with its diff, and how the tests turn red. Do they?"""
    text = (folder / mistake.file).read_text(encoding="utf-8")
    names = f"a/{mistake.file}", f"b/{mistake.file}"
    print(f"{mistake.file}: {mistake.what}\n")
    print(*difflib.unified_diff(text.splitlines(), mistake.broken(text).splitlines(), *names,
                                lineterm=""), sep="\n")
    print(f"\npytest {mistake.tests}", flush=True)
    green = run(mistake.tests, folder, folder / "log") == 0
    print(f"as it is: {'passed' if green else 'NOT passed'}", flush=True)
    word, why = verdict(mistake, folder)
    print((folder / "log").read_text(encoding="utf-8"))
    print(f"with the mistake: {word} {why}")
    return green and word == "noticed"


# --------------------------------------------------------------------------------------------------
# Does the reward still rise?


def trained(folder: Path, flags: str) -> tuple[list[dict], str]:
    """(metrics.jsonl of a run of the copy's train.py, what it said last if it failed)."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", *shlex.split(flags), "--out", f"{out}/run"]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
            last = ""
            for last in process.stderr:
                print(end=f"  {last}", file=sys.stderr)
        path = Path(out, "run", "metrics.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines], last.strip() * (process.returncode != 0)


def thirds(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """A metric in the first and in the last third of a run's steps."""
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    count = math.ceil(len(values) / 3)
    return values[:count], values[len(values) - count:]


def rises(rows: list[dict]) -> bool:
    """Is the reward of the last third above the first's by more than two standard errors?"""
    first, last = thirds(rows, "reward")
    if len(first) < 2:
        return False
    error = math.sqrt((variance(first) + variance(last)) / len(first))
    return fmean(last) - fmean(first) > 2 * error


def compared(runs: dict[str, list[dict]], keys: list[str]) -> str:
    """The metrics of two runs side by side, in their first and in their last third."""
    lines = [f"{'first and last third of the steps':36}" + "".join(f"{name:>22}" for name in runs)]
    for key in keys:
        cells = ""
        for rows in runs.values():
            for values in thirds(rows, key):
                cells += f"{fmean(values):11.4g}" if values else f"{'-':>11}"
        lines.append(f"{key:36}{cells}")
    return "\n".join(lines)


def drawn(runs: dict[str, list[dict]], keys: list[str], title: str, path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from evaluation import plots

    fig, axes = plots.figure(5.2, 1.7 * len(keys), rows=len(keys))
    for ax, key in zip(axes, keys, strict=True):
        for (name, rows), style in zip(runs.items(), ("-", "--"), strict=True):
            told = [row for row in rows if row.get(key) is not None]
            ax.plot([row["step"] for row in told], [row[key] for row in told], style, label=name)
        ax.set_title(key, loc="left")
    axes[-1].set_xlabel("step")
    fig.suptitle("\n".join(textwrap.wrap(title, 70)), fontsize=10)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.savefig(path, dpi=120)


def train_both(mistake: Mistake, folder: Path, out: Path, steps: int) -> None:
    """Trains with and without the mistake, draws both curves and prints one table."""
    flags, runs, ends = f"{TRAIN} --steps {steps} {mistake.flags}".strip(), {}, {}
    place, keys = folder / mistake.file, ["reward", *mistake.metrics]
    text = place.read_text(encoding="utf-8")
    for name, code in (("as it is", text), (f"with {mistake.pitfall}", mistake.broken(text))):
        print(f"{name}: train.py {flags}", file=sys.stderr)
        write(place, code)
        runs[name], ends[name] = trained(folder, flags)
    print(compared(runs, keys))
    for name, rows in runs.items():
        print(f"{name}: the reward {'rises' if rises(rows) else 'does not rise'}"
              + (f"; the run ended after {len(rows)} steps: {ends[name]}" if ends[name] else ""))
    drawn(runs, keys, f"{mistake.pitfall}: {mistake.what}", out)
    print(f"curves: {out}")


def picture(path: Path) -> Path:
    """The path, with its folder made. Raises ValueError where no PNG can be written."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"--out {path} is no .png file's name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--out {path} cannot be made: {error.strerror}") from error
    return path.absolute()


def main() -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    if not Path(__file__).with_suffix(".txt").exists():
        parser.error("this is a homework, and the mistakes quote its solutions: run it in the clone")
    names = {mistake.pitfall or str(i): mistake for i, mistake in enumerate(read(), 1)}
    parser.add_argument("which", nargs="*", metavar="P8 | 57", help="some mistakes; none: all")
    parser.add_argument("--run", action="store_true", help="train with and without a pitfall")
    parser.add_argument("--steps", type=int, help="of each of the two (default: 16)")
    parser.add_argument("--out", type=Path, metavar="FILE.png",
                        help="where --run draws (default: runs/break_it/P8.png)")
    args = parser.parse_args()
    if unknown := [name for name in args.which if name not in names]:
        parser.error(f"there is no {unknown[0]}: give some of {', '.join(list(names)[:3])} ... "
                     f"{list(names)[-1]}")
    chosen = {name: names[name] for name in args.which or names}
    name, one = next(iter(chosen.items()))
    if args.run and not (len(chosen) == 1 and one.pitfall):
        parser.error("--run takes one pitfall, such as P8")
    if not args.run and (args.out or args.steps is not None):
        parser.error("--out and --steps go with --run")
    steps = 16 if args.steps is None else args.steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    if args.run and one.no_run:
        parser.error(f"{name} shows in no curve: {one.no_run}")
    try:
        for mistake in chosen.values():
            mistake.broken((ROOT / mistake.file).read_text(encoding="utf-8"))
        out = args.run and picture(args.out or ROOT / "runs" / "break_it" / f"{name}.png")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if len(chosen) == 1 and one.pitfall:
        print(f"{pitfalls()[name][0]}\n", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            copy(folder)
        except (OSError, subprocess.CalledProcessError):
            parser.error(f"{ROOT} is no clone: git is asked what belongs to it")
        if args.run:
            train_both(one, folder, out, steps)
            return 0
        warm_up()
        return int(not (show(one, folder) if len(chosen) == 1 else table(chosen, folder)))


if __name__ == "__main__":
    sys.exit(main())
