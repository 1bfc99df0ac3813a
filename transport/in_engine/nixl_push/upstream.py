# SPDX-License-Identifier: Apache-2.0
"""Checks at start that the vLLM underneath is the one that our push classes extend."""

from __future__ import annotations

import inspect

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_scheduler import NixlPushConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_worker import NixlPushConnectorWorker

_Scheduler = NixlPushConnectorScheduler
_Worker = NixlPushConnectorWorker

_EXPECTED: tuple[tuple[object, tuple[str, ...]], ...] = (
    (
        _Scheduler.update_state_after_alloc,
        (
            "self._push_pending_registrations[request.request_id] = {",
            'params["do_remote_prefill"] = False',
            '"remote_tp_size": params["tp_size"]',
        ),
    ),
    (
        _Scheduler.request_finished,
        (
            "self._newly_finished_push_blocks[request.request_id] = block_ids",
            "self._finished_request_blocks[request.request_id] = block_ids",
            "self._reqs_not_processed.add(request.request_id)",
        ),
    ),
    (_Scheduler.update_connector_output, ("self._finished_request_blocks.pop(req_id, None)",)),
    (
        _Worker._push_writer_loop,
        (
            "matched = self._pop_matching_registration(rid)",
            "self._push_finished_blocks.pop(rid, None)",
            "self._handle_push_reg_notif(notif)",
        ),
    ),
    (
        _Worker._do_start_push_kv,
        ('registration_data["decode_tp_size"]', "self._xfer_blocks_for_req(req_id=request_id, meta=push_meta)"),
    ),
    (_Worker._xfer_blocks_for_req, ("self._sending_transfers[req_id].extend(handles)",)),
    (_Worker._xfer_blocks, ("self._send_failures.add(request_id)", "return handle")),
    (
        _Worker.get_transfer_results,
        (
            "done_pushing, failed_pushing = self._pop_done_transfers(",
            "self._reqs_to_send.pop(req_id, None)",
            "self._evict_finished_inbox.put(req_id)",
        ),
    ),
    (_Worker._get_new_notifs, ("self._handle_heartbeat(msg[3:])", "self._recving_transfers.setdefault(req_id, [])")),
    (
        NixlBaseConnectorWorker.get_transfer_results,
        ("self._failed_recv_reqs.get_nowait()", "self._reap_expired_send_leases(done_sending)"),
    ),
    (NixlBaseConnectorWorker._reap_expired_send_leases, ("self._reqs_to_process.remove(req_id)",)),
)


def check() -> None:
    """Raise RuntimeError, which ends the engine's start, when a replaced method no longer looks as in vLLM 0.32."""
    for source_of, fragments in _EXPECTED:
        source = inspect.getsource(source_of)  # type: ignore[arg-type]
        for fragment in fragments:
            if fragment not in source:
                name = getattr(source_of, "__qualname__", source_of)
                raise RuntimeError(
                    f"{name} of this vLLM is not the one that transport/in_engine/nixl_push/ extends: "
                    f"{fragment!r} is gone. Read the new code, then adapt what overrides it."
                )
