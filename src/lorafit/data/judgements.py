"""What can be said of a row's text before it is tokenised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from lorafit.data.excerpt import excerpt
from lorafit.data.records import Record

Judgement = tuple[str, str]
"""(code, what was seen)"""

MARKERS = {
    "### Instruction:": ("### Instruction:", "### Response:"),
    "<|user|>": ("<|user|>", "<|assistant|>"),
    "[INST]": ("[INST]", "[/INST]"),
    "<|im_start|>": ("<|im_start|>", "<|im_end|>"),
    "<|start_header_id|>": ("<|start_header_id|>", "<|eot_id|>"),
    "<start_of_turn>": ("<start_of_turn>", "<end_of_turn>"),
}
"""Template styles, by the marker they are known by, and what in a text shows them."""

# a cheap test that every text with a marker passes: most texts need only this
MARKER_HINTS = ("<|", "### ", "INST]", "_of_turn>")
CONTROL_BYTES = bytes(code for code in (*range(32), 127) if code not in (9, 10, 13))
MOJIBAKE = re.compile("[ÃÂ][\u0080-\u00bf]|â€[\u0080-\u00bf™˜“”œžšŸ‹›„†‡‰…–—•ˆ¢]|ï»¿|ï¿½|\ufffd|[\u0080-\u009f]")
SECRET_HINTS = (
    *("sk-", "AKIA", "ASIA", "ghp_", "gho_", "ghs_", "github_pat_", "hf_", "xox", "AIza", "PRIVATE KEY-----"),
    *("glpat-", "npm_", "eyJ"),
)
SECRETS = {
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "an API key (sk-…)": re.compile(r"\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{24,}"),
    "a GitHub token": re.compile(r"\bgh[pos]_[A-Za-z0-9]{36}\b|\bgithub_pat_\w{22,}"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "a Google API key": re.compile(r"\bAIza[\w-]{35}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a GitLab token": re.compile(r"\bglpat-[\w-]{20,}"),
    "an npm token": re.compile(r"\bnpm_[A-Za-z0-9]{36}\b"),
    "a JSON web token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
}


def judged(record: Record) -> Iterator[Judgement]:
    """Every judgement on one record."""
    text = text_of(record)
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        yield "D043", "holds half a surrogate pair"
        return
    yield from _answers(record)
    if len(record.turns) != 2:
        yield from _order(record)
    yield from _hygiene(text, raw)


def _answers(record: Record) -> Iterator[Judgement]:
    for turn in record.turns:
        if turn.role == "assistant" and "tool_calls" not in turn.extra and not turn.content.strip():
            yield "D013", "the response is empty"
            break
    if record.turns[0].role == "user" and not record.turns[0].content.strip():
        yield "D014", "the prompt is empty"
    if len(record.turns) > 1 and record.turns[-1].content.strip() == record.turns[-2].content.strip() != "":
        yield "D015", "the response is the prompt"


def _order(record: Record) -> Iterator[Judgement]:
    roles = [turn.role for turn in record.turns]
    if roles[0] == "assistant":
        yield "D018", "the first turn is the assistant's"
    if roles[-1] != "assistant":
        yield "D019", f"the last turn is the {roles[-1]}'s"
    for number, (one, next_one) in enumerate(pairwise(roles), start=2):
        if next_one in ("system", "developer") or (one == next_one and one in ("user", "assistant")):
            yield "D017", f"turn {number} is {next_one} after {one}"
            return


def _hygiene(text: str, raw: bytes) -> Iterator[Judgement]:
    if styles := _styles_in(text):
        yield "D040", f"'{styles[0]}'"
    if len(raw) != len(raw.translate(None, CONTROL_BYTES)):
        yield "D041", f"U+{ord(_first_control(text)):04X}"
    if not text.isascii() and (match := MOJIBAKE.search(text)):
        yield "D042", f"'{excerpt(text[max(0, match.start() - 10) : match.end() + 10])}'"
    if kind := secret_kind(text):
        yield "D044", kind


def text_of(record: Record) -> str:
    """All text of a record, turn after turn."""
    return "\n".join([record.system or "", *(turn.content for turn in record.turns)])


def marker_styles(record: Record) -> list[str]:
    """The template styles whose markers stand in the record."""
    return _styles_in(text_of(record))


def _styles_in(text: str) -> list[str]:
    if not has_any(text, MARKER_HINTS):
        return []
    return [style for style, marks in MARKERS.items() if any(mark in text for mark in marks)]


def has_any(text: str, hints: Iterable[str]) -> bool:
    """Whether one of `hints` stands in `text`; a plain loop, because it runs for every row and `any` costs double."""
    for hint in hints:  # noqa: SIM110
        if hint in text:
            return True
    return False


def secret_kind(text: str) -> str:
    """What kind of secret `text` seems to hold; empty when none."""
    if not has_any(text, SECRET_HINTS):
        return ""
    return next((kind for kind, pattern in SECRETS.items() if pattern.search(text)), "")


def _first_control(text: str) -> str:
    return next(char for char in text if ord(char) < 128 and ord(char) in CONTROL_BYTES)
