"""The house: eight doors, rooms behind them, imports that point downwards, lines that fit a page.

Code is everything but tests, benchmarks, results and docs.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOORS = {"train", "rollout", "model", "grpo", "personas", "tasks", "rewards", "evaluate"}
NOT_CODE = ("tests", "benchmarks", "results", "docs")


def python_files() -> list[str]:
    """What git tracks, so that a user's own reward beside train.py breaks no rule; else all."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    found = [name for name in listed.stdout.split() if (ROOT / name).is_file()]
    if found:
        return found
    paths = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
    return [str(path.relative_to(ROOT)) for path in paths]


CODE = [name for name in python_files() if Path(name).parts[0] not in NOT_CODE]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in CODE}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name
           for name in CODE}


def imported(module: str) -> set[str]:
    """All that a module imports, at any depth: modules, and for `from a import b` also a.b."""
    found = set()
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


# A package that imports its own rooms (`from weights import gguf`) does not import itself.
OURS = {module: {name for name in imported(module) if name in MODULES} - {module}
        for module in MODULES}


def part(module: str) -> str:
    """The door or the room of a module."""
    return module.split(".")[0]


# --------------------------------------------------------------------------------------------------
# Doors


def test_the_root_holds_the_eight_doors_and_nothing_else_that_the_code_needs():
    """A user's own reward may lie beside train.py: nothing of ours imports it."""
    there = {module for module in MODULES if MODULES[module] == f"{module}.py"}
    assert there >= DOORS
    assert not (there - DOORS) & {part(other) for module in MODULES if part(module) not in there - DOORS
                                  for other in OURS[module]}


# --------------------------------------------------------------------------------------------------
# Imports

ORDERS = [                                              # each may import from those before it
    ("common", "kernels", "model", "weights", "sampling", "rollout", "evaluation", "evaluate",
     "training", "train"),
    ("common", "verifier", "rewards", "training", "train"),
    ("common", "verifier", "generators", "tasks", "training", "train"),
    ("common", "personas", "training", "train"),
    ("common", "grpo", "training", "train"),
]
ONLY = {                                                # of our own parts, these import these alone
    "common": set(),
    "kernels": {"common"},
    "grpo": {"common"},
    "verifier": {"common"},
    "generators": {"common"},
    "rewards": {"common", "verifier"},
    "personas": {"common", "verifier"},
    "tasks": {"common", "verifier", "generators"},
}


def test_no_module_imports_itself_by_way_of_others_at_any_depth():
    def reached(module: str, seen: set[str]) -> set[str]:
        for other in OURS[module] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    circles = {module for module in MODULES if module in reached(module, set())}
    assert not circles


def test_every_door_and_room_has_its_place_in_the_order():
    """Another file at the root is a user's own reward."""
    known = {name for order in ORDERS for name in order}
    assert {part(m) for m in MODULES if MODULES[m] != f"{m}.py"} <= known and known >= DOORS


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order[0]}...{order[-1]}")
def test_imports_point_downwards(order):
    upwards = []
    for module in MODULES:
        for other in OURS[module]:
            parts = part(module), part(other)
            if set(parts) <= set(order) and order.index(parts[0]) < order.index(parts[1]):
                upwards.append(f"{module} imports {other}")
    assert not upwards


@pytest.mark.parametrize("name", ONLY)
def test_these_parts_know_nothing_of_the_others(name):
    inside = [module for module in MODULES if part(module) == name]
    assert inside
    found = {part(other) for module in inside for other in OURS[module]} - {name}
    assert found <= ONLY[name]


def packages(name: str) -> set[str]:
    """What a part imports that is neither ours nor of the standard library."""
    found = set()
    for module in MODULES:
        if part(module) == name:
            found |= {part(other) for other in imported(module)}
    return found - set(map(part, MODULES)) - sys.stdlib_module_names


def test_the_kernels_need_torch_triton_and_flash_attn_alone_and_the_losses_torch_alone():
    assert packages("kernels") <= {"torch", "triton", "flash_attn"}
    assert packages("grpo") <= {"torch"}


@pytest.mark.parametrize("name", ["personas", "tasks", "generators", "rewards", "verifier"])
def test_who_asks_what_and_what_it_is_worth_know_nothing_of_tensors(name):
    assert "torch" not in packages(name)


@pytest.mark.parametrize("name", ["model", "grpo", "kernels", "weights", "sampling", "rollout"])
def test_the_tensor_side_knows_nothing_of_personas_tasks_and_rewards(name):
    for module in MODULES:
        if part(module) == name:
            found = {part(other) for other in OURS[module]}
            assert not found & {"tasks", "rewards", "verifier", "generators"}
            assert "personas" not in found or module == "sampling.command"      # its chat has a template


# --------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize("name", CODE)
def test_a_file_has_at_most_400_lines_of_at_most_100_columns(name):
    lines = TEXTS[name].splitlines()
    assert len(lines) <= 400
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


def test_no_parser_takes_a_part_of_a_flag_for_the_flag():
    """Else a flag that is added can change what an old command means."""
    made = re.compile(r"\bArgumentParser\((?!allow_abbrev=False)")
    assert not [name for name in python_files() if made.search((ROOT / name).read_text(encoding="utf-8"))]


def functions(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(TREES[name])
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("name", CODE)
def test_a_function_has_at_most_60_lines(name):
    assert not [f.name for f in functions(name) if f.end_lineno - f.lineno + 1 > 60]


@pytest.mark.parametrize("name", CODE)
def test_a_function_has_at_most_8_arguments_unless_it_is_a_triton_kernel(name):
    wide = []
    for f in functions(name):
        arguments = f.args.posonlyargs + f.args.args + f.args.kwonlyargs
        is_kernel = any("triton.jit" in ast.unparse(mark) for mark in f.decorator_list)
        if len(arguments) > 8 and not is_kernel:
            wide.append(f.name)
    assert not wide
