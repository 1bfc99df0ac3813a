# SPDX-License-Identifier: Apache-2.0
"""Paths and headers of a replica's private HTTP, which its server and its client share. Nobody else spells them."""

from __future__ import annotations

CONTROL = "/disagg/v1/"
"""Prefix of the paths that the replica's server answers itself. It passes all others to the engine's OpenAI app."""
ABORT = CONTROL + "abort"
SETTLE = CONTROL + "settle"
PROBE = CONTROL + "probe"
RESET_PREFIX_CACHE = CONTROL + "reset_prefix_cache"
EVENTS = CONTROL + "events"
STATS = CONTROL + "stats"
HEALTH = CONTROL + "health"

COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"

ENGINE_KEY_HEADER = "x-disagg-engine-key"
"""In this header a caller sends the engine's key."""
REQUEST_ID_HEADER = "x-request-id"
"""In this header a caller sends the id by which the request can be aborted."""
