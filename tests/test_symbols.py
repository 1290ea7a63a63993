"""docs/symbols.md against the code: every line it names is there, and says so."""

import re
from pathlib import Path

import pytest

from docs import symbols

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "symbols.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[`([\w.-]+)`, (.*?):(\d+)\]\((.*?)\)", PAGE)


def test_the_page_of_symbols_is_what_its_script_writes():
    assert symbols.page() == PAGE, "docs/symbols.md is out of date; run: python docs/symbols.py"


def test_every_line_of_the_page_holds_the_name_that_links_to_it():
    assert len(LINKS) > 90
    for name, file, number, target in LINKS:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        last = name.split(".")[-1]
        assert re.search(rf"(?<![\w-]){last}(?![\w-])", text), f"{file}:{number} has no {last}"
        assert target == f"../{file}#L{number}"


def test_every_paper_that_the_losses_and_models_cite_has_a_table():
    named = {"grpo.py": 8, "kernels/elementwise.py": 3, "weights/lora.py": 1, "kernels/delta.py": 1}
    left_out = {"2506.09477", "2510.13786", "2406.06484"}   # about estimators; a bound; of DeltaNet, before the gate
    for file, least in named.items():
        cited = set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / file).read_text(encoding="utf-8")))
        assert len(cited) >= least and cited - left_out <= set(re.findall(r"\d{4}\.\d{5}", PAGE)), file


SOURCE = """TABLE = {
    "row": {"key": 1}}
ROWS = [("first", 1),
        ("second", 2)]


def outer(argument, kind="case"):
    if argument:
        variable = 0
    match kind:
        case "case":
            variable, other = 1, call(keyword=2)


class Thing:
    field: int = 3

    def method(self):
        self.attribute = 4
        outer = 5
"""


@pytest.mark.parametrize("way, number", [
    ("TABLE", 1), ("TABLE.row", 2), ("ROWS.second", 4), ("outer", 7), ("outer.argument", 7), ("outer.variable", 9),
    ("outer.case", 11), ("outer.other", 12), ("outer.keyword", 12), ("Thing.field", 16), ("Thing.method", 18),
    ("Thing.attribute", 19), ("Thing.method.outer", 20)])
def test_a_way_leads_to_the_outermost_binding_of_a_name(way, number, tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text(SOURCE)
    monkeypatch.setattr(symbols, "ROOT", tmp_path)
    symbols.tree.cache_clear()
    try:
        assert symbols.line(f"code.py:{way}") == number
        with pytest.raises(ValueError, match="code.py has no gone there"):
            symbols.line(f"code.py:{way}.gone")
    finally:
        symbols.tree.cache_clear()
