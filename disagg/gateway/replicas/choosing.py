# SPDX-License-Identifier: Apache-2.0
"""Puts every choice of a replica to the one policy, and counts the legs on what it chose. Nothing else picks a replica.

The `RequestView` says which replicas were tried, and which replica is fixed. A leg counts on its replica from the
decision until the leg or the request ends. Only this module writes the counts of a `Member`. A call holds its
reservation. A leg takes its seat over from the reservation if it answers to the client, or may run on when the call has
lost interest in it. Belongs to the gateway's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from disagg.gateway.replicas.membership import DECODE, PREFILL, Member, Membership, Pair, Roster
from disagg.routing.candidates import alone
from disagg.routing.policy import Policy
from disagg.routing.views import Decision, ReplicaView, RequestView, Snapshot


class Chooser:
    """The policy of one gateway replica, the replicas that it chooses from, and whose turn it is."""

    def __init__(
        self, membership: Membership, policy: Policy, *, max_local_prefill_tokens: int, max_prefill_alone_tokens: int
    ) -> None:
        """Chooses from `membership` as it is at each call.

        Args:
            max_local_prefill_tokens: prompt tokens that a decode replica may compute at a time for this gateway.
            max_prefill_alone_tokens: those of a prefill replica that answers alone; 0 for never.
        """
        self._membership = membership
        self._policy = policy
        self._max_local_prefill_tokens = max_local_prefill_tokens
        self._max_prefill_alone_tokens = max_prefill_alone_tokens
        self._sequence = 0
        # Sequence number of the last decision for a prefill and a decode replica.
        self._pairs_chosen: dict[tuple[str, str], int] = {}
        self._roster = membership.roster

    def reserve(self, request: RequestView) -> Reservation:
        """Decide, and count the legs on the chosen replicas. The choice is numbered: the next one looks elsewhere."""
        roster = self._membership.roster
        decision = self._policy.choose(request, self._snapshot(roster))
        prefill_id, decode_id = decision.prefill_id, decision.decode_id
        if prefill_id is None and decode_id is None:
            return Reservation(decision, None, None)
        self._sequence += 1
        if decode_id is None:
            assert prefill_id is not None
            alone = roster.prefill[prefill_id]
            alone.last_chosen = self._sequence
            return Reservation(decision, None, alone, request.num_tokens)
        decode = roster.decode.get(decode_id) or roster.last_resort[decode_id]
        decode.last_chosen = self._sequence
        if prefill_id is None:
            return Reservation(decision, None, decode, request.num_tokens)
        prefill = roster.prefill[prefill_id]
        prefill.last_chosen = self._pairs_chosen[prefill_id, decode_id] = self._sequence
        return Reservation(decision, prefill, decode)

    def decide(self, request: RequestView) -> Decision:
        """What `reserve` would choose. Holds nothing and takes no turn."""
        return self._policy.choose(request, self._snapshot(self._membership.roster))

    def sparing(self, request: RequestView, replica_ids: Collection[str]) -> RequestView:
        """The request without these replicas if another one is left for it then, else the request as it is."""
        spared = replace(request, without=request.without.union(replica_ids))
        _, left = alone(spared, self._snapshot(self._membership.roster))
        return spared if left else request

    def _snapshot(self, roster: Roster) -> Snapshot:
        if roster is not self._roster:
            self._roster = roster
            self._forget_gone()
        return Snapshot(
            tuple([replica_view(member) for member in roster.prefill.values()]),
            tuple([replica_view(member) for member in roster.decode.values()]),
            tuple([replica_view(member) for member in roster.last_resort.values()]),
            self._pairs_chosen.copy(),
            self._max_local_prefill_tokens,
            self._max_prefill_alone_tokens,
        )

    def _forget_gone(self) -> None:
        """Forget the turns of the pairs that are not in Serve's lists any more."""
        listed = {member.info.replica_id for pool in (PREFILL, DECODE) for member in self._membership.members(pool)}
        self._pairs_chosen = {pair: at for pair, at in self._pairs_chosen.items() if listed.issuperset(pair)}


def replica_view(member: Member) -> ReplicaView:
    """A member as a policy sees it. Reuses the member's last view while it holds, for a request changes few members."""
    last = member.last_view
    if (
        last is not None
        and last.num_in_flight == member.num_in_flight
        and last.last_chosen == member.last_chosen
        and last.local_prefill_tokens == member.local_prefill_tokens
        and last.slow is member.slow
        and last.draining is member.draining
        and last.warm_peers is member.warm_peers
    ):
        return last
    member.last_view = view = ReplicaView(
        member.info.replica_id,
        member.num_in_flight,
        member.last_chosen,
        member.local_prefill_tokens,
        member.slow,
        member.draining,
        member.info.kv_fit,
        member.warm_peers,
    )
    return view


class Seat:
    """One leg on one replica, and the prompt tokens that the replica computes for it without a hand-off."""

    __slots__ = ("_num_tokens", "_taken", "_timer", "member")

    def __init__(self, member: Member, num_tokens: int = 0) -> None:
        """The leg counts on `member` from here until `release`."""
        self.member = member
        self._taken = True
        self._num_tokens = num_tokens
        self._timer: asyncio.TimerHandle | None = None
        member.num_in_flight += 1
        member.local_prefill_tokens += num_tokens

    def release(self) -> None:
        """The leg is over. Idempotent."""
        if self._taken:
            self._taken = False
            self.member.num_in_flight -= 1
            self.prompt_computed()

    def leg_over(self, leg: asyncio.Task[Any]) -> None:
        """`release`, as a callback of the leg's task."""
        self.release()

    def prompt_computed(self) -> None:
        """The replica no longer computes the leg's prompt: its tokens count no longer. Idempotent."""
        self.member.local_prefill_tokens -= self._num_tokens
        self._num_tokens = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expect_prompt_within(self, seconds: float) -> None:
        """Take the prompt as computed after `seconds`. For answers that do not show when their prompt is computed."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.prompt_computed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Reservation:
    """A decision, and the legs that it holds room for on the replicas it has chosen.

    Release it where the call ends: as a context manager, or with `release`. A leg that takes its seat over releases it
    itself.
    """

    __slots__ = ("_answering", "_prefill", "decision", "pair")

    def __init__(
        self, decision: Decision, prefill: Member | None, answering: Member | None, num_tokens: int = 0
    ) -> None:
        """A reservation of a pair, of one replica that answers alone, or of nobody.

        Args:
            prefill: the prefill replica of a hand-off.
            answering: the replica that the client's answer comes from.
            num_tokens: prompt tokens that `answering` computes for it.
        """
        self.decision = decision
        self.pair = None if prefill is None or answering is None else Pair(prefill, answering)
        self._prefill = None if prefill is None else Seat(prefill)
        self._answering = None if answering is None else Seat(answering, num_tokens)

    @property
    def answering(self) -> Member:
        """The replica that the client's answer comes from; for decisions that have one."""
        assert self._answering is not None
        return self._answering.member

    def take_prefill(self) -> Seat:
        """Take the seat of the prefill leg over: the caller has to release it. Call it once."""
        seat, self._prefill = self._prefill, None
        assert seat is not None
        return seat

    def take_answering(self) -> Seat:
        """Take the seat of the leg that answers over: the caller has to release it. Call it once."""
        seat, self._answering = self._answering, None
        assert seat is not None
        return seat

    def release(self) -> None:
        """Give back what nobody has taken over. Idempotent."""
        for seat in (self._prefill, self._answering):
            if seat is not None:
                seat.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
