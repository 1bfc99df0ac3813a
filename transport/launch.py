# SPDX-License-Identifier: Apache-2.0
"""Makes vLLM's arguments and environment from the KV settings and the facts of one replica. Pure.

Nothing is bound, opened or exported here; the code that starts the engine does that with the result.
"""

from __future__ import annotations

from transport.config import TransportConfig
from transport.facts import EngineFacts, EngineLaunch
from transport.lmcache import lmcache_child, lmcache_env
from transport.multi import multi
from transport.offload import offload_child
from transport.tiers import OffloadConfig, SharedCacheConfig
from transport.transports import describe

__all__ = ["EngineFacts", "EngineLaunch", "launch"]


def launch(
    transport: TransportConfig,
    facts: EngineFacts,
    *,
    offload: OffloadConfig | None = None,
    shared_cache: SharedCacheConfig | None = None,
) -> EngineLaunch:
    """What one engine needs to hand KV over (`prefill`) or to take it (`decode`), and to keep it in further tiers.

    The children of MultiConnector have the order transfer, host memory, shared tier.
    """
    moves = describe(transport)
    children, env = [moves.child(facts)], moves.env(facts)
    if offload is not None:
        children.append(offload_child(offload, facts))
    if shared_cache is not None:
        children.append(lmcache_child(shared_cache, facts))
        env |= lmcache_env(shared_cache)
    return EngineLaunch(env=env, kv_transfer_config=multi(children, facts))
