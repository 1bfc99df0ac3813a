# SPDX-License-Identifier: Apache-2.0
"""The way of replica lists from Serve's routers to the gateway."""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any

import pytest

from disagg.routing import feed
from disagg.routing.views import ReplicaInfo


@pytest.fixture(autouse=True)
def _empty_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed that nobody else of this process uses."""
    monkeypatch.setattr(feed, "_latest", {})
    monkeypatch.setattr(feed, "_listeners", [])
    monkeypatch.setattr(feed, "_told", set())


def info(replica_id: str, pool: str = "decode") -> ReplicaInfo:
    return ReplicaInfo(replica_id, pool, "http://127.0.0.1:1", f"e-{replica_id}", f"i-{replica_id}", 16, 1000)


def test_late_subscriber_hears_what_is_known() -> None:
    """Who subscribes after the first lists gets the latest of each pool at once."""
    feed.publish("prefill", [info("p0", "prefill")])
    feed.publish("decode", [info("d0")])
    feed.publish("decode", [info("d1")])
    heard: dict[str, list[ReplicaInfo]] = {}
    feed.subscribe(lambda pool, replicas: heard.update({pool: replicas}))
    assert heard == {"prefill": [info("p0", "prefill")], "decode": [info("d1")]}


METADATA = {
    "pool": "decode",
    "url": "http://127.0.0.1:1",
    "engine_id": "e-d0",
    "incarnation": "i-d0",
    "block_size": 16,
    "vocab_size": 1000,
    "secret": "hunter-2",
}
"""What a replica publishes at the least, and its key."""


def test_an_unknown_field_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A replica that publishes a field of a later version is reported without it, and the log names the field once."""
    with caplog.at_level(logging.INFO, logger="disagg.routing.feed"):
        for _ in range(2):
            feed.report("decode", {"d0": {**METADATA, "colour": "blue"}, "d1": {**METADATA, "colour": "red"}})
    (d0, d1) = feed._latest["decode"]
    assert d0 == dataclasses.replace(info("d0"), secret="hunter-2")
    assert d1.replica_id == "d1"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "'colour'" in said


@pytest.mark.parametrize("broken", [{"url": None}, {"block_size": "16"}, {"vocab_size": ...}])
def test_a_replica_that_cannot_be_understood_is_left_out_alone(
    broken: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A missing or strange field costs that replica; the others are reported, and the log names replica and field."""
    metadata = {name: value for name, value in {**METADATA, **broken}.items() if value is not ...}
    for _ in range(2):
        feed.report("decode", {"d0": METADATA, "d1": metadata, "d2": METADATA})
    assert [replica.replica_id for replica in feed._latest["decode"]] == ["d0", "d2"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "replica d1 of pool decode is not used" in said
    assert next(iter(broken)) in said
    assert "hunter-2" not in said


def test_every_subscriber_hears_every_list() -> None:
    """Lists reach all listeners in order, empty ones too."""
    heard: list[list[tuple[str, int]]] = [[], []]
    for mine in heard:
        feed.subscribe(lambda pool, replicas, mine=mine: mine.append((pool, len(replicas))))  # type: ignore[misc]
    feed.publish("decode", [info("d0")])
    feed.publish("decode", [])
    assert heard == [[("decode", 1), ("decode", 0)]] * 2


def test_a_listener_may_publish_and_subscribe() -> None:
    """Listeners run outside the lock."""
    heard: list[str] = []

    def listener(pool: str, replicas: list[ReplicaInfo]) -> None:
        heard.append(pool)
        if pool == "prefill":
            feed.publish("decode", [])

    feed.subscribe(listener)
    feed.publish("prefill", [])
    assert heard == ["prefill", "decode"]


def test_threads_lose_nothing() -> None:
    """Lists published and listeners added from many threads all arrive."""
    heard: list[str] = []
    feed.subscribe(lambda pool, replicas: heard.append(replicas[0].replica_id))

    def publish(thread: int) -> None:
        for i in range(100):
            feed.publish(f"pool-{thread}", [info(f"{thread}-{i}")])
            feed.subscribe(lambda pool, replicas: None)

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(heard) == sorted(f"{n}-{i}" for n in range(4) for i in range(100))
    assert len(feed._listeners) == 401
