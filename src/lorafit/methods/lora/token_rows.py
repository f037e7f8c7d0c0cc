"""token_rows: train rows of the embedding and the head, in PEFT's formats.

Rows of chosen tokens (`trainable_token_indices`): a hook on the embedding replaces their vectors, and a hook on the
head their logits; PEFT copies the whole table in every forward pass. All rows (`modules_to_save`): see WholeTable.
The modules keep their frozen weights and their classes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.backbone import output_head, text_decoder
from lorafit.config import EMBEDDING, HEAD
from lorafit.errors import AdapterError
from lorafit.methods.lora.whole_table import SCALE, WholeTable, scaled

Saved = Mapping[str, tuple[tuple[int, ...], Tensor]]
"""Module -> (token ids, their rows (n, hidden)) of an adapter's file. No ids stand for all rows."""
ROWS = "token_rows"
"""Name of the parameter (tokens, hidden), fp32, within the embedding and the head."""
HELD = "trained_rows"
"""Name of the attribute of a module that holds its TokenRows."""
ENDING = ".token_adapter.trainable_tokens_delta"
"""What PEFT writes after the module's name in a file."""


class TokenRows:
    """Hold the trained rows of one module, and put them into its output.

    Attributes:
        ids: the tokens (n,) in the order of the rows.
        enabled: False while the base answers.
    """

    parameter = ROWS

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
        return torch.where((slots >= 0)[..., None], scaled(rows, module), output)

    def _replace_logits(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return `output` (…, vocabulary) with the logits of the trained rows. It is changed in place."""
        if not self.enabled:
            return output
        bias = None if module.bias is None else module.bias[module.token_ids]
        logits = F.linear(inputs[0], module.token_rows.to(inputs[0].dtype), bias)
        return output.index_copy_(-1, module.token_ids, logits.to(output.dtype))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the ids of the tokens."""
        return tuple(self.ids.tolist())

    def remove(self, module: Any, *, keep: bool) -> None:
        """Take the rows out of `module`; with `keep` they become rows of its weight."""
        self.handle.remove()
        if keep:
            module.weight[self.ids.to(module.weight.device)] = module.token_rows.to(module.weight)
        for name in (HELD, ROWS, "token_ids", "token_slots"):
            if hasattr(module, name):
                delattr(module, name)


def add_rows(model: nn.Module, ids: Sequence[int]) -> None:
    """Let the rows of the tokens `ids` train in `model`: in its embedding and in its head, once if they are tied.

    They begin as the base's own. Raises AdapterError for ids without a row, and for embeddings of another class.
    """
    shared: dict[int, nn.Parameter] = {}
    for name, module in _modules(model):
        weight = module.weight
        if not _has_rows(module) or len(weight) <= max(ids):
            what = f"{name} has no rows of its own for these tokens"
            raise AdapterError(what, where="trainable_tokens", fix="leave trainable_tokens out")
        index = torch.tensor(ids, device=weight.device)
        rows = shared.get(weight.data_ptr())
        if rows is None:
            rows = shared[weight.data_ptr()] = nn.Parameter(weight.detach()[index].float())
        TokenRows(module, index, rows)


def add_tables(model: nn.Module, wanted: Collection[str]) -> None:
    """Let the whole embedding and head of `model` train, as `wanted` names them: EMBEDDING, HEAD. Tied ones are one.

    Raises AdapterError for a module in 4 bits, or of another class.
    """
    kinds = dict(zip((EMBEDDING, HEAD), _modules(model), strict=False))
    chosen = {module.weight.data_ptr() for kind, (_, module) in kinds.items() if kind in wanted}
    shared: dict[int, nn.Parameter] = {}
    for name, module in kinds.values():
        weight = module.weight
        if weight.data_ptr() not in chosen:
            continue
        if not _has_rows(module) or not weight.is_floating_point():
            what = f"{name} is a {type(module).__name__}, which lorafit does not train whole"
            raise AdapterError(what, where="modules_to_save", fix="leave modules_to_save out")
        if weight.data_ptr() not in shared:
            shared[weight.data_ptr()] = nn.Parameter(weight.detach().float().clone())
        held = WholeTable(module, shared[weight.data_ptr()])
        setattr(module, HELD, held)


def row_modules(model: nn.Module) -> Iterator[tuple[str, TokenRows | WholeTable, nn.Parameter]]:
    """Yield (dotted name, rows, parameter) of the modules of `model` whose rows train.

    Tied ones come once, but whole tables under both names, as PEFT stores them.
    """
    seen: set[int] = set()
    for name, module in _modules(model):
        held = getattr(module, HELD, None)
        if held is None:
            continue
        rows = getattr(module, held.parameter)
        if id(rows) not in seen or isinstance(held, WholeTable):
            seen.add(id(rows))
            yield name, held, rows


def table_names(model: nn.Module) -> list[str]:
    """Return PEFT's `modules_to_save` of `model`: a module's last name, or its full one where others end so too."""
    names = [name for name, held, _ in row_modules(model) if isinstance(held, WholeTable)]
    every = [name for name, _ in model.named_modules()]
    leaves = [name.rpartition(".")[2] for name in names]
    alone = [sum(one.endswith(leaf) for one in every) == 1 for leaf in leaves]
    return [leaf if one else name for name, leaf, one in zip(names, leaves, alone, strict=True)]


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
        if hasattr(module, HELD):
            getattr(module, HELD).remove(module, keep=keep)


@torch.no_grad()
def restore_rows(model: nn.Module, saved: Saved, where: str) -> None:
    """Copy the `saved` rows, by module name, into those of `model`. Raises AdapterError unless they are the same."""
    live = {name: (held, rows) for name, held, rows in row_modules(model)}
    if set(live) != set(saved):
        odd = min(set(live) ^ set(saved))
        raise AdapterError(f"the adapter does not fit this run: the rows of {odd} are in only one of them", where=where)
    copied: set[int] = set()
    for name, (ids, rows) in saved.items():
        held, parameter = live[name]
        if parameter.shape[1:] != rows.shape[1:] or (not ids and len(parameter) != len(rows)):
            what = f"the adapter's {name} is {tuple(rows.shape)}, and this base's {tuple(parameter.shape)}"
            raise AdapterError(what, where=where, fix="use its own base")
        if held.tokens != ids or len(parameter) != len(rows):
            raise AdapterError(f"the adapter's rows of {name} are not those of this run", where=where)
        if id(parameter) in copied and not torch.equal(parameter, rows.to(parameter.device)):
            raise AdapterError("embedding and head are tied in this base, but differ in the adapter", where=where)
        parameter.copy_(rows)
        copied.add(id(parameter))


def load_rows(model: nn.Module, saved: Saved, where: str) -> None:
    """Give `model` the `saved` rows, frozen. Raises AdapterError if they do not fit it."""
    if not saved:
        return
    ids = next(iter(saved.values()))[0]
    if any(other != ids for other, _ in saved.values()):
        raise AdapterError("embedding and head have rows of different tokens", where=where)
    if ids:
        add_rows(model, ids)
    else:
        kinds = {name: kind for kind, (name, _) in zip((EMBEDDING, HEAD), _modules(model), strict=False)}
        if other := sorted(set(saved) - set(kinds)):
            what = f"the adapter trains the whole of {other[0]}, and lorafit reads embedding and head alone"
            raise AdapterError(what, where=where, fix="load it with PEFT")
        add_tables(model, [kinds[name] for name in saved])
    restore_rows(model, saved, where)
    for _, _, rows in row_modules(model):
        rows.requires_grad_(False)


def _has_rows(module: Any) -> bool:
    """Return True for a linear, and for an embedding that looks up and scales."""
    looks_up = type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, SCALE))
    return looks_up or isinstance(module, nn.Linear)


def _modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the embedding and the head of `model`, by their dotted names."""
    wanted = [text_decoder(model).get_input_embeddings(), output_head(model)]  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(module)], module) for module in wanted if module is not None and id(module) in names]
