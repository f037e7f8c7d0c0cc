"""Scheduler: the thread that owns the decoder. Each step reads some prompts and adds a token to every answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeVar

from lorafit.errors import LorafitError
from lorafit.serve.adapters.pool import AdapterPool
from lorafit.serve.decoding.batch import BatchDecoder, DecodedStep, Part
from lorafit.serve.decoding.fair_queue import FairQueue
from lorafit.serve.decoding.generation import EngineStopped, Generation, Reason
from lorafit.serve.decoding.sampling import Chosen, choose

State = Literal["ready", "draining", "failed", "stopped"]
CRASHES, CRASH_WINDOW_S = 3, 60.0
Result = TypeVar("Result")
LOG = logging.getLogger("lorafit.serve")


class Watch(Protocol):
    """Observe the scheduler."""

    def on_admitted(self, generation: Generation) -> None:
        """A request left the queue."""

    def on_step(self, running: int, waiting: int, used_positions: int) -> None:
        """A step ended."""

    def on_crash(self, error: BaseException) -> None:
        """A step failed; all answers ended with it."""


class Scheduler:
    """Run generations on one decoder, continuously: answers join and leave at any step."""

    def __init__(self, decoder: BatchDecoder, pool: AdapterPool, watch: Watch, *, most_waiting: int = 1024) -> None:
        self.decoder, self.pool, self.watch = decoder, pool, watch
        self.state: State = "ready"
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._queue: FairQueue[Generation] = FairQueue()
        self._running: dict[int, Generation] = {}
        # a step that the device may still run, and whose answers it continues, by slot
        self._ahead: tuple[DecodedStep, dict[int, Generation]] | None = None
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._crashes: deque[float] = deque(maxlen=CRASHES)
        self._thread = threading.Thread(target=self._run, name="lorafit-decoder", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Queue a generation. Raises EngineStopped if none is accepted, and UsageError if the queue is full."""
        with self._changed:
            if self.state != "ready":
                raise EngineStopped(f"the engine is {self.state}")
            if len(self._queue) >= self._most_waiting:
                raise EngineStopped("the queue is full")
            self._queue.put(generation.tenant, generation)
            self._changed.notify()

    def cancel(self, generation: Generation) -> None:
        """End a generation at the next step, wherever it is."""
        with self._changed:
            generation.cancelled = True
            self._changed.notify()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run `function` on the decoder's thread between two steps."""
        future: Future[Result] = Future()
        with self._changed:
            if self.state in ("failed", "stopped"):
                raise EngineStopped(f"the engine is {self.state}")
            self._calls.append((function, future))
            self._changed.notify()
        return future

    @property
    def load(self) -> tuple[int, int]:
        """Return (running, waiting)."""
        with self._changed:
            return len(self._running), len(self._queue)

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing new, wait for running and waiting answers, and stop. Returns False if some were cut off."""
        with self._changed:
            if self.state == "ready":
                self.state = "draining"
            self._changed.notify()
        deadline = time.monotonic() + timeout_s
        while sum(self.load) and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.02)
        whole = not sum(self.load)
        with self._changed:
            self.state = "stopped"
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        return whole

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_work() or self.state == "stopped")
                if self.state == "stopped":
                    break
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 (whatever it is, its requests must end)
                self._recover(error)
                if self.state == "failed":
                    break
        self._end_all(EngineStopped(f"the engine is {self.state}"))

    def _has_work(self) -> bool:
        return bool(self._running or self._calls or len(self._queue))

    def _step(self) -> None:
        self._make_calls()
        self._drop_cancelled()
        self._admit()
        self._prefill()
        self._decode()
        used = sum(generation.read + len(generation.ids) for generation in self._running.values())
        self.watch.on_step(len(self._running), len(self._queue), used)

    def _make_calls(self) -> None:
        if self._calls:
            self._read_ahead()  # a call may decode, which changes the tokens on the device
        while self._calls:
            function, future = self._calls.popleft()
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 (the caller gets it)
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        for generation in [each for each in self._running.values() if each.cancelled]:
            self._end(generation, "cancelled")
        with self._changed:  # all at once, as a request behind those of a hundred clients that left must not wait
            gone = self._queue.take_if(lambda each: each.cancelled)
        for generation in gone:
            generation.on_end("cancelled", None)

    def _admit(self) -> None:
        """Move waiting requests into free slots, the tenant with the least service first."""
        while free := [slot for slot in range(self.decoder.slots) if slot not in self._running]:
            with self._changed:
                heads = [(tenant, head) for tenant, head in self._queue.heads() if not head.cancelled]
            if not any(self._place(tenant, head, free[0]) for tenant, head in heads):
                break

    def _place(self, tenant: str, generation: Generation, slot: int) -> bool:
        """Give `generation` a slot and its adapter. Returns False while its adapter finds no room."""
        failure: LorafitError | None = None
        try:
            adapter = self.pool.place(generation.version) if generation.version is not None else 0
        except LorafitError as error:  # its files are damaged: this request fails, and no other
            adapter, failure = 0, error
        if adapter is None:
            return False
        with self._changed:
            self._queue.remove(tenant, generation)
            self._queue.admitted(tenant)
        if failure is not None:
            generation.on_end("error", failure)
            return True
        generation.slot, generation.adapter = slot, adapter
        generation.admitted_s = time.monotonic()
        if generation.sampling.temperature > 0:
            generation.generator = generation.sampling.generator()
        self._running[slot] = generation
        self._queue.charge(tenant, len(generation.prompt), generation.priority)
        self.watch.on_admitted(generation)
        return True

    def _prefill(self) -> None:
        """Read prompts, at most the decoder's `prefill_tokens` in all, so that running answers are not held up."""
        budget = self.decoder.prefill_tokens
        read: list[Generation] = []
        parts: list[Part] = []
        # of similar lengths, as shorter parts are padded to the longest
        reading = (each for each in self._running.values() if each.is_reading)
        for generation in sorted(reading, key=lambda each: len(each.prompt) - each.read):
            ids = generation.prompt[generation.read : generation.read + budget]
            longest = max([len(ids), *(len(part.ids) for part in parts)])
            if parts and longest * (len(parts) + 1) > budget:
                break
            read.append(generation)
            parts.append(Part(generation.slot, ids, generation.read, generation.adapter))
        if not parts:
            return
        logits = self.decoder.prefill(parts)
        likeliest = logits.argmax(-1).tolist()
        for place, (generation, part) in enumerate(zip(read, parts, strict=True)):
            generation.read += len(part.ids)
            if not generation.is_reading:
                self._accept_from(generation, likeliest[place], logits[place])

    def _decode(self) -> None:
        """Add a token to every answer. On a GPU the next step starts before the tokens of the last one are read."""
        before = self._ahead
        if before is not None and self._all_plain():
            self._ahead = self._start(before)
            self._read(before)
            return
        self._read_ahead()
        started = self._start(None)
        if started is not None and self.decoder.runs_ahead and self._all_plain():
            self._ahead = started
        elif started is not None:
            self._read(started)

    def _start(
        self, before: tuple[DecodedStep, dict[int, Generation]] | None
    ) -> tuple[DecodedStep, dict[int, Generation]] | None:
        """Start a step of all answers, on from the unread tokens of `before`; None if no answer needs one."""
        unread = {} if before is None else before[1]
        chosen, rows = {}, {}
        for slot, each in self._running.items():
            is_unread = unread.get(slot) is each
            if each.is_reading or len(each.ids) + is_unread >= each.max_new_tokens:
                continue
            token = None if is_unread else each.ids[-1]
            rows[slot] = (token, len(each.prompt) + len(each.ids) - 1 + is_unread, each.adapter)
            chosen[slot] = each
        return (self.decoder.decode(rows), chosen) if rows else None

    def _read_ahead(self) -> None:
        started, self._ahead = self._ahead, None
        if started is not None:
            self._read(started)

    def _read(self, started: tuple[DecodedStep, dict[int, Generation]]) -> None:
        """Wait for the step, and give each answer its token; answers that ended meanwhile get none."""
        step, rows = started
        likeliest = step.likeliest()
        for slot, generation in rows.items():
            if self._running.get(slot) is generation:
                self._accept_from(generation, likeliest[slot], step.logits[slot])

    def _all_plain(self) -> bool:
        """Return True if the device itself chooses the tokens of all answers."""
        return all(each.sampling.is_plain for each in self._running.values())

    def _accept_from(self, generation: Generation, likeliest: int, logits: Any) -> None:
        try:
            chosen = Chosen(likeliest) if generation.sampling.is_plain else self._chosen(generation, logits)
        except Exception as error:  # one request's settings must not end its neighbours' answers
            LOG.exception("a token could not be chosen")
            self._end(generation, "error", error)
            return
        self._accept(generation, chosen)

    def _chosen(self, generation: Generation, logits: Any) -> Chosen:
        seen = [*generation.prompt, *generation.ids] if generation.sampling.repetition_penalty != 1 else ()
        return choose(logits, generation.sampling, generation.generator, seen)

    def _accept(self, generation: Generation, chosen: Chosen) -> None:
        self._queue.charge(generation.tenant, 1, generation.priority)
        if reason := generation.accept(chosen):
            self._end(generation, reason)

    def _end(self, generation: Generation, reason: Reason, error: BaseException | None = None) -> None:
        with self._changed:
            del self._running[generation.slot]
        if generation.version is not None:
            self.pool.release(generation.version)
        generation.on_end(reason, error)

    def _recover(self, error: Exception) -> None:
        """End all answers with `error`, and begin anew with empty slots; fail after CRASHES within CRASH_WINDOW_S."""
        LOG.error("the engine crashed and starts again", exc_info=error)
        self.watch.on_crash(error)
        self._crashes.append(time.monotonic())
        too_often = len(self._crashes) == CRASHES and self._crashes[-1] - self._crashes[0] < CRASH_WINDOW_S
        self._ahead = None
        self._end_all(EngineStopped("the engine crashed and starts again"))
        if too_often:
            with self._changed:
                self.state = "failed"
            return
        self.decoder.forget()
        self.pool.forget_slots()

    def _end_all(self, error: BaseException) -> None:
        with self._changed:
            ended = [*self._running.values(), *self._queue.drain()]
            self._running.clear()
            calls, self._calls = list(self._calls), deque()
        for generation in ended:
            generation.on_end("error", error)
        for _, future in calls:
            future.set_exception(error)
