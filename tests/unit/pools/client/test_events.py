# SPDX-License-Identifier: Apache-2.0
"""Events of engines as they are read: also of engines of another version, and beside some that cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pools.client.events import HoldEnded, Loaded, Produced, TierDegraded, Unread, read_events

PRODUCED = {"kind": "produced", "id": "g-1", "at": 1, "tokens": 10, "bytes": 100}
ENDED = {"kind": "ended", "id": "g-1", "at": 2.5, "outcome": "consumed", "lease_left_s": 3.0, "adopted": False}
BOTH = [Produced("g-1", 1.0, 10, 100), HoldEnded("g-1", 2.5, "consumed", 3.0)]


def batch(*events: Any, **fields: Any) -> bytes:
    return json.dumps({"incarnation": "i", "next": 7, "lost": 2, "events": events, **fields}).encode()


def test_a_batch_is_read_whole() -> None:
    """Events come in order as their own types, and what stands around them with them."""
    read = read_events(batch(PRODUCED, ENDED, draining=True))
    assert (read.incarnation, read.next, read.lost, read.draining) == ("i", 7, 2, True)
    assert (read.events, read.num_malformed) == (BOTH, 0)


def test_fields_of_a_later_version_are_ignored() -> None:
    """In an event and around it."""
    assert read_events(batch({**PRODUCED, "colour": "blue"}, ENDED, colour="red")).events == BOTH


def test_kinds_of_a_later_version_are_dropped() -> None:
    """They cost the events beside them nothing, and are no fault."""
    read = read_events(batch(PRODUCED, {"kind": "painted", "colour": ["blue"]}, ENDED))
    assert (read.events, read.num_malformed, read.next) == (BOTH, 0, 7)


def test_events_that_cannot_be_read_are_counted() -> None:
    """Each costs itself alone."""
    broken: list[Any] = [{}, [], "x", {"kind": 3}, {**PRODUCED, "tokens": None}, {**ENDED, "outcome": "eaten"}]
    read = read_events(batch(PRODUCED, *broken, ENDED))
    assert (read.events, read.num_malformed) == (BOTH, len(broken))


def test_what_may_be_left_out() -> None:
    """Only what every version tells has to be there."""
    events = [{"kind": "loaded", "at": 1.0}, {"kind": "unread", "id": "g"}, {"kind": "tier_degraded", "at": 1.0}]
    assert read_events(batch(*events)).events == [Loaded(1.0), Unread("g"), TierDegraded(1.0)]


@pytest.mark.parametrize("payload", [b"", b"{}", b"[]", b"\xff", batch(PRODUCED)[:-1], batch(next="x")])
def test_what_is_no_batch(payload: bytes) -> None:
    """It is refused whole, so that it is asked for again."""
    with pytest.raises(ValueError):
        read_events(payload)
