"""A break-it lab: puts one realistic mistake at a time into a copy of the code and runs the nearest tests.

    python docs/mutants.py               all of them, in a table: by which test each was killed
    python docs/mutants.py --only 7      one, with what pytest says of it

docs/mutants.txt holds them. A mistake that no test notices is printed as ALIVE, and the exit code
is 1. Each begins with `@ file | what is wrong`; then come the line that is there (`- `), the one that
takes its place (`+ `), and the tests to run (`! `). Each process starts as a fork of this one, where
torch is imported already.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300                                             # seconds until a test is taken to hang


@dataclass
class Mutant:
    file: str
    what: str
    old: str
    new: str
    tests: str


def read() -> list[Mutant]:
    """The mutants of docs/mutants.txt, each in a paragraph of its own."""
    found, text = [], Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.splitlines()
        file, what = lines[0].removeprefix("@ ").split(" | ")
        old, new, tests = ("\n".join(line[2:] for line in lines[1:] if line[0] == mark) for mark in "-+!")
        found.append(Mutant(file, what, old, new, tests))
    return found


def copy(folder: Path) -> None:
    """What git tracks, as it is here, without the results."""
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if not name.startswith("results/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def warm_up() -> None:
    """Imports once what every fork would import."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import matplotlib.pyplot  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    import torch.distributed.tensor  # noqa: F401
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401


def run(tests: str, folder: Path, log: Path, limit: int = LIMIT) -> int | None:
    """pytest's exit code, None where the tests hang. What it says goes to `log`."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(folder)
        sys.path[0] = str(folder)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        import pytest

        quick = "-x -q --assert=plain -p no:cacheprovider -p no:hypothesispytest".split()
        code = pytest.main([*shlex.split(tests), *quick])
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
    """Writes a module, and removes its bytecode: two mutants of a second may have equal sizes."""
    place.write_text(text, encoding="utf-8")
    for compiled in (place.parent / "__pycache__").glob(f"{place.stem}.*"):
        compiled.unlink()


def verdict(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """("killed", by which test), ("ALIVE", "") or ("broken", why), and what pytest said in folder/log."""
    place, log = folder / mutant.file, folder / "log"
    text = place.read_text(encoding="utf-8")
    log.write_text("")
    write(place, text.replace(mutant.old, mutant.new))
    code = run(mutant.tests, folder, log)
    write(place, text)
    failed = re.search(r"^(?:FAILED|ERROR) .*?::(\S+)", log.read_text(encoding="utf-8"), re.M)
    if code is None or code < 0:
        return "killed", "it hangs" if code is None else "it crashes"
    if code == 1 and failed:
        return "killed", failed[1]
    return ("ALIVE", "") if code == 0 else ("broken", f"pytest ended with {code}")


def main() -> int:
    mutants = read()
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=int, metavar="N", help=f"one of 1 to {len(mutants)}")
    only = parser.parse_args().only
    if only is not None and not 1 <= only <= len(mutants):
        parser.error(f"--only must be one of 1 to {len(mutants)}, not {only}")
    warm_up()
    killed, numbers = 0, [only] if only else range(1, len(mutants) + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        for number in numbers:
            mutant = mutants[number - 1]
            word, why = verdict(mutant, folder)
            killed += word == "killed"
            print(f"{number:3} {word:6} {mutant.file}: {mutant.what}   {why}", flush=True)
        if only:
            print((folder / "log").read_text(encoding="utf-8"))
    print(f"{killed} of {len(numbers)} killed")
    return int(killed < len(numbers))


if __name__ == "__main__":
    sys.exit(main())
