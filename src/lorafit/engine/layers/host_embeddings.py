"""Host embeddings: frozen input embeddings in host memory.

They free their bytes on the GPU, and each step reads only the rows it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone import unwrapped
from lorafit.engine.loss.kernel import HAS_TRITON, tl, triton
from lorafit.engine.loss.logit_rules import SCALED_EMBEDDINGS

BLOCK = 1024


class HostEmbedding(nn.Embedding):
    """An embedding whose table stays in host memory, pinned if there is a GPU.

    The table is no parameter: `.to(device)` does not move it, `model.device` is still the GPU, and
    DistributedDataParallel, which requires all parameters on one device, does not see it. `state_dict` includes it.
    """

    _table: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the table (entries, width), on the host."""
        return self._table

    def forward(self, input: Tensor) -> Tensor:
        """Return rows of the table, (…) → (…, width), on the device of `input`."""
        if HAS_TRITON and input.is_cuda and self._table.is_pinned():
            return gathered(self._table, input.contiguous())
        rows = nn.functional.embedding(input.to(self._table.device), self._table)
        return rows.to(input.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._table

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict:
            self._table.copy_(state_dict[key])
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, *rest)


def keep_embeddings_on_host(model: Any) -> bool:
    """Move the frozen input embeddings of `model` to host memory; the outputs stay the same.

    `model` may be wrapped by PEFT. Returns False, and changes nothing, if the embeddings are tied to the head, trained,
    adapted, or of a class that does more than look up and scale. The move frees entries · width · itemsize bytes of the
    GPU. With a GPU it takes up to twice that of host memory, because torch rounds pinned blocks up to a power of two.
    """
    core = unwrapped(model)
    embedding = core.get_input_embeddings()
    if isinstance(embedding, HostEmbedding):
        return True
    if not _may_move(embedding, core.get_output_embeddings()):
        return False
    weight = embedding.weight.detach()
    table = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=torch.cuda.is_available()).copy_(weight)
    was_on_gpu = weight.is_cuda
    del embedding.weight, weight
    # a scaled family keeps its forward, whose `super().forward` is now HostEmbedding's
    own = type(embedding)
    embedding.__class__ = HostEmbedding if own is nn.Embedding else type(own.__name__, (own, HostEmbedding), {})
    embedding._table = table
    if was_on_gpu:
        torch.cuda.empty_cache()
    return True


def _may_move(embedding: Any, head: Any) -> bool:
    if type(embedding) is not nn.Embedding and type(embedding).__name__ not in SCALED_EMBEDDINGS:
        return False  # adapted, replaced by another library, or with other semantics
    weight, own = embedding.weight, getattr(head, "weight", None)
    tied = own is not None and own.data_ptr() == weight.data_ptr()
    return not (tied or weight.requires_grad or weight.is_meta or embedding.max_norm is not None)


def gathered(table: Tensor, ids: Tensor) -> Tensor:
    """Return `table[ids]` on the device of `ids`.

    table (entries, width), pinned; ids (...) int64; returns (..., width). An id outside the table gives NaN, as reading
    there would read other host memory.
    """
    entries, width = table.shape
    assert table.is_contiguous() and ids.is_contiguous(), "table and ids must be contiguous"
    out = torch.empty((*ids.shape, width), dtype=table.dtype, device=ids.device)
    if ids.numel():
        with torch.cuda.device_of(ids):
            _gather[(ids.numel(), triton.cdiv(width, BLOCK))](table, ids, out, entries, WIDTH=width, BLOCK=BLOCK)
    return out


if HAS_TRITON:

    @triton.jit
    def _gather(table, ids, out, entries, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        entry = tl.load(ids + token)
        inside = (entry >= 0) & (entry < entries)
        row = tl.load(table + entry * WIDTH + columns, mask=inside & (columns < WIDTH), other=float("nan"))
        tl.store(out + token * WIDTH + columns, row, mask=columns < WIDTH)
