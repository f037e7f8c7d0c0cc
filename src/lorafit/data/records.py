"""Record: one training example, whatever file and row shape it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. `extra` keeps what only a chat template understands (tool_calls, name)."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The turn as chat templates and OpenAI clients write it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Record:
    """A system text, the turns after it, and where the row stands (`file:line`)."""

    turns: tuple[Turn, ...]
    source: str
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """Every turn, system first, as a list of messages."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [turn.message() for turn in self.turns]

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the last assistant turn: what the model is asked."""
        return self.messages()[:-1]

    @property
    def response(self) -> str:
        """The last assistant turn: what the model should answer."""
        return self.turns[-1].content
