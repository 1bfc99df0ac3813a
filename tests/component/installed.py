# SPDX-License-Identifier: Apache-2.0
"""The installed packages as sources that are read, and our modules whose classes extend theirs."""

from __future__ import annotations

import functools

from scripts.check_upstream import installed
from transport.upstream.sources import Sources

OURS_OVER_THEIRS = (
    "disagg.gateway.stream.splice",
    "disagg.routing.serve",
    "pools.engine.vllm_engine",
    "transport.bounded_http",
    "transport.in_engine.host_offload.specs",
    "transport.in_engine.host_offload.worker",
    "transport.in_engine.lmcache.connector",
    "transport.in_engine.mooncake.connector",
    "transport.in_engine.mooncake.door",
    "transport.in_engine.mooncake.metrics",
    "transport.in_engine.mooncake.receiver",
    "transport.in_engine.mooncake.scheduler",
    "transport.in_engine.mooncake.sender",
    "transport.in_engine.nixl.connector",
    "transport.in_engine.nixl_push.connector",
    "transport.in_engine.nixl_push.scheduler",
    "transport.in_engine.nixl_push.worker",
    "transport.in_engine.outer.connector",
    "transport.in_engine.outer.metadata",
    "transport.in_engine.outer.stats",
)


@functools.cache
def sources() -> Sources:
    """Of the environment that runs this."""
    return Sources(installed)
