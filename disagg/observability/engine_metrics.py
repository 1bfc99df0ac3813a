# SPDX-License-Identifier: Apache-2.0
"""What to alert on in the engines, from their `/disagg/v1/stats`, with the labels `pool` and `replica`.

Engines keep the counts; the gateway shows the latest it has seen, and nothing of replicas that are gone. A statistic
that an engine does not report has no series.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ("pool", "replica")


@dataclass(frozen=True)
class EngineMetric:
    """One statistic of an engine."""

    key: str
    """The statistic's field in `/disagg/v1/stats`. In `ENGINE_METRICS`: a field of `pools.engine.base.EngineStats`."""
    type: Literal["counter", "gauge"]
    help: str

    @property
    def family(self) -> str:
        return "disagg_engine_" + self.key.removesuffix("_total")


ENGINE_METRICS = (
    EngineMetric("num_requests_running", "gauge", "Requests in the engine's current batch."),
    EngineMetric("num_requests_waiting", "gauge", "Requests queued in the engine."),
    EngineMetric(
        "num_requests_kv_fetch_waiting_to_start", "gauge", "Requests whose KV is elsewhere and not being fetched yet."
    ),
    EngineMetric("kv_cache_usage", "gauge", "Share of the engine's KV blocks in use, 0 to 1."),
    EngineMetric("num_preemptions_total", "counter", "Requests that lost their KV space and are computed again."),
    EngineMetric("prompt_tokens_total", "counter", "Prompt tokens that the engine received."),
    EngineMetric("prompt_tokens_computed_total", "counter", "Prompt tokens that the engine computed itself."),
    EngineMetric("prompt_tokens_p2p_total", "counter", "Prompt tokens whose KV came from a prefill engine."),
    EngineMetric("prompt_tokens_host_total", "counter", "Prompt tokens whose KV came from host memory (offload)."),
    EngineMetric("prompt_tokens_disk_total", "counter", "Prompt tokens whose KV came from disk (offload.disk)."),
    EngineMetric("prompt_tokens_external_total", "counter", "Prompt tokens whose KV came from the shared cache."),
    EngineMetric("num_kv_expired_reqs_total", "counter", "Hand-offs whose lease ran out on a prefill engine."),
    EngineMetric(
        "num_notifications_after_expiry_total",
        "counter",
        "Reads that ended after a prefill engine had given the KV up, so that the answer may be wrong.",
    ),
    EngineMetric("nixl_num_failed_transfers_total", "counter", "Handshakes and transfers of KV that failed."),
    EngineMetric(
        "nixl_num_failed_notifications_total", "counter", "Reads whose end could not be told to the prefill engine."
    ),
    EngineMetric("nixl_bytes_transferred_total", "counter", "Bytes of KV that the engine moved over NIXL."),
    EngineMetric(
        "mooncake_num_failed_transfers_total", "counter", "Writes of KV that failed, and KV that did not come."
    ),
    EngineMetric("mooncake_bytes_transferred_total", "counter", "Bytes of KV that the engine wrote over Mooncake."),
    EngineMetric("kv_offload_load_bytes_total", "counter", "Bytes moved from host memory into the engine's KV space."),
    EngineMetric("kv_offload_store_bytes_total", "counter", "Bytes moved from there to host memory."),
    EngineMetric("kv_offload_allocation_failures_total", "counter", "KV that host memory had no room for."),
)

SERVER_METRICS = (
    EngineMetric(
        "num_connections_closed_total",
        "counter",
        "Connections to an engine's private port that were closed for what they sent or did not send.",
    ),
)
"""Reported by `pools.replica.server` beside the statistics of its engine."""


class EngineCollector(Collector):
    """The latest statistics of every live replica, as Prometheus families."""

    def __init__(self) -> None:
        self._stats: dict[str, tuple[str, Mapping[str, Any]]] = {}

    def put(self, pool: str, replica_id: str, stats: Mapping[str, Any]) -> None:
        """Take over a snapshot."""
        self._stats[replica_id] = (pool, stats)

    def retain(self, replica_ids: set[str]) -> None:
        """Forget replicas that are not in `replica_ids`."""
        for replica_id in self._stats.keys() - replica_ids:
            del self._stats[replica_id]

    def collect(self) -> Iterable[Metric]:
        for metric in (*ENGINE_METRICS, *SERVER_METRICS):
            make = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
            family = make(metric.family, metric.help, labels=LABELS)
            for replica_id, (pool, stats) in self._stats.items():
                value = stats.get(metric.key)
                if isinstance(value, int | float):
                    family.add_metric((pool, replica_id), value)
            yield family
