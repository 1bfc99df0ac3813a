# SPDX-License-Identifier: Apache-2.0
"""Errors of the pools. One class per decision a caller can take; none of them knows HTTP."""

from __future__ import annotations

from transport.errors import DisaggError


class PoolError(DisaggError):
    """Something about a pool or one of its replicas."""


class EngineStartError(PoolError):
    """An engine did not come up. The message says which setting to change."""


class EngineDeadError(PoolError):
    """An engine is gone for good. Retry on another replica; this one is being replaced."""


class HandoffRefusedError(PoolError):
    """Hand-off parameters reached the engine a second time. Never replay them; prefill again."""


class ReplicaLostError(PoolError):
    """A replica cannot be reached, or left in the middle of an answer. Use another replica.

    Attributes:
        sent: whether the request may have reached the engine. If not, its hand-off is still unread.
        gone: whether the replica has ended the request itself: it refused or closed the connection, or its engine
            failed. False when it is only late, and may still be at work on the request.
        own: whether this process had nothing left to connect with. That says nothing about the replica.
        reason: why no other replica goes on, in words for the client. The message is not for clients: it may hold
            addresses.
    """

    def __init__(
        self, message: str, *, sent: bool = True, gone: bool = False, own: bool = False, reason: str | None = None
    ) -> None:
        super().__init__(message)
        self.sent = sent
        self.gone = gone
        self.own = own
        self.reason = reason

    @property
    def unreachable(self) -> bool:
        """Whether nothing can be sent to the replica at the moment."""
        return not self.sent and not self.own


class UnusableAnswerError(PoolError):
    """A replica answered, but not with what was asked for, or in words that this version cannot read.

    Attributes:
        status: HTTP status of the answer.
    """

    def __init__(self, message: str, *, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


class NoReplicaError(PoolError):
    """No replica of the pool is ready. Ask again after a few seconds; the pools may be starting.

    Attributes:
        pool: name of the pool, or None when it does not matter which.
    """

    def __init__(self, message: str, *, pool: str | None = None) -> None:
        super().__init__(message)
        self.pool = pool


class PoolOverloadedError(PoolError):
    """The gateway carries as many requests as it may. Ask again after a few seconds."""


class AttemptsExhaustedError(PoolError):
    """A request was lost on as many decode replicas as may be tried for it. The request may be what breaks them."""
