"""The fallback template, for bases without a chat template: `<|user|>`, `<|end|>`, `<|assistant|>`, then EOS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorafit.data.records import Record
from lorafit.data.template_problems import TOO_LARGE, TOOLS_IGNORED
from lorafit.data.template_row import MAX_ROW_CHARACTERS, LaidOut, Span, characters_in, cleaned, messages_of
from lorafit.data.tokenizer import TextTokenizer
from lorafit.errors import TemplateError

CHUNK_ROWS = 1024
SOURCE = Path(__file__).with_name("fallback.jinja")


class FallbackLayout:
    """Lays rows out as fallback.jinja does, in plain Python: on a million rows Jinja would cost more than tokenising.

    Raises TemplateError for a tokenizer without an EOS token, which no answer could end with.
    """

    problems: tuple[str, ...] = ()

    def __init__(self, tokenizer: TextTokenizer) -> None:
        eos = tokenizer.eos_token
        if eos is None or tokenizer.eos_id is None:
            raise TemplateError(
                "the base's tokenizer has neither a chat template nor an EOS token, so no answer could end",
                fix="choose a base whose tokenizer_config.json names an eos_token",
            )
        self.eos = eos
        self.bos = tokenizer.bos_token or "" if tokenizer.adds_bos else ""
        self.stop_ids = (tokenizer.eos_id,)
        self.source = ("{{- bos_token -}}\n" if self.bos else "") + SOURCE.read_text(encoding="utf-8")

    def lay_out(self, records: Iterable[Record], use: Callable[[list[LaidOut]], None]) -> None:
        """Hand `use` the text of every record in order, chunk by chunk, each answer and its EOS supervised."""
        source = iter(records)
        while chunk := list(islice(source, CHUNK_ROWS)):
            use([self._laid(record) for record in chunk])

    def render(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool, tools: Iterable[Any] = ()
    ) -> str:
        """The text of `messages`; tools cannot be shown."""
        return self._text(cleaned(messages), add_generation_prompt)[0]

    def _laid(self, record: Record) -> LaidOut:
        messages = messages_of(record)
        if characters_in(messages) > MAX_ROW_CHARACTERS:
            return LaidOut("", problems=(TOO_LARGE,))
        text, spans = self._text(messages, False)
        uses_tools = record.tools or any("tool_calls" in message for message in messages)
        return LaidOut(text, tuple(spans), (TOOLS_IGNORED,) if uses_tools else ())

    def _text(self, messages: list[dict[str, Any]], ask: bool) -> tuple[str, list[Span]]:
        parts, spans, length = [self.bos], [], len(self.bos)
        for place, message in enumerate(messages):
            role, content = message["role"], message.get("content", "")
            if role == "assistant":
                opening, body = "<|assistant|>\n", content + self.eos
                spans.append((length + len(opening), length + len(opening) + len(body)))
                part = opening + body + ("\n" if ask or place < len(messages) - 1 else "")
            else:
                part = f"<|{role}|>\n{content}<|end|>\n"
            parts.append(part)
            length += len(part)
        return "".join(parts) + ("<|assistant|>\n" if ask else ""), spans
