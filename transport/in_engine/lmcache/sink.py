# SPDX-License-Identifier: Apache-2.0
"""Which finished hand-offs are stored in the shared tier, and which KV blocks stay pinned for that. Pure.

No vLLM and no LMCache imports: blocks, metadata and requests are opaque here. `sink_manager` connects this code to the
calls that LMCache makes; `connector` builds the stores.

A hand-off is held first: its KV waits for a decode engine. A consumed hand-off is then dropped, and has cost one
dictionary entry. Any other is adopted, and its store is a *rescue*: the blocks are pinned at once, the store is queued
and then submitted to every rank, and the blocks are freed when each rank has reported. The scheduler side decides once.
Each rank then stores its own share of the same tokens, so only the count of reports depends on the number of ranks.
When one rank fails, the whole rescue fails, but only after the last report: other ranks may still be reading the blocks
until then.

A rescue never holds an engine up. The sink pins at most a quarter of the KV blocks; beyond that it gives up the oldest
rescue that is not submitted yet, with `no room`. It submits at most one store in a step, and at most eight are under
way. It gives up a rescue that is not settled in time, and frees the blocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport.in_engine.lmcache.pins import BlockPool, Pins
from transport.in_engine.protocols import Event, Outcome

MAX_PINNED_SHARE = 0.25
"""Share of the KV blocks that rescues may pin."""
MAX_UNDER_WAY = 8
"""Stores submitted and not reported by every rank."""

NO_ANSWER = "LMCache does not answer"
NO_ROOM = "no room"
STORE_FAILED = "the store failed"
TOO_LATE = "not stored in time"


@dataclass(frozen=True)
class Store:
    """One thing to store, as the caller's `make_store` describes it."""

    metadata: Any
    """Goes to the workers; its `request_id` is the key of their reports."""
    block_ids: tuple[int, ...]
    """Blocks that are read, without the null block."""
    tokens: int
    """Tokens stored: full chunks that the tier did not have."""
    bytes: int
    """KV of those tokens, all layers and ranks."""
    chunks: tuple[str, ...]
    """Their chain digests."""


@dataclass(frozen=True)
class _Held:
    handoff_id: str
    kept: Any
    always: bool


@dataclass
class _Rescue:
    handoff_id: str
    store: Store
    deadline: float
    reports: int = 0
    failed: bool = False


class Rescues:
    """The held and the adopted hand-offs of one engine. Scheduler thread only.

    Args:
        make_store: makes a `Store` of a store id and what `hold` kept, or None when no full chunk is left to store.
        is_healthy: whether the tier answers.
        num_ranks: reports that settle a store.
        deadline_s: seconds for which a rescue may be queued, and then as many for its reports, before it is given up.
            Must be longer than a rank takes to give up: a rank that still reads freed blocks would store the KV of
            another prompt.
    """

    def __init__(
        self,
        *,
        make_store: Callable[[str, Any], Store | None],
        is_healthy: Callable[[], bool],
        num_ranks: int,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._make_store = make_store
        self._is_healthy = is_healthy
        self._num_ranks = num_ranks
        self._deadline_s = deadline_s
        self._clock = clock
        self._unix_time = unix_time
        self._pins = Pins(MAX_PINNED_SHARE)
        self._held: dict[str, _Held] = {}
        self._queued: deque[_Rescue] = deque()
        self._under_way: dict[str, _Rescue] = {}
        self._made = 0
        self._events: list[Event] = []

    @property
    def num_held(self) -> int:
        """Hand-offs whose outcome is open."""
        return len(self._held)

    @property
    def num_pinned_blocks(self) -> int:
        """Blocks that vLLM cannot give to another request."""
        return self._pins.num_blocks

    def bind(self, pool: BlockPool) -> None:
        """Take the engine's block pool. To be called before any other method."""
        self._pins.bind(pool)

    def hold(self, request_id: str, handoff_id: str, kept: Any, *, always: bool = False) -> None:
        """Remember a finished hand-off until `decide`. `always` stores it whatever its outcome."""
        self._held[request_id] = _Held(handoff_id, kept, always)

    def kept(self, request_id: str) -> Any | None:
        """What `hold` was given, None for a request that is not held."""
        held = self._held.get(request_id)
        return None if held is None else held.kept

    def forget(self, request_id: str) -> None:
        """A new request, or the same one from its start, uses the id: what was held under it is not stored any more."""
        self._held.pop(request_id, None)

    def decide(self, request_id: str, outcome: Outcome) -> bool:
        """Whether the hand-off is adopted. Adopting pins its blocks, so call this before vLLM frees them.

        True promises a `rescued` or a `rescue_failed` event. False: it was not held, it was consumed, or it has no full
        chunk that the tier lacks.
        """
        held = self._held.pop(request_id, None)
        if held is None or (outcome == "consumed" and not held.always):
            return False
        self._made += 1
        store = self._make_store(f"{request_id}/sink-{self._made}", held.kept)
        if store is None:
            return False
        if not self._is_healthy():
            self._fail(held.handoff_id, NO_ANSWER)
        elif not self._make_room(len(store.block_ids)):
            self._fail(held.handoff_id, NO_ROOM)
        else:
            self._pins.pin(store.block_ids)
            self._queued.append(_Rescue(held.handoff_id, store, self._clock() + self._deadline_s))
        return True

    def next_stores(self) -> list[Any]:
        """The metadata to send with this step, at most one. Gives up rescues that are too late."""
        now = self._clock()
        for store_id, rescue in list(self._under_way.items()):
            if rescue.deadline <= now:
                del self._under_way[store_id]
                self._give_up(rescue, TOO_LATE)
        while self._queued and (self._queued[0].deadline <= now or not self._is_healthy()):
            self._give_up(self._queued.popleft(), TOO_LATE if self._is_healthy() else NO_ANSWER)
        if not self._queued or len(self._under_way) >= MAX_UNDER_WAY:
            return []
        rescue = self._queued.popleft()
        rescue.deadline = now + self._deadline_s
        self._under_way[rescue.store.metadata.request_id] = rescue
        return [rescue.store.metadata]

    def report(self, failed: Iterable[str], done: Mapping[str, int]) -> list[str]:
        """Count the ranks' reports; returns the store ids that are settled. Ids that are not under way are ignored.

        Args:
            failed: store ids that failed on at least one rank; each is in `done` too, then or later.
            done: store id -> ranks that reported it since the last call, failed or not.
        """
        for store_id in failed:
            if store_id in self._under_way:
                self._under_way[store_id].failed = True
        settled = []
        for store_id, count in done.items():
            rescue = self._under_way.get(store_id)
            if rescue is None:
                continue
            rescue.reports += count
            if rescue.reports < self._num_ranks:
                continue
            del self._under_way[store_id]
            settled.append(store_id)
            if rescue.failed:
                self._give_up(rescue, STORE_FAILED)
            else:
                self._pins.unpin(rescue.store.block_ids)
                self._rescued(rescue)
        return settled

    def is_under_way(self, store_id: str) -> bool:
        """Whether `store_id` names a submitted store of this sink."""
        return store_id in self._under_way

    def has_work(self) -> bool:
        """Whether blocks are pinned, so that the engine must keep stepping."""
        return bool(self._queued or self._under_way)

    def take_events(self) -> list[Event]:
        """Events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def _make_room(self, num_blocks: int) -> bool:
        """Give up queued rescues, oldest first, until `num_blocks` more may be pinned. False when that cannot be.

        A single prompt may be larger than the share: waiting for a decode engine would have kept its blocks as well.
        """
        limit = max(self._pins.limit, num_blocks)
        submitted = sum(len(r.store.block_ids) for r in self._under_way.values())
        if submitted + num_blocks > limit:
            return False
        while self._pins.num_blocks + num_blocks > limit:
            self._give_up(self._queued.popleft(), NO_ROOM)
        return True

    def _give_up(self, rescue: _Rescue, reason: str) -> None:
        self._pins.unpin(rescue.store.block_ids)
        self._fail(rescue.handoff_id, reason)

    def _rescued(self, rescue: _Rescue) -> None:
        self._events.append(
            {
                "kind": "rescued",
                "at": self._unix_time(),
                "id": rescue.handoff_id,
                "tokens": rescue.store.tokens,
                "bytes": rescue.store.bytes,
                "chunks": list(rescue.store.chunks),
            }
        )

    def _fail(self, handoff_id: str, reason: str) -> None:
        self._events.append({"kind": "rescue_failed", "at": self._unix_time(), "id": handoff_id, "reason": reason})


def leading_tokens(
    block_ids: Iterable[Sequence[int]], group_tokens: Iterable[int], start: int, end: int, chunk_tokens: int
) -> int:
    """The end of the leading chunks, from `start` on, that are whole and have every block; at most `end`.

    vLLM takes away blocks that fell out of a sliding window and leaves block 0 in their place. Block 0 holds no KV and
    must never be stored.

    Args:
        block_ids: for each cache group the blocks of `[start, end)`; a list that is too short lacks its last ones.
        group_tokens: for each group the tokens of a block, 0 for one that is not stored. Each divides `chunk_tokens`.
    """
    groups = [(ids, tokens) for ids, tokens in zip(block_ids, group_tokens, strict=True) if tokens]
    for chunk in range((end - start) // chunk_tokens):
        for ids, tokens in groups:
            per_chunk = chunk_tokens // tokens
            of_chunk = ids[chunk * per_chunk : (chunk + 1) * per_chunk]
            if len(of_chunk) < per_chunk or 0 in of_chunk:
                return start + chunk * chunk_tokens
    return start + (end - start) // chunk_tokens * chunk_tokens
