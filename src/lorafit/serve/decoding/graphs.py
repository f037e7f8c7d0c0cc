"""DecodeGraphs: decoding steps recorded once as CUDA graphs and replayed, so that the GPU need not wait for Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

LOG = logging.getLogger("lorafit.serve")
WARM_RUNS = 2
"""Runs before a recording, in which libraries choose kernels and take their workspaces."""


class DecodeGraphs:
    """Replay functions of fixed shapes by a key. Without a GPU, and after a failed recording, they run as they are.

    Attributes:
        failed: True once a recording has failed; nothing is recorded any more.
        replays: number of replayed steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.failed, self.replays = device, device.type != "cuda", 0
        self._version: Hashable = None
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self._pool = None if self.failed else torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, version: Hashable, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what `work` returns. The tensors of a replayed step stay its until the next one of the same key.

        Everything is recorded anew when `version` changes: a tensor that `work` reads has moved.
        """
        if self.failed:
            return work()
        if version != self._version:
            self.forget()
            self._version = version
        if key not in self._graphs and not self._record(key, work):
            return work()
        graph, result = self._graphs[key]
        graph.replay()
        self.replays += 1
        return result

    def forget(self) -> None:
        """Drop all graphs."""
        if self._graphs:
            torch.cuda.synchronize(self.device)
            self._graphs.clear()
            # torch frees a pool with its last graph, and fails where another is recorded into it
            self._pool = torch.cuda.graph_pool_handle()

    def _record(self, key: Hashable, work: Callable[[], tuple[Tensor, ...]]) -> bool:
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_RUNS):
                work()
        current.wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failed = True
            self.forget()
            LOG.warning("decoding goes on without CUDA graphs: %s", str(error).strip().partition("\n")[0])
            return False
        self._graphs[key] = graph, result
        return True
