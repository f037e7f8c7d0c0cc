"""Projections: every matrix of a model's decoder, with its role and whether it takes an adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from lorafit.backbone.architecture import (
    architecture_of,
    bare_weights,
    decoder_layers,
    output_head,
    text_decoder,
    unwrapped,
)
from lorafit.backbone.experts.frozen_experts import SUFFIX, FrozenExpertsLinear, experts_to_quantize
from lorafit.shapes import Projection
from lorafit.shapes.families import EXPERT_NAMES

ROLES = {
    "q": "q_proj q_lin query wq q q_a_proj q_b_proj",
    "k": "k_proj k_lin key wk k",
    "v": "v_proj v_lin value wv v v_proj_current v_proj_delayed",
    "qkv": "qkv_proj query_key_value c_attn Wqkv qkv att_proj attn_qkv in_proj_qkv in_proj_qkvz",
    "kv": "kv_a_proj_with_mqa kv_a_proj kv_b_proj kv_proj",
    "o": "o_proj out_proj out_lin dense wo attn_out",
    "gate": "gate_proj w1 gate_linear",
    "up": "up_proj w3 fc1 c_fc dense_h_to_4h fc_in linear_1",
    "gate_up": "gate_up_proj input_linear ff_proj",
    "down": "down_proj w2 fc2 dense_4h_to_h fc_out output_linear linear_2 ff_out",
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}
OF_ATTENTION = ("q", "k", "v", "qkv", "kv", "o")
CERTAIN = frozenset("q_proj k_proj v_proj qkv_proj query_key_value Wqkv in_proj_qkv in_proj_qkvz kv_b_proj".split())
"""Names that only attention has, in a module of any name."""
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linears that choose experts. They take no adapter, since tuning the routing unbalances the experts."""
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
OLD_EXPERTS = {"mixtral": frozenset({"w1", "w2", "w3"}), "qwen2_moe": frozenset({"gate_proj", "up_proj", "down_proj"})}
"""Names that PEFT rewrites into parameters of the experts (`peft.utils.transformers_weight_conversion`)."""
OWN_PATTERNS = {"mixtral": "mixtral"}
MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""Model types whose `out_proj` PEFT refuses by name."""
MAMBA = "Mamba's kernels read its weight past an adapter"
READ = "the model's code reads its weight past an adapter"
CROSS = "it attends to an encoder, which a decoder alone does not have"
CROSS_NAMES = frozenset({"encoder_attn", "crossattention", "cross_attn"})
OWN_PRODUCT = "its class computes more than a product with its weight"
RENAMED = "PEFT renames the keys of its adapter when it loads them, and does not find it again"
SHARED = "several layers share its weight, and adapters would make it a different one in each"
INDEXER = "it only chooses which tokens are seen, so no gradient reaches it"


class _Matrix(NamedTuple):
    path: str
    inputs: int
    outputs: int
    stacked: bool
    role: str
    obstacle: str
    group: int = 1
    packs: bool = True


def projections_of(model: nn.Module) -> tuple[Projection, ...]:
    """Return each kind of matrix in the decoder of `model`, with its count and its share for one token.

    The first layer that has a kind gives its place. Matrices outside the layers come last.
    """
    text, decoder = architecture_of(model).get_text_config(), text_decoder(model)
    layers = decoder_layers(model)
    head, obstacles = output_head(model), adapter_obstacles(model)
    seen = set() if head is None else {id(head.weight)}
    experts, chosen = first_number(text, EXPERTS), first_number(text, EXPERTS_PER_TOKEN)
    share = min(1.0, chosen / experts) if experts and chosen else 1.0
    matrices = _Matrices(int(text.hidden_size), experts, obstacles, _packable(model), seen)
    found = Counter(matrix for part in [*layers, decoder] for matrix in matrices.of(part))
    return tuple(
        Projection(
            name=path.rpartition(".")[2],
            path=path,
            role=role,  # type: ignore[arg-type]
            inputs=inputs,
            outputs=outputs,
            count=count,
            stacked=stacked,
            active=share if stacked or ".experts." in f".{path}" else 1.0,
            group=group,
            packs=packs,
            obstacle=obstacle,
        )
        for (path, inputs, outputs, stacked, role, obstacle, group, packs), count in found.items()
    )


def adapter_obstacles(model: nn.Module) -> dict[nn.Module, str]:
    """Return the linears of `model` that `all-linear` leaves out, each with the reason."""
    kind = str(architecture_of(model).model_type)
    old, bare = names_of_old_experts(model), bare_weights(model)
    indexers = {id(part) for one in model.modules() if "Indexer" in type(one).__name__ for part in one.modules()}
    tied = getattr(unwrapped(model), "all_tied_weights_keys", {})
    shared = {name.removesuffix(".weight") for name in (*tied.keys(), *tied.values())}
    rules = get_model_conversion_mapping(unwrapped(model))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    obstacles = {}
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if not is_plain_linear(module):
            continue
        if leaf == "out_proj" and (path in bare or kind in MAMBA_TYPES):
            obstacles[module] = MAMBA
        elif path in bare:
            obstacles[module] = READ
        elif path in shared:
            obstacles[module] = SHARED
        elif CROSS_NAMES.intersection(path.split(".")):
            obstacles[module] = CROSS
        elif id(module) in indexers:
            obstacles[module] = INDEXER
        elif not _is_plain_product(module):
            obstacles[module] = OWN_PRODUCT
        elif _is_renamed(path, renamings):
            obstacles[module] = RENAMED
        elif leaf in old:
            obstacles[module] = EXPERT_NAMES
    return obstacles


def names_of_old_experts(model: nn.Module) -> frozenset[str]:
    """Return the names of linears that PEFT rewrites into parameters of the experts of `model`."""
    kind = str(architecture_of(unwrapped(model)).model_type)
    return OLD_EXPERTS.get({**_MODEL_TO_CONVERSION_PATTERN, **OWN_PATTERNS}.get(kind, ""), frozenset())


def _is_renamed(path: str, renamings: list[WeightRenaming]) -> bool:
    """Return True if transformers' rules for checkpoints, which PEFT applies to adapters, rename that of `path`."""
    name = renamed = f"{path}.lora_A.weight"
    for rule in renamings:
        renamed, _ = rule.rename_source_key(renamed)
    return not name.endswith(renamed)


def _is_plain_product(module: nn.Module) -> bool:
    """Return False for a subclass of Linear whose output is another one, as that of grouped projections is."""
    kind = type(module)
    if isinstance(module, Conv1D) or not kind.__module__.startswith("transformers."):
        return True
    weights = {name: torch.empty_like(weight, device="meta") for name, weight in module.named_parameters()}
    inputs, outputs = linear_size(module)
    try:
        out = functional_call(module, weights, torch.empty(1, 2, inputs, dtype=weights["weight"].dtype, device="meta"))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, 2, outputs)


def linear_size(module: Any) -> tuple[int, int]:
    """Return inputs and outputs of a Linear or Conv1D, in 4 bits too."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def experts_per_token(model: nn.Module) -> int:
    """Return the experts that one token of `model` visits; 1 without experts."""
    text = architecture_of(unwrapped(model)).get_text_config()
    return first_number(text, EXPERTS_PER_TOKEN) if first_number(text, EXPERTS) else 1


def is_mixture(model: nn.Module) -> bool:
    """Return True if `model` routes its tokens to experts."""
    return first_number(architecture_of(unwrapped(model)).get_text_config(), EXPERTS) > 1


def first_number(text: Any, keys: tuple[str, ...]) -> int:
    """Return the first positive number among the configuration's `keys`; 0 without one."""
    values = (getattr(text, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


@dataclass(frozen=True, slots=True)
class _Matrices:
    """Find the matrices of a model's parts, each once.

    Attributes:
        hidden: Width of the residual stream.
        experts: Experts of a layer.
        obstacles: Linears that take no adapter.
        packable: Identities of the stacked weights that 4-bit quantization packs.
        seen: Identities of the weights that were found already.
    """

    hidden: int
    experts: int
    obstacles: dict[nn.Module, str]
    packable: set[int]
    seen: set[int]

    def of(self, part: nn.Module) -> Iterator[_Matrix]:
        """Yield each matrix of `part` that is new: the linears, then the stacked experts one by one."""
        kinds = {path: type(module).__name__ for path, module in part.named_modules()}
        for path, module in part.named_modules():
            if is_plain_linear(module) and self._is_new(module.weight):
                name = EXPERT.sub(r"\1experts.", path)
                role = _role(name, kinds[path.rpartition(".")[0]])
                yield _Matrix(name, *linear_size(module), False, role, self.obstacles.get(module, ""))
        for path, weight, (count, outputs, inputs) in _stacked(part, self.experts):
            if self._is_new(weight):
                role = _role(path, "")
                if (outputs if role == "down" else inputs) != self.hidden:  # it lies transposed
                    inputs, outputs = outputs, inputs
                matrix = _Matrix(path, inputs, outputs, True, role, "", count, id(weight) in self.packable)
                yield from (matrix for _ in range(count))

    def _is_new(self, weight: Any) -> bool:
        is_new = id(weight) not in self.seen
        self.seen.add(id(weight))
        return is_new


def _packable(model: nn.Module) -> set[int]:
    """Return the identities of the stacked weights of `model` that are in 4 bits, or that loading would pack."""
    frozen = {id(module.weight) for module in model.modules() if isinstance(module, FrozenExpertsLinear)}
    return frozen | {id(model.get_parameter(name)) for name in experts_to_quantize(model)}


def is_plain_linear(module: nn.Module) -> bool:
    """Return True for a module with one matrix: no experts, which have one each."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, FrozenExpertsLinear)


def _stacked(part: nn.Module, experts: int) -> Iterator[tuple[str, Any, tuple[int, int, int]]]:
    """Yield name, weight and shape of each parameter with the matrices of all experts, in 4 bits too."""
    for path, module in part.named_modules():
        if isinstance(module, FrozenExpertsLinear):
            yield path.removesuffix(SUFFIX), module.weight, module.stored
    for path, weight in part.named_parameters():
        if _is_stacked(path, weight, experts):
            count, rows, columns = weight.shape
            yield path, weight, (count, rows, columns)


def _is_stacked(path: str, weight: Any, experts: int) -> bool:
    """Return True for a parameter with the matrices of all experts."""
    return weight.dim() == 3 and (".experts." in f".{path}" or (weight.shape[0] == experts > 1))


def _role(path: str, holder: str) -> str:
    """Return the role of a matrix by its name, else by the module that holds it."""
    # a linear that its own module wraps has that module's name
    leaf, place = path.removesuffix(".weight").removesuffix(".linear").rpartition(".")[2], f"{path} {holder}".lower()
    if not {leaf, *path.split(".")[-2:-1]}.isdisjoint(ROUTERS):
        return "other"
    in_attention = "attn" in place or "attention" in place or leaf in CERTAIN
    if leaf == "c_proj":
        return "o" if in_attention else "down"
    role = ROLE_OF.get(leaf)
    if role and in_attention == (role in OF_ATTENTION):
        return role
    return "attention" if in_attention else "mixer"
