# SPDX-License-Identifier: Apache-2.0
"""What keeps tenants apart below the gateway: the salt is in every key of every tier. vLLM's and LMCache's own code."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.request import Request

from disagg.gateway.front.tenants import mixed, salt_of

BLOCK = 16
ALICE, BOB = salt_of(b"secret", "alice"), salt_of(b"secret", "bob")
SALTS = (None, ALICE, BOB, mixed(ALICE, "mine"))


def block_hashes(salt: str | None) -> list[bytes]:
    """Hashes of the full blocks of one and the same prompt."""
    init_none_hash(sha256)
    request = Request(
        request_id="r",
        prompt_token_ids=list(range(4 * BLOCK)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    return list(request.block_hashes)


def test_no_block_of_two_salts_is_the_same() -> None:
    """Every block's hash differs, not the first one's alone, and with it the keys of host memory and disk."""
    assert block_hashes(ALICE) == block_hashes(ALICE)
    found = [block_hashes(salt) for salt in SALTS]
    assert [len(hashes) for hashes in found] == [4] * len(SALTS)
    assert len({block for hashes in found for block in hashes}) == 4 * len(SALTS)
    assert len({make_offload_key(block, 0) for hashes in found for block in hashes}) == 4 * len(SALTS)


def test_lmcache_keys_hold_the_salt() -> None:
    """Keys of objects and of look-ups differ by the salt alone, and every salt of ours is one that LMCache takes."""
    stored = ObjectKey(chunk_hash=b"\1" * 8, model_name="m", kv_rank=0)
    asked = IPCCacheServerKey.from_token_ids("m", 1, 0, list(range(32)), end=32)
    for key in (stored, asked):
        assert len({replace(key, cache_salt=salt or "") for salt in SALTS}) == len(SALTS)
