# SPDX-License-Identifier: Apache-2.0
"""Which hand-offs a prefill engine may write into decode engines, and which it will never write again. Pure.

A decode engine must not give blocks away while KV may still be written into them. So it asks the prefill engine, and no
answer but "gone" lets it give them away. The prefill engine's scheduler and its listener thread share one `Offers`.
Every change is one step under a lock: an id is offered to the workers, or it is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable

import msgspec
from cachetools import FIFOCache

_REMEMBERED = 65_536
"""How many hand-offs are remembered as gone; far more than can live at once within a lease."""
QUESTION = b"disagg_push"


def question(engine_id: str, waiting: Collection[str], given_up: Collection[str]) -> bytes:
    """What a decode engine asks of the prefill engine `engine_id` about these hand-offs."""
    return msgspec.msgpack.encode((QUESTION, engine_id, list(waiting), list(given_up)))


class Offers:
    """The hand-offs of one prefill engine."""

    def __init__(self, engine_id: str, remembered: int = _REMEMBERED) -> None:
        self._engine_id = engine_id
        self._lock = threading.Lock()
        self._offered: set[str] = set()
        self._gone: FIFOCache[str, None] = FIFOCache(remembered)

    def offer(self, handoff_id: str) -> bool:
        """Let the workers write this hand-off from now on. False when it is gone and must not be written."""
        with self._lock:
            if handoff_id in self._gone:
                return False
            self._offered.add(handoff_id)
            return True

    def end(self, handoff_id: str) -> None:
        """The hand-off is gone: every rank is done with it, or it was never to be written."""
        with self._lock:
            self._offered.discard(handoff_id)
            self._forget([handoff_id])

    def give_up(self, handoff_ids: Iterable[str]) -> None:
        """Nobody will read these: those not offered are gone. Offered ones end as settled, written or out of lease."""
        with self._lock:
            self._forget(handoff_id for handoff_id in handoff_ids if handoff_id not in self._offered)

    def gone(self, engine_id: str, waiting: Iterable[str], given_up: Iterable[str]) -> list[str]:
        """Those of a decode engine's hand-offs that nobody writes any more: all of them, if it asks for another engine.

        Args:
            waiting: hand-offs that the decode engine waits for.
            given_up: hand-offs that the decode engine does not wait for any more.
        """
        asked = [*waiting, *given_up]
        if engine_id != self._engine_id:
            return asked
        self.give_up(given_up)
        with self._lock:
            return [handoff_id for handoff_id in asked if handoff_id in self._gone]

    def answer_to(self, parts: list[bytes]) -> list[bytes] | None:
        """The answer to one message on the side channel, None for one that is no such question."""
        if len(parts) != 3 or parts[1]:
            return None
        try:
            asked, engine_id, waiting, given_up = msgspec.msgpack.decode(
                parts[2], type=tuple[bytes, str, list[str], list[str]]
            )
        except (msgspec.MsgspecError, RecursionError):
            return None
        if asked != QUESTION:
            return None
        return [parts[0], b"", msgspec.msgpack.encode(self.gone(engine_id, waiting, given_up))]

    def _forget(self, handoff_ids: Iterable[str]) -> None:
        for handoff_id in handoff_ids:
            self._gone[handoff_id] = None
