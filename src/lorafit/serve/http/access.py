"""access: the key that every request carries, checked before anything else."""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafit.serve.http.errors import ApiError, error_content, error_response
from lorafit.serve.http.server import Server

LOG = logging.getLogger("lorafit.serve")


class Access:
    """Let requests with a known key pass, refuse new ones while the server drains, and hide the traces of bugs."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        tenant = self.server.tenants.find(_key_in(scope))
        if tenant is None:
            content = error_content(401, "no valid API key came with the request; send Authorization: Bearer KEY")
            await JSONResponse(content, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        if self.server.draining and scope["method"] == "POST":
            await error_response(ApiError(503, "the server is stopping", retry_s=5))(scope, receive, send)
            return
        scope["lorafit.tenant"] = tenant
        await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def note(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        self.server.requests += 1
        try:
            await self.app(scope, receive, note)
        except Exception as error:
            LOG.error("a request failed inside lorafit", exc_info=error)
            if began:
                raise  # the connection is cut, so that no half answer looks whole
            await JSONResponse(error_content(500, "internal error"), 500)(scope, receive, send)
        finally:
            self.server.requests -= 1


def _key_in(scope: Any) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if kind.lower() == "bearer" else ""
        if name == b"x-api-key":
            return str(value.decode("latin-1").strip())
    return ""
