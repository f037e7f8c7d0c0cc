"""Decoder layers: selective recompute of a decoder layer's operations in its backward.

It is selective activation checkpointing (torch.utils.checkpoint), decided for each operation while a layer is traced:
- element-wise operations are recomputed at both levels: the compiler fuses them into their neighbours, so they
  cost next to nothing (a normed input kept beside its own input would be 9 % of a layer's saved bytes);
- at level `feed_forward` the outputs of gate and up are recomputed too: 60 % of a layer's saved bytes, for 54 % of
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
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lorafit.backbone import (
    FrozenLinear4bit,
    decoder_layers,
    frozen_features,
    product_fp8,
    recurrent_parts,
    shards_of,
    unwrapped,
)
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.layers.offload import HostOffload
from lorafit.engine.packing import Segments
from lorafit.errors import BackboneError

MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
STREAM_RANK = 3
VARIANTS = 64
"""Compiled variants of one layer class that torch may make.

There are two windows, two levels, with and without gradients.
"""
SIZE_ASSERTS = False
"""True to check the strides of operators' results in compiled code at every call.

The check takes a tenth of a layer's processor time (bench/overhead.py). The test suite turns it on.
"""


def feed_forward_widths(config: Any) -> frozenset[int]:
    """Return the output widths of the projections into a family's MLP: gate and up apart, or fused."""
    text = config.get_text_config()
    sizes = (getattr(text, name, None) for name in ("intermediate_size", "moe_intermediate_size", "ffn_dim"))
    inner = [size for size in sizes if isinstance(size, int)]
    return frozenset({*inner, *(2 * size for size in inner)} - {text.hidden_size})


def recompute_contexts(widths: frozenset[int]) -> Callable[[], Any]:
    """Return a checkpoint's `context_fn` that recomputes cheap operations and matmuls of these output widths.

    `cache_hash` identifies it to torch. Without it, only a layer's kernels are cached on disk and not its trace: every
    process would trace and partition it again.
    """
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, widths))
    contexts.cache_hash = f"{_source_hash()} {sorted(widths)}"  # type: ignore[attr-defined]
    return contexts


@cache
def _source_hash() -> str:
    """Return a hash of the sources that a cached trace depends on beside its graph.

    They are this policy, and the outputs and gradients that lorafit's operators declare.
    """
    engine = Path(__file__).parents[1]
    files = sorted(chain(engine.rglob("*.py"), (engine.parent / "backbone").rglob("*.py")))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _policy(widths: frozenset[int], context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    width = _matmul_width(op, args)
    if width is None:
        width = _sum_width(op, args)
        if width is not None and width not in widths:
            return CheckpointPolicy.MUST_SAVE  # else both summands are kept instead
    again = width in widths if width is not None else _is_cheap(op, args)
    return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.PREFER_SAVE


def _matmul_width(op: Any, args: tuple[Any, ...]) -> int | None:
    """Return the output columns of a matmul; None for other operations."""
    features = frozen_features(op, args)
    if features is not None:
        return features[1]
    if op is product_fp8:
        return int(args[1].shape[0])
    return int(args[-1].shape[1]) if op in MATMULS else None


def _sum_width(op: Any, args: tuple[Any, ...]) -> int | None:
    """Return the columns of a sum of two streams; None for other operations.

    Such a sum is a residual, or a frozen output and its adapter's.
    """
    if op is not torch.ops.aten.add.Tensor or not all(isinstance(arg, torch.Tensor) for arg in args[:2]):
        return None
    left, right = args[:2]
    if not left.dim() == right.dim() == STREAM_RANK or not left.shape[2] == right.shape[2] > 1:
        return None
    return int(left.shape[2])


def _is_cheap(op: Any, args: tuple[Any, ...]) -> bool:
    """Return True for element-wise operations on the residual stream: norms and activations.

    Heads (rank 4) are left to the compiler: a rotated query costs as much to keep as an unrotated one. So are
    comparisons: a dropout's mask must be the same one, and its random numbers are wider than the mask.
    """
    ranks = [arg.dim() for arg in args if isinstance(arg, torch.Tensor)]
    if op.namespace != "aten" or max(ranks, default=0) != STREAM_RANK:
        return False
    random = torch.Tag.nondeterministic_seeded in op.tags
    by_element = torch.Tag.pointwise in op.tags and not random and op._opname not in COMPARISONS
    return op._opname == "_to_copy" or by_element


Call = Callable[..., Any]


class DecoderLayers:
    """Run the decoder layers of `model` by a memory policy; `with layers:` around training installs them.

    A family whose layer does not compile in one graph runs eagerly, and a note says why. Recurrent layers always do:
    without their kernels, transformers loops over tokens in Python, which a compiler would unroll for each length.

    Attributes:
        policy: The memory policy.
        compiled: Whether layers are compiled at present.
        notes: Notes of the run's engine.json.
        tell: Called with each note.
        compile_s: Seconds spent on compiling so far.
        version: Number of times that weights were dequantized or packed again, which moves them in memory.
    """

    def __init__(
        self, model: Any, policy: MemoryPolicy | None = None, *, compiled: bool = True, backend: str = "inductor"
    ) -> None:
        core = unwrapped(model)
        self.layers: list[Any] = decoder_layers(core)
        self.frozen = [
            [module for module in layer.modules() if isinstance(module, FrozenLinear4bit)] for layer in self.layers
        ]
        self.shards = shards_of(model)
        self.core, self.policy = core, (policy or MemoryPolicy()).clamped(len(self.layers))
        self.widths = feed_forward_widths(core.config)
        self.compiled, self.backend = compiled, backend
        self.offload = HostOffload()
        self.notes: list[str] = []
        self.compile_s = 0.0
        self.version = 0
        self.observe: Call | None = None
        self.tell: Callable[[str], object] | None = None
        self._reduce_slightly: Callable[[], bool] | None = None
        self._bodies: dict[str, Call] = {}
        self._weights: list[frozenset[int]] = []
        self._warm: set[tuple[type, str]] = set()
        self._varying: set[int] = set()
        self._recurrent = frozenset(id(layer) for layer in self.layers if recurrent_parts(layer))
        self._index = {id(layer): place for place, layer in enumerate(self.layers)}

    def __len__(self) -> int:
        return len(self.layers)

    def __enter__(self) -> DecoderLayers:
        if not self.layers:
            raise BackboneError("the base has no decoder layers that lorafit knows", where=type(self.core).__name__)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        # a trace's graph holds all our operators, so it may be cached on disk (see recompute_contexts)
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        try:
            self._dequantize_weights()
        except torch.OutOfMemoryError:
            self._dequantize_weights(False)
            raise
        self.core.enable_input_require_grads()  # else the first layer would be compiled separately
        for layer in self.layers:
            layer._gradient_checkpointing_func = self._run
            layer.gradient_checkpointing = True
        return self

    def __exit__(self, *unused: Any) -> None:
        self._dequantize_weights(False)
        for layer in self.layers:
            layer.gradient_checkpointing = False
        self.core.disable_input_require_grads()

    def reduce_memory(self) -> bool:
        """Recompute or offload more, in the middle of a run.

        Returns False if all layers already do.
        """
        smaller = self.policy.next_smaller(len(self.layers))
        # embeddings and micro-batches come last in the policy, and layers cannot change them
        least = (len(self), len(self), 0, 0)
        if smaller is None or _of_layers(smaller) == _of_layers(self.policy) == least:
            return False
        self.policy = smaller
        self.set_schedule(())  # the schedule belongs to the last policy
        self._dequantize_weights()
        return True

    def reduce_slightly(self) -> bool:
        """Reduce memory a little, in the middle of a run that barely fits.

        A solved policy gives up as little as possible; another policy is reduced as by `reduce_memory`. Returns False
        if nothing can be reduced.
        """
        if self._reduce_slightly is not None and self._reduce_slightly():
            self.offload.begin()  # drop tensors that the last policy kept
            return True
        return self.reduce_memory()

    def _dequantize_weights(self, keep: bool = True) -> None:
        """Keep the dequantized weights of `policy.dequantized_layers` layers on the GPU.

        A CPU has its own copies.
        """
        dense = self.policy.dequantized_layers if keep and self.shards is None else 0
        on_gpu = [[module for module in linears if module.weight.is_cuda] for linears in self.frozen]
        for module in chain(*on_gpu[dense:]):  # free memory before taking any
            module.drop_dense()
        for module in chain(*on_gpu[:dense]):
            if not module.copies:
                module.keep_dense()
        self._weights = [_storages(layer) for layer in self.layers]
        self.version += 1

    def set_schedule(self, schedule: Sequence[int], reduce_slightly: Callable[[], bool] | None = None) -> None:
        """Offload by this schedule (see HostOffload) until the policy changes.

        `reduce_slightly` reduces the policy slightly, and returns True if it could (see the method of this name).
        """
        self.offload.schedule, self._reduce_slightly = schedule, reduce_slightly

    def note(self, text: str) -> None:
        """Add `text` to the notes of the run's engine.json, and report it."""
        self.notes.append(text)
        if self.tell is not None:
            self.tell(text)

    def _run(self, call: partial[Any], *inputs: Any) -> Any:
        """Run a decoder layer; `call` holds the layer's forward and its keyword arguments."""
        layer, forward = _bound(call)
        if not call.args and isinstance(layer, FSDPModule):
            # `call` runs the hooks that gather the layer's weights; only what is within them may run twice
            own: Any = layer
            own.forward = partial(self._run_layer, layer, forward)
            try:
                return call(*inputs)
            finally:
                del own.forward
        return self._run_layer(layer, forward, *inputs, **call.keywords)

    def _run_layer(self, layer: Any, forward: Call, *inputs: Any, **options: Any) -> Any:
        """Run a decoder layer whose weights are at hand, or gathered from shards here."""
        if self.shards is None:
            return self._run_gathered(layer, forward, *inputs, **options)
        # these are hooks of the layer too, which transformers calls before or within this function, by its release
        self.shards.before(layer)
        out = self._run_gathered(layer, forward, *inputs, **options)
        self.shards.after(layer, out)
        return out

    def _run_gathered(self, layer: Any, forward: Call, *inputs: Any, **options: Any) -> Any:
        index = self._index[id(layer)]
        if index == 0:
            self._varying.clear()
        if self.observe is not None:
            self.observe(partial(self._at_level, layer, forward, options), *inputs)
        if not self.policy.offloaded_layers:
            return self._at_level(layer, forward, options, self.policy.level(index), *inputs)
        if index == 0:
            self.offload.begin()
        keep = self._weights[index] | _shared(options)
        with self.offload.around(index, index < self.policy.offloaded_layers, keep):
            out = self._at_level(layer, forward, options, self.policy.level(index), *inputs)
        if index == len(self.layers) - 1:
            self.offload.end_forward(len(self.layers))
        return out

    def _at_level(self, layer: Any, forward: Call, options: dict[str, Any], level: str, *inputs: Any) -> Any:
        """Run one layer's forward at a level of the policy."""
        compiled = self.compiled and id(layer) not in self._recurrent
        if level == "feed_forward" and not (compiled and self.widths):
            level = "whole"
        if level == "whole":
            again = partial(self._at_level, layer, forward, options, "keep")
            return checkpoint(again, *inputs, use_reentrant=False)
        if not compiled:
            return forward(layer, *inputs, **options)
        self._let_vary(inputs, options)
        started = time.perf_counter()
        try:
            out = self._body(level)(forward, layer, *inputs, **options)
        except TorchDynamoException as error:
            self.compiled = False
            # the first line only says that a backend raised; the second holds its error
            reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            self.note(f"{type(layer).__name__} does not compile ({reason}); its layers run one operation at a time")
            return self._at_level(layer, forward, options, level, *inputs)
        if (type(layer), level) not in self._warm:
            self._warm.add((type(layer), level))
            self.compile_s += time.perf_counter() - started
        return out

    def _let_vary(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Mark token counts and row layouts as dynamic, so that one compile serves all micro-batches."""
        # all layers get the same options, so each is marked once in a forward
        new = [value for value in options.values() if value is not None and id(value) not in self._varying]
        self._varying.update(map(id, new))
        for tensor in _tensors((*inputs, *new)):
            for axis in range(min(tensor.dim(), 2)):  # padded rows lie side by side
                if tensor.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)

    def _body(self, level: str) -> Call:
        if level not in self._bodies:
            contexts = recompute_contexts(self.widths if level == "feed_forward" else frozenset())
            body = _recompute_mlp_body if level == "feed_forward" else _keep_body
            options: dict[str, Any] | None = {"size_asserts": SIZE_ASSERTS} if self.backend == "inductor" else None
            compiled = torch.compile(body, fullgraph=True, backend=self.backend, options=options)
            self._bodies[level] = partial(compiled, contexts)
        return self._bodies[level]


def _of_layers(policy: MemoryPolicy) -> tuple[int, int, int, int]:
    """Return the parts of the policy that may change in the middle of a run.

    Their smallest values end the reduction.
    """
    return policy.recompute_layers, policy.offloaded_layers, policy.dequantized_layers, policy.cuda_graph_max_tokens


def _keep_body(contexts: Call, forward: Call, layer: Any, *inputs: Any, **options: Any) -> Any:
    return checkpoint(forward, layer, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _recompute_mlp_body(contexts: Call, forward: Call, layer: Any, *inputs: Any, **options: Any) -> Any:
    # a separate function, because torch keeps compiled variants by function and tries them in turn
    return checkpoint(forward, layer, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _bound(call: partial[Any]) -> tuple[Any, Call]:
    """Return the layer and its class's forward.

    transformers binds `__call__` up to 5.17, and passes `forward` since.
    """
    if call.args:
        is_sharded = isinstance(call.args[0], FSDPModule)  # a subclass of the layer's class, which wraps it once more
        return call.args[0], getattr(call.func, "__wrapped__", call.func) if is_sharded else call.func
    layer = call.func.__self__  # type: ignore[attr-defined]
    return layer, type(layer).forward


def _storages(layer: torch.nn.Module) -> frozenset[int]:
    """Return the data pointers of all tensors that the layer holds.

    They are in memory anyway, so they are not offloaded. Shards have no storage that a layer computes with.
    """
    if isinstance(layer, FSDPModule):
        return frozenset()
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
    """Return the data pointers of the tensors that all layers share: rotary tables, positions, segments."""
    return frozenset(tensor.untyped_storage().data_ptr() for value in options.values() for tensor in _tensors(value))
