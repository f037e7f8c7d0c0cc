"""Data, side by side on one file: lorafit's `prepare` against `datasets.load_dataset` + TRL's tokenise-and-pack.

    python bench/data.py make --rows 200000 --out /tmp/data-bench
    python bench/data.py run /tmp/data-bench --arms lorafit,lorafit-no-copies,lorafit-again,trl

Every arm runs in a process of its own and prints one JSON line: rows/s, seconds, peak memory (its own and its
children's, summed over time). The table at the end is in ratios to the TRL arm. The TRL arm wants `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

LEXICON_WORDS = 30_000
MAX_TOKENS = 2048
ARMS = ("lorafit", "lorafit-no-copies", "lorafit-again", "trl")


def make(out: Path, rows: int, seed: int = 0) -> None:
    """`rows.jsonl` with lognormal lengths (about 150 tokens a row), and `base/` with a 32k BPE tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    lexicon = _lexicon(random)
    share = 1.0 / np.arange(1, LEXICON_WORDS + 1)
    share /= share.sum()
    with (out / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            lengths = np.clip(random.lognormal((2.5, 3.1, 3.6), (0.4, 0.9, 0.8), (count, 3)), 2, 600).astype(int)
            words = iter(lexicon[random.choice(LEXICON_WORDS, lengths.sum(), p=share)].tolist())
            for sizes in lengths.tolist():
                texts = [" ".join(next(words) for _ in range(size)) for size in sizes]
                stream.write(json.dumps(dict(zip(("instruction", "input", "response"), texts, strict=True))) + "\n")
    _tokenizer(out / "base", out / "rows.jsonl")


def _lexicon(random: np.random.Generator) -> np.ndarray:
    syllables = [a + b + c for a in "bcdfghlmnprstv" for b in "aeiou" for c in ("", "n", "r", "s", "l")]
    counts = random.integers(1, 4, LEXICON_WORDS)
    return np.array(["".join(random.choice(syllables, count)) for count in counts])


def _tokenizer(folder: Path, text: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=6_000, special_tokens=special, initial_alphabet=alphabet)
    with text.open(encoding="utf-8") as stream:
        tokenizer.train_from_iterator((line for line, _ in zip(stream, range(20_000), strict=False)), trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 6_000}))
