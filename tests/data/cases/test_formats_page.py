"""The page "Find your file": every row on it is read, and what it says is taught is what is taught."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

import made_data as made
from lorafit.data import Template

PAGE = (Path(__file__).parents[3] / "docs" / "guides" / "data-formats.md").read_text(encoding="utf-8")
BOX = re.compile(r"```(json|csv|sh|text)\n(.*?)\n```", re.DOTALL)
"""One row, or a whole table; the command; what is taught."""
SECTIONS = {
    title: dict(BOX.findall(body))
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    if BOX.search(body)
}


def marked(template: Template, ids: list[int], mask: list[bool]) -> str:
    """The text of a row with what is supervised in ⟦ ⟧."""
    text, part = "", list[int]()
    for token, kept, following in zip(ids, mask, [*mask[1:], None], strict=True):
        part.append(token)
        if following != kept:
            words = template.tokenizer.decode(part, skip_special_tokens=False)
            text, part = text + (f"⟦{words}⟧" if kept else words), []
    return text.strip()


@pytest.mark.parametrize("title", SECTIONS)
def test_a_row_of_the_page_is_taught_as_the_page_says(
    tmp_path: Path, templates: dict[str, Template], title: str
) -> None:
    boxes, chatml = SECTIONS[title], templates["chatml"]
    name = "file.csv" if "csv" in boxes else "file.jsonl"
    path = made.write(tmp_path / name, (boxes.get("json") or boxes["csv"]).encode() + b"\n")
    words = shlex.split(boxes.get("sh", ""))
    pairs = dict(word.split("=", 1) for flag, word in pairwise(words) if flag == "--map")
    result = made.prepared(path, chatml, holdout=0.0, field_map=pairs)
    assert (result.summary.rejected, len(result.train)) == ((0, 1) if "text" in boxes else (1, 0))
    if "text" in boxes:
        said = marked(chatml, result.train.ids(0).tolist(), result.train.mask(0).tolist())
        first, shown = boxes["text"][:1], boxes["text"].strip()
        # the very first token of a document has nothing before it that could predict it
        assert said.replace("⟧", "").replace("⟦", "") == shown.replace("⟧", "").replace("⟦", "")
        assert said == shown or first == "⟦"


def test_every_row_of_the_index_leads_to_a_section_and_every_section_stands_in_it() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    linked = re.findall(r"\(#([\w-]+)\)", PAGE.partition("## ")[0])
    assert sorted(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings) == sorted(linked)
