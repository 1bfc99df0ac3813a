# SPDX-License-Identifier: Apache-2.0
"""This gateway's hand-offs as records, and books that always balance. Pure: no I/O, no tasks, memory bounded.

Engines say what happens to KV (`pools.engine.events`), the gateway adds what only it knows: the request and why nobody
wanted the KV. At every moment `produced = consumed + released + rescued + expired + failed + open`, in hand-offs, in
tokens and in bytes. `disagg.gateway.ledger.feed` brings the events, `disagg.gateway.ledger.query` shows the records.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cachetools import FIFOCache

from disagg.gateway.ledger.chunks import ChunkIndex
from disagg.observability.outcomes import ENDS, TOTALS
from disagg.routing.views import ReplicaInfo
from pools.client.events import Happened, HoldEnded, Loaded, Produced, Rescued, RescueFailed

_MAX_OPEN = 65_536
_MAX_GONE = 1024
"""How many ended replicas to remember: an event that such a replica sends later is old news."""
_MAX_TEXT = 200


@dataclass(slots=True, eq=False)
class Record:
    """One hand-off. Times are unix seconds, of the engine's clock where an engine said so."""

    number: int
    """Rises with every record of this gateway."""
    handoff_id: str
    prefill_incarnation: str
    announced_at: float
    request_id: str | None = None
    """None, like `decode_id`, for a hand-off whose request this ledger does not remember."""
    prefill_id: str | None = None
    decode_id: str | None = None
    decode_incarnation: str | None = None
    tokens: int = 0
    """Prompt tokens whose KV the prefill engine held."""
    bytes: int = 0
    """Size of that KV, over all layers and ranks."""
    produced_at: float | None = None
    outcome: str = "open"
    """`open` or one of `ENDS`."""
    ended_as: str | None = None
    """How the prefill engine's hold ended. Set while the sink stores the KV, when the outcome is still open."""
    ended_at: float | None = None
    lease_left_s: float | None = None
    """What was left of the lease when the hold ended; None if the engine told nothing."""
    reason: str | None = None
    """Why the KV was not consumed, in the gateway's words, separated by `; `."""
    stored_tokens: int = 0
    """Tokens in the full chunks that the shared cache took."""
    stored_bytes: int = 0
    reused_tokens: int = 0
    """Tokens of its chunks that were loaded when one of them was loaded for the first time."""
    reused_at: float | None = None
    suspect_since: float | None = None
    """When events were lost that may have ended this record."""
    tenant: str | None = None
    """Name of the request's tenant; None where clients need no key, or if the ledger does not remember the request."""

    def add_reason(self, reason: str) -> None:
        """Append a reason, once."""
        if self.reason is None:
            self.reason = reason[:_MAX_TEXT]
        elif reason not in self.reason and len(self.reason) < _MAX_TEXT:
            self.reason = f"{self.reason}; {reason}"[:_MAX_TEXT]


@dataclass(slots=True)
class Total:
    """Hand-offs, tokens and bytes of one word of `TOTALS`."""

    count: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, tokens: int, num_bytes: int) -> None:
        self.count += 1
        self.tokens += tokens
        self.bytes += num_bytes


class Ledger:
    """The records of one gateway replica. Not thread-safe: call it from the gateway's loop."""

    def __init__(
        self,
        *,
        num_records: int = 10_000,
        unknown_after_s: float = 660.0,
        max_open: int = _MAX_OPEN,
        on_count: Callable[[str, int, int], None] = lambda word, tokens, num_bytes: None,
        on_lease_left: Callable[[float], None] = lambda seconds: None,
        owns: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start with empty books.

        Args:
            num_records: consumed records to remember, and as many others.
            unknown_after_s: longer than any hand-off can be open. An open record whose end may be among lost events is
                written off so long after the loss.
            max_open: open records, and announced ones, to hold at most.
            on_count: told of every addition to the books, as (word, tokens, bytes).
            on_lease_left: told what was left of the lease of each consumed hand-off.
            owns: whether the hand-off of an id belongs in these books. Unset: those whose ids this gateway made.
            clock: unix seconds.
        """
        self.totals = {word: Total() for word in TOTALS}
        self.num_foreign = 0
        """Hand-offs that engines produced for others, such as another gateway replica or a pair's warm-up."""
        self.num_repeated = 0
        """Events that repeated what the books had, or spoke of a hand-off that had ended."""
        self.num_malformed = 0
        """Events that could not be read."""
        self.num_overflows = 0
        """Open records written off because there were too many."""
        self._unknown_after_s = unknown_after_s
        self._max_open = max_open
        self._on_count = on_count
        self._on_lease_left = on_lease_left
        self._owns = owns
        self._clock = clock
        self._numbers = itertools.count(1)
        self._prefixes: set[str] = set()
        # Announced by the gateway and not produced yet, so not in the books.
        self._announced: OrderedDict[str, Record] = OrderedDict()
        self._open: OrderedDict[str, Record] = OrderedDict()
        # Two caches, so that the many consumed records do not push out the few others.
        self._consumed: FIFOCache[str, Record] = FIFOCache(num_records)
        self._orphaned: FIFOCache[str, Record] = FIFOCache(num_records)
        self._chunks: ChunkIndex[Record] = ChunkIndex()
        self._num_suspect = 0
        self._gone: FIFOCache[str, None] = FIFOCache(_MAX_GONE)

    # From the gateway

    def open(
        self,
        handoff_id: str,
        request_id: str,
        prefill: ReplicaInfo,
        decode: ReplicaInfo,
        prompt_tokens: int,
        tenant: str | None = None,
    ) -> None:
        """Announce a hand-off before its prefill leg is sent. It enters the books when the engine has produced it."""
        self._prefixes.add(handoff_id.rpartition("-")[0])
        if self.find(handoff_id) is not None:
            return
        record = Record(
            next(self._numbers),
            handoff_id,
            prefill.incarnation,
            self._clock(),
            request_id,
            prefill.replica_id,
            decode.replica_id,
            decode.incarnation,
            prompt_tokens,
            tenant=tenant,
        )
        self._announced[handoff_id] = record
        if len(self._announced) > self._max_open:
            self._forget_announced(next(iter(self._announced.values())))

    def note(self, handoff_id: str, reason: str) -> None:
        """Say why nobody wants a hand-off, e.g. `client_left`. Unknown ids are ignored."""
        record = self.find(handoff_id)
        if record is not None:
            record.add_reason(reason)

    # From the engines

    def is_own(self, handoff_id: str) -> bool:
        """Whether a hand-off belongs in these books: `owns` says so, or this gateway made the id if `owns` is unset."""
        if self._owns is not None:
            return self._owns(handoff_id)
        return handoff_id.rpartition("-")[0] in self._prefixes

    def apply(self, replica: ReplicaInfo, event: Happened) -> None:
        """Take over one engine event. It changes no record if no book is about its hand-off or its kind."""
        match event:
            case Produced():
                self._produced(replica, event)
            case HoldEnded():
                self._hold_ended(replica, event)
            case Rescued():
                self._rescued(replica, event)
            case RescueFailed():
                self._rescue_failed(replica, event)
            case Loaded():
                self._loaded(event)

    def malformed(self, num_events: int) -> None:
        """Count events that could not be read."""
        self.num_malformed += num_events

    def gap(self, incarnation: str) -> None:
        """Events of this replica are lost: what is open there may have ended unseen."""
        now = self._clock()
        for records in (self._announced, self._open):
            for record in records.values():
                if record.prefill_incarnation == incarnation and record.suspect_since is None:
                    record.suspect_since = now
                    self._num_suspect += 1

    def replica_gone(self, incarnation: str) -> None:
        """The replica has ended, and its KV with it: its open hand-offs have failed.

        If the replica lives after all, its later events of these hand-offs do not count a second time. That holds even
        when the ledger has dropped their records.
        """
        self._gone[incarnation] = None
        now = self._clock()
        for record in [r for r in self._announced.values() if r.prefill_incarnation == incarnation]:
            self._forget_announced(record)
        for record in [r for r in self._open.values() if r.prefill_incarnation == incarnation]:
            record.add_reason("prefill_lost")
            self._close(record, "failed", now)

    def sweep(self) -> None:
        """Write off what lost events have left open for good. Call it every few seconds."""
        limit = self._clock() - self._unknown_after_s
        while self._announced:
            oldest = next(iter(self._announced.values()))
            if oldest.announced_at > limit:
                break
            self._forget_announced(oldest)
        if not self._num_suspect:
            return
        for record in [r for r in self._open.values() if r.suspect_since is not None and r.suspect_since <= limit]:
            record.add_reason("events_lost")
            self._close(record, "failed", self._clock())

    # Reading

    @property
    def num_open(self) -> int:
        """Hand-offs produced and not ended."""
        return len(self._open)

    @property
    def balanced(self) -> bool:
        """Whether the books add up; they do unless this file has a bug."""
        return self.totals["produced"].count == self.num_open + sum(self.totals[word].count for word in ENDS)

    def find(self, handoff_id: str) -> Record | None:
        """The record of this id, announced ones included; None when there is none or it has been dropped."""
        return self._open.get(handoff_id) or self._announced.get(handoff_id) or self._ended(handoff_id)

    def records(self) -> Iterator[Record]:
        """Every record in the books that is remembered, in no order. Sort by `number` for the order of their making."""
        return itertools.chain(self._open.values(), self._consumed.values(), self._orphaned.values())

    # Events

    def _produced(self, replica: ReplicaInfo, event: Produced) -> None:
        handoff_id = event.id
        if not self.is_own(handoff_id):
            self.num_foreign += 1
            return
        if handoff_id in self._open or self._is_over(handoff_id, replica):
            self.num_repeated += 1
            return
        self._enter(handoff_id, replica, event.at, event.tokens, event.bytes)

    def _hold_ended(self, replica: ReplicaInfo, event: HoldEnded) -> None:
        at, outcome, lease_left_s = event.at, event.outcome, event.lease_left_s
        record = self._live(event.id, replica, at)
        if record is None:
            return
        if record.ended_as is not None:
            self.num_repeated += 1
            return
        record.lease_left_s = lease_left_s
        self._trust(record)
        if outcome == "consumed":
            # The outcome stays `consumed`, also when the client asked to store the KV.
            if lease_left_s is not None:
                self._on_lease_left(lease_left_s)
            self._close(record, outcome, at)
        elif event.adopted:
            record.ended_as = outcome
        else:
            self._close(record, outcome, at)

    def _rescued(self, replica: ReplicaInfo, event: Rescued) -> None:
        ended = self._consumed.get(event.id)
        if ended is not None and not ended.stored_tokens:
            # Stored because its client asked for it.
            self._store(ended, event.tokens, event.bytes, event.chunks)
            return
        record = self._live(event.id, replica, event.at)
        if record is not None:
            self._close(record, "rescued", event.at)
            self._store(record, event.tokens, event.bytes, event.chunks)

    def _rescue_failed(self, replica: ReplicaInfo, event: RescueFailed) -> None:
        reason = f"rescue failed: {event.reason or 'unknown'}"
        ended = self._consumed.get(event.id)
        if ended is not None:
            ended.add_reason(reason)
            return
        record = self._live(event.id, replica, event.at)
        if record is not None:
            record.add_reason(reason)
            self._close(record, record.ended_as or "failed", event.at)

    def _loaded(self, event: Loaded) -> None:
        for record, num_chunks, of_chunks in self._chunks.take(event.chunks):
            record.reused_tokens = record.stored_tokens // of_chunks * num_chunks
            record.reused_at = event.at
            self._count("reused", record.reused_tokens, record.stored_bytes // of_chunks * num_chunks)

    # Books

    def _live(self, handoff_id: str, replica: ReplicaInfo, at: float) -> Record | None:
        """The open record of an own id. If its `produced` event was lost, the record enters the books here."""
        record = self._open.get(handoff_id)
        if record is not None:
            return record
        if not self.is_own(handoff_id):
            return None
        if self._is_over(handoff_id, replica):
            self.num_repeated += 1
            return None
        announced = self._announced.get(handoff_id)
        return self._enter(handoff_id, replica, at, announced.tokens if announced else 0, 0)

    def _is_over(self, handoff_id: str, replica: ReplicaInfo) -> bool:
        """Whether an own hand-off that is not open has ended, or may have ended when its replica was written off."""
        if self._ended(handoff_id):
            return True
        return replica.incarnation in self._gone and handoff_id not in self._announced

    def _enter(self, handoff_id: str, replica: ReplicaInfo, at: float, tokens: int, num_bytes: int) -> Record:
        record = self._announced.pop(handoff_id, None)
        if record is None:
            record = Record(next(self._numbers), handoff_id, replica.incarnation, at)
        self._trust(record)
        record.prefill_incarnation = replica.incarnation
        record.prefill_id = replica.replica_id
        record.produced_at = at
        record.tokens = tokens
        record.bytes = num_bytes
        self._open[handoff_id] = record
        self._count("produced", tokens, num_bytes)
        if len(self._open) > self._max_open:
            oldest = next(iter(self._open.values()))
            self.num_overflows += 1
            oldest.add_reason("ledger_full")
            self._close(oldest, "failed", at)
        return record

    def _close(self, record: Record, outcome: str, at: float) -> None:
        del self._open[record.handoff_id]
        self._trust(record)
        record.outcome = outcome
        record.ended_as = None
        record.ended_at = at
        self._count(outcome, record.tokens, record.bytes)
        ended = self._consumed if outcome == "consumed" else self._orphaned
        ended[record.handoff_id] = record

    def _store(self, record: Record, tokens: int, num_bytes: int, chunks: list[str]) -> None:
        record.stored_tokens = tokens
        record.stored_bytes = num_bytes
        self._count("stored", tokens, num_bytes)
        self._chunks.add(record, chunks)

    def _count(self, word: str, tokens: int, num_bytes: int) -> None:
        self.totals[word].add(tokens, num_bytes)
        self._on_count(word, tokens, num_bytes)

    def _ended(self, handoff_id: str) -> Record | None:
        return self._consumed.get(handoff_id) or self._orphaned.get(handoff_id)

    def _trust(self, record: Record) -> None:
        if record.suspect_since is not None:
            record.suspect_since = None
            self._num_suspect -= 1

    def _forget_announced(self, record: Record) -> None:
        self._trust(record)
        del self._announced[record.handoff_id]
