"""The files of docs/walkthrough.py: the notebook, and the page with the same outputs.

    python docs/walkthrough.py

The notebook is written as plain JSON, and its cells are plain Python. So neither writing nor
executing it needs Jupyter. Left out: pictures as outputs, widgets, `%` and `!` commands.
"""

import base64
import inspect
import io
import json
import os
import re
import textwrap
from contextlib import redirect_stdout

from docs import walkthrough
from docs.walkthrough import ROOT

# --------------------------------------------------------------------------------------------------
# What only the notebook has: the cells that set it up. In a clone of the repository, with its
# packages, the first does nothing.

INSTALL = '''
REPOSITORY = "..."  # the address of this repository, for git clone; not needed inside a clone of it

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

places = [Path.cwd(), *Path.cwd().parents, Path("permix").resolve()]
root = next((p for p in places if (p / "docs" / "walkthrough.py").is_file()), None)
if root is None:
    if REPOSITORY == "...":
        raise SystemExit("put the address of the repository into REPOSITORY, in this cell")
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "permix"], check=True)
    root = Path("permix").resolve()
os.chdir(root)
sys.path.insert(0, str(root))


def is_there(needed):
    """A torch from 2.11 to 2.14 may stay, for instance Colab's own with CUDA."""
    if needed.marker and not needed.marker.evaluate():
        return True
    try:
        found = version(needed.name)
    except PackageNotFoundError:
        return False
    allowed = Requirement("torch>=2.11,<2.15") if needed.name == "torch" else needed
    return allowed.specifier.contains(found, prereleases=True)


missing = [line for line in Path("requirements.txt").read_text().split("\\n")
           if line and not is_there(Requirement(line))]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
'''
DEVICE = '''
import torch

import weights

device = weights.pick_device("auto")  # a CUDA GPU if there is one; "cpu" works everywhere
print(device, torch.cuda.get_device_name() if device.startswith("cuda") else "(no GPU)")
'''
STEP = '''
import json

import grpo
import rewards
from docs.walkthrough import ENTRY, NAME, rounded, step

s = step(*weights.load(weights.EMBEDDED, "float32", device))
'''
SET_UP = [
    "## Set up",
    "In Colab: choose Runtime, Change runtime type, a GPU if you like, then Run all. The first "
    "cell fetches the repository and the packages that are missing. The outputs below are kept from a "
    "run on a CPU. On another device the decimals differ, and sampled words may. We have not run "
    "it on a GPU.",
    INSTALL, DEVICE,
    "The step itself. It fetches the embedded model (92 MB), and takes a minute on two cores. `s` "
    "holds what passed through the functions of train.py.",
    STEP]


def source(cell) -> str:
    """The code of a cell: a text as it is, of a function the body."""
    if isinstance(cell, str):
        return cell.strip("\n")
    return textwrap.dedent("\n".join(inspect.getsource(cell).splitlines()[1:]))


def cells() -> list[tuple[str, str]]:
    """(markdown or code, source) of the notebook's cells. Neighbouring texts are one cell."""
    found = []
    for item in [*opening("notebook"), *SET_UP, *walkthrough.contents()]:
        kind = "code" if callable(item) or item in (INSTALL, DEVICE, STEP) else "markdown"
        if kind == "markdown" and found and found[-1][0] == kind and not item.startswith("## "):
            found[-1] = kind, f"{found[-1][1]}\n\n{with_drawings(item)}"
        else:
            found.append((kind, source(item) if kind == "code" else with_drawings(item)))
    return found


def with_drawings(text: str) -> str:
    """A text whose drawings come with it: Colab sees no files beside a notebook."""
    def inside(found):
        drawing = base64.b64encode((ROOT / "docs" / found[1]).read_bytes()).decode()
        return f"](data:image/svg+xml;base64,{drawing})"
    return re.sub(r"\]\((\w+\.svg)\)", inside, text)


def execute(codes: list[str]) -> list[str]:
    """What each of the notebook's code cells prints, run one after another."""
    names, outputs = {"__name__": "__main__"}, []
    for text in codes:
        with redirect_stdout(io.StringIO()) as printed:
            exec(text, names)
        outputs.append(printed.getvalue())
    return outputs


# --------------------------------------------------------------------------------------------------
# The two files


def opening(kind: str) -> list[str]:
    other = {"page": "The same [as a notebook](walkthrough.ipynb).",
             "notebook": "The same [as a page](walkthrough.md)."}[kind]
    return [
        "# One training step, with real tensors",
        "Written by [walkthrough.py](walkthrough.py) from the run "
        f"`python train.py {walkthrough.FLAGS} --steps 1`, on SmolLM2-135M. A test regenerates it. "
        + other,
        "![mix, prompts, roll out and reward, advantages, pack, log-probs, loss, masters, model]"
        "(step.svg)"]


def page(outputs: list[str]) -> str:
    """docs/walkthrough.md, from what the notebook's code cells print."""
    printed = iter(outputs[3:])                         # INSTALL, DEVICE and STEP are not in it
    texts = [f"```text\n{next(printed)}```" if callable(item) else item
             for item in walkthrough.contents()]
    return "\n\n".join([*opening("page"), *texts]) + "\n"


def notebook(outputs: list[str]) -> str:
    """docs/walkthrough.ipynb (nbformat 4.5), from what its code cells print."""
    printed, made = iter(outputs), []
    for i, (kind, text) in enumerate(cells()):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {},
                "source": text.splitlines(keepends=True)}
        if kind == "code":
            lines = next(printed).splitlines(keepends=True)
            stream = {"name": "stdout", "output_type": "stream", "text": lines}
            cell |= {"execution_count": sum("outputs" in c for c in made) + 1,
                     "outputs": [stream] if lines else []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": made, "metadata": {
        "accelerator": "GPU", "colab": {"provenance": []}, "kernelspec": kernel,
        "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def write() -> None:
    os.chdir(ROOT)
    outputs = execute([text for kind, text in cells() if kind == "code"])
    (ROOT / "docs" / "walkthrough.md").write_text(page(outputs))
    (ROOT / "docs" / "walkthrough.ipynb").write_text(notebook(outputs))
