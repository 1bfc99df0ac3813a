# SPDX-License-Identifier: Apache-2.0
"""Our LMCacheMPConnector on the scheduler's side, over LMCache's own trackers: no engine and no server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lmcache.integration.vllm import lmcache_mp_connector as base
from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestMetadata, LMCacheMPRequestState
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.sched.output import KVConnectorBlockState
from vllm.v1.request import RequestStatus

from tests.support.block_pool import Pool
from transport.handoff_params import NOT_STORED
from transport.in_engine.lmcache.connector import LMCacheMPConnector
from transport.in_engine.lmcache.lookups import AbandonedLookups

CHUNK = 4
BLOCK = 2


class Adapter:
    """LMCache's scheduler adapter with a server that finds `hit` tokens of every prompt."""

    is_healthy = True
    lmcache_tokens_per_chunk = CHUNK
    world_size = 1
    _mq_timeout = 5.0

    def __init__(self) -> None:
        self._pending_lookups: set[str] = set()
        self.hit: int | None = 0
        self.freed: list[tuple[str, int, int]] = []
        self.ended: list[str] = []

    def maybe_submit_lookup_request(self, request_id: str, **_: Any) -> None:
        self._pending_lookups.add(request_id)

    def check_lookup_result(self, request_id: str) -> int | None:
        return self.hit

    def cleanup_lookup_result(self, request_id: str) -> None:
        self._pending_lookups.discard(request_id)

    def free_lookup_locks(self, *, request_id: str, start: int, end: int, **_: Any) -> None:
        self.freed.append((request_id, start, end))

    def end_session(self, request_id: str) -> None:
        self.ended.append(request_id)

    def report_block_allocations(self, records: Any) -> None:
        pass

    def _ensure_heartbeat_started(self) -> None:
        pass


class Own:
    """LMCache's own manager, which notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            return SimpleNamespace(stores_to_submit=[], sessions_to_end=[])

        return call


def connector(sink: str) -> Any:
    """What `__init__` makes, without a server to talk to."""
    made: Any = LMCacheMPConnector.__new__(LMCacheMPConnector)
    made._role = KVConnectorRole.SCHEDULER
    made._sink, made._skipped, made._was_healthy, made._tier_events = sink, set(), True, []
    made._can_store, made._save_decode_cache, made.lazy_offload = sink != "unused", False, True
    made._eager_prefetch = made._reserve_last_token_for_lookup = False
    made._group_tokens_per_block, made._hit_alignment_tokens, made._block_bytes = [BLOCK], BLOCK, 10
    made._connector_stats = base.LMCacheMPConnectorStats()
    made.scheduler_adapter = Adapter()
    made.request_trackers = {}
    made._lazy_offload_manager = Own()
    made._abandoned = AbandonedLookups(made.scheduler_adapter)
    made._make_sink(num_ranks=1, deadline_s=30.0)
    made._lazy_offload_manager.bind_block_pool(Pool(50))
    return made


def request(req_id: str, tokens: int = 12, **params: Any) -> Any:
    return SimpleNamespace(
        request_id=req_id,
        kv_transfer_params=params or None,
        sampling_params=SimpleNamespace(extra_args={"kv_transfer_params": params}),
        all_token_ids=list(range(tokens)),
        prompt_token_ids=list(range(tokens)),
        num_tokens=tokens,
        num_computed_tokens=0,
        num_prompt_tokens=tokens,
        cache_salt=None,
        status=RequestStatus.WAITING,
        mm_features=[],
    )


def allocated(*block_ids: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(block_ids),))


def step(scheduled: dict[str, int] | None = None, blocks: dict[str, list[int]] | None = None) -> Any:
    """A scheduler step with new requests only: tokens of each, and the blocks that vLLM says they have."""
    scheduled, tables = scheduled or {}, blocks or {}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=i, block_ids=([],)) for i in scheduled],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[]),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        preempted_req_ids=None,
        finished_req_ids=set(),
        kv_connector_block_state=KVConnectorBlockState(
            req_ids=set(scheduled), resolve_block_ids=lambda i: (tables[i],), boundary_state_offloads={}
        ),
    )


def admit(made: Any, one: Any, *block_ids: int) -> None:
    made.get_num_new_matched_tokens(one, 0)
    made.update_state_after_alloc(one, allocated(*block_ids), 0)


def test_write_through_stores_in_the_step_that_computes() -> None:
    """Under an id of its own, of blocks that are pinned by then; the request itself is not waited for."""
    made = connector("write_through")
    admit(made, request("r"), 1, 2, 3, 4, 5, 6)
    (store,) = made.build_connector_meta(step({"r": 12}, {"r": [1, 2, 3, 4, 5, 6]})).requests
    assert (store.direction, store.op.start, store.op.end) == ("STORE", 0, 12)
    assert store.request_id != "r" and store.op.block_ids == [[1, 2, 3, 4, 5, 6]]
    pool = made._lazy_offload_manager._through._pins._pool
    assert pool.pinned() == [1, 2, 3, 4, 5, 6] and made.has_pending_push_work()
    assert made.request_finished(request("r"), [1, 2, 3, 4, 5, 6]) == (False, None)
    assert made.scheduler_adapter.ended == ["r"] and made.has_pending_push_work()
    meta = base.LMCacheMPWorkerMetadata(completed_store_requests={store.request_id: 1})
    made.update_connector_output(SimpleNamespace(kv_cache_events=None, kv_connector_worker_meta=meta))
    assert pool.pinned() == [] and not made.has_pending_push_work()
    assert made.scheduler_adapter.ended == ["r", store.request_id]


def test_write_through_stores_what_vllm_says_the_request_has() -> None:
    """The tracker still names blocks that fell out of a sliding window and may be another prompt's."""
    made = connector("write_through")
    admit(made, request("r"), 1, 2, 3, 4, 5, 6)
    (store,) = made.build_connector_meta(step({"r": 12}, {"r": [1, 2, 3, 4, 0, 6]})).requests
    assert (store.op.end, store.op.block_ids) == (8, [[1, 2, 3, 4]])
    admit(made, request("s"), 1, 2, 3, 4, 5, 6)
    assert made.build_connector_meta(step({"s": 12}, {"s": [0, 2, 3, 4, 5, 6]})).requests == []


def test_write_through_keeps_to_the_clients_wish() -> None:
    """`never` is LMCache's own limit; `always` adds nothing, for nothing is left to rescue."""
    made = connector("write_through")
    admit(made, request("r", **NOT_STORED), 1, 2, 3, 4, 5, 6)
    assert made.build_connector_meta(step({"r": 12}, {"r": [1, 2, 3, 4, 5, 6]})).requests == []
    made.hold(request("r"), "h", "always")
    assert not made.decide("r", "released")


@pytest.mark.parametrize("sink", ["unused", "evicted", "write_through"])
@pytest.mark.parametrize("looked_up", [True, False])
def test_no_request_is_waited_for(sink: str, looked_up: bool) -> None:
    """vLLM frees the blocks of an aborted load as soon as any connector says it was sent."""
    made = connector(sink)
    one = request("r") if looked_up else request("r", tokens=CHUNK - 1)
    admit(made, one, 1, 2, 3, 4, 5, 6)
    assert made.request_finished_all_groups(one, ([1, 2],))[0] is False


@pytest.mark.parametrize(
    ("blocks", "tokens"),
    [([1, 2, 3, 4, 5, 6], 12), ([1, 2, 3, 4, 0, 6], 8), ([0, 2, 3, 4, 5, 6], 0)],
)
def test_a_rescue_never_stores_the_null_block(blocks: list[int], tokens: int) -> None:
    """Of a prompt whose blocks vLLM has taken away in part, only the chunks before them."""
    made = connector("unused")
    one = request("r")
    admit(made, one, 1, 2, 3, 4, 5, 6)
    made.hold(one, "h", None)
    one.num_computed_tokens = 12
    made.request_finished(one, blocks)
    assert made.decide("r", "released") is bool(tokens)
    stores = made.build_connector_meta(step()).requests
    assert [(s.op.end, s.op.block_ids) for s in stores] == ([(tokens, [blocks[: tokens // BLOCK]])] if tokens else [])
    if stores:
        meta = base.LMCacheMPWorkerMetadata(completed_store_requests={stores[0].request_id: 1})
        made.update_connector_output(SimpleNamespace(kv_cache_events=None, kv_connector_worker_meta=meta))
        (event,) = made.take_events_of_sink()
        assert (event["tokens"], event["bytes"], len(event["chunks"])) == (
            tokens,
            tokens // BLOCK * 10,
            tokens // CHUNK,
        )


def test_a_preempted_request_is_lmcaches_to_reset() -> None:
    """With `evicted` its manager still has what the request had before; it must hear that this is void."""
    made = connector("evicted")
    own = made._lazy_offload_manager._own
    one = request("r")
    admit(made, one, 1, 2, 3, 4, 5, 6)
    one.status = RequestStatus.PREEMPTED
    own.calls.clear()
    made.get_num_new_matched_tokens(one, 0)
    assert own.calls == ["on_request_reset", "on_request_arrived"]
    assert made.request_trackers["r"].state == LMCacheMPRequestState.PREFETCHING


def test_another_connectors_failed_load_starts_anew() -> None:
    """Its tracker has left the state from which a load starts."""
    made = connector("evicted")
    one = request("r")
    admit(made, one, 1, 2, 3, 4, 5, 6)
    made.scheduler_adapter.hit = 8
    assert made.get_num_new_matched_tokens(one, 0) == (8, True)
    assert made.request_trackers["r"].state == LMCacheMPRequestState.PREFETCHING


def test_an_abort_between_look_up_and_allocation_leaves_no_locks() -> None:
    """Whether the answer was there already or comes later; the engine steps until then."""
    made = connector("unused")
    adapter = made.scheduler_adapter
    for name, hit in (("known", 8), ("open", None)):
        adapter.hit = hit
        made.get_num_new_matched_tokens(request(name), 0)
        assert made.request_finished(request(name), []) == (False, None)
        made.build_connector_meta(step())
        if hit is None:
            assert made.has_pending_push_work() and "open" in adapter._pending_lookups
            adapter.hit = 4
            made.build_connector_meta(step())
        made.build_connector_meta(step())
        assert not made.has_pending_push_work() and not adapter._pending_lookups
    assert adapter.freed == [("known", 0, 8), ("open", 0, 4)]
    assert adapter.ended == ["known", "open"] and not made.request_trackers


def test_chunks_are_named_by_lmcaches_tokens() -> None:
    """With images these are not the prompt's own; a request without a tracker has none to offer."""
    made = connector("unused")
    admit(made, request("r"), 1)
    made.request_trackers["r"].mm_adjusted_prompt_ids = [100 + i for i in range(12)]
    assert made.token_ids(request("r")) == [100 + i for i in range(12)]
    assert made.token_ids(request("s")) == list(range(12))


def test_lmcache_still_offers_what_is_relied_on() -> None:
    """A store candidate names its blocks for each group, and its tokens as the tracker does."""
    made = connector("unused")
    admit(made, request("r"), 1, 2, 3, 4, 5, 6)
    tracker = made.request_trackers["r"]
    tracker.num_scheduled_tokens = 12
    metadata = LMCacheMPRequestMetadata.GetStoreMetadata(tracker, CHUNK, [BLOCK])
    assert metadata is not None and metadata.op.block_ids == [[1, 2, 3, 4, 5, 6]]
    assert metadata.op.token_ids == tracker.get_token_ids()
