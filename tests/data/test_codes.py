"""Codes: every one explained, and chosen as findings are."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.codes import CODES, is_chosen
from lorafit.findings import Finding, Severity, chosen

DOCS = Path(__file__).parents[2] / "docs" / "findings.md"
PREFIXES = st.lists(st.sampled_from(["D", "D0", "D03", "D031", "P5", "P", "X"]), max_size=3)


@given(st.sampled_from(sorted(CODES)), PREFIXES, PREFIXES)
def test_a_code_is_chosen_as_its_findings_are(code: str, select: list[str], ignore: list[str]) -> None:
    finding = Finding(code, Severity.WARNING, "seen")
    assert is_chosen(code, select, ignore) == bool(chosen([finding], select, ignore))


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_has_a_section_in_the_docs(code: str) -> None:
    assert re.search(rf"^## {code}: \S", DOCS.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_sections_of_the_docs_are_sorted_and_unique() -> None:
    titles = re.findall(r"^## (\w+):", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == sorted(set(titles))
