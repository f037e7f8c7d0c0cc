"""answering: one request's answers from the builtin engine, counted and ended in every case."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from lorafit.errors import LorafitError, TemplateError
from lorafit.serve.adapters import AdapterVersion
from lorafit.serve.decoding import Chosen, EngineStopped, Sampling
from lorafit.serve.http.errors import LEFT, ApiError, as_api_error, no_model
from lorafit.serve.http.requests import SamplingFields
from lorafit.serve.http.server import Server
from lorafit.serve.http.text_stream import TextStream
from lorafit.serve.tenants import Tenant


@dataclass(frozen=True)
class Piece:
    """Hold a piece of answer `index`: new text, the token that made it, and at the end the reason."""

    index: int
    text: str
    chosen: Chosen | None = None
    reason: str | None = None


@dataclass(eq=False)
class Answering:
    """Hold one request from its admission to its end. Use it as an async context.

    Attributes:
        server: engine, metrics and limits.
        tenant: who asks.
        fields: the checked body.
        prompts: token ids; each gets `n` answers.
        most: most tokens of an answer, or None.
        logprobs: alternatives to report with each token, or None.
    """

    server: Server
    tenant: Tenant
    fields: SamplingFields
    prompts: Sequence[Sequence[int]]
    most: int | None
    logprobs: int | None = None
    version: AdapterVersion | None = None
    cold_ms: float | None = None
    generated: int = 0
    status: int = 200
    started_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    @property
    def n(self) -> int:
        """Return the answers to each prompt."""
        return self.fields.n or 1

    @property
    def count(self) -> int:
        """Return the answers in all."""
        return self.n * len(self.prompts)

    async def __aenter__(self) -> Answering:
        """Check the limits, pin the adapter and have its weights in memory. Raises ApiError."""
        self._check()
        if (wait_s := self.tenant.enter(self.count)) is not None:
            self._note(429)
            raise ApiError(429, f"{self.tenant.name} has reached its limit", retry_s=wait_s)
        try:
            await self._pin()
        except BaseException as error:
            self.tenant.leave(self.count, 0)
            self._note(as_api_error(error).status if isinstance(error, LorafitError | ApiError) else 500)
            raise
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Count what was used, and let go of the adapter."""
        if self.version is not None:
            self.server.engine.pool.unpin(self.version)
        prompt_tokens = sum(map(len, self.prompts))
        self.tenant.leave(self.count, prompt_tokens + self.generated)
        if isinstance(error, EngineStopped | LorafitError | ApiError):
            self.status = as_api_error(error).status
        elif error is not None:
            self.status = LEFT
        by = (self.fields.model, self.tenant.name)
        self.server.metrics.prompt_tokens.labels(*by).inc(prompt_tokens)
        self.server.metrics.generated_tokens.labels(*by).inc(self.generated)
        self._note(self.status)

    def usage(self) -> dict[str, int]:
        """Return the tokens that were used."""
        prompt = sum(map(len, self.prompts))
        total = prompt + self.generated
        return {"prompt_tokens": prompt, "completion_tokens": self.generated, "total_tokens": total}

    def headers(self) -> dict[str, str]:
        """Return the headers that say which adapter answers and whether it had to be loaded."""
        if self.version is None:
            return {"x-lorafit-adapter": "none"}
        load = "resident" if self.cold_ms is None else f"cold; ms={self.cold_ms:.0f}"
        return {"x-lorafit-adapter": self.version.identity[:16], "x-lorafit-adapter-load": load}

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all answers as they come. Leaving the loop early cancels them."""
        queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        tasks = [asyncio.create_task(self._answer(index, queue)) for index in range(self.count)]
        left = len(tasks)
        try:
            while left:
                piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, index: int, queue: asyncio.Queue[Any]) -> None:
        try:
            await self._one(index, queue)
        except (LorafitError, EngineStopped) as error:
            queue.put_nowait(error)
        except Exception as error:  # noqa: BLE001 (raised again by the reader of the queue)
            queue.put_nowait(error)

    async def _one(self, index: int, queue: asyncio.Queue[Any]) -> None:
        engine = self.server.engine
        prompt = self.prompts[index // self.n]
        stream = TextStream(engine.base.template.tokenizer, self.fields.stops)
        options = {
            "max_new_tokens": min(self.most or engine.positions, engine.free_positions(prompt)),
            "tenant": self.tenant.name,
            "priority": self.tenant.settings.priority,
        }
        events = engine.stream(prompt, self.version, self._sampling(index % self.n), **options)
        last_s = self.started_s
        async with aclosing(events):
            async for event in events:
                if not isinstance(event, Chosen):
                    queue.put_nowait(Piece(index, stream.finish(), reason=_reason(event, stream)))
                    return
                last_s = self._time(last_s, is_first=not stream.ids)
                self.generated += 1
                text = stream.add(event.token)
                if stream.stopped:
                    queue.put_nowait(Piece(index, text, event, "stop"))
                    return
                queue.put_nowait(Piece(index, text, event))

    def _time(self, last_s: float, *, is_first: bool) -> float:
        now = time.monotonic()
        histogram = self.server.metrics.first_token if is_first else self.server.metrics.between
        histogram.observe(now - last_s)
        self.first_s = self.first_s or now
        return now

    def _sampling(self, number: int) -> Sampling:
        sampling = Sampling(
            temperature=self.fields.temperature or 0.0,
            top_p=1.0 if self.fields.top_p is None else self.fields.top_p,
            # without a seed each request draws anew
            seed=time.time_ns() & (2**62 - 1) if self.fields.seed is None else self.fields.seed,
            repetition_penalty=self.server.engine.repetition_penalty,
            logprobs=self.logprobs,
        )
        return replace(sampling, seed=sampling.seed + number)

    def _check(self) -> None:
        engine, options = self.server.engine, self.server.options
        if self.count > options.max_n:
            raise ApiError(400, f"{self.count} answers are asked for, and the most is {options.max_n}", "n")
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self.fields, name):
                raise ApiError(501, f"the builtin engine has no {name}; merge the run, and serve it with vLLM", name)
        if (self.fields.response_format or {}).get("type", "text") != "text":
            what = "the builtin engine does not constrain answers to a schema; merge the run, and serve it with vLLM"
            raise ApiError(501, what, "response_format")
        if not self.tenant.may_use(self.fields.model):
            raise ApiError(403, "this key may not use this model", "model")
        for prompt in self.prompts:
            engine.free_positions(prompt)

    async def _pin(self) -> None:
        engine = self.server.engine
        if self.fields.model == engine.base_name:
            return
        version = engine.pool.pin(self.fields.model)
        if version is None:
            names = [engine.base_name, *sorted(engine.pool.names())]
            raise no_model(self.fields.model, filter(self.tenant.may_use, names))
        try:
            if not engine.pool.is_resident(version):
                began = time.monotonic()
                await asyncio.to_thread(engine.pool.fetch, version)
                self.cold_ms = 1e3 * (time.monotonic() - began)
                self.server.metrics.cold_loads.inc()
        except BaseException:
            engine.pool.unpin(version)
            raise
        self.version = version

    def _note(self, status: int) -> None:
        # unknown names are not made labels: a client could write any number of them
        known = self.version is not None or self.fields.model == self.server.engine.base_name
        model = self.fields.model if known else "unknown"
        self.server.metrics.requests.labels(model, self.tenant.name, str(status)).inc()
        first_ms = None if self.first_s is None else round(1e3 * (self.first_s - self.started_s), 1)
        self.server.log.write(
            tenant=self.tenant.name,
            model=model,
            adapter=self.version.identity if self.version else None,
            status=status,
            prompt_tokens=sum(map(len, self.prompts)),
            completion_tokens=self.generated,
            first_token_ms=first_ms,
            total_ms=round(1e3 * (time.monotonic() - self.started_s), 1),
        )


def _reason(event: str, stream: TextStream) -> str:
    return "stop" if stream.stopped else event


def chat_prompt(server: Server, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Return the prompt of a conversation, as in training. Raises ApiError if the template refuses it."""
    try:
        ids: list[int] = server.engine.base.template.prompt_ids(messages)
    except TemplateError as error:
        raise ApiError(400, error.what, "messages") from error
    return ids


def text_prompt(server: Server, text: str) -> list[int]:
    """Return the ids of a text, with the tokenizer's own BOS once: a rendered prompt already has it."""
    tokenizer = server.engine.base.template.tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=True)
    if tokenizer.adds_bos and ids[:2] == [tokenizer.bos_id] * 2:
        ids = ids[1:]
    if tokenizer.eos_id is not None and ids and ids[-1] == tokenizer.eos_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # a tokenizer that frames texts with EOS would end the answer before it begins
    return ids
