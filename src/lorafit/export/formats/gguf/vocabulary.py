"""vocabulary: a tokenizer.json in llama.cpp's terms.

Source: `_set_vocab_gpt2`, `LlamaHfVocab` and `get_vocab_base_pre` of llama.cpp's convert_hf_to_gguf.py. The converter
knows a tokenizer by a hash of its output; here the structure of tokenizer.json decides, and rows of the run prove it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from lorafit.config import read_json
from lorafit.errors import TemplateError, UsageError
from lorafit.export.formats.gguf.architecture import CONVERTER

MAX_BYTES = 64 << 20
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    LLAMA3: "llama-bpe",
    LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
    LLAMA3.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\p{N}{1,3}", r"\p{N}").replace(
        r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"): "qwen35",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + REST: "tekken",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + REST: "gpt-4o",
}  # fmt: skip
"""llama.cpp's name of a pre-tokenizer, by the expression that tokenizer.json splits with."""


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Add tokens, merges, special ids, stop ids and the chat template of the tokenizer in `folder` to `writer`.

    `size` is the number of rows of the embeddings; ids without a token become unused ones. Raises UsageError for a
    kind of tokenizer that llama.cpp has no name for here.
    """
    tokenizer = require_vocabulary(folder)
    model = tokenizer["model"]
    words, kinds = _tokens(tokenizer, size)
    if model.get("byte_fallback"):
        _write_sentencepiece(writer, tokenizer, words)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
        writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in model["merges"]])
    _write_special_ids(writer, folder, tokenizer)


def require_vocabulary(folder: Path) -> dict[str, Any]:
    """Return the tokenizer.json in `folder`. Raises UsageError for a kind that llama.cpp has no name for here."""
    tokenizer = read_json(folder / "tokenizer.json", TemplateError, max_bytes=MAX_BYTES)
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        what = f"a tokenizer of the kind '{model.get('type')!s:.40}' is not written to GGUF here"
        raise UsageError(what, where="tokenizer.json", fix=CONVERTER)
    if not model.get("byte_fallback"):
        pre_tokenizer(tokenizer)
    return tokenizer


def pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name of the pre-tokenizer that tokenizer.json describes. Raises UsageError without one."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    splits = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and splits[0] in SPLITS:
        name = SPLITS[splits[0]]
        # both split alike; with "llama-bpe" llama.cpp takes whole words from the vocabulary before it merges
        return "dbrx" if name == "llama-bpe" and not tokenizer["model"].get("ignore_merges") else name
    what = f"llama.cpp's name of this pre-tokenizer ({' + '.join(kinds) or 'none'}) is not known here"
    raise UsageError(what, where="tokenizer.json", fix=CONVERTER)


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    return [step for each in pre["pretokenizers"] for step in _steps(each)] if pre["type"] == "Sequence" else [pre]


def _tokens(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Return (texts, kinds) of the ids 0 to `size`."""
    words = [f"[PAD{number}]" for number in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    fallback = bool(tokenizer["model"].get("byte_fallback"))
    for word, number in tokenizer["model"]["vocab"].items():
        is_byte = fallback and len(word) == 6 and word.startswith("<0x")
        words[number], kinds[number] = word, gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for added in tokenizer.get("added_tokens", ()):
        if added["id"] < size:
            words[added["id"]] = added["content"]
            kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    unknown = tokenizer["model"].get("unk_token")
    if fallback and unknown in words:
        kinds[words.index(unknown)] = gguf.TokenType.UNKNOWN
    return words, kinds


def _write_sentencepiece(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], words: list[str]) -> None:
    """Add a vocabulary that came from SentencePiece: llama.cpp merges the pair whose token has the highest score.

    tokenizer.json has merges in order in place of scores, so a token scores by the first merge that makes it.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        ranks.setdefault(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge), rank)
    steps = [*_steps(tokenizer.get("pre_tokenizer")), *_normalizers(tokenizer.get("normalizer"))]
    prefixed = any(s["type"] == "Prepend" or s.get("prepend_scheme") in ("first", "always") for s in steps)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_scores([-float(ranks.get(word, len(ranks))) for word in words])
    writer.add_add_space_prefix(prefixed)


def _normalizers(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]


def _write_special_ids(writer: gguf.GGUFWriter, folder: Path, tokenizer: dict[str, Any]) -> None:
    """Add the ids that begin and end a text, the greedy default, and the chat template."""
    settings = read_json(folder / "generation_config.json", TemplateError)
    config = read_json(folder / "config.json", TemplateError)
    text = config.get("text_config") or {}  # of a model with towers
    begins = settings.get("bos_token_id", config.get("bos_token_id", text.get("bos_token_id")))
    stops = settings["eos_token_id"]
    stops = stops if isinstance(stops, list) else [stops]
    for add, stop in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), stops):
        add(stop)
    if isinstance(begins, int):
        writer.add_bos_token_id(begins)
    writer.add_add_bos_token(_adds_bos(tokenizer, begins))
    writer.add_sampling_temp(0.0)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _adds_bos(tokenizer: dict[str, Any], bos: Any) -> bool:
    """Return True if the tokenizer's post-processor puts the token `bos` before a text."""
    special = {each["content"]: each["id"] for each in tokenizer.get("added_tokens", ())}
    for step in _processors(tokenizer.get("post_processor")):
        first = (step.get("single") or [{}])[0].get("SpecialToken", {}).get("id")
        if step["type"] == "TemplateProcessing" and first is not None and special.get(first) == bos:
            return True
    return False


def _processors(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if processor is None:
        return []
    return list(processor["processors"]) if processor["type"] == "Sequence" else [processor]
