# SPDX-License-Identifier: Apache-2.0
"""One rank stays alive and honest whatever its LMCache server does."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from transport.in_engine.lmcache.worker import Finished, WorkerGuard

TIMEOUT_S = 15.0
BLOCKING_S = 6.0


@dataclass
class Meta:
    request_id: str
    op: Any = field(default_factory=lambda: SimpleNamespace(flat_block_ids=[7, 8]))
    cache_salt: str = ""
    request_configs: dict[str, Any] | None = None


class Adapter:
    """The attributes of LMCache's worker adapter that are used."""

    def __init__(self) -> None:
        self._health_event = threading.Event()
        self._health_event.set()
        self.store_futures: dict[str, Any] = {}
        self.retrieve_futures: dict[str, Any] = {}
        self.store_events: dict[str, Any] = {}
        self.retrieve_events: dict[str, Any] = {}
        self.error_block_ids: set[int] = set()
        self._failed_request_ids: set[str] = set()
        self._dropped_retrieves: set[str] = set()
        self._completed_store_requests: dict[str, int] = {}
        self._failed_store_requests: set[str] = set()
        self._returned_finished: set[str] = set()
        self.transfer_ctx = SimpleNamespace(_engine_driven_context=SimpleNamespace(mq_timeout=TIMEOUT_S))
        self.error: Exception | None = None
        self.takes_s = 0.0
        self.now = 0.0

    def _ensure_heartbeat_started(self) -> None:
        self.started = True

    def create_recorded_event(self) -> str:
        return "event"

    def submit_store_request(self, request_id: str, op: Any, event: Any, **kwargs: Any) -> None:
        self._submit(request_id, self.store_futures)

    def submit_retrieve_request(self, request_id: str, op: Any, event: Any, **kwargs: Any) -> None:
        self._submit(request_id, self.retrieve_futures)

    def _submit(self, request_id: str, futures: dict[str, Any]) -> None:
        self.now += self.takes_s
        if self.error is not None:
            raise self.error
        futures[request_id] = object()


@pytest.fixture
def adapter() -> Adapter:
    return Adapter()


def guard(adapter: Adapter, lazy: bool = True) -> WorkerGuard:
    return WorkerGuard(adapter, lazy=lazy, timeout_s=TIMEOUT_S, blocking_s=BLOCKING_S, clock=lambda: adapter.now)


def test_a_store_that_raises_is_a_failed_store(adapter: Adapter) -> None:
    """The engine goes on, the scheduler gets its receipt, and the server counts as lost."""
    adapter.error = TimeoutError("PREPARE_STORE timed out")
    guard(adapter).store([Meta("a"), Meta("b")])
    assert adapter._completed_store_requests == {"a": 1, "b": 1}
    assert adapter._failed_store_requests == {"a", "b"}
    assert not adapter._health_event.is_set()


def test_a_store_that_raises_without_receipts_is_not_waited_for(adapter: Adapter) -> None:
    """Without lazy offload LMCache reports a request as sent when no store of it is under way."""
    adapter.error = RuntimeError("no context")
    guard(adapter, lazy=False).store([Meta("a")])
    assert adapter._completed_store_requests == {} and adapter.store_futures == {}


def test_a_load_that_raises_is_recomputed(adapter: Adapter) -> None:
    """It comes out as received with failed blocks, which vLLM computes again."""
    adapter.error = RuntimeError("no context")
    guard(adapter).retrieve([Meta("a")])
    assert adapter.error_block_ids == {7, 8}
    assert adapter._failed_request_ids == adapter._dropped_retrieves == {"a"}


def test_a_slow_answer_is_an_outage(adapter: Adapter) -> None:
    """LMCache hides a load's time-out as a miss; taking as long as one gives it away."""
    watch = guard(adapter)
    adapter.takes_s = BLOCKING_S / 2
    watch.retrieve([Meta("a")])
    assert adapter._health_event.is_set()
    adapter.takes_s = BLOCKING_S
    watch.retrieve([Meta("b")])
    assert not adapter._health_event.is_set()


def test_the_engine_does_not_stand_still_for_long(adapter: Adapter) -> None:
    """A copy inside the call gives up in the time of two heartbeats; after a restart the new context does as well."""
    watch = guard(adapter)
    watch.store([Meta("a")])
    assert adapter.transfer_ctx._engine_driven_context.mq_timeout == BLOCKING_S
    adapter.transfer_ctx = SimpleNamespace(_engine_driven_context=SimpleNamespace(mq_timeout=TIMEOUT_S))
    watch.retrieve([Meta("b")])
    assert adapter.transfer_ctx._engine_driven_context.mq_timeout == BLOCKING_S
    adapter.transfer_ctx = SimpleNamespace()
    watch.store([Meta("c")])


def test_an_operation_without_an_answer_is_an_outage(adapter: Adapter) -> None:
    """A server that came back between two heartbeats answers pings and drops operations; loads would wait for ever."""
    watch = guard(adapter)
    watch.retrieve([Meta("a")])
    watch.finished(lambda: (None, None))
    adapter.now = TIMEOUT_S - 1
    watch.finished(lambda: (None, None))
    assert adapter._health_event.is_set()
    adapter.now = TIMEOUT_S
    watch.finished(lambda: (None, None))
    assert not adapter._health_event.is_set()


def test_each_operation_has_its_own_time(adapter: Adapter) -> None:
    """A busy server that answers each one in time is no outage, however long it is busy."""
    watch = guard(adapter)
    for i in range(5):
        adapter.store_futures = {f"r{i}": object()}
        watch.finished(lambda: (None, None))
        adapter.now += TIMEOUT_S - 1
    assert adapter._health_event.is_set()


def test_an_id_that_comes_again_is_another_operation(adapter: Adapter) -> None:
    """A request that stores chunk after chunk, or loads and stores, has each in its own time."""
    watch = guard(adapter)
    for i in range(5):
        (adapter.store_futures if i % 2 else adapter.retrieve_futures)["r"] = object()
        watch.finished(lambda: (None, None))
        adapter.now += TIMEOUT_S - 1
        watch.finished(lambda: (None, None))
        adapter.store_futures["r"] = object()
        adapter.retrieve_futures.clear()
    assert adapter._health_event.is_set()


def test_a_second_error_does_not_leave_the_worker_either(adapter: Adapter) -> None:
    """The heartbeat may have found the server well in between. Everything is given up, and reported once."""
    adapter.store_futures = {"s/through-1": object()}
    adapter.retrieve_futures = {"r": (object(), [7, 8])}
    adapter._dropped_retrieves = {"d"}

    def poll() -> Finished:
        raise RuntimeError("ipc")

    watch = guard(adapter)
    assert watch.finished(poll) == (None, {"r", "d"})
    assert (adapter.error_block_ids, adapter._failed_request_ids) == ({7, 8}, {"r"})
    assert adapter._completed_store_requests == {"s/through-1": 1}
    assert adapter._failed_store_requests == {"s/through-1"}
    assert not adapter.store_futures and not adapter.retrieve_futures and not adapter._dropped_retrieves


def test_an_error_while_polling_does_not_leave_the_worker(adapter: Adapter) -> None:
    """LMCache's poll raises what a future holds; asked again with the server lost, it gives everything up."""
    answers: list[Any] = [RuntimeError("ipc"), ({"s"}, {"r"})]

    def poll() -> Finished:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    assert guard(adapter).finished(poll) == ({"s"}, {"r"})
    assert not adapter._health_event.is_set()


def test_reported_ids_are_forgotten_in_the_end(adapter: Adapter) -> None:
    """LMCache keeps each id for good; the last ten thousand are enough."""
    watch = guard(adapter, lazy=False)
    for i in range(10_005):
        adapter._returned_finished.add(f"r{i}")
        watch.finished(lambda i=i: ({f"r{i}"}, None))  # type: ignore[misc]
    assert len(adapter._returned_finished) == 10_000
    assert "r10004" in adapter._returned_finished and "r4" not in adapter._returned_finished
