# SPDX-License-Identifier: Apache-2.0
"""The decode leg of one request, and the answer that it is. Knows nothing of retries or cleaning up."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.gateway.front.fields import PATHS
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.settling import UnderWay
from disagg.gateway.replicas.choosing import Seat
from pools.client.http1 import Exchange
from pools.client.replica import OpenedLeg


@dataclass
class Answer:
    """The decode leg, ready to be sent on: its head is here, and its first bytes."""

    leg: OpenedLeg
    seat: Seat
    mode: str
    prefill_id: str
    decode_id: str
    decode_fit: str
    """Its `kv_fit`."""
    under_way: UnderWay | None
    """The hand-off that it is made of, if the prompt's KV came by one."""

    @property
    def status(self) -> int:
        return self.leg.status

    @property
    def content_type(self) -> str:
        return self.leg.content_type

    @property
    def content(self) -> bytes:
        """The whole body, or the first chunk of a stream."""
        return self.leg.content

    @property
    def exchange(self) -> Exchange | None:
        """The rest of a stream; None when `content` is everything."""
        return self.leg.exchange

    def close(self) -> None:
        """End the decode leg, finished or not. Idempotent."""
        self.leg.close()
        self.seat.release()


async def decoded(
    seat: Seat,
    call: Call,
    body: bytes,
    *,
    mode: str,
    prefill_id: str,
    under_way: UnderWay | None = None,
) -> Answer:
    """The decode leg up to its first bytes. Raises ReplicaLostError while nothing of it was shown to the client.

    Args:
        seat: taken over by the answer, which releases it at its end.
        under_way: the hand-off that `body` brings; the engine tells it as `unread` if it never takes it.
    """
    member = seat.member
    try:
        leg = await member.client.decode(
            PATHS[call.endpoint],
            body,
            request_id=call.request_id,
            trace=call.trace,
            handoff_id=None if under_way is None else under_way.leg.handoff_id,
            on_sent=_nothing if under_way is None else under_way.mark_taken,
        )
    except BaseException:
        seat.release()
        raise
    if leg.complete:
        seat.release()
    return Answer(leg, seat, mode, prefill_id, member.info.replica_id, member.info.kv_fit, under_way)


def _nothing() -> None:
    pass
