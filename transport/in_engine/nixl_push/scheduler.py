# SPDX-License-Identifier: Apache-2.0
"""NixlPushConnector in the scheduler's process: which hand-offs are offered, waited for, and given up.

Both engines know a hand-off by the gateway's id. vLLM alone would match the two legs by their request ids, but here the
two legs come by different routes and their request ids differ.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_scheduler import NixlPushConnectorScheduler

from transport.handoff_params import DO_REMOTE_DECODE, DO_REMOTE_PREFILL, HANDOFF_ID, handoff_id_of
from transport.in_engine.nixl import listener as nixl_listener
from transport.in_engine.nixl_push.offers import Offers
from transport.in_engine.nixl_push.waits import Peer, Waits

logger = logging.getLogger(__name__)

_OF_A_CONSUMER = {"remote_engine_id": str, "remote_host": str, "remote_port": int, "tp_size": int}


class PushScheduler(NixlPushConnectorScheduler):
    """vLLM's, with parameters checked on arrival, and with hand-offs that can be given up on both sides."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._produces = vllm_config.kv_transfer_config.kv_role == "kv_producer"
        self._offers = Offers(engine_id)
        self._waits = Waits(self._kv_lease_duration)
        self._held: dict[str, str] = {}
        self._new_handoffs: dict[str, str] = {}
        self._unread: list[str] = []

    def _nixl_handshake_listener(
        self,
        encoded_data: Mapping[tuple[int, int], bytes],
        ready_event: threading.Event,
        stop_event: threading.Event,
        host: str,
        port: int,
    ) -> None:
        """vLLM runs this method in a thread of its own."""
        nixl_listener.listen(encoded_data, ready_event, stop_event, host, port, also=self._offers.answer_to)

    def shutdown(self) -> None:
        self._waits.shutdown()
        super().shutdown()

    # Called by the outer connector.

    def settle(self, handoff_ids: Collection[str]) -> None:
        """Prefill engine: nobody will read these hand-offs. They are not held, or not yet, and are never written."""
        if self._produces:
            self._offers.give_up(handoff_ids)

    def take_unread(self) -> list[str]:
        """Ids of hand-offs whose KV did not come to this decode engine or was not needed, since the last call."""
        unread, self._unread = self._unread, []
        return unread

    # A request's way in.

    def on_new_request(self, request: Any) -> None:
        """Drop parameters that this engine cannot act on; the engine then computes the prompt itself.

        Parameters that lack a key would end vLLM's EngineCore. With parameters of the other role a request would wait
        for ever.
        """
        params = request.kv_transfer_params
        if params:
            if params.get(DO_REMOTE_PREFILL) and (self._produces or not _is_complete(params)):
                logger.warning("request %s: unusable parameters of a hand-off are ignored", request.request_id)
                params[DO_REMOTE_PREFILL] = False
            if params.get(DO_REMOTE_DECODE) and not self._produces:
                logger.warning("request %s: a decode engine hands no KV over", request.request_id)
                params[DO_REMOTE_DECODE] = False
        super().on_new_request(request)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        req_id, params = request.request_id, request.kv_transfer_params
        registration = self._push_pending_registrations.get(req_id)
        if registration is not None and req_id not in self._waits:
            registration["handoff_id"] = handoff_id = _handoff_id(request)
            peer = Peer(params["remote_host"], params["remote_port"], params["remote_engine_id"])
            self._waits.start(req_id, handoff_id, peer)
        elif params and params.get(DO_REMOTE_PREFILL) and num_external_tokens <= 0:
            # This engine's own prefix cache has the whole prompt. vLLM tells nobody that the KV is not needed.
            self._stop_heartbeat(req_id)
            params[DO_REMOTE_PREFILL] = False
            self._unread.append(_handoff_id(request))

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        meta.handoff_ids, self._new_handoffs = self._new_handoffs, {}
        meta.lost = self._waits.take_lost()
        return meta

    # A request's way out.

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params or {}
        req_id = request.request_id
        if params.get(DO_REMOTE_PREFILL):
            # The request ended before its blocks were registered. vLLM would now send the prefill engine an empty
            # notification, as a reader does.
            self._stop_heartbeat(req_id)
            params[DO_REMOTE_PREFILL] = False
            self._unread.append(_handoff_id(request))
            return False, None
        if (given_up := self._waits.give_up(req_id)) is not None:
            self._unread.append(given_up)
        held, _ = super().request_finished(request, block_ids)
        if params.get(DO_REMOTE_DECODE):
            self._finished_producing(req_id, _handoff_id(request), held=held)
        return held, None

    def _finished_producing(self, req_id: str, handoff_id: str, *, held: bool) -> None:
        if not held:
            self._offers.end(handoff_id)
            return
        self._held[req_id] = handoff_id
        if self._offers.offer(handoff_id):
            self._new_handoffs[req_id] = handoff_id
        else:
            # The hand-off is gone already. It is held, so that a sink may store it, but never written.
            self._newly_finished_push_blocks.pop(req_id, None)

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        for req_id in connector_output.finished_sending or ():
            if (handoff_id := self._held.pop(req_id, None)) is not None:
                self._offers.end(handoff_id)
        for req_id in connector_output.finished_recving or ():
            waited_for = self._waits.over(req_id)
            if waited_for is not None and req_id in connector_output.failed_recving:
                self._unread.append(waited_for)


def _handoff_id(request: Any) -> str:
    return handoff_id_of(request.kv_transfer_params, request.request_id)


def _is_complete(params: dict[str, Any]) -> bool:
    named = isinstance(params.get(HANDOFF_ID), str) and isinstance(params.get("remote_request_id"), str)
    return named and all(isinstance(params.get(key), kind) for key, kind in _OF_A_CONSUMER.items())
