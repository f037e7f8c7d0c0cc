"""errors: what a client is told, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.responses import JSONResponse

from lorafit.errors import LorafitError, UsageError
from lorafit.serve.decoding import EngineStopped

LEFT = 499
"""Status of a request whose client closed the connection before the answer."""
UNREAD = (408, 413)
"""Statuses after which the rest of a body is not waited for."""
MOST_NAMES = 8
"""Most names of models in an error."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    502: "bad_gateway_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        message: one sentence.
        param: the field that is wrong.
        retry_s: seconds after which to try again.
    """

    def __init__(self, status: int, message: str, param: str | None = None, *, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_s = status, message, param, retry_s


def no_model(name: str, others: Iterable[str]) -> ApiError:
    """Return the error for an unknown model; `others` are the models that the key may use."""
    known = list(others)
    more = f" and {len(known) - MOST_NAMES} more, see /v1/models" if len(known) > MOST_NAMES else ""
    what = f"no model called {name[:64]} is loaded; there is {', '.join(known[:MOST_NAMES])}{more}"
    return ApiError(404, what if known else f"no model called {name[:64]} is loaded", "model")


def error_content(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(error: BaseException) -> JSONResponse:
    """Return the response to a failed request; other errors than these are bugs and are raised again."""
    known = as_api_error(error)
    headers = {"retry-after": str(max(1, round(known.retry_s)))} if known.retry_s is not None else {}
    if known.status in UNREAD:
        headers["connection"] = "close"
    return JSONResponse(error_content(known.status, known.message, known.param), known.status, headers)


def as_api_error(error: BaseException) -> ApiError:
    """Return `error` as one that a client may see. Raises anything else than LorafitError and EngineStopped."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineStopped):
        return ApiError(503, f"{error}; try again", retry_s=2)
    if isinstance(error, UsageError):
        return ApiError(400, error.sentence, error.where)
    if isinstance(error, LorafitError):
        return ApiError(400, error.sentence)
    raise error
