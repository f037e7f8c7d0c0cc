"""token_rows: train the embedding rows of chosen tokens, in PEFT's format (`trainable_token_indices`).

A hook on the embedding replaces the rows of these tokens, and a hook on the head their logits. Both modules keep their
frozen weights and their classes; PEFT copies the whole table in every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.backbone import output_head, text_decoder
from lorafit.errors import AdapterError

ROWS = "token_rows"
"""Name of the parameter (tokens, hidden), fp32, within the embedding and the head."""
HELD = "trained_rows"
"""Name of the attribute of a module that holds its TokenRows."""
ENDING = ".token_adapter.trainable_tokens_delta"
"""What PEFT writes after the module's name in a file."""
SCALE = "embed_scale"
"""Name under which scaled embeddings hold the factor of their output."""


class TokenRows:
    """Hold the trained rows of one module, and put them into its output.

    Attributes:
        ids: the tokens (n,) in the order of the rows.
        enabled: False while the base answers.
    """

    def __init__(self, module: nn.Module, ids: Tensor, rows: nn.Parameter) -> None:
        self.ids, self.enabled = ids, True
        module.register_parameter(ROWS, rows)
        module.register_buffer("token_ids", ids, persistent=False)
        replace = self._replace_logits
        if isinstance(module, nn.Embedding):
            slots = torch.full((module.num_embeddings,), -1, dtype=torch.int32, device=ids.device)
            slots[ids] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
            module.register_buffer("token_slots", slots, persistent=False)
            replace = self._replace_vectors
        self.handle = module.register_forward_hook(replace)
        setattr(module, HELD, self)

    def _replace_vectors(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (…, hidden) with the trained rows at the positions of their tokens."""
        if not self.enabled:
            return output
        slots = module.token_slots[inputs[0]]
        rows = F.embedding(slots.clamp_min(0), module.token_rows.to(output.dtype))
        scale = getattr(module, SCALE, None)
        rows = rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((slots >= 0)[..., None], rows, output)

    def _replace_logits(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (…, vocabulary) with the logits of the trained rows. It is changed in place."""
        if not self.enabled:
            return output
        bias = None if module.bias is None else module.bias[module.token_ids]
        logits = F.linear(inputs[0], module.token_rows.to(inputs[0].dtype), bias)
        return output.index_copy_(-1, module.token_ids, logits.to(output.dtype))


def add_rows(model: nn.Module, ids: Sequence[int]) -> None:
    """Let the rows of the tokens `ids` train in `model`: in its embedding and in its head, once if they are tied.

    They begin as the base's own. Raises AdapterError for ids without a row, and for embeddings of another class.
    """
    if not ids:
        return
    shared: dict[int, nn.Parameter] = {}
    for name, module in _modules(model):
        weight = module.weight
        looks_up = type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, SCALE))
        if not (looks_up or isinstance(module, nn.Linear)) or len(weight) <= max(ids):
            what = f"{name} has no rows of its own for these tokens"
            raise AdapterError(what, where="trainable_tokens", fix="leave trainable_tokens out")
        index = torch.tensor(ids, device=weight.device)
        rows = shared.get(weight.data_ptr())
        if rows is None:
            rows = shared[weight.data_ptr()] = nn.Parameter(weight.detach()[index].float())
        TokenRows(module, index, rows)


def row_modules(model: nn.Module) -> Iterator[tuple[str, TokenRows, nn.Parameter]]:
    """Yield (dotted name, rows, parameter) of the modules of `model` whose rows train; tied ones once."""
    seen: set[int] = set()
    for name, module in _modules(model):
        held = getattr(module, HELD, None)
        if held is not None and id(module.token_rows) not in seen:
            seen.add(id(module.token_rows))
            yield name, held, module.token_rows


@contextmanager
def without_rows(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` answers with the base's own rows."""
    held = [getattr(module, HELD) for _, module in _modules(model) if hasattr(module, HELD)]
    for one in held:
        one.enabled = False
    try:
        yield
    finally:
        for one in held:
            one.enabled = True


@torch.no_grad()
def remove_rows(model: nn.Module, *, keep: bool) -> None:
    """Take the trained rows of `model` out of its modules; with `keep` they become rows of the modules' weights."""
    for _, module in list(_modules(model)):
        held = getattr(module, HELD, None)
        if held is None:
            continue
        held.handle.remove()
        if keep:
            module.weight[held.ids.to(module.weight.device)] = module.token_rows.to(module.weight)
        for name in (HELD, ROWS, "token_ids", "token_slots"):
            if hasattr(module, name):
                delattr(module, name)


@torch.no_grad()
def restore_rows(model: nn.Module, saved: Mapping[str, tuple[tuple[int, ...], Tensor]], where: str) -> None:
    """Copy the `saved` rows, by module name, into those of `model`. Raises AdapterError unless they are the same."""
    live = {name: (held, rows) for name, held, rows in row_modules(model)}
    if set(live) != set(saved):
        odd = min(set(live) ^ set(saved))
        raise AdapterError(f"the adapter does not fit this run: the rows of {odd} are in only one of them", where=where)
    for name, (ids, rows) in saved.items():
        held, parameter = live[name]
        if tuple(held.ids.tolist()) != ids or parameter.shape != rows.shape:
            raise AdapterError(f"the adapter's rows of {name} are not those of this run", where=where)
        parameter.copy_(rows)


def load_rows(model: nn.Module, saved: Mapping[str, tuple[tuple[int, ...], Tensor]], where: str) -> None:
    """Give `model` the `saved` rows, frozen. Raises AdapterError if they do not fit it."""
    if not saved:
        return
    ids = next(iter(saved.values()))[0]
    if any(other != ids for other, _ in saved.values()):
        raise AdapterError("embedding and head have rows of different tokens", where=where)
    add_rows(model, ids)
    restore_rows(model, saved, where)
    for _, _, rows in row_modules(model):
        rows.requires_grad_(False)


def _modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the embedding and the head of `model`, by their dotted names."""
    wanted = [text_decoder(model).get_input_embeddings(), output_head(model)]  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(module)], module) for module in wanted if module is not None and id(module) in names]
