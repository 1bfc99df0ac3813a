# SPDX-License-Identifier: Apache-2.0
"""Which ledger records stored which chunks of the shared cache, to notice when one is loaded again. Pure, bounded.

A chunk belongs to the record that stored it first, as in the cache itself: a second store of a chunk moves nothing
there. If other records had stored all chunks of a record before, that record owns none. It counts as found when its
last chunk is loaded, with no chunk of its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

HolderT = TypeVar("HolderT", bound=Hashable)

_MAX_CHUNKS = 100_000
"""About 20 MB; 25 million tokens in chunks of 256."""


class Hit(NamedTuple, Generic[HolderT]):
    """A record that a load has found."""

    holder: HolderT
    num_chunks: int
    """Loaded chunks that belong to it."""
    of_chunks: int
    """Chunks that it stored, its own or not."""


class ChunkIndex(Generic[HolderT]):
    """From chunk digests to holders. Each holder is found once and then forgotten."""

    def __init__(self, max_chunks: int = _MAX_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._owners: dict[str, HolderT] = {}
        self._others: dict[str, list[HolderT]] = {}
        # Holder to its digests and how many of them it owns, oldest first.
        self._holders: OrderedDict[HolderT, tuple[Sequence[str], int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners) + len(self._others)

    def add(self, holder: HolderT, chunks: Sequence[str]) -> None:
        """Remember what `holder` stored, in the order of the prompt. The oldest holders make room."""
        if not chunks or holder in self._holders:
            return
        num_own = 0
        for chunk in chunks:
            if self._owners.setdefault(chunk, holder) is holder:
                num_own += 1
        if not num_own:
            self._others.setdefault(chunks[-1], []).append(holder)
        self._holders[holder] = (chunks, num_own)
        while len(self) > self._max_chunks and self._holders:
            self.drop(next(iter(self._holders)))

    def take(self, chunks: Sequence[str]) -> list[Hit[HolderT]]:
        """The holders that a load of these chunks finds, each forgotten with this call."""
        found: Counter[HolderT] = Counter()
        for chunk in dict.fromkeys(chunks):
            if (owner := self._owners.get(chunk)) is not None:
                found[owner] += 1
            for other in self._others.get(chunk, ()):
                found[other] += 0
        hits = [Hit(holder, number, len(self._holders[holder][0])) for holder, number in found.items()]
        for hit in hits:
            self.drop(hit.holder)
        return hits

    def drop(self, holder: HolderT) -> None:
        """Forget a holder. Does nothing when it is not known."""
        known = self._holders.pop(holder, None)
        if known is None:
            return
        chunks, num_own = known
        if num_own:
            for chunk in chunks:
                if self._owners.get(chunk) is holder:
                    del self._owners[chunk]
            return
        others = self._others[chunks[-1]]
        others.remove(holder)
        if not others:
            del self._others[chunks[-1]]
