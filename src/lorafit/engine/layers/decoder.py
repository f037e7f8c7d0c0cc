"""Which operations of a decoder layer run again in its backward, so that their outputs need not be kept.

Selective activation checkpointing (torch.utils.checkpoint), decided operation by operation while a layer is traced:
- what is computed element by element is made again, at both levels: the compiler fuses it into its neighbours, so it
  costs next to nothing (a normed input beside the input it was made from would be 9 % of what a layer keeps);
- at level `feed_forward` the outputs of gate and up are made again too: 60 % of what a layer keeps, for 54 % of
  its matmuls. The down projection's output is never needed, so that matmul does not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafit.backbone import FrozenLinear4bit, frozen_features, unwrapped
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.layers.offload import HostOffload
from lorafit.engine.packing import Segments
from lorafit.errors import BackboneError

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
STREAM_RANK = 3


def feed_forward_widths(config: Any) -> frozenset[int]:
    """Output widths of the projections into a family's feed-forward: gate and up apart, or fused."""
    text = config.get_text_config()
    sizes = (getattr(text, name, None) for name in ("intermediate_size", "moe_intermediate_size", "ffn_dim"))
    inner = [size for size in sizes if isinstance(size, int)]
    return frozenset({*inner, *(2 * size for size in inner)} - {text.hidden_size})


def recompute_contexts(widths: frozenset[int]) -> Callable[[], Any]:
    """The `context_fn` of a checkpoint that makes again what is cheap, and products of these output widths.

    `cache_hash` says to torch what it does. Without, no layer's trace is cached on disk, only its kernels: every
    process would trace and partition it anew.
    """
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, widths))
    contexts.cache_hash = f"{_source_hash()} {sorted(widths)}"  # type: ignore[attr-defined]
    return contexts


@cache
def _source_hash() -> str:
    """Of all that a cached trace depends on beside the graph: this policy, and what lorafit's operators say of their
    outputs and gradients."""
    engine = Path(__file__).parents[1]
    files = sorted(chain(engine.rglob("*.py"), (engine.parent / "backbone").rglob("*.py")))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _policy(widths: frozenset[int], context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    width = _product_width(op, args)
    if width is None:
        width = _sum_width(op, args)
        if width is not None and width not in widths:
            return CheckpointPolicy.MUST_SAVE  # else both things summed are kept in its place
    again = width in widths if width is not None else _is_cheap(op, args)
    return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.PREFER_SAVE


def _product_width(op: Any, args: tuple[Any, ...]) -> int | None:
    """Columns that a matmul makes; None for other operations."""
    features = frozen_features(op, args)
    if features is not None:
        return features[1]
    return int(args[-1].shape[1]) if op in PRODUCTS else None


def _sum_width(op: Any, args: tuple[Any, ...]) -> int | None:
    """Columns of a sum of two streams: a residual, or a frozen output and its adapter's; None for others."""
    if op is not torch.ops.aten.add.Tensor or not all(isinstance(arg, torch.Tensor) for arg in args[:2]):
        return None
    left, right = args[:2]
    return (
        int(left.shape[2]) if left.dim() == right.dim() == STREAM_RANK and left.shape[2] == right.shape[2] > 1 else None
    )


def _is_cheap(op: Any, args: tuple[Any, ...]) -> bool:
    """Element by element on the residual stream: norms and activations.

    Heads (rank 4) are left to the compiler: a rotated query costs as much to keep as an unrotated one. So are
    comparisons: a dropout's mask must be the same one, and its random numbers are wider than the mask.
    """
    ranks = [arg.dim() for arg in args if isinstance(arg, torch.Tensor)]
    if op.namespace != "aten" or max(ranks, default=0) != STREAM_RANK:
        return False
    random = torch.Tag.nondeterministic_seeded in op.tags
    by_element = torch.Tag.pointwise in op.tags and not random and op._opname not in COMPARISONS
    return op._opname == "_to_copy" or by_element


VARIANTS = 64
"""Compiled variants of one layer class that torch may make: two windows, two levels, with and without gradients."""

SIZE_ASSERTS = False
"""Whether compiled code checks the strides of whatever operators return, at every call: a tenth of what a layer costs
the processor (bench/overhead.py). The test suite has it on."""

Call = Callable[..., Any]


class DecoderLayers:
    """The decoder layers of `model`, run as `policy` says; `with layers:` around training installs them.

    `compiled` says whether layers are compiled at present; a family whose layer does not compile whole goes on
    eager, and `notes` say why, as `tell` is told. `compile_s` is what compiling took so far.
    """

    def __init__(
        self, model: Any, policy: MemoryPolicy | None = None, *, compiled: bool = True, backend: str = "inductor"
    ) -> None:
        core = unwrapped(model)
        decoder = core.get_decoder()
        self.layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.frozen = [
            [module for module in layer.modules() if isinstance(module, FrozenLinear4bit)] for layer in self.layers
        ]
        self.core, self.policy = core, (policy or MemoryPolicy()).clamped(len(self.layers))
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

    def reduce_memory(self) -> bool:
        """Recompute or offload more than before, in the middle of a run; False when all of it is already."""
        tighter = self.policy.next_smaller(len(self.layers))
        # embeddings and micro-batches are the end of the policy, and not for the layers to change
        least = (len(self), len(self), 0, 0)
        if tighter is None or _of_layers(tighter) == _of_layers(self.policy) == least:
            return False
        self.policy = tighter
        self.set_schedule(())  # the schedule was made for the policy before
        self._unpack_weights()
        return True

    def reduce_slightly(self) -> bool:
        """Take a little less memory, in the middle of a run that barely fits; False when nothing can be done.

        A policy that was solved gives up as little as it can; another is reduced as by `reduce_memory`.
        """
        if self._less is not None and self._less():
            self.offload.begin()  # what was kept of the last micro-batch is not this policy's
            return True
        return self.reduce_memory()

    def _unpack_weights(self, keep: bool = True) -> None:
        """Keep the dequantized weights of `policy.dequantized_layers` layers on the GPU; a CPU has its own copies."""
        dense = self.policy.dequantized_layers if keep else 0
        on_gpu = [[module for module in linears if module.weight.is_cuda] for linears in self.frozen]
        for module in chain(*on_gpu[dense:]):  # before anything is taken
            module.drop_dense()
        for module in chain(*on_gpu[:dense]):
            if not module.copies:
                module.keep_dense()
        self._weights = [_storages(layer) for layer in self.layers]
        self.turned += 1

    def set_schedule(self, schedule: Sequence[int], less: Callable[[], bool] | None = None) -> None:
        """Offload by this schedule (see HostOffload) for as long as the policy stays.

        `less` reduces the policy slightly, and says whether it could (see `reduce_slightly`).
        """
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
        if not self.policy.offloaded_layers:
            return self._at_level(layer, forward, call.keywords, self.policy.level(index), *inputs)
        if index == 0:
            self.offload.begin()
        keep = self._weights[index] | _shared(call.keywords)
        with self.offload.around(index, index < self.policy.offloaded_layers, keep):
            out = self._at_level(layer, forward, call.keywords, self.policy.level(index), *inputs)
        if index == len(self.layers) - 1:
            self.offload.end_forward(len(self.layers))
        return out

    def _at_level(self, layer: Any, forward: Call, options: dict[str, Any], level: str, *inputs: Any) -> Any:
        """One layer's forward at a level of the policy."""
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


def _of_layers(policy: MemoryPolicy) -> tuple[int, int, int, int]:
    """What of the policy can be turned in the middle of a run, as far as it ends."""
    return policy.recompute_layers, policy.offloaded_layers, policy.dequantized_layers, policy.cuda_graph_max_tokens


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
