"""Projection: one kind of matrix in a decoder, and whether it takes an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.shapes.families import ATTENTION_ROLES, EXPERT_NAMES, Role


@dataclass(frozen=True, slots=True)
class Projection:
    """Hold one kind of projection of the decoder.

    Attributes:
        name: Name of the module.
        path: Module path within the layer.
        role: What the projection does.
        inputs: Columns of one matrix (outputs, inputs).
        outputs: Rows of one matrix.
        count: Matrices of this kind in the model.
        stacked: Whether they are 3-D parameters of experts, not modules.
        active: Share of the matrices that one token passes.
        group: Matrices in one tensor, the experts of a layer.
        packs: Whether 4-bit quantization packs it.
        obstacle: Why it cannot take an adapter; empty when it can.
    """

    name: str
    path: str
    role: Role
    inputs: int
    outputs: int
    count: int
    stacked: bool = False
    active: float = 1.0
    group: int = 1
    packs: bool = True
    obstacle: str = ""

    @property
    def parameters(self) -> int:
        """Weights in all `count` matrices."""
        return self.inputs * self.outputs * self.count

    @property
    def tensor_parameters(self) -> int:
        """Weights of one tensor: of a linear module, or of all experts of a layer."""
        return self.inputs * self.outputs * self.group

    @property
    def is_beside_experts(self) -> bool:
        """True for a feed-forward beside experts that takes an adapter as a parameter, when it is asked for."""
        return self.obstacle == EXPERT_NAMES

    @property
    def is_adaptable(self) -> bool:
        """True if an adapter on it is possible."""
        return self.packs if self.stacked else not self.obstacle or self.is_beside_experts

    @property
    def is_attention(self) -> bool:
        """True for projections to queries, keys and values, and for attention's output."""
        return self.role in ATTENTION_ROLES

    def is_named(self, name: str) -> bool:
        """Return True if `name` is its name, or a dotted ending of the module's path.

        A path within a layer may be shorter than `name`, which may begin outside of the layer. Experts are named with
        their module, as `experts.down_proj`: their last name alone is that of linears beside them.
        """
        if self.stacked and "." not in name:
            return False
        return self.name == name or f".{self.path}".endswith(f".{name}") or name.endswith(f".{self.path}")
