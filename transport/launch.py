# SPDX-License-Identifier: Apache-2.0
"""From the settings of KV and the facts of one replica to vLLM's arguments and environment. Pure.

Nothing is bound, opened or exported here; whoever starts the engine does that with the result.
"""

from __future__ import annotations

from typing import Any

from transport.config import MooncakeConfig, TransportConfig
from transport.facts import EngineFacts, EngineLaunch
from transport.lmcache import lmcache_child, lmcache_env
from transport.mooncake import mooncake_child, mooncake_env
from transport.multi import multi
from transport.nixl import nixl_child, nixl_env
from transport.offload import offload_child
from transport.tiers import OffloadConfig, SharedCacheConfig

__all__ = ["EngineFacts", "EngineLaunch", "launch"]


def launch(
    transport: TransportConfig,
    facts: EngineFacts,
    *,
    offload: OffloadConfig | None = None,
    shared_cache: SharedCacheConfig | None = None,
) -> EngineLaunch:
    """What one engine needs to hand KV over (`prefill`) or to take it (`decode`), and to keep it in further tiers.

    The tiers are asked in the order transfer, host memory, shared tier.
    """
    children: list[dict[str, Any]] = []
    env: dict[str, str] = {}
    if isinstance(transport, MooncakeConfig):
        children.append(mooncake_child(transport, facts))
        env |= mooncake_env(transport, facts)
    else:
        children.append(nixl_child(transport, facts))
        env |= nixl_env(transport, facts)
    if offload is not None:
        children.append(offload_child(offload, facts))
    if shared_cache is not None:
        children.append(lmcache_child(shared_cache, facts))
        env |= lmcache_env(shared_cache)
    return EngineLaunch(env=env, kv_transfer_config=multi(children, facts))
