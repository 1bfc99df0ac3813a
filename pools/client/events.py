# SPDX-License-Identifier: Apache-2.0
"""The events of an engine as a reader over HTTP gets them, one type for each kind. `pools.engine.events` explains them.

`read_events` decodes a batch in one go. If the batch holds a kind of a later version, or an event that cannot be read,
`read_events` decodes the batch event by event and keeps the other events.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec


class Produced(msgspec.Struct, tag="produced", tag_field="kind"):
    id: str
    at: float
    tokens: int
    bytes: int


class HoldEnded(msgspec.Struct, tag="ended", tag_field="kind"):
    id: str
    at: float
    outcome: Literal["consumed", "released", "expired"]
    lease_left_s: float | None = None
    adopted: bool = False


class Rescued(msgspec.Struct, tag="rescued", tag_field="kind"):
    id: str
    at: float
    tokens: int
    bytes: int
    chunks: list[str]


class RescueFailed(msgspec.Struct, tag="rescue_failed", tag_field="kind"):
    id: str
    at: float
    reason: str | None = None


class Loaded(msgspec.Struct, tag="loaded", tag_field="kind"):
    at: float
    chunks: list[str] = []


class TierDegraded(msgspec.Struct, tag="tier_degraded", tag_field="kind"):
    at: float
    tier: str | None = None


class TierRecovered(msgspec.Struct, tag="tier_recovered", tag_field="kind"):
    at: float
    tier: str | None = None


class Unread(msgspec.Struct, tag="unread", tag_field="kind"):
    id: str


Happened: TypeAlias = Produced | HoldEnded | Rescued | RescueFailed | Loaded | TierDegraded | TierRecovered | Unread

KINDS = frozenset(
    ("produced", "ended", "rescued", "rescue_failed", "loaded", "tier_degraded", "tier_recovered", "unread")
)


class ReadEvents(msgspec.Struct):
    """Answer of `GET events`, as it is read."""

    incarnation: str
    next: int
    """The `after` that the next read has to send."""
    lost: int
    """Number of events after `after` that the engine's log dropped before this read."""
    events: list[Happened]
    draining: bool = False
    """Whether the replica leaves."""
    num_malformed: int = 0
    """Number of events that cannot be read, except those of an unknown kind. Counted by the client, not on the wire."""


class _RawEvents(msgspec.Struct):
    """`ReadEvents` with each event still as JSON."""

    incarnation: str
    next: int
    lost: int
    events: list[msgspec.Raw]
    draining: bool = False


def read_events(payload: bytes) -> ReadEvents:
    """Decode a batch. Drops events of unknown kinds; drops and counts those that cannot be read. Raises ValueError."""
    try:
        return _decode_batch(payload)
    except msgspec.ValidationError:
        batch = _decode_raw(payload)
    events: list[Happened] = []
    num_malformed = 0
    for raw in batch.events:
        try:
            events.append(_decode_event(raw))
        except msgspec.ValidationError:
            num_malformed += _is_malformed(raw)
    return ReadEvents(batch.incarnation, batch.next, batch.lost, events, batch.draining, num_malformed)


def _is_malformed(raw: msgspec.Raw) -> bool:
    """Whether the event is malformed, and not merely of a kind that this version does not know."""
    event: Any = msgspec.json.decode(raw)
    kind = event.get("kind") if isinstance(event, dict) else None
    return not isinstance(kind, str) or kind in KINDS


_decode_batch = msgspec.json.Decoder(ReadEvents).decode
_decode_raw = msgspec.json.Decoder(_RawEvents).decode
_decode_event = msgspec.json.Decoder(Happened).decode
