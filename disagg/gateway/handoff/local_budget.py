# SPDX-License-Identifier: Apache-2.0
"""How many prompt tokens decode replicas compute for this gateway at a time, so that streams there go on.

Counted on the members, from sending a request without a hand-off to the first byte of its answer; where that comes with
the last token, for as long as the prompt is expected to take.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from disagg.gateway.replicas.membership import Member

_BYTES_PER_TOKEN = 4
"""A rough mean over languages and tokenisers, for requests that could not be tokenised."""


def num_prompt_tokens(prompts: Sequence[Sequence[int]] | None, raw: bytes, *, max_model_len: int | None = None) -> int:
    """Tokens that a request makes a decode engine compute; estimated from its body when it could not be rendered.

    Args:
        max_model_len: tokens that the model can take, when known. An estimate beyond it is wrong: images, for one.
    """
    if prompts is not None:
        return sum(map(len, prompts))
    estimate = len(raw) // _BYTES_PER_TOKEN
    return estimate if max_model_len is None else min(estimate, max_model_len)


def has_room(member: Member, num_tokens: int, *, limit: int) -> bool:
    """Whether a replica may compute so many more. One that computes none always may, however long the prompt."""
    taken = member.local_prefill_tokens
    return taken == 0 or taken + num_tokens <= limit


@contextlib.contextmanager
def computing(member: Member, num_tokens: int, *, at_most_s: float | None = None) -> Iterator[None]:
    """Count prompt tokens on a replica, for `at_most_s` seconds where that is given. Runs in the event loop then."""
    counted = num_tokens
    member.local_prefill_tokens += counted

    def end() -> None:
        nonlocal counted
        member.local_prefill_tokens -= counted
        counted = 0

    timer = None if at_most_s is None else asyncio.get_running_loop().call_later(at_most_s, end)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        end()
