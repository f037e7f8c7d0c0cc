"""launch: a server of runs, from their folders to the socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from lorafit.errors import UsageError
from lorafit.runs import LAST, RunDir
from lorafit.serve.adapters import ServedBase, require_sums
from lorafit.serve.connections import allow_many_connections, socket_config
from lorafit.serve.engines import BuiltinEngine, Limits, SupervisedEngine, supervised_engine
from lorafit.serve.http import ServerOptions, make_app
from lorafit.serve.http.forwarding import make_forwarding_app
from lorafit.serve.http.metrics import Metrics
from lorafit.serve.http.server import Server
from lorafit.serve.tenants import Tenants


@dataclass(frozen=True)
class Keys:
    """Hold the server's own keys.

    Attributes:
        api: for every route but loading and metrics.
        admin: for all routes.
    """

    api: str = field(repr=False)
    admin: str = field(repr=False)


def make_server(
    runs: Sequence[Path],
    keys: Keys,
    *,
    limits: Limits,
    options: ServerOptions,
    tenants: Path | None = None,
    adapter_dirs: Sequence[Path] = (),
    checkpoint: str = LAST,
) -> Server:
    """Load the base of `runs` once with all their adapters, each proved. The adapter's name is its folder's.

    `checkpoint` chooses the weights of each run: last, best or a step. More adapters may be loaded at run time from
    the runs' folders and from `adapter_dirs`.

    Raises UsageError, RunDirError, BackboneError, AdapterError, TemplateError or VerificationError.
    """
    known = Tenants.of(keys.api, keys.admin, tenants)  # before the base is loaded, which takes longer
    names = [run.resolve().name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two runs are called {twice}", where="serve", fix="rename one of the folders")
    for run in runs:
        _require_run(run)
    base, metrics = ServedBase.of_run(runs[0]), Metrics()
    roots = [*(run.resolve() for run in runs), *(folder.resolve() for folder in adapter_dirs)]
    engine = BuiltinEngine(base, _base_name(base.config.base), roots, limits, metrics)
    metrics.kv_positions = limits.max_num_seqs * engine.positions
    try:
        for name, run in zip(names, runs, strict=True):
            engine.add_adapter(name, run, checkpoint=checkpoint)
    except BaseException:
        engine.stop(0)
        raise
    return Server(engine, known, metrics, options)


def make_forwarding_server(
    engine: str,
    target: Path,
    keys: Keys,
    *,
    limits: Limits,
    options: ServerOptions,
    tenants: Path | None = None,
    adapter_dirs: Sequence[Path] = (),
    log: Path | None = None,
) -> Server:
    """Start the program of `engine` on the export in `target`, and wait for its first answer.

    Raises UsageError, AdapterError or ProgramError.
    """
    known, metrics = Tenants.of(keys.api, keys.admin, tenants), Metrics()
    made = supervised_engine(
        engine,
        target,
        log,
        texts=limits.max_num_seqs,
        tokens=limits.max_model_len,
        adapter_dirs=adapter_dirs,
        on_gpu=torch.cuda.is_available(),
        on_crash=metrics.on_crash,
    )
    made.start()
    return Server(made, known, metrics, options)


def listen(server: Server, host: str, port: int, on_start: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; running answers then finish. `on_start` receives the address.

    Raises UsageError if the address cannot be used.
    """
    app = make_forwarding_app(server) if isinstance(server.engine, SupervisedEngine) else make_app(server)
    drain_s = round(server.options.drain_s)
    allow_many_connections()
    config = socket_config(app, host=host, port=port, timeout_graceful_shutdown=drain_s)
    program = _Program(config, server, on_start)
    try:
        program.run()
    except SystemExit as error:  # uvicorn has logged why
        what = f"the server cannot listen on {host} port {port}"
        raise UsageError(what, where="serve", fix="choose another --port") from error
    finally:
        server.engine.stop(0)


class _Program(uvicorn.Server):
    """Refuse new requests as soon as a signal asks the server to stop."""

    def __init__(self, config: uvicorn.Config, server: Server, on_start: Callable[[str], None]) -> None:
        super().__init__(config)
        self._server, self._on_start = server, on_start

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._server.draining = True
        super().handle_exit(sig, frame)


def _require_run(path: Path) -> None:
    """Raise UsageError for a run whose weights are no adapter."""
    if RunDir(path).holds_run:
        require_sums(RunDir(path).config(), path)
    if RunDir(path).holds_run and RunDir(path).config().method == "full":
        what = "a full run has no adapter, and the builtin engine serves adapters over one base"
        fix = f"run lorafit merge {path}, and then lorafit serve {RunDir(path).exports / 'full'}"
        raise UsageError(what, where=str(path), fix=fix)


def _base_name(base: str) -> str:
    """Return the name of the base for clients: its hub id, or its folder's name."""
    return Path(base).name if Path(base).is_absolute() or Path(base).exists() else base
