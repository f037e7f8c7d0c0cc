"""Server: what the routes share: engine, tenants, metrics, and the way to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from lorafit.serve.http.errors import ApiError
from lorafit.serve.http.metrics import Metrics, UsageLog
from lorafit.serve.tenants import Tenant, Tenants


@dataclass(frozen=True)
class ServerOptions:
    """Hold the limits of requests.

    Attributes:
        max_n: most answers to one request.
        drain_s: seconds in which running answers may finish after SIGTERM.
        usage_log: file that gets a JSON line a request.
    """

    max_n: int = 8
    drain_s: float = 30.0
    usage_log: Path | None = None


@dataclass(eq=False)
class Server:
    """Hold what the routes share."""

    engine: Any
    tenants: Tenants
    metrics: Metrics
    options: ServerOptions = field(default_factory=ServerOptions)
    draining: bool = False
    requests: int = 0

    def __post_init__(self) -> None:
        self.log = UsageLog(self.options.usage_log)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Stop the engine when the application ends."""
        yield
        self.draining = True
        await asyncio.to_thread(self.engine.stop, self.options.drain_s)
        self.log.close()


def server_of(request: Request) -> Server:
    """Return the server that got `request`."""
    found: Server = request.app.state.server
    return found


def tenant_of(request: Request) -> Tenant:
    """Return the tenant whose key came with `request`."""
    found: Tenant = request.scope["lorafit.tenant"]
    return found


def require_admin(request: Request) -> None:
    """Raise ApiError unless the key is the admin's."""
    if not tenant_of(request).is_admin:
        raise ApiError(403, "this route needs the admin key")
