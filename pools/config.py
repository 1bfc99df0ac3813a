# SPDX-License-Identifier: Apache-2.0
"""Settings of the pools: the model, the engine that runs it, and what each pool may change.

`engine_kwargs` is the one open dict. Its keys are vLLM's own argument names and pass through untouched, but
for those that the framework sets itself, that no client meets, or that both pools must share.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from transport.config import Config, Milliseconds, Name, PositiveInt, Seconds, refusal

Platform = Literal["cpu", "cuda"]

_MORE_REPLICAS = "remove it; more replicas in deployments[].num_replicas do the same"
_PLACED = "remove it; Ray places the ranks of an engine"
_TLS = "remove it; Serve's proxy speaks TLS, with the ssl_* fields of http_options"

RESERVED_ENGINE_KWARGS: dict[str, str] = {
    "model": "set model.source",
    "model_tag": "set model.source",
    "served_model_name": "set model.id",
    "kv_transfer_config": "set transport",
    "kv_offloading_size": "set offload",
    "kv_offloading_backend": "set shared_cache for LMCache, offload for vLLM's own",
    "kv_events_config": "remove it; replicas publish their own events",
    "host": "remove it; every replica serves on its own private address",
    "port": "remove it; the kernel chooses a free port for every replica",
    "uds": "remove it; every replica serves on its own private address",
    "grpc_port": "remove it; gateways ask engines over HTTP",
    "root_path": "set route_prefix of the Serve application",
    "api_key": "set gateway.api_keys; engines are private, clients only meet the gateway",
    "allowed_origins": "set gateway.cors.allow_origins; browsers only meet the gateway",
    "allow_credentials": "set gateway.cors.allow_credentials; browsers only meet the gateway",
    "allowed_methods": "set gateway.cors, which allows the methods of the gateway's routes",
    "allowed_headers": "set gateway.cors, which allows every header",
    "ssl_keyfile": "set http_options.ssl_keyfile; engines are private, clients only meet Serve's proxy",
    "ssl_certfile": "set http_options.ssl_certfile; engines are private, clients only meet Serve's proxy",
    "ssl_ca_certs": "set http_options.ssl_ca_certs; engines are private, clients only meet Serve's proxy",
    "ssl_cert_reqs": _TLS,
    "ssl_ciphers": _TLS,
    "enable_ssl_refresh": _TLS,
    "h11_max_incomplete_event_size": "set gateway.max_header_bytes and gateway.max_body_bytes",
    "h11_max_header_count": "set gateway.max_header_bytes",
    "middleware": "remove it; it would see what gateways ask, and no client. Put a proxy in front of Serve",
    "lora_modules": "remove it; the gateway serves model.id alone, so that no client can ask for an adapter",
    "tool_server": "remove it; only /v1/responses uses it, which the gateway does not serve",
    "sse_keep_alive_interval": "remove it; its comments would count as bytes of an answer, and a replica that hangs "
    "would be noticed too late. Raise the read timeout of the proxy in front of Serve",
    "cohere_format": "set default_chat_template_kwargs: {cohere_format: ...}, which the gateway renders with, too",
    "tokens_only": "remove it; the gateway needs the engines' OpenAI routes",
    "distributed_executor_backend": "remove it; it follows from platform and the parallel sizes",
    "data_parallel_size": _MORE_REPLICAS,
    "data_parallel_size_local": _MORE_REPLICAS,
    "data_parallel_rank": _MORE_REPLICAS,
    "data_parallel_start_rank": _MORE_REPLICAS,
    "data_parallel_backend": _MORE_REPLICAS,
    "data_parallel_address": _MORE_REPLICAS,
    "data_parallel_rpc_port": _MORE_REPLICAS,
    "data_parallel_external_lb": _MORE_REPLICAS,
    "data_parallel_hybrid_lb": _MORE_REPLICAS,
    "data_parallel_multi_port_external_lb": _MORE_REPLICAS,
    "data_parallel_supervisor_port": _MORE_REPLICAS,
    "dp_supervisor_probe_interval_s": _MORE_REPLICAS,
    "dp_supervisor_probe_timeout_s": _MORE_REPLICAS,
    "dp_supervisor_probe_failure_threshold": _MORE_REPLICAS,
    "nnodes": _PLACED,
    "node_rank": _PLACED,
    "master_addr": _PLACED,
    "master_port": _PLACED,
    "device_ids": _PLACED,
    "api_server_count": "remove it; a replica has one API server, more come from deployments[].num_replicas",
    "headless": "remove it; the gateway needs every replica's API server",
    "disable_log_stats": "remove it; `disagg status` and health read these statistics",
}
"""Engine arguments that the framework sets itself, or that reach an engine where no client is, with what to do
instead."""

_NO_ROUTE = "the gateway does not serve the routes that it is for"
_NO_DOCS = "no client sees an engine's own documents; the gateway's is at /openapi.json"
_NO_LOG = "a replica's server writes no access log, and nothing below warnings"

WITHOUT_EFFECT: dict[str, str] = {
    "anthropic_disabled_thinking_effort": _NO_ROUTE,
    "cohere_is_reasoning_model": _NO_ROUTE,
    "disable_access_log_for_endpoints": _NO_LOG,
    "disable_fastapi_docs": _NO_DOCS,
    "disable_uvicorn_access_log": _NO_LOG,
    "enable_flash_late_interaction": _NO_ROUTE,
    "enable_offline_docs": _NO_DOCS,
    "enable_request_id_headers": "the gateway keeps or makes X-Request-Id itself",
    "enable_scale_out": _NO_ROUTE,
    "enable_server_load_tracking": _NO_ROUTE,
    "enable_tokenizer_info_endpoint": _NO_ROUTE,
    "uvicorn_log_level": _NO_LOG,
}
"""Arguments of vLLM's server that engines take and nobody notices, with the reason. They are warned of."""

SHARED_ENGINE_KWARGS: frozenset[str] = frozenset(
    {
        "allowed_local_media_path",
        "allowed_media_domains",
        "attention_backend",
        "block_size",
        "chat_template",
        "chat_template_content_format",
        "code_revision",
        "config_format",
        "default_chat_template_kwargs",
        "disable_hybrid_kv_cache_manager",
        "dtype",
        "enable_auto_tool_choice",
        "enable_prefix_caching",
        "hf_config_path",
        "hf_overrides",
        "hf_token",
        "kv_cache_dtype",
        "load_format",
        "max_model_len",
        "prefix_caching_hash_algo",
        "quantization",
        "reasoning_parser",
        "revision",
        "seed",
        "skip_tokenizer_init",
        "speculative_config",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "tool_call_parser",
        "tool_parser_plugin",
        "trust_remote_code",
        "trust_request_chat_template",
    }
)
"""Engine arguments that both pools and the gateway must agree on: prompt, KV layout or answer depend on them."""


class ModelConfig(Config):
    """The one model that both pools serve."""

    id: Name
    """Name that clients send as `model`."""
    source: Name
    """Hugging Face id, or directory of a local checkpoint. A relative directory is resolved against the working
    directory of whoever starts the application, and becomes absolute before any replica sees it."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine and server arguments for both pools, under vLLM's names with underscores, passed through
    untouched. Arguments that the framework sets itself, or that would reach no client, are refused."""

    @field_validator("engine_kwargs")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _refuse_reserved(value)


class CpuConfig(Config):
    """What one engine takes of a machine without an accelerator. Read only with `platform: cpu`."""

    kv_cache_gib: PositiveInt = 1
    """KV cache of one engine in whole GiB, the unit of vLLM's CPU build. It comes on top of about 2.6 GiB for the
    engine's three processes and of the weights."""
    omp_threads: PositiveInt = 1
    """Compute threads of one engine. One, so that a prefill and a decode engine share two cores."""
    num_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Ray CPUs that one engine replica reserves. It bounds how many replicas Ray places, not what they use."""


class VllmEngineConfig(Config):
    """The real engine: vLLM in the replica's process."""

    type: Literal["vllm"] = "vllm"
    """Which engine a replica owns."""


class FakeEngineConfig(Config):
    """An engine without a model: the same contract and timing by formula, for tests and for load on the gateway."""

    type: Literal["fake"]
    """Which engine a replica owns."""
    itl_ms: Milliseconds = 20.0
    """Milliseconds between two tokens of one stream; 20 is a common figure for an 8B model on one GPU."""
    prefill_ms_per_1k_tokens: Milliseconds = 20.0
    """Milliseconds of prefill for 1,000 prompt tokens that no cache holds."""
    transfer_ms_per_1k_tokens: Milliseconds = 2.0
    """Milliseconds to move the KV of 1,000 prompt tokens."""
    shared_steps: bool = True
    """Streams that run together get their tokens in one step, as from a real engine's batch. False gives each stream
    steps of its own, from when it started: every token then comes alone."""
    startup_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Seconds from start to ready. Zero, because tests start many engines."""
    kv_tokens: PositiveInt = 262_144
    """KV space in tokens. Requests beyond it wait."""
    block_size: PositiveInt = 16
    """Tokens in a KV block; 16 is vLLM's default on CUDA."""
    max_model_len: PositiveInt = 32_768
    """Longest prompt plus answer, in tokens. `engine_kwargs.max_model_len` overrides it."""
    max_num_seqs: PositiveInt = 256
    """Requests that run at the same time; more wait."""


EngineConfig = Annotated[VllmEngineConfig | FakeEngineConfig, Field(discriminator="type")]
"""Which engine the replicas own."""


HANG_AFTER_S = 5.0
"""`hang_after_s` where nothing else says how long an engine may take."""


class PoolConfig(Config):
    """What one pool has of its own. Its size is not here: it is `deployments[].num_replicas` of the Serve config."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """vLLM arguments of this pool only, on top of `model.engine_kwargs`. Arguments that both pools must agree on
    are refused here; tensor_parallel_size, max_num_seqs or gpu_memory_utilization may differ."""
    startup_timeout_s: Seconds = 1800.0
    """Seconds an engine may take from start to ready, download of the weights included."""
    drain_timeout_s: Seconds = 600.0
    """Seconds that a replica leaving the pool may use to finish its requests; then they are cut. It should exceed
    the longest answer."""
    probe_interval_s: Seconds = 4.0
    """Seconds after which an idle engine is asked for one token; one that counts nothing although requests wait for it
    is asked after a second, a busy one never. What an idle engine costs is mostly this."""
    hang_after_s: Seconds | None = None
    """Seconds that an engine may owe that token and count nothing, not even a step, before its replica is suspect:
    gateways take it out and run its requests elsewhere, until it counts again. An engine with requests gets twice its
    longest step of the last ten minutes when that is more, and on CPUs a minute while it computes. Unset: 5, or with
    `shared_cache` a second more than twice its `mq_timeout_s`, for which a server that does not answer can block an
    engine."""
    health_probe_timeout_s: Seconds | None = None
    """The same, before the replica ends its process with the engine's, so that Serve replaces both; an engine with
    requests gets four times its longest step. Longer than `hang_after_s`. Unset: 15 more than that."""

    @model_validator(mode="after")
    def _suspect_before_replaced(self) -> Self:
        replace_s = self.health_probe_timeout_s
        if replace_s is None or replace_s > (self.hang_after_s or HANG_AFTER_S):
            return self
        message = f"an engine would be replaced after {replace_s:g} s, before it is suspect"
        if self.hang_after_s is None:
            raise refusal(
                "hang_after",
                message,
                field="health_probe_timeout_s",
                allowed=f"more than hang_after_s ({HANG_AFTER_S:g} unless set)",
                action="raise it, or lower hang_after_s",
            )
        raise refusal(
            "hang_after",
            message,
            field="hang_after_s",
            allowed=f"less than health_probe_timeout_s ({replace_s:g})",
            action="lower it, or raise health_probe_timeout_s",
        )

    @field_validator("engine_kwargs")
    @classmethod
    def _pool_keys_only(cls, value: dict[str, Any]) -> dict[str, Any]:
        _refuse_reserved(value)
        shared = sorted(SHARED_ENGINE_KWARGS & value.keys())
        if shared:
            raise PydanticCustomError(
                "shared_engine_kwarg",
                "{keys} must be the same in both pools; move it to model.engine_kwargs",
                {"keys": ", ".join(shared), "keys_list": shared},
            )
        return value


def _refuse_reserved(value: dict[str, Any]) -> dict[str, Any]:
    reserved = [key for key in value if key in RESERVED_ENGINE_KWARGS]
    if reserved:
        advice = "; ".join(f"{key}: {RESERVED_ENGINE_KWARGS[key]}" for key in reserved)
        raise PydanticCustomError(
            "reserved_engine_kwarg",
            "{keys} cannot be set here ({advice})",
            {"keys": ", ".join(reserved), "advice": advice, "keys_list": reserved},
        )
    return value
