"""deltas: the changes of the base's weights by an adapter on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.backbone import base_skeleton, output_head, text_decoder, transposed_experts
from lorafit.config import RunConfig
from lorafit.errors import VerificationError
from lorafit.methods.lora.adapter_folder import AdapterFiles
from lorafit.methods.lora.attach import matching
from lorafit.methods.lora.dora import rescaled
from lorafit.methods.lora.expert_adapters import stacked

Rows = tuple[tuple[int, ...], Tensor]
"""Token ids, and their trained rows (n, hidden). No ids stand for all rows."""


@dataclass(frozen=True)
class Delta:
    """Hold the low-rank update of one weight.

    Attributes:
        a: A (r, in), fp32.
        b: B (out, r), fp32.
        scale: alpha / r.
        transposed: True if the weight is stored as (in, out), as Conv1D does.
        magnitude: DoRA's length of each row of the sum (out,), fp32; None for plain LoRA.
        experts: number of experts of a stacked weight, with A (experts · r, in) and B (out, r · experts); 0 for one
            matrix. `transposed` is then True for matrices that are stored as (in, out).
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False
    magnitude: Tensor | None = None
    experts: int = 0

    def dense(self) -> Tensor:
        """Return `scale · B @ A` in fp32, as the weight is stored: (out, in), or transposed; of experts stacked."""
        if self.experts:
            a, b = stacked(self.a.float(), self.b.float(), self.experts)
            each = torch.bmm(b, a) * self.scale
            return each.transpose(1, 2).contiguous() if self.transposed else each
        dense = (self.b.float() @ self.a.float()) * self.scale
        return dense.T.contiguous() if self.transposed else dense

    @property
    def is_zero(self) -> bool:
        """Return True if B A is zero. ‖B A‖² is the sum of (BᵀB) ∘ (AAᵀ), which has r² terms."""
        a, b = self.a.double()[None], self.b.double()[None]
        if self.experts:
            a, b = stacked(a[0], b[0], self.experts)
        return self.scale == 0 or not bool(((b.mT @ b) * (a @ a.mT)).sum())


class Deltas(Mapping[str, Delta]):
    """Map base parameter names (`….q_proj.weight`) to their deltas, beside trained rows of embedding and head."""

    def __init__(self, deltas: Mapping[str, Delta], rows: Mapping[str, Rows] | None = None, tied: str = "") -> None:
        self._deltas, self._rows = dict(deltas), dict(rows or {})
        self._also = {tied: next(iter(self._rows.values()))} if tied and len(self._rows) == 1 else {}

    @classmethod
    def from_folder(cls, folder: Path, config: RunConfig | None = None) -> Deltas:
        """Return the deltas of the adapter in `folder`; those of experts need `config`, which names the base.

        Raises AdapterError for untrusted files, VerificationError for an untrained adapter.
        """
        files = AdapterFiles.open(folder)
        magnitudes = files.magnitudes()
        weights = files.weights()
        of_experts = matching(files.parameters, list(weights))
        deltas = {
            f"{name}.weight": Delta(a, b, files.scale, files.transposed, magnitudes.get(name))
            for name, (a, b) in weights.items()
            if name not in of_experts
        }
        if of_experts:
            assert config is not None, "the base says how experts are stored"
            swapped = transposed_experts(base_skeleton(config))
            for name in of_experts:
                experts = len(weights[name][0]) // files.expert_rank
                deltas[name] = Delta(*weights[name], files.scale, name in swapped, experts=experts)
        # no gradient reaches an expert without routed tokens, or a layer whose result is not used
        if all(delta.is_zero for delta in deltas.values()):
            raise VerificationError("every delta is zero: the adapter was not trained", where=str(folder))
        rows = {f"{name}.weight": pair for name, pair in files.rows().items()}
        if not rows or config is None:
            return cls(deltas, rows)
        head, is_tied = _head_of(base_skeleton(config))
        if is_tied and head in rows and len(rows) > 1:
            own = rows.pop(head)
            if not torch.equal(own[1], next(iter(rows.values()))[1]):
                what = "embedding and head are tied in the base, but differ in the adapter"
                raise VerificationError(what, where=str(folder))
        return cls(deltas, rows, head if is_tied else "")

    def source(self, config: RunConfig) -> RunConfig:
        """Return `config`, whose base the deltas change."""
        return config

    def check_found(self, names: Iterable[str]) -> None:
        """Raise VerificationError unless every delta's weight is among `names`."""
        lost = sorted({*self, *self._rows} - set(names))
        if lost:
            raise VerificationError(f"{len(lost)} of the adapter's targets are not in the base, such as {lost[0]}")

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return `weight` (out, in) plus its delta, summed in fp32; for DoRA with rows of the trained lengths.

        The sum is rounded once, to the weight's dtype. A weight without a delta is returned unchanged. Raises
        VerificationError if the shapes differ.
        """
        rows = self._rows.get(name, self._also.get(name))
        if rows is not None:
            return _with_rows(name, weight, rows)
        delta = self.get(name)
        if delta is None:
            return weight
        update, shape = delta.dense(), tuple(weight.shape)
        if update.shape != weight.shape:
            raise VerificationError(f"the adapter's delta {tuple(update.shape)} does not fit {name} {shape}")
        total = weight.float() + update.to(weight.device)
        if delta.magnitude is not None:
            total = rescaled(total.T, delta.magnitude).T if delta.transposed else rescaled(total, delta.magnitude)
        return total.to(weight.dtype)

    def __getitem__(self, name: str) -> Delta:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)


def _with_rows(name: str, weight: Tensor, rows: Rows) -> Tensor:
    ids, values = rows
    if not ids and weight.shape == values.shape:
        return values.to(weight)
    if weight.ndim != 2 or weight.shape[1] != values.shape[1] or len(weight) <= max(ids, default=len(weight)):
        raise VerificationError(f"the adapter's rows {tuple(values.shape)} do not fit {name} {tuple(weight.shape)}")
    index = torch.tensor(ids, device=weight.device)
    return weight.index_copy(0, index, values.to(weight))


def _head_of(model: Any) -> tuple[str, bool]:
    """Return the name of the head's weight, and whether it is the embedding's, which a checkpoint may store twice."""
    head = output_head(model)
    name = next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")
    embedding = text_decoder(model).get_input_embeddings()  # type: ignore[operator]
    return name, head is not None and head.weight is embedding.weight
