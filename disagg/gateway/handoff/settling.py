# SPDX-License-Identifier: Apache-2.0
"""Gives back KV that nobody will read: tells the prefill replica that holds it, by the hand-off's id.

What may be told when is decided here. A prefill engine frees settled blocks at once, so a hand-off is settled only when
no decode engine can still be reading it and go on with what it read.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Literal

from cachetools import FIFOCache

from disagg.gateway.background import Background
from disagg.gateway.handoff.transfer import PrefillLeg
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.choosing import Reservation
from disagg.gateway.replicas.membership import Member, Pair
from pools.errors import ReplicaLostError, UnusableAnswerError

logger = logging.getLogger(__name__)

_MAX_REMEMBERED = 65_536
"""Hand-offs whose prefill replica is known; far more than a lease lets live at once."""
_GRACE_S = 1.0
"""How long an abort may take from a decode engine's server to its scheduler."""
_ANSWER_GRACE_S = 1.0
"""How much later than the decode leg's first bytes a prefill leg may be answered whose KV they are made of."""

Reason = Literal[
    "client_left",
    "decode_lost",
    "decode_rejected",
    "decode_error",
    "decode_did_not_wait",
    "abandoned",
    "prefill_lost",
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
    """Whether something has ended it before its time, and what there is to do about that is under way."""

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
        """A hand-off whose prefill leg is about to be sent."""
        self._holders[handoff_id] = pair.prefill
        self._ledger.open(handoff_id, request_id, pair.prefill.info, pair.decode.info, num_tokens, tenant)

    def settle(self, handoff_id: str) -> None:
        """Tell its prefill replica that nobody will read this hand-off. Ids that this gateway did not make are ignored.

        For a decode engine's own word (`unread`): it has not read, and will not.
        """
        holder = self._holders.get(handoff_id)
        if holder is not None:
            self._background.spawn(self._settle(holder, handoff_id))

    # What ends a hand-off before its time

    def client_left(self, under_way: UnderWay) -> None:
        """The client went away while the legs ran.

        Once the decode leg is sent, its engine alone knows whether it reads: closing the connection aborts the request
        there, and the engine then says `unread` if it had read nothing, also when the request had not come as far as
        its scheduler. Should even the request be lost, the lease ends the hand-off.
        """
        self._give_up(under_way, "client_left", settle=not under_way.taken)

    def prefill_failed(self, under_way: UnderWay, cause: BaseException | None) -> None:
        """The prefill leg failed or was given up, and the decode leg, if sent, is closed; that one says `unread`.

        A leg that failed in the gateway's eyes may end well in the engine, hence the settling. `cause`: the error
        behind it, None when the engine answered.
        """
        settle = not under_way.taken and not (isinstance(cause, ReplicaLostError) and not cause.sent)
        self._give_up(under_way, "abandoned" if isinstance(cause, TimeoutError) else "prefill_lost", settle=settle)

    def decode_lost(self, under_way: UnderWay, error: ReplicaLostError) -> None:
        """The decode leg broke off before its first bytes.

        Not sent: nobody reads, so settle. Refused, reset or closed: the process is gone as a rule, and whatever its
        workers still read dies with them; should it live, it has seen the connection close and aborts the request. An
        engine does not cache what a read brings for an aborted request, so past the grace time blocks that change under
        such a read harm nobody. Late: it may be reading, and may answer yet as far as it knows, so only its own
        `unread` or the lease may end the hand-off.
        """
        settle = error.gone or not error.sent
        self._give_up(under_way, "decode_lost", settle=settle, grace=error.sent)

    def decode_answered(self, under_way: UnderWay, status: int) -> None:
        """The decode leg has a status.

        A 4xx is a refusal by vLLM's front end, from before the engine had the request: settle. A 5xx may come from
        before or after the read, or from a failure beside a request that waits for its KV. If it was read, the id is
        over at the prefill engine, and settling changes nothing. If nothing was read, nobody else would tell. If a read
        is in progress, the request has failed and is aborted in the engine, which takes no longer than the grace time;
        past it, as above, the read harms nobody.
        """
        if 400 <= status < 500:
            self._give_up(under_way, "decode_rejected", settle=True)
        elif status >= 500:
            self._give_up(under_way, "decode_error", settle=True, grace=True)

    async def outlived(self, under_way: UnderWay) -> bool:
        """Stop a prefill leg that runs on although the decode leg has answered; whether there was one.

        With both legs sent at once, decode waits for KV no longer than a lease and then computes the prompt itself. Its
        first bytes show that it reads nothing any more, so what is settled is of no use to it. On the ordinary way they
        may come a moment before the prefill leg's own answer, hence the wait; to abort and settle what was consumed
        would change nothing.
        """
        if under_way.given_up:
            return False
        await asyncio.wait({under_way.leg.task}, timeout=_ANSWER_GRACE_S)
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
            # Also when the leg ended without parameters: an abort can come too late to keep the engine from producing.
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
