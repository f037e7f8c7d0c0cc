"""dial_of: the Dial that a config asks for, once the number of layers is known."""

from __future__ import annotations

from lorafit.config import RunConfig
from lorafit.config.dial import Dial
from lorafit.errors import UsageError

__all__ = ["Dial", "dial_of"]

RECOMPUTES = ("on", "reentrant")


def dial_of(config: RunConfig, layers: int) -> Dial | None:
    """What `activations` and `gradient_checkpointing` say together; None while both leave it to the plan.

    `gradient_checkpointing` on means every layer recomputed, off that none is; where the plan or the user also set
    `activations`, that decides and must agree. Raises UsageError when the two contradict each other.
    """
    asked = config.gradient_checkpointing
    if config.activations == "auto":
        return None if asked == "auto" else Dial(whole=layers if asked in RECOMPUTES else 0)
    dial = Dial.parse(config.activations, layers)
    wanted = {"auto": dial.whole, "off": 0}.get(asked, layers)
    if dial.whole != wanted or (asked != "auto" and dial.feed_forward):
        raise UsageError(
            f"gradient_checkpointing is {asked}, and activations ('{config.activations}') say otherwise",
            where="activations",
            fix="set one of the two, and leave the other on auto",
        )
    return dial
