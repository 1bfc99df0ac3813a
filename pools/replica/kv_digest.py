# SPDX-License-Identifier: Apache-2.0
"""A digest that is equal for engines that may use each other's KV. Pure.

NIXL's own handshake compares layouts. It does not see when two engines of the same layout have different weights, as
during a rolling update to another checkpoint.
"""

from __future__ import annotations

import hashlib
import json

from pools.config import SHARED_ENGINE_KWARGS
from pools.plan.launch import merged_engine_kwargs
from pools.replica.spec import ReplicaSpec
from transport.transports import describe

_NOT_OF_KV = frozenset(
    {
        "chat_template",
        "chat_template_content_format",
        "default_chat_template_kwargs",
        "enable_auto_tool_choice",
        "enable_prefix_caching",
        "hf_token",
        "max_model_len",
        "prefix_caching_hash_algo",
        "reasoning_parser",
        "seed",
        "skip_tokenizer_init",
        "tool_call_parser",
        "tool_parser_plugin",
        "trust_remote_code",
        "trust_request_chat_template",
    }
)
"""Shared arguments that change prompts or answers, but not the KV of a prompt's tokens."""


def kv_fit(spec: ReplicaSpec) -> str:
    """A digest of the model and of every argument on which the KV of a token or its layout depends."""
    kwargs = merged_engine_kwargs(spec.model, spec.pool, spec.platform)
    chosen = {key: kwargs[key] for key in sorted(SHARED_ENGINE_KWARGS - _NOT_OF_KV) if key in kwargs}
    facts = [spec.model.source, spec.platform, spec.engine.type, describe(spec.transport).name, chosen]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
