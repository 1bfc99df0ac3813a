# SPDX-License-Identifier: Apache-2.0
"""Checks at start that the vLLM underneath is the one that our Mooncake classes extend."""

from __future__ import annotations

import inspect

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import mooncake_connector as vllm_mooncake
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import mooncake_utils

_Scheduler = vllm_mooncake.MooncakeConnectorScheduler
_Worker = vllm_mooncake.MooncakeConnectorWorker

_EXPECTED: tuple[tuple[object, tuple[str, ...]], ...] = (
    (
        vllm_mooncake.MooncakeConnector.__init__,
        (
            "super().__init__(vllm_config, role, kv_cache_config)",
            "MooncakeConnectorScheduler(vllm_config, self.engine_id, kv_cache_config)",
            "self.connector_scheduler = None",
        ),
    ),
    (
        _Scheduler.request_finished,
        (
            "self._reqs_need_recv[request.request_id] = (request, [])",
            "request.status != RequestStatus.FINISHED_LENGTH_CAPPED",
            'self._reqs_not_processed.add(params["transfer_id"])',
        ),
    ),
    (_Scheduler.build_connector_meta, ("meta.reqs_not_processed = self._reqs_not_processed",)),
    (_Scheduler.get_num_new_matched_tokens, ('if params.get("do_remote_prefill"):',)),
    (_Worker.__init__, ("torch.accelerator.current_device_index()", "self.num_sender_workers * 2")),
    (
        _Worker.send_kv_to_decode,
        (
            "if transfer_id not in self.reqs_need_send:",
            "if send_meta.transfer_id in self.reqs_need_send:",
            "self.finished_sending_reqs.add(send_meta.p_req_id)",
            "send_meta.sending += 1",
            "await sock.send_multipart((identity, self._encoder.encode(response)))",
            "err_reqs=list(pending_reqs)",
        ),
    ),
    (_Worker.record_send_reqs, ("send_meta.ready.set()", "self.reqs_need_send.pop(transfer_id)")),
    (_Worker.fetch_finished_sending_reqs, ("self.finished_sending_reqs = set()", "record_kv_expired_req()")),
    (
        _Worker._mooncake_sender_listener,
        (
            "for _ in range(self.num_sender_tasks)",
            "sock = self.async_zmq_ctx.socket(zmq.ROUTER)",
            'sock.bind_to_random_port(f"tcp://{self.hostname}")',
            "identity, metadata_bytes = await sock.recv_multipart()",
        ),
    ),
    (_Worker.shutdown, ("self.async_zmq_ctx.term()",)),
    (
        vllm_mooncake.should_launch_bootstrap_server,
        ('kv_config.get_from_extra_config("bootstrap_server_address", None) is not None', "return False"),
    ),
    (vllm_mooncake.get_mooncake_bootstrap_addr, ("host, port = split_host_port(address)",)),
    (
        mooncake_utils.MooncakeBootstrapServer,
        ('self.app.post("/register")(self.register_worker)', "self._socket.close()", "self.server.should_exit = True"),
    ),
    (
        _Worker.receive_kv_from_single_worker,
        ("self.process_pulling_result(response, pull_metas)", "self._handle_failed_recv("),
    ),
    (_Worker.process_pulling_result, ("pull_meta.pull_tasks_count -= 1", "any(pull_meta.local_block_ids)")),
    (_Worker._handle_failed_recv, ("pull_meta.failed = True", "self.finished_recving_reqs.add(pull_meta.d_req_id)")),
    (_Worker.receive_kv, ("pull_meta.pull_tasks_count = count",)),
)


def check() -> None:
    """Raise RuntimeError, which ends the engine's start, when a replaced method no longer looks as in vLLM 0.32."""
    for source_of, fragments in _EXPECTED:
        source = inspect.getsource(source_of)  # type: ignore[arg-type]
        for fragment in fragments:
            if fragment not in source:
                name = getattr(source_of, "__qualname__", source_of)
                raise RuntimeError(
                    f"{name} of this vLLM is not the one that transport/in_engine/mooncake*.py extends: "
                    f"{fragment!r} is gone. Read the new code, then adapt what overrides it."
                )
