"""build_model and tune_memory: the trainable model, and the memory policy it trains under."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.api.plan import PlannedRun
from lorafit.backbone import compute_dtype, computes_in_fp8, default_device, load_backbone, load_sharded
from lorafit.config import Resolved, RunConfig, Source, parse_bytes, read_json
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.data import Rows, largest_step, steps_per_epoch
from lorafit.engine import (
    PACKED,
    PAGE_BYTES,
    DecoderLayers,
    DryRun,
    Graphs,
    MicroBatch,
    RowMode,
    Workload,
    find_policy,
    let_blocks_grow,
    lock_pages_by_threads,
    prove_policy,
    prove_rows,
    require_runs,
    warm_compiler,
)
from lorafit.errors import RunDirError
from lorafit.evaluate.rounding_check import quantization_loss
from lorafit.findings import Finding
from lorafit.memory.inputs import most_tokens, policy_of
from lorafit.methods import Method, method_of
from lorafit.methods.full.in_backward import gradients_as_in_steps
from lorafit.methods.full.sharding import free_gathered, gathers_layers, shard
from lorafit.methods.lora import Counts, count_parameters
from lorafit.objectives import Objective, objective_of
from lorafit.runs import RunDir, is_sealed, sealed
from lorafit.training import (
    EventLog,
    Layout,
    MicroBatchSearch,
    OneByOne,
    TunedMemory,
    autocast_dtype,
    dealt,
)
from lorafit.training.distributed import Processes
from lorafit.training.updates import coming_bytes, updated_at_once

PROOF_ROWS, PROOF_TOKENS = 4, 256
AUTO = "auto"
GPU_SHARE = 0.97
"""Share of the GPU's free memory that a run may use if no budget is set."""


@dataclass(frozen=True)
class BuiltModel:
    """Hold a base that a method has made trainable, and its objective.

    Attributes:
        model: the model; its rows are proved isolated from each other in the mode `rows`.
        method: the training method that made the base trainable.
        objective: the loss, proved to be the model's own.
        counts: trainable and total parameters.
        note: why the loss takes more memory than necessary; empty if it does not.
        rows: packed rows, padded rows, or one row a forward.
        findings: what quantizing costs the base, if it was measured.
    """

    model: Any
    method: Method
    objective: Objective
    counts: Counts
    note: str
    rows: RowMode = PACKED
    findings: tuple[Finding, ...] = ()


def build_model(planned: PlannedRun, *, is_new: bool, world: int) -> BuiltModel:
    """Return the model of a planned run, measured against its base's own precision if the run is new.

    With `method` full its weights are sharded over `world` processes, with shard_base the frozen layers. Raises
    BackboneError, AdapterError.
    """
    config = planned.resolved.config
    lock_pages_by_threads()
    let_blocks_grow()
    enforce_budget(config)
    if torch.cuda.is_available() and config.compile != "off":
        warm_compiler()
    method, findings = method_of(config), tuple[Finding, ...]()
    samples = _samples(planned.prepared.train)
    if config.method == "full" and world > 1:
        model = sharded_model(config)
        require_runs(model, samples[0])
    elif config.shard_base == "on" and world > 1:
        base = load_sharded(config)
        require_runs(base, samples[0])
        model = method.prepare(base, config, planned.plan.targets)
    else:
        base = load_backbone(config, dense_budget_bytes=_dense_budget(config))
        require_runs(base, samples[0])
        findings = tuple(quantization_loss(base, config, planned.prepared.train)) if is_new else ()
        model = method.prepare(base, config, planned.plan.targets)
    rows, loss = prove_rows(model, samples, planned.prepared.longest)
    free_gathered(model)
    return BuiltModel(model, method, objective_of(config, loss), count_parameters(model), loss.reason, rows, findings)


def sharded_model(config: RunConfig) -> Any:
    """Return the base with every weight trainable and sharded over all processes. Raises BackboneError, AdapterError.

    Every process reads the base into host memory, and one layer after another comes to its device.
    """
    device, dtype = default_device(), compute_dtype(config)
    computes_in_fp8(config, device)  # refuses where it cannot
    narrow = "bf16" if dtype is torch.bfloat16 else "fp32"
    base = load_backbone(config.model_copy(update={"compute": narrow}), device="cpu")
    model = method_of(config).prepare(base, config)
    return shard(model, device, dtype=dtype, wide=config.optimizer in ("auto", "adamw"))


def enforce_budget(config: RunConfig) -> None:
    """Limit this process to `gpu_memory` from here on. Call it before anything is loaded."""
    if torch.cuda.is_available() and config.gpu_memory is not None:
        _, total = torch.cuda.mem_get_info()
        # an expandable block may exceed the limit by one page
        limit = max(0, parse_bytes(config.gpu_memory, "gpu_memory") - PAGE_BYTES)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))


def _dense_budget(config: RunConfig) -> int | None:
    """Return the bytes for dequantized copies on a CPU, None without a budget.

    With `gpu_memory` set the copies take half of it, else half of the free memory.
    """
    return parse_bytes(config.gpu_memory, "gpu_memory") // 2 if config.gpu_memory else None


def _samples(rows: Rows) -> list[tuple[Any, Any]]:
    """Return the first tokens of the shortest rows, all supervised, to run proofs on."""
    chosen = rows.lengths.argsort(kind="stable")[:PROOF_ROWS]
    starts = [rows.ids(int(row))[:PROOF_TOKENS] for row in chosen]
    return [(ids, np.arange(len(ids)) > 0) for ids in starts]


@contextlib.contextmanager
def tune_memory(
    built: BuiltModel, resolved: Resolved, rows: Rows, run: RunDir, events: EventLog, processes: Processes | None = None
) -> Iterator[tuple[TunedMemory, DryRun | None]]:
    """Apply the memory policy to the model's layers within the block.

    Yields the tuned memory and the result of the dry run (None on a CPU). On a GPU the policy is solved and proved by a
    dry run; on a CPU it is taken as written. A resumed run keeps its policy, so that its bits stay the same, unless the
    settings ask for another. Several processes solve for the least memory among them, and use one policy.
    """
    processes = processes or Processes()
    config, device = resolved.config, default_device()
    on_gpu = device.type == "cuda"
    layers = DecoderLayers(built.model, compiled=config.compile == "on" or (config.compile == "auto" and on_gpu))
    layers.tell = partial(events.note, "eager_layers")
    layers.policy = policy_of(config, len(layers)) or MemoryPolicy()
    if not on_gpu:
        with contextlib.nullcontext() if layers.policy == MemoryPolicy() and not layers.compiled else layers:
            tokens = built.rows.micro_tokens(layers.policy.micro_tokens or config.max_length)
            yield TunedMemory(tokens, rows=built.rows), None
        return
    is_explicit = resolved.sources.get("memory_policy", Source.DEFAULT) not in (Source.PLAN, Source.DEFAULT)
    request = _PolicyRequest.of(config, is_explicit)
    before = _restore_policy(layers, request, run)
    solves = request.asked == AUTO and before is None
    grows = solves and not gathers_layers(built.model)  # a planned policy names its micro-batch
    workload = _workload(built, config, rows, device, grows=grows, world=processes.world)
    # backward passes too: recomputed layers must attend as in the forward pass
    with built.rows.attending(built.model), _as_in_steps(built, config):
        budget = processes.least(budget_bytes(config))
        if gathers_layers(built.model):
            found = prove_policy(built.model, layers, workload, budget, processes.most, solves=solves)
        else:
            found = processes.together(lambda: find_policy(built.model, layers, workload, budget, solves=solves))
            found = _agreed(layers, found, processes)
    found = replace(found, policy=found.policy.sized(workload.max_length, config.max_length))
    layers.policy = found.policy
    report = _Report(run, layers, found, before or request, writes=processes.is_main)
    memory = _tuned(built, config, rows, layers, found, events, report.write_if_possible)
    report.write()
    try:
        with layers:
            yield memory, found
    finally:  # evaluation and merge need the memory
        if memory.graphs is not None:
            memory.graphs.forget()


def _as_in_steps(built: BuiltModel, config: RunConfig) -> AbstractContextManager[None]:
    """Free gradients within the block where the run's optimizer frees them in the backward pass."""
    return gradients_as_in_steps(updated_at_once(built.method.trainable(built.model), config))


def _agreed(layers: DecoderLayers, own: DryRun, processes: Processes) -> DryRun:
    """Return the dry run with the lowest peak among all processes; `layers` take its policy."""
    found = min(processes.gathered(own), key=lambda one: one.peak_bytes)
    if (found.policy, found.schedule) != (own.policy, own.schedule):
        layers.policy = found.policy
        layers.set_schedule(found.schedule)
    return found


@dataclass(frozen=True, slots=True)
class _PolicyRequest:
    """Hold the memory policy that the settings ask for.

    engine.json keeps the request, so that a resumed run knows whether it has changed.

    Attributes:
        asked: the policy that the user set; `auto` if the user set none.
        planned: the policy in the settings, which the plan fills in if the user set none.
        gpu_memory: the memory budget, as text.
    """

    asked: str
    planned: str
    gpu_memory: str | None

    @classmethod
    def of(cls, config: RunConfig, is_explicit: bool) -> _PolicyRequest:
        return cls(config.memory_policy if is_explicit else AUTO, config.memory_policy, config.gpu_memory)

    def matches(self, known: dict[str, Any]) -> bool:
        """Return True if the run that wrote `known` had the same request.

        The plan's present choice does not count, since it depends on the memory that is free right now.
        """
        if "planned" not in known:  # older releases wrote one field for both
            return self.asked == AUTO or known.get("asked", self.planned) == self.planned
        if self.asked == AUTO:
            return bool(known["asked"] == AUTO and known.get("gpu_memory", known.get("vram")) == self.gpu_memory)
        return self.asked in (known["asked"], known["planned"])  # run.yaml holds the plan's choice


def _restore_policy(layers: DecoderLayers, request: _PolicyRequest, run: RunDir) -> _PolicyRequest | None:
    """Set `layers` to the policy of a resumed run, and return the request behind it.

    Returns None if the run had no policy, or if another one is requested now.
    """
    # an engine.json without run.yaml is from a run that never started
    fix = "remove the file: the policy is then looked for again"
    known = read_json(run.engine, RunDirError, fix=fix) if run.holds_run and run.engine.exists() else None
    if known is None:
        return None
    if "sha256" in known and not is_sealed(known):  # older releases did not seal it
        raise RunDirError("the file has changed since it was written", where=str(run.engine), fix=fix)
    try:
        if not request.matches(known):
            return None
        layers.policy = MemoryPolicy.parse(str(known.get("policy", known.get("dial"))), len(layers))
        layers.set_schedule(known["schedule"])
        if "planned" not in known:
            return request
        return _PolicyRequest(known["asked"], known["planned"], known.get("gpu_memory", known.get("vram")))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise RunDirError("the file holds no memory policy", where=str(run.engine), fix=fix) from error


@dataclass(frozen=True, slots=True)
class _Report:
    """Hold the content of engine.json: policy, dry run and request.

    A resumed run starts with the policy that engine.json had at the end.

    Attributes:
        run: the run directory.
        layers: the decoder layers, which know the present policy.
        found: the result of the dry run.
        request: the policy that the settings ask for.
        writes: False in all processes but 0.
    """

    run: RunDir
    layers: DecoderLayers
    found: DryRun
    request: _PolicyRequest
    writes: bool = True

    def write(self) -> None:
        """Write engine.json with the present policy. Raises RunDirError if the disk refuses."""
        if not self.writes:
            return
        layers = self.layers
        now = {"policy": str(layers.policy), "schedule": layers.offload.schedule, "notes": layers.notes}
        content = {**asdict(self.found), **now, **asdict(self.request)}
        self.run.write_json(self.run.engine, sealed(json.loads(json.dumps(content))))

    def write_if_possible(self) -> None:
        """Write engine.json and ignore a full disk, which must not stop a run."""
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
    """Return the tuned memory under the policy found.

    Layers call `changed` when they start to use less memory.
    """
    graphs = None
    if found.policy.cuda_graph_max_tokens and built.rows.is_packed:
        trained = built.method.trainable(built.model)
        graphs = Graphs(layers, int(rows.lengths.max()), trained, arena_bytes=found.graph_bytes)
        graphs.tell = partial(events.note, "no_graphs")
    return TunedMemory(
        micro_tokens=built.rows.micro_tokens(found.policy.micro_tokens or config.max_length),
        layers=layers,
        graphs=graphs,
        # its timing depends on the allocator's history, which differs between processes
        watches_allocator=not config.deterministic and not gathers_layers(built.model),
        changed=changed,
        rows=built.rows,
    )


def budget_bytes(config: RunConfig) -> int:
    """Return the bytes that the run may reserve on the GPU.

    The budget is `gpu_memory`, or GPU_SHARE of the free memory.
    """
    free, total = torch.cuda.mem_get_info()
    if config.gpu_memory is None:
        return int((free + torch.cuda.memory_reserved()) * GPU_SHARE)
    return min(parse_bytes(config.gpu_memory, "gpu_memory"), total)


def _workload(
    built: BuiltModel, config: RunConfig, rows: Rows, device: torch.device, *, grows: bool = False, world: int = 1
) -> Workload:
    """Return the run's micro-batches for the dry run.

    A micro-batch has at most `max_length` tokens, or up to the largest share of a step among `world` processes if it
    `grows`. It depends on no rank, so that all processes have the same limit.
    """
    steps = config.total_steps(steps_per_epoch(len(rows), config.examples_per_step))
    step = largest_step(rows.lengths, config.examples_per_step, config.seed, steps)
    whole = Layout(int(rows.lengths.max()) * len(step), built.rows.is_padded)
    shares = [part for share in dealt(rows.lengths, step, world) for part in whole.of(rows.lengths, share)]
    share_tokens = max(whole.tokens_of(rows.lengths, part) for part in shares)
    trained = built.method.trainable(built.model)
    # training's autocast, or other layers are compiled and other bytes measured
    schedule = OneByOne(built.model, built.objective, device, autocast=autocast_dtype(built.model, device))
    at_once = updated_at_once(trained, config)

    search = MicroBatchSearch(rows, config, built.objective, step, world, built.rows.is_padded)

    def batch_of(micro_tokens: int) -> MicroBatch:
        return search.largest(built.rows.micro_tokens(micro_tokens)).to(device)

    def within(micro_tokens: int, limit: int) -> MicroBatch | None:
        if not built.rows.is_packed:
            return None  # a CUDA graph fills a micro-batch up with a row more, which only packed attention sets apart
        batch = search.largest_within(built.rows.micro_tokens(micro_tokens), limit)
        return batch and batch.to(device)

    def loss_of(batch: MicroBatch, share: Tensor | float) -> Tensor:
        built.model.train()
        return schedule.loss(batch, share)

    return Workload(
        batch_of=batch_of,
        loss_of=loss_of,
        max_length=most_tokens(share_tokens, config.max_length) if grows else config.max_length,
        longest=int(rows.lengths.max()),
        step_tokens=float(rows.lengths.mean()) * min(config.examples_per_step, len(rows)) / world,
        within=within,
        between_bytes=2 * sum(weight.nbytes for weight in at_once),
        coming_bytes=coming_bytes(trained, config),
    )
