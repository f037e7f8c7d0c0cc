"""Special tokens that no gradient ever touched are found in the safetensors, and trained ones are left alone."""

import json
from pathlib import Path

import numpy as np
import pytest

import made_tokenizers as made
from lorafit.data.checks.untrained_tokens import untrained_special_tokens
from lorafit.data.template.template import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import BackboneError

HIDDEN = 32


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return made.family_tokenizer(tmp_path, "llama3")


def trained(tokenizer: TextTokenizer) -> np.ndarray:
    """A table (tokens, hidden) in which every row is its own, around a common centre."""
    random = np.random.default_rng(0)
    return (random.normal(size=(tokenizer.vocab_size, HIDDEN)) + random.normal(size=HIDDEN)).astype(np.float32)


def save(folder: Path, table: np.ndarray, dtype: str, name: str = "model.embed_tokens.weight") -> None:
    """Safetensors by hand, since numpy has no bfloat16; another tensor lies in front."""
    if dtype == "BF16":
        data = (table.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = table.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
    entries = {
        "__metadata__": {"format": "pt"},
        "model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        name: {"dtype": dtype, "shape": list(table.shape), "data_offsets": [8, 8 + len(data)]},
    }
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8) + data)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_trained_rows_are_left_alone(dtype: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    save(tmp_path, trained(tokenizer), dtype)
    assert untrained_special_tokens(tokenizer, tmp_path) == ()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", ["zero", "tiny", "mean", "nan", "twins"])
def test_rows_that_were_never_trained_are_named(
    kind: str, dtype: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    table, names = trained(tokenizer), ["<|start_header_id|>", "<|end_header_id|>"]
    rows = {
        "zero": 0,
        "tiny": 1e-4 * table[:2],
        "mean": table.mean(axis=0) + 0.01 * table[:2],
        "nan": np.nan,
        "twins": table[0] + 1e-3 * table[:2],
    }
    table[[tokenizer.id_of(name) for name in names]] = rows[kind]
    save(tmp_path, table, dtype)
    assert untrained_special_tokens(tokenizer, tmp_path) == tuple(names)


def test_tokens_beyond_the_table_are_named(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    save(tmp_path, trained(tokenizer)[:-1], "F32", "transformer.wte.weight")
    assert untrained_special_tokens(tokenizer, tmp_path) == (tokenizer.token_of(tokenizer.vocab_size - 1),)


def test_with_a_template_only_tokens_that_it_uses_are_named(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    table = trained(tokenizer)
    table[[tokenizer.id_of(name) for name in ("<|eom_id|>", "<|eot_id|>")]] = 0
    save(tmp_path, table, "BF16")
    assert untrained_special_tokens(tokenizer, tmp_path, Template.for_tokenizer(tokenizer)) == ("<|eot_id|>",)


def test_a_folder_without_weights_says_nothing(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    assert untrained_special_tokens(tokenizer, tmp_path) == ()


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x08\0\0\0\0\0\0\0{'a': 1}"])
def test_a_damaged_file_is_one_sentence(content: bytes, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BackboneError, match=r"model\.safetensors: the file is truncated"):
        untrained_special_tokens(tokenizer, tmp_path)


def test_a_cut_off_file_is_one_sentence(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    save(tmp_path, trained(tokenizer), "F32")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(BackboneError, match="the file is truncated"):
        untrained_special_tokens(tokenizer, tmp_path)
