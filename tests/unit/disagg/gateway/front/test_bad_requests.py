# SPDX-License-Identifier: Apache-2.0
"""Bad input over HTTP: exact status, OpenAI's error shape, and a gateway that goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from disagg.config import AdminConfig, GatewayConfig
from pools.client.routes import ENGINE_KEY_HEADER
from pools.engine.base import HANDOFF_HEADER
from tests.support.bad_requests import COMPLETIONS, BadRequest, bad_requests, error_fault
from tests.support.gateway_stack import JSON_HEADERS, MODEL, Stack, connected, request_bytes, running_stack
from transport.handoff_params import HANDOFF_ID

KEY = "the admin key"
CASES = bad_requests(MODEL)
JUDGED = [case for case in CASES if not case.needs_real_engine]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("admin") / "key"
    path.write_text(KEY + "\n")
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(key_file: Path) -> AsyncIterator[Stack]:
    """One gateway for all cases: none of them may harm it."""
    config = GatewayConfig(admin=AdminConfig(key_file=str(key_file)))
    async with running_stack(config=config) as running:
        yield running


async def test_names_are_unique() -> None:
    """A case is found by its name."""
    assert len({case.name for case in CASES}) == len(CASES) >= 45


@pytest.mark.parametrize("case", JUDGED, ids=[case.name for case in JUDGED])
async def test_bad_request(stack: Stack, case: BadRequest) -> None:
    """Each is refused with its own status and told in OpenAI's shape."""
    before = sum(len(replica.engine.seen) for replica in stack.prefill)
    headers = [*case.headers, *([("authorization", f"Bearer {KEY}")] if case.needs_admin_key else [])]
    reply = await stack.call(case.method, case.path, case.body or None, headers, chunk_bytes=case.chunk_bytes)
    assert reply.status in case.statuses, reply.body[:300]
    assert error_fault(reply.status, reply.body) is None
    assert reply.headers["content-type"] == "application/json"
    assert "x-request-id" in reply.headers
    if case.param is not None:
        assert reply.json()["error"]["param"] == case.param
    if case.needs_admin_key or case.statuses in ((404,), (405,), (413,), (415,)):
        assert sum(len(replica.engine.seen) for replica in stack.prefill) == before


async def test_gateway_goes_on(stack: Stack) -> None:
    """After every bad request a good one is answered and nothing is held."""
    assert (await stack.complete()).status == 200
    await stack.settled()
    assert stack.gateway.in_flight.num == 0


async def test_405_names_the_method(stack: Stack) -> None:
    """A wrong method is told which one is right."""
    assert (await stack.call("GET", COMPLETIONS)).headers["allow"] == "POST"


async def test_head_has_no_body(stack: Stack) -> None:
    """HEAD is refused where only POST is known."""
    assert (await stack.call("HEAD", COMPLETIONS)).status == 405


async def test_401_asks_for_a_bearer(stack: Stack) -> None:
    """A missing key is asked for as HTTP says."""
    assert (await stack.call("GET", "/admin/v1/pools")).headers["www-authenticate"] == "Bearer"


async def test_slow_body(stack: Stack) -> None:
    """A body that does not come is answered 408."""
    config = GatewayConfig(body_timeout_s=0.1)
    async with running_stack(num_prefill=0, config=config) as slow, connected(slow.url) as connection:
        connection.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
        reply = await connection.reply()
        assert (reply.status, reply.json()["error"]["code"]) == (408, "request_timeout")
        assert error_fault(reply.status, reply.body) is None


async def test_body_at_the_limit(stack: Stack) -> None:
    """The limit itself is allowed, one byte more is not; chunked or not."""
    body = json.dumps({"model": MODEL, "prompt": "x" * 100, "max_tokens": 1}).encode()
    async with running_stack(config=GatewayConfig(max_body_bytes=len(body))) as small:
        for chunk_bytes in (None, 7):
            for extra, status in ((b"", 200), (b" ", 413)):
                reply = await small.call("POST", COMPLETIONS, body + extra, chunk_bytes=chunk_bytes)
                assert reply.status == status


async def test_too_large_is_refused_before_it_is_sent(stack: Stack) -> None:
    """A declared length over the limit is answered without reading on."""
    async with connected(stack.url) as connection:
        connection.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert (await connection.reply()).status == 413


HEADERS = {
    "x-data-parallel-rank": "7",
    "x-disagg-prefill": "p9",
    "x-disagg-decode": "d9",
    "x-disagg-anything": "x",
    "x-disagg-handoff-id": "h9",
    "x-priority": "9",
    "priority": "u=0",
    "x-session-id": "s",
    "authorization": "Bearer client",
    "cookie": "a=b",
    "x-forwarded-for": "1.2.3.4",
    "accept-encoding": "gzip",
    "accept": "text/event-stream",
}


async def test_client_headers_stay_outside(stack: Stack) -> None:
    """No header of the client reaches an engine, but trace context and a clean request id."""
    for replica in stack.replicas:
        replica.engine.seen.clear()
    trace = {"traceparent": "00-1-2-01", "tracestate": "a=b", "x-request-id": "mine-1.2:3_4"}
    headers = [*JSON_HEADERS, *HEADERS.items(), *trace.items()]
    body = {"model": MODEL, "prompt": "hello there", "max_tokens": 1}
    reply = await stack.call("POST", COMPLETIONS, body, headers)
    assert (reply.status, reply.headers["x-request-id"]) == (200, "mine-1.2:3_4")
    [prefill], [decode] = ([seen for r in pool for seen in r.engine.seen] for pool in (stack.prefill, stack.decode))
    own = {"host", "content-type", "content-length", "x-request-id", ENGINE_KEY_HEADER}
    assert prefill.headers.keys() == own | {"traceparent", "tracestate"}
    assert prefill.headers["x-request-id"] != "mine-1.2:3_4"
    assert decode.headers.keys() == own | {"traceparent", "tracestate", HANDOFF_HEADER}
    assert decode.headers[HANDOFF_HEADER] == prefill.headers["x-request-id"]
    assert decode.headers[HANDOFF_HEADER] == decode.body["kv_transfer_params"][HANDOFF_ID]
    assert decode.headers["x-request-id"] == "mine-1.2:3_4"


BAD_IDS = {
    "blank": "a b",
    "slash": "../../etc",
    "quote": '"x"',
    "too long": "a" * 129,
    "empty": "",
    "semicolon": "a;b",
    "not ASCII": "\xe9",
    "tab": "a\tb",
}


@pytest.mark.parametrize("given", BAD_IDS.values(), ids=BAD_IDS.keys())
async def test_bad_request_id_is_replaced(stack: Stack, given: str) -> None:
    """A request id that could break a log or a header becomes a new one, everywhere."""
    stack.decode[0].engine.seen.clear()
    body = {"model": MODEL, "prompt": "hello there", "max_tokens": 1}
    reply = await stack.call("POST", COMPLETIONS, body, [*JSON_HEADERS, ("x-request-id", given)])
    assert reply.status == 200
    assert len(reply.headers["x-request-id"]) == 32 and reply.headers["x-request-id"].isalnum()
    assert stack.decode[0].engine.seen[0].headers["x-request-id"] == reply.headers["x-request-id"]
    refused = await stack.call("POST", COMPLETIONS, {}, [*JSON_HEADERS, ("x-request-id", given)])
    assert refused.headers["x-request-id"] != given


async def test_content_type_may_be_missing_or_detailed(stack: Stack) -> None:
    """No content type, parameters, upper case and `+json` are all JSON."""
    body = {"model": MODEL, "prompt": "hello there", "max_tokens": 1}
    for given in (None, "application/json; charset=utf-8", "Application/JSON", "application/x+json"):
        headers = [] if given is None else [("content-type", given)]
        assert (await stack.call("POST", COMPLETIONS, body, headers)).status == 200


async def test_pipelined_requests_are_answered_in_order(stack: Stack) -> None:
    """A second request on the same connection waits for the first, streamed or not."""
    bodies = [{"model": MODEL, "prompt": f"prompt {i}", "max_tokens": 3, "stream": i < 2} for i in range(3)]
    expected = [(await stack.call("POST", COMPLETIONS, body)).text for body in bodies]
    async with connected(stack.url) as connection:
        for body in bodies:
            connection.writer.write(request_bytes("POST", COMPLETIONS, JSON_HEADERS, json.dumps(body).encode()))
        async with asyncio.timeout(5):
            assert [(await connection.reply()).text for _ in bodies] == expected
