# SPDX-License-Identifier: Apache-2.0
"""Which hand-offs a prefill engine holds KV for, and how each hold ends. Pure; no vLLM imports.

vLLM knows a hand-off by its internal request id; everyone else knows it by the hand-off id that the gateway chose.
Each rank reports an outcome of its own. The hold is over when vLLM has heard from all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cachetools import FIFOCache

from transport.in_engine.protocols import Ended, Outcome

_EARLY_SETTLES = 4096
"""How many ids are kept that were settled before they were produced. A forgotten id's hold ends with its lease."""
_WEIGHT: dict[Outcome, int] = {"consumed": 0, "released": 1, "expired": 2}
"""When ranks disagree, the heaviest outcome counts: one rank whose KV was not read makes the hand-off useless."""


@dataclass(frozen=True)
class Hold:
    """One hold that is over."""

    handoff_id: str
    outcome: Outcome
    lease_left_s: float | None


@dataclass
class _Open:
    handoff_id: str
    settled: bool = False
    outcome: Outcome | None = None
    lease_left_s: float | None = None


def merge_ended(first: Ended, second: Ended) -> Ended:
    """What two ranks say together: released or expired wins over consumed, and the shorter lease counts."""
    merged = dict(first)
    for req_id, (outcome, left) in second.items():
        if req_id in merged:
            other, other_left = merged[req_id]
            outcome = max(outcome, other, key=_WEIGHT.__getitem__)
            lefts = [x for x in (left, other_left) if x is not None]
            left = min(lefts, default=None)
        merged[req_id] = (outcome, left)
    return merged


class Holds:
    """The open holds of one engine. Bounded by what the engine holds, and by `_EARLY_SETTLES`."""

    def __init__(self, early_settles: int = _EARLY_SETTLES) -> None:
        self._open: dict[str, _Open] = {}
        self._req_ids: dict[str, str] = {}
        self._early: FIFOCache[str, None] = FIFOCache(early_settles)
        self._to_settle: set[str] = set()

    def __len__(self) -> int:
        return len(self._open)

    def produced(self, req_id: str, handoff_id: str) -> None:
        """The engine holds KV from here on. A hand-off that was settled before is settled at once."""
        self._open[req_id] = _Open(handoff_id)
        self._req_ids[handoff_id] = req_id
        if handoff_id in self._early:
            del self._early[handoff_id]
            self._settle(req_id)

    def settle(self, handoff_ids: Iterable[str]) -> list[str]:
        """Settle hand-offs that nobody will consume. Returns and keeps the ids not held: they may be produced later."""
        unheld: list[str] = []
        for handoff_id in handoff_ids:
            req_id = self._req_ids.get(handoff_id)
            if req_id is not None:
                self._settle(req_id)
                continue
            unheld.append(handoff_id)
            self._early[handoff_id] = None
        return unheld

    def _settle(self, req_id: str) -> None:
        held = self._open[req_id]
        if not held.settled:
            held.settled = True
            self._to_settle.add(req_id)

    def take_to_settle(self) -> set[str]:
        """Request ids to be settled on every rank, once."""
        taken, self._to_settle = self._to_settle, set()
        return taken

    def note(self, ended: Ended) -> None:
        """What some or all ranks reported in one step."""
        for req_id, entry in ended.items():
            held = self._open.get(req_id)
            if held is None:
                continue
            known: Ended = {} if held.outcome is None else {req_id: (held.outcome, held.lease_left_s)}
            held.outcome, held.lease_left_s = merge_ended(known, {req_id: entry})[req_id]

    def close(self, req_id: str) -> Hold | None:
        """End the hold of `req_id`: all ranks and all children are done with it. None when it was never a hand-off."""
        held = self._open.pop(req_id, None)
        if held is None:
            return None
        self._to_settle.discard(req_id)
        if self._req_ids.get(held.handoff_id) == req_id:
            del self._req_ids[held.handoff_id]
        # A transfer child that reports no outcome knows only readers, so what was not settled counts as consumed.
        outcome = held.outcome or ("released" if held.settled else "consumed")
        return Hold(held.handoff_id, outcome, held.lease_left_s)
