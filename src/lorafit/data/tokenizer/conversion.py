"""Conversion: transformers' tokenizer of a base's files, built once in a child process and kept on disk.

Some tokenizer classes of transformers rebuild the whole pipeline from vocabulary and merges, and old bases ship
a sentencepiece model only. Imitating that here would drift with every release; a child keeps torch out of this
process, and the answer is kept under the user's cache, keyed by the files' digest and transformers' version.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lorafit.config import one_line
from lorafit.data.bounded_child import child_environment
from lorafit.data.sealed_folder import is_whole, kept
from lorafit.data.tokenizer.files import TokenizerFiles
from lorafit.errors import BackboneError

BACKEND_FILE, FACTS_FILE = "tokenizer.json", "facts.json"
TIMEOUT_S = 300
MAX_BYTES, MAX_CPU_S = 16 << 30, 120
"""What a conversion may take: the files are somebody else's. Torch alone reserves gigabytes of addresses."""
CHILD = """
import importlib.util, json, pathlib, resource, sys
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[4]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[5]),) * 2)
if sys.argv[3] == "without-torch":  # a tokenizer needs none, and looking for it is half of the time
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find_spec(name, package)
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False, local_files_only=True)
backend = getattr(tokenizer, "backend_tokenizer", None)
if backend is None:
    sys.exit(f"ValueError: {type(tokenizer).__name__} has no fast form")
out = pathlib.Path(sys.argv[2])
backend.no_truncation()
backend.no_padding()
backend.save(str(out / "tokenizer.json"))
cleans = bool(tokenizer.clean_up_tokenization_spaces) and type(backend.model).__name__ != "BPE"
named, splits = dict(tokenizer.special_tokens_map), tokenizer.split_special_tokens
facts = {"named": named, "cleans_up": cleans, "splits_special": splits}
(out / "facts.json").write_text(json.dumps(facts))
"""


def converted(files: TokenizerFiles) -> Path:
    """Return a folder with `tokenizer.json` and `facts.json` (named special tokens, decoding flags) for `files`.

    A remembered folder that lacks one of them, or cannot be read, counts as absent and is made again.

    Raises BackboneError when transformers cannot load the tokenizer.
    """
    version = importlib.metadata.version("transformers")
    home = cache_home() / f"{files.digest()}-{version}"

    def convert(fresh: Path) -> None:
        fresh.mkdir()
        _convert(files.folder, fresh)

    try:
        kept(home, convert, _is_usable)
    except OSError as error:
        raise BackboneError(
            f"the converted tokenizer cannot be kept ({one_line(error)})",
            where=str(home.parent),
            fix="make room, or set XDG_CACHE_HOME",
        ) from error
    return home


def _convert(folder: Path, out: Path) -> None:
    reason = _failure(_run(folder, out, "without-torch"))
    if reason and "torch" in reason.lower():
        reason = _failure(_run(folder, out, "with-torch"))
    if not reason and not _has_answer(out):
        reason = "its process wrote nothing that can be read"
    if reason:
        raise BackboneError(
            f"transformers cannot load the tokenizer ({reason})",
            where=str(folder),
            fix="install sentencepiece and protobuf" if _lacks_sentencepiece(folder) else "add a tokenizer.json to it",
        )


def _is_usable(home: Path) -> bool:
    return is_whole(home) and _has_answer(home)


def _has_answer(home: Path) -> bool:
    """Return True if `home` holds a tokenizer and readable facts."""
    try:
        facts_of(home)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (home / BACKEND_FILE).is_file()


def _failure(child: subprocess.CompletedProcess[str]) -> str | None:
    lines = child.stderr.strip().splitlines() or [f"its process died with code {child.returncode}"]
    return one_line(lines[-1], 300) if child.returncode else None


def _lacks_sentencepiece(folder: Path) -> bool:
    needed = ("sentencepiece", "google")
    return any(folder.glob("*.model")) and any(importlib.util.find_spec(name) is None for name in needed)


def _run(folder: Path, out: Path, torch: str) -> subprocess.CompletedProcess[str]:
    environment = {**child_environment(), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    limits = (str(MAX_BYTES), str(MAX_CPU_S))
    command = [sys.executable, "-P", "-c", CHILD, str(folder.resolve()), str(out), torch, *limits]
    try:
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise BackboneError(
            f"transformers did not load the tokenizer in {TIMEOUT_S} s", where=str(folder), fix="check its files"
        ) from error


def cache_home() -> Path:
    """Return the folder of converted tokenizers in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafit" / "tokenizers"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    except OSError:
        pass  # a home that cannot be written costs a conversion per session, no more
    fallback = Path(tempfile.gettempdir()) / f"lorafit-tokenizers-{os.getuid()}"
    fallback.mkdir(mode=0o700, exist_ok=True)
    # a folder of that name made by somebody else is not to be read from
    return fallback if fallback.stat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix="lorafit-tokenizers-"))


def facts_of(home: Path) -> tuple[dict[str, str], bool, bool]:
    """Return (named special tokens, cleans up spaces when decoding, splits special tokens) that `converted` wrote."""
    facts = json.loads((home / FACTS_FILE).read_text())
    return dict(facts["named"]), bool(facts["cleans_up"]), bool(facts["splits_special"])
