# SPDX-License-Identifier: Apache-2.0
"""Counts what vLLM reports after each engine step, and passes on the events that come with it. Does not import vLLM.

Source: vLLM 0.32 `SchedulerStats`, `IterationStats`, and the statistics of its connectors as they cross processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pools.engine.base import EngineStats
from pools.engine.events import EventLog
from transport.transports import STATISTICS

_SOURCES = {
    "p2p": "prompt_tokens_p2p",
    "host": "prompt_tokens_host",
    "disk": "prompt_tokens_disk",
    "external_unspecified": "prompt_tokens_external",
}
"""vLLM's `CacheHitSource` -> counter."""
_OFFLOAD = {
    "vllm:kv_offload_load_bytes": "kv_offload_load_bytes",
    "vllm:kv_offload_store_bytes": "kv_offload_store_bytes",
    "vllm:kv_offload_allocation_failure": "kv_offload_allocation_failures",
}
"""Counter of OffloadingConnector -> ours."""
_TOTALS = (
    *("prompt_tokens", "prompt_tokens_computed", "generation_tokens", "num_preemptions", "num_steps"),
    *_SOURCES.values(),
    *dict.fromkeys(name for kind in STATISTICS.values() for name in (kind.bytes, *kind.cases)),
    *_OFFLOAD.values(),
)


class Tally:
    """The statistics of one engine. Used from one event loop."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._running = 0
        self._waiting = 0
        self._kv_fetch_waiting_to_start = 0
        self._kv_cache_usage = 0.0
        self._totals: Counter[str] = Counter()

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Take over the statistics of one step; either may be None."""
        totals = self._totals
        if iteration_stats is not None:
            totals["prompt_tokens"] += iteration_stats.prompt_token_stats.total
            totals["prompt_tokens_computed"] += iteration_stats.prompt_token_stats.computed
            totals["generation_tokens"] += iteration_stats.num_generation_tokens
            totals["num_preemptions"] += iteration_stats.num_preempted_reqs
        if scheduler_stats is None:
            return
        totals["num_steps"] += 1
        self._running = scheduler_stats.num_running_reqs
        self._waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self._kv_fetch_waiting_to_start = scheduler_stats.num_kv_fetch_reqs_by_stage.get("waiting_to_start", 0)
        self._kv_cache_usage = scheduler_stats.kv_cache_usage
        if (loads := scheduler_stats.connector_prefix_cache_stats) is not None:
            for source, tokens in loads.hits_by_source.items():
                if source in _SOURCES:
                    totals[_SOURCES[source]] += tokens
        if scheduler_stats.kv_connector_stats:
            self._record_connectors(scheduler_stats.kv_connector_stats)

    def _record_connectors(self, children: Mapping[str, Any]) -> None:
        totals = self._totals
        for connector, kind in STATISTICS.items():
            stats = children.get(connector) or {}
            totals[kind.bytes] += sum(stats.get("bytes_transferred", ()))
            for counter, keys in kind.cases.items():
                totals[counter] += sum(len(stats.get(key, ())) for key in keys)
        offload = (children.get("OffloadingConnector") or {}).get("data", {})
        for theirs, name in _OFFLOAD.items():
            totals[name] += int(sum(offload.get(theirs, {}).values()))
        for event in (children.get("Handoffs") or {}).get("events", ()):
            self._events.append(event)

    def snapshot(self, num_handoffs_admitted: int) -> EngineStats:
        return EngineStats(
            num_requests_running=self._running,
            num_requests_waiting=self._waiting,
            num_requests_kv_fetch_waiting_to_start=self._kv_fetch_waiting_to_start,
            kv_cache_usage=self._kv_cache_usage,
            num_handoffs_admitted_total=num_handoffs_admitted,
            **{f"{name}_total": self._totals[name] for name in _TOTALS},
        )
