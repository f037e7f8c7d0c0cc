"""sharded: checkpoints whose weights and moments every process writes and reads in part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lorafit.errors import LorafitError, RunDirError
from lorafit.methods.full.sharded_folder import ShardsSnapshot, write_shards
from lorafit.methods.full.sharding import ShardLayout
from lorafit.runs import ADAPTER
from lorafit.runs.checkpoint import folder_name
from lorafit.training.checkpoints.moments import SHARDED, weights_of
from lorafit.training.checkpoints.snapshot import GeneratorsState, Resumable, Snapshot
from lorafit.training.checkpoints.writer import (
    CheckpointWriter,
    is_due,
    staged_checkpoint,
    staged_path,
)
from lorafit.training.distributed import naming_lost_processes


class ShardedWriter(CheckpointWriter):
    """Write checkpoints of a sharded model: every process its shards, and process 0 all else, the seal last."""

    is_shared = True

    def snapshot(self, loop: Resumable, generators_of: Sequence[GeneratorsState] = ()) -> Snapshot:
        """Copy this process's part of the present state of `loop` to the host."""
        own = Snapshot.of(loop, generators_of)
        return replace(own, optimizer=_layout(loop).named(own.optimizer, weights_of(loop)))

    def write(self, snapshot: Snapshot) -> None:
        """Write `snapshot` together with the other processes. An error in one of them is raised in all."""
        trained = snapshot.trained
        assert isinstance(trained, ShardsSnapshot), "only shards are written by several processes"
        final = self.folder / folder_name(snapshot.step)
        with naming_lost_processes():
            (self._follow if trained.layout.rank else self._lead)(snapshot, final, trained)

    def _lead(self, snapshot: Snapshot, final: Path, trained: ShardsSnapshot) -> None:
        """Stage the folder, write with the others, and seal it; process 0 tells the others how each part has ended."""
        with ExitStack() as staging:
            with _broadcasting(trained.layout) as content:
                staged = None
                if is_due(final, self.run):
                    staged = staging.enter_context(staged_checkpoint(snapshot, final, self.run, trained.layout.world))
                content[0] = staged is not None
            if staged is None:
                return
            _write_part(snapshot, staged, trained)
            with _broadcasting(trained.layout):
                snapshot.write_rest(staged)
                staging.close()
                self.prune()

    def _follow(self, snapshot: Snapshot, final: Path, trained: ShardsSnapshot) -> None:
        if _received(trained.layout):
            _write_part(snapshot, staged_path(final), trained)
            _received(trained.layout)


def _write_part(snapshot: Snapshot, staged: Path, trained: ShardsSnapshot) -> None:
    """Write this process's shards. Raises RunDirError in all processes if one cannot."""
    layout, own = trained.layout, None
    try:
        trained.require_finite(staged)
    except LorafitError as error:
        own = error.what
    told: list[Any] = [None] * layout.world
    dist.all_gather_object(told, own, group=layout.group)
    if bad := next(filter(None, told), None):
        raise RunDirError(bad)
    try:
        write_shards(trained.tensors, staged / ADAPTER, layout.group)
        write_shards(snapshot.optimizer, staged / SHARDED, layout.group)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise RunDirError(f"process {rank}: {getattr(reason, 'strerror', None) or reason}") from error


@contextmanager
def _broadcasting(layout: ShardLayout) -> Iterator[list[Any]]:
    """Send the other processes the list's one item once the block has ended, or the error that ended it."""
    content: list[Any] = [None]
    try:
        yield content
    except BaseException as error:
        dist.broadcast_object_list([None, f"process 0: {_reason(error)}"], src=0, group=layout.group)
        raise
    dist.broadcast_object_list([content[0], None], src=0, group=layout.group)


def _received(layout: ShardLayout) -> Any:
    """Return the content that process 0 sends. Raises RunDirError for its error."""
    received: list[Any] = [None, None]
    dist.broadcast_object_list(received, src=0, group=layout.group)
    if received[1] is not None:
        raise RunDirError(received[1])
    return received[0]


def _reason(error: BaseException) -> str:
    return str(getattr(error, "what", None) or getattr(error, "strerror", None) or error)


def _layout(loop: Resumable) -> ShardLayout:
    layout: ShardLayout = cast(Any, loop.model).shard_layout
    return layout
