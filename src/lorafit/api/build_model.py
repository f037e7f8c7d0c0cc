"""build_model and tune_memory: the adapted base, proved on the run's rows, and the memory policy it trains under."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.api.plan import PlannedRun
from lorafit.backbone import default_device, load_backbone
from lorafit.config import Resolved, RunConfig, Source, parse_bytes
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.data import Rows, largest_step, steps_per_epoch
from lorafit.engine import (
    PAGE_BYTES,
    DecoderLayers,
    DryRun,
    Graphs,
    MicroBatch,
    Work,
    assert_isolated,
    find_policy,
    let_blocks_grow,
    lock_pages_by_threads,
    packed,
    vocabulary_loss_for,
    warm_compiler,
)
from lorafit.errors import RunDirError
from lorafit.memory.inputs import ADAM_8BIT_BYTES, ADAM_BYTES, most_tokens, policy_of
from lorafit.methods import Method, method_of
from lorafit.methods.lora import Counts, count_parameters
from lorafit.objectives import Objective, objective_of
from lorafit.runs import RunDir
from lorafit.training import (
    EventLog,
    OneByOne,
    TunedMemory,
    autocast_dtype,
    largest_micro_batch,
    largest_within,
    total_steps,
)

PROOF_ROWS, PROOF_TOKENS = 4, 256


@dataclass(frozen=True)
class BuiltModel:
    """A base that a method has made trainable, and what is minimised.

    Attributes:
        model: the model; its rows are proved isolated from each other under packed attention.
        method: how it was made trainable.
        objective: the loss, proved to be the model's own.
        counts: trainable and total parameters.
        note: why the loss takes more memory than it has to; empty where it does not.
    """

    model: Any
    method: Method
    objective: Objective
    counts: Counts
    note: str


def build_model(planned: PlannedRun) -> BuiltModel:
    """Return the model of a planned run. Raises BackboneError, AdapterError."""
    config = planned.resolved.config
    lock_pages_by_threads()
    let_blocks_grow()
    enforce_budget(config)
    if torch.cuda.is_available() and config.compile != "off":
        warm_compiler()
    method = method_of(config)
    base = load_backbone(config, dense_budget_bytes=_dense_budget(config))
    model = method.prepare(base, config, planned.plan.targets)
    samples = _samples(planned.prepared.train)
    with packed(model):
        assert_isolated(model, samples)
        loss = vocabulary_loss_for(model, samples)
    return BuiltModel(model, method, objective_of(config, loss), count_parameters(model), loss.reason)


def enforce_budget(config: RunConfig) -> None:
    """Keep this process within `gpu_memory` from here on; called before anything is loaded."""
    if torch.cuda.is_available() and config.gpu_memory is not None:
        _, total = torch.cuda.mem_get_info()
        limit = max(
            0, parse_bytes(config.gpu_memory, "gpu_memory") - PAGE_BYTES
        )  # what a block that grows may take beyond it
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))


def _dense_budget(config: RunConfig) -> int | None:
    """Return the bytes for dequantised copies on a CPU: half of a budget that was set, else half of what is free."""
    return parse_bytes(config.gpu_memory, "gpu_memory") // 2 if config.gpu_memory else None


def _samples(rows: Rows) -> list[tuple[Any, Any]]:
    """Return the beginnings of the shortest rows, every token in the loss, to run proofs on."""
    chosen = rows.lengths.argsort(kind="stable")[:PROOF_ROWS]
    beginnings = [rows.ids(int(row))[:PROOF_TOKENS] for row in chosen]
    return [(ids, np.arange(len(ids)) > 0) for ids in beginnings]


GRADIENT_BYTES = 4
AUTO = "auto"
GPU_SHARE = 0.97
"""Of the GPU's free memory, when no budget is set."""


@contextlib.contextmanager
def tune_memory(
    built: BuiltModel, resolved: Resolved, rows: Rows, run: RunDir, events: EventLog
) -> Iterator[tuple[TunedMemory, DryRun | None]]:
    """Run the model's layers as the memory policy says within the block; yields that and what the dry run found.

    The policy is solved and proved on a GPU, and taken as it is written on a CPU. A resumed run keeps the policy it
    had, so that its bits stay the same, unless it is asked for another.
    """
    config, device = resolved.config, default_device()
    on_gpu = device.type == "cuda"
    layers = DecoderLayers(built.model, compiled=config.compile == "on" or (config.compile == "auto" and on_gpu))
    layers.tell = partial(events.note, "eager_layers")
    layers.policy = policy_of(config, len(layers)) or MemoryPolicy()
    if not on_gpu:
        with contextlib.nullcontext() if layers.policy == MemoryPolicy() and not layers.compiled else layers:
            yield TunedMemory(layers.policy.micro_tokens or config.max_length), None
        return
    by_hand = resolved.sources.get("memory_policy", Source.DEFAULT) not in (Source.PLAN, Source.DEFAULT)
    wish = _Wish.of(config, by_hand)
    before = _take_up(layers, wish, run)
    solves = wish.asked == AUTO and before is None
    work = _work(built, config, rows, device, grows=solves)
    with packed(built.model):  # the backward passes too: what they recompute has to attend as the forward did
        found = find_policy(built.model, layers, work, budget_bytes(config), solves=solves)
    found = replace(found, policy=found.policy.sized(work.max_length, config.max_length))
    layers.policy = found.policy
    report = _Report(run, layers, found, before or wish)
    memory = _tuned(built, config, rows, layers, found, events, report.write_if_possible)
    report.write()
    try:
        with layers:
            yield memory, found
    finally:  # whatever comes after training needs the memory
        if memory.graphs is not None:
            memory.graphs.forget()


@dataclass(frozen=True, slots=True)
class _Wish:
    """What was asked of the policy: nothing (`auto`) or a setting by hand; the setting in force, the plan's where it is
    nobody else's; and the budget. Stands in engine.json, so that a run which goes on knows whether that changed."""

    asked: str
    planned: str
    gpu_memory: str | None

    @classmethod
    def of(cls, config: RunConfig, by_hand: bool) -> _Wish:
        return cls(config.memory_policy if by_hand else AUTO, config.memory_policy, config.gpu_memory)

    def is_that_of(self, known: dict[str, Any]) -> bool:
        """Whether the run that wrote `known` was asked for the same. What the plan would choose today does not count:
        that moves with the memory that happens to be free."""
        if "planned" not in known:  # older releases wrote one word for both
            return self.asked == AUTO or known.get("asked", self.planned) == self.planned
        if self.asked == AUTO:
            return bool(known["asked"] == AUTO and known.get("gpu_memory", known.get("vram")) == self.gpu_memory)
        return self.asked in (known["asked"], known["planned"])  # the run's own recipe has what the plan chose


def _take_up(layers: DecoderLayers, wish: _Wish, run: RunDir) -> _Wish | None:
    """Set `layers` to the policy that a resumed run has had, and return the wish behind it.

    None when it had none, or another is asked for now.
    """
    # one that a run left which never began is not this run's
    known = json.loads(run.engine.read_text()) if run.holds_run and run.engine.exists() else None
    if known is None or not wish.is_that_of(known):
        return None
    layers.policy = MemoryPolicy.parse(known.get("policy", known.get("dial")), len(layers))
    layers.set_schedule(known["schedule"])
    return (
        _Wish(known["asked"], known["planned"], known.get("gpu_memory", known.get("vram")))
        if "planned" in known
        else wish
    )


@dataclass(frozen=True, slots=True)
class _Report:
    """engine.json: the policy in force, what the dry run found, and what was asked for.

    A resumed run begins with the policy that the run ended with.
    """

    run: RunDir
    layers: DecoderLayers
    found: DryRun
    wish: _Wish

    def write(self) -> None:
        """Write it as the layers are now. RunDirError when the disk refuses."""
        layers = self.layers
        now = {"policy": str(layers.policy), "schedule": layers.offload.schedule, "notes": layers.notes}
        self.run.write_json(self.run.engine, {**asdict(self.found), **now, **asdict(self.wish)})

    def write_if_possible(self) -> None:
        """Write it; a full disk is no reason to stop in the middle of a run."""
        with contextlib.suppress(RunDirError):
            self.write()


def _tuned(
    built: BuiltModel,
    config: RunConfig,
    rows: Rows,
    layers: DecoderLayers,
    found: DryRun,
    events: EventLog,
    changed: Callable[[], object],
) -> TunedMemory:
    """Return how steps are laid out under the policy that was found; `changed` is called when layers give way."""
    graphs = None
    if found.policy.cuda_graph_max_tokens:
        trained = built.method.trainable(built.model)
        graphs = Graphs(layers, int(rows.lengths.max()), trained, arena_bytes=found.graph_bytes)
        graphs.tell = partial(events.note, "no_graphs")
    return TunedMemory(
        micro_tokens=found.policy.micro_tokens or config.max_length,
        layers=layers,
        graphs=graphs,
        watches_allocator=not config.deterministic,  # when it acts depends on what the allocator went through
        changed=changed,
    )


def budget_bytes(config: RunConfig) -> int:
    """Bytes that the run may reserve on the GPU: `gpu_memory`, or nearly all that is free."""
    free, total = torch.cuda.mem_get_info()
    if config.gpu_memory is None:
        return int((free + torch.cuda.memory_reserved()) * GPU_SHARE)
    return min(parse_bytes(config.gpu_memory, "gpu_memory"), total)


def _work(built: BuiltModel, config: RunConfig, rows: Rows, device: torch.device, *, grows: bool = False) -> Work:
    """Return the run's micro-batches: of at most `max_length`, or of up to a whole step where it `grows`."""
    steps = total_steps(config, steps_per_epoch(len(rows), config.examples_per_step))
    step = largest_step(rows.lengths, config.examples_per_step, config.seed, steps)
    step_tokens = int(rows.lengths[step].sum())
    trained = sum(weight.numel() for weight in built.method.trainable(built.model))
    # under the autocast of training: other layers would be compiled, and other bytes measured, without it
    walk = OneByOne(built.model, built.objective, device, autocast=autocast_dtype(built.model, device))
    state = ADAM_BYTES if config.optimizer == "adamw" else ADAM_8BIT_BYTES

    def batch_of(micro_tokens: int) -> MicroBatch:
        return largest_micro_batch(rows, config, micro_tokens, step, built.objective).to(device)

    def within(micro_tokens: int, limit: int) -> MicroBatch | None:
        batch = largest_within(rows, config, micro_tokens, limit, step, built.objective)
        return batch and batch.to(device)

    def loss_of(batch: MicroBatch, share: Tensor | float) -> Tensor:
        built.model.train()
        return walk.loss(batch, share)

    return Work(
        batch_of=batch_of,
        loss_of=loss_of,
        max_length=most_tokens(step_tokens, config.max_length) if grows else config.max_length,
        longest=int(rows.lengths.max()),
        step_tokens=float(rows.lengths.mean()) * min(config.examples_per_step, len(rows)),
        within=within,
        coming_bytes=round(trained * (GRADIENT_BYTES + state)),
    )
