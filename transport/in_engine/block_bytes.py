# SPDX-License-Identifier: Apache-2.0
"""How much memory one KV block takes, pure."""

from __future__ import annotations

from typing import Any


def block_bytes(kv_cache_config: Any) -> int:
    """Bytes of one KV block over all layers of one rank; 0 where vLLM gives no cache config or one without blocks.

    Cache groups share tensors, and a block id belongs to one group, so this holds for hybrid models too.
    Source: vLLM 0.32 `KVCacheConfig.kv_cache_tensors`.
    """
    if kv_cache_config is None or not kv_cache_config.num_blocks:
        return 0
    return int(sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors) // kv_cache_config.num_blocks)
