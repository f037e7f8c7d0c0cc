"""Trial worker: load and try a tokenizer.json with tokenizers and the standard library only, bounded by the kernel.

A tokenizer.json is a program of whoever published the base: its patterns can backtrack for hours, its normaliser can
make terabytes of a word. So it is loaded and tried here first, under RLIMIT_AS and a CPU timer whose signal kills this
process. Run by path, so it imports nothing of lorafit. Arguments: the file, bytes of memory, seconds to load it,
seconds to try it. It prints one line of JSON: what is wrong, or an empty text.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

FRAME_TOKENS = 64
SPARE_IDS = 1 << 20
LARGE_NUMBER = re.compile(rb":\s*\d{8}")
GROWTH = 64
LONG, SHORT = 1 << 14, 1 << 10
SAMPLE = "The quick brown fox, 1234567 times. Grüße aus Zürich — 你好，世界 🙂\r\n\tdef f(x):  return x**2  # ok \n"
PATTERN_SIGNS = set("\\[](){}|*+?.^$-:=!<>\"',\\u ")


def fault(path: str, seconds: float) -> str:
    """Return the fault of the tokenizer at `path`; empty if it has none."""
    made = Tokenizer.from_file(path)
    made.no_truncation()
    made.no_padding()
    if LARGE_NUMBER.search(Path(path).read_bytes()):  # the vocabulary as a dict would cost every base half a second
        ids = made.get_vocab(with_added_tokens=True).values()
        if max(ids, default=0) > 4 * len(ids) + SPARE_IDS:
            return f"it has an id of {max(ids)} among {len(ids)} tokens"
    signal.setitimer(signal.ITIMER_PROF, seconds)
    framed, bare = (len(made.encode("a", add_special_tokens=added).ids) for added in (True, False))
    if framed - bare > FRAME_TOKENS:
        return f"it puts {framed - bare} tokens around every text"
    for probe in probes(made):
        tokens = len(made.encode(probe, add_special_tokens=False).ids)
        if tokens > GROWTH * len(probe) + FRAME_TOKENS:
            return f"it makes {tokens} tokens of {len(probe)} characters"
    return ""


def probes(made: Tokenizer) -> Iterator[str]:
    """Return texts that reveal endless loops: every letter repeated, and the letters of the rules at length."""
    yield SAMPLE
    rules = [part.__getstate__().decode() for part in (made.normalizer, made.pre_tokenizer) if part is not None]
    named = set(list(dict.fromkeys("".join(rules)))[:512])
    for letter in sorted((named - PATTERN_SIGNS) | set(map(chr, range(32, 127))) | {"\n", "\t"}):
        yield letter * SHORT
    for letter in sorted(letters_of_patterns(rules)):
        yield letter * LONG


def letters_of_patterns(rules: list[str]) -> set[str]:
    """Return the letters that the patterns in `rules` (JSON) name, and blanks, digits and line ends."""
    found = {" ", "\n", "a", "0", "."}
    waiting = [json.loads(rule) for rule in rules]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            pattern = part.get("pattern")
            texts = pattern.values() if isinstance(pattern, dict) else ()
            found |= {letter for text in texts if isinstance(text, str) for letter in text[:256]} - PATTERN_SIGNS
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return found


def main() -> None:
    """Print the verdict on the file that the arguments name."""
    path, max_bytes, load_s, try_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    if sys.platform == "linux":  # macOS knows the limit by name only
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, load_s)
    try:
        reason = fault(path, try_s)
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception, and this process ends either way
        reason = " ".join(str(error)[:1000].split()) or type(error).__name__
    sys.stdout.write(json.dumps(reason[:200]))


if __name__ == "__main__":
    main()
