# SPDX-License-Identifier: Apache-2.0
"""vLLM's NixlConnector (pull), extended: it says how each hold ended, and can end a hold on request.

It has vLLM's class name and is loaded through `kv_connector_module_path`. Each rank of an engine runs its own worker
with its own copy of the leases. A rank takes a request out of its tables exactly once: when all readers have read it,
when it is settled, or when its lease ends. Only then does the rank report the request as sent. A notification or a
settle that comes later finds nothing. So ranks may disagree on how a hold ended, but each rank reports the request
once, and vLLM counts nothing else.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from transport.handoff_params import DO_REMOTE_PREFILL, handoff_id_of
from transport.in_engine.nixl import listener as nixl_listener
from transport.in_engine.patches.borrowed import BORROWED
from transport.in_engine.patches.nixl_ports import close_unnamed
from transport.in_engine.patches.ports import listening
from transport.in_engine.protocols import Ended
from transport.upstream.guard import require

require(BORROWED, "transport.in_engine.nixl")


class NixlConnector(NixlPullConnector):
    """The object that vLLM makes in the scheduler and in each worker; it forwards to one of the two classes below."""

    connector_scheduler: NixlScheduler | None
    connector_worker: NixlWorker | None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        # This skips NixlPullConnector's own __init__: it would make vLLM's scheduler or worker class, and with the
        # worker a second NIXL agent.
        super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = NixlScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = NixlWorker(vllm_config, self.engine_id, kv_cache_config)

    def settle(self, req_ids: set[str]) -> None:
        assert self.connector_worker is not None
        self.connector_worker.settle(req_ids)

    def take_ended(self) -> Ended:
        assert self.connector_worker is not None
        return self.connector_worker.take_ended()

    def take_unread(self) -> list[str]:
        assert self.connector_scheduler is not None
        return self.connector_scheduler.take_unread()


class NixlWorker(NixlPullConnectorWorker):
    """One rank's leases.

    Source: vLLM 0.32 `nixl/base_worker.py` and `pull_worker.py`: `_reqs_to_send` maps a held request to the
    `time.perf_counter()` at which its lease ends, `_reqs_to_process` names all that may still be read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        before = listening()
        super().__init__(*args, **kwargs)
        # `close_unnamed` knows how UCX writes addresses. Another NIXL plugin may write them in another way.
        if list(self.nixl_backends) == ["UCX"]:
            close_unnamed(before, self.nixl_wrapper.get_agent_metadata())
        self._ended: Ended = {}
        self._settled: set[str] = set()

    def settle(self, req_ids: set[str]) -> None:
        now = time.perf_counter()
        for req_id in req_ids:
            lease_end = self._reqs_to_send.pop(req_id, None)
            if lease_end is None:
                continue
            self._reqs_to_process.discard(req_id)
            self.consumer_notification_counts_by_req.pop(req_id, None)
            self.expected_consumer_notifications_by_req.pop(req_id, None)
            self._ended[req_id] = ("released", lease_end - now)
            self._settled.add(req_id)

    def take_ended(self) -> Ended:
        ended, self._ended = self._ended, {}
        return ended

    def get_transfer_results(self) -> Any:
        results = super().get_transfer_results()
        results.finished_sending |= self._settled
        self._settled = set()
        return results

    def _get_new_notifs(self) -> set[str]:
        lease_ends = dict(self._reqs_to_send)
        consumed: set[str] = super()._get_new_notifs()
        now = time.perf_counter()
        for req_id in consumed:
            # A reader may be done before this rank has heard of the lease.
            lease_end = lease_ends.get(req_id)
            self._ended[req_id] = ("consumed", None if lease_end is None else lease_end - now)
        return consumed

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        before = set(done_sending)
        super()._reap_expired_send_leases(done_sending)
        for req_id in done_sending - before:
            self._ended[req_id] = ("expired", None)


class NixlScheduler(NixlPullConnectorScheduler):
    """The scheduler side. On a decode engine it reports hand-offs that were not read, instead of telling the producer.

    vLLM would send the prefill engine an empty notification, which looks there like that of a reader. Here the gateway
    settles the hand-off at the prefill engine instead, so that the hand-off counts as released.
    """

    # vLLM runs this function in a thread of its own.
    _nixl_handshake_listener = staticmethod(nixl_listener.listen)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unread: list[str] = []
        self._reading: dict[str, str] = {}

    def take_unread(self) -> list[str]:
        unread, self._unread = self._unread, []
        return unread

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens > 0 and request.request_id in self._reqs_need_recv:
            self._reading[request.request_id] = _id_at_producer(request.kv_transfer_params)

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        for req_id in connector_output.finished_recving or ():
            handoff_id = self._reading.pop(req_id, None)
            # A decode engine whose read failed sends no notification.
            if handoff_id is not None and req_id in connector_output.failed_recving:
                self._unread.append(handoff_id)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params
        if not params or not params.get(DO_REMOTE_PREFILL):
            result: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
            return result
        self._stop_heartbeat(request.request_id)
        params[DO_REMOTE_PREFILL] = False
        self._unread.append(_id_at_producer(params))
        return False, None


def _id_at_producer(params: dict[str, Any]) -> str:
    """The id under which the prefill engine tracks this hand-off."""
    return handoff_id_of(params, params.get("remote_request_id"))
