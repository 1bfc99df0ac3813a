# SPDX-License-Identifier: Apache-2.0
"""What a gateway knows of the hand-offs of another one that is gone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from disagg.gateway.ledger.foreign import foreign_ledger
from disagg.gateway.ledger.ledger import Ledger
from disagg.routing.views import ReplicaInfo
from tests.support.heard_events import told
from transport.handoff_params import warm_up_id

P0 = ReplicaInfo("p0", "prefill", "http://p0", "e", "p0-1", 16, 1000)
D0 = ReplicaInfo("d0", "decode", "http://d0", "e", "d0-1", 16, 1000)


def books(num_records: int = 100) -> tuple[Ledger, Ledger, Counter[str]]:
    counted: Counter[str] = Counter()
    own = Ledger()
    own.open("mine-1", "r", P0, D0, 10)
    foreign = foreign_ledger(
        own,
        num_records=num_records,
        unknown_after_s=60,
        on_count=lambda word, tokens, num_bytes: counted.update([word]),
    )
    return own, foreign, counted


def tell(foreign: Ledger, handoff_id: str, *ends: dict[str, Any]) -> None:
    told(foreign, P0, {"kind": "produced", "at": 1.0, "id": handoff_id, "tokens": 10, "bytes": 100})
    for end in ends:
        told(foreign, P0, {"at": 2.0, "id": handoff_id, **end})


def ended(outcome: str, *, adopted: bool = False) -> dict[str, Any]:
    return {"kind": "ended", "outcome": outcome, "lease_left_s": None, "adopted": adopted}


def test_what_a_killed_gateway_leaves_behind() -> None:
    """Its hand-offs are consumed, expire or are rescued, and the books balance at every moment."""
    _, foreign, counted = books()
    tell(foreign, "gone-1", ended("consumed"))
    tell(foreign, "gone-2")
    assert foreign.num_open == 1 and foreign.balanced
    tell(foreign, "gone-3", ended("expired"))
    rescued = {"kind": "rescued", "tokens": 8, "bytes": 80, "chunks": ["a"]}
    tell(foreign, "gone-4", ended("expired", adopted=True), rescued)
    foreign.replica_gone(P0.incarnation)
    assert foreign.balanced and not foreign.num_open
    assert counted == {"produced": 4, "consumed": 1, "failed": 1, "expired": 1, "rescued": 1, "stored": 1}
    record = foreign.find("gone-4")
    assert record is not None and record.request_id is None and record.prefill_id == "p0"


def test_own_handoffs_and_warm_ups_are_not_foreign() -> None:
    """Each hand-off is in one of the two books, a warm-up in none."""
    _, foreign, counted = books()
    for handoff_id in ("mine-1", "mine-2", warm_up_id("0123")):
        tell(foreign, handoff_id, ended("released"))
    assert not counted and not list(foreign.records())


def test_records_are_bounded() -> None:
    """Old records go; what was counted stays."""
    _, foreign, counted = books(num_records=3)
    for number in range(10):
        tell(foreign, f"gone-{number}", ended("consumed"))
    assert len(list(foreign.records())) == 3 and counted["consumed"] == 10
