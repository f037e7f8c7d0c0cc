"""serve: the command `lorafit serve`."""

from __future__ import annotations

import json as json_module
import os
import secrets
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.screen.console import say, show_json, show_next, typed
from lorafit.errors import UsageError
from lorafit.imports import importing_torch

EXAMPLES = """Examples:

lorafit serve runs/tickets

lorafit serve runs/tickets runs/orders --port 9000 --tenants tenants.yaml

lorafit serve served --engine vllm"""
API_KEY, ADMIN_KEY = "LORAFIT_API_KEY", "LORAFIT_ADMIN_KEY"
SHORTEST_KEY = 16
PACKAGES = ("starlette", "uvicorn", "httpx", "prometheus_client")


def serve(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs over the same base, or the folder of an export.", show_default=False)
    ],
    engine: Annotated[
        Literal["auto", "builtin", "vllm", "llamacpp"],
        typer.Option("--engine", metavar="ENGINE", help="builtin: runs. vllm, llamacpp: an export. Default by folder."),
    ] = "auto",
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="NUMBER", min=0, max=65535, help="Port; 0 is any.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="File that holds the API key.")
    ] = None,
    tenants: Annotated[
        Path | None, typer.Option("--tenants", metavar="FILE", help="YAML file of keys with their adapters and limits.")
    ] = None,
    adapter_dir: Annotated[
        list[Path] | None, typer.Option("--adapter-dir", metavar="DIR", help="Folder to load more runs from.")
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", metavar="NUMBER", min=1, max=1024, help="Most answers at once.")
    ] = 16,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", metavar="TOKENS", min=2, help="Most tokens of prompt and answer.")
    ] = None,
    max_loras: Annotated[
        int, typer.Option("--max-loras", metavar="NUMBER", min=1, max=1024, help="Most adapters in use at once.")
    ] = 8,
    usage_log: Annotated[
        Path | None, typer.Option("--usage-log", metavar="FILE", help="File for a JSON line a request.")
    ] = None,
    checkpoint: flags.Checkpoint = "last",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the start.")] = False,
) -> None:
    """Serve runs or an export over HTTP with OpenAI's routes; each request names the adapter that answers."""
    sizes = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len, "max_loras": max_loras}
    folders = {"tenants": tenants, "adapter_dirs": adapter_dir or [], "checkpoint": checkpoint}
    _serve(runs, engine, (host, port), api_key_file, folders, sizes, usage_log, json)


def _serve(
    runs: list[Path],
    engine: str,
    place: tuple[str, int],
    api_key_file: Path | None,
    folders: dict[str, Any],
    sizes: dict[str, Any],
    usage_log: Path | None,
    json: bool,
) -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"{missing[0]} is not installed", where="serve", fix="pip install 'lorafit[serve]'")
    with importing_torch():
        from lorafit.backbone import redirect_library_logs
        from lorafit.serve.engines import Limits, engine_for
        from lorafit.serve.http import ServerOptions
        from lorafit.serve.launch import Keys, listen, make_forwarding_server, make_server

    api, is_new = _api_key(api_key_file)
    keys = Keys(api, os.environ.get(ADMIN_KEY) or api)
    _require_key(keys.admin, ADMIN_KEY)
    options = ServerOptions(usage_log=usage_log)
    chosen = engine_for(runs, engine)
    shared: dict[str, Any] = {"limits": Limits(**sizes), "options": options, **folders}
    with redirect_library_logs():
        if chosen == "builtin":
            server = make_server(runs, keys, **shared)
            models = [server.engine.base_name, *server.engine.pool.names()]
        else:
            if shared.pop("checkpoint") != "last":
                raise UsageError("an export has one checkpoint", where="--checkpoint", fix="leave it out")
            server = make_forwarding_server(chosen, runs[0], keys, **shared)
            models = [server.engine.served.base_name, *server.engine.names()]

    def on_start(address: str) -> None:
        _show_started(address, models, api if is_new else None, api_key_file, as_json=json)

    listen(server, *place, on_start)


def _api_key(file: Path | None) -> tuple[str, bool]:
    """Return the key of the file or the environment, or a new one; and whether it is new."""
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("the API key cannot be read", where=str(file), fix="check the path") from error
        return _require_key(key, str(file)), False
    if key := os.environ.get(API_KEY, ""):
        return _require_key(key, API_KEY), False
    return secrets.token_urlsafe(32), True


def _show_started(address: str, models: list[str], new_key: str | None, file: Path | None, *, as_json: bool) -> None:
    """Show the address, a key that was made, and the command that asks the last model."""
    if as_json:
        show_json({"address": address, "models": models, **({"api_key": new_key} if new_key else {})})
        sys.stdout.flush()
        return
    say(f"serving {escape(', '.join(models))} at {address}/v1")
    if new_key:
        say(f"API key, shown once: {new_key}")
    kept = f"$(cat {typed(str(file))})" if file is not None else f"${API_KEY}"
    show_next((_request(address, models[-1], new_key or kept), "ask it"))


def _request(address: str, model: str, key: str) -> str:
    """Return the command that asks `model` at `address` a question. `key` is as a shell writes it."""
    body = json_module.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return f'curl {address}/v1/chat/completions -H "Authorization: Bearer {key}" -d {shlex.quote(body)}'


def _require_key(key: str, where: str) -> str:
    if len(key) < SHORTEST_KEY:
        raise UsageError(f"the key has fewer than {SHORTEST_KEY} characters", where=where, fix="use a longer one")
    if any(not "!" <= character <= "~" for character in key):
        what = "the key has spaces or characters beyond ASCII, which clients cannot send in a header"
        raise UsageError(what, where=where, fix="use letters, digits and signs")
    return key
