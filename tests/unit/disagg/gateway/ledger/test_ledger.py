# SPDX-License-Identifier: Apache-2.0
"""The ledger's records and books: each way a hand-off can go, and any order of events."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.gateway.ledger.chunks import ChunkIndex
from disagg.gateway.ledger.ledger import Ledger
from disagg.observability.outcomes import ENDS, TOTALS
from disagg.routing.views import ReplicaInfo
from tests.support.heard_events import told


def replica(replica_id: str, incarnation: str = "1") -> ReplicaInfo:
    pool = "prefill" if replica_id.startswith("p") else "decode"
    return ReplicaInfo(
        replica_id=replica_id,
        pool=pool,
        url=f"http://{replica_id}:1",
        engine_id="e",
        incarnation=f"{replica_id}-{incarnation}",
        block_size=16,
        vocab_size=1000,
    )


P0, P1, D0 = replica("p0"), replica("p1"), replica("d0")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    """A ledger with three announced hand-offs from p0 to d0: gw-1, gw-2, gw-3."""
    made = Ledger(clock=clock, unknown_after_s=60)
    for number in (1, 2, 3):
        made.open(f"gw-{number}", f"request-{number}", P0, D0, 100)
    return made


def produced(handoff_id: str, at: float = 1.0, tokens: int = 100) -> dict[str, Any]:
    return {"kind": "produced", "id": handoff_id, "at": at, "tokens": tokens, "bytes": tokens * 10}


def ended(handoff_id: str, outcome: str, *, adopted: bool = False, left: float | None = 20.0) -> dict[str, Any]:
    event = {"kind": "ended", "id": handoff_id, "at": 2.0, "outcome": outcome}
    return event | {"lease_left_s": left, "adopted": adopted}


def rescued(handoff_id: str, *chunks: str) -> dict[str, Any]:
    tokens = 32 * len(chunks)
    return {"kind": "rescued", "id": handoff_id, "at": 3.0, "tokens": tokens, "bytes": tokens * 10, "chunks": [*chunks]}


def loaded(*chunks: str) -> dict[str, Any]:
    return {"kind": "loaded", "source": "lmcache", "at": 4.0, "tokens": 32 * len(chunks), "chunks": [*chunks]}


def counts(ledger: Ledger) -> dict[str, int]:
    """What is not zero."""
    return {word: total.count for word, total in ledger.totals.items() if total.count}


def assert_balanced(ledger: Ledger) -> None:
    """The books add up in hand-offs, tokens and bytes, and agree with the records."""
    assert ledger.balanced
    still_open = [record for record in ledger.records() if record.outcome == "open"]
    assert len(still_open) == ledger.num_open
    for field in ("tokens", "bytes"):
        ends = sum(getattr(ledger.totals[word], field) for word in ENDS)
        assert getattr(ledger.totals["produced"], field) == ends + sum(getattr(r, field) for r in still_open)


def test_announced_is_not_in_the_books(ledger: Ledger) -> None:
    """A hand-off counts when its engine says that it holds the KV, and not before."""
    assert counts(ledger) == {} and ledger.num_open == 0 and list(ledger.records()) == []
    told(ledger, P0, produced("gw-1"))
    assert counts(ledger) == {"produced": 1} and ledger.num_open == 1
    (record,) = ledger.records()
    assert (record.request_id, record.prefill_id, record.decode_id) == ("request-1", "p0", "d0")
    assert (record.prefill_incarnation, record.decode_incarnation) == ("p0-1", "d0-1")
    assert (record.tokens, record.bytes, record.produced_at, record.outcome) == (100, 1000, 1.0, "open")


@pytest.mark.parametrize("outcome", ["consumed", "released", "expired"])
def test_engine_ends(ledger: Ledger, outcome: str) -> None:
    """The engine's word for the end of a hold is the outcome."""
    told(ledger, P0, produced("gw-1"))
    told(ledger, P0, ended("gw-1", outcome))
    record = ledger.find("gw-1")
    assert record is not None
    assert (record.outcome, record.ended_at, record.lease_left_s) == (outcome, 2.0, 20.0)
    assert counts(ledger) == {"produced": 1, outcome: 1} and ledger.num_open == 0
    assert ledger.totals[outcome].tokens == 100 and ledger.totals[outcome].bytes == 1000


def test_lease_left_is_told_for_consumed_only() -> None:
    """The histogram is about KV that was read; a connector without a lease adds nothing."""
    left: list[float] = []
    ledger = Ledger(on_lease_left=left.append)
    for number, event in enumerate([("consumed", 12.5), ("released", 20.0), ("consumed", None), ("expired", 0.0)]):
        ledger.open(f"gw-{number}", "r", P0, D0, 1)
        told(ledger, P0, produced(f"gw-{number}"))
        told(ledger, P0, ended(f"gw-{number}", event[0], left=event[1]))
    assert left == [12.5]


def test_rescued(ledger: Ledger) -> None:
    """An adopted hand-off stays open until it is stored; `rescued` is its one outcome."""
    told(ledger, P0, produced("gw-1"))
    ledger.note("gw-1", "client_left")
    told(ledger, P0, ended("gw-1", "released", adopted=True))
    assert counts(ledger) == {"produced": 1} and ledger.num_open == 1
    told(ledger, P0, rescued("gw-1", "a", "b", "c"))
    assert counts(ledger) == {"produced": 1, "rescued": 1, "stored": 1}
    record = ledger.find("gw-1")
    assert record is not None
    assert (record.outcome, record.reason, record.stored_tokens, record.stored_bytes) == (
        "rescued",
        "client_left",
        96,
        960,
    )
    assert ledger.totals["rescued"].tokens == 100 and ledger.totals["stored"].tokens == 96


def test_rescue_failed(ledger: Ledger) -> None:
    """A rescue that fails leaves what the hand-off was before it, and says so."""
    told(ledger, P0, produced("gw-1"))
    told(ledger, P0, ended("gw-1", "expired", adopted=True))
    told(ledger, P0, {"kind": "rescue_failed", "id": "gw-1", "at": 3.0, "reason": "server lost"})
    record = ledger.find("gw-1")
    assert record is not None
    assert (record.outcome, record.reason) == ("expired", "rescue failed: server lost")
    assert counts(ledger) == {"produced": 1, "expired": 1}


def test_stored_on_demand_is_consumed(ledger: Ledger) -> None:
    """A store that the client forced does not turn a consumed hand-off into an orphan, and its reuse counts."""
    told(ledger, P0, produced("gw-1"))
    told(ledger, P0, ended("gw-1", "consumed", adopted=True))
    assert counts(ledger) == {"produced": 1, "consumed": 1}
    told(ledger, P0, rescued("gw-1", "a", "b"))
    assert counts(ledger) == {"produced": 1, "consumed": 1, "stored": 1}
    told(ledger, D0, loaded("a"))
    assert ledger.totals["reused"].count == 1 and ledger.totals["reused"].tokens == 32


def test_reused_once(ledger: Ledger) -> None:
    """The first load of a rescued chunk, by any replica, is the record's reuse; tokens are those of the chunks."""
    told(ledger, P0, produced("gw-1"))
    told(ledger, P0, rescued("gw-1", "a", "b", "c"))
    told(ledger, D0, loaded("x", "y"))
    assert "reused" not in counts(ledger)
    told(ledger, D0, loaded("a", "b", "x"))
    told(ledger, P1, loaded("a", "b", "c"))
    total = ledger.totals["reused"]
    assert (total.count, total.tokens, total.bytes) == (1, 64, 640)
    record = ledger.find("gw-1")
    assert record is not None and (record.reused_tokens, record.reused_at) == (64, 4.0)


def test_shared_prefix_is_reuse_of_its_first_record(ledger: Ledger) -> None:
    """A chunk that several records have in common belongs to the one that stored it; no token counts twice."""
    for number, chunks in ((1, "ab"), (2, "ac"), (3, "ac")):
        told(ledger, P0, produced(f"gw-{number}"))
        told(ledger, P0, rescued(f"gw-{number}", *chunks))
    told(ledger, D0, loaded("a"))
    assert ledger.totals["reused"].count == 1
    told(ledger, D0, loaded("a", "c"))
    assert ledger.totals["reused"].count == 3
    assert ledger.totals["reused"].tokens == 64
    assert [r.reused_tokens for n in (1, 2, 3) if (r := ledger.find(f"gw-{n}"))] == [32, 32, 0]


def test_foreign(ledger: Ledger) -> None:
    """Hand-offs of other gateways and of warm-ups are counted apart and change no record."""
    for handoff_id in ("other-1", "gw", "", "gw2-1", "warm"):
        told(ledger, P0, produced(handoff_id))
        told(ledger, P0, ended(handoff_id, "consumed"))
        told(ledger, P0, rescued(handoff_id, "a"))
    assert counts(ledger) == {} and ledger.num_foreign == 5 and ledger.num_malformed == 0


def test_own_but_unknown(ledger: Ledger) -> None:
    """What the engine says of an own id is true, even if the announcement has been forgotten."""
    told(ledger, P0, produced("gw-99"))
    record = ledger.find("gw-99")
    assert record is not None and record.request_id is None and record.prefill_id == "p0"
    assert counts(ledger) == {"produced": 1}


@pytest.mark.parametrize("event", [ended("gw-1", "consumed"), rescued("gw-1", "a")], ids=["ended", "rescued"])
def test_lost_produced(ledger: Ledger, event: Mapping[str, Any]) -> None:
    """Whatever ends was produced: the missing event is made up for, with the tokens that the gateway knows."""
    told(ledger, P0, event)
    assert ledger.totals["produced"].count == 1 and ledger.totals["produced"].tokens == 100
    assert ledger.num_open == 0
    assert_balanced(ledger)


def test_repeated_events_change_nothing(ledger: Ledger) -> None:
    """An event that comes twice is counted as such and nowhere else."""
    events = [produced("gw-1"), ended("gw-1", "released", adopted=True), rescued("gw-1", "a")]
    for event in events:
        told(ledger, P0, event)
    before = {word: (t.count, t.tokens, t.bytes) for word, t in ledger.totals.items()}
    for event in [*events, ended("gw-1", "consumed"), {"kind": "rescue_failed", "id": "gw-1", "at": 1.0}]:
        told(ledger, P0, event)
    assert {word: (t.count, t.tokens, t.bytes) for word, t in ledger.totals.items()} == before
    assert ledger.num_repeated == 5


def test_adoption_is_said_once(ledger: Ledger) -> None:
    """A second end of a hold that the sink has adopted is a repetition, and the first one stands."""
    told(ledger, P0, produced("gw-1"))
    told(ledger, P0, ended("gw-1", "released", adopted=True))
    told(ledger, P0, ended("gw-1", "consumed"))
    assert counts(ledger) == {"produced": 1} and ledger.num_repeated == 1


def test_stored_once(ledger: Ledger) -> None:
    """A store that is told twice counts once, for consumed hand-offs too."""
    for event in (produced("gw-1"), ended("gw-1", "consumed"), rescued("gw-1", "a"), rescued("gw-1", "a")):
        told(ledger, P0, event)
    assert ledger.totals["stored"].count == 1 and ledger.num_repeated == 1


def test_own_ids(ledger: Ledger) -> None:
    """A gateway's ids are its prefix, a hyphen and a number; a prefix may have hyphens."""
    ledger.open("a-b-1", "r", P0, D0, 1)
    assert ledger.is_own("a-b-2") and ledger.is_own("gw-77")
    assert not ledger.is_own("a-2") and not ledger.is_own("a-b") and not ledger.is_own("gw")


def test_gap_is_of_one_replica(ledger: Ledger) -> None:
    """Lost events make the records of that replica doubtful and no others, until they are heard of again."""
    ledger.open("gw-4", "r", P1, D0, 1)
    told(ledger, P1, produced("gw-4"))
    told(ledger, P0, produced("gw-1"))
    ledger.gap(P0.incarnation)
    doubtful = {n for n in range(1, 5) if (r := ledger.find(f"gw-{n}")) and r.suspect_since is not None}
    assert doubtful == {1, 2, 3} and ledger._num_suspect == 3
    for event in (ended("gw-1", "consumed"), produced("gw-2"), produced("gw-3")):
        told(ledger, P0, event)
    assert ledger._num_suspect == 0


def test_chunks_are_bounded() -> None:
    """The oldest holders make room, and the index is empty when all are found."""
    index: ChunkIndex[int] = ChunkIndex(max_chunks=10)
    for holder in range(20):
        index.add(holder, [f"{holder}-{n}" for n in range(4)])
        assert len(index) <= 10
    assert index.take(["17-0"]) == []
    assert index.take(["18-0", "19-3", "19-3", "19-2"]) == [(18, 1, 4), (19, 2, 4)]
    assert len(index) == 0


def test_replica_gone(ledger: Ledger) -> None:
    """KV goes with its engine: what was open there has failed, the rest is untouched."""
    ledger.open("gw-4", "request-4", P1, D0, 10)
    told(ledger, P0, produced("gw-1"))
    told(ledger, P0, produced("gw-2"))
    told(ledger, P0, ended("gw-2", "released", adopted=True))
    told(ledger, P1, produced("gw-4"))
    ledger.replica_gone(P0.incarnation)
    assert counts(ledger) == {"produced": 3, "failed": 2}
    assert [r.reason for n in (1, 2) if (r := ledger.find(f"gw-{n}"))] == ["prefill_lost"] * 2
    assert ledger.find("gw-3") is None
    ledger.replica_gone(D0.incarnation)
    assert ledger.num_open == 1


def test_lost_events_are_written_off(ledger: Ledger, clock: Clock) -> None:
    """After a gap, an open record whose end never comes is failed in the end; one that is heard of again is not."""
    told(ledger, P0, produced("gw-1"))
    told(ledger, P0, produced("gw-2"))
    ledger.gap(P0.incarnation)
    told(ledger, P0, ended("gw-2", "released", adopted=True))
    clock.now += 59
    ledger.sweep()
    assert ledger.num_open == 2
    clock.now += 1
    ledger.sweep()
    assert counts(ledger) == {"produced": 2, "failed": 1}
    lost = ledger.find("gw-1")
    assert lost is not None and (lost.outcome, lost.reason) == ("failed", "events_lost")
    told(ledger, P0, rescued("gw-2", "a"))
    assert counts(ledger) == {"produced": 2, "failed": 1, "rescued": 1, "stored": 1}


def test_open_without_a_gap_stays_open(ledger: Ledger, clock: Clock) -> None:
    """Only lost events make an old record doubtful; announcements that came to nothing are forgotten."""
    told(ledger, P0, produced("gw-1"))
    clock.now += 10_000
    ledger.sweep()
    assert ledger.num_open == 1
    assert ledger.find("gw-2") is None


def test_reasons(ledger: Ledger) -> None:
    """Reasons add up, each once, and never grow without bound."""
    ledger.note("gw-1", "client_left")
    ledger.note("gw-1", "client_left")
    ledger.note("gw-1", "unread")
    ledger.note("nothing", "client_left")
    record = ledger.find("gw-1")
    assert record is not None and record.reason == "client_left; unread"
    for number in range(100):
        ledger.note("gw-1", f"reason {number}")
    assert len(record.reason) <= 200


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"kind": "produced"},
        {"kind": "produced", "id": "gw-1", "at": 1.0},
        {"kind": "produced", "id": "gw-1", "at": "x", "tokens": 1, "bytes": 1},
        {"kind": "produced", "id": ["gw-1"], "at": 1.0, "tokens": 1, "bytes": 1},
        {"kind": "produced", "id": "gw-1", "at": 1.0, "tokens": None, "bytes": 1},
        {"kind": "ended", "id": "gw-1", "at": 1.0, "outcome": "eaten"},
        {"kind": "ended", "id": "gw-1", "at": 1.0, "outcome": "consumed", "lease_left_s": "long"},
        {"kind": "rescued", "id": "gw-1", "at": 1.0, "tokens": 1, "bytes": 1},
        {"kind": "loaded", "at": 1.0, "chunks": [["a"]]},
        {"kind": ["x"], "at": 1.0},
    ],
)
def test_malformed(ledger: Ledger, event: dict[str, Any]) -> None:
    """An event that cannot be read is counted and changes nothing."""
    told(ledger, P0, event)
    assert ledger.num_malformed == 1
    assert counts(ledger) == {} and ledger.num_open == 0


def test_unknown_kinds_are_ignored(ledger: Ledger) -> None:
    """A newer engine may say more."""
    told(ledger, P0, {"kind": "something_new", "at": 1.0, "id": "gw-1"})
    assert ledger.num_malformed == 0 and counts(ledger) == {}


def test_memory_is_bounded() -> None:
    """Ended records, open ones and announcements have each their limit; orphans are not pushed out by the consumed."""
    ledger = Ledger(num_records=5, max_open=7)
    for number in range(50):
        ledger.open(f"gw-{number}", "r", P0, D0, 1)
        told(ledger, P0, produced(f"gw-{number}"))
        told(ledger, P0, ended(f"gw-{number}", "consumed" if number else "expired"))
    assert {record.number for record in ledger.records()} == {1, 46, 47, 48, 49, 50}
    for number in range(50, 100):
        ledger.open(f"gw-{number}", "r", P0, D0, 1)
        told(ledger, P0, produced(f"gw-{number}"))
    assert ledger.num_open == 7 and ledger.num_overflows == ledger.totals["failed"].count == 43
    for number in range(100, 150):
        ledger.open(f"gw-{number}", "r", P0, D0, 1)
    assert sum(ledger.find(f"gw-{number}") is not None for number in range(100, 150)) == 7
    assert_balanced(ledger)


def test_reuse_is_noticed_when_the_record_is_no_longer_shown() -> None:
    """The index of chunks outlives the ring of records."""
    ledger = Ledger(num_records=1)
    for number in range(3):
        ledger.open(f"gw-{number}", "r", P0, D0, 1)
        told(ledger, P0, produced(f"gw-{number}"))
        told(ledger, P0, rescued(f"gw-{number}", f"chunk-{number}"))
    told(ledger, D0, loaded("chunk-0"))
    assert ledger.totals["reused"].count == 1


def test_every_addition_is_told() -> None:
    """What the metrics are told adds up to the totals."""
    additions: list[tuple[str, int, int]] = []
    ledger = Ledger(on_count=lambda *addition: additions.append(addition))
    ledger.open("gw-1", "r", P0, D0, 1)
    for event in (produced("gw-1"), ended("gw-1", "expired", adopted=True), rescued("gw-1", "a"), loaded("a")):
        told(ledger, P0, event)
    assert additions == [("produced", 100, 1000), ("rescued", 100, 1000), ("stored", 32, 320), ("reused", 32, 320)]


IDS = st.integers(1, 6).map(lambda number: f"gw-{number}")
CHUNKS = st.lists(st.sampled_from("abcdef"), max_size=4)
ACTIONS = st.one_of(
    st.tuples(st.just("open"), IDS, st.sampled_from([P0, P1])),
    st.tuples(st.just("note"), IDS, st.just(P0)),
    st.tuples(st.just("gone"), st.just(""), st.sampled_from([P0, P1, D0])),
    st.tuples(st.just("gap"), st.just(""), st.sampled_from([P0, P1])),
    st.tuples(st.just("wait"), st.just(""), st.just(P0)),
    st.tuples(st.builds(produced, IDS, tokens=st.integers(0, 500)), st.just(""), st.sampled_from([P0, P1])),
    st.tuples(
        st.builds(ended, IDS, st.sampled_from(["consumed", "released", "expired"]), adopted=st.booleans()),
        st.just(""),
        st.sampled_from([P0, P1]),
    ),
    st.tuples(
        st.builds(lambda i, c: rescued(i, *c), IDS, CHUNKS),
        st.just(""),
        st.just(P0),
    ),
    st.tuples(st.builds(lambda i: {"kind": "rescue_failed", "id": i, "at": 3.0}, IDS), st.just(""), st.just(P0)),
    st.tuples(st.builds(lambda c: loaded(*c), CHUNKS), st.just(""), st.just(D0)),
)


@given(st.lists(ACTIONS, max_size=60), st.integers(1, 4), st.integers(1, 6))
def test_books_balance_whatever_comes(actions: list[Any], num_records: int, max_open: int) -> None:
    """In any order, with events twice, lost or too late, and replicas that die, the books add up after every step."""
    clock = Clock()
    ledger = Ledger(num_records=num_records, max_open=max_open, unknown_after_s=10, clock=clock)
    ledger.open("gw-0", "r", P0, D0, 5)
    last = dict.fromkeys(TOTALS, 0)
    for action, handoff_id, where in actions:
        if action == "open":
            ledger.open(handoff_id, "r", where, D0, 5)
        elif action == "note":
            ledger.note(handoff_id, "client_left")
        elif action == "gone":
            ledger.replica_gone(where.incarnation)
        elif action == "gap":
            ledger.gap(where.incarnation)
        elif action == "wait":
            clock.now += 6
            ledger.sweep()
        else:
            told(ledger, where, action)
        assert_balanced(ledger)
        assert ledger.num_open <= max_open
        assert all(total.count >= last[word] for word, total in ledger.totals.items())
        assert ledger.num_malformed == 0
        suspects = [r for part in (ledger._announced, ledger._open) for r in part.values() if r.suspect_since]
        assert ledger._num_suspect == len(suspects)
        last = {word: total.count for word, total in ledger.totals.items()}
    assert ledger.totals["reused"].count <= ledger.totals["stored"].count


@pytest.mark.parametrize("seed", range(5))
def test_true_stories_are_told_truly(seed: int) -> None:
    """Interleaved hand-offs, each with its events in order, end as their engines said, all of them."""
    rng = random.Random(seed)
    ledger = Ledger()
    stories: list[list[dict[str, Any]]] = []
    expected = dict.fromkeys(TOTALS, 0)
    for number in range(200):
        handoff_id = f"gw-{number}"
        ledger.open(handoff_id, "r", P0, D0, 100)
        outcome = rng.choice(["consumed", "released", "expired", "rescued", "unsaved"])
        story = [produced(handoff_id)]
        if outcome in ("consumed", "released", "expired"):
            story.append(ended(handoff_id, outcome))
        else:
            story.append(ended(handoff_id, "released", adopted=True))
            saved = outcome == "rescued"
            last = {"kind": "rescue_failed", "id": handoff_id, "at": 3.0, "reason": "x"}
            story.append(rescued(handoff_id, f"c{number}") if saved else last)
            expected["stored"] += saved
            outcome = outcome if saved else "released"
        expected["produced"] += 1
        expected[outcome] += 1
        stories.append(story)
    while stories:
        story = rng.choice(stories)
        told(ledger, P0, story.pop(0))
        if not story:
            stories.remove(story)
    assert {word: total.count for word, total in ledger.totals.items()} == expected
    assert ledger.num_open == ledger.num_repeated == 0


def test_a_replica_that_was_written_off_counts_nothing_twice(clock: Clock) -> None:
    """What it says of forgotten hand-offs is a repetition; those announced since are counted."""
    ledger = Ledger(clock=clock, num_records=1)
    for number in (1, 2, 3):
        ledger.open(f"gw-{number}", f"request-{number}", P0, D0, 100)
        told(ledger, P0, produced(f"gw-{number}"))
    ledger.replica_gone(P0.incarnation)
    before = {word: total.count for word, total in ledger.totals.items()}
    for event in (produced("gw-1"), ended("gw-1", "consumed"), ended("gw-2", "released"), ended("gw-3", "expired")):
        told(ledger, P0, event)
    assert {word: total.count for word, total in ledger.totals.items()} == before
    assert ledger.num_repeated == 4
    ledger.open("gw-4", "request-4", P0, D0, 100)
    told(ledger, P0, produced("gw-4"))
    told(ledger, P0, ended("gw-4", "consumed"))
    assert ledger.totals["produced"].count == 4 and ledger.totals["consumed"].count == 1
    told(ledger, P1, produced("gw-9"))
    assert ledger.totals["produced"].count == 5, "another replica's, though not announced"
    assert ledger.balanced
