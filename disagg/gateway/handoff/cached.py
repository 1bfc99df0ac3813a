# SPDX-License-Identifier: Apache-2.0
"""How much of a request's prompts some cache held before the request came, where the engine that answers cannot tell.

An engine that reads KV after the prefill leg's answer tells it right, since that answer says what prefill had cached.
With both legs at once the engine hears nothing of it, and of a `primed` request it finds cached what the probe brought.
An engine that answers after a failed try finds what that try has computed: there the first figure that a prefill leg
told stands for the whole request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from disagg.gateway.handoff.transfer import PrefillLeg, ends_now
from disagg.gateway.replicas.membership import Member
from pools.client.messages import PrefillReply
from pools.errors import ReplicaLostError


@dataclass(frozen=True)
class Cached:
    """Corrects the `cached_tokens` of one answer."""

    prompts: int | None = None
    """Tokens of all prompts that were cached before, whatever the engine says; None leaves it to the other fields."""
    leg: asyncio.Task[PrefillReply] | None = None
    """The prefill leg of a hand-off. It may still run when the answer begins."""
    earlier: tuple[asyncio.Task[PrefillReply], ...] = ()
    """Prefill legs of earlier tries of the request. The first of them that told a figure decides."""
    engine_tells: bool = True
    """Whether the figure of the engine that answers counts: False where an earlier try may have brought what it had."""

    def corrected(self, told: int) -> int:
        """The right figure where the engine reports `told`."""
        if self.prompts is not None:
            return self.prompts
        for leg in self.earlier:
            if (measured := told_by(leg)) is not None:
                return measured
        return max(told if self.engine_tells else 0, had(self.leg))

    async def known(self) -> None:
        """Wait until the figure is known."""
        if self.leg is not None:
            await told(self.leg)


@dataclass(frozen=True)
class _Try:
    """One engine that a request was sent to."""

    replica_id: str
    leg: asyncio.Task[PrefillReply] | None = None
    """The prefill leg; None where the engine was to answer the client."""

    @property
    def computed_nothing(self) -> bool:
        """Whether it is certain that the prefill engine computed nothing."""
        if self.leg is None or not self.leg.done() or self.leg.cancelled():
            return False
        error = self.leg.exception()
        if error is not None:
            return isinstance(error, ReplicaLostError) and not error.sent
        return 400 <= self.leg.result().status < 500


@dataclass
class Reached:
    """The engines that one request was sent to, over all its tries, resumes included."""

    _tries: list[_Try] = field(default_factory=list)
    _settled: int | None = None

    def prefill(self, leg: PrefillLeg) -> None:
        """Note a prefill leg that was sent."""
        self._tries.append(_Try(leg.prefill.info.replica_id, leg.task))

    def decode(self, replica_id: str) -> None:
        """Note an engine that was to answer, and may have computed or read the prompt."""
        self._tries.append(_Try(replica_id))

    def settle(self, num_cached: int) -> None:
        """Note what was cached of all prompts together: it stands, whoever answers."""
        self._settled = num_cached

    @property
    def measured(self) -> int:
        """Prompt tokens that were cached before the request, as far as its tries have told; 0 while none has."""
        if self._settled is not None:
            return self._settled
        figures = (told_by(one.leg) for one in self._tries if one.leg is not None)
        return next((figure for figure in figures if figure is not None), 0)

    def cached(self, answering: Member, leg: PrefillLeg | None = None, *, engine_tells: bool = True) -> Cached | None:
        """What corrects the answer of the next engine; None where that engine tells it right. Call it before `decode`.

        A replica that no earlier try has reached tells what it had before, unless it has a cache in common with others.

        Args:
            leg: the prefill leg of this answer's own hand-off. It has been noted.
            engine_tells: whether the engine hears what the prefill engine had.
        """
        if self._settled is not None:
            return Cached(self._settled)
        own = None if leg is None else leg.task
        earlier = [one for one in self._tries if not one.computed_nothing and (own is None or one.leg is not own)]
        if not earlier:
            return None if engine_tells else Cached(leg=own)
        reached = {one.replica_id for one in earlier}
        prefill_is_new = leg is None or _is_new(leg.prefill, reached)
        return Cached(
            leg=own if prefill_is_new else None,
            earlier=tuple(one.leg for one in earlier if one.leg is not None),
            engine_tells=prefill_is_new and _is_new(answering, reached),
        )


def _is_new(member: Member, reached: set[str]) -> bool:
    return member.info.replica_id not in reached and member.info.lmcache_http_url is None


def of_each(prompts: Sequence[Sequence[int]], found: Sequence[int], *, block_size: int) -> list[int]:
    """Tokens of each prompt that were cached before the request, without what one of its prompts brought for another.

    The engines find the beginning of a prompt cached once they have computed another prompt that begins alike. It was
    not cached before where the other prompt lacked its next block.

    Args:
        prompts: token ids of each prompt that was handed off.
        found: cached tokens of each, as the engines found them.
        block_size: tokens in a block of KV.
    """
    least = list(found)
    for other, num_cached in zip(prompts, found, strict=True):
        lacked = num_cached + block_size
        for i, prompt in enumerate(prompts):
            if found[i] > num_cached and len(other) >= lacked and prompt[:lacked] == other[:lacked]:
                least[i] = min(least[i], num_cached)
    return least


async def told(leg: asyncio.Task[PrefillReply]) -> int:
    """As `had`, of a leg whose KV has been read."""
    await ends_now(leg)
    return had(leg)


def had(leg: asyncio.Task[PrefillReply] | None) -> int:
    """Prompt tokens that a prefill engine had cached; 0 while its leg runs, and when it failed."""
    return (told_by(leg) if leg is not None else None) or 0


def told_by(leg: asyncio.Task[PrefillReply]) -> int | None:
    """As `had`; None while the leg runs, and when it failed."""
    if not leg.done() or leg.cancelled() or leg.exception() is not None:
        return None
    reply = leg.result()
    return reply.num_cached_tokens if reply.complete else None
