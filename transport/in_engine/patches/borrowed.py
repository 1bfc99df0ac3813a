# SPDX-License-Identifier: Apache-2.0
"""Every name that `transport` takes from another package without its owner's promise. Data only.

A connector checks its own when it is imported; a name that does not hold ends the engine's start. What is overridden
is here with its parameters, what is replaced whole with the digest of its body. The list is complete: tests compare it
with our imports, our overrides and our uses of underscore names.
"""

from __future__ import annotations

from transport.upstream.names import Borrowed, has, of

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_OFFLOAD = "vllm.v1.kv_offload"
_LMCACHE = "lmcache.integration.vllm"

_OUTER = ("transport.in_engine.outer.connector",)
_METADATA = ("transport.in_engine.outer.metadata",)
_STATS = ("transport.in_engine.outer.stats",)
_NIXL = ("transport.in_engine.nixl.connector",)
_LISTENER = ("transport.in_engine.nixl.listener",)
_PUSH = ("transport.in_engine.nixl_push.connector",)
_PUSH_SCHEDULER = ("transport.in_engine.nixl_push.scheduler",)
_PUSH_WORKER = ("transport.in_engine.nixl_push.worker",)
_MOONCAKE = ("transport.in_engine.mooncake.connector",)
_DOOR = ("transport.in_engine.mooncake.door",)
_RECEIVER = ("transport.in_engine.mooncake.receiver",)
_SCHEDULER = ("transport.in_engine.mooncake.scheduler",)
_SENDER = ("transport.in_engine.mooncake.sender",)
_MOONCAKE_METRICS = ("transport.in_engine.mooncake.metrics",)
_SINK = ("transport.in_engine.lmcache.connector",)
_LOOKUPS = ("transport.in_engine.lmcache.lookups",)
_GUARD = ("transport.in_engine.lmcache.worker",)
_PINS = ("transport.in_engine.lmcache.pins",)
_SPECS = ("transport.in_engine.host_offload.specs",)
_MEMORY = ("transport.in_engine.host_offload.memory",)
_COPIER = ("transport.in_engine.host_offload.worker", "transport.in_engine.host_offload.pages")
_FORKING = ("transport.in_engine.patches.forking",)
_CONNECTORS = (*_OUTER, *_NIXL, *_PUSH, *_MOONCAKE, *_SINK)

CONNECTOR = (
    Borrowed(f"{_V1}.base:KVConnectorRole", _CONNECTORS),
    *of(f"{_V1}.base:KVConnectorBase_V1", _CONNECTORS, has("role"), has("_get_connector_metadata", "self")),
    Borrowed(f"{_V1}.base:KVConnectorMetadata", _SINK),
    Borrowed(f"{_V1}.base:KVConnectorWorkerMetadata", _METADATA),
    Borrowed("vllm.v1.request:RequestStatus", (*_SCHEDULER, *_SINK)),
    *of(
        f"{_V1}.metrics:KVConnectorStats",
        (*_OUTER, *_STATS),
        has("data"),
        has("reset", "self"),
        has("aggregate", "self, other"),
        has("reduce", "self"),
        has("is_empty", "self"),
    ),
    *of(
        f"{_V1}.metrics:KVConnectorPromMetrics",
        (*_STATS, *_MOONCAKE_METRICS),
        has("__init__", "self, vllm_config, metric_types, labelnames, per_engine_labelvalues"),
        has("observe", "self, transfer_stats_data, engine_idx"),
        has("_counter_cls"),
        has("per_engine_labelvalues"),
    ),
)

OUTER = (
    *of(
        f"{_V1}.multi_connector:MultiConnector",
        _OUTER,
        has("__init__", "self, vllm_config, role, kv_cache_config"),
        has("_connectors"),
        has("_all_support_hma"),
        has("_requests_to_connector"),
        has("_get_connector_classes_and_configs"),
        has("_aggregate_request_finished", "self, request, per_connector_fn", body="60cb6953ddbc"),
        has("on_new_request", "self, request"),
        has("get_num_new_matched_tokens", "self, request, num_computed_tokens", body="e9b1df5cf5c9"),
        has("update_state_after_alloc", "self, request, blocks, num_external_tokens"),
        has("build_connector_meta", "self, scheduler_output"),
        has("request_finished", "self, request, blocks", body="c92335701e76"),
        has("request_finished_all_groups", "self, request, block_ids", body="bcb4830d4e9a"),
        has("update_connector_output", "self, connector_output"),
        has("start_load_kv", "self, forward_context, **kwargs"),
        has("build_connector_worker_meta", "self"),
        has("get_kv_connector_stats", "self"),
        has("build_kv_connector_stats", "cls, data", body="3687688e706b"),
        has("build_prom_metrics", "cls, vllm_config, metric_types, labelnames, per_engine_labelvalues"),
    ),
    *of(f"{_V1}.multi_connector:MultiKVConnectorStats", _OUTER, has("__setitem__")),
    *of(f"{_V1}.multi_connector:MultiKVConnectorMetadata", _METADATA, has("metadata"), has("extra_async_saves")),
    *of(
        f"{_V1}.multi_connector:MultiKVConnectorWorkerMetadata",
        _METADATA,
        has("metadata"),
        has("aggregate", "self, other"),
    ),
    *of(
        f"{_V1}.multi_connector:MultiKVConnectorPromMetrics",
        _STATS,
        has("_prom_metrics"),
        has("observe", "self, transfer_stats_data, engine_idx"),
    ),
    Borrowed(
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.get_connector_class_by_name", _OUTER
    ),
    # The offload child: the blocks that a step gives away, which it stores before they are written to.
    *of(
        f"{_V1}.offloading.scheduler:OffloadingConnectorScheduler",
        _OUTER,
        has("_current_batch_allocated_block_ids"),
        has("build_connector_meta", holds=("self._current_batch_allocated_block_ids",)),
    ),
    Borrowed(f"{_V1}.offloading_connector:OffloadingConnector.connector_scheduler", _OUTER),
    # The order of a step: told before the blocks are freed, asked for statistics after it was told, and the set from
    # which settle requests are taken is the one that goes to the workers.
    *of(
        "vllm.v1.core.sched.scheduler:Scheduler",
        _OUTER,
        has(
            "_update_from_kv_xfer_finished",
            holds=("self.connector.update_connector_output(kv_connector_output)", "self._free_blocks("),
        ),
        has("update_from_output", holds=("self._update_from_kv_xfer_finished(", "get_kv_connector_stats()")),
        has("schedule", holds=("finished_req_ids=self.finished_req_ids,",)),
    ),
    *of("vllm.v1.engine.core:EngineCore", _OUTER, has("add_request", holds=("if request.abort_immediately:",))),
)

NIXL = (
    *of(
        f"{_V1}.nixl.connector:NixlPullConnector",
        _NIXL,
        has("__init__", "self, vllm_config, role, kv_cache_config", body="1df7640ac4b1"),
        has("connector_scheduler"),
        has("connector_worker"),
        has("engine_id"),
    ),
    *of(
        f"{_V1}.nixl.pull_scheduler:NixlPullConnectorScheduler",
        _NIXL,
        has("__init__", "self, vllm_config, engine_id, kv_cache_config"),
        has("_reqs_need_recv"),
        has("_stop_heartbeat", "self, req_id"),
        has(
            "update_state_after_alloc",
            "self, request, blocks, num_external_tokens",
            holds=("self._reqs_need_recv[request.request_id]",),
        ),
        has("update_connector_output", "self, connector_output"),
        has("request_finished", "self, request, block_ids", body="57f7bb99de4d"),
    ),
    *of(
        f"{_V1}.nixl.pull_worker:NixlPullConnectorWorker",
        _NIXL,
        has("__init__", "self, vllm_config, engine_id, kv_cache_config"),
        has("_get_new_notifs", "self", holds=("notified_req_ids.add(req_id)",)),
    ),
    *of(
        f"{_V1}.nixl.base_worker:NixlBaseConnectorWorker",
        _NIXL,
        has("nixl_backends"),
        has("nixl_wrapper"),
        has("_reqs_to_send"),
        has("_reqs_to_process"),
        has("consumer_notification_counts_by_req"),
        has("expected_consumer_notifications_by_req"),
        has(
            "get_transfer_results",
            "self",
            holds=("done_sending = self._get_new_notifs()", "self._reap_expired_send_leases(done_sending)"),
        ),
        has("_reap_expired_send_leases", "self, done_sending"),
    ),
    *of(
        f"{_V1}.nixl.base_scheduler:NixlBaseConnectorScheduler",
        (*_LISTENER, *_NIXL),
        has("_nixl_handshake_listener", "encoded_data, ready_event, stop_event, host, port", body="df444614c810"),
        has(
            "set_xfer_handshake_metadata",
            holds=("target=self._nixl_handshake_listener", "self.side_channel_host", "ready_event.wait()"),
        ),
        has("shutdown", holds=("self._stop_event.set()", "self._nixl_handshake_listener_t.join()")),
    ),
    Borrowed(f"{_V1}.nixl.metadata:GET_META_MSG", _LISTENER),
    Borrowed("vllm.utils.network_utils:is_valid_ipv6_address", _LISTENER, "address"),
    Borrowed("vllm.utils.network_utils:make_zmq_path", _LISTENER),
)

NIXL_PUSH = (
    *of(
        f"{_V1}.nixl.connector:NixlPushConnector",
        _PUSH,
        has("__init__", "self, vllm_config, role, kv_cache_config", body="493b6400a5fb"),
        has("connector_scheduler"),
        has("connector_worker"),
        has("engine_id"),
    ),
    *of(
        f"{_V1}.nixl.push_scheduler:NixlPushConnectorScheduler",
        _PUSH_SCHEDULER,
        has("__init__", "self, vllm_config, engine_id, kv_cache_config"),
        has("_kv_lease_duration"),
        has("_nixl_handshake_listener", "encoded_data, ready_event, stop_event, host, port", body="df444614c810"),
        has("_newly_finished_push_blocks"),
        has("_push_pending_registrations"),
        has("_stop_heartbeat", "self, req_id"),
        has("on_new_request", "self, request"),
        has("build_connector_meta", "self, scheduler_output"),
        has("shutdown", "self"),
        has(
            "update_state_after_alloc",
            "self, request, blocks, num_external_tokens",
            holds=(
                "self._push_pending_registrations[request.request_id] = {",
                'params["do_remote_prefill"] = False',
                '"remote_tp_size": params["tp_size"]',
            ),
        ),
        has(
            "request_finished",
            "self, request, block_ids",
            holds=(
                "self._newly_finished_push_blocks[request.request_id] = block_ids",
                "self._finished_request_blocks[request.request_id] = block_ids",
                "self._reqs_not_processed.add(request.request_id)",
            ),
        ),
        has(
            "update_connector_output",
            "self, connector_output",
            holds=("self._finished_request_blocks.pop(req_id, None)",),
        ),
    ),
    *of(
        f"{_V1}.nixl.push_worker:NixlPushConnectorWorker",
        _PUSH_WORKER,
        has("nixl_backends"),
        has("nixl_wrapper"),
        has("kv_transfer_config"),
        has("consumer_notification_counts_by_req"),
        has("_ensure_handshake"),
        has("_evict_finished_inbox"),
        has("_failed_recv_reqs"),
        has("_lease_extension"),
        has("_push_finished_blocks"),
        has("_reqs_to_process"),
        has("_reqs_to_send"),
        has("_send_failures"),
        has("_sending_transfers"),
        has("_handle_heartbeat", "self, payload"),
        has("_handle_push_reg_notif", "self, notif", body="2d53552cb770"),
        has("_pop_done_transfers", "self, transfers"),
        has("_pop_matching_registration", "self, request_id", body="4592176be207"),
        has("__init__", "self, vllm_config, engine_id, kv_cache_config"),
        has("start_load_kv", "self, metadata"),
        has(
            "_push_writer_loop",
            holds=(
                "matched = self._pop_matching_registration(rid)",
                "self._push_finished_blocks.pop(rid, None)",
                "self._handle_push_reg_notif(notif)",
            ),
        ),
        has(
            "_do_start_push_kv",
            "self, request_id, local_block_ids, registration_data",
            holds=(
                'registration_data["decode_tp_size"]',
                "self._xfer_blocks_for_req(req_id=request_id, meta=push_meta)",
            ),
        ),
        has("_xfer_blocks_for_req", "self, req_id, meta", holds=("self._sending_transfers[req_id].extend(handles)",)),
        has("_xfer_blocks", holds=("self._send_failures.add(request_id)", "return handle")),
        has(
            "get_transfer_results",
            "self",
            holds=(
                "done_pushing, failed_pushing = self._pop_done_transfers(",
                "self._reqs_to_send.pop(req_id, None)",
                "self._evict_finished_inbox.put(req_id)",
            ),
        ),
        has(
            "_get_new_notifs",
            holds=("self._handle_heartbeat(msg[3:])", "self._recving_transfers.setdefault(req_id, [])"),
        ),
    ),
    *of(
        f"{_V1}.nixl.base_worker:NixlBaseConnectorWorker",
        _PUSH_WORKER,
        has(
            "get_transfer_results",
            holds=("self._failed_recv_reqs.get_nowait()", "self._reap_expired_send_leases(done_sending)"),
        ),
        has("_reap_expired_send_leases", "self, done_sending", holds=("self._reqs_to_process.remove(req_id)",)),
    ),
    Borrowed(f"{_V1}.nixl.metadata:PUSH_REG_NOTIF_PREFIX", _PUSH_WORKER),
)

_MODULE = f"{_V1}.mooncake.mooncake_connector"
MOONCAKE = (
    *of(
        f"{_MODULE}:MooncakeConnector",
        _MOONCAKE,
        has("__init__", "self, vllm_config, role, kv_cache_config", body="53b78b5fd57e"),
        has("build_prom_metrics", "cls, vllm_config, metric_types, labelnames, per_engine_labelvalues"),
    ),
    *of(
        _MODULE,
        (*_MOONCAKE, *_SENDER, *_RECEIVER),
        has(
            "should_launch_bootstrap_server",
            holds=('kv_config.get_from_extra_config("bootstrap_server_address", None) is not None', "return False"),
        ),
        has("get_mooncake_bootstrap_addr", "vllm_config", holds=("host, port = split_host_port(address)",)),
        has("MooncakeConnectorMetadata"),
        has("MooncakeXferResponse"),
        has("MooncakeXferResponseStatus"),
        has("SendBlockMeta"),
        has("PullReqMeta.pull_tasks_count"),
        has("PullReqMeta.local_block_ids"),
        has("PullReqMeta.remote_engine_id"),
        has("PullReqMeta.d_req_id"),
    ),
    *of(
        f"{_MODULE}:MooncakeConnectorScheduler",
        _SCHEDULER,
        has("__init__", "self, vllm_config, engine_id, kv_cache_config"),
        has("_is_hma_required"),
        has("_has_mamba"),
        has("block_size"),
        has("_reqs_not_processed"),
        has("on_new_request", "self, request"),
        has("get_num_new_matched_tokens", holds=('if params.get("do_remote_prefill"):',)),
        has("build_connector_meta", holds=("meta.reqs_not_processed = self._reqs_not_processed",)),
        has(
            "request_finished",
            "self, request, block_ids",
            holds=(
                "self._reqs_need_recv[request.request_id] = (request, [])",
                "request.status != RequestStatus.FINISHED_LENGTH_CAPPED",
                'self._reqs_not_processed.add(params["transfer_id"])',
            ),
        ),
    ),
    *of(
        f"{_MODULE}:MooncakeConnectorWorker",
        (*_MOONCAKE, *_SENDER, *_RECEIVER),
        has(
            "__init__",
            "self, vllm_config, engine_id, kv_cache_config",
            holds=("torch.accelerator.current_device_index()", "self.num_sender_workers * 2"),
        ),
        has("async_zmq_ctx"),
        has("is_kv_consumer"),
        has("tp_rank"),
        has("pp_rank"),
        has("shutdown", "self", holds=("self.async_zmq_ctx.term()",)),
        has(
            "_mooncake_sender_listener",
            holds=(
                "for _ in range(self.num_sender_tasks)",
                "sock = self.async_zmq_ctx.socket(zmq.ROUTER)",
                'sock.bind_to_random_port(f"tcp://{self.hostname}")',
                "identity, metadata_bytes = await sock.recv_multipart()",
            ),
        ),
    ),
    *of(
        f"{_MODULE}:MooncakeConnectorWorker",
        _SENDER,
        has("sender_loop"),
        has("reqs_need_send"),
        has("finished_sending_reqs"),
        has("num_sender_tasks"),
        has("xfer_stats"),
        has("_encoder"),
        has("_xfer_resp_decoder"),
        has(
            "record_send_reqs",
            "self, metadata",
            holds=("send_meta.ready.set()", "self.reqs_need_send.pop(transfer_id)"),
        ),
        has(
            "fetch_finished_sending_reqs",
            "self",
            holds=("self.finished_sending_reqs = set()", "record_kv_expired_req()"),
        ),
        has(
            "send_kv_to_decode",
            "self, identity, sock, meta",
            holds=(
                "if transfer_id not in self.reqs_need_send:",
                "if send_meta.transfer_id in self.reqs_need_send:",
                "self.finished_sending_reqs.add(send_meta.p_req_id)",
                "send_meta.sending += 1",
                "await sock.send_multipart((identity, self._encoder.encode(response)))",
                "err_reqs=list(pending_reqs)",
            ),
        ),
        has("_build_transfer_params", "self, ready_reqs, agent_meta, local_regions, remote_regions"),
        has("_send_blocks", "self, remote_session, src_ptrs, dst_ptrs, lengths"),
    ),
    *of(
        f"{_MODULE}:MooncakeConnectorWorker",
        _RECEIVER,
        has("_remote_agents"),
        has("finished_recving_reqs"),
        has("receive_kv", "self, remote_engine_id, pull_metas", holds=("pull_meta.pull_tasks_count = count",)),
        has(
            "receive_kv_from_single_worker",
            "self, worker_addr, pull_metas",
            holds=("self.process_pulling_result(response, pull_metas)", "self._handle_failed_recv("),
        ),
        has(
            "process_pulling_result",
            "self, response, pull_metas",
            holds=("pull_meta.pull_tasks_count -= 1", "any(pull_meta.local_block_ids)"),
            body="de336f9d7f8f",
        ),
        has(
            "_handle_failed_recv",
            "self, pull_metas, req_ids, reason",
            holds=("pull_meta.failed = True", "self.finished_recving_reqs.add(pull_meta.d_req_id)"),
        ),
    ),
    *of(
        f"{_V1}.mooncake.mooncake_utils:MooncakeBootstrapServer",
        _DOOR,
        has("__init__", "self, host, port"),
        has("_register_routes", holds=('self.app.post("/register")(self.register_worker)',)),
        has("start", "self, *, timeout", body="bd53199211c6"),
        has("shutdown", holds=("self._socket.close()", "self.server.should_exit = True")),
        has("register_worker", "self, payload"),
    ),
    *of(f"{_V1}.mooncake.mooncake_utils", _DOOR, has("RegisterWorkerPayload"), has("HTTPException")),
    Borrowed("vllm.v1.metrics.utils:create_metric_per_engine", _MOONCAKE_METRICS),
    Borrowed("vllm.envs:VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", _SENDER),
    Borrowed("zmq.asyncio:Context._socket_class", _DOOR),
    Borrowed("zmq.asyncio:Socket.__init__", _DOOR),
    Borrowed("zmq.asyncio:Socket.recv_multipart", _DOOR, "self, flags, copy, track"),
)

_ADAPTER = "lmcache.integration.vllm.vllm_multi_process_adapter"
LMCACHE = (
    *of(
        f"{_LMCACHE}.lmcache_mp_connector:LMCacheMPConnector",
        _SINK,
        has("__init__", "self, vllm_config, role, kv_cache_config"),
        has("_can_store"),
        has("lazy_offload"),
        has("_lazy_offload_manager"),
        has("worker_adapter"),
        has("scheduler_adapter"),
        has("request_trackers"),
        has("_group_tokens_per_block"),
        has("_save_decode_cache"),
        has("_get_or_create_request_tracker", "self, request"),
        has("_cleanup_request_tracker", "self, request_id"),
        has("start_load_kv", "self, forward_context, **kwargs", body="6148bbca0ebc"),
        has("wait_for_save", "self", body="726a4c89525c"),
        has("get_finished", "self, finished_req_ids"),
        has("get_num_new_matched_tokens", "self, request, num_computed_tokens"),
        has("build_connector_meta", "self, scheduler_output"),
        has("has_pending_push_work", "self"),
        has("request_finished", "self, request, block_ids"),
        has("request_finished_all_groups", "self, request, block_ids", body="4bcc88b6c3fd"),
    ),
    Borrowed(f"{_LMCACHE}.lmcache_mp_metadata:LMCacheMPConnectorMetadata", _SINK),
    *of(
        f"{_LMCACHE}.lmcache_mp_metadata:LMCacheMPRequestMetadata",
        _SINK,
        has("GetStoreMetadata", takes="save_decode_cache"),
        has("direction"),
        has("op"),
    ),
    *of(f"{_LMCACHE}.lmcache_mp_metadata:LMCacheMPRequestState", _SINK, has("READY"), has("PREFETCHING")),
    Borrowed("lmcache.v1.multiprocess.group_view:slice_block_ids_per_group", _SINK),
    *of(
        f"{_ADAPTER}:LMCacheMPSchedulerAdapter",
        (*_SINK, *_LOOKUPS),
        has("is_healthy"),
        has("_mq_timeout"),
        has("lmcache_tokens_per_chunk"),
        has("world_size"),
        has("_pending_lookups"),
        has("_ensure_heartbeat_started", "self"),
        has("cleanup_lookup_result", "self, request_id"),
        has("check_lookup_result", "self, request_id"),
        has("free_lookup_locks", takes="token_ids, start, end, request_id, cache_salt, request_configs"),
        has("end_session", "self, request_id"),
    ),
    *of(
        f"{_ADAPTER}:LMCacheMPWorkerAdapter",
        (*_SINK, *_GUARD),
        has("_mq_timeout"),
        has("_heartbeat_interval"),
        has("_ensure_heartbeat_started", "self"),
        has("_health_event"),
        has("transfer_ctx"),
        has("create_recorded_event", "self"),
        has("submit_retrieve_request", takes="request_id, op, event, cache_salt, request_configs"),
        has("submit_store_request", takes="request_id, op, event, cache_salt, request_configs"),
        has("store_futures"),
        has("store_events"),
        has("retrieve_futures"),
        has("retrieve_events"),
        has("error_block_ids"),
        has("_failed_request_ids"),
        has("_dropped_retrieves"),
        has("_completed_store_requests"),
        has("_failed_store_requests"),
        has("_returned_finished"),
        # `WorkerGuard._give_up` does what this does after an outage.
        has("get_finished", body="f753705db992"),
    ),
    *of(
        "vllm.v1.core.block_pool:BlockPool",
        _PINS,
        has("num_gpu_blocks"),
        has("blocks"),
        has("touch", "self, blocks"),
        has("free_blocks", takes="ordered_blocks"),
    ),
)

OFFLOAD = (
    *of(
        f"{_OFFLOAD}.cpu.spec:CPUOffloadingSpec",
        _SPECS,
        has("get_worker", "self, kv_caches", body="c3e27ceaedfb"),
        has("num_chunks"),
        has("blocks_per_chunk"),
        has("config"),
    ),
    *of(
        f"{_OFFLOAD}.tiering.spec:TieringOffloadingSpec",
        _SPECS,
        has("__init__", "self, config"),
        has("_engine_id"),
        has("_manager"),
        has("_scheduler_mmap"),
        has("get_manager", "self"),
        has("kv_bytes_per_chunk"),
        has("cpu_page_size_per_worker"),
        has("replicated_layout"),
    ),
    *of(f"{_OFFLOAD}.config:OffloadingConfig", _SPECS, has("engine_id"), has("canonical_layout"), has("parallel")),
    *of(
        f"{_OFFLOAD}.cpu.shared_offload_region:SharedOffloadRegion",
        (*_SPECS, *_MEMORY),
        has("__init__", takes="engine_id, num_chunks, rank, kv_bytes_per_chunk, cpu_page_size"),
        has("create_next_worker_view"),
        has("cleanup", "self"),
        has("mmap_path"),
        has("fd"),
        has("_creator"),
    ),
    *of(
        f"{_OFFLOAD}.base:OffloadingWorker",
        (*_COPIER, *_SPECS),
        has("submit_store", "self, job_id, src_spec, dst_spec"),
        has("submit_load", "self, job_id, src_spec, dst_spec"),
        has("get_finished", "self"),
        has("wait", "self, job_ids"),
        has("shutdown", "self"),
    ),
    *of(
        f"{_OFFLOAD}.base",
        (*_COPIER, *_SPECS),
        has("OffloadingManager"),
        has("BlockIDsLoadStoreSpec"),
        has("GPULoadStoreSpec.group_sizes"),
        has("GPULoadStoreSpec.block_indices"),
        has("LoadStoreSpec"),
        has("CanonicalKVCaches.tensors"),
        has("CanonicalKVCaches.group_data_refs"),
        has("TransferResult"),
    ),
    Borrowed("torch:_foreach_copy_", _COPIER),
    Borrowed("vllm.v1.kv_cache_interface:KVCacheConfig.kv_cache_tensors", ("transport.in_engine.block_bytes",)),
)

PATCHES = (
    Borrowed(
        "vllm.platforms.cpu:CpuPlatform.discover_numa_topology",
        ("transport.in_engine.patches.host_platform",),
        "cls",
    ),
    *of(
        f"{_V1}.nixl.base_worker",
        ("transport.in_engine.patches.host_platform",),
        has("nixl_agent_config"),
        has(
            "NixlBaseConnectorWorker.__init__",
            holds=(
                "current_platform.discover_numa_topology()",
                "nixl_agent_config(num_threads=num_threads, capture_telemetry=True)",
            ),
        ),
    ),
    *of(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        ("transport.in_engine.patches.host_platform",),
        has("discard_request_mask"),
        has("input_batch"),
        has("_sample", "self, logits, spec_decode_metadata"),
        has("_bookkeeping_sync", holds=("gen.set_offset(gen.get_offset() - 4)",)),
    ),
    Borrowed(
        "nixl._api:nixl_agent_config.__init__",
        ("transport.in_engine.patches.host_platform",),
        takes="enable_prog_thread",
    ),
    *of(
        "vllm.distributed.device_communicators.shm_broadcast:SpinCondition",
        ("transport.in_engine.patches.spinning",),
        has("last_read"),
        has("busy_loop_s"),
        has("wait", "self, timeout_ms", body="53f4c50562de"),
    ),
    *of(
        "vllm.distributed.device_communicators.shm_broadcast:MessageQueue",
        ("transport.in_engine.patches.nameless",),
        has("wait_until_ready", "self"),
        has("_is_writer"),
        has("n_local_reader"),
        has("buffer"),
    ),
    *of(
        "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer",
        ("transport.in_engine.patches.nameless",),
        has("shared_memory"),
        has("is_creator"),
    ),
    Borrowed(
        "vllm.utils.ompmultiprocessing:OMPProcessManager.configure_omp_envs",
        _FORKING,
        holds=("if not current_platform.is_cpu() or self.skip_setup:",),
    ),
    *of("vllm.utils.system_utils", _FORKING, has("get_mp_context", holds=("= envs.VLLM_WORKER_MULTIPROC_METHOD",))),
    *of("vllm.v1.engine.core:EngineCore", _FORKING, has("__init__", holds=("load_general_plugins()",))),
    *of(
        "vllm.v1.executor.multiproc_executor:WorkerProc",
        _FORKING,
        has("worker_main", holds=('kwargs.pop("inherited_fds", [])',)),
    ),
    Borrowed("torch.accelerator:current_device_index", _MOONCAKE),
    *of(
        "torch.distributed.distributed_c10d",
        ("transport.in_engine.patches.gloo_listeners",),
        has("_world"),
        has("_World.pg_map"),
    ),
)

BORROWED: tuple[Borrowed, ...] = (*CONNECTOR, *OUTER, *NIXL, *NIXL_PUSH, *MOONCAKE, *LMCACHE, *OFFLOAD, *PATCHES)
"""All of it, by room."""
