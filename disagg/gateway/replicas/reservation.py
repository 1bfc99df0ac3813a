# SPDX-License-Identifier: Apache-2.0
"""What runs on replicas for this gateway: counted from the decision on, until the leg or the request ends.

Nothing else writes the counts of a `Member`. A call holds its reservation; a leg that outlives the call's interest in
it, or answers to the client, takes its hold over. Belongs to the gateway's loop.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from disagg.gateway.replicas.membership import Member, Pair
from disagg.routing.views import Decision


class Hold:
    """One leg on one replica, and the prompt tokens that the replica computes for it without a hand-off."""

    __slots__ = ("_held", "_num_tokens", "_timer", "member")

    def __init__(self, member: Member, num_tokens: int = 0) -> None:
        """Counted from here until `release`."""
        self.member = member
        self._held = True
        self._num_tokens = num_tokens
        self._timer: asyncio.TimerHandle | None = None
        member.num_in_flight += 1
        member.local_prefill_tokens += num_tokens

    def release(self) -> None:
        """The leg is over. Idempotent."""
        if self._held:
            self._held = False
            self.member.num_in_flight -= 1
            self.prompt_computed()

    def prompt_computed(self) -> None:
        """The replica computes the leg's prompt no longer. Idempotent."""
        self.member.local_prefill_tokens -= self._num_tokens
        self._num_tokens = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expect_prompt_within(self, seconds: float) -> None:
        """Take the prompt as computed after so long, where the answer does not show when it is."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.prompt_computed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Reservation:
    """A decision, and the legs that it holds room for on the replicas it has chosen.

    Release it where the call ends: as a context manager, or with `release`. A leg that takes its hold over releases it
    itself.
    """

    __slots__ = ("_decode", "_prefill", "decision", "pair")

    def __init__(self, decision: Decision, prefill: Member | None, decode: Member | None, num_tokens: int = 0) -> None:
        """`num_tokens`: prompt tokens that `decode` computes for it."""
        self.decision = decision
        self.pair = None if prefill is None or decode is None else Pair(prefill, decode)
        self._prefill = None if prefill is None else Hold(prefill)
        self._decode = None if decode is None else Hold(decode, num_tokens)

    @property
    def decode(self) -> Member:
        """The decode replica; for decisions that have one."""
        assert self._decode is not None
        return self._decode.member

    def take_prefill(self) -> Hold:
        """The hold of the prefill leg, from here on the taker's to release. Take it once."""
        hold, self._prefill = self._prefill, None
        assert hold is not None
        return hold

    def take_decode(self) -> Hold:
        """The hold of the decode leg, from here on the taker's to release. Take it once."""
        hold, self._decode = self._decode, None
        assert hold is not None
        return hold

    def release(self) -> None:
        """Give back what nobody has taken over. Idempotent."""
        for hold in (self._prefill, self._decode):
            if hold is not None:
                hold.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
