# SPDX-License-Identifier: Apache-2.0
"""The table of KV layouts, put together: every part that moves or keeps KV, and what is known of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from transport.config import TransportConfig
from transport.kv_layouts import Layouts
from transport.lmcache import LAYOUTS
from transport.mooncake.descriptor import Mooncake
from transport.nixl.descriptor import Nixl
from transport.nixl_push.descriptor import NixlPush
from transport.offload import OFFLOAD_LAYOUTS
from transport.tiers import OffloadConfig, SharedCacheConfig
from transport.transports import describe


@dataclass(frozen=True)
class Part:
    """One thing that a config can switch on."""

    name: str
    """As messages and the table call it."""
    field: str
    """Its setting, below `args`."""
    layouts: Layouts


_OFFLOAD = Part("offload", "offload", OFFLOAD_LAYOUTS)
_DISK = Part("offload.disk", "offload.disk", OFFLOAD_LAYOUTS)
_SHARED = {sink: Part(f"shared_cache (sink: {sink})", "shared_cache", layouts) for sink, layouts in LAYOUTS.items()}

PARTS: tuple[Part, ...] = (
    *(Part(kind.name, "transport", kind.layouts) for kind in (Nixl, NixlPush, Mooncake)),
    _OFFLOAD,
    _DISK,
    *_SHARED.values(),
)
"""All of them, the transports first."""


def parts_of(
    transport: TransportConfig, offload: OffloadConfig | None, shared_cache: SharedCacheConfig | None
) -> tuple[Part, ...]:
    """The parts of one application: its transport, then the tiers that it has."""
    moves = describe(transport)
    parts = [Part(moves.name, "transport", moves.layouts)]
    if offload is not None:
        parts.append(_OFFLOAD if offload.disk is None else _DISK)
    if shared_cache is not None:
        parts.append(_SHARED[shared_cache.sink])
    return tuple(parts)
