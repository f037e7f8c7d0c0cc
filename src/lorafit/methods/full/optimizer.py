"""optimizer: updates of 16-bit weights that lose nothing.

bf16 has 8 bits of precision: an update below 1/256 of a weight would round away. Either fp32 master copies take the
updates (Micikevicius et al., arXiv:1710.03740), or each update is rounded up or down by chance, so that its mean is
right (stochastic rounding, Gupta et al., arXiv:1502.02551).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone.kernels.frozen_linear_op import kernels_work
from lorafit.methods.full.sharding import is_shard, own_shard

kernel: Any = None
if importlib.util.find_spec("triton") is not None:
    from lorafit.backbone.kernels import adam_8bit as kernel

PART_ELEMENTS = 1 << 28
"""Most elements whose fp32 gradients exist at one time: 1 GiB."""
CHUNK = 1 << 24
"""Elements that are rounded at a time."""
LOW_BITS = 16
"""Bits of an fp32 number that bf16 drops."""
BLOCK = 256
"""Values that share a scale in bitsandbytes' 8-bit moments. CHUNK is a multiple."""
MOMENTS = frozenset({"state1", "state2", "absmax1", "absmax2"})
"""Moments and their scales, as bitsandbytes names them."""

Groups = Sequence[dict[str, Any]]


def optimizer_of(kind: type, groups: Groups, options: Mapping[str, Any]) -> Any:
    """Return `kind` over `groups`, with master copies or stochastic rounding where weights have 16 bits.

    torch's optimizers get master copies; the others, 8-bit ones that update weight by weight, round stochastically.
    """
    weights = [weight for group in groups for weight in group["params"]]
    if any(is_shard(weight) for weight in weights):
        return ShardedOptimizer(kind, groups, options)
    if all(weight.dtype is torch.float32 for weight in weights):
        return kind(groups, **options)
    if kind.__module__.startswith("torch."):
        return MasterWeights(kind, groups, options)
    return with_stochastic_rounding(kind)(groups, **options)


class MasterWeights(torch.optim.Optimizer):
    """Update fp32 copies of 16-bit weights, and round the weights from them.

    Its parameters are the model's weights. Gradients are widened for at most PART_ELEMENTS weights at a time.
    """

    def __init__(self, kind: Any, groups: Groups, options: Mapping[str, Any]) -> None:
        super().__init__([dict(group) for group in groups], dict(options))
        self.masters: dict[nn.Parameter, nn.Parameter] = {
            weight: weight if weight.dtype is torch.float32 else nn.Parameter(weight.detach().float())
            for group in self.param_groups
            for weight in group["params"]
        }
        self._parts = [
            (number, part, kind([{**_settings(group), "params": [self.masters[weight] for weight in part]}], **options))
            for number, group in enumerate(self.param_groups)
            for part in _parts(group["params"])
        ]
        for number, _, inner in self._parts:  # settings that `kind` adds
            self.param_groups[number] = {**inner.param_groups[0], **self.param_groups[number]}
        if self._parts:
            self.defaults = {**self._parts[0][2].defaults, **self.defaults}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. `found_inf` works as in torch's fused optimizers."""
        assert closure is None, "a step has its gradients already"
        for number, part, inner in self._parts:
            inner.param_groups[0].update(_settings(self.param_groups[number]))
            inner.found_inf = getattr(self, "found_inf", None)
            own = [weight for weight in part if self.masters[weight] is not weight]
            for weight in own:
                self.masters[weight].grad = None if weight.grad is None else weight.grad.float()
            inner.step()
            for weight in own:
                weight.copy_(self.masters[weight])
                self.masters[weight].grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the master copies, and their moments, by the number of the weight."""
        packed = super().state_dict()
        moments: dict[Tensor, Any] = {}
        for _, _, inner in self._parts:
            moments |= inner.state
        masters = list(self.masters.items())
        state = {
            number: {**moments.get(master, {}), **({} if master is weight else {"master": master.detach()})}
            for number, (weight, master) in enumerate(masters)
        }
        return {"state": state, "param_groups": packed["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `state_dict`; nothing is rounded to 16 bits."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        masters = list(self.masters.values())
        places = {master: inner for _, part, inner in self._parts for master in (self.masters[one] for one in part)}
        for number, saved in state_dict["state"].items():
            master = masters[number]
            moments = {
                name: value.to(master.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in saved.items()
            }
            if "master" in moments:
                master.data.copy_(moments.pop("master"))
            places[master].state[master] = moments


class ShardedOptimizer(torch.optim.Optimizer):
    """Update this process's shard of every weight, as a tensor of its own, as one process updates whole weights.

    Its parameters are the model's weights; its state is that of the shards.
    """

    def __init__(self, kind: Any, groups: Groups, options: Mapping[str, Any]) -> None:
        super().__init__([dict(group) for group in groups], dict(options))
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self.shards: dict[nn.Parameter, nn.Parameter] = {weight: nn.Parameter(own_shard(weight)) for weight in weights}
        own = [
            {**_settings(group), "params": [self.shards[weight] for weight in group["params"]]}
            for group in self.param_groups
        ]
        self.inner = optimizer_of(kind, own, options)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({**_settings(inner), **_settings(group)})  # settings that `kind` adds
        self.defaults = {**self.inner.defaults, **self.defaults}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient. `found_inf` works as in torch's fused optimizers."""
        assert closure is None, "a step has its gradients already"
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_settings(group))
        for weight, shard in self.shards.items():
            shard.grad = None if weight.grad is None else own_shard(weight.grad)
        self.inner.found_inf = getattr(self, "found_inf", None)
        self.inner.step()
        for shard in self.shards.values():
            shard.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this process's shards, by the number of the weight."""
        inner: dict[str, Any] = self.inner.state_dict()
        return {**inner, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `state_dict` of the same shards."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.inner.load_state_dict(state_dict)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _parts(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield `weights` in parts of at most PART_ELEMENTS elements, or of one weight."""
    part: list[nn.Parameter] = []
    for weight in weights:
        if part and sum(one.numel() for one in part) + weight.numel() > PART_ELEMENTS:
            yield part
            part = []
        part.append(weight)
    if part:
        yield part


def with_stochastic_rounding(kind: Any) -> type:
    """Return bitsandbytes' optimizer `kind` for bf16 weights: each is updated in fp32 and rounded by chance."""

    class Rounding(kind):  # type: ignore[misc]
        ahead: Any = None
        """The MomentsAhead that bring 8-bit moments from the host; None where they are on the weight's device."""

        @torch.no_grad()
        def update_step(self, group: Any, weight: Any, group_index: int, index: int) -> None:
            if weight.dtype is not torch.bfloat16:
                super().update_step(group, weight, group_index, index)
                return
            state, narrow, gradient = self.state[weight], weight.data.view(-1), weight.grad.reshape(-1)
            is_8bit = state["state1"].dtype is torch.uint8
            comes = self.ahead is not None and is_8bit
            at_once = None
            if is_8bit and self.optimizer_name == "adam" and _has_kernel(weight):
                settings, seed = self.get_config(group_index, index, group), kernel.random_seed(weight.device)
                at_once = partial(kernel.adam_8bit, settings=settings, seed=seed)
            values = narrow.numel() if at_once and not comes else CHUNK
            for start in range(0, narrow.numel(), values):
                part = slice(start, start + values)
                take = self.ahead.take if comes else _part_of
                own = take(state, part, narrow.numel())
                if at_once:
                    own["step"] += 1
                    at_once(narrow[part], gradient[part], own, first=start)
                else:
                    wide = nn.Parameter(narrow[part].float())
                    wide.grad = gradient[part].float()
                    self.state[wide] = own
                    super().update_step(group, wide, group_index, index)
                    narrow[part] = stochastically_rounded(wide.data)
                    del self.state[wide]
                if comes:
                    self.ahead.put_back()
            state["step"] += 1

    Rounding.__name__ = f"Rounding{kind.__name__}"
    return Rounding


def _has_kernel(weight: Tensor) -> bool:
    """Return True if Triton builds kernels for the device of `weight`."""
    return kernel is not None and weight.is_cuda and kernels_work(weight.device.index)


def _part_of(state: Mapping[str, Any], part: slice, count: int) -> dict[str, Any]:
    """Return the state of a `part` of a weight of `count` values, as views."""
    return {
        name: value.view(-1)[place_of(value, part, count)] if name in MOMENTS else value
        for name, value in state.items()
    }


def place_of(value: Tensor, part: slice, count: int) -> slice:
    """Return the place of a part of `count` values in `value`, which has one for each, or for each of its blocks."""
    each = 1 if value.numel() == count else BLOCK
    return slice(part.start // each, -(-min(part.stop, count) // each))


def stochastically_rounded(wide: Tensor) -> Tensor:
    """Return `wide` (fp32) in bf16, up or down by chance so that the mean is `wide`.

    A random number is added to the 16 bits that bf16 drops. Numbers that bf16 holds, and infinities, stay as they are.
    The chance comes from torch's own generator of the device.
    """
    bits = wide.contiguous().view(torch.int32)
    chance = torch.randint(0, 1 << LOW_BITS, bits.shape, dtype=torch.int32, device=bits.device)
    rounded = (bits + chance).bitwise_and_(-(1 << LOW_BITS)).view(torch.float32)
    return torch.where(torch.isfinite(wide), rounded, wide).to(torch.bfloat16)
