# SPDX-License-Identifier: Apache-2.0
"""Rewrites the stream of a replica that resumes: it becomes the rest of the stream that the client is reading. Pure.

Every event is parsed. It gets the id and time of the first replica. A second role chunk is dropped. Text and tokens
that the client has already are compared, then cut. Usage counts the whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from disagg.gateway.front.fields import wants_usage
from disagg.gateway.handoff.cached import Cached
from disagg.gateway.stream.resume_rules import Cut
from disagg.gateway.stream.sent_tokens import DONE, SentTokens
from pools.client.messages import is_server_fault

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class DivergedError(Exception):
    """The replica that took a stream over contradicts what the client has already."""


class ResumedStream:
    """One replica's stream as the client gets it. `sent` records what goes to the client."""

    def __init__(
        self,
        sent: SentTokens,
        cut: Cut,
        *,
        num_prompt_tokens: int,
        client_ids: bool,
        greedy: bool,
        cached: Cached | None = None,
    ) -> None:
        """Cuts `sent`: this replica makes the tokens behind the cut again, the same ones if `greedy`.

        `cached` corrects what this replica tells of cached tokens.
        """
        self._sent = sent
        self._overlap = cut.overlap
        self._text_sent = bool(sent.text)
        self._num_prompt_tokens = num_prompt_tokens
        self._num_before = cut.num_tokens
        self._client_ids = client_ids
        self._cached = cached
        again = sent.cut(cut.num_tokens)
        self._again = again if greedy else []
        self._text_offset = sent.next_text_offset
        self._partial = b""
        self.fault: bytes | None = None
        """The error event with which this engine broke off; it does not go to the client."""

    def feed(self, data: bytes) -> bytes:
        """What of `data` goes to the client. Raises DivergedError."""
        *events, self._partial = (self._partial + data).split(b"\n\n")
        return b"".join([self._event(event + b"\n\n") for event in events])

    def close(self) -> None:
        """End the stream. Puts the tokens back into `sent` that this replica did not reach: the client has them."""
        self._sent.add(self._again, "")
        self._again = []

    def _event(self, event: bytes) -> bytes:
        if self.fault is not None:
            return b""
        if event == DONE:
            self._sent.done = True
            return event
        try:
            body = _decode(event.removeprefix(b"data: "))
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise DivergedError("the replica that took the stream over sent an event that is no JSON") from exc
        if "error" in body:
            if is_server_fault(event):
                self.fault = event
                return b""
            return event
        choices = body.get("choices")
        if choices and choices[0].get("finish_reason") == "abort":
            self.fault = event
            return b""
        if choices and not self._choice(choices[0]):
            return b""
        self._head(body)
        return b"data: " + _encode(body) + b"\n\n"

    def _head(self, body: dict[str, Any]) -> None:
        sent = self._sent
        if sent.response_id is None:
            sent.response_id, sent.created = body.get("id"), body.get("created")
        body["id"], body["created"] = sent.response_id, sent.created
        if body.get("prompt_token_ids") is not None and not self._client_ids:
            body["prompt_token_ids"] = None
        if (usage := body.get("usage")) is not None:
            whole_usage(
                usage, num_prompt_tokens=self._num_prompt_tokens, num_before=self._num_before, cached=self._cached
            )
            sent.usage_sent |= not body.get("choices")

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Cut what the client has already. Returns False when nothing is left of the chunk."""
        delta = choice.get("delta")
        if delta is not None and delta.get("role") is not None and not choice.get("finish_reason"):
            first, self._sent.role_sent = not self._sent.role_sent, True
            return first
        if reasoned := delta is not None and bool(delta.get("reasoning")):
            if self._text_sent or self._overlap:
                raise DivergedError("the replica that took the stream over began to reason behind text")
            self._sent.refusal = "reasoning"
        holder, key = (choice, "text") if delta is None else (delta, "content")
        text = holder.get(key) or ""
        cut_text = self._cut_text(text)
        if text:
            holder[key] = cut_text
        new_ids = self._tokens(choice)
        if finish_reason := choice.get("finish_reason"):
            if self._overlap or (self._client_ids and self._again):
                raise DivergedError("the replica that took the stream over ended before what was sent")
            self._sent.finish_reason = finish_reason
        logprobs = choice.get("logprobs")
        if logprobs and logprobs.get("text_offset"):
            offsets = logprobs["text_offset"] = [offset + self._text_offset for offset in logprobs["text_offset"]]
            self._sent.next_text_offset = offsets[-1] + len(logprobs["tokens"][-1])
        called = delta is not None and delta.get("tool_calls")
        if called:
            if self._overlap:
                raise DivergedError("the replica that took the stream over called a tool in place of text")
            self._sent.refusal = "tool_call"
        if cut_text or called or reasoned or finish_reason:
            return True
        # A chunk that came without text goes on: the first replica would have sent it, too. A chunk that is there for
        # its ids alone goes on only to a client that asked for ids, see `sent_tokens`.
        for_ids_alone = bool(text) or (delta == {} and logprobs is None)
        return bool(new_ids) and (self._client_ids or not for_ids_alone)

    def _cut_text(self, text: str) -> str:
        """`text` less what the client has of it."""
        shared = min(len(text), len(self._overlap))
        if text[:shared] != self._overlap[:shared]:
            raise DivergedError("the replica that took the stream over gave other text than was sent")
        self._overlap = self._overlap[shared:]
        self._sent.add([], text[shared:])
        return text[shared:]

    def _tokens(self, choice: dict[str, Any]) -> list[int]:
        """Take the chunk's token ids; returns those that were not made before."""
        ids: list[int] = choice.get("token_ids") or []
        shared = min(len(ids), len(self._again))
        # A client that did not ask for ids sees only text, and the text was compared.
        if self._client_ids and ids[:shared] != self._again[:shared]:
            raise DivergedError("the replica that took the stream over gave other tokens than were sent")
        self._again = self._again[shared:]
        self._sent.add(ids, "")
        if "token_ids" in choice:
            choice["token_ids"] = ids[shared:] if self._client_ids else None
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None
        return ids[shared:]


def whole_usage(
    usage: dict[str, Any], *, num_prompt_tokens: int, num_before: int, cached: Cached | None = None
) -> None:
    """Turn one replica's usage into the usage of the whole answer.

    Args:
        num_prompt_tokens: of the client's prompt.
        num_before: tokens of the answer that were part of this replica's prompt.
        cached: corrects the replica's count of cached tokens.
    """
    usage["prompt_tokens"] = num_prompt_tokens
    usage["completion_tokens"] = (usage.get("completion_tokens") or 0) + num_before
    usage["total_tokens"] = num_prompt_tokens + usage["completion_tokens"]
    details = usage.get("prompt_tokens_details")
    if details and details.get("cached_tokens") is not None:
        told = details["cached_tokens"]
        details["cached_tokens"] = min(told if cached is None else cached.corrected(told), num_prompt_tokens)


def ending(
    sent: SentTokens, body: Mapping[str, Any], *, num_prompt_tokens: int, num_cached: int, chat: bool
) -> bytes | None:
    """The events that the client still lacks when it has the last token of the answer; None when it lacks tokens.

    A stream with a `refusal` gets no usage event, because not all of its tokens were counted.

    Args:
        num_cached: tokens of the prompt that were cached before the request.
    """
    if sent.finish_reason is None:
        return None
    events = b""
    if wants_usage(body) and not sent.usage_sent and sent.refusal is None:
        num_tokens = len(sent.token_ids)
        usage = {
            "prompt_tokens": num_prompt_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "completion_tokens": num_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
        head = _head_of(sent, body["model"], chat)
        events = b"data: " + _encode(head | {"choices": [], "usage": usage}) + b"\n\n"
    return events if sent.done else events + DONE


def finished(sent: SentTokens, model: str, *, chat: bool) -> bytes:
    """The chunk that ends an answer whose tokens were all sent, in vLLM's shape."""
    sent.finish_reason = "length"
    choice: dict[str, Any] = {"index": 0, **({"delta": {"content": ""}} if chat else {"text": ""})}
    choice |= {"logprobs": None, "finish_reason": "length", "stop_reason": None}
    choice |= {"token_ids": None} if chat else {"prompt_token_ids": None, "token_ids": None}
    return b"data: " + _encode(_head_of(sent, model, chat) | {"choices": [choice]}) + b"\n\n"


def _head_of(sent: SentTokens, model: str, chat: bool) -> dict[str, Any]:
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": sent.response_id, "object": kind, "created": sent.created, "model": model}
