# SPDX-License-Identifier: Apache-2.0
"""Every error of the project in one place, and the families of the gateway and of the SDK.

    DisaggError
    ├── ConfigError                  a field of the configuration cannot work
    ├── TransportError               KV could not be moved
    ├── UpstreamChangedError         vLLM, LMCache or Ray is not the one this is made for
    ├── PoolError                    a pool or one of its replicas
    │   ├── EngineStartError         an engine did not come up
    │   ├── EngineDeadError          an engine is gone for good
    │   ├── HandoffRefusedError      hand-off parameters were used before
    │   ├── NoReplicaError           no replica is ready
    │   ├── PoolOverloadedError      the gateway carries as many requests as it may
    │   ├── AttemptsExhaustedError   a request was lost on as many decode replicas as it may try
    │   ├── ReplicaLostError         a replica cannot be reached
    │   └── UnusableAnswerError      a replica answered what cannot be read
    ├── RequestError                 the client's fault
    │   ├── InvalidRequestError      a field of the request is wrong
    │   ├── ModelNotFoundError       no such model
    │   ├── NotFoundError            no such route or pool
    │   ├── MethodNotAllowedError    the route exists, with another method
    │   ├── RequestTimeoutError      the body did not arrive in time
    │   ├── BodyTooLargeError        the body exceeds the limit
    │   ├── HeadersTooLargeError     the headers exceed the limit
    │   ├── ContextLengthError       the prompt exceeds the limit
    │   ├── StreamLimitError         the answer's stream took too long
    │   ├── UnsupportedMediaTypeError  the body is not JSON
    │   ├── AuthenticationError      the key is missing or wrong
    │   ├── PermissionDeniedError    nobody may do this here
    │   ├── RateLimitError           more prompt tokens than the decode replicas may compute
    │   └── ConflictError            the application is in a state that forbids it
    └── ClientError                  raised by the SDK
        ├── APIConnectionError       the server cannot be reached
        ├── APITimeoutError          the server did not answer in time
        ├── APIStatusError           the server refused the request
        ├── APIResponseError         the answer is not one of disagg's
        └── ScaleTimeoutError        a pool did not reach its size in time

None of them knows HTTP, except that the SDK keeps the status it was answered with.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pools.errors import (
    AttemptsExhaustedError,
    EngineDeadError,
    EngineStartError,
    HandoffRefusedError,
    NoReplicaError,
    PoolError,
    PoolOverloadedError,
    ReplicaLostError,
    UnusableAnswerError,
)
from transport.errors import ConfigError, DisaggError, TransportError, UpstreamChangedError

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AttemptsExhaustedError",
    "AuthenticationError",
    "BodyTooLargeError",
    "ClientError",
    "ConfigError",
    "ConflictError",
    "ContextLengthError",
    "DisaggError",
    "EngineDeadError",
    "EngineStartError",
    "HandoffRefusedError",
    "HeadersTooLargeError",
    "InvalidRequestError",
    "MethodNotAllowedError",
    "ModelNotFoundError",
    "NoReplicaError",
    "NotFoundError",
    "PermissionDeniedError",
    "PoolError",
    "PoolOverloadedError",
    "RateLimitError",
    "ReplicaLostError",
    "RequestError",
    "RequestTimeoutError",
    "ScaleTimeoutError",
    "StreamLimitError",
    "TransportError",
    "UnsupportedMediaTypeError",
    "UnusableAnswerError",
    "UpstreamChangedError",
]


class RequestError(DisaggError):
    """A client asked for something it cannot have. Never retried; the message says what to change.

    Attributes:
        param: the field at fault, as the client wrote it, or None.
        code: a word that programs can test, or None.
    """

    default_code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code if code is not None else self.default_code


class InvalidRequestError(RequestError):
    """A field of the request is missing, of the wrong type or out of range."""


class ModelNotFoundError(RequestError):
    """The application serves another model."""

    default_code = "model_not_found"


class NotFoundError(RequestError):
    """There is no such route or pool."""

    default_code = "not_found"


class MethodNotAllowedError(RequestError):
    """The route exists, but not with this method."""

    default_code = "method_not_allowed"


class RequestTimeoutError(RequestError):
    """The request body did not arrive in time. Send it again."""


class BodyTooLargeError(RequestError):
    """The body exceeds the gateway's limit."""

    default_code = "body_too_large"


class HeadersTooLargeError(RequestError):
    """The request's headers exceed the gateway's limit."""

    default_code = "headers_too_large"


class ContextLengthError(RequestError):
    """The prompt exceeds the gateway's limit."""

    default_code = "context_length_exceeded"


class StreamLimitError(RequestError):
    """The stream took longer than the gateway lets it. What was sent so far is right."""

    default_code = "stream_time_limit"


class UnsupportedMediaTypeError(RequestError):
    """The body is not `application/json`."""

    default_code = "unsupported_media_type"


class AuthenticationError(RequestError):
    """The key is missing or wrong."""

    default_code = "invalid_api_key"


class PermissionDeniedError(RequestError):
    """The configuration lets nobody do this."""

    default_code = "permission_denied"


class RateLimitError(RequestError):
    """More prompt tokens than the decode replicas may compute at a time. Ask again after a few seconds."""

    default_code = "rate_limit_exceeded"


class ConflictError(RequestError):
    """The application is in a state that forbids this. The message says how to change that."""

    default_code = "conflict"


class ClientError(DisaggError):
    """A call of the SDK did not succeed."""


class APIConnectionError(ClientError):
    """The server cannot be reached. Start it, or correct the URL.

    Attributes:
        url: the address that was tried.
    """

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url


class APITimeoutError(ClientError):
    """The server did not answer in time. A scale request may have been carried out; look at the pool first.

    Attributes:
        url: the address that was tried.
    """

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url


class APIStatusError(ClientError):
    """The server refused the request. The message says what to do.

    Attributes:
        status_code: HTTP status.
        body: the decoded JSON body, else its text.
        code: the server's error code, or None.
    """

    def __init__(self, message: str, *, status_code: int = 0, body: Any = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.body = body
        self.code = code


class APIResponseError(ClientError):
    """The answer is not one of disagg's. Check that the URL is that of a disagg gateway of a matching version."""


class ScaleTimeoutError(ClientError):
    """A pool did not reach its size in time. The application goes on trying; the message says what is missing.

    Attributes:
        pool: name of the pool.
        num_replicas: the size that was asked for.
    """

    def __init__(self, message: str, *, pool: str | None = None, num_replicas: int | None = None) -> None:
        super().__init__(message)
        self.pool = pool
        self.num_replicas = num_replicas
