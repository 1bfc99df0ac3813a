# SPDX-License-Identifier: Apache-2.0
"""The decode leg of one request, and the answer that comes of it. Retries and cleaning up are not here."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.gateway.front.fields import PATHS
from disagg.gateway.handoff.cached import Cached
from disagg.gateway.handoff.call import Call
from disagg.gateway.handoff.settling import UnderWay
from disagg.gateway.replicas.choosing import Seat
from pools.client.http1 import Exchange
from pools.client.replica import OpenedLeg
from pools.errors import ReplicaLostError


@dataclass
class Answer:
    """A decode leg whose head and first bytes have arrived, so that the gateway can send it on to the client."""

    leg: OpenedLeg
    seat: Seat
    mode: str
    prefill_id: str
    decode_id: str
    decode_fit: str
    """`kv_fit` of the decode replica."""
    under_way: UnderWay | None
    """The hand-off that this leg brought to the decode engine; None in the modes `local` and `primed`."""
    cached: Cached | None = None
    """Corrects the answer's count of cached tokens; None where the engine tells it right."""

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
    """Send the decode leg and wait for its first bytes. Raises ReplicaLostError; the client has seen nothing by then.

    Args:
        seat: the answer takes it over, and releases it when the leg ends.
        under_way: the hand-off that `body` brings. The engine reports it as `unread` if the engine never takes it.
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
    except BaseException as exc:
        seat.release()
        if not isinstance(exc, ReplicaLostError) or exc.sent:
            call.reached.decode(member.info.replica_id)
        raise
    if not 400 <= leg.status < 500:
        call.reached.decode(member.info.replica_id)
    if leg.complete:
        seat.release()
    return Answer(leg, seat, mode, prefill_id, member.info.replica_id, member.info.kv_fit, under_way)


def _nothing() -> None:
    pass
