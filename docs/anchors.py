"""Sets the line numbers of links to code, in README.md and docs/: where the name is defined now.

    python docs/anchors.py

Such a link is [name](file.py#L12), or [words](file.py#L12 "name"). A name is a function, a class, a
constant, or Class.method.
"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r'\[`?([^\]`]+)`?\]\(([\w./-]+\.py)#L\d+(?: "([\w.]+)")?\)')


@cache
def lines(file: Path) -> dict[str, int]:
    """{name: line} of what a file defines."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part.lineno for part in node.body
                      if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id: node.lineno for target in node.targets
                      if isinstance(target, ast.Name)}
    return found


def anchored(page: Path) -> str:
    """The page with the numbers of today. KeyError where a name is not defined."""
    def link(match: re.Match) -> str:
        words, file, name = match.groups()
        line = lines((page.parent / file).resolve())[name or words]
        return re.sub(r"#L\d+", f"#L{line}", match[0])

    return LINK.sub(link, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(anchored(page), encoding="utf-8")
