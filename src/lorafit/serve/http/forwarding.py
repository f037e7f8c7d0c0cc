"""forwarding: the routes of a server whose answers come from another program, behind lorafit's keys and tenants."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from lorafit.errors import ProgramError
from lorafit.serve.http.app import app_with, failed, model_entry, model_routes
from lorafit.serve.http.completions import client_left
from lorafit.serve.http.errors import LEFT, ApiError, no_model
from lorafit.serve.http.requests import read_body
from lorafit.serve.http.server import Server, server_of, tenant_of
from lorafit.serve.tenants import Tenant

ANSWER_S = 600.0
"""Most seconds between two pieces of an answer."""
NOT_READY = "the engine is not ready"


def make_forwarding_app(server: Server) -> Starlette:
    """Return the ASGI application of a server with a supervised engine."""
    answering = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize")
    own = [*model_routes(listed), *(Route(path, forward, methods=["POST"]) for path in answering)]
    app = app_with(server, own, {ProgramError: unreachable})
    app.state.client = httpx.AsyncClient(timeout=httpx.Timeout(ANSWER_S, connect=5.0), limits=httpx.Limits())
    return app


def listed(request: Request) -> list[dict[str, Any]]:
    """Return the entries of the model and the adapters that the key may use."""
    engine, tenant = server_of(request).engine, tenant_of(request)
    names: list[tuple[str, str | None]] = [(engine.served.base_name, None)]
    names += [(name, engine.served.base_name) for name in sorted(engine.names())]
    sampling = {"default_sampling": {"temperature": 0}}
    return [model_entry(name, parent) | sampling for name, parent in names if tenant.may_use(name)]


async def unreachable(request: Request, error: Exception) -> Response:
    """Answer for a program that refuses or does not answer to the server itself."""
    assert isinstance(error, ProgramError)
    return await failed(request, ApiError(502, error.what))


async def forward(request: Request) -> Response:
    """Check the key's rights and limits, and pass the request on. A client that leaves ends the program's work."""
    server, tenant = server_of(request), tenant_of(request)
    body = await read_body(request)
    passing = Passing(server, tenant, request.url.path, _checked(server, tenant, request.url.path, body))
    if (wait_s := tenant.enter(passing.answers)) is not None:
        passing.note(429)
        raise ApiError(429, f"{tenant.name} has reached its limit", retry_s=wait_s)
    try:
        answer = await passing.send(request)
    except BaseException as error:
        passing.leave(error.status if isinstance(error, ApiError) else LEFT)
        raise
    if passing.is_stream and answer.status_code == 200:
        return StreamingResponse(passing.pieces(answer), media_type="text/event-stream", headers=NO_BUFFERS)
    try:
        content = await answer.aread()
    except httpx.HTTPError as error:
        passing.leave(503)
        raise ApiError(503, f"{NOT_READY}; try again", retry_s=2) from error
    finally:
        await answer.aclose()
    passing.count(content)
    passing.leave(answer.status_code)
    return Response(content, answer.status_code, media_type=answer.headers.get("content-type"))


NO_BUFFERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def _checked(server: Server, tenant: Tenant, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with greedy sampling where it names none. Raises ApiError."""
    name, engine = body.get("model"), server.engine
    if not isinstance(name, str):
        raise ApiError(400, "a request names its model", "model")
    if name != engine.served.base_name and name not in engine.names():
        raise no_model(name, filter(tenant.may_use, [engine.served.base_name, *sorted(engine.names())]))
    if not tenant.may_use(name):
        raise ApiError(403, "this key may not use this model", "model")
    for key in ("n", "best_of"):
        count = body.get(key)
        if count is not None and (not isinstance(count, int) or not 1 <= count <= server.options.max_n):
            raise ApiError(400, f"{key} is between 1 and {server.options.max_n}", key)
    if engine.state != "ready":
        raise ApiError(503, f"the engine is {engine.state}", retry_s=5)
    # programs sample at 0.8 or 1.0 where a request names no temperature; the run's own answers are greedy
    greedy = {} if path == "/tokenize" or body.get("temperature") is not None else {"temperature": 0}
    return {**body, **greedy, **engine.served.fields_for(name)}


@dataclass(eq=False)
class Passing:
    """Hold one request on its way through, from its admission to its end."""

    server: Server
    tenant: Tenant
    path: str
    body: dict[str, Any]
    tokens: dict[str, int] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    @property
    def is_stream(self) -> bool:
        """Return True if the answer comes in pieces."""
        return self.body.get("stream") is True

    @property
    def answers(self) -> int:
        """Return the number of answers that are asked for."""
        prompts = self.body.get("prompt")
        many = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
        return many * int(self.body.get("n") or 1)

    async def send(self, request: Request) -> httpx.Response:
        """Return the program's answer, unread. Raises ApiError if the program is gone or the client leaves first."""
        client: httpx.AsyncClient = request.app.state.client
        asked = client.build_request("POST", f"{self.server.engine.url}{self.path}", json=self.body)
        work = asyncio.create_task(client.send(asked, stream=True))
        left = asyncio.create_task(client_left(request))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError(LEFT, "the client left")
            return work.result()
        except httpx.HTTPError as error:
            raise ApiError(503, f"{NOT_READY}; try again", retry_s=2) from error
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def pieces(self, answer: httpx.Response) -> AsyncGenerator[bytes, None]:
        """Yield the stream as it comes; a program that ends in the middle is told to the client."""
        status, last = LEFT, self.started_s
        try:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    last = self._time(last)
                    self.count(line[6:].encode())
                yield f"{line}\n".encode()
            status = 200
        except httpx.HTTPError:
            status = 503
            error = {"error": {"message": f"{NOT_READY}; try again", "type": "service_unavailable_error", "code": 503}}
            yield f"data: {json.dumps(error)}\n\n".encode()
        finally:
            await answer.aclose()
            self.leave(status)

    def count(self, content: bytes) -> None:
        """Take the used tokens from an answer, or count a piece of a stream that names none."""
        try:
            usage = json.loads(content).get("usage")
        except (ValueError, AttributeError):
            return
        if isinstance(usage, dict):
            self.tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        elif self.is_stream:
            self.tokens["completion_tokens"] = self.tokens.get("completion_tokens", 0) + 1

    def leave(self, status: int) -> None:
        """Count what was used, once."""
        self.tenant.leave(self.answers, sum(self.tokens.values()))
        by = (self.body["model"], self.tenant.name)
        self.server.metrics.prompt_tokens.labels(*by).inc(self.tokens.get("prompt_tokens", 0))
        self.server.metrics.generated_tokens.labels(*by).inc(self.tokens.get("completion_tokens", 0))
        self.note(status)

    def note(self, status: int) -> None:
        """Write the request to metrics and usage log."""
        self.server.metrics.requests.labels(self.body["model"], self.tenant.name, str(status)).inc()
        first_ms = None if self.first_s is None else round(1e3 * (self.first_s - self.started_s), 1)
        self.server.log.write(
            tenant=self.tenant.name,
            model=self.body["model"],
            status=status,
            prompt_tokens=self.tokens.get("prompt_tokens", 0),
            completion_tokens=self.tokens.get("completion_tokens", 0),
            first_token_ms=first_ms,
            total_ms=round(1e3 * (time.monotonic() - self.started_s), 1),
        )

    def _time(self, last_s: float) -> float:
        now, shared = time.monotonic(), self.server.metrics
        (shared.first_token if self.first_s is None else shared.between).observe(now - last_s)
        self.first_s = self.first_s or now
        return now
