"""WeightTicket: one small tensor that stands for a packed weight in compiled code.

A packed weight is five tensors. For each of them torch.compile checks guards at every call, passes it from wrapper to
wrapper and saves it for the backward: 35 a decoder layer. A ticket is one, and which weight it stands for is looked
up when the operator runs; so nothing compiled can ever hold on to a weight that its layer no longer has.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Holder(Protocol):
    """What has a packed weight."""

    _ticket: Tensor

    def packed(self) -> tuple[Any, ...]:
        """The arguments of `frozen_linear` between `x` and `transposed`, as they are now, in plain tensors."""

    @property
    def copies(self) -> tuple[Tensor, ...]:
        """What is kept unpacked of it: nothing, the dense weight, or in FP8 the e4m3 one and its transpose."""

    @property
    def dense(self) -> Tensor | None:
        """The dense weight, where that is kept."""


_NUMBERS = count()
_HOLDERS: WeakValueDictionary[int, Holder] = WeakValueDictionary()


def ticket_for(holder: Holder, device: torch.device) -> Tensor:
    """A new ticket (1,) int64 for the weight of `holder`, which lies on `device`; good while `holder` lives.

    It lies there too, if that is a card: where one input of an operator is no tensor of the card's, the compiler takes
    the operator's output for unaligned, and what reads it for unable to load 16 bytes at a time (`has_unaligned_input`
    in torch/_inductor/ir.py). There it is known by its address, since reading it would wait for the card.
    """
    number = next(_NUMBERS)
    ticket = torch.tensor([number], device=ticket_device(device))
    _HOLDERS[number] = holder
    if ticket.is_cuda:
        _HOLDERS[ticket.data_ptr()] = holder
    return ticket


def ticket_device(weight: torch.device) -> torch.device:
    """Where the ticket of a weight lies: on the weight's card, else where a loader may not have it, on the CPU."""
    return weight if weight.type == "cuda" else torch.device("cpu")


def holder_of(ticket: Tensor) -> Holder:
    """What has the weight that `ticket` stands for."""
    holder = _HOLDERS.get(ticket.data_ptr()) if ticket.is_cuda else None
    # at an address may lie another ticket than the one that was entered there, if that was replaced since
    if holder is None or holder._ticket.data_ptr() != ticket.data_ptr():
        holder = _HOLDERS.get(int(ticket.item()))
    assert holder is not None, "the layer of a frozen weight is gone before its backward ran"
    return holder
