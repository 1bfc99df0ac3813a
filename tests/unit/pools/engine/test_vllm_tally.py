# SPDX-License-Identifier: Apache-2.0
"""The tally of a vLLM engine; with vLLM's own statistics it is tested in tests/component."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from disagg.observability.engine_metrics import ENGINE_METRICS
from pools.engine.events import EventLog
from pools.engine.vllm_tally import Tally


def step(children: dict[str, Any] | None) -> Any:
    return SimpleNamespace(
        num_running_reqs=1,
        num_waiting_reqs=2,
        num_skipped_waiting_reqs=3,
        num_kv_fetch_reqs_by_stage={},
        kv_cache_usage=0.25,
        connector_prefix_cache_stats=None,
        kv_connector_stats=children,
    )


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"Odd": {"bytes_transferred": [1]}, "OffloadingConnector": None, "NixlConnector": {}}, {}),
        (
            {"NixlConnector": {"bytes_transferred": [1, 2], "num_kv_expired_reqs": [1]}},
            {"nixl_bytes_transferred_total": 3, "num_kv_expired_reqs_total": 1},
        ),
        (
            {"MooncakeConnector": {"bytes_transferred": [4], "num_failed_recvs": [1, 1], "num_kv_expired_reqs": [1]}},
            {
                "mooncake_bytes_transferred_total": 4,
                "mooncake_num_failed_transfers_total": 2,
                "num_kv_expired_reqs_total": 1,
            },
        ),
    ],
)
def test_connectors(children: dict[str, Any] | None, expected: dict[str, int]) -> None:
    """Each transport has its own counters; what is unknown or missing counts nothing."""
    tally = Tally(EventLog())
    tally.record(step(children), None)
    stats = tally.snapshot(num_handoffs_admitted=0).as_dict()
    counted = {name: count for name, count in stats.items() if name.endswith("_total") and count}
    assert counted == {**expected, "num_steps_total": 1}
    assert (stats["num_requests_running"], stats["num_requests_waiting"], stats["kv_cache_usage"]) == (1, 5, 0.25)


def test_metrics_name_what_engines_tell() -> None:
    """Every engine metric of the gateway is a statistic of an engine."""
    stats = Tally(EventLog()).snapshot(num_handoffs_admitted=0).as_dict()
    assert {metric.key for metric in ENGINE_METRICS} <= stats.keys()
