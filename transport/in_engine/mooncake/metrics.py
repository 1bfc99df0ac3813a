# SPDX-License-Identifier: Apache-2.0
"""Mooncake's Prometheus metrics. vLLM 0.32 collects but does not publish their values. Names follow vLLM's for NIXL."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
from vllm.v1.metrics.utils import create_metric_per_engine

_COUNTERS = (
    ("vllm:mooncake_num_transfers", "Writes of KV into decode engines. Counted on prefill.", "num_descriptors", False),
    ("vllm:mooncake_bytes_transferred", "Bytes of KV written. Counted on prefill.", "bytes_transferred", True),
    ("vllm:mooncake_xfer_time_seconds", "Seconds spent writing KV. Counted on prefill.", "transfer_duration", True),
    ("vllm:mooncake_num_failed_transfers", "Failed writes of KV. Counted on prefill.", "num_failed_transfers", False),
    ("vllm:mooncake_num_failed_recvs", "KV that did not come. Counted on decode.", "num_failed_recvs", False),
    ("vllm:mooncake_num_kv_expired_reqs", "Leases that ended. Counted on prefill.", "num_kv_expired_reqs", False),
)


class MooncakePromMetrics(KVConnectorPromMetrics):
    """One counter for each of `MooncakeKVConnectorStats`' lists.

    vLLM's MultiConnector asserts that a child with statistics has such a class.
    """

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, labelvalues)
        self._counters = [
            (
                create_metric_per_engine(
                    self._counter_cls(name=name, documentation=text, labelnames=labelnames), self.per_engine_labelvalues
                ),
                key,
                summed,
            )
            for name, text, key, summed in _COUNTERS
        ]

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for counters, key, summed in self._counters:
            items = transfer_stats_data.get(key, ())
            if items:
                counters[engine_idx].inc(sum(items) if summed else len(items))
