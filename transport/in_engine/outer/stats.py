# SPDX-License-Identifier: Apache-2.0
"""How engine events ride in vLLM's connector statistics from EngineCore to the API process.

vLLM ships the statistics of a step together with the step's outputs, and loses none: also on steps without tokens, and
also with async scheduling. vLLM's own event channel (`take_events`) is for KV cache events and is off by default.
Source: vLLM 0.32 `Scheduler.update_from_output`, `kv_connector/v1/metrics.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorPromMetrics

from transport.in_engine.protocols import Event

STATS_KEY = "Handoffs"
"""Key of the events in vLLM's statistics. The other keys are the children's names, so no child may have this one."""


@dataclass
class HandoffStats(KVConnectorStats):
    """Events of one or more steps, oldest first."""

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data.setdefault("events", [])

    @property
    def events(self) -> list[Event]:
        events: list[Event] = self.data["events"]
        return events

    def reset(self) -> None:
        self.data = {"events": []}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data["events"] = self.events + list(other.data["events"])
        return self

    def reduce(self) -> dict[str, int | float]:
        counts: dict[str, int | float] = {}
        for event in self.events:
            counts[event["kind"]] = counts.get(event["kind"], 0) + 1
        return counts

    def is_empty(self) -> bool:
        return not self.events


class MultiPromMetrics(MultiKVConnectorPromMetrics):
    """vLLM's, without the assertion that each key of the statistics has a Prometheus class too.

    Our events (`STATS_KEY`) have none, and the assertion would end the API process' output handler at the first event.
    """

    _prom_metrics: dict[str, KVConnectorPromMetrics]

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe({k: v for k, v in transfer_stats_data.items() if k in self._prom_metrics}, engine_idx)
