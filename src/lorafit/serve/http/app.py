"""app: the routes of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ExceptionHandler

from lorafit.errors import LorafitError
from lorafit.serve.decoding import EngineStopped
from lorafit.serve.http import completions, responses
from lorafit.serve.http.access import Access
from lorafit.serve.http.adapters import load_adapter, unload_adapter
from lorafit.serve.http.answering import chat_prompt, text_prompt
from lorafit.serve.http.errors import ApiError, error_content, error_response, no_model
from lorafit.serve.http.requests import TokenizeRequest, parse, read_body, text_messages
from lorafit.serve.http.server import Server, require_admin, server_of, tenant_of

STARTED_S = int(time.time())


def make_app(server: Server) -> Starlette:
    """Return the ASGI application of a server with the builtin engine."""
    own = [
        *model_routes(listed),
        Route("/v1/chat/completions", completions.chat, methods=["POST"]),
        Route("/v1/completions", completions.complete, methods=["POST"]),
        Route("/v1/responses", responses.answer, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
    ]
    return app_with(server, own, {EngineStopped: failed})


def app_with(server: Server, own: Sequence[Route], handlers: Mapping[Any, ExceptionHandler]) -> Starlette:
    """Return the ASGI application with the routes of every engine and its `own`; `handlers` answer its own errors."""
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
            *own,
            Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]),
        ],
        middleware=[Middleware(Access, server=server)],
        exception_handlers={ApiError: failed, LorafitError: failed, HTTPException: no_route, **handlers},
        lifespan=server.lifespan,
    )
    app.state.server = server
    return app


async def health(request: Request) -> Response:
    """Say that the process answers; 503 once the engine cannot recover."""
    failed = server_of(request).engine.state == "failed"
    return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)


async def ready(request: Request) -> Response:
    """Say whether new requests are accepted."""
    server = server_of(request)
    state = "draining" if server.draining else server.engine.state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


async def metrics(request: Request) -> Response:
    """Return Prometheus' text; the owner's key is needed, as other tenants' names are in it."""
    require_admin(request)
    return Response(server_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def listed(request: Request) -> list[dict[str, Any]]:
    """Return the entries of the base and the adapters that the key may use, with the sampling where none is asked."""
    engine, tenant = server_of(request).engine, tenant_of(request)
    names: list[tuple[str, Any]] = [(engine.base_name, None), *sorted(engine.pool.names().items())]
    return [_model(engine, name, version) for name, version in names if tenant.may_use(name)]


def model_routes(listed: Callable[[Request], list[dict[str, Any]]]) -> list[Route]:
    """Return the routes that list the models of `listed`, all of them and one by its name."""

    async def every(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": listed(request)})

    async def one(request: Request) -> Response:
        name, data = request.path_params["name"], listed(request)
        found = next((entry for entry in data if entry["id"] == name), None)
        if found is None:
            raise no_model(name, [entry["id"] for entry in data])
        return JSONResponse(found)

    return [Route("/v1/models", every), Route("/v1/models/{name:path}", one)]


def model_entry(name: str, parent: str | None) -> dict[str, Any]:
    """Return the part of a model's entry in /v1/models that every engine knows."""
    return {"id": name, "object": "model", "created": STARTED_S, "owned_by": "lorafit", "parent": parent}


def _model(engine: Any, name: str, version: Any) -> dict[str, Any]:
    return {
        **model_entry(name, None if version is None else engine.base_name),
        "root": engine.base.config.base if version is None else version.folder.parent.name,
        "max_model_len": engine.positions,
        "default_sampling": {"temperature": 0, "top_p": 1, "repetition_penalty": engine.repetition_penalty},
        "identity": engine.base.fingerprint if version is None else version.identity,
    }


async def tokenize(request: Request) -> Response:
    """Return the ids of a text or of a conversation's prompt."""
    server = server_of(request)
    asked: TokenizeRequest = parse(TokenizeRequest, await read_body(request))
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "send a prompt or messages", "prompt")
    if asked.messages is not None:
        ids = await asyncio.to_thread(chat_prompt, server, text_messages(asked.messages))
    elif asked.add_special_tokens:
        ids = await asyncio.to_thread(text_prompt, server, asked.prompt or "")
    else:
        ids = server.engine.base.template.tokenizer.encode(asked.prompt or "")
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": server.engine.positions})


async def failed(request: Request, error: Exception) -> Response:
    """Answer with what a client may know of the error."""
    return error_response(error)


async def no_route(request: Request, error: Exception) -> Response:
    """Answer to an unknown path or method with those that there are."""
    assert isinstance(error, HTTPException)
    path, routes = request.url.path[:64], [route for route in request.app.routes if isinstance(route, Route)]
    if error.status_code == 405:
        methods = (error.headers or {}).get("Allow", "")
        what = f"{path} takes {methods.replace('HEAD, ', '')}, not {request.method}"
    else:
        paths = ", ".join(route.path for route in routes if "{" not in route.path)
        what = f"there is no {path}; there are {paths}"
    return JSONResponse(error_content(error.status_code, what), error.status_code, error.headers)
