"""sharded: the dry run of a model whose layers all processes gather together.

A process that runs out of memory within a layer leaves the others waiting, so nothing is measured by failing: the
planned policy runs, and shrinks where its peak is over the budget of some process, or where the allocator of one had
to empty its cache: that stops the GPU in every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.autotune.dry_run import Attempt, DryRun, drop_gradients
from lorafit.engine.autotune.problem import Workload, does_not_fit
from lorafit.engine.layers.decoder import DecoderLayers
from lorafit.engine.layers.host_embeddings import keep_embeddings_on_host
from lorafit.engine.runtime import allocator_retries, release_memory
from lorafit.errors import TrainingError
from lorafit.methods.full.sharding import free_gathered, own_shard

PASSES = 3
"""Forward and backward passes of a try: compiling, with the optimizer's state in place, and at rest."""


def prove_policy(
    model: Any, layers: DecoderLayers, work: Workload, budget_bytes: int, most: Callable[[int], int], *, solves: bool
) -> DryRun:
    """Set `layers` to a policy that fits `budget_bytes` in every process; `most` is the maximum over all of them.

    Every process calls this with the same policy and micro-batch. With `solves` a policy that fits and waits for memory
    is made smaller. Raises TrainingError if the memory runs out.
    """
    started = time.perf_counter()
    if layers.policy.host_embeddings:
        keep_embeddings_on_host(model)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        attempts = tuple(_attempts(model, layers, work, budget_bytes, most, solves))
    return DryRun(
        policy=layers.policy,
        schedule=(),
        peak_bytes=attempts[-1].peak_bytes,
        budget_bytes=budget_bytes,
        graph_bytes=0,
        compile_s=layers.compile_s,
        measure_s=0.0,
        elapsed_s=time.perf_counter() - started,
        attempts=attempts,
    )


def _attempts(
    model: Any, layers: DecoderLayers, work: Workload, budget_bytes: int, most: Callable[[int], int], solves: bool
) -> Iterator[Attempt]:
    while True:
        attempt = _attempt(model, layers, work)
        peak, waits = most(attempt.peak_bytes), most(attempt.retries[-1])
        fits = peak <= budget_bytes and not (waits and solves)
        yield replace(attempt, peak_bytes=peak, fits=fits)
        if fits:
            return
        smaller = smaller_policy(layers.policy, len(layers), work)
        if smaller is not None:
            layers.policy = smaller
        elif peak <= budget_bytes:
            return  # the smallest one, however slow
        else:
            raise does_not_fit()


def smaller_policy(policy: MemoryPolicy, layers: int, work: Workload) -> MemoryPolicy | None:
    """Return `policy` with an eighth of the layers more that recompute, or with smaller micro-batches; None at the end.

    Feed-forwards are recomputed before whole layers. Nothing goes to the host.
    """
    step, whole, part = max(1, layers // 8), policy.recompute_layers, policy.recompute_mlp_layers
    tokens = policy.micro_tokens or work.max_length
    if whole + part < layers:
        return replace(policy, recompute_mlp_layers=min(layers - whole, part + step))
    if whole < layers:
        whole = min(layers, whole + step)
        return replace(policy, recompute_layers=whole, recompute_mlp_layers=layers - whole)
    if tokens > work.longest:
        return replace(policy, micro_tokens=max(work.longest, tokens // 2))
    return None


def _attempt(model: Any, layers: DecoderLayers, work: Workload) -> Attempt:
    """Run the largest micro-batch under the present policy, beside the optimizer's state."""
    started, retries = time.perf_counter(), []
    batch = work.batch_of(layers.policy.micro_tokens or work.max_length)
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    state: list[Tensor] = []
    try:
        with layers:
            for _ in range(PASSES):
                before = allocator_retries()
                work.loss_of(batch, 1 / max(batch.supervised, 1)).backward()
                torch.cuda.synchronize()
                retries.append(allocator_retries() - before)
                state = state or _optimizer_state(model, work)
                if work.step_tokens <= batch.tokens:  # else gradients of earlier micro-batches stay
                    drop_gradients(model)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory ran out in the dry run of memory_policy={layers.policy}",
            where="gpus",
            fix="set memory_policy: recompute, a smaller max_length, or use more GPUs",
        ) from error
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    state.clear()
    drop_gradients(model)
    release_memory()
    return Attempt(
        policy=str(layers.policy),
        room_bytes=0,
        peak_bytes=reserved,
        allocated_bytes=allocated,
        graph_bytes=0,
        retries=tuple(retries),
        elapsed_s=time.perf_counter() - started,
        fits=True,
    )


def _optimizer_state(model: Any, work: Workload) -> list[Tensor]:
    """Allocate a tensor for each trained weight, as large as its optimizer state: what comes, less its gradient."""
    free_gathered(model)
    shards = [own_shard(weight) for weight in model.parameters() if weight.requires_grad]
    count = sum(shard.numel() for shard in shards)
    state = work.coming_bytes - sum(shard.numel() * shard.element_size() for shard in shards)
    sizes = [round(shard.numel() * max(0, state) / max(1, count)) for shard in shards]
    return [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
