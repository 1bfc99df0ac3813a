# SPDX-License-Identifier: Apache-2.0
"""The SDK against a stub server: the blocking client and its asyncio twin."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from disagg.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    ClientError,
    ScaleTimeoutError,
)
from disagg.sdk import messages as wire
from disagg.sdk.client import AsyncClient, Client
from disagg.sdk.messages import missing
from disagg.sdk.types import Pool, Replica

HANDOFFS: dict[str, Any] = {
    "totals": {"produced": {"count": 2, "tokens": 200, "bytes": 2000}, "rescued": {"count": 1, "new": 1}},
    "num_open": 1,
    "balanced": True,
    "records": [
        {
            "handoff_id": "gw-2",
            "request_id": "r2",
            "prefill": {"replica_id": "p0", "incarnation": "i"},
            "decode": None,
            "outcome": "rescued",
            "reason": "client_left",
            "tokens": 100,
            "bytes": 1000,
            "lease_left_s": 12.5,
            "new": 1,
        },
        {"handoff_id": "gw-1", "outcome": "open"},
    ],
}


class StubServer:
    """An admin API whose decode pool gets one replica nearer to its target at every look."""

    def __init__(self, *, steps: bool = True) -> None:
        self.sizes = {"prefill": 1, "decode": 1}
        self.targets = dict(self.sizes)
        self.requests: list[httpx.Request] = []
        self.failures: list[httpx.Response | Exception] = []
        self.steps = steps

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.method == "GET" and self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        if request.url.path == "/health":
            return httpx.Response(503, json={"status": "starting", "pools": {"prefill": 1, "decode": 0}})
        if request.headers.get("authorization") != "Bearer secret":
            return httpx.Response(401, json={"error": {"message": "wrong key", "type": "x", "code": "invalid_api_key"}})
        if request.method == "POST":
            name = request.url.path.split("/")[4]
            if name not in self.targets:
                return httpx.Response(404, json={"error": {"message": f"no pool {name!r}"}})
            self.targets[name] = json.loads(request.content)["num_replicas"]
            return httpx.Response(202, json={"name": name, "target_num_replicas": self.targets[name]})
        if request.url.path == "/admin/v1/handoffs":
            return httpx.Response(200, json=HANDOFFS)
        answer = {"pools": [self._pool(name) for name in self.sizes], "new_in_a_later_version": True}
        for name, size in self.sizes.items():
            if self.steps:
                self.sizes[name] += (self.targets[name] > size) - (self.targets[name] < size)
        return httpx.Response(200, json=answer)

    def _pool(self, name: str) -> dict[str, Any]:
        replicas = [
            {"replica_id": f"{name}-{index}", "state": "routable", "uptime_s": 61.0, "kv_cache_usage": 0.25, "new": 1}
            for index in range(self.sizes[name])
        ]
        return {
            "name": name,
            "target_num_replicas": self.targets[name],
            "num_routable": len(replicas),
            "replicas": replicas,
        }


@pytest.fixture
def server() -> StubServer:
    """A fresh stub."""
    return StubServer()


def _client(server: StubServer, key: str | None = "secret") -> Client:
    return Client("http://stub:1/", key, transport=httpx.MockTransport(server))


def test_pools_are_typed_and_tolerant(server: StubServer) -> None:
    """Keys of a newer server are ignored, missing ones are None."""
    with _client(server) as client:
        prefill, decode = client.pools()
    assert (prefill.name, decode.num_routable) == ("prefill", 1)
    assert decode.replicas[0].kv_cache_usage == 0.25
    assert decode.replicas[0].engine_id is None
    assert str(server.requests[0].url) == "http://stub:1/admin/v1/pools"


def test_scale_and_wait(server: StubServer) -> None:
    """The wait ends when exactly the wanted replicas exist, upwards and downwards."""
    seen: list[int] = []
    with _client(server) as client:
        operation = client.pool("decode").scale(3)
        pool = operation.wait(timeout_s=5, poll_s=0, on_progress=lambda pool: seen.append(pool.num_routable))
        assert pool.num_routable == len(pool.replicas) == 3
        assert seen == [1, 2, 3]
        assert operation.elapsed_s == operation.elapsed_s
        assert len(client.pool("decode").scale(1).wait(timeout_s=5, poll_s=0).replicas) == 1


async def test_async_twin(server: StubServer) -> None:
    """The asyncio client does the same."""
    async with AsyncClient("http://stub:1", "secret", transport=httpx.MockTransport(server)) as client:
        assert [pool.name for pool in await client.pools()] == ["prefill", "decode"]
        assert (await client.health()).pools == {"prefill": 1, "decode": 0}
        operation = await client.pool("decode").scale(2)
        assert (await operation.wait(timeout_s=5, poll_s=0)).num_routable == 2
        assert operation.elapsed_s == operation.elapsed_s
        server.steps = False
        with pytest.raises(ScaleTimeoutError):
            await (await client.pool("decode").scale(4)).wait(timeout_s=0, poll_s=0)
        server.failures = [httpx.ConnectError("refused")]
        with pytest.raises(APIConnectionError):
            await client.pools()


def test_handoffs(server: StubServer) -> None:
    """Books and records are typed and tolerant; only filters that are given are sent."""
    with _client(server) as client:
        found = client.handoffs()
        assert str(server.requests[-1].url) == "http://stub:1/admin/v1/handoffs"
        client.handoffs(outcome="rescued", replica="p 0&", request_id="r", tenant="alice", since=0, limit=0)
    assert dict(server.requests[-1].url.params) == {
        "outcome": "rescued",
        "replica": "p 0&",
        "request_id": "r",
        "tenant": "alice",
        "since": "0",
        "limit": "0",
    }
    assert (found.totals["produced"].count, found.totals["rescued"].tokens, found.num_open) == (2, 0, 1)
    newest, oldest = found.records
    assert (newest.prefill.replica_id, newest.decode, newest.lease_left_s) == ("p0", None, 12.5)
    assert (oldest.request_id, oldest.reused_at, oldest.outcome) == (None, None, "open")


async def test_handoffs_async(server: StubServer) -> None:
    """The asyncio client asks and reads the same."""
    async with AsyncClient("http://stub:1", "secret", transport=httpx.MockTransport(server)) as client:
        found = await client.handoffs(outcome="open", limit=5)
        assert found.balanced and len(found.records) == 2
        assert dict(server.requests[-1].url.params) == {"outcome": "open", "limit": "5"}
        server.failures = [httpx.Response(400, json={"error": {"message": "outcome must be one of"}})]
        with pytest.raises(APIStatusError, match="outcome must be one of"):
            await client.handoffs(outcome="eaten")


def test_twins_offer_the_same() -> None:
    """The public names of both clients and their parts agree."""
    assert {n.strip("_") for n in vars(Client)} - {"enter", "exit"} == {n.strip("_") for n in vars(AsyncClient)} - {
        "aenter",
        "aexit",
    }


def test_wait_survives_trouble_and_times_out(server: StubServer) -> None:
    """Lost connections and 503 are waited out; a wait that runs out says what is missing."""
    with _client(server) as client:
        operation = client.pool("decode").scale(2)
        server.failures = [httpx.ConnectError("refused"), httpx.Response(503, json={})]
        assert operation.wait(timeout_s=5, poll_s=0).num_routable == 2
        server.steps = False
        with pytest.raises(ScaleTimeoutError, match="2 of 4 are routable, 2 not started yet") as caught:
            client.pool("decode").scale(4).wait(timeout_s=0, poll_s=0)
        assert (caught.value.pool, caught.value.num_replicas) == ("decode", 4)
        server.failures = [httpx.Response(401, json={})]
        with pytest.raises(APIStatusError):
            operation.wait(timeout_s=5, poll_s=0)


def test_a_size_is_reached_when_nothing_is_on_its_way() -> None:
    """While Serve starts or stops other replicas the operation goes on, and says with what."""
    replica = Replica(replica_id="d0", state="routable")
    pool = Pool(name="decode", target_num_replicas=1, num_routable=1, replicas=(replica,))
    assert pool.has_size(1) and missing(pool, 1) == "nothing"
    stopping = pool.model_copy(update={"num_starting": 0, "num_unplaced": 0, "num_stopping": 2})
    assert not stopping.has_size(1) and missing(stopping, 1) == "2 stopping"
    why = "each needs 1 GPU, free in the cluster is 0 GPU"
    waiting = stopping.model_copy(update={"num_stopping": 0, "num_unplaced": 9, "pending_reason": why})
    assert (
        missing(waiting, 10)
        == f"its target is 1 now, set by someone else, 1 of 10 are routable, 9 without a place, {why}"
    )


def test_health_needs_no_key(server: StubServer) -> None:
    """503 with a body is an answer; without one it is an error."""
    with _client(server, key=None) as client:
        health = client.health()
        assert not health.ok
        server.failures = [httpx.Response(503, text="no route")]
        with pytest.raises(APIStatusError, match="503"):
            client.health()


ERRORS = {
    "refused": (httpx.ConnectError("refused"), APIConnectionError, "cannot connect to http://stub:1/admin/v1/pools"),
    "connect timeout": (httpx.ConnectTimeout("slow"), APIConnectionError, "within the timeout"),
    "read timeout": (httpx.ReadTimeout("slow"), APITimeoutError, "did not answer within 30 s"),
    "cut": (httpx.RemoteProtocolError("cut"), APIConnectionError, "broke: cut"),
    "403": (httpx.Response(403, json={"error": {"message": "no"}}), APIStatusError, "403: no; set gateway.admin"),
    "html": (httpx.Response(200, text="<html>"), APIResponseError, "check that the URL"),
    "shape": (httpx.Response(200, json={"pools": [{}]}), APIResponseError, "pools.0.name"),
}


@pytest.mark.parametrize(("failure", "cls", "words"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(server: StubServer, failure: httpx.Response | Exception, cls: type[ClientError], words: str) -> None:
    """Each failure has one class, and a message that says where and what to do."""
    server.failures = [failure]
    with _client(server) as client, pytest.raises(cls, match=words):
        client.pools()


def test_status_error_carries_the_answer(server: StubServer) -> None:
    """Status, code and body are there for programs."""
    with _client(server, key="other") as client, pytest.raises(APIStatusError) as caught:
        client.pools()
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.body["error"]["message"] == "wrong key"


def test_unknown_pool(server: StubServer) -> None:
    """Both ways to name a pool answer 404, one with the known names; odd names stay one path segment."""
    with _client(server) as client:
        with pytest.raises(APIStatusError, match="the server has: decode, prefill"):
            client.pool("x").status()
        with pytest.raises(APIStatusError, match="404"):
            client.pool("a/b").scale(1)
    assert server.requests[-1].url.raw_path == b"/admin/v1/pools/a%2Fb/scale"


@pytest.mark.parametrize("size", [0, -1, 1025, True, 1.5, "2"])
def test_bad_sizes(server: StubServer, size: Any) -> None:
    """A size that no server takes is refused before anything is sent."""
    with _client(server) as client, pytest.raises(ValueError, match="num_replicas"):
        client.pool("decode").scale(size)
    assert not server.requests


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://"])
def test_bad_urls(url: str) -> None:
    """The message shows a URL that works."""
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:8000"):
        Client(url)


@pytest.mark.parametrize("key", ["", " ", "a\nb", "ключ"])
def test_bad_keys(key: str) -> None:
    """A key that cannot stand in a header is refused, and not shown."""
    with pytest.raises(ValueError, match=r"^api_key must be a non-empty line of printable ASCII$"):
        Client(api_key=key)


def test_missing_names_everything() -> None:
    """Another's target, states and numbers are all named."""
    pool = Pool.model_validate(
        {
            "name": "decode",
            "target_num_replicas": 5,
            "num_routable": 1,
            "replicas": [{"replica_id": str(n), "state": s} for n, s in enumerate(["routable", "warming", "draining"])],
        }
    )
    assert wire.missing(pool, 2) == (
        "its target is 5 now, set by someone else, 1 of 2 are routable, 1 draining, 1 warming, 1 still to go"
    )
    assert wire.missing(None, 2) == "the server never said how it stands"
