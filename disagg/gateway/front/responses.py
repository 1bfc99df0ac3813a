# SPDX-License-Identifier: Apache-2.0
"""Errors as the OpenAI API words them, and the one table from error class to HTTP status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import JSONResponse

from disagg.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ConflictError,
    ContextLengthError,
    HeadersTooLargeError,
    InvalidRequestError,
    MethodNotAllowedError,
    ModelNotFoundError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestError,
    RequestTimeoutError,
    StreamLimitError,
    UnsupportedMediaTypeError,
)
from pools.errors import AttemptsExhaustedError, EngineDeadError, NoReplicaError, PoolError, ReplicaLostError
from transport.errors import DisaggError


@dataclass(frozen=True)
class Shape:
    """How one class of errors looks over HTTP."""

    status: int
    type: str
    code: str | None = None


STATUS: dict[type[DisaggError], Shape] = {
    InvalidRequestError: Shape(400, "invalid_request_error"),
    AuthenticationError: Shape(401, "invalid_request_error", "invalid_api_key"),
    PermissionDeniedError: Shape(403, "permission_error"),
    NotFoundError: Shape(404, "invalid_request_error", "not_found"),
    ModelNotFoundError: Shape(404, "invalid_request_error", "model_not_found"),
    MethodNotAllowedError: Shape(405, "invalid_request_error", "method_not_allowed"),
    RequestTimeoutError: Shape(408, "invalid_request_error", "request_timeout"),
    ConflictError: Shape(409, "conflict_error"),
    BodyTooLargeError: Shape(413, "invalid_request_error", "request_too_large"),
    UnsupportedMediaTypeError: Shape(415, "invalid_request_error", "unsupported_media_type"),
    HeadersTooLargeError: Shape(431, "invalid_request_error", "headers_too_large"),
    ContextLengthError: Shape(400, "invalid_request_error", "context_length_exceeded"),
    StreamLimitError: Shape(408, "invalid_request_error", "stream_time_limit"),
    RateLimitError: Shape(429, "rate_limit_error", "rate_limit_exceeded"),
    RequestError: Shape(400, "invalid_request_error"),
    NoReplicaError: Shape(503, "service_unavailable_error", "no_replica_ready"),
    AttemptsExhaustedError: Shape(503, "service_unavailable_error", "attempts_exhausted"),
    EngineDeadError: Shape(503, "service_unavailable_error", "engine_dead"),
    ReplicaLostError: Shape(502, "server_error", "replica_lost"),
    PoolError: Shape(503, "service_unavailable_error"),
    DisaggError: Shape(500, "server_error"),
}
"""Most specific class first along each branch; a class without a line of its own takes its parent's."""


_LOST = "the replica that worked on the request was lost"


def shape_of(error: DisaggError) -> Shape:
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def client_message(error: DisaggError) -> str:
    """What a client is told. The message of a ReplicaLostError has addresses in it, so only the log gets it."""
    if not isinstance(error, ReplicaLostError):
        return str(error)
    return _LOST if error.reason is None else f"{_LOST}; the stream ends here: {error.reason}"


def error_body(error: DisaggError) -> dict[str, object]:
    shape = shape_of(error)
    return {
        "error": {
            "message": client_message(error),
            "type": shape.type,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None) or shape.code,
        }
    }


def error_response(error: DisaggError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(error), status_code=shape_of(error).status, headers=dict(headers or {}))


def error_event(error: DisaggError) -> bytes:
    """The end of a stream that cannot go on: an OpenAI error event, then `[DONE]`."""
    return b"data: " + json.dumps(error_body(error)).encode() + b"\n\ndata: [DONE]\n\n"
