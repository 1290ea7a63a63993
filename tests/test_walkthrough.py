"""The walk-through against a fresh run of the step it shows."""

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
DECIMAL = r"[-+]?\d+\.\d+"


@pytest.mark.slow
def test_the_walkthrough_is_what_a_fresh_step_gives(embedded):
    """Words, tokens and counts exactly; decimals within what another processor's order of summation changes."""
    fresh, kept = runpy.run_path(str(DOCS / "walkthrough.py"))["page"](*embedded), (DOCS / "walkthrough.md").read_text()
    for new, old in zip(fresh.splitlines(), kept.splitlines(), strict=False):
        hint = f"docs/walkthrough.md is out of date; run: python docs/walkthrough.py\nnow  {new}\npage {old}"
        assert re.sub(DECIMAL, "#", new) == re.sub(DECIMAL, "#", old), hint
        numbers = [[float(x) for x in re.findall(DECIMAL, line)] for line in (new, old)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.01, abs=2e-4), hint
    assert len(fresh.splitlines()) == len(kept.splitlines()), "run: python docs/walkthrough.py"
