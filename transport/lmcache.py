# SPDX-License-Identifier: Apache-2.0
"""LMCacheMPConnector, the shared tier, as a child of MultiConnector: its entry in `kv_transfer_config`. Pure."""

from __future__ import annotations

from typing import Any

from transport.facts import EngineFacts
from transport.tiers import ExternalServerConfig, SharedCacheConfig

_MODULE = "transport.in_engine.lmcache.connector"
_CUDA_TIMEOUTS = 10
"""With an accelerator the server itself copies, and may still run a copy that an engine has given up. So an engine
waits this many times `mq_timeout_s` before it gives the blocks away. On a CPU the engine copies."""


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
