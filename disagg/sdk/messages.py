# SPDX-License-Identifier: Apache-2.0
"""Builds the requests of the SDK and reads their answers. Pure: it sends nothing and knows no clock.

`disagg.sdk.http` sends them, once with blocking calls and once with asyncio. The typed answers load pydantic, so they
are imported where an answer is read, and importing the SDK stays cheap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from disagg.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    ClientError,
    ScaleTimeoutError,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

    from disagg.sdk.types import Accepted, Handoffs, Health, Pool

AnswerT = TypeVar("AnswerT", bound="BaseModel")

MAX_NUM_REPLICAS = 1024

_ADVICE = {
    401: "pass the admin key: api_key=..., DISAGG_API_KEY or --api-key-file",
    403: "set gateway.admin.key_file in the config, or pass the right key",
    404: "check the URL and the pool's name (prefill or decode)",
    409: "set external_scaler_enabled: true on the application in the config",
    503: "no replica is ready yet; try again in a few seconds",
}


@dataclass(frozen=True)
class ApiCall:
    """One HTTP request, without the server it goes to."""

    method: str
    path: str
    json: dict[str, Any] | None = None
    accept: frozenset[int] = frozenset({200})


@dataclass(frozen=True)
class Reply:
    """What a server answered to an `ApiCall`."""

    method: str
    url: str
    status: int
    reason: str
    """The reason phrase beside the status; may be empty."""
    body: bytes


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request. Raises `ValueError` for a key that cannot stand in a header."""
    if api_key is None:
        return {}
    if not api_key.isascii() or not api_key.isprintable() or not api_key.strip():
        raise ValueError("api_key must be a non-empty line of printable ASCII")
    return {"Authorization": f"Bearer {api_key.strip()}"}


def list_pools() -> ApiCall:
    """Asks for all pools."""
    return ApiCall("GET", "/admin/v1/pools")


def scale_pool(name: str, num_replicas: int) -> ApiCall:
    """Asks for a new size. Raises `ValueError` for a size that no server takes."""
    if isinstance(num_replicas, bool) or not isinstance(num_replicas, int):
        raise ValueError(f"num_replicas must be an integer, got {num_replicas!r}")
    if not 1 <= num_replicas <= MAX_NUM_REPLICAS:
        raise ValueError(f"num_replicas must be 1 to {MAX_NUM_REPLICAS}, got {num_replicas}")
    path = f"/admin/v1/pools/{quote(name, safe='')}/scale"
    return ApiCall("POST", path, json={"num_replicas": num_replicas}, accept=frozenset({200, 202}))


def list_handoffs(
    *,
    gateway: str | None = None,
    outcome: str | None = None,
    replica: str | None = None,
    request_id: str | None = None,
    tenant: str | None = None,
    since: float | None = None,
    limit: int | None = None,
) -> ApiCall:
    """Asks for the ledger of hand-offs. What is None does not filter."""
    given = {
        "gateway": gateway,
        "outcome": outcome,
        "replica": replica,
        "request_id": request_id,
        "tenant": tenant,
        "since": since,
        "limit": limit,
    }
    query = urlencode({name: value for name, value in given.items() if value is not None})
    return ApiCall("GET", f"/admin/v1/handoffs?{query}" if query else "/admin/v1/handoffs")


def get_health() -> ApiCall:
    """Asks whether requests are served. 503 is an answer too."""
    return ApiCall("GET", "/health", accept=frozenset({200, 503}))


def read_pools(reply: Reply) -> list[Pool]:
    """The pools of an answer to `list_pools`."""
    from disagg.sdk.types import Pools

    return list(_read(reply, list_pools(), Pools).pools)


def read_handoffs(reply: Reply, call: ApiCall) -> Handoffs:
    """The answer to `list_handoffs`."""
    from disagg.sdk.types import Handoffs

    return _read(reply, call, Handoffs)


def read_accepted(reply: Reply, call: ApiCall) -> Accepted:
    """The answer to `scale_pool`."""
    from disagg.sdk.types import Accepted

    return _read(reply, call, Accepted)


def read_health(reply: Reply) -> Health:
    """The answer to `get_health`."""
    from disagg.sdk.types import Health

    try:
        return _read(reply, get_health(), Health)
    except APIResponseError:
        if reply.status == 200:
            raise
        raise _status_error(reply) from None


def find_pool(pools: list[Pool], name: str) -> Pool:
    """The pool called `name`. Raises `APIStatusError` (404) when there is none."""
    for pool in pools:
        if pool.name == name:
            return pool
    known = ", ".join(sorted(pool.name for pool in pools)) or "none"
    raise APIStatusError(f"there is no pool {name!r}; the server has: {known}", status_code=404)


def is_transient(exc: ClientError) -> bool:
    """True when asking again later may help."""
    if isinstance(exc, APIStatusError):
        return exc.status_code in (502, 503, 504)
    return isinstance(exc, APIConnectionError | APITimeoutError)


def scale_timeout(
    name: str, num_replicas: int, *, elapsed_s: float, pool: Pool | None, trouble: ClientError | None
) -> ScaleTimeoutError:
    """The error of a wait that ran out, naming what is missing."""
    head = f"pool {name!r} did not reach {num_replicas} replicas within {elapsed_s:.1f} s"
    message = f"{head}: {trouble or missing(pool, num_replicas)}. It goes on trying; see `disagg status`"
    return ScaleTimeoutError(message, pool=name, num_replicas=num_replicas)


def missing(pool: Pool | None, num_replicas: int) -> str:
    """What keeps `pool` from being `num_replicas` routable replicas, in words; `nothing` when it is."""
    if pool is None:
        return "the server never said how it stands"
    parts = []
    if pool.target_num_replicas not in (None, num_replicas):
        parts.append(f"its target is {pool.target_num_replicas} now, set by someone else")
    if pool.num_routable < num_replicas:
        parts.append(f"{pool.num_routable} of {num_replicas} are routable")
    states: dict[str, int] = {}
    for replica in pool.replicas:
        if replica.state != "routable":
            state = replica.state if replica.reason is None else f"{replica.state} ({replica.reason})"
            states[state] = states.get(state, 0) + 1
    parts += [f"{count} {state}" for state, count in sorted(states.items())]
    if pool.num_starting is None and len(pool.replicas) < num_replicas:
        parts.append(f"{num_replicas - len(pool.replicas)} not started yet")
    if len(pool.replicas) > num_replicas:
        parts.append(f"{len(pool.replicas) - num_replicas} still to go")
    return ", ".join([*parts, *pending(pool)]) or "nothing"


def pending(pool: Pool) -> list[str]:
    """What the server has in hand with `pool` beside the replicas that are up, in words."""
    counts = ((pool.num_starting, "starting"), (pool.num_unplaced, "without a place"), (pool.num_stopping, "stopping"))
    parts = [f"{number} {words}" for number, words in counts if number]
    return [*parts, pool.pending_reason] if pool.pending_reason else parts


def _read(reply: Reply, call: ApiCall, answer: type[AnswerT]) -> AnswerT:
    from pydantic import ValidationError

    if reply.status not in call.accept:
        raise _status_error(reply)
    try:
        return answer.model_validate_json(reply.body)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise APIResponseError(
            f"{reply.url} answered something that disagg does not ({where}: {first['msg']}); "
            "check that the URL is that of a disagg gateway"
        ) from exc


def _status_error(reply: Reply) -> APIStatusError:
    try:
        body: Any = json.loads(reply.body)
    except ValueError:
        body = reply.body.decode(errors="replace")
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    said = str(error.get("message") or reply.reason or "").strip()
    advice = f"; {_ADVICE[reply.status]}" if reply.status in _ADVICE else ""
    code = error.get("code")
    return APIStatusError(
        f"{reply.method} {reply.url} answered {reply.status}: {said}{advice}",
        status_code=reply.status,
        body=body,
        code=code if isinstance(code, str) else None,
    )
