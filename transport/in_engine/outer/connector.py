# SPDX-License-Identifier: Apache-2.0
"""vLLM's MultiConnector with a ledger: which hand-offs an engine holds KV for, how each hold ended, what was loaded.

vLLM loads the class through `kv_connector_module_path`. The class has vLLM's name, so that vLLM's special cases for
this name still apply. The first child moves KV between the pools; the other children are tiers. The rules of the
scheduler side are in `holds`; this file connects them to vLLM's hooks.

This code is the same for any number of ranks. The scheduler side sends settled ids to every rank with the metadata of
a step. Each rank ends its own hold exactly once: read, settled or expired. vLLM's KVOutputAggregator reports a request
as sent only when all ranks have reported it. Until then `merge_ended` merges the outcomes of single ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector as VllmMultiConnector
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorStats

from transport.digests import chunk_digests
from transport.handoff_params import SETTLE, STORE, handoff_id_of
from transport.in_engine.block_bytes import block_bytes
from transport.in_engine.outer.holds import Holds
from transport.in_engine.outer.metadata import HandoffMetadata, HandoffWorkerMetadata
from transport.in_engine.outer.stats import STATS_KEY, HandoffStats, MultiPromMetrics
from transport.in_engine.outer.tier_loads import TierLoads, new_block_ids
from transport.in_engine.patches.borrowed import BORROWED
from transport.in_engine.patches.gloo_listeners import close_group_ports
from transport.in_engine.protocols import (
    Chunked,
    EarlySettler,
    Event,
    Sink,
    Skippable,
    TransferScheduler,
    TransferWorker,
)
from transport.upstream.guard import require

require(BORROWED, "transport.in_engine.outer")

_BLOCKS_OF_STEP = "_current_batch_allocated_block_ids"
_SOURCES = {"OffloadingConnector": "offload", "LMCacheMPConnector": "lmcache"}


class MultiConnector(VllmMultiConnector):
    """Outer connector of every engine, on both of vLLM's sides."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._transfer, *tiers = self._connectors
        self._transfer_worker = self._transfer if isinstance(self._transfer, TransferWorker) else None
        self._transfer_scheduler = self._transfer if isinstance(self._transfer, TransferScheduler) else None
        self._sink = next((tier for tier in tiers if isinstance(tier, Sink)), None)
        self._holds = Holds()
        self._events: list[Event] = []
        self._hidden: set[str] = set()
        self._local_tokens: dict[str, int] = {}
        self._loads = TierLoads()
        self._blocks_of_step = _blocks_of_step(tiers, role)
        self._block_bytes = block_bytes(kv_cache_config) * vllm_config.parallel_config.world_size
        if role == KVConnectorRole.WORKER:
            # The worker has made all its process groups by now, and their members are connected.
            close_group_ports()

    # Scheduler side: a request's way in.

    def on_new_request(self, request: Any) -> None:
        if _settle_ids(request) is None:
            super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens from the transfer child, else from the tier with the most. vLLM itself takes the first child with any.

        While a child is still looking up, the answer is None and vLLM postpones the request. All tiers are asked before
        one of them can postpone it, so that their look-ups run side by side.
        """
        req_id = request.request_id
        tokens, load_async = self._transfer.get_num_new_matched_tokens(request, num_computed_tokens)
        tiers = self._connectors[1:]
        if tokens is None:
            return None, False
        if tokens:
            self._requests_to_connector[req_id] = 0
            for tier in tiers:
                if isinstance(tier, Skippable):
                    tier.skip(request)
            return tokens, load_async
        # A child may have been chosen before a preemption or a failed load. That choice is void.
        self._requests_to_connector.pop(req_id, None)
        found = [tier.get_num_new_matched_tokens(request, num_computed_tokens) for tier in tiers]
        if any(count is None for count, _ in found):
            return None, False
        best, load_async = 0, False
        for index, (count, tier_loads_async) in enumerate(found, 1):
            if count > best:
                best, load_async = count, tier_loads_async
                self._requests_to_connector[req_id] = index
                self._local_tokens[req_id] = num_computed_tokens
        return best, load_async

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        local_tokens = self._local_tokens.pop(request.request_id, 0)
        if not num_external_tokens:
            return
        index = self._requests_to_connector.get(request.request_id, 0)
        loader = self._connectors[index]
        loaded_into = new_block_ids(blocks)
        if self._blocks_of_step is not None and _source(loader) != "offload":
            self._blocks_of_step().update(loaded_into)
        if index:
            # Every tier here loads between steps, so its workers report the end of each load.
            event = self._loaded(loader, request, local_tokens, num_external_tokens)
            self._loads.started(request.request_id, event, loaded_into)

    @staticmethod
    def _loaded(tier: Any, request: Any, local_tokens: int, num_external_tokens: int) -> Event:
        event: Event = {"kind": "loaded", "source": _source(tier), "tokens": num_external_tokens}
        if isinstance(tier, Chunked):
            token_ids = tier.token_ids(request)
            loaded = token_ids[: local_tokens + num_external_tokens]
            # Even when the whole prompt is cached, vLLM computes its last token and does not ask a tier for that token.
            if len(loaded) + 1 == len(token_ids):
                loaded = token_ids
            digests = chunk_digests(loaded, tier.chunk_tokens, request.cache_salt)
            event["chunks"] = digests[local_tokens // tier.chunk_tokens :]
        return event

    def build_connector_meta(self, scheduler_output: Any) -> HandoffMetadata:
        # vLLM never scheduled the settle requests, but lists their ids as finished. The children of both sides must not
        # see these ids: LMCache's worker would report each as sent, and vLLM's scheduler does not survive that report.
        scheduler_output.finished_req_ids.difference_update(self._hidden)
        self._hidden.clear()
        meta = super().build_connector_meta(scheduler_output)
        return HandoffMetadata(
            metadata=meta.metadata,
            extra_async_saves=meta.extra_async_saves,
            settled=self._holds.take_to_settle(),
        )

    # Scheduler side: a request's way out.

    def request_finished(self, request: Any, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._take_settle(request):
            return False, None
        num_blocks = sum(block != 0 for block in blocks)
        return self._finish(request, num_blocks, lambda child: child.request_finished(request, blocks))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._take_settle(request):
            return False, None
        if not self._all_support_hma:
            assert len(block_ids) == 1, "several KV cache groups need children that support HMA"
            return self.request_finished(request, block_ids[0])
        num_blocks = sum(block != 0 for group in block_ids for block in group)
        return self._finish(request, num_blocks, lambda child: child.request_finished_all_groups(request, block_ids))

    def _take_settle(self, request: Any) -> bool:
        handoff_ids = _settle_ids(request)
        if handoff_ids is None:
            return False
        unheld = self._holds.settle(handoff_ids)
        if unheld and isinstance(self._transfer, EarlySettler):
            self._transfer.settle_handoffs(unheld)
        self._hidden.add(request.request_id)
        return True

    def _finish(
        self, request: Any, num_blocks: int, finish_child: Callable[[Any], tuple[bool, dict[str, Any] | None]]
    ) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params or {}
        handoff_id = handoff_id_of(params, request.request_id)
        held = False

        def finish(child: Any) -> tuple[bool, dict[str, Any] | None]:
            nonlocal held
            if held and self._sink is not None and child is self._sink:
                self._sink.hold(request, handoff_id, params.get(STORE))
            delayed, answer = finish_child(child)
            if child is self._transfer:
                held = delayed
            return delayed, answer

        self._local_tokens.pop(request.request_id, None)
        self._loads.forget(request.request_id)
        result: tuple[bool, dict[str, Any] | None] = self._aggregate_request_finished(request, finish)
        if held:
            self._holds.produced(request.request_id, handoff_id)
            self._emit(
                {
                    "kind": "produced",
                    "id": handoff_id,
                    "tokens": min(request.num_computed_tokens, request.num_prompt_tokens),
                    "bytes": num_blocks * self._block_bytes,
                }
            )
        return result

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if meta is not None:
            self._holds.note(meta.ended)
        super().update_connector_output(connector_output)
        for event in self._loads.ended(
            connector_output.finished_recving or (),
            connector_output.failed_recving or (),
            connector_output.invalid_block_ids or (),
        ):
            self._emit(event)
        # vLLM frees the blocks of these requests right after this call.
        for req_id in connector_output.finished_sending or ():
            hold = self._holds.close(req_id)
            if hold is None:
                continue
            adopted = self._sink is not None and self._sink.decide(req_id, hold.outcome)
            self._emit(
                {
                    "kind": "ended",
                    "id": hold.handoff_id,
                    "outcome": hold.outcome,
                    "lease_left_s": None if hold.lease_left_s is None else round(hold.lease_left_s, 3),
                    "adopted": adopted,
                }
            )

    # Worker side.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        # The children come first: they learn of new leases in this same call.
        settled = self._get_connector_metadata().settled
        if settled and self._transfer_worker is not None:
            self._transfer_worker.settle(settled)

    def build_connector_worker_meta(self) -> HandoffWorkerMetadata | None:
        meta = super().build_connector_worker_meta()
        ended = {} if self._transfer_worker is None else self._transfer_worker.take_ended()
        if meta is None and not ended:
            return None
        children = (None,) * len(self._connectors) if meta is None else meta.metadata
        return HandoffWorkerMetadata(metadata=children, ended=ended)

    # Statistics, which carry the events.

    def _emit(self, event: Event) -> None:
        self._events.append({"at": time.time(), **event})

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        stats = super().get_kv_connector_stats()
        if self.role != KVConnectorRole.SCHEDULER:
            return stats
        if self._transfer_scheduler is not None:
            for handoff_id in self._transfer_scheduler.take_unread():
                self._emit({"kind": "unread", "id": handoff_id})
        if self._sink is not None:
            for event in self._sink.take_events_of_sink():
                self._emit(event)
        if self._events:
            stats = MultiKVConnectorStats() if stats is None else stats
            stats[STATS_KEY] = HandoffStats({"events": self._events})
            self._events = []
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Rebuild the children's statistics from the plain data that came from EngineCore, for vLLM's log lines.

        Events are left out, because their key names no connector. The engine's own logger has them, and vLLM's logger
        would keep them until it writes a line.
        """
        rebuilt: dict[str, KVConnectorStats] = {}
        for name, stats in (data or {}).items():
            if isinstance(stats, KVConnectorStats):
                rebuilt[name] = stats
                continue
            try:
                child = KVConnectorFactory.get_connector_class_by_name(name)
            except ValueError:
                continue
            if (of_child := child.build_kv_connector_stats(data=stats)) is not None:
                rebuilt[name] = of_child
        return MultiKVConnectorStats(data=rebuilt)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> MultiPromMetrics:
        built = super().build_prom_metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        return MultiPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues, built._prom_metrics)


def _settle_ids(request: Any) -> list[str] | None:
    """The hand-offs that a pre-aborted request of `VllmEngine.settle` names, None for any other request."""
    ids = (request.kv_transfer_params or {}).get(SETTLE)
    return None if ids is None else [str(handoff_id) for handoff_id in ids]


def _source(tier: Any) -> str:
    name = type(tier).__name__
    return _SOURCES.get(name, name)


def _blocks_of_step(tiers: Sequence[Any], role: KVConnectorRole) -> Callable[[], set[int]] | None:
    """A function to get the set in which the offload child collects this step's blocks; None without that child.

    Before the loads and the forward pass of a step, the offload child's worker waits for its pending stores of these
    blocks. The child adds the blocks of its own loads and of scheduled requests to the set. It does not learn of the
    blocks that another child loads into: a pending store would then save the next owner's KV as the former owner's.

    Source: vLLM 0.32 `offloading/scheduler.py`: `build_connector_meta`, `worker.py`: `handle_preemptions`.

    Raises:
        RuntimeError: the offload scheduler of this vLLM has no such set.
    """
    offload = next((tier for tier in tiers if _source(tier) == "offload"), None)
    if offload is None or role != KVConnectorRole.SCHEDULER:
        return None
    scheduler = offload.connector_scheduler
    if not isinstance(getattr(scheduler, _BLOCKS_OF_STEP, None), set):
        raise RuntimeError(f"vLLM's {type(scheduler).__name__} has no {_BLOCKS_OF_STEP}: not the vLLM this is made for")
    # vLLM makes a new set for each step.
    return lambda: cast("set[int]", getattr(scheduler, _BLOCKS_OF_STEP))
