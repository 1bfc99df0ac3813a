# SPDX-License-Identifier: Apache-2.0
"""What a client may ask for, by endpoint, and the fields of a body that only the gateway reads or sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disagg.routing.views import Endpoint as Endpoint
from pools.client.routes import CHAT_COMPLETIONS, COMPLETIONS

PATHS: dict[Endpoint, str] = {"chat": CHAT_COMPLETIONS, "completions": COMPLETIONS}

FORBIDDEN_FIELDS = ("kv_transfer_params", "ec_transfer_params", "kv_hints")
"""Body fields that only the gateway may send: they can crash an engine, leak other prompts' KV or name other hosts."""

STORE_FIELD = "disagg_store"
"""Body field in which a client says whether the shared cache keeps its prompt's KV: a `Store`. No engine sees it."""


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether the client of a stream asks for the event that counts its tokens."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))
