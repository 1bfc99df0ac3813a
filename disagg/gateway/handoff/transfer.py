# SPDX-License-Identifier: Apache-2.0
"""How the two legs of one hand-off go together: which is sent when, and what each engine is told. The interface.

Two classes keep it, one for each value of a transport's `legs`. What the legs say is the transport's own; retries and
cleaning up are not here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from disagg.gateway.replicas.membership import Member
from pools.client.messages import PrefillReply

T = TypeVar("T")


class PrefillFailed(Exception):
    """The prefill side of a hand-off came to nothing, and the decode side has shown nothing.

    Attributes:
        reason: one of a few fixed words, used as a metric label.
        retry: whether another prefill replica may do better.
    """

    def __init__(self, reason: str, *, retry: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry = retry


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """One hand-off from one prefill replica, before anything is sent."""

    handoff_id: str
    prefill: Member
    send: Callable[[], asyncio.Task[PrefillReply]]
    """Sends the prefill leg, in a task of its own that outlives the caller. Call it once."""
    take: Callable[[dict[str, Any]], Awaitable[T]]
    """Sends the decode leg with these parameters, up to its first bytes."""
    drop: Callable[[T], None] = lambda _: None
    """Ends a decode leg whose result nobody takes."""


class Transfer(Protocol):
    """The way through a hand-off."""

    def prefill_params(self, offer: Mapping[str, Any], handoff_id: str) -> dict[str, Any]:
        """`kv_transfer_params` of the prefill leg, from what all transports send (`legs.offer_params`)."""
        ...

    async def run(self, attempt: Attempt[T], *, deadline: float) -> T:
        """Both legs, up to what `take` returns.

        Cancelling it ends the decode leg; the prefill leg is the caller's to stop, also when it runs on beside a result
        that did not wait for it. Raises PrefillFailed when the prefill side failed or was not over by `deadline` (loop
        time); the decode leg is ended by then.
        """
        ...


def refusal(reply: PrefillReply) -> PrefillFailed:
    """Why an answered prefill leg hands nothing over."""
    if 400 <= reply.status < 500:
        return PrefillFailed("prefill_refused", retry=False)
    if reply.status < 400:
        return PrefillFailed("prefill_offered_nothing", retry=False)
    return PrefillFailed("prefill_lost", retry=True)
