# SPDX-License-Identifier: Apache-2.0
"""Names in `kv_transfer_params` that every transport shares: the two directions of vLLM, and ours."""

from __future__ import annotations

from typing import Any

REMOTE_DECODE: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""Of a prefill leg: another engine decodes."""
REMOTE_PREFILL: dict[str, Any] = {"do_remote_decode": False, "do_remote_prefill": True}
"""Of a decode leg: another engine has computed the prompt, or does."""

HANDOFF_ID = "disagg.handoff_id"
"""In both legs: the id under which engines report what became of the KV."""
