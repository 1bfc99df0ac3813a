# SPDX-License-Identifier: Apache-2.0
"""A breaker a pair of replicas: opens when hand-offs between the two keep failing while each of them works. Pure.

A hand-off is answered before it is known whether its KV was read: an engine that cannot read computes the prompt, and
says so later. So the success of a hand-off is taken back when its engine says `unread`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cachetools import FIFOCache

from disagg.gateway.replicas.membership import Pair

THRESHOLD = 3
"""Failures in a row that open a breaker."""
_FIRST_REST_S = 0.5
_MAX_REST_S = 30.0
_MAX_REMEMBERED = 16_384
"""Hand-offs whose pair is known, and successes that may be taken back: those of the last seconds matter."""


@dataclass
class _State:
    num_failures: int = 0
    """In a row."""
    num_opened: int = 0
    """In a row, without a success between them."""
    said: bool = False


@dataclass(frozen=True)
class Opened:
    """A breaker that has just opened."""

    pair: Pair
    rest_s: float
    """How long to leave the pair alone before it is warmed again; doubles until a hand-off succeeds."""
    first: bool
    """Whether it is the pair's first time."""


class PairBreaker:
    """What became of the newest hand-offs of each pair. Not thread-safe."""

    def __init__(self) -> None:
        self._pairs: FIFOCache[str, Pair] = FIFOCache(_MAX_REMEMBERED)
        # By incarnations: what is known of a pair ends with either of them.
        self._states: dict[tuple[str, str], _State] = {}
        # Hand-off to what its success has set back to nothing.
        self._forgiven: FIFOCache[str, _State] = FIFOCache(_MAX_REMEMBERED)

    def begin(self, handoff_id: str, pair: Pair) -> None:
        """A hand-off that both engines may speak of."""
        self._pairs[handoff_id] = pair

    def pair_of(self, handoff_id: str) -> Pair | None:
        """The pair of a hand-off that is begun, and neither over nor failed."""
        return self._pairs.get(handoff_id)

    def over(self, handoff_id: str) -> None:
        """A hand-off was given up: whatever is said of it, its pair is not to blame."""
        self._pairs.pop(handoff_id, None)
        self._forgiven.pop(handoff_id, None)

    def succeeded(self, handoff_id: str) -> None:
        """A hand-off was answered."""
        pair = self._pairs.get(handoff_id)
        state = None if pair is None else self._states.get(pair.key)
        if pair is None or state is None or not (state.num_failures or state.num_opened):
            return
        self._states[pair.key] = _State(said=state.said)
        self._forgiven[handoff_id] = state

    def failed(self, handoff_id: str) -> Opened | None:
        """A hand-off failed by its pair's fault, a success of it included. Each hand-off fails once."""
        pair = self._pairs.pop(handoff_id, None)
        if pair is None:
            return None
        state = self._states.setdefault(pair.key, _State())
        forgiven = self._forgiven.pop(handoff_id, None)
        if forgiven is not None:
            state.num_failures = max(state.num_failures, forgiven.num_failures)
            state.num_opened = max(state.num_opened, forgiven.num_opened)
        state.num_failures += 1
        if state.num_failures < THRESHOLD:
            return None
        opened = Opened(pair, min(_FIRST_REST_S * 2**state.num_opened, _MAX_REST_S), first=not state.said)
        self._states[pair.key] = _State(num_opened=state.num_opened + 1, said=True)
        return opened

    def retain(self, pairs: Collection[tuple[str, str]]) -> None:
        """Forget the states of all pairs but these."""
        self._states = {pair: state for pair, state in self._states.items() if pair in pairs}
