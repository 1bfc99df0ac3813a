# SPDX-License-Identifier: Apache-2.0
"""What an engine counts, from vLLM's own statistics as they arrive from EngineCore."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.stats import MooncakeKVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
    _ConnectorMetricName,
)
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import KV_FETCH_WAITING_TO_START, IterationStats, PrefixCacheStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from pools.engine.events import EventLog
from pools.engine.vllm_tally import Tally

EVENT = {"kind": "unread", "at": 1.5, "id": "h-1"}


def arrived(children: dict[str, Any], hits: dict[CacheHitSource, int]) -> SchedulerStats:
    """Statistics of one step after the way between the processes."""
    loads = PrefixCacheStats()
    loads.record(1000, sum(hits.values()), preempted=False, hits_by_source=hits)
    stats = SchedulerStats(
        num_running_reqs=2,
        num_waiting_reqs=1,
        num_skipped_waiting_reqs=4,
        kv_cache_usage=0.5,
        num_kv_fetch_reqs_by_stage={KV_FETCH_WAITING_TO_START: 7, "in_progress": 1},
        connector_prefix_cache_stats=loads,
        kv_connector_stats=children,
    )
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert received is not None
    return received


async def test_counts_and_events() -> None:
    """Each figure lands in its counter, adds up over steps, and events keep their order."""
    log = EventLog()
    tally = Tally(log)
    nixl = NixlKVConnectorStats()
    nixl.data["bytes_transferred"] += [100, 50]
    nixl.record_failed_transfer()
    nixl.record_failed_handshake()
    nixl.record_failed_notification()
    nixl.record_kv_expired_req()
    nixl.record_notification_after_expiry()
    mooncake = MooncakeKVConnectorStats()
    mooncake.record_transfer(0.1, 1000, 4)
    mooncake.record_transfer(0.1, 24, 1)
    mooncake.record_failed_transfer()
    mooncake.record_failed_recv()
    mooncake.record_failed_recv()
    mooncake.record_kv_expired_req()
    offload = OffloadingConnectorStats()
    offload.increase_counter(_ConnectorMetricName.ALLOCATION_FAILURE)
    offload.increase_counter(_ConnectorMetricName.ALLOCATION_FAILURE)
    offload.increase_counter("vllm:kv_offload_load_bytes", 300)
    offload.increase_counter("vllm:kv_offload_store_bytes", 7)
    children = {
        "NixlConnector": nixl.to_dict(),
        "MooncakeConnector": mooncake.to_dict(),
        "OffloadingConnector": offload.to_dict(),
        "Handoffs": {"events": [EVENT, EVENT | {"id": "h-2"}]},
    }
    hits = {CacheHitSource.P2P: 10, CacheHitSource.HOST: 20, CacheHitSource.DISK: 30}
    iteration = IterationStats()
    iteration.prompt_token_stats.total = 40
    iteration.prompt_token_stats.computed = 5
    iteration.num_generation_tokens = 6
    iteration.num_preempted_reqs = 1
    tally.record(arrived(children, hits), iteration)
    tally.record(arrived({}, {CacheHitSource.EXTERNAL_UNSPECIFIED: 9, CacheHitSource.P2P: 1}), None)
    tally.record(None, iteration)
    assert tally.snapshot(num_handoffs_admitted=3).as_dict() == {
        "num_requests_running": 2,
        "num_requests_waiting": 5,
        "kv_cache_usage": 0.5,
        "prompt_tokens_total": 80,
        "prompt_tokens_computed_total": 10,
        "generation_tokens_total": 12,
        "nixl_bytes_transferred_total": 150,
        "nixl_num_failed_transfers_total": 2,
        "num_kv_expired_reqs_total": 2,
        "num_handoffs_admitted_total": 3,
        "num_preemptions_total": 2,
        "prompt_tokens_p2p_total": 11,
        "prompt_tokens_host_total": 20,
        "prompt_tokens_disk_total": 30,
        "prompt_tokens_external_total": 9,
        "nixl_num_failed_notifications_total": 1,
        "num_notifications_after_expiry_total": 1,
        "kv_offload_load_bytes_total": 300,
        "kv_offload_store_bytes_total": 7,
        "kv_offload_allocation_failures_total": 2,
        "mooncake_bytes_transferred_total": 1024,
        "mooncake_num_failed_transfers_total": 3,
        "num_requests_kv_fetch_waiting_to_start": 7,
        "num_steps_total": 2,
    }
    assert (await log.read(0, 0)).events == [EVENT, EVENT | {"id": "h-2"}]
