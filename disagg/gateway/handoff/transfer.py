# SPDX-License-Identifier: Apache-2.0
"""How the two legs of one hand-off go together: when the decode leg may be sent, and what watches the prefill leg then.

Two classes implement `Transfer`, one for each value of a transport's `legs`. The transport decides what the legs say.
Retries and cleaning up are not here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from disagg.gateway.replicas.membership import Member
from pools.client.messages import PrefillReply

T = TypeVar("T")

_ANSWER_GRACE_S = 1.0
"""How long after the decode leg's first bytes the prefill leg may be answered, although decode has read its KV."""


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


@dataclass(frozen=True, eq=False)
class PrefillLeg:
    """A prefill leg that was sent."""

    handoff_id: str
    prefill: Member
    task: asyncio.Task[PrefillReply]
    """It runs on when a caller that awaits it is cancelled."""


class Transfer(Protocol):
    """The steps of a hand-off, in this order: `prefill_params`, the prefill leg, `params`, `finish`."""

    @property
    def tells_cached(self) -> bool:
        """Whether the decode leg says what prefill had cached, so that the decode engine reports it."""
        ...

    def prefill_params(self, offer: Mapping[str, Any], handoff_id: str, prefill: Member) -> dict[str, Any]:
        """`kv_transfer_params` of the prefill leg, from what all transports send (`handoff_params.offer_params`).

        Raises PrefillFailed when the replica does not say where its KV will be.
        """
        ...

    async def params(self, leg: PrefillLeg, *, deadline: float) -> dict[str, Any]:
        """`kv_transfer_params` of the decode leg. Returns as soon as that leg may be sent.

        Raises PrefillFailed when the prefill side failed or was not over by `deadline` (loop time).
        """
        ...

    async def finish(
        self, leg: PrefillLeg, decode: Coroutine[Any, Any, T], *, drop: Callable[[T], None], deadline: float
    ) -> T:
        """Run `decode` and return its result. `decode` sends the decode leg and waits for its first bytes.

        When `finish` is cancelled, it ends the decode leg, and `drop` ends a result that no caller gets. The caller has
        to stop the prefill leg, also when a result has come that did not wait for that leg. Raises PrefillFailed when
        the prefill side failed or was not over by `deadline` (loop time); the decode leg has ended by then.
        """
        ...


async def ends_now(leg: asyncio.Task[PrefillReply]) -> None:
    """Wait a moment for a prefill leg to end whose KV has been read, so that its engine is about to answer."""
    await asyncio.wait({leg}, timeout=_ANSWER_GRACE_S)


def refusal(reply: PrefillReply) -> PrefillFailed:
    """Why an answered prefill leg hands nothing over."""
    if 400 <= reply.status < 500:
        return PrefillFailed("prefill_refused", retry=False)
    if reply.status < 400:
        return PrefillFailed("prefill_offered_nothing", retry=False)
    return PrefillFailed("prefill_lost", retry=True)
