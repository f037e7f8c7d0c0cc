"""Data, side by side on one file: lorafit's `prepare` against `datasets.load_dataset` + TRL's tokenise-and-pack.

    python bench/data.py make --rows 200000 --out /tmp/data-bench
    python bench/data.py run /tmp/data-bench --arms lorafit,lorafit-no-copies,lorafit-again,trl,trl-2proc
    python bench/data.py warm /tmp/data-bench --copies 10

`make` writes prompt/completion rows of about 120 tokens (lognormal lengths, words by Zipf's law) and a base folder
with a BPE tokenizer. `run` starts every arm in a process of its own, one after the other. Seconds are measured there
after the imports; processor seconds too, because on a shared machine they are the fairer figure. Peak memory is the
resident memory of the process and its children, sampled 20 times a second. The TRL arms call TRL's own
`SFTTrainer._prepare_dataset` as `SFTTrainer(...)` does with `packing=True`; they want `pip install trl`. lorafit's
arms read, judge, tokenise, split and plan the packing.

`warm` measures what the seal of the row cache costs a start that finds its rows there: for `check` and `plan`, which
read no row, and for `train`, beside a start that reads nothing for the seal. The entry of a large data set is
laid down from copies of a small one, each with hashes of its own, for making it anew would take ten times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

LEXICON_WORDS = 30_000
VOCABULARY = 16_000
MAX_TOKENS = 2048
SAMPLE_S = 0.05


def make(out: Path, rows: int, seed: int = 0) -> None:
    """`rows.jsonl` and `base/` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    lexicon = _lexicon(random)
    share = 1.0 / np.arange(1, LEXICON_WORDS + 1)
    share /= share.sum()
    with (out / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            lengths = np.clip(random.lognormal((3.5, 3.9), (0.6, 0.8), (count, 2)), 2, 900).astype(int)
            words = iter(lexicon[random.choice(LEXICON_WORDS, lengths.sum(), p=share)].tolist())
            for asked, answered in lengths.tolist():
                row = {"prompt": " ".join(islice(words, asked)), "completion": " ".join(islice(words, answered))}
                stream.write(json.dumps(row) + "\n")
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
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    with text.open(encoding="utf-8") as stream:
        tokenizer.train_from_iterator(islice(stream, 20_000), trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY}))


class Clock:
    """Seconds gone, and seconds of processor time spent by this process and its children, from now on."""

    def __init__(self) -> None:
        self.started, self.times = time.monotonic(), os.times()

    def spent(self) -> dict[str, float]:
        """Both, rounded."""
        cpu = sum(os.times()[:4]) - sum(self.times[:4])
        return {"s": round(time.monotonic() - self.started, 2), "cpu_s": round(cpu, 2)}


def lorafit(folder: Path, cache: Path, **settings: object) -> dict[str, object]:
    """Read, judge, tokenise, split and plan the packing."""
    from lorafit.config import resolve
    from lorafit.data import Template, TextTokenizer, prepare

    config = resolve({}, {"data": str(folder / "rows.jsonl"), "max_length": MAX_TOKENS, **settings}).config
    template = Template.for_tokenizer(TextTokenizer.from_base(str(folder / "base")))
    clock = Clock()
    summary = prepare(config, template, cache_dir=cache).summary
    spent = clock.spent()
    facts = {
        "near_copies_s": round(summary.near_duplicate_seconds, 1),
        "fill_16_per_step": round(summary.packed_fill, 3),
    }
    return {"rows": summary.read, "tokens": summary.tokens, **spent, **facts}


def trl(folder: Path, cache: Path, processes: int | None) -> dict[str, object]:
    """`load_dataset`, then TRL's own preparation with packing."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    args = SFTConfig(
        str(cache / "out"),
        packing=True,
        max_length=MAX_TOKENS,
        dataset_num_proc=processes,
        report_to="none",
        use_cpu=True,
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    clock = Clock()
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(cache))
    packed = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, True, None, "train")
    spent = clock.spent()
    tokens = sum(sum(lengths) for lengths in packed["seq_lengths"])
    fill = round(tokens / (len(packed) * MAX_TOKENS), 3)
    return {"rows": len(rows), "tokens": tokens, **spent, "fill_all_at_once": fill}


ARMS = {
    "lorafit": lambda folder, cache: lorafit(folder, cache),
    "lorafit-no-copies": lambda folder, cache: lorafit(folder, cache, ignore=("D031", "D032")),
    "lorafit-again": lambda folder, cache: lorafit(folder, cache),
    "trl": lambda folder, cache: trl(folder, cache, None),
    "trl-2proc": lambda folder, cache: trl(folder, cache, 2),
}


def warm(folder: Path, copies: int, repeats: int = 5) -> None:
    """Time starts with all rows in the cache, and the check of the seal within them; print the table."""
    from lorafit.config import resolve
    from lorafit.data import Template, TextTokenizer, prepare, sealed_folder
    from lorafit.data.cache import key_of
    from lorafit.data.sealed_folder import seal
    from lorafit.data.sources.discovery import find_files

    large = folder / f"rows-{copies}.jsonl"
    with tempfile.TemporaryDirectory(prefix="data-bench-", dir=folder) as scratch:
        template = Template.for_tokenizer(TextTokenizer.from_base(str(folder / "base")))
        small = resolve({}, {"data": str(folder / "rows.jsonl"), "max_length": MAX_TOKENS}).config
        prepare(small, template, cache_dir=Path(scratch))
        made = next(Path(scratch).iterdir())
        large.write_bytes((folder / "rows.jsonl").read_bytes() * copies)
        config = resolve({}, {"data": str(large), "max_length": MAX_TOKENS}).config
        entry = Path(scratch) / key_of(config, template, find_files(config.data))
        _copied(made, entry, copies)
        seal(entry)
        arms = {"unsealed": (_believed, False), "check": (sealed_folder._measured, False)}
        arms["train"] = (sealed_folder._measured, True)
        spent: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for _ in range(repeats):
            for arm, (measured, reads_rows) in arms.items():
                with patch.object(sealed_folder, "_measured", measured):
                    clock = Clock()
                    summary = prepare(config, template, cache_dir=Path(scratch), reads_rows=reads_rows).summary
                    spent[arm].append(clock.spent())
                    assert summary.cached
        size = sum(path.stat().st_size for path in entry.iterdir())
        print(f"{summary.read:,} rows, an entry of {size / 2**30:.2f} GiB, best of {repeats} in turn")
        for unit in ("s", "cpu_s"):
            best = {arm: min(one[unit] for one in each) for arm, each in spent.items()}
            for arm, value in best.items():
                print(f"{arm}: {value:.2f} {unit}, {value / best['unsealed'] - 1:+.1%}")
    large.unlink()


def _believed(path: Path) -> list[int | str]:
    """What the manifest says of a file, unread."""
    listed: dict[str, list[int | str]] = json.loads((path.parent / "manifest.json").read_text().partition("\n")[0])
    return listed[path.name]


def _copied(made: Path, entry: Path, copies: int) -> None:
    """Lay down `made` so many times over, one after the other, as one entry."""
    entry.mkdir()
    for path in made.iterdir():
        if path.suffix == ".npy":
            column = np.load(path)
            shift = {"leader": len(column), "row": len(column)}.get(path.stem, 0)
            mix = path.stem in ("exact", "question", "answer")
            parts = [column ^ np.uint64(place * 0x9E3779B97F4A7C15 % 2**64) if mix else column + place * shift
                     for place in range(copies)]  # fmt: skip
            np.save(entry / path.name, np.concatenate(parts).astype(column.dtype))
        elif path.suffix == ".bin":
            (entry / path.name).write_bytes(path.read_bytes() * copies)
        elif path.name != "manifest.json":
            (entry / path.name).write_bytes(path.read_bytes())
    facts = json.loads((entry / "facts.json").read_text())
    facts["counts"] = {name: count * copies for name, count in facts["counts"].items()}
    (entry / "facts.json").write_text(json.dumps(facts))


def run(folder: Path, arms: list[str]) -> None:
    """Every arm once, then the table."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="data-bench-") as scratch:
        for arm in arms:
            # `again` finds what `lorafit` has left; the others start with nothing
            cache = Path(scratch) / arm.removesuffix("-again")
            cache.mkdir(exist_ok=True)
            results[arm] = _measured([sys.executable, __file__, "arm", arm, str(folder), str(cache)])
            print(json.dumps({"arm": arm, **results[arm]}), flush=True)
    print(_table(results))


def _measured(command: list[str]) -> dict[str, object]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident_bytes(process.pid))
        time.sleep(SAMPLE_S)
    if process.returncode:
        sys.exit(f"{command[3]} ended with code {process.returncode}")
    assert process.stdout is not None
    result = json.loads(process.stdout.read().splitlines()[-1])
    return {**result, "rows_per_s": round(result["rows"] / max(0.1, result["s"])), "peak_gib": round(peak / 2**30, 2)}


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; pages that they share count for each."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        total += next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS")), 0)
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(_resident_bytes(int(child)) for child in (task / "children").read_text().split())
    except OSError:
        pass  # it has ended meanwhile
    return total


def _table(results: dict[str, dict[str, object]]) -> str:
    base = float(results.get("trl", next(iter(results.values())))["rows_per_s"])  # type: ignore[arg-type]
    lines = ["| arm | rows/s | ratio | s | processor s | peak GiB |", "|---|---|---|---|---|---|"]
    for arm, seen in results.items():
        ratio = f"{float(seen['rows_per_s']) / base:.2f}×"  # type: ignore[arg-type]
        cells = [arm, f"{seen['rows_per_s']:,}", ratio, *(str(seen[name]) for name in ("s", "cpu_s", "peak_gib"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make")
    making.add_argument("--rows", type=int, default=200_000)
    making.add_argument("--out", type=Path, required=True)
    running = verbs.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--arms", default=",".join(ARMS))
    warming = verbs.add_parser("warm")
    warming.add_argument("folder", type=Path)
    warming.add_argument("--copies", type=int, default=10)
    one = verbs.add_parser("arm")
    one.add_argument("name", choices=ARMS)
    one.add_argument("folder", type=Path)
    one.add_argument("cache", type=Path)
    options = parser.parse_args()
    if options.verb == "make":
        make(options.out, options.rows)
    elif options.verb == "run":
        run(options.folder, options.arms.split(","))
    elif options.verb == "warm":
        warm(options.folder, options.copies)
    else:
        print(json.dumps(ARMS[options.name](options.folder, options.cache)))


if __name__ == "__main__":
    main()
