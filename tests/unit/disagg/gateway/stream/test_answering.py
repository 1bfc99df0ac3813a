# SPDX-License-Identifier: Apache-2.0
"""What one answer may be: how long its prompt, how long its stream, and what follows a stream that is cut."""

from __future__ import annotations

import asyncio

import pytest

from disagg.errors import ContextLengthError, StreamLimitError
from disagg.gateway.stream.answering import apart, check_prompt_tokens, within


def test_prompt_tokens() -> None:
    """The longest prompt counts."""
    check_prompt_tokens([[1, 2], [3]], 2)
    check_prompt_tokens([], 1)
    with pytest.raises(ContextLengthError, match="2 tokens, this server takes 1") as caught:
        check_prompt_tokens([[1], [1, 2]], 1)
    assert caught.value.code == "context_length_exceeded"


def test_events_after_a_cut() -> None:
    """They begin a line of their own, without a blank one where that is so already; nothing stays nothing."""
    assert apart(b'data: {"a', b"data: b\n\n") == b"\n\ndata: b\n\n"
    assert apart(b"data: a\n", b"data: b\n\n") == b"\n\ndata: b\n\n"
    for sent in (b"", b"data: a\n\n"):
        assert apart(sent, b"data: b\n\n") == b"data: b\n\n"
    assert apart(b"data: a", b"") == b""


async def test_time_of_a_stream() -> None:
    """What ends in time ends as it does; what does not is cancelled and says so."""
    over: list[StreamLimitError] = []

    def end(error: StreamLimitError) -> bytes:
        over.append(error)
        return b"over"

    async def soon() -> bytes:
        return b"soon"

    cancelled = False

    async def never() -> bytes:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise
        return b""

    async def fails() -> bytes:
        raise TimeoutError("its own")

    assert (await within(soon(), None, end), await within(soon(), 5, end), over) == (b"soon", b"soon", [])
    assert await within(never(), 0.01, end) == b"over" and cancelled
    assert "0.01 s" in str(over[0])
    with pytest.raises(TimeoutError, match="its own"):
        await within(fails(), 5, end)
