# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a stream and hidden from its client, and how another replica's stream becomes its rest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg.gateway.front.fields import Endpoint
from disagg.gateway.stream.resume_rules import Cut
from disagg.gateway.stream.resumed_stream import DivergedError, ResumedStream, ending, finished
from disagg.gateway.stream.sent_tokens import SentTokens

HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m"}


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def text_event(text: str, ids: list[int] | None, **fields: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
    return event({**HEAD, "choices": [choice | {"prompt_token_ids": None, "token_ids": ids} | fields]})


def chat_event(delta: dict[str, Any], ids: list[int] | None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": ids}
    return event({**HEAD, "choices": [choice | fields]})


def sent(endpoint: Endpoint, *events: bytes, client_ids: bool = False) -> SentTokens:
    tokens = SentTokens(endpoint, client_ids=client_ids)
    for each in events:
        tokens.feed(each)
    tokens.parse()
    return tokens


NASTY = ['"', "]", '","token_ids":[9]', "\n\n", "\\", "語", "\u2028", ',"token_ids":[', 'data: {"error"', "[DONE]"]


@pytest.mark.parametrize("text", NASTY)
def test_text_is_never_taken_for_a_key(text: str) -> None:
    """Whatever a token says, only the ids go, and text and ids are remembered."""
    tokens = SentTokens("completions", client_ids=False)
    assert tokens.feed(text_event(text, [5])) == text_event(text, None)
    chat = SentTokens("chat", client_ids=False)
    assert chat.feed(chat_event({"content": text}, [5])) == chat_event({"content": text}, None)
    for each in (tokens, chat):
        each.parse()
        assert (each.text, list(each.token_ids), each.refusal) == (text, [5], None)


def test_pieces_and_several_events() -> None:
    """However the bytes are cut, the same whole events come out."""
    first = text_event("a", [1], prompt_token_ids=[4, 5])
    events = [first, *(text_event(f"é{i}", [i]) for i in range(200)), text_event("", [], finish_reason="stop")]
    data = b"".join(events) + b"data: [DONE]\n\n"
    expected = data.replace(b'"prompt_token_ids":[4,5]', b'"prompt_token_ids":null')
    for i in [1, *range(200)]:
        expected = expected.replace(b'"token_ids":[%d]' % i, b'"token_ids":null')
    expected = expected.replace(b'"token_ids":[]', b'"token_ids":null')
    for size in (1, 7, 300, 5000, len(data)):
        tokens = SentTokens("completions", client_ids=False)
        out = [tokens.feed(data[i : i + size]) for i in range(0, len(data), size)]
        assert b"".join(out) == expected
        assert all(part == b"" or part.endswith(b"\n\n") for part in out)
        tokens.parse()
        assert list(tokens.token_ids) == [1, *range(200)] and tokens.text.startswith("aé0é1")
        assert (tokens.done, tokens.finish_reason, tokens.response_id, tokens.created) == (True, "stop", "cmpl-1", 7)
        assert tokens.unfinished() == b""


def test_chunks_for_ids_alone_are_dropped() -> None:
    """A chat chunk that exists only because ids were asked for does not reach who did not ask."""
    alone = chat_event({}, [3])
    tokens = SentTokens("chat", client_ids=False)
    assert tokens.feed(alone) == b""
    tokens.parse()
    assert list(tokens.token_ids) == [3]
    with_logprobs = chat_event({}, [3], logprobs={"content": []})
    assert tokens.feed(with_logprobs) == with_logprobs.replace(b"[3]", b"null")
    assert SentTokens("chat", client_ids=True).feed(alone) == alone


def test_what_rules_a_resume_out() -> None:
    """A tool call, reasoning, an event without ids or one that cannot be read; the bytes go on all the same."""
    call = {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}
    assert sent("chat", chat_event({"reasoning": "hm"}, [1])).refusal == "reasoning"
    for refusal, bad in {
        "tool_call": chat_event(call, [1]),
        "reasoning": chat_event({"content": "a", "reasoning": "hm"}, [1]),
        "no_token_ids": chat_event({"content": "a"}, None),
        "unreadable": b"data: what\n\n",
    }.items():
        tokens = SentTokens("chat", client_ids=False)
        assert tokens.feed(bad) == bad.replace(b'"token_ids":[1]', b'"token_ids":null')
        tokens.parse()
        assert tokens.refusal == refusal


@pytest.mark.parametrize(
    "fault",
    [
        event({"error": {"message": "dead", "code": 500}}),
        text_event("half", [9], finish_reason="abort"),
    ],
)
def test_a_fault_and_what_follows_stay_here(fault: bytes) -> None:
    """An engine that breaks off says so, and ends its stream as if all was well."""
    tokens = SentTokens("completions", client_ids=False)
    assert tokens.feed(text_event("a", [1]) + fault + b"data: [DONE]\n\n") == text_event("a", None)
    tokens.parse()
    assert (tokens.fault, tokens.done, list(tokens.token_ids)) == (fault, False, [1])
    refusal = event({"error": {"message": "too long", "code": 400}})
    assert SentTokens("completions", client_ids=False).feed(refusal) == refusal


def resumed(
    tokens: SentTokens, cut: Cut, *events: bytes, client_ids: bool = False, greedy: bool = True
) -> tuple[list[Any], ResumedStream]:
    stream = ResumedStream(tokens, cut, num_prompt_tokens=10, client_ids=client_ids, greedy=greedy)
    data = b"".join(stream.feed(each) for each in events)
    stream.close()
    return [json.loads(part[6:]) for part in data.split(b"\n\n") if part and part != b"data: [DONE]"], stream


def test_overlap_is_cut_and_usage_is_of_the_whole() -> None:
    """Text that comes again goes, the first replica's id and time stay, and tokens are counted from the start."""
    tokens = sent("completions", *(text_event(text, [i]) for i, text in enumerate("abcd")))
    later = {**HEAD, "id": "cmpl-2", "created": 9}
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    usage["prompt_tokens_details"] = {"cached_tokens": 11}  # type: ignore[assignment]
    events, _ = resumed(
        tokens,
        Cut(2, "cd"),
        text_event("c", [2], prompt_token_ids=[1] * 12).replace(b"cmpl-1", b"cmpl-2").replace(b":7", b":9"),
        text_event("d!", [3]),
        text_event("e", [4], finish_reason="length"),
        event({**later, "choices": [], "usage": usage}),
        b"data: [DONE]\n\n",
    )
    assert [e["choices"][0]["text"] for e in events[:-1]] == ["!", "e"]
    assert {(e["id"], e["created"]) for e in events} == {("cmpl-1", 7)}
    assert all(e["choices"][0]["token_ids"] is None for e in events[:-1])
    counted = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    assert events[-1]["usage"] == {**counted, "prompt_tokens_details": {"cached_tokens": 10}}
    assert (tokens.text, list(tokens.token_ids), tokens.done) == ("abcd!e", [0, 1, 2, 3, 4], True)


def test_lost_inside_the_overlap() -> None:
    """What the second replica did not get to was sent all the same."""
    tokens = sent("completions", *(text_event(text, [i]) for i, text in enumerate("abcd")))
    events, _ = resumed(tokens, Cut(1, "bcd"), text_event("b", [1]))
    assert events == [] and tokens.text == "abcd" and list(tokens.token_ids) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "bad",
    [
        text_event("x", [1]),
        text_event("bx", [1]),
        text_event("b", [1], finish_reason="stop"),
        chat_event({"tool_calls": [{"index": 0}]}, [1]),
        chat_event({"reasoning": "b"}, [1]),
        b"data: what\n\n",
    ],
)
def test_other_text_diverges(bad: bytes) -> None:
    """Anything but the text that was sent ends the stream."""
    with pytest.raises(DivergedError):
        resumed(sent("completions", text_event("abc", [0])), Cut(0, "abc"), text_event("a", [0]), bad)


def test_token_ids_that_the_client_has() -> None:
    """They come once, and others in their place end the stream."""

    def tokens() -> SentTokens:
        return sent("completions", *(text_event(text, [i]) for i, text in enumerate(["a", "b", ""])), client_ids=True)

    events, _ = resumed(
        tokens(), Cut(1, "b"), text_event("b", [1]), text_event("", [2]), text_event("é", [3]), client_ids=True
    )
    assert [(e["choices"][0]["text"], e["choices"][0]["token_ids"]) for e in events] == [("é", [3])]
    with pytest.raises(DivergedError):
        resumed(tokens(), Cut(1, "b"), text_event("b", [9]), client_ids=True)


def test_chat() -> None:
    """One role chunk; a call of a tool that comes later goes through, and cannot be resumed again."""
    tokens = sent("chat", chat_event({"role": "assistant", "content": ""}, None), chat_event({"content": "a"}, [1]))
    call = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}
    events, _ = resumed(
        tokens,
        Cut(1, ""),
        chat_event({"role": "assistant", "content": ""}, None),
        chat_event({}, [2]),
        chat_event({"content": "b"}, [3]),
        chat_event(call, [4]),
        chat_event({"content": ""}, [], finish_reason="tool_calls"),
    )
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas == [{"content": "b"}, call, {"content": ""}]
    assert (tokens.refusal, tokens.finish_reason, tokens.text) == ("tool_call", "tool_calls", "ab")
    fresh = SentTokens("chat", client_ids=False)
    events, _ = resumed(fresh, Cut(0, ""), chat_event({"role": "assistant", "content": ""}, None))
    assert len(events) == 1 and fresh.role_sent and fresh.response_id == "cmpl-1"


def test_offsets_of_log_probabilities_count_on() -> None:
    """`text_offset` goes on where the first replica's last token ended."""

    def with_logprobs(text: str, offset: int, token_id: int) -> bytes:
        return text_event(
            text, [token_id], logprobs={"text_offset": [offset], "tokens": [text], "token_logprobs": [-1.0]}
        )

    tokens = sent("completions", with_logprobs("ab", 0, 1), with_logprobs("cde", 2, 2))
    assert tokens.next_text_offset == 5
    events, _ = resumed(tokens, Cut(2, ""), with_logprobs("f", 0, 3), with_logprobs("g", 1, 4))
    assert [e["choices"][0]["logprobs"]["text_offset"] for e in events] == [[5], [6]]
    assert tokens.next_text_offset == 7


def test_sampling_makes_the_tail_again() -> None:
    """Tokens behind the cut that nobody saw are forgotten; other ones may come in their place."""
    tokens = sent("completions", text_event("a", [1]), text_event("", [2]))
    events, _ = resumed(tokens, Cut(1, ""), text_event("b", [9], finish_reason="stop"), greedy=False)
    assert len(events) == 1 and list(tokens.token_ids) == [1, 9]


def test_the_end_alone() -> None:
    """Only what is missing behind the last token is made up: usage if it was asked for, and `[DONE]`."""
    body = {"model": "m", "stream_options": {"include_usage": True}}
    tokens = sent("completions", text_event("a", [1]))
    assert ending(tokens, body, num_prompt_tokens=10, num_cached=0, chat=False) is None
    tokens.feed(text_event("b", [2], finish_reason="stop"))
    tokens.parse()
    usage, done, _ = (ending(tokens, body, num_prompt_tokens=10, num_cached=8, chat=False) or b"").split(b"\n\n")
    counted = {"prompt_tokens": 10, "total_tokens": 12, "completion_tokens": 2}
    assert json.loads(usage[6:])["usage"] == {**counted, "prompt_tokens_details": {"cached_tokens": 8}}
    assert done == b"data: [DONE]"
    assert ending(tokens, {"model": "m"}, num_prompt_tokens=10, num_cached=0, chat=False) == b"data: [DONE]\n\n"
    tokens.feed(b"data: [DONE]\n\n")
    assert ending(tokens, {"model": "m"}, num_prompt_tokens=10, num_cached=0, chat=False) == b""
    for chat in (True, False):
        chunk = json.loads(finished(tokens, "m", chat=chat)[6:])
        assert chunk["choices"][0]["finish_reason"] == "length" and chunk["id"] == "cmpl-1"


def test_no_usage_is_made_up_of_a_stream_that_was_not_counted() -> None:
    """Behind a tool call or reasoning tokens are not counted any more; only `[DONE]` is added."""
    body = {"model": "m", "stream_options": {"include_usage": True}}
    call = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}
    events = chat_event(call, [1]), chat_event({"content": ""}, [2], finish_reason="tool_calls")
    tokens = sent("chat", *events)
    assert tokens.refusal == "tool_call"
    assert ending(tokens, body, num_prompt_tokens=10, num_cached=0, chat=True) == b"data: [DONE]\n\n"


def test_reasoning_where_nothing_was_said_yet() -> None:
    """A stream lost before its first text may begin to reason at the next replica; then it cannot be resumed again."""
    tokens = sent("chat", chat_event({"role": "assistant", "content": ""}, None))
    events, _ = resumed(
        tokens,
        Cut(0, ""),
        chat_event({"role": "assistant", "content": ""}, None),
        chat_event({"reasoning": "a"}, None),
        chat_event({"reasoning": "b"}, [2]),
        chat_event({"content": "c"}, [3]),
        chat_event({"reasoning": "d"}, [4]),
    )
    assert [e["choices"][0]["delta"] for e in events] == [
        {"reasoning": "a"},
        {"reasoning": "b"},
        {"content": "c"},
        {"reasoning": "d"},
    ]
    assert tokens.refusal == "reasoning"
    spoken = sent("chat", chat_event({"content": "a"}, [1]))
    with pytest.raises(DivergedError):
        resumed(spoken, Cut(1, ""), chat_event({"reasoning": "b"}, [2]))
