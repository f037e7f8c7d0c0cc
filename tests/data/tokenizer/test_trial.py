"""A hostile tokenizer.json costs bounded time and memory in a child, and is one sentence; others cost it once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

import made_tokenizers as made
from lorafit.data.tokenizer import trial
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.data.tokenizer.trial import require_bounded
from lorafit.errors import BackboneError, LorafitError


def split_by(pattern: str) -> Tokenizer:
    return made.byte_level(split=pattern)


def of_huge_id() -> str:
    fields = json.loads(made.byte_level().to_str())
    fields["model"]["vocab"]["the"] = 2**31 - 1
    return json.dumps(fields)


def of_growing_normalizer(letter: str) -> Tokenizer:
    tokenizer = made.byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(letter, letter * 1000) for _ in range(4)])
    return tokenizer


def of_many_pieces() -> str:
    tokenizer = made.framed(made.byte_level(), "a")
    fields = json.loads(tokenizer.to_str())
    piece = fields["post_processor"]["single"][0]
    fields["post_processor"]["single"] = [piece] * 200_000 + fields["post_processor"]["single"]
    return json.dumps(fields)


HOSTILE: dict[str, Any] = {
    "backtracking": lambda: split_by(r"(x+x+)+y"),
    "backtracking on a rare letter": lambda: split_by(r"(þ+þ+)+y"),
    "cubic": lambda: split_by(r"x+x+y"),
    "an id of 2^31 - 1": of_huge_id,
    "a normalizer that grows": lambda: of_growing_normalizer("a"),
    "a normalizer that grows on a rare letter": lambda: of_growing_normalizer("þ"),
    "a post-processor of 200,000 pieces": of_many_pieces,
    "no JSON": lambda: "{",
    "no tokenizer": lambda: '{"model": {}}',
}


def write(folder: Path, content: Tokenizer | str) -> Path:
    folder = made.save(folder, made.byte_level())
    text = content if isinstance(content, str) else content.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(trial, "LOAD_S", 8.0)
    monkeypatch.setattr(trial, "TRY_S", 2.0)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_tokenizer_is_one_sentence_in_bounded_time(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "base", HOSTILE[kind]())
    started = time.monotonic()
    with pytest.raises(BackboneError, match="the tokenizer cannot be used") as seen:
        TextTokenizer.from_folder(folder)
    assert "\n" not in seen.value.sentence
    assert time.monotonic() - started < 60
    with pytest.raises(BackboneError):  # it is not remembered as sound
        TextTokenizer.from_folder(folder)


def test_a_sound_tokenizer_is_tried_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Path] = []
    original = trial._fault
    monkeypatch.setattr(trial, "_fault", lambda path, limit: tries.append(path) or original(path, limit))
    folder = write(tmp_path / "base", made.byte_level())
    for _ in range(3):
        TextTokenizer.from_folder(folder)
    assert len(tries) == 1
    write(tmp_path / "base", made.metaspace())
    TextTokenizer.from_folder(folder)
    assert len(tries) == 2


def test_a_damaged_mark_is_no_mark(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", split_by(r"(x+x+)+y"))
    (tmp_path / "marks").mkdir()
    with pytest.raises(BackboneError):
        require_bounded(folder / "tokenizer.json", tmp_path / "marks")
    assert list((tmp_path / "marks").iterdir()) == []
    sound = write(tmp_path / "sound", made.byte_level())
    require_bounded(sound / "tokenizer.json", tmp_path / "marks")
    (mark,) = (tmp_path / "marks").iterdir()
    mark.write_text("")
    require_bounded(sound / "tokenizer.json", tmp_path / "marks")
    assert mark.read_text() == mark.name


def test_a_cache_that_cannot_be_written_costs_a_trial_and_no_more(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", made.byte_level())
    require_bounded(folder / "tokenizer.json", tmp_path / "nowhere")


@pytest.mark.parametrize("verb", ["encode", "encode_batch", "encodings"])
def test_a_panic_on_a_row_is_one_sentence(verb: str) -> None:
    tokenizer = TextTokenizer(split_by(r"(q+q+)+y"), {})
    text = "q" * 40
    with pytest.raises(LorafitError, match="breaks on a text of the data") as seen:
        getattr(tokenizer, verb)(text if verb == "encode" else [text])
    assert "\n" not in seen.value.sentence


def test_an_ordinary_tokenizer_is_tried_within_a_second_and_a_half(tmp_path: Path) -> None:
    """Processor time of the child would be fairer; the best of three is nearly as good."""
    folder = write(tmp_path / "base", made.byte_level())
    seconds = []
    for number in range(3):
        started = time.monotonic()
        require_bounded(folder / "tokenizer.json", tmp_path / f"none-{number}")
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1.5


def test_the_trial_gets_no_secret_of_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = trial.subprocess.run
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(
        trial.subprocess, "run", lambda *given, **named: seen.update(named) or original(*given, **named)
    )
    require_bounded(write(tmp_path / "base", made.byte_level()) / "tokenizer.json", tmp_path)
    assert "HF_TOKEN" not in seen["env"] and "HOME" not in seen["env"]
