# SPDX-License-Identifier: Apache-2.0
"""Every name that `pools`, `disagg` and uvicorn's protocol in `transport` take from other packages without a promise.

Data only; what runs inside vLLM's processes has its own list, `transport/in_engine/patches/borrowed.py`. Whoever uses
names of this list checks them before it serves.
"""

from __future__ import annotations

from dataclasses import replace

from transport.upstream.names import Borrowed, Replacement, has, of

_COMPAT = ("pools.engine._vllm_compat",)
_ENGINE = ("pools.engine.vllm_engine",)
_CACHED_TOKENS = ("pools.engine.vllm_cached_tokens", "pools.engine.vllm_engine")
_MEDIA = ("pools.engine.vllm_media",)
_TALLY = ("pools.engine.vllm_tally",)
_KWARGS = ("pools.plan.engine_kwargs",)
_ARGUMENTS = ("pools.engine.vllm_arguments",)
_JUDGED_TYPES = ("pools.judge.types",)
_JUDGED_NAMES = ("pools.judge.names",)
_JUDGED_TOGETHER = ("pools.judge.together",)
_JUDGE = ("pools.judge.__main__",)
_CACHE_SERVER = ("pools.cache_server.main", "pools.cache_server.steadfast")
_PROBE = ("pools.cache_server.probe",)
_HTTP = ("transport.bounded_http",)
_EDGE = ("disagg.gateway.front.edge",)
_SPLICE = ("disagg.gateway.stream.splice",)
_RENDER = ("disagg.gateway.front.render",)
_ROUTER = ("disagg.routing.serve",)
_GATEWAY = ("disagg.gateway.deployment",)
_SERVE_CHILD = ("disagg.cli.serve_child",)
_LOG = ("pools.process.log_targets",)

VLLM = (
    *of(
        "vllm.v1.engine.async_llm:AsyncLLM",
        (*_COMPAT, *_ENGINE),
        has("from_engine_args", takes="engine_args, stat_loggers"),
        has("add_request", takes="request_id, prompt, params"),
        has(
            "notify_kv_transfer_request_rejected",
            "self, request_id, kv_transfer_params, *, data_parallel_rank",
            body="eb06af69c0ae",
        ),
        has("generate", takes="prompt, sampling_params, request_id"),
        has("abort", takes="request_id, internal"),
        has("get_supported_tasks", "self"),
        has("reset_prefix_cache"),
        has("shutdown"),
        has("errored"),
        has("engine_core"),
        has("output_processor"),
    ),
    Borrowed("vllm.v1.engine.output_processor:OutputProcessor.external_req_ids", _ENGINE),
    *of(
        "vllm.v1.engine.output_processor:OutputProcessor",
        _CACHED_TOKENS,
        has("add_request", takes="request"),
        has("process_outputs", takes="engine_core_outputs"),
        has("request_states"),
    ),
    *of(
        "vllm.v1.engine.output_processor:RequestState",
        _CACHED_TOKENS,
        has("external_req_id"),
        has("parent_req"),
        has("remote_prefill_cached_tokens"),
    ),
    *of("vllm.v1.engine:EngineCoreOutput", _CACHED_TOKENS, has("request_id"), has("prefill_stats")),
    *of(
        "vllm.v1.metrics.stats:PrefillStats",
        _CACHED_TOKENS,
        has("num_cached_tokens"),
        has("num_local_cached_tokens"),
    ),
    Borrowed("vllm.v1.engine.core_client:AsyncMPClient.add_request_async", _ENGINE, "self, request"),
    *of(
        "vllm.v1.engine:EngineCoreRequest",
        _COMPAT,
        has("request_id"),
        has("prompt_token_ids"),
        has("mm_features"),
        has("sampling_params"),
        has("pooling_params"),
        has("arrival_time"),
        has("lora_request"),
        has("cache_salt"),
        has("data_parallel_rank"),
        has("abort_immediately"),
    ),
    Borrowed(
        "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
        _COMPAT,
        "engine_client, state, args, supported_tasks",
    ),
    Borrowed("vllm.entrypoints.launchers.app:build_app", _COMPAT, takes="args, supported_tasks, model_config"),
    Borrowed("vllm.entrypoints.launchers.cli_args:FrontendArgs", (*_ARGUMENTS, *_KWARGS, *_JUDGED_TYPES)),
    Borrowed("vllm.engine.arg_utils:AsyncEngineArgs", (*_ARGUMENTS, *_KWARGS, *_JUDGED_TYPES)),
    *of(
        "vllm.exceptions:VLLMValidationError",
        (*_COMPAT, *_ENGINE, *_MEDIA),
        has("__init__", takes="message, parameter"),
    ),
    Borrowed("vllm.v1.engine.exceptions:EngineDeadError", _COMPAT),
    *of(
        "vllm.v1.engine.detokenizer:IncrementalDetokenizer",
        (*_COMPAT, *_RENDER),
        has("from_new_request", "cls, tokenizer, request"),
    ),
    *of(
        "vllm.v1.engine.detokenizer:BaseIncrementalDetokenizer",
        (*_COMPAT, *_RENDER),
        has("update", "self, new_token_ids, stop_terminated"),
        has("output_text"),
    ),
    Borrowed("vllm.sampling_params:RequestOutputKind.FINAL_ONLY", _ENGINE),
    *of(
        "vllm.connections:HTTPConnection",
        _MEDIA,
        has("__init__", "self, *, reuse_client"),
        has("get_async_client", "self"),
        has("get_sync_client", "self"),
        has("_async_client"),
        has("async_get_bytes", takes="url, timeout, allow_redirects"),
    ),
    *of(
        "vllm.envs",
        _MEDIA,
        has("VLLM_AUDIO_FETCH_TIMEOUT"),
        has("VLLM_IMAGE_FETCH_TIMEOUT"),
        has("VLLM_MEDIA_URL_ALLOW_REDIRECTS"),
    ),
    *of(
        "vllm.multimodal.media.connector:MediaConnector",
        _MEDIA,
        has("__init__", takes="media_io_kwargs, connection, allowed_local_media_path, allowed_media_domains"),
        has("load_from_url_async", takes="url, media_io"),
        has("allowed_local_media_path"),
    ),
    Borrowed("vllm.multimodal.media.connector:MEDIA_CONNECTOR_REGISTRY", _MEDIA),
    Borrowed("vllm.utils.registry:ExtensionManager.register", _MEDIA, takes="name"),
    *of(
        "vllm.v1.metrics.loggers:StatLoggerBase",
        (*_COMPAT, *_ENGINE),
        has("__init__", "self, vllm_config, engine_index"),
        has("record", "self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx"),
        has("log_engine_initialized", "self"),
    ),
    *of(
        "vllm.v1.metrics.stats:SchedulerStats",
        _TALLY,
        has("num_running_reqs"),
        has("num_waiting_reqs"),
        has("num_skipped_waiting_reqs"),
        has("num_kv_fetch_reqs_by_stage"),
        has("kv_cache_usage"),
        has("connector_prefix_cache_stats"),
        has("kv_connector_stats"),
    ),
    *of(
        "vllm.v1.metrics.stats:IterationStats",
        _TALLY,
        has("prompt_token_stats"),
        has("num_generation_tokens"),
        has("num_preempted_reqs"),
    ),
    *of("vllm.v1.metrics.stats:PromptTokenStats", _TALLY, has("total"), has("computed")),
    # `abort` finds a caller's requests by the prefixes that these put before the request's id.
    Borrowed(
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat",
        _ENGINE,
        holds=('f"chatcmpl-{self._base_request_id(',),
    ),
    Borrowed(
        "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion",
        _ENGINE,
        holds=('f"cmpl-{self._base_request_id(', 'f"{request_id}-{i}"'),
    ),
    Borrowed("starlette.datastructures:State._state", _COMPAT),
)

RENDERER = (
    Borrowed("vllm.config:VllmConfig", _RENDER),
    *of("vllm.entrypoints.openai.chat_completion.protocol", _RENDER, has("ChatCompletionRequest")),
    *of("vllm.entrypoints.openai.completion.protocol", _RENDER, has("CompletionRequest")),
    *of("vllm.entrypoints.serve.engine.protocol", _RENDER, has("ErrorResponse")),
    *of("vllm.entrypoints.serve.tokenize.protocol", _RENDER, has("DetokenizeRequest"), has("TokenizeRequest")),
    Borrowed("vllm.renderers:renderer_from_config", _RENDER),
    Borrowed("vllm.renderers.chat_utils:load_chat_template", _RENDER),
    *of(
        "vllm.engine.arg_utils:EngineArgs",
        _RENDER,
        has("create_model_config"),
        has("create_structured_outputs_config"),
    ),
    *of(
        "vllm.renderers.online_renderer:OnlineRenderer",
        _RENDER,
        has(
            "__init__",
            takes="model_config, renderer, request_logger, chat_template, chat_template_content_format, "
            "trust_request_chat_template, trust_request_mm_kwargs, enable_auto_tools, "
            "exclude_tools_when_tool_choice_none, tool_parser, tool_strict_level, reasoning_parser, "
            "default_chat_template_kwargs",
        ),
        has("warmup"),
        has("render_chat", takes="request, skip_mm_cache"),
        has("render_completion", takes="request, skip_mm_cache"),
        has("renderer"),
    ),
)

ARGUMENTS = (
    *of(
        "vllm.config",
        _ARGUMENTS,
        has("LoggingConfig"),
        has("ReasoningConfig"),
        has("StructuredOutputsConfig"),
    ),
    Borrowed("vllm.reasoning:ReasoningParserManager.import_reasoning_parser", _ARGUMENTS, "cls, plugin_path"),
    Borrowed("vllm.tool_parsers:ToolParserManager.import_tool_parser", _ARGUMENTS, "cls, plugin_path"),
    # How an argument gets from `EngineArgs` into a config class is read from these.
    *of(
        "vllm.engine.arg_utils:EngineArgs",
        _JUDGED_TYPES,
        has(
            "create_engine_config",
            holds=(
                "cache_config = CacheConfig(",
                "scheduler_config = SchedulerConfig(",
                "parallel_config = ParallelConfig(",
            ),
        ),
    ),
    *of(
        "vllm.config",
        _JUDGED_TYPES,
        has("VllmConfig"),
        has("CompilationConfig"),
        has("KernelConfig"),
        has("MambaConfig"),
    ),
    Borrowed("vllm.config.multimodal:MultiModalConfig", _JUDGED_TYPES),
    Borrowed("vllm.utils.argparse_utils:human_readable_int_or_auto", _JUDGED_TYPES, "value"),
    Borrowed("vllm.config.mamba:MambaBackendEnum", _JUDGED_NAMES),
    Borrowed("vllm.model_executor.layers.quantization:QUANTIZATION_METHODS", _JUDGED_NAMES),
    Borrowed("vllm.model_executor.model_loader:_LOAD_FORMAT_TO_MODEL_LOADER", _JUDGED_NAMES),
    Borrowed("vllm.reasoning:ReasoningParserManager.list_registered", _JUDGED_NAMES, "cls"),
    Borrowed("vllm.renderers.registry:RENDERER_REGISTRY", _JUDGED_NAMES),
    Borrowed("vllm.renderers.registry:RendererRegistry.renderers", _JUDGED_NAMES),
    Borrowed("vllm.tool_parsers:ToolParserManager.list_registered", _JUDGED_NAMES, "cls"),
    Borrowed("vllm.transformers_utils.config:_CONFIG_FORMAT_TO_CONFIG_PARSER", _JUDGED_NAMES),
    Borrowed("vllm.utils.hashing:get_hash_fn_by_name", _JUDGED_NAMES, "hash_fn_name"),
    Borrowed("vllm.v1.attention.backends.registry:AttentionBackendEnum", _JUDGED_NAMES),
    *of(
        "vllm.engine.arg_utils:EngineArgs",
        _JUDGED_TOGETHER,
        has("create_engine_config", takes="usage_context"),
        has("create_diffusion_config", "self"),
        has("create_load_config", "self"),
        has("create_logging_config", "self"),
        has("create_observability_config", "self"),
        has("create_structured_outputs_config", "self"),
        has("create_watermark_config", "self"),
    ),
    Borrowed("vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args", _JUDGED_TOGETHER, "args"),
    Borrowed(
        "vllm.parser.parser_manager:ParserManager.get_parser",
        _JUDGED_TOGETHER,
        takes="tool_parser_name, reasoning_parser_name, enable_auto_tools, model_name, tool_strict_level",
    ),
    Borrowed("vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER", _JUDGED_TOGETHER),
    *of("vllm.platforms", _JUDGE, has("current_platform")),
    Borrowed("vllm.plugins:load_general_plugins", _JUDGE),
)
"""How a replica and the config check make vLLM's arguments, and what the check asks besides."""

UVICORN = (
    *of(
        "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol",
        (*_HTTP, *_SPLICE),
        has("connection_made", "self, transport"),
        has("connection_lost", "self, exc"),
        has("data_received", "self, data", body="aa0c03304a21"),
        has("on_message_begin", "self"),
        has("on_headers_complete", "self"),
        has("on_body", "self, body"),
        has("on_message_complete", "self"),
        has("pause_writing", "self"),
        has("resume_writing", "self"),
        has("_unset_keepalive_if_required", "self"),
        has("connections"),
        has("cycle"),
        has("flow"),
        has("headers"),
        has("loop"),
        has("parser"),
        has("scope"),
        has("transport"),
        has("url"),
    ),
    *of(
        "uvicorn.protocols.http.httptools_impl:RequestResponseCycle",
        (*_HTTP, *_SPLICE),
        has("response_started"),
        has("response_complete"),
        has("chunked_encoding"),
        has("disconnected"),
        has("message_event"),
    ),
    *of("uvicorn.protocols.http.flow_control:FlowControl", (*_HTTP, *_SPLICE), has("read_paused"), has("write_paused")),
    Borrowed("uvicorn.protocols.http.auto:AutoHTTPProtocol", _SPLICE),
)

RAY = (
    *of(
        "ray.serve.request_router:RequestRouter",
        _ROUTER,
        has("choose_replicas", "self, candidate_replicas, pending_request"),
        has("update_replicas", "self, replicas"),
        has("_deployment_id"),
    ),
    *of(
        "ray.serve.request_router",
        _ROUTER,
        has("PendingRequest.routing_context"),
        has("RunningReplica.replica_metadata"),
    ),
    *of(
        "ray.serve._private.controller:ServeController",
        _GATEWAY,
        has("get_serve_instance_details", takes="self"),
        has("update_deployment_replicas", takes="self, deployment_id, target_num_replicas"),
        has("get_proxy_location", "self"),
        has("get_http_config", "self"),
    ),
    Borrowed("ray.serve._private.constants:SERVE_CONTROLLER_NAME", _GATEWAY),
    Borrowed("ray.serve._private.common:DeploymentID", _GATEWAY),
    Borrowed("ray.serve._private.exceptions:ExternalScalerDisabledError", _GATEWAY),
    Borrowed("ray.serve:shutdown", _SERVE_CHILD),
    Borrowed("ray.serve:delete", _SERVE_CHILD, takes="name, _blocking"),
    *of("ray.serve.scripts", _SERVE_CHILD, has("cli"), has("serve"), has("run")),
)

LMCACHE = (
    *of(
        "lmcache.v1.multiprocess.transport.zmq_impl.mq:MessageQueueServer",
        _CACHE_SERVER,
        has("_main_loop", "self", body="6924ef9729d5"),
    ),
    Borrowed("lmcache.cli.main:main", _CACHE_SERVER),
    Borrowed("lmcache.logging:init_logger", _CACHE_SERVER),
)

MISTRAL = (
    *of(
        "mistral_common.tokens.tokenizers.image",
        _MEDIA,
        has("download_image", "url, timeout"),
        has("image_from_chunk", holds=("return download_image(url=url, timeout=None)",)),
    ),
    *of(
        "mistral_common.tokens.tokenizers.audio:Audio",
        _MEDIA,
        has("from_url", "url, strict, timeout"),
        has("from_bytes", "audio_bytes, strict"),
    ),
)

STARLETTE = (Borrowed("starlette.routing:compile_path", _EDGE, takes="path"),)

PAGES = (Borrowed("prometheus_client.metrics:MetricWrapperBase._labelnames", ("disagg.pages.metrics",)),)

BORROWED: tuple[Borrowed, ...] = (*VLLM, *RENDERER, *ARGUMENTS, *UVICORN, *RAY, *LMCACHE, *MISTRAL, *STARLETTE, *PAGES)
"""All of it, by package."""

ADD_REQUEST = Replacement(
    name="vllm.v1.engine.async_llm:AsyncLLM.add_request",
    by="pools.engine.vllm_engine:VllmEngine._guard_admissions",
    processes=frozenset({"api"}),
    platforms=frozenset({"cpu", "cuda"}),
    of="one instance",
    why="hand-off parameters are used once, and a request whose caller leaves while it is added is aborted",
    source="vLLM 0.32 `v1/engine/async_llm.py`, which has no hook before a request is admitted",
    way_out="vLLM calls something of ours, or of its connectors, before it admits a request",
)
REJECTED = Replacement(
    name="vllm.v1.engine.async_llm:AsyncLLM.notify_kv_transfer_request_rejected",
    by="pools.engine.vllm_engine:VllmEngine._guard_admissions",
    processes=frozenset({"api"}),
    platforms=frozenset({"cpu", "cuda"}),
    of="one instance",
    why="vLLM would notify the producer as a reader does; the gateway settles the hand-off there instead",
    source="vLLM 0.32 `v1/engine/async_llm.py`, called by `entrypoints/openai` for a request that it refuses",
    way_out="a connector is asked what to do with a refused request",
)
HTTP_PROTOCOL = Replacement(
    name="uvicorn.protocols.http.auto:AutoHTTPProtocol",
    by="disagg.gateway.stream.splice:splicing",
    processes=frozenset({"gateway"}),
    platforms=frozenset({"cpu", "cuda"}),
    why="Serve makes the uvicorn server of a replica, and names the protocol `auto`",
    source="Ray 2.60 `serve/_private/http_util.py`; uvicorn 0.54 `config.py`, `HTTP_PROTOCOLS`",
    way_out="Serve lets an ingress choose the `http` of its uvicorn config",
)
SERVE_SHUTDOWN = Replacement(
    name="ray.serve:shutdown",
    by="disagg.cli.serve_child:main",
    processes=frozenset({"serve_child"}),
    platforms=frozenset({"cpu", "cuda"}),
    why="`serve run` ends with it and kills the proxies at once; the applications are drained first",
    source="Ray 2.60 `serve/scripts.py`, `run`",
    way_out="`serve run` drains its applications behind living proxies",
)
MAIN_LOOP = Replacement(
    name="lmcache.v1.multiprocess.transport.zmq_impl.mq:MessageQueueServer._main_loop",
    by="pools.cache_server.steadfast:steadfast",
    processes=frozenset({"cache_server"}),
    platforms=frozenset({"cpu", "cuda"}),
    why="its thread ends with the first message that it cannot take apart, and the server answers nothing any more",
    source="LMCache 0.5.6 `v1/multiprocess/transport/zmq_impl/mq.py`",
    way_out="LMCache refuses such a message and goes on",
)

MISTRAL_IMAGE = Replacement(
    name="mistral_common.tokens.tokenizers.image:download_image",
    by="pools.engine.vllm_media:_image_by",
    processes=frozenset({"api", "gateway"}),
    platforms=frozenset({"cpu", "cuda"}),
    why="it asks any host that a request names, and follows every redirect; vLLM has fetched the same image before",
    source="mistral_common 1.13 `image.py`; vLLM 0.32 `renderers/mistral.py` gives it the messages as they came",
    way_out="vLLM gives the tokeniser what its own client has fetched",
)
MISTRAL_AUDIO = replace(
    MISTRAL_IMAGE,
    name="mistral_common.tokens.tokenizers.audio:Audio.from_url",
    by="pools.engine.vllm_media:_audio_by",
    why="as for images",
    source="mistral_common 1.13 `tokens/tokenizers/audio.py`; vLLM 0.32 `renderers/mistral.py`",
)

REPLACED: tuple[Replacement, ...] = (
    ADD_REQUEST,
    REJECTED,
    HTTP_PROTOCOL,
    SERVE_SHUTDOWN,
    MAIN_LOOP,
    MISTRAL_IMAGE,
    MISTRAL_AUDIO,
)
"""Everything outside vLLM's own processes, and on the engine object of a replica."""
