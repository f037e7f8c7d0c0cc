"""Tokenizers made for the tests, saved as a base folder is: small, deterministic, and of each common kind."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lorafit.data.tokenizer.tokenizer import TextTokenizer

TEMPLATES = Path(__file__).parent / "data" / "templates"
# the split of Llama 3 and GPT-4: newlines in a row are one piece
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGED = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic"
    " ne ea ra ce li ch ll be ma si om ur ĊĊ ĠĠ Ġt Ġa Ġthe Ġan Ġand the and ing Ġis Ġit 12 34 ."
).split()
# special tokens of the families whose templates are tested, and their roles
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "extra": ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|end_of_text|>"],
        "adds_bos": True,
    },
    "qwen2_5": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra": ["<|im_start|>"]},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra": ["<|im_start|>"]},
    "mistral": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "extra": [
            "[TOOL_CALLS]",
            *(f"[{slash}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for slash in ("", "/")),
        ],
        "adds_bos": True,
    },
    "gemma": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "extra": ["<start_of_turn>", "<end_of_turn>"],
        "adds_bos": True,
    },
    "phi3": {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "extra": [
            *(AddedToken(name, rstrip=True, special=True) for name in ("<|user|>", "<|system|>", "<|assistant|>")),
            "<|end|>",
        ],
    },
    "smollm3_tagged": {"eos_token": "<|im_end|>", "extra": ["<|im_start|>"]},
}


def byte_level(merged: list[str] | None = None, *, split: str | None = LLAMA3_SPLIT) -> Tokenizer:
    """A byte-level BPE over the 256 bytes and a few fixed merges: nothing is trained, so ids never change."""
    vocab = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in MERGED if merged is None else merged:
        parts = _parts(word, vocab)
        if word not in vocab and parts:
            vocab[word] = len(vocab)
            merges.append(parts)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "gpt2")
    parts_of = [] if split in (None, "gpt2") else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*parts_of, bytes_only])
    made.decoder = decoders.ByteLevel()
    return made


def _parts(word: str, vocab: dict[str, int]) -> tuple[str, str] | None:
    cuts = range(1, len(word))
    return next(((word[:cut], word[cut:]) for cut in cuts if word[:cut] in vocab and word[cut:] in vocab), None)


def metaspace() -> Tokenizer:
    """A sentencepiece-like BPE: `▁` for blanks, one put in front, unknown letters as bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,?!"]
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = []
    for left, right in (("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("i", "n"), ("▁", "a"), ("▁", "▁")):
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def save(folder: Path, made: Tokenizer, *, model_type: str = "llama", **config: Any) -> Path:
    """Write a base folder without weights: tokenizer.json, tokenizer_config.json, config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def framed(made: Tokenizer, bos: str) -> Tokenizer:
    """The same tokenizer with BOS put in front of every text."""
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made


def family_folder(folder: Path, family: str, made: Tokenizer | None = None) -> Path:
    """A base folder of `family` (see FAMILIES), with its chat template."""
    return special_folder(folder, made or byte_level(), template=template_text(family), **FAMILIES[family])


def special_folder(
    folder: Path,
    made: Tokenizer,
    *,
    template: str | None = None,
    extra: list[str | AddedToken] | None = None,
    adds_bos: bool = False,
    **named: str,
) -> Path:
    """A base folder with the `named` and `extra` special tokens, and `template` when given."""
    made.add_special_tokens([*named.values(), *(extra or [])])
    if adds_bos:
        framed(made, named["bos_token"])
    return save(folder, made, **named, **({"chat_template": template} if template else {}))


def template_text(family: str) -> str:
    """The chat template of `family`, written for these tests in the shape of the real one."""
    return (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")


def family_tokenizer(folder: Path, family: str) -> TextTokenizer:
    """The loaded tokenizer of `family`."""
    return TextTokenizer.from_folder(family_folder(folder, family))
