"""Processes: the processes of one run, their sums, and the decisions that they share."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from lorafit.errors import LorafitError, ProcessLost, TrainingError, UsageError
from lorafit.methods.full.sharding import clip_shards, is_shard
from lorafit.runs.launched import end_with_launcher

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
"""Most time between two processes' arrivals at the same point of training. A process that hangs ends the run."""
PATIENCE = timedelta(hours=12)
"""Most time that processes wait for process 0 to read the data, and for each other to load the base."""
LOST = "run the same command again, which resumes from the newest checkpoint"
MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which the processes of a run find each other."""
BUCKET_BYTES = 32 << 20
"""Bytes of gradients that are summed in one message."""


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started, within the block. Without torchrun there is one process.

    Each process takes the GPU of its number on its host. Raises UsageError for more processes than GPUs, ProcessLost if
    a process does not come.
    """
    end_with_launcher()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Processes()
        return
    on_gpu, place = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and place >= torch.cuda.device_count():
        fix = f"start at most {torch.cuda.device_count()} processes on this machine"
        raise UsageError(f"there is no GPU for process {place}", where="LOCAL_RANK", fix=fix)
    if on_gpu:
        torch.cuda.set_device(place)
    backend, device = ("cpu:gloo,cuda:nccl", torch.device("cuda", place)) if on_gpu else ("gloo", None)
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device)
    except (dist.DistError, ValueError) as error:
        raise _not_met(error) from None
    processes = Processes()
    try:
        yield processes
    except LorafitError as error:
        processes.report(error)
        raise
    dist.destroy_process_group()  # after an error the process ends, and a group with a lost member would hang


def _not_met(error: Exception) -> UsageError:
    """Return the error for processes that do not find each other, with the address where they should."""
    if isinstance(error, ValueError):
        missing = next((name for name in MEETING if name not in os.environ), "WORLD_SIZE")
        what = f"WORLD_SIZE names several processes, but {missing} is not set as a launcher does"
        return UsageError(what, where=missing, fix="start lorafit with torchrun, or without WORLD_SIZE")
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    is_taken = "EADDRINUSE" in str(error)
    why = "another program has this port" if is_taken else "not all of them came within 10 minutes"
    fix = "give all processes another MASTER_PORT" if is_taken else "start all processes with the same address and port"
    return UsageError(f"the processes of this run cannot meet: {why}", where=place, fix=fix)


class Processes:
    """Hold the processes that train one model, each on its share of a step's rows.

    With one process every call returns its argument at once. Decisions go through the hosts (gloo), so that none waits
    for a GPU; gradients and losses are summed on their own device. Every method that talks to the others raises
    ProcessLost if one of them ended or hangs.

    Attributes:
        rank: the number of this process, from 0.
        world: the number of processes.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self._hosts: Any = None
        self._timed: Any = None
        self._is_awaited = self.world > 1  # the other processes wait for the first word of process 0
        if self.world > 1:
            with naming_lost_processes():
                self._hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
                self._timed = dist.new_group(backend="gloo", timeout=TIMEOUT)

    @property
    def is_main(self) -> bool:
        """Return True in the one process that writes checkpoints, logs and results."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is set in any process, as for stops, saves and retries."""
        return bool(self.most(int(flag))) if self.world > 1 else flag

    def least(self, number: int) -> int:
        """Return the minimum of `number` over all processes: the layout that fits them all."""
        return self._agreed(number, dist.ReduceOp.MIN) if self.world > 1 else number

    def most(self, number: int) -> int:
        """Return the maximum of `number` over all processes."""
        return self._agreed(number, dist.ReduceOp.MAX) if self.world > 1 else number

    def keep_time(self) -> None:
        """Hold every process to TIMEOUT from here on, since no step takes as long as loading may."""
        self._hosts = self._timed

    def gathered(self, value: T) -> list[T]:
        """Return the `value` of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with naming_lost_processes():
            dist.all_gather_object(values, value, group=self._hosts)
        return values

    def from_main(self, work: Callable[[], T]) -> T:
        """Return the result of `work` in process 0. Its LorafitError ends the other processes as ProcessLost."""
        if self.world == 1:
            return work()
        if not self.is_main:
            made: T = self._received()
            return made
        try:
            made = work()
        except LorafitError as error:
            self._broadcast(None, error)
            raise
        self._broadcast(made)
        return made

    def report(self, error: LorafitError) -> None:
        """Tell `error` to the other processes if they still wait for the first word of process 0."""
        if self.is_main and self._is_awaited:
            self._broadcast(None, error)

    def _broadcast(self, made: Any, error: LorafitError | None = None) -> None:
        self._is_awaited = False
        failed = None if error is None else (error.what, error.where, error.exit_code)
        with naming_lost_processes():
            dist.broadcast_object_list([made, failed], src=0, group=self._hosts)

    def _received(self) -> Any:
        holder: list[Any] = [None, None]
        with naming_lost_processes():
            dist.broadcast_object_list(holder, src=0, group=self._hosts)
        made, failed = holder
        if failed is not None:
            what, where, exit_code = failed
            lost = ProcessLost(f"process 0 has ended: {what}", where=where)
            lost.exit_code = exit_code
            raise lost
        return made

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of `work` in this process, once it has ended in all.

        A LorafitError of any process is raised in process 0, with its sentence; the others raise ProcessLost.
        """
        if self.world == 1:
            return work()
        error: LorafitError | None = None
        try:
            with naming_lost_processes():  # a base that several share is read together
                made = work()
        except LorafitError as caught:
            error = caught
        told = self.gathered(None if error is None else (type(error), error.what, error.where, error.fix))
        failed = [(rank, one) for rank, one in enumerate(told) if one is not None]
        if not failed:
            return made
        if error is not None and self.is_main:
            raise error
        rank, (kind, what, where, fix) = failed[0]
        if self.is_main:
            raise kind(f"process {rank}: {what}", where=where, fix=fix)
        raise ProcessLost(f"process {rank} has ended: {what}", where=where)

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.gathered(None)

    def wait_for_the_end_of_main(self) -> None:
        """Wait in all processes but 0 until process 0 has ended, so that no launcher stops it while it writes."""
        if not self.is_main:
            with contextlib.suppress(ProcessLost):
                self.from_main(lambda: None)

    def require_same(self, weights: Sequence[torch.Tensor]) -> None:
        """Raise TrainingError unless every process has the same `weights`, bit by bit; shards differ by design."""
        if self.world == 1 or any(is_shard(weight) for weight in weights):
            return
        digest = hashlib.sha256()
        for weight in weights:
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        digests = self.gathered(digest.hexdigest())
        other = next((rank for rank, one in enumerate(digests) if one != digests[0]), None)
        if other is not None:
            raise TrainingError(
                f"the weights of process {other} are no longer those of process 0, bit by bit",
                fix="test the GPUs and their links, then run the same command again",
            )

    def part_streams(self, seed: int, step: int = 0) -> None:
        """Give each process but 0 random numbers of its own, so that no dropout mask repeats."""
        if self.rank:
            torch.manual_seed(seed + step + (self.rank << 32))

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of `value` over all processes, on its device."""
        if self.world > 1:
            value = value.clone()
            with naming_lost_processes():
                dist.all_reduce(value)
        return value

    def add_gradients(self, trained: Sequence[nn.Parameter]) -> None:
        """Replace each weight's gradient by its sum over all processes, in flat buckets of one dtype.

        The gradients of shards are summed already, in the backward pass.
        """
        if self.world == 1 or any(is_shard(weight) for weight in trained):
            return
        for weight in trained:
            if weight.grad is None:  # this process had no micro-batch
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in trained if weight.grad is not None]
        with naming_lost_processes():
            sent = [(bucket, *_summed(bucket)) for bucket in _buckets(gradients)]
            for bucket, whole, arrival in sent:
                arrival.wait()
                parts = whole.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def clip(self, trained: Sequence[nn.Parameter], most: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `most` over all `trained` weights, and return their norm ()."""
        if any(is_shard(weight) for weight in trained):
            return clip_shards(trained, most, self.total)
        return nn.utils.clip_grad_norm_(trained, most)

    def _agreed(self, number: int, operation: Any) -> int:
        value = torch.tensor(number)
        with naming_lost_processes():
            dist.all_reduce(value, op=operation, group=self._hosts)
        return int(value)


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the gradients in order, in lists of one dtype and at most BUCKET_BYTES, or a single one."""
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        size = sum(one.nbytes for one in bucket) + gradient.nbytes
        if bucket and (size > BUCKET_BYTES or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _summed(bucket: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """Start to sum the flat `bucket` over all processes; return it and what to wait for."""
    whole = torch.cat([gradient.flatten() for gradient in bucket])
    return whole, dist.all_reduce(whole, async_op=True)


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Raise ProcessLost for the errors with which torch.distributed reports a lost or a silent process."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).lower()
        if not isinstance(error, dist.DistError) and "gloo" not in said:
            raise
        if "timed out" in said or "timeout" in said:
            minutes = TIMEOUT.total_seconds() / 60
            what = f"another process of this run has not answered for {minutes:g} minutes"
        else:
            what = "another process of this run has ended"
        raise ProcessLost(what, fix=LOST) from None
