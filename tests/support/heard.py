# SPDX-License-Identifier: Apache-2.0
"""One streamed answer as a client hears it: what came, when, and how it ended."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.answers import Case


@dataclass
class Heard:
    """One streamed answer. Times are `time.monotonic()`."""

    name: str
    """Of the case that was sent."""
    started: float
    first: float | None = None
    """When the first text came."""
    ended: float | None = None
    gap_s: float = 0.0
    """The longest time between two pieces of text."""
    gap_at: float = 0.0
    """When the longest gap ended."""
    prefill: str = ""
    """What `x-disagg-prefill` says."""
    decode: str = ""
    """The replica that began the answer, by `x-disagg-decode`."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    finish: str | None = None
    usage: dict[str, int] | None = None
    names: set[tuple[str, int, str]] = field(default_factory=set)
    """`id`, `created` and `model` of its chunks; one of them in a good answer."""
    status: int | None = None
    failed: str | None = None
    """Why there is no whole answer."""
    wrong: str | None = None
    """What differs from the answer that was expected."""
    _last: float = 0.0

    @property
    def good(self) -> bool:
        return self.ended is not None and self.failed is None and self.wrong is None

    def take(self, event: dict[str, Any], now: float) -> None:
        """One event of the stream, of either API."""
        self.names.add((event["id"], event["created"], event["model"]))
        if event.get("usage"):
            self.usage = {key: event["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        self.prompt_token_ids = event.get("prompt_token_ids") or self.prompt_token_ids
        for piece in event["choices"]:
            self.prompt_token_ids = piece.get("prompt_token_ids") or self.prompt_token_ids
            self.token_ids += piece.get("token_ids") or ()
            self.finish = piece.get("finish_reason") or self.finish
            text = piece.get("text") or (piece.get("delta") or {}).get("content") or ""
            if text:
                self._timed(now)
                self.text += text

    def _timed(self, now: float) -> None:
        if self.first is None:
            self.first = now
        elif now - self._last > self.gap_s:
            self.gap_s, self.gap_at = now - self._last, now
        self._last = now


async def listen(client: httpx.AsyncClient, url: str, case: Case, heard: Heard | None = None) -> Heard:
    """Send a streaming request and hear it to its end. Raises nothing: what went wrong is in `failed`.

    Args:
        heard: filled while the answer comes, for somebody who watches; a new one without it.
    """
    heard = heard or Heard(case.name, time.monotonic())
    done = False
    try:
        async with client.stream("POST", url + case.path, json=case.body) as response:
            heard.status = response.status_code
            if response.status_code != 200:
                heard.failed = f"status {response.status_code}: {(await response.aread())[:300]!r}"
                return heard
            heard.prefill = response.headers.get("x-disagg-prefill", "")
            heard.decode = response.headers.get("x-disagg-decode", "")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        heard.failed = f"error event after {len(heard.text)} characters: {event['error']}"
                    else:
                        heard.take(event, time.monotonic())
        if not done and heard.failed is None:
            heard.failed = f"the stream ended after {len(heard.text)} characters without [DONE]"
    except (httpx.HTTPError, ValueError, KeyError) as exc:
        heard.failed = f"{type(exc).__name__}: {exc} (after {len(heard.text)} characters)"
    finally:
        heard.ended = time.monotonic()
    return heard
