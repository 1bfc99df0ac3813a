# SPDX-License-Identifier: Apache-2.0
"""The names of `kv_transfer_params`, in which gateway and engines speak of one hand-off. Pure.

This is the one place that spells the names which gateway, replica and connectors share. `do_remote_*` is vLLM's (0.32),
`lmcache.*` is LMCache's, `disagg.*` is ours. A transport spells any further names that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Store = Literal["never", "always"]
"""What a client may say about storing KV in the shared tier. When it says nothing, the tier's `sink` decides."""

HANDOFF_ID = "disagg.handoff_id"
"""In both legs: the id under which engines report what became of the KV."""
SETTLE = "disagg.settle"
"""In a request that is over before it is scheduled: ids of hand-offs that nobody will read."""
STORE = "disagg.store"
"""In a prefill leg: a `Store`."""
MAX_OFFLOAD_TOKENS = "lmcache.max_offload_tokens"
"""In any request: 0 keeps LMCache from storing anything of it."""

DO_REMOTE_DECODE = "do_remote_decode"
"""In a prefill leg, true: hold the KV for a decode engine."""
DO_REMOTE_PREFILL = "do_remote_prefill"
"""In a decode leg, true: the KV is in another engine."""
PREFILL_HAD = "remote_prefill_cached_tokens"
"""In a decode leg that follows the prefill leg's answer: prompt tokens that the prefill engine had cached."""

REMOTE_DECODE: Mapping[str, Any] = {DO_REMOTE_DECODE: True, DO_REMOTE_PREFILL: False}
"""What makes a request a prefill leg."""
REMOTE_PREFILL: Mapping[str, Any] = {DO_REMOTE_DECODE: False, DO_REMOTE_PREFILL: True}
"""What makes a request a decode leg."""
NOT_STORED: Mapping[str, Any] = {STORE: "never", MAX_OFFLOAD_TOKENS: 0}
"""Parameters of a request whose KV the shared cache leaves alone."""

_WARM_PREFIX = "warm-"


def offer_params(handoff_id: str, store: Store | None = None) -> dict[str, Any]:
    """Parameters of a prefill leg, whatever the transport."""
    params: dict[str, Any] = {**REMOTE_DECODE, HANDOFF_ID: handoff_id}
    if store is not None:
        params[STORE] = store
    if store == "never":
        params[MAX_OFFLOAD_TOKENS] = 0
    return params


def settle_params(handoff_ids: Sequence[str]) -> dict[str, Any]:
    """Parameters of the request that tells an engine's connector what nobody will read."""
    return {SETTLE: list(handoff_ids)}


def handoff_id_of(params: Mapping[str, Any], otherwise: object) -> str:
    """The hand-off's id. A leg without an id of ours gets `otherwise`, the engine's own name for the hand-off."""
    return str(params.get(HANDOFF_ID) or otherwise)


def warm_up_id(unique: str) -> str:
    """Id of a hand-off with which a gateway warms a pair. No request's hand-off has such an id; no ledger counts it."""
    return _WARM_PREFIX + unique


def is_warm_up(handoff_id: str) -> bool:
    """Whether a gateway warms, or warmed, a pair with this hand-off."""
    return handoff_id.startswith(_WARM_PREFIX)
