# SPDX-License-Identifier: Apache-2.0
"""The KV memory of the fake engine: blocks in use, a prefix cache, and hand-offs held until read, settled or expired.

`FakeKV` holds no bytes; it counts who would hold blocks. It reports in the engine's events what becomes of each
hand-off, as a real engine does.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pools.engine.events import EventLog
from pools.engine.fake.text import fold
from pools.engine.fake.tiers import FakeSharedCache

KV_BYTES_PER_TOKEN = 131_072
"""An 8B model with 8 KV heads in bfloat16."""
_MAX_SETTLED = 16_384
"""How many ids are kept of hand-offs that were settled before they were produced."""


def num_blocks_of(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


@dataclass(frozen=True)
class Held:
    """One hand-off in the memory of its prefill engine."""

    handoff_id: str
    """Its name in events."""
    keys: tuple[str, ...]
    """Names by which a decode engine may ask for the hand-off: the prefill engine's request id, or a transfer id."""
    token_ids: Sequence[int]
    prompt_state: int
    salt: str
    store: str | None
    num_blocks: int
    expires_at: float


class FakeKV:
    """Blocks of one fake engine. Used from one event loop; nothing but `take` waits."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        lease_s: float,
        clock: Callable[[], float],
        events: EventLog | None = None,
        shared_cache: FakeSharedCache | None = None,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.lease_s = lease_s
        self.num_expired = 0
        self._clock = clock
        self._events = events or EventLog()
        self._shared_cache = shared_cache
        self._num_held = 0
        self._num_pinned = 0
        self._held: dict[str, Held] = {}
        self._ids_by_key: dict[str, str] = {}
        self._settled_early: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._cached: OrderedDict[tuple[str, int], None] = OrderedDict()

    @property
    def usage(self) -> float:
        """Share of blocks held by running requests and by hand-offs that nobody read yet."""
        self.expire()
        return (self._num_held + self._num_pinned) / self.num_blocks

    def try_hold(self, num_blocks: int) -> bool:
        """Take blocks for a running request; False when too few are free."""
        self.expire()
        if self._num_held + self._num_pinned + num_blocks > self.num_blocks:
            return False
        self._num_held += num_blocks
        return True

    def free(self, num_blocks: int) -> None:
        self._num_held -= num_blocks

    def cached_tokens(self, token_ids: Sequence[int], salt: str) -> int:
        """Tokens of the longest cached prefix, whole blocks only, and never the whole prompt."""
        num_cached = 0
        for key in self._keys(token_ids[:-1], salt):
            if key not in self._cached:
                break
            num_cached += self.block_size
        return num_cached

    def cache(self, token_ids: Sequence[int], salt: str) -> None:
        """Remember the whole blocks of a prompt. Beyond `num_blocks`, forget the least recently used ones."""
        for key in self._keys(token_ids, salt):
            self._cached[key] = None
            self._cached.move_to_end(key)
        while len(self._cached) > self.num_blocks:
            self._cached.popitem(last=False)

    def reset_cache(self) -> bool:
        """Forget every prompt; False while blocks are in use."""
        if self.usage:
            return False
        self._cached.clear()
        return True

    def _keys(self, token_ids: Sequence[int], salt: str) -> list[tuple[str, int]]:
        keys: list[tuple[str, int]] = []
        state = 0
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            state = fold(token_ids[start : start + self.block_size], state)
            keys.append((salt, state))
        return keys

    # Hand-offs

    def pin(
        self,
        handoff_id: str,
        token_ids: Sequence[int],
        *,
        keys: Sequence[str] = (),
        salt: str = "",
        store: str | None = None,
    ) -> list[int]:
        """Keep a finished prompt for a decode engine until read, settled or expired; returns block ids."""
        num_blocks = num_blocks_of(len(token_ids), self.block_size)
        expires_at = self._clock() + self.lease_s
        held = Held(handoff_id, tuple(keys), tuple(token_ids), fold(token_ids), salt, store, num_blocks, expires_at)
        self._held[handoff_id] = held
        self._ids_by_key |= dict.fromkeys(held.keys, handoff_id)
        self._num_pinned += num_blocks
        num_bytes = num_blocks * self.block_size * KV_BYTES_PER_TOKEN
        self._say("produced", id=handoff_id, tokens=len(token_ids), bytes=num_bytes)
        if handoff_id in self._settled_early:
            del self._settled_early[handoff_id]
            self._end(held, "released")
        for key in held.keys:
            if (waiting := self._waiting.get(key)) is not None and not waiting.done():
                waiting.set_result(None)
        return list(range(1, num_blocks + 1))

    def read(self, key: str) -> Held | None:
        """A decode engine's read, which ends the hand-off; None when it is unknown, over or expired."""
        self.expire()
        held = self._held.get(self._ids_by_key.get(key, ""))
        if held is not None:
            self._end(held, "consumed")
        return held

    async def take(self, key: str) -> Held | None:
        """As `read`, but waits for a hand-off that is not produced yet, at most as long as a lease."""
        held = self.read(key)
        if held is not None or key in self._waiting:
            return held
        self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self.lease_s):
                await self._waiting[key]
        except TimeoutError:
            return None
        finally:
            del self._waiting[key]
        return self.read(key)

    def settle(self, handoff_ids: Sequence[str]) -> None:
        """End hand-offs that nobody will read; those that are not produced yet end when they are."""
        self.expire()
        for handoff_id in handoff_ids:
            held = self._held.get(handoff_id)
            if held is not None:
                self._end(held, "released")
                continue
            self._settled_early[handoff_id] = None
            if len(self._settled_early) > _MAX_SETTLED:
                self._settled_early.popitem(last=False)

    def expire(self) -> None:
        """End the hand-offs whose lease ran out. Leases start in order, so the oldest is first."""
        now = self._clock()
        while self._held:
            held = next(iter(self._held.values()))
            if held.expires_at > now:
                return
            self.num_expired += 1
            self._end(held, "expired")

    def _end(self, held: Held, outcome: str) -> None:
        del self._held[held.handoff_id]
        for key in held.keys:
            self._ids_by_key.pop(key, None)
        self._num_pinned -= held.num_blocks
        chunks = self._adopted(held, outcome)
        left = held.expires_at - self._clock() if outcome != "expired" else None
        self._say("ended", id=held.handoff_id, outcome=outcome, lease_left_s=left, adopted=bool(chunks))
        if chunks and self._shared_cache is not None:
            tokens = len(chunks) * self._shared_cache.chunk_tokens
            self._say("rescued", id=held.handoff_id, tokens=tokens, bytes=tokens * KV_BYTES_PER_TOKEN, chunks=chunks)

    def _adopted(self, held: Held, outcome: str) -> list[str]:
        """Store an ended hand-off in the shared tier, where that is allowed; returns the digests of its chunks."""
        if self._shared_cache is None or held.store == "never":
            return []
        if outcome == "consumed" and held.store != "always":
            return []
        return self._shared_cache.store(held.token_ids, held.salt)

    def _say(self, kind: str, **fields: Any) -> None:
        self._events.append({"kind": kind, "at": time.time(), **fields})
