"""Checks of one row: its text, and its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from lorafit.data.schema.records import Record
from lorafit.data.sources.raw_row import excerpt
from lorafit.data.template import layout as problems

if TYPE_CHECKING:
    from lorafit.data.tokenizer.tokenizer import TextTokenizer

Observation = tuple[str, str]
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

RESULT_MARK = "<tool_response>"
"""What templates with tools put around a result, and Hermes' data hold already."""

SPOKEN_END = re.compile(r"(?m)^\s*(?:assistant|ai|bot|model):\s*\Z", re.IGNORECASE)
"""How prompts end that were written for a model without a chat template."""

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

PLACEHOLDERS = frozenset(
    (
        "n/a", "n.a", "nan", "null", "undefined", "todo", "tbd", "tba", "tbc", "fixme", "xxx", "placeholder",
        "see above", "see below", "as above", "same as above", "ditto", "lorem ipsum", "insert answer here",
        "your answer here", "answer here", "to be done", "to be added", "coming soon", "fill in", "#n/a", "#ref!",
        "#value!", "#name?", "#div/0!", "#num!", "#null!",
    )
)  # fmt: skip
"""Answers that stand for an answer that nobody has written."""
PLACEHOLDER_LENGTH = 40
PLACEHOLDER_BLANKS = " \t\r\n.…!*_[]()<>{}-"
HTML_HINTS = ("</", "<br", "<p>", "&nbsp;", "&amp;", "&lt;", "&gt;", "&quot;", "&#")
HTML = re.compile(
    r"</(?:p|div|span|li|ul|ol|a|b|i|u|em|strong|h[1-6]|table|tr|td|th|font|blockquote|pre|code)>|<br\s*/?>|<p>"
    r"|&(?:nbsp|amp|lt|gt|quot|#\d{1,5}|#x[0-9a-fA-F]{1,4});",
    re.IGNORECASE,
)
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


def text_checks(record: Record) -> Iterator[Observation]:
    """Yield every observation on one record."""
    text = text_of(record)
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        yield "D043", "holds half a surrogate pair"
        return
    if not record.is_document:
        yield from _answers(record)
        if len(record.turns) != 2:
            yield from _order(record)
            if any(turn.role == "tool" and turn.content.lstrip().startswith(RESULT_MARK) for turn in record.turns):
                yield "D040", f"'{RESULT_MARK}' around a tool's result"
    yield from _hygiene(text, raw)


def _answers(record: Record) -> Iterator[Observation]:
    taught = False
    for number, turn in enumerate(record.turns, start=1):
        taught |= turn.taught
        if turn.loss and turn.role != "assistant":
            yield "D051", f"turn {number} is the {turn.role}'s, and its loss flag says to learn it"
        if turn.taught and not turn.content.strip() and not turn.calls:
            yield "D013", "the response is empty"
            break
        if turn.taught and len(turn.content) < PLACEHOLDER_LENGTH and _is_placeholder(turn.content):
            yield "D046", f"“{excerpt(turn.content.strip())}”"
    if not taught:
        yield "D021", "every answer is flagged as not to be learnt"
    if record.turns[0].role == "user" and not record.turns[0].content.strip():
        yield "D014", "the prompt is empty"
    if len(record.turns) > 1 and SPOKEN_END.search(record.turns[-2].content[-40:]):
        yield "D040", f"'{record.turns[-2].content.split()[-1]}' at the end of a prompt"
    asked, answered = record.turns[-2:] if len(record.turns) > 1 else record.turns * 2
    if asked is not answered and asked.role == "user" and asked.content.strip() == answered.content.strip() != "":
        yield "D015", "the response is the prompt"


def _is_placeholder(answer: str) -> bool:
    return answer.strip(PLACEHOLDER_BLANKS).lower() in PLACEHOLDERS


def _order(record: Record) -> Iterator[Observation]:
    roles = [turn.role for turn in record.turns]
    if roles[0] == "assistant":
        yield "D018", "the first turn is the assistant's"
    if roles[-1] != "assistant":
        yield "D019", f"the last turn is the {roles[-1]}'s"
    for number, (one, next_one) in enumerate(pairwise(roles), start=2):
        if next_one in ("system", "developer") or (one == next_one and one in ("user", "assistant")):
            yield "D017", f"turn {number} is {next_one} after {one}"
            return


def _hygiene(text: str, raw: bytes) -> Iterator[Observation]:
    if styles := _styles_in(text):
        yield "D040", f"'{styles[0]}'"
    if len(raw) != len(raw.translate(None, CONTROL_BYTES)):
        yield "D041", f"U+{ord(_first_control(text)):04X}"
    if not text.isascii() and (match := MOJIBAKE.search(text)):
        yield "D042", f"'{excerpt(text[max(0, match.start() - 10) : match.end() + 10])}'"
    if ("<" in text or "&" in text) and has_any(text, HTML_HINTS) and (found := HTML.search(FENCED.sub("", text))):
        yield "D047", f"'{excerpt(found[0])}'"
    if kind := secret_kind(text):
        yield "D044", kind


def text_of(record: Record) -> str:
    """Return all text of a record, turn after turn."""
    return "\n".join(texts_of(record))


def texts_of(record: Record) -> list[str]:
    """Return every text of a record: system, contents, reasoning, and calls as JSON."""
    texts = [record.system or ""]
    for turn in record.turns:
        texts.append(turn.content)
        if turn.extra:
            texts.append(turn.reasoning)
            texts += [json.dumps(call.get("function"), ensure_ascii=False, default=str) for call in turn.calls]
    return texts


def marker_styles(record: Record) -> list[str]:
    """Return the template styles whose markers occur in the record."""
    return _styles_in(text_of(record))


def _styles_in(text: str) -> list[str]:
    if not has_any(text, MARKER_HINTS):
        return []
    return [style for style, marks in MARKERS.items() if any(mark in text for mark in marks)]


def has_any(text: str, hints: Iterable[str]) -> bool:
    """Return True if `text` contains one of `hints`.

    A plain loop, because it runs for every row and `any` costs double.
    """
    for hint in hints:  # noqa: SIM110
        if hint in text:
            return True
    return False


def secret_kind(text: str) -> str:
    """Return the kind of secret that `text` seems to hold; empty for none."""
    if not has_any(text, SECRET_HINTS):
        return ""
    return next((kind for kind, pattern in SECRETS.items() if pattern.search(text)), "")


def _first_control(text: str) -> str:
    return next(char for char in text if ord(char) < 128 and ord(char) in CONTROL_BYTES)


class Tokenised(Protocol):
    """Protocol of an encoded row: ids and mask of (tokens,), and the problems that its template reports."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def mask(self) -> list[bool]: ...

    @property
    def problems(self) -> tuple[str, ...]: ...

    @property
    def detail(self) -> str: ...

    @property
    def lost_answers(self) -> int: ...

    @property
    def lost_tokens(self) -> int: ...


SAID: dict[str, Observation] = {
    problems.STOP_MISSING: ("D022", "an answer is not followed by a supervised stop token"),
    problems.BOS_DOUBLED: ("D023", "the first two tokens are BOS"),
    problems.REFUSED: ("D024", "the template refuses the row"),
    problems.NOT_PREFIX_STABLE: ("D025", "only the last answer is supervised"),
    problems.PROMPT_DIFFERS: ("D026", "the rendered row does not begin with the prompt that serving sends"),
    problems.PROMPT_SPLIT: ("D028", "the tokenizer splits the prompt otherwise when an answer follows"),
    problems.CONTENT_CHANGED: ("D027", "the template dropped or rewrote part of an answer"),
    problems.ANSWER_EMPTY: ("D013", "the template shows nothing of an answer"),
    problems.STRADDLED: ("D028", "a token covers the edge of an answer"),
    problems.TEXT_MISSING: ("D039", "the template leaves out a text of the row"),
    problems.TOOLS_IGNORED: ("D029", "the template does not read tools"),
    problems.KWARGS_UNREAD: ("D054", "the template does not read the row's chat_template_kwargs"),
    problems.IDS_MADE: ("D055", "ids of calls become nine letters and digits, the same in the call and its result"),
    problems.REASONING_SPLIT: ("D055", "reasoning between tags in an answer is written as the template's reasoning"),
    problems.REASONING_JOINED: ("D055", "reasoning and text beside a call are joined, because the template takes one"),
    problems.CALLS_APART: ("D055", "calls of one turn follow each other, because the template takes one a turn"),
    problems.TAGS_LEFT: ("D056", "tags of reasoning stand in an answer's text"),
    problems.TOO_LARGE: ("D006", "more text than any context holds"),
    problems.NOT_TEXT: ("D043", "holds half a surrogate pair"),
}
"""The template's problems as observations."""


def token_checks(row: Tokenised) -> Iterator[Observation]:
    """Yield every observation on one tokenised row. The caller handles rows that are too long."""
    for problem in row.problems:
        code, seen = SAID[problem]
        detailed = problem in DETAILED and (problem != problems.CONTENT_CHANGED or not _lacks_text(row))
        yield code, (excerpt(row.detail, 120) if detailed else "") or seen
    if row.ids and True not in row.mask:
        yield "D021", "nothing in the row is supervised"


DETAILED = (problems.REFUSED, problems.TEXT_MISSING, problems.CONTENT_CHANGED, problems.KWARGS_UNREAD)
"""The problems that `detail` belongs to, the first of them that a row has."""


def _lacks_text(row: Tokenised) -> bool:
    return problems.TEXT_MISSING in row.problems


class SpecialTokens:
    """Find the base's special tokens written out in a row's text."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        special = (tokenizer.added_tokens[number] for number in tokenizer.special_ids)
        texts = sorted({text for text in special if text.strip()}, key=lambda text: (-len(text), text))
        self.hints = _shared_starts(texts)
        self.pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def text_checks(self, record: Record) -> Iterator[Observation]:
        """Yield an observation if a turn or the system text holds one."""
        for text in texts_of(record):
            if has_any(text, self.hints) and (match := self.pattern.search(text)):
                yield "D045", f"'{match[0]}'"
                return


def _shared_starts(texts: Iterable[str]) -> tuple[str, ...]:
    # most bases have hundreds of special tokens that all start alike, and most texts none of those starts
    return tuple(sorted({text[:2] for text in texts}))
