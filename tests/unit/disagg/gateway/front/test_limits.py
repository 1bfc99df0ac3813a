# SPDX-License-Identifier: Apache-2.0
"""How much one request may be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg.errors import ContextLengthError, HeadersTooLargeError, InvalidRequestError, StreamLimitError
from disagg.gateway.front.limits import apart, check_headers, check_prompt_tokens, check_prompts, within


def test_headers() -> None:
    """All of them count, with what stands between them."""
    headers = [(b"a", b"x" * 10), (b"bc", b"")]
    check_headers(headers, 21)
    with pytest.raises(HeadersTooLargeError, match="20 bytes"):
        check_headers(headers, 20)


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [1, 2, 3, 4], "a text of many characters", [], None])
def test_as_many_prompts(prompt: Any) -> None:
    """A text, a list of token ids and as many prompts as the limit pass."""
    check_prompts({"prompt": prompt}, 2)
    check_prompts({}, 2)


@pytest.mark.parametrize("prompt", [["a", "b", "c"], [[1], [2], [3]]])
def test_too_many_prompts(prompt: Any) -> None:
    """One more is refused."""
    with pytest.raises(InvalidRequestError, match="3 prompts, this server takes 2") as caught:
        check_prompts({"prompt": prompt}, 2)
    assert caught.value.param == "prompt"


def test_prompt_tokens() -> None:
    """The longest prompt counts; no limit and nothing rendered pass."""
    check_prompt_tokens([[1, 2], [3]], 2)
    check_prompt_tokens([[1] * 100], None)
    check_prompt_tokens(None, 1)
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
