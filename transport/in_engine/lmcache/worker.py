# SPDX-License-Identifier: Apache-2.0
"""Keeps a worker alive and in step with its LMCache server whatever the server does.

LMCache's heartbeat finds out that a server is gone, and registers the KV memory again when the server is back. The
guard here closes three gaps that the heartbeat leaves:

- An operation that is under way when the server dies may raise, which would end the engine. The guard reports the
  operation as failed instead. On a machine without an accelerator the copy runs inside the call, and the engine stands
  still until the call gives up. The guard lets the call give up after `blocking_s`, not only after LMCache's own
  time-out, which allows for the start of a server.
- A server may be back before one heartbeat was missed. It does not know this worker, but answers the worker's pings all
  the same, and drops the worker's operations without an answer. So an operation that takes longer than `timeout_s`
  counts as an outage, and the next heartbeat registers again. With an accelerator the server itself copies. A server
  that is merely slow would read or write blocks that vLLM has given away long ago, so there the limit is minutes.
- LMCache's heartbeat starts with the first operation. The guard starts it with the engine's first step, because a
  server forgets a worker that it has not heard of.

Source:
    LMCache 0.5.6 `LMCacheMPWorkerAdapter`, `HeartbeatThread`, `transfer_context/shm.py`, `modules/management.py`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger(__name__)

_MAX_REPORTED = 10_000
"""Finished ids kept in LMCache's set, so that it reports none twice. An id comes again within a few steps only."""

Finished = tuple[set[str] | None, set[str] | None]


class WorkerGuard:
    """Every operation of one rank goes through here.

    Args:
        adapter: LMCache's `LMCacheMPWorkerAdapter`.
        lazy: whether stores are answered with receipts (`lmcache.mp.lazy_offload`).
        timeout_s: seconds after which an operation without an answer is an outage.
        blocking_s: the same for an operation during which the engine stands still.
    """

    def __init__(
        self,
        adapter: Any,
        *,
        lazy: bool,
        timeout_s: float,
        blocking_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._adapter = adapter
        self._lazy = lazy
        self._timeout_s = timeout_s
        self._blocking_s = blocking_s
        self._clock = clock
        self._since: dict[tuple[str, str], tuple[Any, float]] = {}
        self._reported: deque[str] = deque()

    def start(self) -> None:
        """Start the heartbeat. Cheap when it runs."""
        self._adapter._ensure_heartbeat_started()

    def retrieve(self, requests: Iterable[Any]) -> None:
        """Submit loads. One that fails is reported as failed by the next `finished`, and its prompt recomputed."""
        self._submit(requests, self._adapter.submit_retrieve_request, self._retrieve_failed)

    def store(self, requests: Iterable[Any]) -> None:
        """Submit stores. One that fails is reported as failed with the next receipts."""
        self._submit(requests, self._adapter.submit_store_request, self._store_failed)

    def _submit(self, requests: Iterable[Any], submit: Callable[..., None], on_failure: Callable[[Any], None]) -> None:
        event, ready = None, False
        for meta in requests:
            # LMCache makes a new context when it registers again, so the time-out is set for each operation.
            if (copier := getattr(self._adapter.transfer_ctx, "_engine_driven_context", None)) is not None:
                copier.mq_timeout = self._blocking_s
            started = self._clock()
            try:
                if not ready:
                    event, ready = self._adapter.create_recorded_event(), True
                submit(
                    meta.request_id,
                    meta.op,
                    event,
                    cache_salt=meta.cache_salt,
                    request_configs=meta.request_configs,
                )
            # Whatever it is, a cache that fails must not end the engine.
            except Exception as error:
                unexpected = not isinstance(error, TimeoutError)
                logger.warning("LMCache operation of %s failed: %s", meta.request_id, error, exc_info=unexpected)
                on_failure(meta)
                self._outage("an operation failed")
            else:
                # When a load times out, LMCache reports a miss and no error.
                if self._clock() - started >= self._blocking_s:
                    self._outage(f"an operation took more than {self._blocking_s:g} s")

    def finished(self, poll: Callable[[], Finished]) -> Finished:
        """What LMCache's own `poll` reports as finished. After an outage that is everything under way, as failed."""
        if self._is_overdue():
            self._outage(f"no answer within {self._timeout_s:g} s")
        try:
            sent, received = poll()
        except Exception as error:
            logger.warning("an LMCache operation ended with an error: %s", error, exc_info=True)
            self._outage("an operation failed")
            try:
                sent, received = poll()
            # The heartbeat may have found the server again in between, so `poll` has failed as before.
            except Exception as again:
                logger.warning("everything under way is given up: %s", again)
                sent, received = None, self._give_up()
        self._forget(sent or ())
        return sent, received

    def _is_overdue(self) -> bool:
        """Whether one operation has been under way for too long. The same id may come again, as another operation."""
        now = self._clock()
        under_way = {("store", i): operation for i, operation in self._adapter.store_futures.items()}
        under_way.update({("load", i): operation for i, operation in self._adapter.retrieve_futures.items()})
        known = self._since
        self._since = {}
        for key, operation in under_way.items():
            earlier, since = known.get(key, (None, now))
            self._since[key] = (operation, since if earlier is operation else now)
        return any(now - since >= self._timeout_s for _, since in self._since.values())

    def _give_up(self) -> set[str]:
        """Fail everything under way, as LMCache itself does after an outage. Returns the ids of the loads."""
        adapter = self._adapter
        for request_id, (_, block_ids) in adapter.retrieve_futures.items():
            adapter.error_block_ids.update(block_ids)
            adapter._failed_request_ids.add(request_id)
        received = {*adapter.retrieve_futures, *adapter._dropped_retrieves}
        if self._lazy:
            adapter._completed_store_requests.update(dict.fromkeys(adapter.store_futures, 1))
            adapter._failed_store_requests.update(adapter.store_futures)
        for entries in (adapter.store_futures, adapter.store_events, adapter.retrieve_futures, adapter.retrieve_events):
            entries.clear()
        adapter._dropped_retrieves = set()
        return received

    def _forget(self, reported: Iterable[str]) -> None:
        # LMCache never removes an id from this set.
        self._reported.extend(reported)
        while len(self._reported) > _MAX_REPORTED:
            self._adapter._returned_finished.discard(self._reported.popleft())

    def _outage(self, why: str) -> None:
        if self._adapter._health_event.is_set():
            logger.warning("the LMCache server counts as lost until its next heartbeat: %s", why)
            self._adapter._health_event.clear()

    def _retrieve_failed(self, meta: Any) -> None:
        self._adapter.retrieve_futures.pop(meta.request_id, None)
        self._adapter.error_block_ids.update(meta.op.flat_block_ids)
        self._adapter._failed_request_ids.add(meta.request_id)
        self._adapter._dropped_retrieves.add(meta.request_id)

    def _store_failed(self, meta: Any) -> None:
        self._adapter.store_futures.pop(meta.request_id, None)
        if self._lazy:
            self._adapter._completed_store_requests[meta.request_id] = 1
            self._adapter._failed_store_requests.add(meta.request_id)
