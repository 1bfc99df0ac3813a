# SPDX-License-Identifier: Apache-2.0
"""LMCacheMPConnector with a sink: it stores in the shared tier what a prefill engine computed and nobody consumed.

The class has the name of LMCache's class, so that special cases and statistics by name keep working. `disagg.sink` in
the extra config says what is stored:

- `unused`: hand-offs whose hold ends released or expired, and hand-offs that a client asked to store. `sink` decides,
  through `sink_manager`. Nothing is done for other hand-offs.
- `evicted`: what LMCache's own lazy policy chooses. What a client asked to store is stored too, at once.
- `write_through`: every full chunk of every prompt, by `write_through`. A client's wish to store changes nothing.
- `off`, and on every decode engine: nothing. A client's wish to store has no effect against the operator's setting.

A client's wish not to store travels as LMCache's own `lmcache.max_offload_tokens: 0`; with `unused` the sink does not
hold such a hand-off either. A store has full chunks only, and no chunk of which vLLM has taken a block away. LMCache's
lazy offload is on with every sink but `off`. LMCache's workers then report each store by its id, and no request waits
for its stores. Each of our stores has an id of its own, which differs from the request's id. So neither a preemption of
the request nor a later request under the same id can interfere with a store.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmcache.integration.vllm import lmcache_mp_connector as base
from lmcache.integration.vllm.lmcache_mp_metadata import (
    LMCacheMPConnectorMetadata,
    LMCacheMPRequestMetadata,
    LMCacheMPRequestState,
)
from lmcache.v1.multiprocess.group_view import slice_block_ids_per_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.v1.request import RequestStatus

from transport.digests import chunk_digests
from transport.in_engine.block_bytes import block_bytes
from transport.in_engine.lmcache.lookups import AbandonedLookups
from transport.in_engine.lmcache.sink import Rescues, Store, leading_tokens
from transport.in_engine.lmcache.sink_manager import SinkManager
from transport.in_engine.lmcache.worker import Finished, WorkerGuard
from transport.in_engine.lmcache.write_through import WriteThrough
from transport.in_engine.patches.borrowed import BORROWED
from transport.in_engine.protocols import Event, Outcome
from transport.upstream.guard import require

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

require(BORROWED, "transport.in_engine.lmcache")

SINK_KEY = "disagg.sink"
TIMEOUT_KEY = "disagg.operation_timeout"
"""Seconds after which a rank gives an operation up. From then on vLLM may give its blocks to another prompt."""
_DEADLINE_IN_TIMEOUTS = 2
"""A rank gives a store up after one timeout; the scheduler waits for twice that."""
_BLOCKING_IN_HEARTBEATS = 2
"""In so many intervals the heartbeat finds out that a server is gone. No engine need stand still longer for a copy."""


class LMCacheMPConnector(base.LMCacheMPConnector):
    """The shared tier of one engine; `transport.in_engine.protocols.Sink` and `Skippable`."""

    _lazy_offload_manager: Any

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig | None = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = vllm_config.kv_transfer_config
        self._sink: str = config.get_from_extra_config(SINK_KEY, "off")
        if self._sink == "unused":
            # LMCache's normal path stores nothing here. Lazy offload is on only so that workers report each store.
            self._can_store = False
        self._rescues: Rescues | None = None
        self._skipped: set[str] = set()
        self._was_healthy = True
        self._tier_events: list[Event] = []
        self._block_state: Any = None
        timeout_s = float(config.get_from_extra_config(TIMEOUT_KEY, None) or self._mq_timeout_s)
        if role == KVConnectorRole.WORKER:
            adapter = self.worker_adapter
            self._guard = WorkerGuard(
                adapter,
                lazy=bool(self.lazy_offload),
                timeout_s=timeout_s,
                blocking_s=min(adapter._mq_timeout, _BLOCKING_IN_HEARTBEATS * adapter._heartbeat_interval),
            )
        else:
            self._abandoned = AbandonedLookups(self.scheduler_adapter)
            if self.lazy_offload:
                self._make_sink(vllm_config.parallel_config.world_size, _DEADLINE_IN_TIMEOUTS * timeout_s)
        self._block_bytes = block_bytes(kv_cache_config)

    def _make_sink(self, num_ranks: int, deadline_s: float) -> None:
        def is_healthy() -> bool:
            return bool(self.scheduler_adapter.is_healthy)

        through = None
        if self._sink == "write_through":
            through = WriteThrough(
                make_store=self._make_through, is_healthy=is_healthy, num_ranks=num_ranks, deadline_s=deadline_s
            )
        self._rescues = Rescues(
            make_store=self._make_store, is_healthy=is_healthy, num_ranks=num_ranks, deadline_s=deadline_s
        )
        own: Any = self._lazy_offload_manager if self._sink == "evicted" else None
        self._lazy_offload_manager = SinkManager(self._rescues, own, through)

    @property
    def _mq_timeout_s(self) -> float:
        adapter = self.worker_adapter if self.role == KVConnectorRole.WORKER else self.scheduler_adapter
        return float(adapter._mq_timeout)

    # Worker side

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Submit the loads of this step. The engine's first step also starts the heartbeat here."""
        self._guard.start()
        self._guard.retrieve(self._requests("RETRIEVE"))

    def wait_for_save(self) -> None:
        """Submit the stores of this step. vLLM calls it on steps without tokens too, so no rescue waits for tokens."""
        self._guard.store(self._requests("STORE"))

    def get_finished(self, finished_req_ids: set[str]) -> Finished:
        """As LMCache reports. An operation that gets no answer counts as failed."""
        return self._guard.finished(lambda: base.LMCacheMPConnector.get_finished(self, finished_req_ids))

    def _requests(self, direction: str) -> list[LMCacheMPRequestMetadata]:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LMCacheMPConnectorMetadata)
        return [meta for meta in metadata.requests if meta.direction == direction]

    # Scheduler side

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one stored object."""
        return int(self.scheduler_adapter.lmcache_tokens_per_chunk)

    def token_ids(self, request: Request) -> list[int]:
        """The tokens by which LMCache knows a request, with the hashes of its images in place of their placeholders."""
        tracker = self.request_trackers.get(request.request_id)
        return list(request.all_token_ids) if tracker is None else list(tracker.get_token_ids())

    def hold(self, request: Request, handoff_id: str, store: str | None) -> None:
        """See `protocols.Sink`."""
        if self._rescues is None or store == "never" or self._sink == "write_through":
            return
        if self._sink == "evicted" and store != "always":
            return
        tracker = self.request_trackers.get(request.request_id)
        if tracker is not None:
            self._rescues.hold(request.request_id, handoff_id, tracker, always=store == "always")

    def decide(self, req_id: str, outcome: Outcome) -> bool:
        """See `protocols.Sink`."""
        return self._rescues is not None and self._rescues.decide(req_id, outcome)

    def skip(self, request: Request) -> None:
        """See `protocols.Skippable`. It makes the tracker that LMCache's later calls need, without a look-up."""
        self._get_or_create_request_tracker(request)
        self._skipped.add(request.request_id)

    def take_events_of_sink(self) -> list[Event]:
        """Events since the last call.

        These are `rescued`, `rescue_failed`, and once an outage `tier_degraded` and `tier_recovered`.
        """
        events, self._tier_events = self._tier_events, []
        return events + (self._rescues.take_events() if self._rescues is not None else [])

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As LMCache says, but for two kinds of requests.

        A prompt shorter than a chunk, such as a health probe, is not looked up: the tier cannot have any of it. When
        another connector's load failed, the request is looked up as a new one. Its tracker has left the state from
        which a load starts, so vLLM would wait for a hit that LMCache never loads. A preempted request is left alone:
        LMCache itself begins it anew.
        """
        self._abandoned.forget(request.request_id)
        if request.num_tokens < self.chunk_tokens:
            self.skip(request)
            return 0, False
        self._skipped.discard(request.request_id)
        tracker = self.request_trackers.get(request.request_id)
        if (
            tracker is not None
            and tracker.state == LMCacheMPRequestState.READY
            and tracker.num_lmcache_hit_tokens == 0
            and request.num_computed_tokens == 0
            and request.status != RequestStatus.PREEMPTED
        ):
            self.scheduler_adapter.cleanup_lookup_result(request.request_id)
            del self.request_trackers[request.request_id]
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return matched

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """As LMCache's, with the stores of the sink; notices that the server went or came back."""
        self.scheduler_adapter._ensure_heartbeat_started()
        self._abandoned.step()
        self._block_state = scheduler_output.kv_connector_block_state
        healthy = bool(self.scheduler_adapter.is_healthy)
        if healthy != self._was_healthy:
            self._was_healthy = healthy
            kind = "tier_recovered" if healthy else "tier_degraded"
            self._tier_events.append({"kind": kind, "at": time.time(), "tier": "lmcache"})
        return super().build_connector_meta(scheduler_output)

    def has_pending_push_work(self) -> bool:
        """Whether the engine must keep stepping: as LMCache's, and while an abandoned look-up is open."""
        return bool(super().has_pending_push_work()) or (
            self.role == KVConnectorRole.SCHEDULER and self._abandoned.has_work()
        )

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As LMCache's; one KV cache group."""
        self._keep_blocks(request, (block_ids,))
        return self._finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As LMCache's; any number of KV cache groups."""
        self._keep_blocks(request, block_ids)
        return self._finished(request, block_ids[0] if block_ids else [])

    def _finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        req_id = request.request_id
        skipped = req_id in self._skipped
        self._skipped.discard(req_id)
        if skipped and self._sink != "evicted":
            # A request that was never looked up has no session on the server. The server logs each unknown session that
            # it is told to end.
            self._cleanup_request_tracker(req_id)
            return False, None
        tracker = self.request_trackers.get(req_id)
        if tracker is not None and tracker.state == LMCacheMPRequestState.PREFETCHING and self._abandoned.add(tracker):
            self._cleanup_request_tracker(req_id)
            if self.lazy_offload:
                # `AbandonedLookups` ends the session after the look-up, so what the manager returns is not used.
                self._lazy_offload_manager.on_request_finished(req_id)
            return False, None
        _, params = super().request_finished(request, block_ids)
        # Without lazy offload this engine stores nothing, so vLLM need not wait for a store before it frees the blocks.
        return False, params

    def _keep_blocks(self, request: Request, block_ids: Sequence[Sequence[int]]) -> None:
        tracker = self._rescues.kept(request.request_id) if self._rescues is not None else None
        if tracker is not None:
            # The tracker only adds blocks. vLLM has taken away the blocks that fell out of a sliding window.
            tracker.allocated_block_ids = {group: list(ids) for group, ids in enumerate(block_ids)}
            # The tracker counts tokens that were computed here or came from LMCache, but not those from host memory.
            tracker.num_scheduled_tokens = request.num_computed_tokens

    def _make_store(self, store_id: str, tracker: Any) -> Store | None:
        # With lazy offload the tracker counts tokens as stored that LMCache's policy has merely noted.
        tracker.num_stored_tokens = tracker.num_lmcache_hit_tokens
        metadata = LMCacheMPRequestMetadata.GetStoreMetadata(
            tracker, self.chunk_tokens, self._group_tokens_per_block, save_decode_cache=self._save_decode_cache
        )
        if metadata is None:
            return None
        metadata = self._trimmed(metadata)
        if metadata is None:
            return None
        start, end = metadata.op.start, metadata.op.end
        digests = chunk_digests(metadata.op.token_ids[:end], self.chunk_tokens, tracker.cache_salt)
        block_ids = tuple(metadata.op.flat_block_ids)
        return Store(
            metadata=dataclasses.replace(metadata, request_id=store_id),
            block_ids=block_ids,
            tokens=end - start,
            # Ranks that hold copies of one shard (MLA) store it once; `world_size` is the number of shards.
            bytes=len(block_ids) * self._block_bytes * int(self.scheduler_adapter.world_size),
            chunks=tuple(digests[start // self.chunk_tokens :]),
        )

    def _make_through(self, store_id: str, metadata: Any) -> tuple[Any, tuple[int, ...]] | None:
        # The tracker only adds blocks, so its older blocks may belong to another request by now.
        blocks = self._block_state.get_block_ids(metadata.request_id)
        if blocks is None:
            return None
        op = metadata.op
        ids = slice_block_ids_per_group(dict(enumerate(blocks)), self._group_tokens_per_block, op.start, op.end)
        metadata = self._trimmed(dataclasses.replace(metadata, op=dataclasses.replace(op, block_ids=ids)))
        if metadata is None:
            return None
        return dataclasses.replace(metadata, request_id=store_id), tuple(metadata.op.flat_block_ids)

    def _trimmed(self, metadata: Any) -> Any | None:
        """The same store with only the chunks before the first that lacks a block; None when no chunk is left."""
        op = metadata.op
        end = leading_tokens(op.block_ids, self._group_tokens_per_block, op.start, op.end, self.chunk_tokens)
        if end == op.start:
            return None
        if end == op.end:
            return metadata
        ids = [
            blocks[: (end - op.start) // tokens] if tokens else []
            for blocks, tokens in zip(op.block_ids, self._group_tokens_per_block, strict=True)
        ]
        return dataclasses.replace(metadata, op=dataclasses.replace(op, end=end, block_ids=ids))
