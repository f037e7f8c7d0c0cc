"""Template: render, tokenise and mask conversations, in training and in serving."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding

from lorafit.config import read_json
from lorafit.data.schema.records import Record
from lorafit.data.template.chat import ChatLayout
from lorafit.data.template.layout import (
    BOS_DOUBLED,
    NOT_TEXT,
    STOP_MISSING,
    STRADDLED,
    FallbackLayout,
    LaidOut,
    token_mask,
)
from lorafit.data.template.probe import enders_of
from lorafit.data.template.renderer import FROZEN_NOW
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError
from lorafit.runs import write_text

FALLBACK, CHAT, FILE = "fallback", "chat_template", "file"
FORMAT = 1
MAX_TEMPLATE_BYTES = 16 << 20
ASKS_THE_DATE = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
GOLDEN: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "What is 12 × 34?\nAnswer briefly."},),
    ({"role": "user", "content": "Grüße aus Zürich — 你好，世界 🙂\r\n\tdef f(x):  return x**2  # ok \n"},),
    (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": '{"id": 7, "at": "2024-01-01T00:00:00Z"}'},
    ),
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as the model sees it. `ids` (tokens,); `mask` (tokens,) is True for tokens with loss.

    `problems` are names from layout.py; `detail` says in whose words, where there are some. `lost_answers` of about
    `lost_tokens` should be learnt and are not supervised.
    """

    ids: list[int]
    mask: list[bool]
    problems: tuple[str, ...] = ()
    detail: str = ""
    lost_answers: int = 0
    lost_tokens: int = 0


class Template:
    """A chat template bound to a tokenizer. `name` is "chat_template" (the base's own), "file" or "fallback"."""

    def __init__(self, tokenizer: TextTokenizer, source: str | None, name: str = CHAT) -> None:
        self.tokenizer = tokenizer
        self._layout = FallbackLayout(tokenizer) if source is None else ChatLayout(source, tokenizer)
        self.name = FALLBACK if source is None else name
        self._enders = enders_of(tokenizer) | set(self.stop_ids)

    @classmethod
    def for_tokenizer(cls, tokenizer: TextTokenizer, file: str | None = None) -> Template:
        """Return the template in `file`, else the base's own, else the fallback. Raises TemplateError if none works."""
        if file:
            return cls(tokenizer, _read_source(Path(file)), FILE)
        return cls(tokenizer, tokenizer.chat_template)

    @property
    def source(self) -> str:
        """The template as Jinja text."""
        return self._layout.source

    @property
    def sha256(self) -> str:
        """SHA-256 of `source`."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; generation stops at any of them."""
        return self._layout.stop_ids

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """`stop_ids` as text."""
        return tuple(self.tokenizer.token_of(token_id) or "" for token_id in self.stop_ids)

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems of every row under this template."""
        return self._layout.problems

    @property
    def jinja_for_export(self) -> str:
        """The chat template for an exported tokenizer: with it transformers and vLLM render the trained prompt.

        Templates that ask for today's date keep the date they were trained with. `{% generation %}` tags, which some
        servers refuse, become conditions that are always true, so that white space control stays.
        """
        dated = ASKS_THE_DATE.sub(lambda match: json.dumps(FROZEN_NOW.strftime(match[2])), self.source)
        return GENERATION_TAG.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", dated)

    def turn_fields_shown(self, names: Iterable[str]) -> set[str]:
        """Return the extra fields of turns, among `names`, that the template writes into its text."""
        return {name for name in names if self._layout.shows_turn_field(name)}

    def with_calls_apart(self, record: Record) -> Record:
        """Return the record with one call a turn if the template takes only one; else the same object."""
        return self._layout.with_calls_apart(record)

    def encode(self, record: Record) -> Encoded:
        """Return one record's ids and mask; see `encode_many`."""
        return self.encode_many([record])[0]

    def encode_many(self, records: Iterable[Record]) -> list[Encoded]:
        """Return every record's ids and mask, in order.

        Rows that cannot be encoded have no ids, and the reason in `problems`.

        Raises TemplateError only when the template does not end within its bounds.
        """
        encoded: list[Encoded] = []
        self._layout.lay_out(records, lambda rows: encoded.extend(self._encoded(rows)))
        return encoded

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Iterable[Mapping[str, Any]] = (),
    ) -> str:
        """Return the text of `messages`. Raises TemplateError if the template refuses them."""
        return self._layout.render(messages, add_generation_prompt, tools)

    def prompt_text(self, messages: Iterable[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]] = ()) -> str:
        """Return the text that serving feeds the model to answer the last of `messages`."""
        return self.render(messages, True, tools)

    def prompt_ids(self, messages: Iterable[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids that serving feeds the model. They include BOS if the template has it; add none."""
        return self.tokenizer.encode(self.prompt_text(messages, tools))

    def save(self, path: Path) -> None:
        """Write template.json. `load` is the inverse and checks it. Raises RunDirError on a full disk."""
        golden = [{"messages": list(asked), "ids": ids} for asked, ids in self.golden_prompts()]
        fields = {
            "format": FORMAT,
            "name": self.name,
            "jinja": self.source,
            "sha256": self.sha256,
            "tokenizer_sha256": self.tokenizer.content_hash,
            "vocabulary_sha256": self.tokenizer.vocabulary_hash,
            "stop_ids": list(self.stop_ids),
            "stop_tokens": list(self.stop_tokens),
            "golden": golden,
        }
        write_text(path, json.dumps(fields, indent=2, ensure_ascii=True) + "\n")

    @classmethod
    def load(cls, path: Path, tokenizer: TextTokenizer) -> Template:
        """Return the template that `save` wrote, bound to `tokenizer`.

        Raises TemplateError when the file is damaged, or when its prompts would not be the trained ones.
        """
        saved = _saved(path)
        template = cls(tokenizer, None if saved["name"] == FALLBACK else saved["jinja"], str(saved["name"]))
        recorded = list(saved["stop_ids"])
        if template.source != saved["jinja"] or not template._ends_with(recorded, saved.get("stop_tokens")):
            raise _differs(path, "its template or stop token has changed")
        if not _has_vocabulary(tokenizer, saved):
            raise _differs(path, "a token of the base's tokenizer has changed")
        # an older release recorded fewer of the tokens that end an answer; the run was taught all of them
        template._layout.stop_ids = tuple(dict.fromkeys([*recorded, *template.stop_ids]))
        for golden in saved["golden"]:
            if template.prompt_ids(golden["messages"]) != golden["ids"]:
                raise _differs(path, f"the prompt for {json.dumps(golden['messages'][-1].get('content'))[:60]} differs")
        return template

    def golden_prompts(self) -> list[tuple[Sequence[Mapping[str, Any]], list[int]]]:
        """Return the golden conversations that this template accepts, with the ids of their prompts."""
        kept: list[tuple[Sequence[Mapping[str, Any]], list[int]]] = []
        for asked in GOLDEN:
            try:
                kept.append((asked, self.prompt_ids(asked)))
            except TemplateError:
                continue  # some templates take no second turn: there is no prompt to compare then
        return kept

    def _ends_with(self, recorded: list[Any], texts: Any) -> bool:
        """Return True if a run's `recorded` stop ids begin with the template's own, and are tokens of these `texts`."""
        if recorded[0] != self.stop_ids[0] or any(type(token_id) is not int for token_id in recorded):
            return False
        return texts is None or texts == [self.tokenizer.token_of(token_id) or "" for token_id in recorded]

    def _encoded(self, rows: Sequence[LaidOut]) -> list[Encoded]:
        encodings = self._encodings([row.text for row in rows])
        return [
            Encoded([], [], (*row.problems, NOT_TEXT)) if encoding is None else self._masked(row, encoding)
            for row, encoding in zip(rows, encodings)
        ]

    def _encodings(self, texts: list[str]) -> Sequence[Encoding | None]:
        try:
            return self.tokenizer.encodings(texts)
        except TypeError:
            # tokenizers takes no lone surrogates; only the rows that hold one are lost
            return [None if _has_surrogates(text) else self.tokenizer.encodings([text])[0] for text in texts]

    def _masked(self, row: LaidOut, encoding: Encoding) -> Encoded:
        if not row.text:
            return Encoded([], [], row.problems, row.detail)
        ids, mask, straddled, stopped = token_mask(encoding, row.text, row.spans, self._enders)
        if mask:
            mask[0] = False  # nothing stands before the first token that could predict it
        problems = [*(() if row.is_document else self.problems), *row.problems]
        if straddled:
            problems.append(STRADDLED)
        if not stopped:
            problems.append(STOP_MISSING)
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_id:
            problems.append(BOS_DOUBLED)
        lost = sum(map(len, self.tokenizer.encode_batch(row.lost))) if row.lost else 0
        return Encoded(ids, mask, tuple(dict.fromkeys(problems)), row.detail, len(row.lost), lost)


def _read_source(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_TEMPLATE_BYTES:
            raise TemplateError("is too large for a chat template", where=str(path), fix="name a file of Jinja text")
        return raw.decode("utf-8")
    except OSError as error:
        what = f"the chat template cannot be read ({error.strerror})"
        raise TemplateError(what, where=str(path), fix="name a file of Jinja text with --set template=FILE") from error
    except UnicodeDecodeError as error:
        raise TemplateError("the chat template is no UTF-8 text", where=str(path), fix="save it as UTF-8") from error


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _saved(path: Path) -> dict[str, Any]:
    try:
        saved = read_json(path, TemplateError, max_bytes=MAX_TEMPLATE_BYTES, fix="restore the run directory")
        digest = hashlib.sha256(saved["jinja"].encode("utf-8", "surrogatepass")).hexdigest()
        whole = saved["format"] == FORMAT and digest == saved["sha256"] and _proves_something(saved)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TemplateError(
            "is no template.json of lorafit's", where=str(path), fix="restore the run directory"
        ) from error
    if not whole:
        raise TemplateError(
            "the template's text is not the one whose SHA-256 was saved",
            where=str(path),
            fix="restore the run directory",
        )
    return dict(saved)


def _has_vocabulary(tokenizer: TextTokenizer, saved: dict[str, Any]) -> bool:
    """Return True if every token is as `saved`. Older releases saved no vocabulary, only golden prompts."""
    is_same = saved.get("tokenizer_sha256") == tokenizer.content_hash
    return is_same or saved.get("vocabulary_sha256", tokenizer.vocabulary_hash) == tokenizer.vocabulary_hash


def _proves_something(saved: dict[str, Any]) -> bool:
    golden = saved["golden"]
    return bool(golden and saved["name"] and saved["stop_ids"]) and all(
        each["messages"] and each["ids"] for each in golden
    )


def _differs(path: Path, how: str) -> TemplateError:
    return TemplateError(
        f"the served prompt would differ from the trained one ({how})",
        where=str(path),
        fix="use the base and tokenizer that the run was trained with",
    )
