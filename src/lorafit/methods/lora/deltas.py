"""The delta of an adapter, `(alpha / r) · B @ A`, and its sum with a weight. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorafit.errors import VerificationError
from lorafit.methods.lora.adapter_folder import AdapterFiles

EXPERTS = ".experts."


@dataclass(frozen=True)
class Delta:
    """The low-rank update of one weight: A (r, in), B (out, r), fp32, and the scale alpha / r."""

    a: Tensor
    b: Tensor
    scale: float

    def dense(self) -> Tensor:
        """`scale · B @ A` (out, in) in fp32."""
        return (self.b.float() @ self.a.float()) * self.scale


class Deltas(Mapping[str, Delta]):
    """Base parameter name (`….q_proj.weight`) -> its Delta."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        self._deltas = dict(deltas)

    @classmethod
    def from_folder(cls, folder: Path) -> Deltas:
        """The deltas of the adapter in `folder`. Raises AdapterError, or VerificationError for an untrained one."""
        files = AdapterFiles.open(folder)
        deltas = {f"{name}.weight": Delta(a, b, files.scale) for name, (a, b) in files.weights().items()}
        for name, delta in deltas.items():
            # an expert that no token was routed to stays as it was
            if EXPERTS not in name and not bool(delta.dense().any()):
                raise VerificationError(
                    f"the delta of {name} is all zero: the adapter was not trained", where=str(folder)
                )
        return cls(deltas)

    def check_found(self, names: Iterable[str]) -> None:
        """Raise VerificationError unless every delta's weight is among `names`."""
        lost = sorted(set(self) - set(names))
        if lost:
            raise VerificationError(f"{len(lost)} of the adapter's targets are not in the base, such as {lost[0]}")

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return `weight` (out, in) plus its delta, summed in fp32 and rounded once to the weight's dtype.

        A weight without a delta comes back as it is. Raises VerificationError when the shapes differ.
        """
        delta = self.get(name)
        if delta is None:
            return weight
        update, shape = delta.dense(), tuple(weight.shape)
        if update.shape != weight.shape:
            raise VerificationError(f"the adapter's delta {tuple(update.shape)} does not fit {name} {shape}")
        return (weight.float() + update.to(weight.device)).to(weight.dtype)

    def __getitem__(self, name: str) -> Delta:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)
