"""TextTokenizer gives the ids of transformers' AutoTokenizer, for every kind of folder."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import made_tokenizers as made
from lorafit.data.tokenizer import conversion as tokenizer_conversion
from lorafit.data.tokenizer.files import TokenizerFiles
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import BackboneError, TemplateError

TEXTS = (
    "",
    " ",
    "\n",
    "Hello, world!",
    "the and  12 345678\n\n\n  indented\ttab",
    "naïve café — Ünïcödé 你好，世界 🙂👩‍👩‍👧 e\u0301",
    "<s> x </s>y<|sep|> z  <|pad|>\n<|keep|>  <|KEEP|>it",
    "def f(x):\n    return x ** 2  # ok\r\n",
    "\x00\x01\x7f",
)


def bare(folder: Path) -> Path:
    return made.special_folder(folder, made.byte_level(), eos_token="</s>", bos_token="<s>")


def with_bos(folder: Path) -> Path:
    return made.special_folder(folder, made.byte_level(), eos_token="</s>", bos_token="<s>", adds_bos=True)


def with_legacy_flags(folder: Path) -> Path:
    return made.save(
        folder,
        _specials(made.byte_level()),
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,
        add_eos_token=True,
        legacy=True,
        clean_up_tokenization_spaces=True,
        add_prefix_space=True,
        split_special_tokens=False,
        errors="replace",
        model_max_length=2048,
    )


def with_strip_flags(folder: Path) -> Path:
    tokens = [
        AddedToken("<|sep|>", lstrip=True, special=True),
        AddedToken("<|pad|>", rstrip=True, special=True),
        AddedToken("<|keep|>", normalized=True, single_word=True),
    ]
    backend = _specials(made.byte_level())
    backend.normalizer = normalizers.Lowercase()
    backend.add_tokens(tokens)
    return made.save(folder, backend, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")


def with_tokens_only_in_config(folder: Path) -> Path:
    token = {"content": "<|sep|>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {"400": {**token, "special": True}}
    return made.save(
        folder, _specials(made.byte_level()), added_tokens_decoder=decoder, eos_token="</s>", bos_token="<s>"
    )


def with_flags_at_odds(folder: Path) -> Path:
    made.save(folder, _specials(made.byte_level()), eos_token="</s>")
    token = {"content": "</s>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": token, "pad_token": "<|pad|>"}))
    return folder


def with_special_tokens_split(folder: Path) -> Path:
    return made.save(folder, _specials(made.byte_level()), eos_token="</s>", split_special_tokens=True)


def with_added_tokens_file(folder: Path) -> Path:
    made.save(folder, _specials(made.byte_level()), eos_token="</s>", bos_token="<s>")
    (folder / "added_tokens.json").write_text(json.dumps({"<|sep|>": 400}))
    return folder


def with_padding_and_truncation(folder: Path) -> Path:
    backend = _specials(made.byte_level())
    backend.enable_padding(length=20, pad_token="</s>", pad_id=backend.token_to_id("</s>"))
    backend.enable_truncation(4)
    return made.save(folder, backend, eos_token="</s>")


def sentencepiece_like(folder: Path) -> Path:
    return made.special_folder(folder, made.metaspace(), eos_token="</s>", bos_token="<s>", adds_bos=True)


def rebuilt_llama(folder: Path) -> Path:
    backend = _specials(made.metaspace())
    return made.save(folder, backend, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")


def rebuilt_qwen(folder: Path) -> Path:
    backend = _specials(made.byte_level())
    return made.save(folder, backend, model_type="qwen2", tokenizer_class="Qwen2Tokenizer", eos_token="</s>")


def word_piece(folder: Path) -> Path:
    vocab = {
        word: place for place, word in enumerate(["[UNK]", "hello", "world", ",", "!", "x", "y", "##s", "it", "'"])
    }
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return made.save(folder, _specials(backend), eos_token="</s>", clean_up_tokenization_spaces=True)


def _specials(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


PLAIN = (
    bare,
    with_bos,
    with_strip_flags,
    with_padding_and_truncation,
    sentencepiece_like,
    word_piece,
)
REBUILT = (
    with_legacy_flags,
    with_tokens_only_in_config,
    with_special_tokens_split,
    rebuilt_llama,
    rebuilt_qwen,
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(tokenizer_conversion, "_run", refuse)


def assert_like_transformers(folder: Path) -> None:
    ours, theirs = TextTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert [encoding.ids for encoding in ours.encodings(TEXTS)] == ours.encode_batch(TEXTS)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids >= set(theirs.all_special_ids)
    for kind in ("bos", "eos", "pad"):
        assert getattr(ours, f"{kind}_token") == getattr(theirs, f"{kind}_token")
        assert ours.id_of(getattr(ours, f"{kind}_token")) == getattr(theirs, f"{kind}_token_id")


@pytest.mark.parametrize("make", PLAIN)
def test_a_plain_folder_is_read_as_transformers_reads_it_without_asking_it(
    make, tmp_path: Path, no_children: None
) -> None:
    assert_like_transformers(make(tmp_path))


@pytest.mark.parametrize("make", REBUILT)
def test_a_folder_that_transformers_rebuilds_is_read_as_transformers_reads_it(make, tmp_path: Path) -> None:
    assert_like_transformers(make(tmp_path))


def test_the_answer_of_transformers_is_kept_and_good_for_every_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TextTokenizer.from_folder(rebuilt_llama(tmp_path / "base"))
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("transformers was asked again"))
    again = TextTokenizer.from_folder(tmp_path / "copy")
    assert again.content_hash == first.content_hash
    assert (first.chat_template, again.chat_template) == (None, "{{ messages }}")


def test_a_base_with_vocabulary_and_merges_only_is_converted(tmp_path: Path) -> None:
    model = json.loads(made.byte_level().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": len(model["vocab"])}))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert_like_transformers(tmp_path)
    files = [path.name for path in TextTokenizer.from_folder(tmp_path).files]
    assert files == ["merges.txt", "tokenizer_config.json", "vocab.json"]


def test_a_session_without_a_home_converts_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    answer = tokenizer_conversion.converted(TokenizerFiles.read(rebuilt_llama(tmp_path / "base")))
    monkeypatch.setattr(
        tokenizer_conversion, "_convert", lambda folder, out: shutil.copytree(answer, out, dirs_exist_ok=True)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert TextTokenizer.from_folder(tmp_path / "base").eos_token == "</s>"
    assert list(tmp_path.glob("lorafit-tokenizers-*/*/facts.json"))


@pytest.mark.parametrize("make", [with_flags_at_odds, with_added_tokens_file])
def test_tokens_that_other_files_declare_are_left_to_transformers(make, tmp_path: Path) -> None:
    backend = Tokenizer.from_file(str(make(tmp_path) / "tokenizer.json"))
    assert not TokenizerFiles.read(tmp_path).is_whole_in(backend)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"1": {"odd": 1}}},
        {"additional_special_tokens": 5},
        {"eos_token": {"lstrip": True}},
        {"pad_token": "<|none|>"},
    ],
)
def test_settings_beyond_plain_ones_are_left_to_transformers(settings: dict, tmp_path: Path) -> None:
    files = TokenizerFiles.read(made.save(tmp_path, _specials(made.byte_level()), **settings))
    assert not files.is_whole_in(_specials(made.byte_level()))


def breaks(folder: Path, name: str, content: bytes) -> Path:
    bare(folder)
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: the tokenizer cannot be used"),
        ("tokenizer.json", b'{"model": 3}', "tokenizer.json: the tokenizer cannot be used"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: the tokenizer cannot be used"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: the text is not a JSON object"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: the text is not valid JSON"),
        ("special_tokens_map.json", b"\xff", "special_tokens_map.json: the text is not UTF-8"),
    ],
)
def test_a_broken_file_is_one_sentence_that_names_it(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError) as caught:
        TextTokenizer.from_folder(breaks(tmp_path, name, content))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match="no tokenizer there; choose a base that holds"):
        TextTokenizer.from_base(str(tmp_path))


def test_a_tokenizer_that_transformers_cannot_load_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(BackboneError, match="transformers cannot load the tokenizer") as caught:
        TextTokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"config": "a"}, "a"),
        ({"config": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "b"}]}, "b"),
        ({"config": {"default": "c", "rag": "r"}}, "c"),
        ({"config": "a", "jinja": "d"}, "d"),
        ({"json": "e"}, "e"),
        ({}, None),
        ({"config": ""}, None),
    ],
)
def test_the_chat_template_is_found_where_transformers_finds_it(where: dict, expected: str, tmp_path: Path) -> None:
    config = {"chat_template": where["config"]} if "config" in where else {}
    made.save(tmp_path, _specials(made.byte_level()), eos_token="</s>", **config)
    if "jinja" in where:
        (tmp_path / "chat_template.jinja").write_text(where["jinja"])
    if "json" in where:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": where["json"]}))
    assert TextTokenizer.from_folder(tmp_path).chat_template == expected


def test_a_chat_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    made.save(tmp_path, _specials(made.byte_level()), eos_token="</s>", chat_template=5)
    with pytest.raises(TemplateError, match="chat_template is no text"):
        TextTokenizer.from_folder(tmp_path)


def test_templates_without_a_default_are_refused_and_named(tmp_path: Path) -> None:
    templates = [{"name": "rag", "template": "r"}]
    made.save(tmp_path, _specials(made.byte_level()), eos_token="</s>", chat_template=templates)
    with pytest.raises(TemplateError, match=r"names chat templates \(rag\) but no default"):
        TextTokenizer.from_folder(tmp_path)


def test_the_content_hash_changes_with_the_tokenisation_and_only_then(tmp_path: Path) -> None:
    def hash_of(name: str, **changes: object) -> str:
        backend = made.byte_level(changes.pop("merged", None))
        return TextTokenizer.from_folder(
            made.special_folder(tmp_path / name, backend, eos_token="</s>", **changes)
        ).content_hash

    first = hash_of("first")
    assert hash_of("same", template="{{ messages }}") == first
    assert len({first, hash_of("token", extra=["<x>"]), hash_of("merges", merged=["th"])}) == 3


def test_adds_bos_says_what_the_post_processor_does(tmp_path: Path) -> None:
    assert TextTokenizer.from_folder(with_bos(tmp_path / "with")).adds_bos
    assert not TextTokenizer.from_folder(bare(tmp_path / "without")).adds_bos


def test_a_pickled_tokenizer_works_as_before(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.from_folder(with_bos(tmp_path))
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("the end", add_special_tokens=True) == tokenizer.encode("the end", add_special_tokens=True)
    assert again.content_hash == tokenizer.content_hash


BYTE_LEVEL = TextTokenizer(_specials(made.byte_level()), {"eos_token": "</s>"})


@given(st.text())
def test_offsets_cover_each_token_and_a_byte_level_round_trip_loses_nothing(text: str) -> None:
    tokenizer = BYTE_LEVEL
    encoding = tokenizer.encodings([text])[0]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert all(0 <= start < end <= len(text) for start, end in encoding.offsets)


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    folder = with_bos(tmp_path)
    code = (
        "import sys; from lorafit.data import Template, TextTokenizer;"
        f"Template.for_tokenizer(TextTokenizer.from_base({str(folder)!r}));"
        "print(sorted({'torch', 'transformers', 'jinja2'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert run.stdout.strip() == "[]"
