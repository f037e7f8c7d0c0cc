"""Converted tokenizers under the user's cache: a folder that cannot be read there is made again."""

import filecmp
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tokenizers import AddedToken

import made_tokenizers as made
from lorafit.data.sealed_folder import MANIFEST, seal
from lorafit.data.tokenizer import conversion as tokenizer_conversion
from lorafit.data.tokenizer.files import TokenizerFiles
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import BackboneError

FILES = ["facts.json", "tokenizer.json"]


def a_base(folder: Path) -> Path:
    """A folder whose tokenizer class has transformers rebuild the pipeline."""
    backend = made.metaspace()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return made.save(folder, backend, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """A base whose tokenizer is remembered in a cache of its own. No child is started: the answer is made here."""

    def convert(folder: Path, out: Path) -> None:
        shutil.copy(folder / "tokenizer.json", out)
        facts = {"named": {"eos_token": "</s>"}, "cleans_up": False, "splits_special": False}
        (out / "facts.json").write_text(json.dumps(facts))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer_conversion, "_convert", convert)
    return a_base(tmp_path / "base")


def _without(name):
    return lambda home: (home / name).unlink()


def _as_folder(home: Path) -> None:
    (home / "facts.json").unlink()
    (home / "facts.json").mkdir()


def _written(text):
    return lambda home: (home / "facts.json").write_text(text)


DAMAGES = {
    "no facts": _without("facts.json"),
    "no backend": _without("tokenizer.json"),
    "a folder for a file": _as_folder,
    "half a file": _written('{"named": '),
    "other facts": _written('{"named": {}}'),
    "no object": _written("[]"),
}


@pytest.mark.parametrize("is_sealed", [False, True], ids=["found", "sealed"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_remembered_folder_that_cannot_be_read_is_made_again(damage, is_sealed, base, tmp_path):
    """Sealed means that the manifest fits: the folder was incomplete when it was put there."""
    files = TokenizerFiles.read(base)
    home = tokenizer_conversion.converted(files)
    whole = shutil.copytree(home, tmp_path / "whole")
    damage(home)
    if is_sealed and not (home / "facts.json").is_dir():
        (home / MANIFEST).unlink()
        seal(home)
    assert TextTokenizer.from_folder(base).eos_token == "</s>"
    assert filecmp.cmpfiles(home, whole, FILES, shallow=False)[0] == FILES


def test_a_child_that_writes_nothing_is_refused_and_nothing_is_remembered(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(tokenizer_conversion, "_run", lambda *unused: done)
    with pytest.raises(BackboneError, match="wrote nothing that can be read"):
        TextTokenizer.from_folder(a_base(tmp_path / "base"))
    assert not list((tmp_path / "cache/lorafit/tokenizers").iterdir())
