# SPDX-License-Identifier: Apache-2.0
"""The judge of the failure proofs sees what it is there to see."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.answers import Case
from tests.support.fault_cases import Known, candidates, continued, difference
from tests.support.faults import Load
from tests.support.heard import Heard, listen

CASE = Case("one", "/v1/completions", {"model": "tiny", "prompt": [1, 2], "max_tokens": 3, "return_token_ids": True})
USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
KNOWN = Known(CASE, [1, 2], [7, 8, 9], "abc", "length", USAGE)


def chunks(name: str = "cmpl-1") -> list[dict[str, Any]]:
    """A good answer."""
    head = {"id": name, "created": 1, "model": "tiny"}
    pieces: list[dict[str, Any]] = [
        {"text": "a", "token_ids": [7], "prompt_token_ids": [1, 2], "finish_reason": None},
        {"text": "b", "token_ids": [8], "finish_reason": None},
        {"text": "c", "token_ids": [9], "finish_reason": "length"},
    ]
    return [{**head, "choices": [piece]} for piece in pieces] + [{**head, "choices": [], "usage": USAGE}]


async def hear(events: list[dict[str, Any]], *, done: bool = True, status: int = 200) -> Heard:
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if done else "")
    headers = {"x-disagg-decode": "d1", "x-disagg-prefill": "p1"}
    transport = httpx.MockTransport(lambda _: httpx.Response(status, headers=headers, text=text))
    async with httpx.AsyncClient(transport=transport) as client:
        return await listen(client, "http://gateway", CASE)


async def test_a_good_answer_is_good() -> None:
    """A whole answer with the tokens that were expected is neither failed nor wrong."""
    heard = await hear(chunks())
    assert heard.failed is None
    assert difference(KNOWN, heard) is None
    assert (heard.prefill, heard.decode, heard.prompt_token_ids) == ("p1", "d1", [1, 2])
    assert heard.first is not None


async def test_a_cut_stream_has_failed() -> None:
    """A stream without [DONE] is a failure, however much of it came."""
    assert "without [DONE]" in str((await hear(chunks(), done=False)).failed)


async def test_an_error_event_is_a_failure() -> None:
    """A stream that ends with an error event and [DONE] has failed, with the server's words."""
    heard = await hear([*chunks()[:2], {"error": {"message": "the decode replica is gone"}}])
    assert "the decode replica is gone" in str(heard.failed)


async def test_another_status_is_a_failure() -> None:
    """An answer that is not 200 has failed."""
    assert str((await hear([], status=503)).failed).startswith("status 503")


def _set(event: int, **more: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(events: list[dict[str, Any]]) -> None:
        events[event]["choices"][0] |= more

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda events: events.insert(1, events[1]), "text"),
        (lambda events: events.pop(1), "text"),
        (_set(1, text="x"), "text differs at character 1"),
        (_set(1, token_ids=[10]), "token ids"),
        (_set(2, finish_reason="stop"), "finish_reason"),
        (lambda events: events[3].update(usage={**USAGE, "completion_tokens": 4}), "usage"),
        (lambda events: events[2].update(id="cmpl-2"), "id"),
        (lambda events: events[2].update(created=2), "created"),
    ],
    ids=["token twice", "token missing", "other text", "other ids", "finish", "usage", "other id", "other time"],
)
async def test_a_wrong_answer_is_wrong(change: Callable[[list[dict[str, Any]]], None], word: str) -> None:
    """Whatever differs from the expected answer is found."""
    events = chunks()
    change(events)
    heard = await hear(events)
    assert heard.failed is None
    assert word in str(difference(KNOWN, heard))


def test_a_load_counts_what_is_refused() -> None:
    """Requests that nobody takes are failures of the load, with the reason, and the load goes on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with Load(f"http://127.0.0.1:{sock.getsockname()[1]}", [KNOWN], clients=2) as load:
            load.wait_for(4, 10)
    assert len(load.failed) == len(load.heard) >= 4
    assert "ConnectError" in load.failed[0]
    assert load.wrong == []
    assert load.good_after(0.0) is None


def test_times_after_a_mark() -> None:
    """The first good answer after a mark is one that was sent after it, and the worst gap is one that ended after."""
    load = Load("http://gateway", [KNOWN])
    now = time.monotonic()
    load.heard += [
        Heard("before", now - 1, first=now, ended=now + 1, gap_s=5, gap_at=now - 0.5),
        Heard("failed", now + 1, first=now + 2, ended=now + 3, failed="cut"),
        Heard("good", now + 2, first=now + 3, ended=now + 4, gap_s=1, gap_at=now + 3.5),
    ]
    assert load.good_after(now) == pytest.approx(4)
    assert load.first_text_after(now) == pytest.approx(3)
    assert load.worst_gap(now) == 1
    assert load.worst_gap() == 5


def test_candidates_are_the_same_every_time() -> None:
    """The requests follow from the seed, over both APIs, and a continuation keeps what bounds the answer."""
    made = [candidates(8, seed=1, shortest=10, longest=50, tokens=(4, 9)) for _ in range(2)]
    assert made[0] == made[1]
    assert {case.path for case in made[0]} == {"/v1/completions", "/v1/chat/completions"}
    heard = Heard("one", 0.0, token_ids=[7, 8, 9], prompt_token_ids=[1, 2])
    resumed = continued(CASE, heard, 1)
    assert resumed.body["prompt"] == [1, 2, 7]
    assert resumed.body["max_tokens"] == 2
