"""Errors as OpenAI's clients know them: ``{"error": {"message", "type", "param", "code"}}``.

The one place that turns an exception into a status and a body. A mistake of the client is 4xx; 500 is
a bug of the server, and its body tells nothing of the inside.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from conmoe_edge.errors import ConmoeError, ContextFull, NotFinite, OutOfMemory, UsageError
from conmoe_edge.serve.busy import Busy

log = logging.getLogger("conmoe_edge.serve")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that is not answered, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON value of the response."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, usual),
                "param": self.param,
                "code": self.code,
            }
        }


def only_text(where: str) -> ApiError:
    """For what is no text at a place of a request."""
    return ApiError(
        400, f"{where}: only text is supported.", param=where, code="unsupported_content"
    )


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """The JSON value of the response, as Anthropic's clients know it."""
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, usual)
    about = {"type": kind, "message": error.message}
    return {"type": "error", "error": about, "param": error.param, "code": error.code}


def body_for(error: ApiError, path: str) -> dict[str, Any]:
    """The JSON value of the response at an address."""
    return anthropic_body(error) if path.startswith(ANTHROPIC_PATH) else error.body


ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of any exception. The rest goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return _busy(error)
    if isinstance(error, ContextFull):
        return ApiError(400, _sentences(error), param="messages", code="context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, _sentences(error))
    if isinstance(error, (OutOfMemory, MemoryError)):
        return ApiError(
            503,
            "Memory ran out.",
            code="out_of_memory",
            headers={"Retry-After": "10"},
        )
    log.error("an answer failed", exc_info=error)
    if isinstance(error, NotFinite):
        return ApiError(
            500,
            "The model computes no numbers, so it is damaged; the server's log names layer and tensor.",
            code="model_damaged",
        )
    what = "The model could not be read" if isinstance(error, ConmoeError) else "Something failed"
    return ApiError(500, f"{what} inside the server; its log says more.", code="internal_error")


def too_many_connections() -> bytes:
    """The whole response for a connection that finds no place, before any request was read."""
    error = ApiError(503, "Too many connections are open.", code="too_many_connections")
    body = json.dumps(error.body).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    )
    return f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _busy(error: Busy) -> ApiError:
    headers = {"Retry-After": str(error.retry_after)}
    if error.reason == "full":
        message = f"Too many requests are waiting. Try again in about {error.retry_after} s."
        return ApiError(429, message, code="queue_full", headers=headers)
    if error.reason == "loading":
        return ApiError(503, "The model is still loading.", code="loading", headers=headers)
    return ApiError(503, "The server is stopping.", code="stopping", headers=headers)


def _sentences(error: ConmoeError) -> str:
    why = error.why.rstrip(".")
    return f"{error.what} {why[:1].upper()}{why[1:]}.".removesuffix(" .")
