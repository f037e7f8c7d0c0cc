"""docs/data.md: its example runs as it stands."""

import re
from pathlib import Path

import pytest

import made_data as made
import made_tokenizers

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made_tokenizers.family_folder(tmp_path / "base", "qwen2_5")
    made.write(tmp_path / "rows.jsonl", [made.row(number) for number in range(30)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    scope: dict[str, object] = {}
    exec(example[1].replace("path/or/hub-id", str(base)), scope)
    assert (tmp_path / "runs" / "first" / "split.tsv").is_file()
