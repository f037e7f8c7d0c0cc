"""AllocatorWatch: a run whose allocator keeps giving memory back and asking again is given more room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine import allocator_retries
from lorafit.training.events import EventLog
from lorafit.training.memory_retry import Layers
from lorafit.training.trainer_library import TrainerCallback

IN_A_ROW = 3
"""Steps with such retries, one after another: a step of a new shape may need one, a step that fits does not."""


class AllocatorWatch(TrainerCallback):
    """Relieves `layers` when IN_A_ROW steps each made the allocator ask again: every time stops the card, and a run
    that lives so takes half as long again (10,661 tokens/s for 17,733 at 16 GiB). Reads a counter of the host.
    `turned` is called when the policy has been."""

    def __init__(
        self,
        layers: Layers,
        events: EventLog,
        retries: Callable[[], int] = allocator_retries,
        turned: Callable[[], object] = lambda: None,
    ) -> None:
        self.layers, self.events, self.retries, self.turned = layers, events, retries, turned
        self.seen, self.in_a_row = 0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Count from here: evaluation and saving between steps may ask as they like."""
        self.seen = self.retries()

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Act when enough steps in a row have asked again."""
        self.in_a_row = self.in_a_row + 1 if self.retries() > self.seen else 0
        if self.in_a_row < IN_A_ROW:
            return
        self.in_a_row = 0
        before = self.layers.policy
        if self.layers.reduce_slightly():
            self.events.record(
                "tight_memory",
                state.global_step,
                f"the memory was so full that {IN_A_ROW} steps in a row waited for it; "
                f"{_what_gave_way(before, self.layers.policy)}",
                policy=str(self.layers.policy),
            )
            self.turned()


def _what_gave_way(before: MemoryPolicy, after: MemoryPolicy) -> str:
    if before.dequantized_layers > after.dequantized_layers:
        return "fewer weights lie unpacked now"
    if before.cuda_graph_max_tokens > after.cuda_graph_max_tokens:
        return "no CUDA graphs are recorded now"
    if (after.recompute_layers, after.recompute_layers + after.recompute_mlp_layers) > (
        before.recompute_layers,
        before.recompute_layers + before.recompute_mlp_layers,
    ):
        return "more is recomputed now"
    if after.offloaded_layers > before.offloaded_layers:
        return f"{after.offloaded_layers} layers keep theirs on the host now, where {before.offloaded_layers} did"
    return "less stays on the card now"
