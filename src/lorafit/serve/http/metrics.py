"""metrics: what Prometheus reads at /metrics, and the log of usage."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lorafit.serve.decoding import Generation

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Hold the counters of one server. It observes the scheduler and the routes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        timed: dict[str, Any] = {**own, "buckets": SECONDS}
        by = ["model", "tenant"]
        self.requests = Counter("lorafit_requests", "Requests by model, tenant and status.", [*by, "status"], **own)
        self.prompt_tokens = Counter("lorafit_prompt_tokens", "Tokens of prompts.", by, **own)
        self.generated_tokens = Counter("lorafit_generated_tokens", "Tokens of answers.", by, **own)
        self.first_token = Histogram("lorafit_time_to_first_token_seconds", "From request to first token.", **timed)
        self.between = Histogram("lorafit_inter_token_seconds", "Between two tokens of an answer.", **timed)
        self.queued = Histogram("lorafit_queue_seconds", "From request to a free slot.", **timed)
        self.running = Gauge("lorafit_running_answers", "Answers in the batch.", **own)
        self.waiting = Gauge("lorafit_waiting_answers", "Answers in the queue.", **own)
        self.kv_share = Gauge("lorafit_kv_used_ratio", "Used share of keys and values.", **own)
        self.cold_loads = Counter("lorafit_adapter_cold_loads", "Adapters read from disk for a request.", **own)
        self.crashes = Counter("lorafit_engine_crashes", "Crashes of the engine.", **own)
        self.kv_positions = 1

    def on_admitted(self, generation: Generation) -> None:
        """Note how long a request waited."""
        self.queued.observe(generation.admitted_s - generation.arrived_s)

    def on_step(self, running: int, waiting: int, used_positions: int) -> None:
        """Note the state after a step."""
        self.running.set(running)
        self.waiting.set(waiting)
        self.kv_share.set(used_positions / self.kv_positions)

    def on_crash(self, error: BaseException) -> None:
        """Count a crash."""
        self.crashes.inc()

    def text(self) -> bytes:
        """Return all values in Prometheus' text format."""
        return generate_latest(self.registry)


class UsageLog:
    """Append one JSON line a request to a file; None writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", encoding="utf-8") if path is not None else None
        self._lock = threading.Lock()

    def write(self, **fields: Any) -> None:
        """Write a line. A full disk loses lines, and no requests."""
        if self._file is None:
            return
        line = json.dumps({"time": round(time.time(), 3), **fields}, ensure_ascii=True)
        with self._lock:
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError:
                return

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
