# SPDX-License-Identifier: Apache-2.0
"""Query parameters of `/admin/v1/handoffs`, and what they let pass."""

from __future__ import annotations

import json

import pytest

from disagg.errors import InvalidRequestError
from disagg.gateway.ledger.ledger import Ledger
from disagg.gateway.ledger.query import DEFAULT_LIMIT, MAX_LIMIT, PARAMETERS, Filter, listed, parse
from tests.support.heard_events import told
from tests.unit.disagg.gateway.ledger.test_ledger import D0, P0, P1, ended, loaded, produced, rescued


@pytest.fixture
def ledger() -> Ledger:
    """1 consumed, 2 rescued and reused, 3 open on another replica, 4 announced only."""
    made = Ledger()
    for number, prefill in ((1, P0), (2, P0), (3, P1), (4, P0)):
        made.open(f"gw-{number}", f"request-{number}", prefill, D0, 100, f"tenant-{number % 2}")
    told(made, P0, produced("gw-1", at=1.0))
    told(made, P0, produced("gw-2", at=2.0))
    told(made, P1, produced("gw-3", at=3.0))
    told(made, P0, ended("gw-1", "consumed"))
    told(made, P0, rescued("gw-2", "a"))
    told(made, D0, loaded("a"))
    return made


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, "321"),
        ({"outcome": "consumed"}, "1"),
        ({"outcome": "open"}, "3"),
        ({"outcome": "rescued"}, "2"),
        ({"outcome": "stored"}, "2"),
        ({"outcome": "reused"}, "2"),
        ({"outcome": "failed"}, ""),
        ({"replica": "p0"}, "21"),
        ({"replica": "d0"}, "321"),
        ({"replica": "x"}, ""),
        ({"request_id": "request-3"}, "3"),
        ({"tenant": "tenant-1"}, "31"),
        ({"tenant": "tenant"}, ""),
        ({"since": "2"}, "32"),
        ({"since": "2.5", "replica": "p0"}, ""),
        ({"limit": "2"}, "32"),
        ({"limit": "0"}, ""),
    ],
)
def test_filters(ledger: Ledger, query: dict[str, str], expected: str) -> None:
    """All given filters must hold; newest first."""
    answer = listed(ledger, parse(query.items()))
    assert "".join(record["handoff_id"].removeprefix("gw-") for record in answer["records"]) == expected
    assert answer["totals"]["produced"] == {"count": 3, "tokens": 300, "bytes": 3000}
    assert (answer["num_open"], answer["balanced"]) == (1, True)
    json.dumps(answer)


def test_record(ledger: Ledger) -> None:
    """A record says who, what, when and why."""
    ledger.note("gw-2", "client_left")
    (record,) = listed(ledger, Filter(outcome="rescued"))["records"]
    assert record == {
        "handoff_id": "gw-2",
        "request_id": "request-2",
        "tenant": "tenant-0",
        "prefill": {"replica_id": "p0", "incarnation": "p0-1"},
        "decode": {"replica_id": "d0", "incarnation": "d0-1"},
        "outcome": "rescued",
        "reason": "client_left",
        "tokens": 100,
        "bytes": 1000,
        "produced_at": 2.0,
        "ended_at": 3.0,
        "lease_left_s": None,
        "stored_tokens": 32,
        "stored_bytes": 320,
        "reused_tokens": 32,
        "reused_at": 4.0,
    }


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ([("outcome", "eaten")], "outcome"),
        ([("outcome", "")], "outcome"),
        ([("outcome", "open"), ("outcome", "open")], "outcome"),
        ([("outcomes", "open")], "outcomes"),
        ([("replica", "")], "replica"),
        ([("since", "yesterday")], "since"),
        ([("since", "-1")], "since"),
        ([("since", "nan")], "since"),
        ([("since", "inf")], "since"),
        ([("limit", "-1")], "limit"),
        ([("limit", "1.5")], "limit"),
        ([("limit", "10001")], "limit"),
        ([("limit", "²")], "limit"),
        ([("limit", "9" * 10_000)], "limit"),
    ],
)
def test_bad_filters(query: list[tuple[str, str]], param: str) -> None:
    """A filter that cannot be used is refused, and named."""
    with pytest.raises(InvalidRequestError) as caught:
        parse(query)
    assert caught.value.param == param


def test_documented_parameters_are_those_read() -> None:
    """Every parameter of the OpenAPI document is taken, with its default and its limit."""
    schemas = {parameter["name"]: parameter["schema"] for parameter in PARAMETERS}
    assert schemas.keys() == vars(Filter()).keys()
    for outcome in schemas["outcome"]["enum"]:
        assert parse([("outcome", outcome)]).outcome == outcome
    assert parse([]) == Filter(limit=DEFAULT_LIMIT)
    assert parse([("limit", str(MAX_LIMIT))]).limit == schemas["limit"]["maximum"]
