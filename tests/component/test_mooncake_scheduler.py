# SPDX-License-Identifier: Apache-2.0
"""Mooncake's scheduler half without an engine: which parameters it acts on, and what it offers when a request ends."""

from __future__ import annotations

import types
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from transport.errors import UpstreamChangedError
from transport.handoff_params import DO_REMOTE_DECODE, DO_REMOTE_PREFILL, HANDOFF_ID, REMOTE_DECODE
from transport.in_engine.mooncake.scheduler import Scheduler
from transport.in_engine.patches.borrowed import BORROWED
from transport.upstream.guard import require
from transport.upstream.names import Borrowed

CONSUME = {
    DO_REMOTE_PREFILL: True,
    "transfer_id": "t",
    "remote_engine_id": "p",
    "remote_bootstrap_addr": "http://10.0.0.5:8998",
}
PRODUCE = {**REMOTE_DECODE, "transfer_id": "t"}


def scheduler(role: str) -> Any:
    half = Scheduler.__new__(Scheduler)
    half.is_kv_producer, half.is_kv_consumer = role == "producer", role == "consumer"
    half.block_size, half._is_hma_required, half._has_mamba, half._bounded_replay = 16, False, False, False
    half._reqs_need_recv, half._reqs_need_send, half._reqs_not_processed, half._unread = {}, {}, set(), []
    half.kv_cache_config = types.SimpleNamespace(transfer_group_ids=(0,))
    return half


def request(params: dict[str, Any] | None, status: RequestStatus = RequestStatus.WAITING) -> Any:
    return types.SimpleNamespace(request_id="r", kv_transfer_params=params, status=status, num_prompt_tokens=32)


def finished(role: str, params: dict[str, Any], status: RequestStatus, blocks: list[int]) -> tuple[Any, Any, Any]:
    half, ended = scheduler(role), request(dict(params), status)
    return half, ended, half.request_finished(ended, (blocks,))


def test_fit_is_checked() -> None:
    """The installed vLLM has what is extended here, and one that has not is refused with the name of the method."""
    require(BORROWED, "transport.in_engine.mooncake")
    owner = "vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector:MooncakeConnectorScheduler"
    wrong = Borrowed(f"{owner}.request_finished", ("transport.in_engine.mooncake.scheduler",), holds=("no such line",))
    with pytest.raises(UpstreamChangedError, match=r"MooncakeConnectorScheduler\.request_finished .*'no such line'"):
        require([wrong], "transport.in_engine.mooncake")


@pytest.mark.parametrize(
    ("role", "params", "acts"),
    [
        ("consumer", CONSUME, True),
        ("producer", CONSUME, False),
        ("consumer", {**CONSUME, "remote_bootstrap_addr": "10.0.0.5:8998"}, False),
        ("consumer", {**CONSUME, "transfer_id": ""}, False),
        ("consumer", {k: v for k, v in CONSUME.items() if k != "remote_engine_id"}, False),
        ("consumer", {**CONSUME, "remote_engine_id": 5}, False),
    ],
    ids=["complete", "on a producer", "no URL", "empty id", "a key is missing", "not a string"],
)
def test_only_usable_parameters_are_acted_on(role: str, params: dict[str, Any], acts: bool) -> None:
    """A request with parameters that cannot work is computed where it is, instead of waiting or ending EngineCore."""
    new = request(dict(params))
    scheduler(role).on_new_request(new)
    assert new.kv_transfer_params[DO_REMOTE_PREFILL] is acts


def test_a_consumer_produces_nothing() -> None:
    """Prefill parameters on a decode engine are an ordinary request; requests without parameters pass."""
    new = request(dict(PRODUCE))
    scheduler("consumer").on_new_request(new)
    scheduler("consumer").on_new_request(request(None))
    assert new.kv_transfer_params[DO_REMOTE_DECODE] is False


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED])
def test_a_finished_prompt_is_offered(status: RequestStatus) -> None:
    """Its blocks are held, those of the prompt alone, and the request keeps the status it ended with."""
    half, ended, (held, params) = finished("producer", PRODUCE, status, [4, 5, 6])
    assert (held, params, ended.status) == (True, None, status)
    assert half._reqs_need_send["r"][1] == [[4, 5]]


def test_an_aborted_prompt_is_given_up() -> None:
    """Nothing is held, and the ranks hear of it so that they can tell who waits."""
    half, _, (held, _) = finished("producer", PRODUCE, RequestStatus.FINISHED_ABORTED, [4])
    assert not held
    assert half._reqs_not_processed == {"t"} and half._reqs_need_send == {}


@pytest.mark.parametrize(("more", "named"), [({}, "t"), ({HANDOFF_ID: "h"}, "h")])
def test_an_unread_hand_off_is_reported(more: dict[str, str], named: str) -> None:
    """A request that ends before it asked is reported once by its hand-off id, and its producer is not asked."""
    half, _, (held, _) = finished("consumer", {**CONSUME, **more}, RequestStatus.FINISHED_ABORTED, [])
    assert not held and half._reqs_need_recv == {}
    assert half.take_unread() == [named]
    assert half.take_unread() == []


def test_a_consumed_hand_off_is_not_unread() -> None:
    """A request that had asked for its KV ends without a report."""
    half, _, (held, _) = finished(
        "consumer", {**CONSUME, DO_REMOTE_PREFILL: False}, RequestStatus.FINISHED_STOPPED, [4]
    )
    assert not held and half.take_unread() == []


def test_settling_names_transfers() -> None:
    """Any id may be settled on a producer; on a consumer it means nothing."""
    producer, consumer = scheduler("producer"), scheduler("consumer")
    for half in (producer, consumer):
        half.settle(["a", "b"])
    assert (producer._reqs_not_processed, consumer._reqs_not_processed) == ({"a", "b"}, set())
