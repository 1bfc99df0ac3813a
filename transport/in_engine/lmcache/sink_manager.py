# SPDX-License-Identifier: Apache-2.0
"""Our sink behind the calls that LMCache's connector makes on its `LazyOffloadManager`. No vLLM or LMCache imports.

With the sink `unused` the manager here works alone. With `write_through` it also makes each of LMCache's candidates a
store at once. With `evicted` it passes the calls on to LMCache's own manager, and adds the stores that a client asked
for, at once. Reports of workers are for both; the ids of the stores tell whose a report is.

Source:
    LMCache 0.5.6 `integration/vllm/lazy_offload_manager.py` and the calls in `lmcache_mp_connector.py`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from transport.in_engine.lmcache.sink import Rescues
from transport.in_engine.lmcache.write_through import WriteThrough

logger = logging.getLogger(__name__)


@dataclass
class SinkActions:
    """What the connector is to do; the attributes of LMCache's `LazyOffloadActions`."""

    stores_to_submit: list[Any] = field(default_factory=list)
    """Store metadata for the workers."""
    sessions_to_end: list[str] = field(default_factory=list)
    """Ids whose session on the LMCache server is over."""


class SinkManager:
    """Stands for `LazyOffloadManager`. Behind it are `Rescues`, and at most one taker of LMCache's candidates.

    Args:
        own: LMCache's own manager, as the taker.
        through: our `WriteThrough`, as the taker.
    """

    def __init__(self, rescues: Rescues, own: Any | None = None, through: WriteThrough | None = None) -> None:
        self._rescues = rescues
        self._own = own
        self._through = through

    def bind_block_pool(self, gpu_block_pool: Any) -> None:
        """Called once, before the first request."""
        self._rescues.bind(gpu_block_pool)
        if self._through is not None:
            self._through.bind(gpu_block_pool)
        if self._own is not None:
            self._own.bind_block_pool(gpu_block_pool)

    def add_store_candidate(self, metadata: Any) -> None:
        """The step that is being scheduled computes these chunks. `on_scheduler_step` of the same step comes next."""
        if self._through is not None:
            self._through.add(metadata)
        if self._own is not None:
            self._own.add_store_candidate(metadata)

    def on_scheduler_step(self, scheduler_output: Any) -> SinkActions:
        """Stores for this step, which may be one without tokens."""
        actions = self._actions(None if self._own is None else self._own.on_scheduler_step(scheduler_output))
        if self._through is not None:
            actions.stores_to_submit.extend(self._through.next_stores())
        actions.stores_to_submit.extend(self._rescues.next_stores())
        return actions

    def on_store_results(self, failed: set[str], completed: dict[str, int]) -> SinkActions:
        """Take the workers' reports. Each store of ours has a session of its own, which ends with the store."""
        if self._through is not None:
            ended = self._through.report(completed)
            return SinkActions(sessions_to_end=ended + self._rescues.report(failed, completed))
        ours = {i: n for i, n in completed.items() if self._rescues.is_under_way(i)}
        actions = SinkActions()
        if self._own is not None:
            rest = {i: n for i, n in completed.items() if i not in ours}
            actions = self._actions(self._own.on_store_results({i for i in failed if i not in ours}, rest))
        actions.sessions_to_end.extend(self._rescues.report(failed, ours))
        return actions

    def on_request_finished(self, request_id: str) -> SinkActions:
        """The request's session is over. A hand-off that is held does not need it: its store has another id."""
        if self._own is not None:
            return self._actions(self._own.on_request_finished(request_id))
        return SinkActions(sessions_to_end=[request_id])

    def on_request_reset(self, request_id: str) -> None:
        """The request was preempted and starts again."""
        self._rescues.forget(request_id)
        if self._own is not None:
            self._own.on_request_reset(request_id)

    def on_request_arrived(self, request_id: str) -> SinkActions:
        """A request got a tracker: a new one, or one that reuses an id."""
        self._rescues.forget(request_id)
        return self._actions(None if self._own is None else self._own.on_request_arrived(request_id))

    def has_inflight_store_work(self) -> bool:
        """Whether the engine must keep stepping. Our queued stores count, because any step can send them."""
        if self._rescues.has_work() or (self._through is not None and self._through.has_work()):
            return True
        return self._own is not None and bool(self._own.has_inflight_store_work())

    def log_final_stats(self) -> None:
        """At shutdown."""
        if self._through is not None and self._through.num_dropped:
            logger.warning("%d stores of the shared tier were dropped in all", self._through.num_dropped)
        if self._own is not None:
            self._own.log_final_stats()

    @staticmethod
    def _actions(own: Any | None) -> SinkActions:
        if own is None:
            return SinkActions()
        return SinkActions(list(own.stores_to_submit), list(own.sessions_to_end))
