# SPDX-License-Identifier: Apache-2.0
"""Remembers what a client was sent of a stream, and hides that the gateway asked the engine for token ids.

In each chunk, `,"token_ids":[...]` becomes `,"token_ids":null`, as vLLM 0.32 writes it for a client that did not ask.
The gateway searches for these bytes: inside a JSON string every quote is escaped, so they are always a key of the chunk
and never text. Only whole events go on, so that a lost engine leaves no half event behind. Events are parsed in
batches.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from disagg.gateway.front.fields import Endpoint
from disagg.gateway.handoff.token_ids import without_ids
from pools.client.messages import is_server_fault

DONE = b"data: [DONE]\n\n"
_END = b"\n\n"
_IDS = b',"token_ids":['
_ERROR = b'data: {"error"'
_ABORTED = b'"finish_reason":"abort"'
_EMPTY = b'"delta":{},"logprobs":null,"finish_reason":null'
"""In a chat chunk that vLLM writes for its token ids alone, because its parsers have made nothing of the token yet."""
_PLAIN: dict[Endpoint, bytes] = {
    "chat": b'"},"logprobs":null,"finish_reason":null,"token_ids":[',
    "completions": b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":[',
}
"""What stands before the ids in a chunk that holds only text. Almost all chunks do."""
_PLAIN_END = b"]}]}\n\n"
_BATCH = 64


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    role: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Logprobs(msgspec.Struct, gc=False):
    text_offset: list[int] | None = None
    tokens: list[str] | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice]
    id: str | None = None
    created: int | None = None
    usage: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Event).decode
# For chunks that hold only text, which are most of a stream: only the fields that they add are read.


class _TextDelta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None


class _TextChoice(msgspec.Struct, gc=False):
    token_ids: list[int]
    text: str = ""
    delta: _TextDelta | None = None


class _TextEvent(msgspec.Struct, gc=False):
    choices: list[_TextChoice]


_decode_texts = msgspec.json.Decoder(_TextEvent).decode_lines


class SentTokens:
    """One client's stream so far. The first replica's bytes go through `feed`; `add` records those of later replicas.

    Attributes are valid after `parse`.

    Attributes:
        token_ids: ids of the answer's tokens, as far as engines told of them.
        response_id, created: of the first chunk; later chunks carry the same.
        role_sent: whether the client has a chat's first chunk.
        finish_reason: as sent, or None.
        usage_sent, done: whether the client has the usage chunk, and `[DONE]`.
        next_text_offset: `text_offset` of the next token's log-probability in a completion.
        refusal: why no replica can resume this stream, or None.
        fault: the error event with which the engine broke off, which the client did not get; or None.
    """

    def __init__(self, endpoint: Endpoint, *, client_ids: bool) -> None:
        """`client_ids`: whether the client asked for token ids itself, and so gets them."""
        self._client_ids = client_ids
        self._plain = _PLAIN[endpoint]
        self._partial = b""
        self._events: list[bytes] = []
        self._texts: list[str] = []
        self.token_ids = array("I")
        self.response_id: str | None = None
        self.created: int | None = None
        self.role_sent = False
        self.finish_reason: str | None = None
        self.usage_sent = False
        self.done = False
        self.next_text_offset = 0
        self.refusal: str | None = None
        self.fault: bytes | None = None

    def feed(self, data: bytes) -> bytes:
        """What of `data` goes to the client now. Never raises: what it cannot read goes on as it is."""
        # No newline is inside an event of vLLM's: JSON escapes them.
        if not self._partial and len(data) > 1 and data.find(b"\n") == len(data) - 2:
            return self._event(data)
        return self._feed_events(data)

    def unfinished(self) -> bytes:
        """What is left of a stream that ended in the middle of an event."""
        partial, self._partial = self._partial, b""
        return partial

    @property
    def text(self) -> str:
        """All text sent."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def parse(self) -> None:
        """Bring the attributes up to date."""
        events, self._events = self._events, []
        if self.refusal is not None or not events:
            return
        texts: list[str] = []
        try:
            for event in _decode_texts(b"".join(events)):
                choice = event.choices[0]
                delta = choice.delta
                self.token_ids.extend(choice.token_ids)
                if delta is None:
                    texts.append(choice.text)
                elif delta.content is not None and not delta.reasoning:
                    texts.append(delta.content)
                else:
                    self.refusal = "reasoning" if delta.reasoning else "unreadable"
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.refusal = "unreadable"
        self._texts.append("".join(texts))

    def add(self, token_ids: list[int], text: str) -> None:
        """Record a later replica's chunk: its token ids, and the text of it that the client got."""
        self.token_ids.extend(token_ids)
        if text:
            self._texts.append(text)

    def cut(self, num_tokens: int) -> list[int]:
        """Forget all ids but the first `num_tokens`; returns those forgotten."""
        behind = self.token_ids[num_tokens:].tolist()
        del self.token_ids[num_tokens:]
        return behind

    def _feed_events(self, data: bytes) -> bytes:
        if self._partial:
            data = self._partial + data
        end = data.rfind(_END) + 2
        if end == 1:
            self._partial = data
            return b""
        self._partial = data[end:]
        return b"".join([self._event(event + _END) for event in data[: end - 2].split(_END)])

    def _event(self, event: bytes) -> bytes:
        """One event as the client gets it."""
        end = len(event) - len(_PLAIN_END)
        start = event.rfind(b"[", 0, end)
        if start > 0 and event.endswith(self._plain, 0, start + 1) and event.endswith(_PLAIN_END) and not self.fault:
            self._events.append(event[6:])
            if len(self._events) >= _BATCH:
                self.parse()
            return event if self._client_ids else event[:start] + b"null" + event[end + 1 :]
        return self._other_event(event)

    def _other_event(self, event: bytes) -> bytes:
        """As `_event`, for events with more than text: first, last, usage, log-probabilities, tool calls, errors."""
        if self.fault is not None:
            return b""
        if event == DONE:
            self.done = True
            return event
        if _is_fault(event):
            self.fault = event
            return b""
        self.parse()
        try:
            self._take(_decode(event[6:]))
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.refusal = self.refusal or "unreadable"
        if self._client_ids:
            return event
        if _EMPTY in event and _IDS in event:
            return b""
        return without_ids(event)

    def _take(self, event: _Event) -> None:
        if self.response_id is None:
            self.response_id, self.created = event.id, event.created
        if not event.choices:
            self.usage_sent |= event.usage is not None
            return
        choice = event.choices[0]
        self.finish_reason = choice.finish_reason or self.finish_reason
        self.token_ids.extend(choice.token_ids or ())
        text = choice.text
        if choice.delta is not None:
            text = choice.delta.content
            self.role_sent |= choice.delta.role is not None
            if choice.delta.tool_calls:
                self.refusal = "tool_call"
            elif choice.delta.reasoning:
                self.refusal = "reasoning"
        if text:
            self._texts.append(text)
            if not choice.token_ids:
                # The engine told no ids for this text, so no replica can continue behind it.
                self.refusal = self.refusal or "no_token_ids"
        if choice.logprobs is not None and choice.logprobs.text_offset and choice.logprobs.tokens:
            self.next_text_offset = choice.logprobs.text_offset[-1] + len(choice.logprobs.tokens[-1])


def fault_in(ending: bytes) -> bytes | None:
    """The event in which an engine says that it broke off, if one is in the end of a stream that cannot be resumed."""
    for event in ending.split(_END):
        if _is_fault(event):
            return event
    return None


def _is_fault(event: bytes) -> bool:
    return _ABORTED in event or (event.startswith(_ERROR) and is_server_fault(event))
