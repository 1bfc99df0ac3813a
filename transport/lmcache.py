# SPDX-License-Identifier: Apache-2.0
"""LMCacheMPConnector, the shared tier, as a child of MultiConnector: its entry in `kv_transfer_config`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from transport.facts import EngineFacts
from transport.kv_layouts import NO_ENCODER_DECODER, Known, KvLayout, Layouts, on_both
from transport.tiers import ExternalServerConfig, SharedCacheConfig, Sink

_MODULE = "transport.in_engine.lmcache.connector"
_CUDA_TIMEOUTS = 10
"""With an accelerator the server itself copies, and may still run a copy that an engine has given up. So an engine
waits this many times `mq_timeout_s` before it gives the blocks away. On a CPU the engine copies."""

_REMOVE = "remove shared_cache; offload keeps KV in host memory"
_ONE_GROUP = "LMCache 0.5.6 takes one group of KV where the engine itself copies it, as on platform cpu"
_ONE_GROUP_ERROR = "engine-driven transfer does not support multiple KV transfer groups"
_NO_ENCODER_DECODER = replace(NO_ENCODER_DECODER, error="LMCache cannot serve this model's KV cache groups")
_REFUSED_ON_CPU: Mapping[KvLayout, Known] = {
    "full_and_sliding_window": Known(
        "refused",
        _ONE_GROUP,
        "set model.engine_kwargs.disable_hybrid_kv_cache_manager: true, by which vLLM keeps every token in every "
        f"layer, or {_REMOVE}",
        _ONE_GROUP_ERROR,
    ),
    "mamba": Known("refused", _ONE_GROUP, _REMOVE, _ONE_GROUP_ERROR),
    "short_conv": Known("refused", _ONE_GROUP, _REMOVE, _ONE_GROUP_ERROR),
    "cross_attention": _NO_ENCODER_DECODER,
}
"""Source: LMCache 0.5.6 `EngineDrivenTransferContext.register`, `validate_kv_cache_groups`."""
_MLA_IS_NOT_STORED = Known(
    "refused",
    "on a CPU without AMX vLLM turns prefix caching off for MLA, and LMCache stores nothing without it",
    _REMOVE,
    "lmcache.mp.lazy_offload requires vLLM prefix caching",
)
"""Source: vLLM 0.32 `CpuPlatform.check_and_update_config`, LMCache 0.5.6 `LMCacheMPConnector.__init__`."""
_MLA_IS_NOT_FOUND = Known(
    "partly",
    "no engine on a CPU without AMX stores any KV of MLA, so there is nothing to read",
    _REMOVE,
)
_DROPPED = Known(
    "partly",
    "vLLM drops what has fallen out of the window, so sinks unused and evicted store nothing of a longer prompt",
    "set shared_cache.sink: write_through",
)
"""Of layers with a window. Source: `transport.in_engine.lmcache.sink.leading_tokens`, and for LMCache's own policy a
look at an engine."""
_BLOCKS_OF_STATES = Known(
    "unseen",
    action="set shared_cache.server.chunk_tokens to a multiple of the KV block that vLLM's "
    "log names, and compare answers with and without the cache before you rely on it",
)
"""vLLM makes a KV block as large as a state."""


def _layouts(sink: Sink) -> Layouts:
    mla = _MLA_IS_NOT_FOUND if sink == "off" else _MLA_IS_NOT_STORED
    cpu = {**_REFUSED_ON_CPU, "mla_attention": mla}
    cuda: dict[KvLayout, Known] = {
        "mamba": _BLOCKS_OF_STATES,
        "short_conv": _BLOCKS_OF_STATES,
        "cross_attention": _NO_ENCODER_DECODER,
    }
    if sink in ("unused", "evicted"):
        cpu["sliding_window"] = _DROPPED
        cuda["sliding_window"] = cuda["full_and_sliding_window"] = replace(_DROPPED, state="unseen")
    return on_both(cpu=cpu, cuda=cuda)


LAYOUTS: dict[Sink, Layouts] = {sink: _layouts(sink) for sink in get_args(Sink)}
"""By what prefill engines store."""


def lmcache_child(config: SharedCacheConfig, facts: EngineFacts) -> dict[str, Any]:
    """The LMCacheMPConnector entry for one engine, JSON-able.

    Decode engines only load, and so do prefill engines without a sink: LMCache's own role for that is `kv_consumer`.
    Without `facts.lmcache_url` (nothing is started yet) the address is the configured one; port 0 then stands for a
    port that the kernel chooses.

    Source:
        LMCache 0.5.6 `lmcache_mp_connector.py`, `vllm_multi_process_adapter.py`: keys of `kv_connector_extra_config`.
    """
    host, _, port = _server_url(config, facts).rpartition(":")
    sink = config.sink if facts.role == "prefill" else "off"
    extra: dict[str, Any] = {
        "lmcache.mp.host": host,
        "lmcache.mp.port": int(port),
        "lmcache.mp.mq_timeout": config.mq_timeout_s,
        "lmcache.mp.heartbeat_interval": config.heartbeat_interval_s,
        "lmcache.mp.mp_transfer_mode": "auto",
        "disagg.sink": sink,
        "disagg.operation_timeout": config.mq_timeout_s * (_CUDA_TIMEOUTS if facts.platform == "cuda" else 1),
    }
    if sink != "off":
        extra["lmcache.mp.lazy_offload"] = True
    if sink == "evicted":
        extra["lmcache.mp.lazy_offload_policy"] = "EVICTION_AWARE"
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": _MODULE,
        "kv_role": "kv_consumer" if sink == "off" else "kv_both",
        "kv_buffer_device": facts.platform,
        "kv_connector_extra_config": extra,
    }


def lmcache_env(config: SharedCacheConfig) -> dict[str, str]:
    """Environment of an engine that talks to an LMCache server."""
    return {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}


def _server_url(config: SharedCacheConfig, facts: EngineFacts) -> str:
    if facts.lmcache_url is not None:
        return facts.lmcache_url
    if isinstance(config.server, ExternalServerConfig):
        return config.server.url
    return f"tcp://{facts.host}:{config.server.port or 0}"
