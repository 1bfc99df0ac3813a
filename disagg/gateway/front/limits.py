# SPDX-License-Identifier: Apache-2.0
"""How much one request may be: its headers, its prompts, the time of its stream. The body's size is `intake`'s."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from disagg.errors import ContextLengthError, HeadersTooLargeError, InvalidRequestError, StreamLimitError

_HEADER_LINE_BYTES = 4
"""Colon, space and line end."""


def check_headers(headers: Iterable[tuple[bytes, bytes]], max_bytes: int) -> None:
    """Raises HeadersTooLargeError."""
    size = 0
    for name, value in headers:
        size += len(name) + len(value) + _HEADER_LINE_BYTES
    if size > max_bytes:
        raise HeadersTooLargeError(f"the request headers are larger than {max_bytes} bytes, the limit of this server")


def check_prompts(body: Mapping[str, Any], max_prompts: int) -> None:
    """Raises InvalidRequestError when a completion asks for more prompts than that. A list of token ids is one."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > max_prompts and not isinstance(prompt[0], int):
        raise InvalidRequestError(
            f"the list has {len(prompt)} prompts, this server takes {max_prompts}; send several requests",
            param="prompt",
        )


def check_prompt_tokens(prompts: Sequence[Sequence[int]] | None, max_tokens: int | None) -> None:
    """Raises ContextLengthError. What could not be rendered is refused by the engine itself."""
    if max_tokens is None or prompts is None:
        return
    longest = max(map(len, prompts), default=0)
    if longest > max_tokens:
        raise ContextLengthError(
            f"the prompt has {longest} tokens, this server takes {max_tokens}; shorten it", param="prompt"
        )


def apart(sent: bytes, events: bytes) -> bytes:
    """`events` as they follow a stream that was cut: on a line of their own, even when it stopped in mid-event.

    Args:
        sent: what was sent last; a blank line more than is needed means nothing to a reader.
        events: whole events, or nothing.
    """
    return b"\n\n" + events if events and sent and not sent.endswith(b"\n\n") else events


async def within(streaming: Awaitable[bytes], limit_s: float | None, end: Callable[[StreamLimitError], bytes]) -> bytes:
    """What `streaming` returns, or what `end` makes of it after `limit_s` seconds, when it is cancelled."""
    if limit_s is None:
        return await streaming
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            return await streaming
    except TimeoutError:
        if not limit.expired():
            raise
        return end(StreamLimitError(f"the stream took longer than {limit_s:g} s, the limit of this server"))
