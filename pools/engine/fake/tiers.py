# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the shared tier of fake engines: which chunks of prompts it keeps. No bytes and no process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from transport.digests import chunk_digests


class FakeSharedCache:
    """Chunks by digest, under the sink `unused`. Engines that are given the same object share it."""

    def __init__(self, chunk_tokens: int, *, max_chunks: int = 65_536) -> None:
        self.chunk_tokens = chunk_tokens
        self._max_chunks = max_chunks
        self._chunks: OrderedDict[str, None] = OrderedDict()

    def store(self, token_ids: Sequence[int], salt: str) -> list[str]:
        """Keep the full chunks of a prompt; returns their digests."""
        chunks = chunk_digests(token_ids, self.chunk_tokens, salt)
        for chunk in chunks:
            self._chunks[chunk] = None
            self._chunks.move_to_end(chunk)
        while len(self._chunks) > self._max_chunks:
            self._chunks.popitem(last=False)
        return chunks

    def found(self, token_ids: Sequence[int], salt: str) -> list[str]:
        """The digests of the longest kept prefix."""
        found: list[str] = []
        for chunk in chunk_digests(token_ids, self.chunk_tokens, salt):
            if chunk not in self._chunks:
                break
            found.append(chunk)
        return found
