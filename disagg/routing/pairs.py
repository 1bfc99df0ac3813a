# SPDX-License-Identifier: Apache-2.0
"""Whether a prefill and a decode replica may be a pair at all. Pure.

Replicas differ while a rolling update changes the model or an engine argument: old and new ones live side by side. KV
of the old ones must not reach the new ones, nor the other way round, even where the layouts are the same.
"""

from __future__ import annotations

from disagg.routing.views import ReplicaInfo


def misfit(prefill: ReplicaInfo, decode: ReplicaInfo) -> str | None:
    """Why the two are no pair, in words; None when they are one."""
    if prefill.block_size != decode.block_size:
        return f"KV blocks of {prefill.block_size} and {decode.block_size} tokens"
    if prefill.vocab_size != decode.vocab_size:
        return f"vocabularies of {prefill.vocab_size} and {decode.vocab_size} tokens"
    if prefill.kv_fit != decode.kv_fit:
        return "other models, or other engine arguments that KV depends on"
    return None
