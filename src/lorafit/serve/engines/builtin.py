"""BuiltinEngine: the live base of a run with many adapters, decoded in this process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.backbone import load_backbone
from lorafit.errors import UsageError
from lorafit.runs import LAST
from lorafit.serve.adapters import AdapterPool, AdapterVersion, ServedBase
from lorafit.serve.adapters.proof import GoldenProof
from lorafit.serve.decoding import BatchDecoder, Chosen, Generation, Sampling, Scheduler
from lorafit.serve.decoding.generation import Reason
from lorafit.serve.decoding.scheduler import Watch
from lorafit.serve.engine import require_embedded

LONGEST = 4096
SPARE_BYTES = 8 << 30
"""GPU memory that stays free beside dense copies of a quantized base, for adapters and the activations of prompts."""


@dataclass(frozen=True)
class Limits:
    """Hold the sizes of the engine.

    Attributes:
        max_num_seqs: most answers at once.
        max_model_len: most tokens of a text; None is the base's own limit, at most LONGEST.
        max_loras: most adapters in use at once.
        host_loras: most unused adapters in host memory.
        most_waiting: most waiting requests.
        dense: True to dequantize a quantized base once where the GPU has room.
    """

    max_num_seqs: int = 16
    max_model_len: int | None = None
    max_loras: int = 8
    host_loras: int = 64
    most_waiting: int = 1024
    dense: bool = True


class BuiltinEngine:
    """Answer from one frozen base, with an adapter for each request.

    Attributes:
        base: what all adapters have in common.
        base_name: the name that asks for the base itself.
        proof: the golden prompts, and the noise floor on them.
        is_dense: True if the quantized base was dequantized once, as the GPU has room for it.
    """

    def __init__(self, base: ServedBase, base_name: str, roots: Sequence[Path], limits: Limits, watch: Watch) -> None:
        """Load the base and prove its slots. Raises BackboneError or UsageError."""
        self.base, self.base_name, self.limits = base, base_name, limits
        model: Any = load_backbone(base.config, exact=True)
        self.positions = _positions(model, limits)
        self.decoder = BatchDecoder(
            model, slots=limits.max_num_seqs, positions=self.positions, adapters=limits.max_loras
        )
        self.proof = GoldenProof(self.decoder, base.template)
        self.is_dense = limits.dense and self.decoder.keep_dense(SPARE_BYTES)
        self.pool = AdapterPool(
            base, self.decoder.adapters, roots=roots, host_adapters=limits.host_loras, reserved=[base_name]
        )
        self.scheduler = Scheduler(self.decoder, self.pool, watch, most_waiting=limits.most_waiting)
        self.repetition_penalty = float(getattr(model.generation_config, "repetition_penalty", None) or 1.0)
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.scheduler.start()

    @property
    def state(self) -> str:
        """Return ready, draining, failed or stopped."""
        return self.scheduler.state

    def add_adapter(self, name: str, path: Path, *, replace: bool = False, checkpoint: str = LAST) -> AdapterVersion:
        """Check, prove and register the adapter in `path`. It blocks; requests go on meanwhile.

        `checkpoint` chooses the weights of a run directory: last, best or a step.

        Raises UsageError, RunDirError, AdapterError, TemplateError or VerificationError.
        """
        if name in self.pool.names() and not replace:
            raise UsageError(
                f"the adapter {name} is already loaded", where="lora_name", fix="unload it, or send load_inplace"
            )
        version = self.pool.open(name, path, checkpoint)

        def prove() -> None:
            weights = self.pool.weights(version)
            try:
                self.proof.prove_adapter(version, weights, self.pool.proof_slot)
            finally:
                self.decoder.adapters.clear(self.pool.proof_slot)

        self.scheduler.call(prove).result()
        self.pool.register(version, replace=replace)
        return version

    def remove_adapter(self, name: str) -> None:
        """Unload the adapter called `name`; running answers finish with it. Raises UsageError for an unknown name."""
        self.pool.unregister(name)

    def free_positions(self, prompt: Sequence[int]) -> int:
        """Return the tokens that an answer to `prompt` may have.

        Raises UsageError if there are none, and for a token without a row in the base's embedding table.
        """
        if len(prompt) >= self.positions:
            what = f"the prompt has {len(prompt):,} tokens, and texts have at most {self.positions:,}"
            raise UsageError(what, where="messages", fix="shorten it")
        if not prompt:
            raise UsageError("the prompt has no tokens", where="prompt", fix="write a text")
        require_embedded(prompt, self.vocabulary, self.base.template.tokenizer)
        return self.positions - len(prompt)

    async def stream(
        self,
        prompt: Sequence[int],
        version: AdapterVersion | None,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        tenant: str = "",
        priority: float = 1.0,
    ) -> AsyncGenerator[Chosen | Reason, None]:
        """Yield the tokens of an answer, and then why it ended. Leaving the loop early cancels it.

        Raises EngineStopped if the engine ends or crashes, and what `place` raises.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()
        tell = _teller(loop, events)
        generation = Generation(
            prompt,
            version,
            sampling,
            max_new_tokens,
            frozenset(self.base.template.stop_ids),
            on_token=tell,
            on_end=lambda reason, error: tell(error or reason),
            tenant=tenant,
            priority=priority,
        )
        self.scheduler.submit(generation)
        ended = False
        try:
            while not ended:
                event = await events.get()
                if isinstance(event, BaseException):
                    ended = True
                    raise event
                ended = not isinstance(event, Chosen)
                yield event
        finally:
            if not ended:
                self.scheduler.cancel(generation)

    def answer(self, prompt: Sequence[int], adapter: str | None, max_new_tokens: int = 256) -> list[int]:
        """Return the greedy answer of `adapter`; None is the base. It blocks; for tests and scripts."""

        async def collect() -> list[int]:
            version = None if adapter is None else self.pool.pin(adapter)
            try:
                sampling = Sampling(repetition_penalty=self.repetition_penalty)
                async with aclosing(self.stream(prompt, version, sampling, max_new_tokens=max_new_tokens)) as events:
                    return [event.token async for event in events if isinstance(event, Chosen)]
            finally:
                if version is not None:
                    self.pool.unpin(version)

        return asyncio.run(collect())

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Finish running answers and end the engine. Returns False if some were cut off."""
        return self.scheduler.drain(timeout_s)


def _teller(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any]) -> Callable[[Any], None]:
    def tell(event: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    return tell


def _positions(model: Any, limits: Limits) -> int:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    wanted = limits.max_model_len or min(LONGEST, most)
    if wanted > most:
        raise UsageError(f"the base has {most:,} positions, not {wanted:,}", where="--max-model-len")
    return int(wanted)
