"""Generation: one answer that is asked for, waits, runs and ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorafit.serve.adapters.source import AdapterVersion
from lorafit.serve.decoding.sampling import Chosen, Sampling

Reason = Literal["stop", "length", "cancelled", "error"]


class EngineStopped(Exception):
    """The engine crashed, drains or has ended; the request can be sent again."""


@dataclass(eq=False)
class Generation:
    """Hold one answer's request and state. Callbacks run on the engine's thread and must not block.

    Attributes:
        prompt: ids of the prompt.
        version: the adapter that answers, pinned by the caller; None is the base.
        sampling: how tokens are chosen.
        max_new_tokens: most tokens of the answer.
        stop_ids: tokens that end it, not part of it.
        tenant: whose request it is.
        priority: the tenant's share of the machine.
        on_token: receives each token.
        on_end: receives the reason, and the error if there was one; called once.
    """

    prompt: Sequence[int]
    version: AdapterVersion | None
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int]
    on_token: Callable[[Chosen], None]
    on_end: Callable[[Reason, BaseException | None], None]
    tenant: str = ""
    priority: float = 1.0
    # set by the scheduler
    ids: list[int] = field(default_factory=list)
    slot: int = -1
    adapter: int = 0
    read: int = 0
    cancelled: bool = False
    generator: Any = None
    arrived_s: float = field(default_factory=time.monotonic)
    admitted_s: float = 0.0

    @property
    def is_reading(self) -> bool:
        """Return True while the prompt is not in the cache as a whole."""
        return self.read < len(self.prompt)

    def accept(self, chosen: Chosen) -> Reason | None:
        """Add a token; return why the answer ends with it, or None."""
        if chosen.token in self.stop_ids:
            return "stop"
        self.ids.append(chosen.token)
        self.on_token(chosen)
        return "length" if len(self.ids) >= self.max_new_tokens else None
