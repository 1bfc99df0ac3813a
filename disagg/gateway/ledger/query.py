# SPDX-License-Identifier: Apache-2.0
"""`/admin/v1/handoffs`: from query parameters to a filter, and from the ledger to JSON. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from disagg.errors import InvalidRequestError
from disagg.gateway.ledger.ledger import Ledger, Record
from disagg.observability.outcomes import ENDS

OUTCOMES = ("open", *ENDS, "stored", "reused")
"""Values of `outcome`: what became of the hand-off, or what the shared cache did with it."""
GATEWAYS = ("own", "other")
"""Values of `gateway`: whose hand-offs, this gateway replica's or those that the others made."""
MAX_LIMIT = 10_000
DEFAULT_LIMIT = 100

PARAMETERS: list[dict[str, Any]] = [
    {"name": name, "in": "query", "required": False, "description": description, "schema": schema}
    for name, description, schema in (
        ("outcome", "Only records that ended so, or are stored or reused.", {"type": "string", "enum": [*OUTCOMES]}),
        (
            "gateway",
            "Hand-offs of the gateway replica that answers, or what it heard of those of all others.",
            {"type": "string", "enum": [*GATEWAYS], "default": "own"},
        ),
        ("replica", "Only records of this replica, on either side.", {"type": "string", "minLength": 1}),
        ("request_id", "Only records of this request.", {"type": "string", "minLength": 1}),
        ("tenant", "Only records of requests with a key of this tenant.", {"type": "string", "minLength": 1}),
        ("since", "Only records produced at or after this time, in unix seconds.", {"type": "number", "minimum": 0}),
        (
            "limit",
            "Records to return at most, the newest first.",
            {"type": "integer", "minimum": 0, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
        ),
    )
]
"""The query parameters in the OpenAPI document."""


@dataclass(frozen=True)
class Filter:
    """Which records to show; None lets all pass."""

    outcome: str | None = None
    replica: str | None = None
    request_id: str | None = None
    tenant: str | None = None
    since: float | None = None
    limit: int = DEFAULT_LIMIT
    gateway: str = "own"
    """Which books to read. `passes` does not look at it."""

    def passes(self, record: Record) -> bool:
        return (
            (self.outcome is None or _is(record, self.outcome))
            and (self.replica is None or self.replica in (record.prefill_id, record.decode_id))
            and (self.request_id is None or record.request_id == self.request_id)
            and (self.tenant is None or record.tenant == self.tenant)
            and (self.since is None or (record.produced_at or 0.0) >= self.since)
        )


def parse(items: Iterable[tuple[str, str]]) -> Filter:
    """The filter that query parameters describe. Raises InvalidRequestError, naming the parameter."""
    given: dict[str, str] = {}
    known = [parameter["name"] for parameter in PARAMETERS]
    for name, value in items:
        if name not in known:
            raise InvalidRequestError(f"unknown parameter {name!r}; there are {', '.join(known)}", param=name)
        if name in given:
            raise InvalidRequestError(f"{name} is given twice", param=name)
        if not value:
            raise InvalidRequestError(f"{name} is empty", param=name)
        given[name] = value
    if (outcome := given.get("outcome")) is not None and outcome not in OUTCOMES:
        raise InvalidRequestError(f"outcome must be one of {', '.join(OUTCOMES)}", param="outcome")
    if (gateway := given.get("gateway", "own")) not in GATEWAYS:
        raise InvalidRequestError(f"gateway must be one of {', '.join(GATEWAYS)}", param="gateway")
    return Filter(
        gateway=gateway,
        outcome=outcome,
        replica=given.get("replica"),
        request_id=given.get("request_id"),
        tenant=given.get("tenant"),
        since=_seconds(given["since"]) if "since" in given else None,
        limit=_limit(given["limit"]) if "limit" in given else DEFAULT_LIMIT,
    )


def listed(ledger: Ledger, chosen: Filter) -> dict[str, Any]:
    """The books and the records that pass, newest first."""
    found = (record for record in ledger.records() if chosen.passes(record))
    newest = heapq.nlargest(chosen.limit, found, key=lambda record: record.number)
    return {
        "totals": {word: asdict(total) for word, total in ledger.totals.items()},
        "num_open": ledger.num_open,
        "balanced": ledger.balanced,
        "records": [as_json(record) for record in newest],
    }


def as_json(record: Record) -> dict[str, Any]:
    """One record; times are unix seconds."""
    return {
        "handoff_id": record.handoff_id,
        "request_id": record.request_id,
        "tenant": record.tenant,
        "prefill": {"replica_id": record.prefill_id, "incarnation": record.prefill_incarnation},
        "decode": None
        if record.decode_id is None
        else {"replica_id": record.decode_id, "incarnation": record.decode_incarnation},
        "outcome": record.outcome,
        "reason": record.reason,
        "tokens": record.tokens,
        "bytes": record.bytes,
        "produced_at": record.produced_at,
        "ended_at": record.ended_at,
        "lease_left_s": record.lease_left_s,
        "stored_tokens": record.stored_tokens,
        "stored_bytes": record.stored_bytes,
        "reused_tokens": record.reused_tokens,
        "reused_at": record.reused_at,
    }


def _is(record: Record, outcome: str) -> bool:
    if outcome == "stored":
        return record.stored_tokens > 0
    if outcome == "reused":
        return record.reused_at is not None
    return record.outcome == outcome


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InvalidRequestError("since must be a time in unix seconds, e.g. 1780000000.5", param="since")
    return seconds


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and int(text) <= MAX_LIMIT):
        raise InvalidRequestError(f"limit must be a whole number from 0 to {MAX_LIMIT}", param="limit")
    return int(text)
