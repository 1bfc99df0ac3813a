# SPDX-License-Identifier: Apache-2.0
"""What a replica and its client say to each other, also when they are of different versions."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from pools.client.messages import (
    Events,
    Probe,
    ReplicaHealth,
    ReplicaStats,
    decode_body,
    is_server_fault,
    offered,
    prefill_body,
    prefill_reply,
)
from pools.client.routes import CHAT_COMPLETIONS, COMPLETIONS
from pools.engine.base import EngineStats
from transport.handoff_params import DO_REMOTE_PREFILL, REMOTE_DECODE, REMOTE_PREFILL

PARAMS = {**REMOTE_PREFILL, "remote_block_ids": [[4]], "remote_engine_id": "e"}
ENGINE = EngineStats(1, 2, 0.5, 3, 4, 5, 6, 7, 8, 9)


@pytest.mark.parametrize(
    ("type_", "least"),
    [
        (ReplicaHealth, {"incarnation": "i", "state": "ok"}),
        (Events, {"incarnation": "i", "next": 3, "lost": 0, "events": []}),
        (Probe, {"prompt_token_ids": [1]}),
    ],
)
def test_versions_mix(type_: Any, least: dict[str, Any]) -> None:
    """What an earlier version leaves out has a default, and what a later one adds is ignored."""
    assert msgspec.json.decode(json.dumps({**least, "colour": "blue"}), type=type_) == msgspec.convert(least, type_)


def test_statistics_of_another_version() -> None:
    """A statistic that is not told is 0 and not among those that were; one that is not known is dropped."""
    told = ENGINE.as_dict() | {"engine_id": "e", "num_colours": 3}
    del told["num_preemptions_total"]
    stats = ReplicaStats.from_told(told)
    assert (stats.num_requests_waiting, stats.engine_id, stats.num_preemptions_total, stats.pid) == (2, "e", 0, None)
    assert stats.as_dict() == {name: value for name, value in told.items() if name != "num_colours"}


def test_statistics_go_through_the_wire() -> None:
    """What the server makes of its engine is what the client reads."""
    made = ReplicaStats.of(ENGINE, engine_id="e", role="decode", pid=7, connections_closed={"late": 1})
    assert ReplicaStats.from_told(msgspec.json.decode(msgspec.json.encode(made.as_dict()))) == made


@pytest.mark.parametrize("broken", [{}, {**ENGINE.as_dict(), "num_requests_running": "many"}])
def test_statistics_that_cannot_be_read(broken: dict[str, Any]) -> None:
    """Without what every version tells, or with another type, they are refused."""
    with pytest.raises(ValueError):
        ReplicaStats.from_told(broken)


def test_a_count_may_come_as_a_whole_float() -> None:
    """Connectors sum some of their counters as floats."""
    assert (
        ReplicaStats.from_told({**ENGINE.as_dict(), "nixl_bytes_transferred_total": 6.0}).nixl_bytes_transferred_total
        == 6
    )


@pytest.mark.parametrize(
    ("status", "body", "offers", "complete"),
    [
        (200, {"choices": [{"finish_reason": "length"}], "kv_transfer_params": PARAMS}, True, True),
        (200, {"choices": [{"finish_reason": "length"}], "kv_transfer_params": None}, False, True),
        (200, {"choices": [{"finish_reason": "abort"}]}, False, False),
        (200, {"choices": [{"finish_reason": "stop"}]}, False, False),
        (200, {"choices": []}, False, False),
        (200, {"choices": "x"}, False, False),
        (500, {"choices": [{"finish_reason": "length"}], "kv_transfer_params": PARAMS}, False, False),
        (200, [], False, False),
    ],
)
def test_prefill_reply(status: int, body: Any, offers: bool, complete: bool) -> None:
    """A leg hands something over only when it answered and ended with its one token."""
    reply = prefill_reply(status, json.dumps(body).encode())
    assert (reply.status, reply.params, reply.complete) == (status, PARAMS if offers else None, complete)


@pytest.mark.parametrize(
    "response",
    [
        {},
        {"kv_transfer_params": None},
        {"kv_transfer_params": "text"},
        {"kv_transfer_params": []},
        {"kv_transfer_params": {**PARAMS, DO_REMOTE_PREFILL: False}},
        {"kv_transfer_params": {**PARAMS, "remote_block_ids": []}},
        {"kv_transfer_params": {**PARAMS, "remote_block_ids": None}},
    ],
    ids=["absent", "null", "text", "list", "no remote prefill", "no blocks", "null blocks"],
)
def test_an_offer_without_blocks_is_none(response: dict[str, Any]) -> None:
    """Parameters that decode could not pull with are not used."""
    assert offered(response.get("kv_transfer_params")) is None
    assert offered(PARAMS) == PARAMS


def test_an_error_event_is_the_engines_fault_only_with_a_5xx() -> None:
    """A stream that begins with a 5xx error event is tried elsewhere; one that refuses the request is passed on."""
    assert is_server_fault(b'data: {"error": {"message": "dead", "code": 500}}\n\ndata: [DONE]\n\n')
    assert not is_server_fault(b'data: {"error": {"message": "too long", "code": 400}}\n\n')
    assert not is_server_fault(b'data: {"error": "text"}\n\n')
    assert not is_server_fault(b"data: {broken\n\n")


def test_prefill_leg_holds_only_what_it_needs() -> None:
    """The prefill leg is the prompt, one token and the offer; of the request only the cache salt gets in."""
    assert json.loads(prefill_body("m", [5, 6], REMOTE_DECODE, asked={})) == {
        "model": "m",
        "prompt": [5, 6],
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "kv_transfer_params": REMOTE_DECODE,
    }
    asked = {"cache_salt": "tenant", "priority": -7, "session_id": "s", "seed": 3, "n": 2}
    sent = json.loads(prefill_body("m", (5, 6), {}, asked=asked))
    assert {name: sent.get(name) for name in asked} == {**asked, "seed": None, "n": None}


def test_chat_decode_leg_keeps_the_request() -> None:
    """A chat goes on as it came; its tokens travel inside the transfer parameters."""
    body = {"model": "m", "messages": [{"role": "user", "content": "é"}], "tools": [{}], "n": 1, "stream": True}
    sent = json.loads(decode_body(CHAT_COMPLETIONS, body, [5, 6], PARAMS))
    assert sent == {**body, "kv_transfer_params": {**PARAMS, "prompt_token_ids": [5, 6]}}
    assert "kv_transfer_params" not in body and "prompt_token_ids" not in PARAMS


@pytest.mark.parametrize(
    ("extra", "sends_ids"),
    [
        ({}, True),
        ({"echo": False, "suffix": None}, True),
        ({"echo": True}, False),
        ({"suffix": "end"}, False),
        ({"suffix": ""}, False),
    ],
    ids=["plain", "echo off", "echo", "suffix", "empty suffix"],
)
def test_completion_decode_leg_sends_ids_unless_text_is_needed(extra: dict[str, Any], sends_ids: bool) -> None:
    """Completions carry the token ids, but where the engine has to see the text."""
    body = {"model": "m", "prompt": "text", "stop": ["x"], **extra}
    sent = json.loads(decode_body(COMPLETIONS, body, [5, 6], PARAMS))
    assert sent == {**body, "prompt": [5, 6] if sends_ids else "text", "kv_transfer_params": PARAMS}
