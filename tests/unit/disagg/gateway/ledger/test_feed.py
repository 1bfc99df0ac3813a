# SPDX-License-Identifier: Apache-2.0
"""Engine events over real sockets into the ledger, and what happens when replicas break, leave and die."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

import pools.client.replica as replica_client
from disagg.gateway.background import Background
from disagg.gateway.ledger import feed as ledger_feed
from disagg.gateway.ledger.feed import LedgerFeed
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.replicas.membership import POOLS, Membership
from disagg.observability.metrics import Metrics
from disagg.routing.views import ReplicaInfo
from pools.engine.base import EngineStats, Role
from pools.engine.events import EventLog
from tests.support.gateway_stack import until
from tests.support.replica_clients import lonely_membership

EMPTY = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)


class StubReplica:
    """Serves `/disagg/v1/events` and `/disagg/v1/stats`, and breaks on request."""

    def __init__(self, replica_id: str, *, max_events: int = 1000) -> None:
        self.replica_id = replica_id
        self.pool: Role = "prefill" if replica_id.startswith("p") else "decode"
        self.incarnation = f"{replica_id}-1"
        self.events = EventLog(max_events)
        self.stats: dict[str, Any] = {**EMPTY.as_dict(), "num_requests_running": 3, "num_kv_expired_reqs_total": 2}
        del self.stats["num_preemptions_total"]
        self.seen: list[str] = []
        self.answer: tuple[int, bytes] | None = None
        """Replaces every answer."""
        self.silent = False
        """Answers nothing, and leaves every connection open."""
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.info = ReplicaInfo(
            replica_id=self.replica_id,
            pool=self.pool,
            url=f"http://127.0.0.1:{port}",
            engine_id="e",
            incarnation=f"{self.replica_id}-1",
            block_size=16,
            vocab_size=1000,
        )

    def kill(self) -> None:
        """Nothing listens any more and every connection breaks."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                target = head.split(b" ")[1].decode()
                self.seen.append(target)
                while self.silent:
                    await asyncio.sleep(0.01)
                status, body = self.answer or (200, json.dumps(await self._answer(target)).encode())
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, target: str) -> dict[str, Any]:
        path, _, query = target.partition("?")
        if path == "/disagg/v1/stats":
            return self.stats
        given = dict(part.split("=") for part in query.split("&"))
        batch = await self.events.read(int(given["after"]), float(given["wait_s"]))
        return {"incarnation": self.incarnation, "next": batch.next, "lost": batch.lost, "events": batch.events}


@dataclass
class Followed:
    """A feed and its surroundings. Three hand-offs from p0 to d0 are announced."""

    ledger: Ledger
    membership: Membership
    metrics: Metrics
    feed: LedgerFeed
    prefill: StubReplica
    decode: StubReplica
    unread: list[str] = field(default_factory=list)
    joined: list[StubReplica] = field(default_factory=list)

    async def join(self, replica_id: str, *, max_events: int = 1000) -> StubReplica:
        """A further replica that serves, not announced yet."""
        replica = StubReplica(replica_id, max_events=max_events)
        await replica.start()
        self.joined.append(replica)
        return replica

    def announce(self, *replicas: StubReplica) -> None:
        for pool in POOLS:
            self.membership.replace(pool, [replica.info for replica in replicas if replica.pool == pool])

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def count(self, word: str) -> int:
        return self.ledger.totals[word].count


@asynccontextmanager
async def running(*, wait_s: float = 20.0, stats_s: float = 5.0, max_events: int = 1000) -> AsyncIterator[Followed]:
    metrics, background = Metrics(), Background()
    ledger = Ledger(on_count=metrics.count_handoff, on_lease_left=metrics.lease_left_seconds.observe)
    membership = lonely_membership(lambda: feed.members_changed())
    unread: list[str] = []
    feed = LedgerFeed(
        ledger, membership, metrics, background, unread.append, connect_timeout_s=1, wait_s=wait_s, stats_s=stats_s
    )
    prefill, decode = StubReplica("p0", max_events=max_events), StubReplica("d0")
    await prefill.start()
    await decode.start()
    for number in (1, 2, 3):
        ledger.open(f"gw-{number}", f"request-{number}", prefill.info, decode.info, 100)
    followed = Followed(ledger, membership, metrics, feed, prefill, decode, unread)
    followed.announce(prefill, decode)
    background.forever(feed.sweep())
    try:
        yield followed
    finally:
        async with asyncio.timeout(2):
            await background.close(5)
        for replica in (prefill, decode, *followed.joined):
            replica.kill()


def produced(handoff_id: str) -> dict[str, Any]:
    return {"kind": "produced", "id": handoff_id, "at": 1.0, "tokens": 100, "bytes": 1000}


def ended(handoff_id: str, outcome: str = "consumed", *, adopted: bool = False) -> dict[str, Any]:
    event = {"kind": "ended", "id": handoff_id, "at": 2.0, "outcome": outcome}
    return event | {"lease_left_s": 20.0, "adopted": adopted}


async def test_events_reach_books_and_metrics() -> None:
    """A long poll answers as soon as there is something; the metrics say what the books say."""
    async with running() as it:
        await until(lambda: any("/events" in target for target in it.prefill.seen))
        for event in (produced("gw-1"), produced("gw-2"), ended("gw-1"), ended("gw-2", "released", adopted=True)):
            it.prefill.events.append(event)
        await until(lambda: it.count("consumed") == 1, timeout_s=1)
        rescue = {"kind": "rescued", "id": "gw-2", "at": 3.0, "tokens": 64, "bytes": 640, "chunks": ["a", "b"]}
        it.prefill.events.append(rescue)
        await until(lambda: it.count("rescued") == 1, timeout_s=1)
        it.decode.events.append({"kind": "loaded", "source": "lmcache", "at": 4.0, "tokens": 64, "chunks": ["a", "b"]})
        await until(lambda: it.count("reused") == 1, timeout_s=1)
        for outcome, number in {
            "produced": 2,
            "consumed": 1,
            "rescued": 1,
            "stored": 1,
            "reused": 1,
            "failed": 0,
        }.items():
            assert it.value("disagg_handoffs_total", outcome=outcome) == number
        for outcome, tokens in {
            "produced": 200,
            "consumed": 100,
            "orphaned": 100,
            "rescued": 100,
            "stored": 64,
        }.items():
            assert it.value("disagg_handoff_tokens_total", outcome=outcome) == tokens
            assert it.value("disagg_handoff_bytes_total", outcome=outcome) == 10 * tokens
        assert it.value("disagg_handoff_lease_left_seconds_sum") == 20


async def test_unread_is_passed_on() -> None:
    """A decode engine's word that it read nothing reaches the gateway, for its own hand-offs only."""
    async with running() as it:
        for handoff_id in ("other-1", "gw-1", 7):
            it.decode.events.append({"kind": "unread", "id": handoff_id, "at": 1.0})
        it.decode.events.append(produced("other-1"))
        await until(lambda: it.ledger.num_foreign)
        assert it.unread == ["gw-1"]
        record = it.ledger.find("gw-1")
        assert record is not None and record.reason == "unread"


async def test_engine_statistics() -> None:
    """The latest statistics have the replica's labels, and vanish with it."""
    async with running(wait_s=0.05, stats_s=0.05) as it:
        labels = {"pool": "prefill", "replica": "p0"}
        await until(lambda: it.value("disagg_engine_num_kv_expired_reqs_total", **labels) == 2)
        it.prefill.stats["num_kv_expired_reqs_total"] = 5
        await until(lambda: it.value("disagg_engine_num_kv_expired_reqs_total", **labels) == 5)
        assert it.value("disagg_engine_num_requests_running", pool="decode", replica="d0") == 3
        assert it.value("disagg_engine_num_preemptions_total", **labels) is None
        it.announce(it.decode)
        assert it.value("disagg_engine_num_kv_expired_reqs_total", **labels) is None
        await asyncio.sleep(0.2)
        assert it.value("disagg_engine_num_kv_expired_reqs_total", **labels) is None


async def test_draining_replica_is_read_to_its_end() -> None:
    """Taken out of the list, a replica still gives out KV; what is open when it stops answering has failed."""
    async with running(wait_s=0.05) as it:
        it.prefill.events.append(produced("gw-1"))
        it.prefill.events.append(produced("gw-2"))
        await until(lambda: it.count("produced") == 2)
        it.announce(it.decode)
        it.prefill.events.append(ended("gw-1"))
        await until(lambda: it.count("consumed") == 1)
        assert it.count("failed") == 0
        it.prefill.kill()
        await until(lambda: it.count("failed") == 1)
        record = it.ledger.find("gw-2")
        assert record is not None and record.reason == "prefill_lost"
        assert it.ledger.balanced and it.ledger.num_open == 0


async def test_dead_replica_fails_once_it_is_out_of_the_list() -> None:
    """Refused connections are tried again until Serve says that the replica is gone."""
    async with running() as it:
        it.prefill.events.append(produced("gw-1"))
        await until(lambda: it.count("produced") == 1)
        it.prefill.kill()
        await until(lambda: (it.value("disagg_ledger_feed_errors_total") or 0) >= 2)
        assert it.ledger.num_open == 1
        it.announce(it.decode)
        await until(lambda: it.count("failed") == 1)


async def test_a_late_replica_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of the list, a replica that does not answer in time, or badly, is read on; what it did is counted once."""
    monkeypatch.setattr(replica_client, "_POLL_TIMEOUT_S", 0.05)
    async with running(wait_s=0.02) as it:
        it.prefill.events.append(produced("gw-1"))
        await until(lambda: it.count("produced") == 1)
        it.prefill.silent = True
        it.announce(it.decode)
        await until(lambda: (it.value("disagg_ledger_feed_errors_total") or 0) >= 2)
        it.prefill.silent, it.prefill.answer = False, (500, b"{}")
        await until(lambda: (it.value("disagg_ledger_feed_errors_total") or 0) >= 4)
        assert it.count("failed") == 0 and it.ledger.num_open == 1
        it.prefill.answer = None
        it.prefill.events.append(ended("gw-1"))
        await until(lambda: it.count("consumed") == 1)
        assert it.count("failed") == 0 and it.count("produced") == 1


async def test_what_was_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that was written off and comes back is read on where it was left, and nothing counts twice."""
    monkeypatch.setattr(replica_client, "_POLL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(ledger_feed, "_SILENT_S", 0.1)
    async with running(wait_s=0.02) as it:
        # No ended record is remembered, as after many more.
        it.ledger._num_records = 0
        for event in (produced("gw-1"), ended("gw-1"), produced("gw-2"), produced("other-1")):
            it.prefill.events.append(event)
        it.prefill.events.append({"kind": "tier_degraded", "tier": "lmcache", "at": time.time()})
        await until(lambda: it.value("disagg_tier_degraded_total", tier="lmcache") == 1)
        it.prefill.silent = True
        it.announce(it.decode)
        await until(lambda: it.count("failed") == 1)
        it.prefill.silent = False
        it.ledger.open("gw-4", "request-4", it.prefill.info, it.decode.info, 100)
        it.announce(it.prefill, it.decode)
        for event in (ended("gw-2"), produced("gw-4"), ended("gw-4")):
            it.prefill.events.append(event)
        await until(lambda: it.count("consumed") == 2)
        assert (it.count("produced"), it.count("failed"), it.ledger.num_foreign) == (3, 1, 1)
        assert it.value("disagg_tier_degraded_total", tier="lmcache") == 1
        assert it.value("disagg_ledger_events_lost_total") == 0
        assert it.ledger.balanced and it.ledger.num_open == 0


async def test_memory_of_what_was_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that came and went are forgotten, the oldest first."""
    monkeypatch.setattr(ledger_feed, "_MAX_REMEMBERED", 2)
    async with running(wait_s=0.02) as it:
        passing = [await it.join(f"p{number}") for number in (7, 8, 9)]
        it.announce(it.prefill, it.decode, *passing)
        await until(lambda: all(replica.seen for replica in passing))
        it.announce(it.prefill, it.decode)
        for number, replica in enumerate(passing):
            replica.kill()
            await until(lambda incarnation=replica.incarnation: incarnation in it.feed._read)
            assert len(it.feed._read) == min(number + 1, 2)
        assert list(it.feed._read) == ["p8-1", "p9-1"]


async def test_successor_is_followed_beside_the_old_one() -> None:
    """A new incarnation under the same replica id has events of its own."""
    async with running() as it:
        it.prefill.events.append(produced("gw-1"))
        await until(lambda: it.count("produced") == 1)
        successor = await it.join("p0")
        successor.incarnation = "p0-2"
        successor.info = ReplicaInfo(**{**vars(successor.info), "incarnation": "p0-2"})
        it.announce(successor, it.decode)
        successor.events.append(produced("gw-2"))
        await until(lambda: it.count("produced") == 2)
        it.prefill.kill()
        await until(lambda: it.count("failed") == 1)
        assert it.ledger.num_open == 1


async def test_another_engine_at_the_address() -> None:
    """Events of an engine that took over a dead replica's port are not taken for that replica's."""
    async with running() as it:
        stranger = await it.join("p1")
        stranger.incarnation = "someone-else"
        stranger.events.append(produced("gw-3"))
        it.announce(it.prefill, it.decode, stranger)
        await until(lambda: it.value("disagg_ledger_feed_errors_total"))
        assert it.count("produced") == 0


async def test_gap() -> None:
    """Events that were overwritten are counted, and those that came after them are taken over."""
    async with running(max_events=2) as it:
        it.prefill.events.append(produced("gw-1"))
        await until(lambda: it.count("produced") == 1)
        for event in (ended("gw-1"), produced("gw-2"), ended("gw-2"), produced("gw-3")):
            it.prefill.events.append(event)
        await until(lambda: it.ledger.find("gw-3") and it.count("produced") == 3)
        assert it.value("disagg_ledger_events_lost_total") == 2
        assert it.count("consumed") == 1 and it.ledger.num_open == 2
        lost = it.ledger.find("gw-1")
        assert lost is not None and lost.suspect_since is not None


async def test_what_a_new_gateway_missed_is_not_lost() -> None:
    """Events from before this gateway knew the replica are not counted as lost."""
    async with running() as it:
        old = await it.join("p9", max_events=2)
        for _ in range(10):
            old.events.append(produced("other-1"))
        it.announce(it.prefill, it.decode, old)
        await until(lambda: it.ledger.num_foreign == 2)
        assert it.value("disagg_ledger_events_lost_total") == 0


@pytest.mark.parametrize(
    "answer",
    [(500, b"{}"), (404, b"{}"), (200, b"not json"), (200, b"[]"), (200, b'{"incarnation": 1}'), (200, b"")],
    ids=["500", "404", "text", "list", "types", "empty"],
)
async def test_bad_answers(answer: tuple[int, bytes]) -> None:
    """Whatever an engine answers is survived and counted, and events go on when it has recovered."""
    async with running(wait_s=0.05) as it:
        it.prefill.answer = answer
        it.prefill.events.append(produced("gw-1"))
        await until(lambda: (it.value("disagg_ledger_feed_errors_total") or 0) >= 1)
        it.prefill.answer = None
        await until(lambda: it.count("produced") == 1)


async def test_a_bug_does_not_end_the_feed(caplog: pytest.LogCaptureFixture) -> None:
    """An exception while events are taken over is logged, and the next events are taken over."""
    async with running() as it:

        def broken(handoff_id: str) -> None:
            raise RuntimeError("a bug")

        it.feed._on_unread = broken
        it.decode.events.append({"kind": "unread", "id": "gw-1", "at": 1.0})
        await until(lambda: "a bug" in caplog.text)
        it.decode.events.append(produced("other-1"))
        await until(lambda: it.ledger.num_foreign)


async def test_degraded_tiers() -> None:
    """A tier that stops working is counted by its name; names that nobody knows share one series."""
    async with running() as it:
        for tier in ("lmcache", "lmcache", "moon", None):
            it.decode.events.append({"kind": "tier_degraded", "tier": tier, "at": time.time()})
        await until(lambda: it.value("disagg_tier_degraded_total", tier="other") == 2)
        assert it.value("disagg_tier_degraded_total", tier="lmcache") == 2


async def test_tiers_that_degraded_before_the_gateway_began() -> None:
    """A new gateway reads what engines did in their whole life, and counts from its own start."""
    async with running() as it:
        old = await it.join("p9")
        for at in (1.0, time.time() - 60, None, "soon"):
            old.events.append({"kind": "tier_degraded", "tier": "lmcache", "at": at})
        old.events.append({"kind": "tier_degraded", "tier": "sink", "at": time.time()})
        it.announce(it.prefill, it.decode, old)
        await until(lambda: it.value("disagg_tier_degraded_total", tier="sink") == 1)
        assert it.value("disagg_tier_degraded_total", tier="lmcache") is None


async def test_busy_engines_are_read_in_batches() -> None:
    """Events that come one by one cost a poll each twentieth of a second, not a poll each."""
    async with running() as it:
        await until(lambda: it.prefill.seen)
        before = len(it.prefill.seen)
        for _ in range(200):
            it.prefill.events.append(produced("other-1"))
            await asyncio.sleep(0.001)
        await until(lambda: it.ledger.num_foreign == 200)
        assert len(it.prefill.seen) - before < 30


async def test_events_hold_no_pooled_connection() -> None:
    """A replica has one connection of the feed, used again and again."""
    async with running(wait_s=0.01, stats_s=0.01) as it:
        await until(lambda: len(it.prefill.seen) > 20)
        assert len(cast(set[Any], it.prefill._writers)) == 1
