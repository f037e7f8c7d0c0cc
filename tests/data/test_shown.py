"""check --show: what the model is taught, token by token."""

from pathlib import Path

import made_data as made
import made_tokenizers
from lorafit.data import Template, TextTokenizer, show_rows
from lorafit.data.shown import token_texts


def test_a_shown_row_says_what_is_supervised_and_where_it_stops(tmp_path: Path) -> None:
    template = Template.for_tokenizer(made_tokenizers.family_tokenizer(tmp_path / "base", "qwen2_5"))
    path = made.write(tmp_path / "rows.jsonl", [{"prompt": "How many?", "completion": "Seven ducks"}])
    (shown,) = show_rows(made.prepared(path, template, holdout=0.0), template, 3)
    assert shown.source == f"{path}:1"
    assert "".join(token.text for token in shown.tokens if token.supervised) == "Seven ducks<|im_end|>"
    assert [token.text for token in shown.tokens if token.is_stop and token.supervised] == ["<|im_end|>"]
    assert "How many?" in "".join(token.text for token in shown.tokens if not token.supervised)


def test_no_more_rows_are_shown_than_asked_for(tmp_path: Path) -> None:
    template = Template.for_tokenizer(made_tokenizers.family_tokenizer(tmp_path / "base", "qwen2_5"))
    prepared = made.prepared(made.write(tmp_path / "rows.jsonl", [made.row(n) for n in range(25)]), template)
    assert len(show_rows(prepared, template, 2)) == 2
    assert len(show_rows(prepared, template, 100)) == 25


def test_characters_of_several_tokens_are_shown_whole(tmp_path: Path) -> None:
    tokenizer = made_tokenizers.family_tokenizer(tmp_path / "base", "qwen2_5")
    text = "Grüße 👋 你好 � x"
    ids = tokenizer.encode(text)
    texts = token_texts(ids, [True] * len(ids), tokenizer)
    assert "".join(texts) == text and len(texts) == len(ids)
    assert "👋" in texts or " 👋" in texts


def test_blanks_that_begin_a_token_are_shown(tmp_path: Path) -> None:
    folder = made_tokenizers.save(tmp_path / "base", made_tokenizers.metaspace(), eos_token="<unk>")
    tokenizer = TextTokenizer.from_folder(folder)
    ids = tokenizer.encode("in the end")
    assert "".join(token_texts(ids, [False] * len(ids), tokenizer)).strip() == "in the end"
