"""DecoderLayers: how a model's decoder layers run in training: compiled once for all, recomputed and offloaded by dial.

Installed through the seam that transformers has for gradient checkpointing (`GradientCheckpointingLayer`): each layer
hands its call to a function that lorafit sets. Nothing of the model is replaced, and evaluation and generation,
which do not train, run as transformers wrote them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafit.backbone import FrozenLinear4bit
from lorafit.config.dial import Dial
from lorafit.engine.layers.offload import HostOffload
from lorafit.engine.layers.recompute import feed_forward_widths, recompute_contexts
from lorafit.engine.packing import Segments
from lorafit.errors import BackboneError

VARIANTS = 64
"""Compiled variants of one layer class that torch may make: two windows, two levels, with and without gradients."""

SIZE_ASSERTS = False
"""Whether compiled code checks the strides of whatever operators return, at every call: a tenth of what a layer costs
the processor (bench/overhead.py). The test suite has it on."""

Call = Callable[..., Any]


class DecoderLayers:
    """The decoder layers of `model`, run as `dial` says; `with layers:` around training installs them.

    `compiled` says whether layers are compiled at present; a family whose layer does not compile whole goes on
    eager, and `notes` say why, as `tell` is told. `compile_s` is what compiling took so far.
    """

    def __init__(
        self, model: Any, dial: Dial | None = None, *, compiled: bool = True, backend: str = "inductor"
    ) -> None:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = core.get_decoder()
        self.layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.frozen = [
            [module for module in layer.modules() if isinstance(module, FrozenLinear4bit)] for layer in self.layers
        ]
        self.core, self.dial = core, (dial or Dial()).clamped(len(self.layers))
        self.widths = feed_forward_widths(core.config)
        self.compiled, self.backend = compiled, backend
        self.offload = HostOffload()
        self.notes: list[str] = []
        self.compile_s = 0.0
        self.turned = 0  # how often weights were unpacked or packed again, and so lie elsewhere
        self.observe: Call | None = None
        self.tell: Callable[[str], object] | None = None
        self._less: Callable[[], bool] | None = None
        self._bodies: dict[str, Call] = {}
        self._weights: list[frozenset[int]] = []
        self._warm: set[tuple[type, str]] = set()
        self._varying: set[int] = set()
        self._index = {id(layer): place for place, layer in enumerate(self.layers)}

    def __len__(self) -> int:
        return len(self.layers)

    def __enter__(self) -> DecoderLayers:
        if not self.layers:
            raise BackboneError("the base has no decoder layers that lorafit knows", where=type(self.core).__name__)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        # what a trace holds of ours stands in its graph whole: it may be kept on disk (see recompute_contexts)
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        try:
            self._unpack_weights()
        except torch.OutOfMemoryError:
            self._unpack_weights(False)
            raise
        self.core.enable_input_require_grads()  # else the first layer alone would be compiled once more
        for layer in self.layers:
            layer._gradient_checkpointing_func = self._run
            layer.gradient_checkpointing = True
        return self

    def __exit__(self, *unused: Any) -> None:
        self._unpack_weights(False)
        for layer in self.layers:
            layer.gradient_checkpointing = False
        self.core.disable_input_require_grads()

    def tighten(self) -> bool:
        """Recompute or offload more than before, in the middle of a run; False when all of it is already."""
        tighter = self.dial.tighter(len(self.layers))
        # embeddings and micro-batches are the end of the dial, and not for the layers to change
        least = (len(self), len(self), 0, 0)
        if tighter is None or _of_layers(tighter) == _of_layers(self.dial) == least:
            return False
        self.dial = tighter
        self.follow(())  # the schedule was made for the dial before
        self._unpack_weights()
        return True

    def relieve(self) -> bool:
        """Take a little less memory, in the middle of a run that fits but barely: as little as the dial was solved for,
        where it was, else as `tighten` does. False when nothing can be done."""
        if self._less is not None and self._less():
            self.offload.begin()  # what was kept of the last micro-batch is not this dial's
            return True
        return self.tighten()

    def _unpack_weights(self, keep: bool = True) -> None:
        """Keep the weights of `dial.dense` layers unpacked on the card; a CPU has had its own copies since loading."""
        dense = self.dial.dense if keep else 0
        on_card = [[module for module in linears if module.weight.is_cuda] for linears in self.frozen]
        for module in chain(*on_card[dense:]):  # before anything is taken
            module.drop_dense()
        for module in chain(*on_card[:dense]):
            if not module.copies:
                module.keep_dense()
        self._weights = [_storages(layer) for layer in self.layers]
        self.turned += 1

    def follow(self, schedule: Sequence[int], less: Callable[[], bool] | None = None) -> None:
        """Offload by this schedule (see HostOffload) for as long as the dial stays as it is. `less` turns that a little
        tighter, and says whether it could (see `relieve`)."""
        self.offload.schedule, self._less = schedule, less

    def note(self, text: str) -> None:
        """Have `text` stand in the run's engine.json, and told."""
        self.notes.append(text)
        if self.tell is not None:
            self.tell(text)

    def _run(self, call: partial[Any], *inputs: Any) -> Any:
        """What a decoder layer's call becomes: `call` holds the layer's forward and its keyword arguments."""
        layer, forward = _bound(call)
        index = self._index[id(layer)]
        if index == 0:
            self._varying.clear()
        if self.observe is not None:
            self.observe(partial(self._at_level, layer, forward, call.keywords), *inputs)
        if not self.dial.offload:
            return self._at_level(layer, forward, call.keywords, self.dial.level(index), *inputs)
        if index == 0:
            self.offload.begin()
        keep = self._weights[index] | _shared(call.keywords)
        with self.offload.around(index, index < self.dial.offload, keep):
            out = self._at_level(layer, forward, call.keywords, self.dial.level(index), *inputs)
        if index == len(self.layers) - 1:
            self.offload.end_forward(len(self.layers))
        return out

    def _at_level(self, layer: Any, forward: Call, options: dict[str, Any], level: str, *inputs: Any) -> Any:
        """One layer's forward at a level of the dial."""
        if level == "feed_forward" and not (self.compiled and self.widths):
            level = "whole"
        if level == "whole":
            again = partial(self._at_level, layer, forward, options, "keep")
            return checkpoint(again, *inputs, use_reentrant=False)
        if not self.compiled:
            return forward(layer, *inputs, **options)
        self._let_vary(inputs, options)
        started = time.perf_counter()
        try:
            out = self._body(level)(forward, layer, *inputs, **options)
        except TorchDynamoException as error:
            self.compiled = False
            # what a backend raised stands below a line that only says so
            reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            self.note(f"{type(layer).__name__} does not compile ({reason}); its layers run one operation at a time")
            return self._at_level(layer, forward, options, level, *inputs)
        if (type(layer), level) not in self._warm:
            self._warm.add((type(layer), level))
            self.compile_s += time.perf_counter() - started
        return out

    def _let_vary(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Token counts and row layouts change from one micro-batch to the next: compile for all of them at once."""
        # all layers are given the same options: each is looked at once in a forward
        new = [value for value in options.values() if value is not None and id(value) not in self._varying]
        self._varying.update(map(id, new))
        for tensor in _tensors((*inputs, *new)):
            axis = 1 if tensor.dim() > 1 else 0
            if tensor.shape[axis] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)

    def _body(self, level: str) -> Call:
        if level not in self._bodies:
            contexts = recompute_contexts(self.widths if level == "feed_forward" else frozenset())
            body = _light_body if level == "feed_forward" else _kept_body
            options: dict[str, Any] | None = {"size_asserts": SIZE_ASSERTS} if self.backend == "inductor" else None
            compiled = torch.compile(body, fullgraph=True, backend=self.backend, options=options)
            self._bodies[level] = partial(compiled, contexts)
        return self._bodies[level]


def _of_layers(dial: Dial) -> tuple[int, int, int, int]:
    """What of the dial can be turned in the middle of a run, as far as it ends."""
    return dial.whole, dial.offload, dial.dense, dial.graphs


def _kept_body(contexts: Call, forward: Call, layer: Any, *inputs: Any, **options: Any) -> Any:
    return checkpoint(forward, layer, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _light_body(contexts: Call, forward: Call, layer: Any, *inputs: Any, **options: Any) -> Any:
    # a function of its own, for torch keeps compiled variants by function and tries them in turn
    return checkpoint(forward, layer, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _bound(call: partial[Any]) -> tuple[Any, Call]:
    """The layer and its class's forward: transformers binds `__call__` up to 5.17 and passes `forward` since."""
    if call.args:
        return call.args[0], call.func
    layer = call.func.__self__  # type: ignore[attr-defined]
    return layer, type(layer).forward


def _storages(layer: torch.nn.Module) -> frozenset[int]:
    """Data pointers of everything that the layer holds: it is there anyway, and must not be sent away."""
    tensors = [*layer.parameters(), *layer.buffers()]
    for module in layer.modules():
        if isinstance(module, FrozenLinear4bit):
            tensors += [value for value in module.held() if isinstance(value, torch.Tensor)]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Segments):
        yield from (value.cu_seqlens, value.gather, value.scatter, value.layout)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _shared(options: dict[str, Any]) -> frozenset[int]:
    """Data pointers of what all layers are given alike: rotary tables, positions, segments."""
    return frozenset(tensor.untyped_storage().data_ptr() for value in options.values() for tensor in _tensors(value))
