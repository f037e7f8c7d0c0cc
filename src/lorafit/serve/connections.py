"""connections: the socket's side of a server: connections that send or read nothing end, and many fit."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

IDLE_S = 30
"""Seconds in which a connection begins a request, its headers included. Bodies have a limit of their own."""
STUCK_S = 60.0
"""Seconds in which a client reads what waits for it."""


class GuardedConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Serve one connection as uvicorn does, and end it if no request begins or nothing is read.

    uvicorn itself waits for ever for the first byte, for the rest of the headers, and for a client that does not read.
    """

    stuck_s = STUCK_S
    _idle: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _seen: Any = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more; the work for a request that still runs is cancelled."""
        for timer in (self._idle, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Note that the client does not read as fast as it is written to."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self.stuck_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Note that the client has read."""
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def _wait(self) -> None:
        self._idle = self.loop.call_later(self.timeout_keep_alive, self._end_if_idle)

    def _end_if_idle(self) -> None:
        """Close the connection if no request has begun since the last look."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and self.cycle is self._seen:
            self.transport.abort()
            return
        self._seen = self.cycle
        self._wait()


def socket_config(app: Any, **settings: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for `app`, with guarded connections; `settings` are uvicorn's own."""
    own = {"http": GuardedConnection, "timeout_keep_alive": IDLE_S, "log_level": "warning", "access_log": False}
    return uvicorn.Config(app, **{**own, **settings})


def allow_many_connections() -> None:
    """Raise the number of open files to the most that the process may have: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
