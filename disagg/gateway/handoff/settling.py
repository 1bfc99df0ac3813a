# SPDX-License-Identifier: Apache-2.0
"""Gives back KV that nobody will read. To settle a hand-off is to tell its prefill replica that nobody will read it.

This module decides when the gateway may settle. A prefill engine frees settled blocks at once. So the gateway settles a
hand-off only when no decode engine can still be reading its KV and go on with what it has read.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Literal

from cachetools import FIFOCache

from disagg.gateway.background import Background
from disagg.gateway.handoff.transfer import PrefillLeg, ends_now
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.choosing import Reservation
from disagg.gateway.replicas.membership import Member, Pair
from pools.errors import ReplicaLostError, UnusableAnswerError

logger = logging.getLogger(__name__)

_MAX_REMEMBERED = 65_536
"""Hand-offs whose prefill replica is known; far more than a lease lets live at once."""
_GRACE_S = 1.0
"""How long an abort may take from a decode engine's server to its scheduler."""

Reason = Literal[
    "client_left",
    "decode_lost",
    "decode_rejected",
    "decode_error",
    "decode_did_not_wait",
    "abandoned",
    "prefill_lost",
    "gateway_error",
]


@dataclass(eq=False)
class UnderWay:
    """One hand-off whose legs run."""

    pair: Pair
    leg: PrefillLeg
    until: float
    """Loop time at which its prefill side is given up."""
    reservation: Reservation
    """Counts the request on the decode replica until the decode leg does so itself."""
    taken: bool = False
    """Whether the decode leg was sent. From then on its engine may be reading."""
    given_up: bool = False
    """Whether the gateway has given the hand-off up before its time. The cleanup has begun then."""

    @property
    def leg_done(self) -> bool:
        return self.leg.task.done()

    def mark_taken(self) -> None:
        self.taken = True


class Settling:
    """Which prefill replica holds which hand-off, and what to do with those that nobody will read."""

    def __init__(self, background: Background, ledger: Ledger) -> None:
        self._background = background
        self._ledger = ledger
        self._holders: FIFOCache[str, Member] = FIFOCache(_MAX_REMEMBERED)

    def expect(self, handoff_id: str, pair: Pair, request_id: str, num_tokens: int, tenant: str | None = None) -> None:
        """Remember a hand-off whose prefill leg is about to be sent, and announce it to the ledger."""
        self._holders[handoff_id] = pair.prefill
        self._ledger.open(handoff_id, request_id, pair.prefill.info, pair.decode.info, num_tokens, tenant)

    def settle(self, handoff_id: str) -> None:
        """Tell the prefill replica that nobody will read this hand-off. Ignores ids that this gateway did not make.

        Called when a decode engine reports `unread`: it has not read the KV, and will not.
        """
        holder = self._holders.get(handoff_id)
        if holder is not None:
            self._background.spawn(self._settle(holder, handoff_id))

    # What ends a hand-off before its time

    def client_left(self, under_way: UnderWay) -> None:
        """The client went away while the legs ran.

        The gateway settles if the decode leg was not sent. Once it is sent, only the decode engine knows whether it
        reads. Closing the connection aborts the request in that engine, and the engine reports `unread` if it had read
        nothing, even if the request had not reached its scheduler. If the request itself is lost on its way, the lease
        ends the hand-off.
        """
        self._give_up(under_way, "client_left", settle=not under_way.taken)

    def prefill_failed(self, under_way: UnderWay, cause: BaseException | None) -> None:
        """The prefill leg failed or was given up. A decode leg that was sent is closed, and its engine says `unread`.

        Without a decode leg the gateway settles, because the prefill engine may complete a leg that the gateway has
        given up. It does not settle when the prefill leg never reached the replica. `cause`: the error behind the
        failure, None when the prefill engine answered.
        """
        settle = not under_way.taken and not (isinstance(cause, ReplicaLostError) and not cause.sent)
        self._give_up(under_way, "abandoned" if isinstance(cause, TimeoutError) else "prefill_lost", settle=settle)

    def gateway_failed(self, under_way: UnderWay) -> None:
        """The gateway itself failed between the legs, in a way that nobody foresaw. As `client_left`."""
        self._give_up(under_way, "gateway_error", settle=not under_way.taken)

    def decode_lost(self, under_way: UnderWay, error: ReplicaLostError) -> None:
        """The decode leg broke off before its first bytes.

        - The leg was not sent: no engine reads, so the gateway settles at once.
        - The replica refused, reset or closed the connection: as a rule its process is gone, and whatever its workers
          still read dies with them. If the process lives, it has seen the connection close, and aborts the request. An
          engine does not cache what a read brings for an aborted request. So once the grace time is over, it harms
          nobody that blocks change under such a read, and the gateway settles.
        - The replica is late: it may be reading, and may still answer. Only the decode engine's own `unread` or the
          lease may end the hand-off.
        """
        settle = error.gone or not error.sent
        self._give_up(under_way, "decode_lost", settle=settle, grace=error.sent)

    def decode_answered(self, under_way: UnderWay, status: int) -> None:
        """The decode replica has answered with a status.

        A 4xx is a refusal by vLLM's front end, before the engine had the request: the gateway settles at once. A 5xx
        may come before or after the read, or from another failure while the request waits for its KV. The gateway
        settles once the grace time is over, whichever it was:

        - The KV was read: the hand-off is over at the prefill engine, and settling changes nothing.
        - Nothing was read: nobody but the gateway would tell the prefill engine.
        - A read is in progress: the request has failed, and the engine aborts it within the grace time. After that the
          read harms nobody, see `decode_lost`.
        """
        if 400 <= status < 500:
            self._give_up(under_way, "decode_rejected", settle=True)
        elif status >= 500:
            self._give_up(under_way, "decode_error", settle=True, grace=True)

    async def outlived(self, under_way: UnderWay) -> bool:
        """Stop a prefill leg that still runs although the decode leg has answered. Returns whether there was one.

        With both legs sent at once, the decode engine waits for KV no longer than a lease. Then it computes the prompt
        itself, and its first bytes show that it will read nothing any more: the gateway may abort and settle the
        prefill leg. When the decode engine did read the KV, its first bytes may come a moment before the prefill leg's
        own answer, so this method waits first. To abort and settle a consumed hand-off would change nothing.
        """
        if under_way.given_up:
            return False
        await ends_now(under_way.leg.task)
        if under_way.leg_done:
            return False
        self._give_up(under_way, "decode_did_not_wait", settle=True)
        return True

    def _give_up(self, under_way: UnderWay, reason: Reason, *, settle: bool, grace: bool = False) -> None:
        under_way.given_up = True
        self._ledger.note(under_way.leg.handoff_id, reason)
        self._background.spawn(self._clean_up(under_way, settle=settle, grace=grace))

    async def _clean_up(self, under_way: UnderWay, *, settle: bool, grace: bool) -> None:
        holder = under_way.pair.prefill
        if not under_way.leg_done:
            await self._abort(holder, under_way.leg.handoff_id)
        if settle:
            if grace:
                await asyncio.sleep(_GRACE_S)
            # Settle also when the leg ended without parameters: the abort may come too late, and the engine holds KV.
            await self._settle(holder, under_way.leg.handoff_id)

    async def _abort(self, holder: Member, handoff_id: str) -> None:
        try:
            await holder.client.abort(handoff_id)
        except (ReplicaLostError, UnusableAnswerError) as exc:
            logger.info("abort of %s did not reach %s: %s", handoff_id, holder.info.replica_id, exc)

    async def _settle(self, holder: Member, handoff_id: str) -> None:
        try:
            await holder.client.settle([handoff_id])
        except (ReplicaLostError, UnusableAnswerError) as exc:
            logger.warning(
                "%s could not be told that nobody reads %s; if it lives, the KV stays until its lease ends: %s",
                holder.info.replica_id,
                handoff_id,
                exc,
            )
