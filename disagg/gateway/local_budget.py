# SPDX-License-Identifier: Apache-2.0
"""How many prompt tokens decode replicas compute for this gateway at a time, so that streams there go on.

Counted on the members, from sending a request without a hand-off to the first byte of its answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from disagg.gateway.membership import Member

_BYTES_PER_TOKEN = 4
"""A rough mean over languages and tokenisers, for requests that could not be tokenised."""


def num_prompt_tokens(prompts: Sequence[Sequence[int]] | None, raw: bytes) -> int:
    """Tokens that a request makes a decode engine compute; estimated from its body when it could not be rendered."""
    return len(raw) // _BYTES_PER_TOKEN if prompts is None else sum(map(len, prompts))


def has_room(member: Member, num_tokens: int, *, limit: int) -> bool:
    """Whether a replica may compute so many more. One that computes none always may, however long the prompt."""
    taken = member.local_prefill_tokens
    return taken == 0 or taken + num_tokens <= limit


@contextlib.contextmanager
def computing(member: Member, num_tokens: int) -> Iterator[None]:
    """Count prompt tokens on a replica."""
    member.local_prefill_tokens += num_tokens
    try:
        yield
    finally:
        member.local_prefill_tokens -= num_tokens
