"""RandomStreams: where torch's random streams stand, so that a step can be done again with the same dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RandomStreams:
    """The CPU's stream and, for training on a card, that card's. Reading them does not wait for the card."""

    cpu: torch.Tensor
    card: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomStreams:
        """The streams as they stand."""
        card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.random.get_rng_state(), card)

    def restore(self, device: torch.device) -> None:
        """Set the streams back."""
        torch.random.set_rng_state(self.cpu)
        if self.card is not None:
            torch.cuda.set_rng_state(self.card, device)
