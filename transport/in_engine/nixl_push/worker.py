# SPDX-License-Identifier: Apache-2.0
"""NixlPushConnector on one rank: what a prefill engine holds and writes, and what a decode engine's rank gives up.

vLLM's worker writes from a thread of its own, the writer; everything else here runs in the main thread. A hold ends
once: written, settled, failed or out of lease. While it is being written it ends in no other way, because NIXL reads
its blocks until the write is done. vLLM 0.32 frees the blocks at the end of the lease all the same, and the decode
engine then gets the KV of their next owner.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
from cachetools import FIFOCache
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import PUSH_REG_NOTIF_PREFIX
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_worker import NixlPushConnectorWorker

from transport.in_engine.nixl_push.waits import WRITABLE_LEASES
from transport.in_engine.patches.nixl_ports import close_unnamed
from transport.in_engine.patches.ports import listening
from transport.in_engine.protocols import Ended

logger = logging.getLogger(__name__)

_MAX_REGISTRATIONS = 16_384
"""Registrations that wait for prompts of this engine. Beyond it the oldest is dropped and its KV never written."""
_MAX_WITHDRAWN = 16_384
"""How many requests are remembered as not to be written; far more than the writer can have in its queues."""


class PushWorker(NixlPushConnectorWorker):
    """One rank's holds and receipts.

    Source: vLLM 0.32 `nixl/base_worker.py` and `push_worker.py`: `_reqs_to_send` maps a held request to the
    `time.perf_counter()` at which its lease ends, `_push_finished_blocks` holds what no decode engine has asked for.
    """

    nixl_wrapper: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        before = listening()
        super().__init__(*args, **kwargs)
        # `close_unnamed` knows how UCX writes addresses. Another NIXL plugin may write them in another way.
        if list(self.nixl_backends) == ["UCX"]:
            close_unnamed(before, self.nixl_wrapper.get_agent_metadata())
        self.nixl_wrapper = OneAtATime(self.nixl_wrapper)
        lease_s = self.kv_transfer_config.get_from_extra_config("kv_lease_duration", 30)
        self._registration_ttl_s = WRITABLE_LEASES * lease_s
        self._handoff_ids: dict[str, str] = {}
        self._req_ids: dict[str, str] = {}
        self._ended: Ended = {}
        self._settled: set[str] = set()
        # The writer thread alone uses these two.
        self._registrations: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._num_submitted = 0
        # Both threads use these.
        self._state_lock = threading.Lock()
        self._writing: set[str] = set()
        self._withdrawn: FIFOCache[str, None] = FIFOCache(_MAX_WITHDRAWN)
        self._failed_sends: queue.SimpleQueue[str] = queue.SimpleQueue()

    # Main thread

    def start_load_kv(self, metadata: Any) -> None:
        for req_id, handoff_id in metadata.handoff_ids.items():
            self._handoff_ids[req_id] = handoff_id
            self._req_ids[handoff_id] = req_id
        super().start_load_kv(metadata)
        for req_id in metadata.lost:
            self._failed_recv_reqs.put(req_id)

    def settle(self, req_ids: set[str]) -> None:
        now = time.perf_counter()
        for req_id in req_ids:
            if req_id in self._reqs_to_send and self._withdraw(req_id):
                self._ended[req_id] = ("released", self._stop_holding(req_id) - now)
                self._settled.add(req_id)

    def take_ended(self) -> Ended:
        ended, self._ended = self._ended, {}
        return ended

    def get_transfer_results(self) -> Any:
        lease_ends = dict(self._reqs_to_send)
        results = super().get_transfer_results()
        now = time.perf_counter()
        for req_id in results.finished_sending - self._ended.keys():
            lease_end = lease_ends.get(req_id)
            self._ended[req_id] = ("consumed", None if lease_end is None else lease_end - now)
        results.finished_sending |= self._failed(now) | self._settled
        self._settled = set()
        for req_id in results.finished_sending:
            self._forget(req_id)
        return results

    def _failed(self, now: float) -> set[str]:
        """End the holds that could not be written. A decode engine that waits will hear that they are gone."""
        failed: set[str] = set()
        while not self._failed_sends.empty():
            req_id = self._failed_sends.get_nowait()
            with self._state_lock:
                self._writing.discard(req_id)
            if req_id in self._reqs_to_send:
                self._withdraw(req_id)
                self._ended[req_id] = ("released", self._stop_holding(req_id) - now)
                failed.add(req_id)
        return failed

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        now = time.perf_counter()
        for req_id, lease_end in list(self._reqs_to_send.items()):
            if now >= lease_end and not self._withdraw(req_id):
                self._reqs_to_send[req_id] = now + self._lease_extension
        before = set(done_sending)
        super()._reap_expired_send_leases(done_sending)
        for req_id in done_sending - before:
            self._ended[req_id] = ("expired", None)

    def _handle_heartbeat(self, payload: str) -> None:
        """Heartbeats of decode engines name hand-offs. vLLM looks for its own request ids, and would renew no lease."""
        super()._handle_heartbeat(",".join(self._req_ids.get(name, name) for name in payload.split(",")))

    def _pop_done_transfers(self, transfers: Any) -> tuple[set[str], set[str]]:
        done, failed = super()._pop_done_transfers(transfers)
        if transfers is self._sending_transfers:
            for req_id in done & (failed | self._send_failures):
                self._failed_sends.put(req_id)
        return done, failed

    def _withdraw(self, req_id: str) -> bool:
        """Keep the writer from writing this request; False when the writer is writing it already."""
        with self._state_lock:
            if req_id in self._writing:
                return False
            self._withdrawn[req_id] = None
            return True

    def _stop_holding(self, req_id: str) -> float:
        """Take the request out of vLLM's tables. Returns the time at which its lease would have ended."""
        self._reqs_to_process.discard(req_id)
        self.consumer_notification_counts_by_req.pop(req_id, None)
        self._evict_finished_inbox.put(req_id)
        return float(self._reqs_to_send.pop(req_id))

    def _forget(self, req_id: str) -> None:
        if (handoff_id := self._handoff_ids.pop(req_id, None)) is not None:
            self._req_ids.pop(handoff_id, None)
        with self._state_lock:
            self._writing.discard(req_id)

    # Writer thread

    def _handle_push_reg_notif(self, notif: bytes) -> None:
        """A decode engine has registered its blocks for one hand-off. The hand-off's id finds the prompt's blocks."""
        try:
            registration = msgspec.msgpack.decode(notif[len(PUSH_REG_NOTIF_PREFIX) :], type=dict[str, Any])
            handoff_id = registration["handoff_id"]
        except (msgspec.MsgspecError, KeyError):
            logger.warning("a decode engine's registration cannot be read and is dropped")
            return
        registration["received_at"] = time.perf_counter()
        req_id = self._req_ids.get(handoff_id)
        blocks = None if req_id is None else self._push_finished_blocks.pop(req_id, None)
        if req_id is not None and blocks is not None:
            self._do_start_push_kv(req_id, blocks, registration)
            return
        self._registrations[handoff_id] = registration
        while self._registrations and self._is_too_many_or_old():
            self._registrations.popitem(last=False)

    def _is_too_many_or_old(self) -> bool:
        oldest = next(iter(self._registrations.values()))
        return len(self._registrations) > _MAX_REGISTRATIONS or self._is_old(oldest)

    def _is_old(self, registration: dict[str, Any]) -> bool:
        """Whether the decode engine may have stopped waiting although this engine has not said "gone"."""
        return bool(time.perf_counter() - registration["received_at"] > self._registration_ttl_s)

    def _pop_matching_registration(self, request_id: str) -> dict[str, Any] | None:
        return self._registrations.pop(self._handoff_ids.get(request_id, ""), None)

    def _do_start_push_kv(self, request_id: str, local_block_ids: Any, registration_data: dict[str, Any]) -> None:
        if self._is_old(registration_data):
            self._failed_sends.put(request_id)
            return
        handshake = self._ensure_handshake(
            registration_data["decode_engine_id"],
            registration_data["decode_host"],
            registration_data["decode_port"],
            registration_data["decode_tp_size"],
        )
        if handshake is not None:
            handshake.add_done_callback(self._failing(request_id))
        super()._do_start_push_kv(request_id, local_block_ids, registration_data)

    def _failing(self, req_id: str) -> Callable[[Future[Any]], None]:
        """A callback that ends the hold if the handshake fails. vLLM only logs it and leaves the hold to its lease."""

        def done(handshake: Future[Any]) -> None:
            if handshake.exception() is not None:
                self._failed_sends.put(req_id)

        return done

    def _xfer_blocks_for_req(self, req_id: str, meta: Any) -> None:
        with self._state_lock:
            if req_id in self._withdrawn:
                return
            self._writing.add(req_id)
        self._num_submitted = 0
        try:
            super()._xfer_blocks_for_req(req_id, meta)
        except Exception:
            logger.exception("the blocks of %s could not be written", req_id)
            self._num_submitted = 0
        if not self._num_submitted:
            self._failed_sends.put(req_id)

    def _xfer_blocks(self, *args: Any, **kwargs: Any) -> int | None:
        handle: int | None = super()._xfer_blocks(*args, **kwargs)
        self._num_submitted += handle is not None
        return handle


class OneAtATime:
    """NIXL's agent, called by one thread at a time.

    The writer, the main thread and the handshakes share the agent, and vLLM makes it without NIXL's own lock.
    Source: nixl 1.5 `nixl_agent_config`: sync mode NONE unless the agent listens.
    """

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._agent, name)
        if not callable(member):
            return member

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return member(*args, **kwargs)

        setattr(self, name, locked)
        return locked
