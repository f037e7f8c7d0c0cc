"""adapters: the routes that load and unload adapters while the server runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lorafit.errors import UsageError
from lorafit.serve.http.errors import ApiError
from lorafit.serve.http.requests import AdapterRequest, parse, read_body
from lorafit.serve.http.server import require_admin, server_of


async def load_adapter(request: Request) -> Response:
    """Load the adapter of a run under a name; `load_inplace` replaces the one that has it."""
    require_admin(request)
    asked: AdapterRequest = parse(AdapterRequest, await read_body(request))
    if not asked.lora_path or "\0" in asked.lora_path:
        raise ApiError(400, "lora_path is the folder of a run", "lora_path")
    engine, name = server_of(request).engine, asked.lora_name
    await asyncio.to_thread(engine.add_adapter, name, Path(asked.lora_path), replace=asked.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_adapter(request: Request) -> Response:
    """Unload the adapter of a name. Answers that run finish with it."""
    require_admin(request)
    asked: AdapterRequest = parse(AdapterRequest, await read_body(request))
    try:
        server_of(request).engine.remove_adapter(asked.lora_name)
    except UsageError as error:
        raise ApiError(404, error.what, "lora_name") from error
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
