"""The pages about planning say what the code does."""

import re
from pathlib import Path

import pytest

from lorafit.planning.decisions import MATRIX

DOCS = Path(__file__).parent.parent.parent / "docs"
PLANNING = (DOCS / "guides" / "plan.md").read_text(encoding="utf-8")


def test_the_matrix_on_the_page_is_the_matrix():
    table = PLANNING.split("| training rows |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == len(MATRIX)
    for (when, goal, fits, method, rank, base), rule in zip(rows, MATRIX):
        assert method.startswith(rule.method)
        assert rank == (str(rule.rank) if rule.rank else "–")
        assert (base == "NF4") == (rule.quantization == "nf4")
        assert goal == (rule.goal or "any")
        assert (fits == "yes") == rule.needs_16bit
        assert when == "any" or rule.when.startswith(f"{when} rows" if when[0].isdigit() else when)


@pytest.mark.parametrize("code", ["P0", "P1", "P2", "P3", "P4", "P6", "P7"])
def test_every_pitfall_has_a_section(code):
    sections = re.findall(r"^## (\w+): ", (DOCS / "findings.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sections.count(code) == 1
    assert sections == sorted(sections)
