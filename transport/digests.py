# SPDX-License-Identifier: Apache-2.0
"""Names for chunks of a prompt, equal in every process, so that a stored chunk is recognised when it is loaded. Pure.

They are names in reports, not keys: LMCache and vLLM hash tokens in their own ways.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

_DIGEST_BYTES = 8


def chunk_digests(token_ids: Sequence[int], chunk_tokens: int, salt: str | None = None) -> list[str]:
    """One digest of 16 hex digits for each full chunk of `chunk_tokens` tokens.

    A digest covers its chunk and all before it, so equal digests mean equal prefixes. Tokens after the last full chunk
    are left out. `salt` separates users who must not share KV (vLLM's `cache_salt`); None and "" are the same.
    """
    digests: list[str] = []
    previous = hashlib.blake2b((salt or "").encode(), digest_size=_DIGEST_BYTES).digest()
    for end in range(chunk_tokens, len(token_ids) + 1, chunk_tokens):
        tokens = array("q", token_ids[end - chunk_tokens : end]).tobytes()
        previous = hashlib.blake2b(previous + tokens, digest_size=_DIGEST_BYTES).digest()
        digests.append(previous.hex())
    return digests
