"""in_backward: an optimizer that updates each weight within the backward pass, with moments in host memory.

A weight is updated as soon as its gradient is whole, and the gradient is freed (Lv et al., arXiv:2306.09782). The
gradients of one layer exist at a time, and the GPU holds no moments: weights in 16 bits take 2 bytes each there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.memory.inputs import UPDATE_BYTES
from lorafit.methods.full.moments_ahead import MomentsAhead
from lorafit.methods.full.optimizer import CHUNK, MOMENTS, with_stochastic_rounding
from lorafit.methods.full.sharding import is_shard

UPDATE_VALUE_BYTES = UPDATE_BYTES // CHUNK
"""Bytes of an update for each value of a chunk: fp32 copies, buffers of moments, and chances."""
PAGED = "paged_adamw_8bit"
"""Setting `optimizer` of such a run."""
WRAPPED = "__bnb_optimizer_quant_state__"
"""Key under which bitsandbytes' `state_dict` keeps the moments of a weight."""


def updates_in_backward(optimizer: str, weights: Sequence[Tensor]) -> bool:
    """Return True if `weights` of one process in bf16 train with the setting `optimizer` by StepInBackward."""
    return optimizer == PAGED and not any(is_shard(weight) or weight.dtype is not torch.bfloat16 for weight in weights)


class StepInBackward(torch.optim.Optimizer):
    """Update 16-bit weights by bitsandbytes' 8-bit optimizer `kind` while the backward pass runs.

    The gradients of earlier micro-batches of a step wait in host memory. No norm over all weights is known in time, so
    each weight's own gradient is clipped. Once a gradient is not finite, no further weight of that step is updated.

    Attributes:
        is_torn: True while some weights of a step are updated, and others are not.
    """

    def __init__(self, kind: Any, groups: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> None:
        super().__init__([dict(group) for group in groups], dict(options))
        own = {**options, "is_paged": False}
        self.inner = with_stochastic_rounding(_with_host_moments(kind))([dict(group) for group in groups], **own)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults
        self._places = _places_in(self.param_groups)
        self.inner.ahead = MomentsAhead(next(iter(self._places)).device)
        self._waiting = _OnHost()
        self._norms: list[Tensor] = []
        self._left: dict[nn.Parameter, int] = {}
        self._most, self._is_bad, self.is_torn = math.inf, False, False
        for weight in list[Any](self._places):
            if hasattr(weight, "updating"):  # by an optimizer before a rollback
                weight.updating.remove()
            weight.updating = weight.register_post_accumulate_grad_hook(self._arrived)

    def begin(self, micro_batches: int, most: float) -> None:
        """Expect the gradients of a step of `micro_batches`; each weight's is clipped to a norm of `most`."""
        self._left = dict.fromkeys(self._places, micro_batches)
        self._most, self._is_bad, self.is_torn = most, False, False
        self._norms.clear()
        self._waiting.forget()
        self.inner.ahead.begin()

    def finish(self) -> Tensor:
        """Update weights that the last micro-batch gave no gradient, and return the norm of all gradients ()."""
        for weight in [one for one in self._places if one in self._waiting]:
            self._update(weight, self._waiting.take(weight))
        self.is_torn = False
        if not self._norms:
            return torch.zeros((), device=next(iter(self._places)).device)
        return torch.stack(self._norms).square().sum().sqrt()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the backward pass has updated the weights."""
        assert closure is None, "a step has its gradients already"

    def state_dict(self) -> dict[str, Any]:
        """Return the moments by the number of the weight."""
        state: dict[str, Any] = self.inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `state_dict`; moments stay in host memory."""
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self._places = _places_in(self.param_groups)

    @torch.no_grad()
    def _arrived(self, weight: nn.Parameter) -> None:
        """Take the gradient that a backward pass has just added to `weight`."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        self._left[weight] -= 1
        if weight in self._waiting:
            gradient = self._waiting.take(weight).add_(gradient)
        if self._left[weight] > 0:
            self._waiting.put(weight, gradient)
        else:
            self._update(weight, gradient)

    @torch.no_grad()
    def _update(self, weight: nn.Parameter, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._norms.append(norm)
        # the host waits for each norm: an update that has begun cannot be taken back
        self._is_bad = self._is_bad or not bool(norm.isfinite())
        if self._is_bad:
            return
        self.is_torn = True
        group, number, place = self._places[weight]
        weight.grad = gradient.mul_((self._most / (norm + 1e-6)).clamp(max=1.0))
        if not self.state[weight]:
            self.inner.init_state(group, weight, number, place)
        self.inner.update_step(group, weight, number, place)
        weight.grad = None


def _places_in(groups: Sequence[dict[str, Any]]) -> dict[nn.Parameter, tuple[dict[str, Any], int, int]]:
    """Return the group of each weight, its number, and the weight's place in it."""
    return {
        weight: (group, number, place)
        for number, group in enumerate(groups)
        for place, weight in enumerate(group["params"])
    }


class _OnHost:
    """Hold gradients in pinned host memory. Each weight keeps its buffer."""

    def __init__(self) -> None:
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._filled: set[nn.Parameter] = set()

    def __contains__(self, weight: nn.Parameter) -> bool:
        return weight in self._filled

    def put(self, weight: nn.Parameter, gradient: Tensor) -> None:
        """Copy `gradient` to the host."""
        if weight not in self._buffers:
            self._buffers[weight] = on_host(gradient)
        self._buffers[weight].copy_(gradient, non_blocking=True)
        self._filled.add(weight)

    def take(self, weight: nn.Parameter) -> Tensor:
        """Return the gradient on the weight's device; none is left here."""
        self._filled.remove(weight)
        return self._buffers[weight].to(weight.device, non_blocking=True, copy=True)

    def forget(self) -> None:
        """Forget the gradients, and keep the memory."""
        self._filled.clear()


def on_host(tensor: Tensor) -> Tensor:
    """Return an empty tensor like `tensor` in host memory, pinned for a CUDA device."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _with_host_moments(kind: Any) -> type:
    """Return bitsandbytes' optimizer `kind` with its 8-bit moments in host memory."""

    class HostMoments(kind):  # type: ignore[misc]
        def init_state(self, group: Any, weight: Any, group_index: int, index: int) -> None:
            super().init_state(group, weight, group_index, index)
            _to_host(self.state[weight])

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            weights = [weight for group in self.param_groups for weight in group["params"]]
            super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
            for number, saved in state_dict["state"].items():
                weight = weights[number]
                flat = {**{name: value for name, value in saved.items() if name != WRAPPED}, **saved.get(WRAPPED, {})}
                self.state[weight] = {
                    name: value.to(weight.device) if isinstance(value, Tensor) and name not in MOMENTS else value
                    for name, value in flat.items()
                }
                _to_host(self.state[weight], weight.device)

    return HostMoments


def _to_host(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Move 8-bit moments and their scales to the host. Moments in fp32, of few weights, go to `device` if given."""
    is_narrow = state["state1"].dtype is torch.uint8
    for name in MOMENTS:
        if name in state and is_narrow:
            held = torch.empty_like(state[name], device="cpu", pin_memory=torch.cuda.is_available())
            state[name] = held.copy_(state[name])
        elif name in state and device is not None:
            state[name] = state[name].to(device)


@contextmanager
def gradients_as_in_steps(weights: Sequence[Tensor]) -> Iterator[None]:
    """Free the gradients of `weights` as updates in the backward pass do, within the block; nothing is updated."""

    def pass_by(weight: nn.Parameter) -> None:
        torch.empty(min(UPDATE_BYTES, UPDATE_VALUE_BYTES * weight.numel()), dtype=torch.uint8, device=weight.device)
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(pass_by) for weight in list[Any](weights)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
