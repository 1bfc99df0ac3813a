# SPDX-License-Identifier: Apache-2.0
"""The way of replica lists from Serve's routers to the gateway."""

from __future__ import annotations

import threading

import pytest

from disagg.routing import feed
from disagg.routing.views import ReplicaInfo


@pytest.fixture(autouse=True)
def _empty_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed that nobody else of this process uses."""
    monkeypatch.setattr(feed, "_latest", {})
    monkeypatch.setattr(feed, "_listeners", [])


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
