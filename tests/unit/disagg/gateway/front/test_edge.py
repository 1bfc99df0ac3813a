# SPDX-License-Identifier: Apache-2.0
"""What a gateway with API keys lets in, and what of a request its engines see."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from disagg.config import AdminConfig, FileKeysConfig, GatewayConfig
from disagg.errors import ConfigError
from disagg.gateway.front.admin_key import AdminKey
from disagg.gateway.front.edge import Edge, RouteTable
from disagg.gateway.front.responses import shape_of
from pools.client.routes import ENGINE_KEY_HEADER
from pools.engine.base import Message, Receive, Scope, Send
from pools.testing.client import request
from tests.support.gateway_stack import JSON_HEADERS, MODEL, Hook, Reply, Stack, running_stack, until
from transport.handoff_params import DO_REMOTE_DECODE

KEYS = {"alice": "alice-0123456789abcdef", "bob": "bob-0123456789abcdefgh"}
ADMIN = "admin-0123456789"
PROMPT = "one prompt that is a good deal longer than a single block of KV"
COMPLETION = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}


@pytest.fixture
def config(tmp_path: Path) -> GatewayConfig:
    (tmp_path / "keys").write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    (tmp_path / "admin").write_text(ADMIN)
    return GatewayConfig(
        admin=AdminConfig(key_file=str(tmp_path / "admin")),
        api_keys=FileKeysConfig(type="file", path=str(tmp_path / "keys")),
    )


@pytest.fixture
async def stack(config: GatewayConfig) -> AsyncIterator[Stack]:
    async with running_stack(config=config) as running:
        yield running


def bearer(key: str) -> list[tuple[str, str]]:
    return [*JSON_HEADERS, ("authorization", f"Bearer {key}")]


async def ask(stack: Stack, name: str, path: str = "/v1/completions", **fields: Any) -> Reply:
    """One request of a tenant, which has to succeed."""
    body = (CHAT if "chat" in path else COMPLETION) | fields
    reply = await stack.call("POST", path, body, bearer(KEYS[name]))
    assert reply.status == 200, reply.body
    return reply


def cached(reply: Reply) -> int:
    return int((reply.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def salts(stack: Stack) -> list[Any]:
    """The salts that engines saw in bodies, prefill first."""
    return [seen.body.get("cache_salt") for replica in stack.replicas for seen in replica.engine.seen]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{MODEL}"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/nothing"),
        ("DELETE", "/v1/completions"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/metricsx"),
    ],
)
async def test_no_way_in_without_a_key(stack: Stack, method: str, path: str) -> None:
    """Missing or wrong, the answer is the same 401 in OpenAI's shape, and no engine hears of it."""
    for headers in (JSON_HEADERS, bearer(KEYS["alice"] + "x"), bearer(ADMIN)):
        reply = await stack.call(method, path, COMPLETION if method == "POST" else None, headers)
        error = reply.json()["error"]
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert KEYS["alice"] not in reply.body.decode() and "x-request-id" in reply.headers
    assert not any(replica.engine.seen for replica in stack.replicas)


async def test_the_document_says_which_key(stack: Stack) -> None:
    """Of every operation, and as the routes do: 401 without a key exactly where the document asks for one."""
    document = (await stack.call("GET", "/openapi.json", None, bearer(KEYS["bob"]))).json()
    assert set(document["components"]["securitySchemes"]) == {"client", "admin"}
    wrong = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            reply = await stack.call(method.upper(), re.sub("{.*?}", "x", path))
            if (reply.status == 401) != bool(operation["security"]):
                wrong.append((method, path, reply.status, operation["security"]))
    assert document["paths"] and wrong == []


async def test_the_document_without_keys() -> None:
    """Where clients need no key only the admin API asks for one."""
    async with running_stack(num_prefill=0, num_decode=0) as stack:
        document = (await stack.call("GET", "/openapi.json")).json()
        asking = {
            path for path, operations in document["paths"].items() if any(o["security"] for o in operations.values())
        }
        assert asking and all(path.startswith("/admin/") for path in asking)
        assert set(document["components"]["securitySchemes"]) == {"admin"}


async def test_what_is_open(stack: Stack) -> None:
    """Health and metrics need no key; the admin API takes its own and no other."""
    for path in ("/health", "/metrics"):
        assert (await stack.call("GET", path)).status == 200
    for path in ("/admin/v1/pools", "/admin/v1/handoffs"):
        for headers, status in ((JSON_HEADERS, 401), (bearer(KEYS["alice"]), 401), (bearer(ADMIN), 200)):
            assert (await stack.call("GET", path, None, headers)).status == status
    assert (await stack.call("GET", "/v1/models", None, bearer(KEYS["bob"]))).status == 200


async def test_without_keys_all_is_open() -> None:
    """No keys configured: no key asked for, and no salt put in."""
    async with running_stack() as stack:
        assert (await stack.complete(PROMPT)).status == 200
        assert (await stack.call("GET", "/v1/models")).status == 200
        assert salts(stack) == [None, None]


async def test_no_start_with_broken_keys(config: GatewayConfig, tmp_path: Path) -> None:
    """A gateway that could let nobody in does not start."""
    (tmp_path / "keys").write_text("alice")
    with pytest.raises(ConfigError, match="line 1"):
        async with running_stack(config=config):
            pass


async def test_a_changed_file_counts(stack: Stack, tmp_path: Path) -> None:
    """A key taken out of the file does not work any more; what the metrics say of it."""
    await ask(stack, "alice")
    (tmp_path / "keys").write_text(f"bob:{KEYS['bob']}\n")
    assert stack.gateway.api_keys is not None
    stack.gateway.api_keys.look()
    assert (await stack.call("POST", "/v1/completions", COMPLETION, bearer(KEYS["alice"]))).status == 401
    await ask(stack, "bob")
    (tmp_path / "keys").write_text("broken")
    stack.gateway.api_keys.look()
    await ask(stack, "bob")
    outcomes = [stack.metric("disagg_api_key_reloads_total", outcome=word) for word in ("ok", "failed")]
    assert outcomes == [1, 1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("own", [None, "mine"])
async def test_both_legs_have_one_salt(stack: Stack, path: str, own: str | None) -> None:
    """Prefill and decode leg carry the same salt, a tenant's own or divided further, never the client's word."""
    for name in KEYS:
        await ask(stack, name, path, **({"cache_salt": own} if own else {}))
    seen = salts(stack)
    assert len(seen) == 4 and len(set(seen)) == 2 and None not in seen and own not in seen
    assert seen[:2] == seen[2:]


@pytest.mark.parametrize(
    ("fields", "config_fields"),
    [({}, {}), ({"n": 2}, {}), ({"prompt": [PROMPT, PROMPT + " more"]}, {}), ({}, {"min_handoff_tokens": 10_000})],
    ids=["handed off", "primed", "primed list", "local"],
)
async def test_no_hit_across_keys(config: GatewayConfig, fields: Any, config_fields: Any) -> None:
    """Whatever way a prompt takes, the tenant finds it again and nobody else does."""
    config = GatewayConfig.model_validate(config.model_dump() | config_fields)
    async with running_stack(config=config) as stack:
        engines = [stack.decode[0].engine, stack.prefill[0].engine]

        async def computed(name: str) -> int:
            before = sum(engine.stats().prompt_tokens_computed_total for engine in engines)
            await ask(stack, name, **fields)
            await stack.settled()
            return sum(engine.stats().prompt_tokens_computed_total for engine in engines) - before

        first, again, other, other_again = [await computed(name) for name in ("alice", "alice", "bob", "bob")]
        assert first == other and again == other_again and again < first


async def test_probes_have_the_salt(stack: Stack) -> None:
    """What primes a request's prompts goes into the caches that the request will look in."""
    decode = stack.decode[0].engine
    decode.probe_salts.clear()
    reply = await ask(stack, "alice", n=2)
    assert reply.headers["x-disagg-prefill"] == "p0"
    assert len(set(decode.probe_salts)) == 1 and set(decode.probe_salts) == set(salts(stack))
    assert None not in decode.probe_salts


async def test_media_ids_are_refused(stack: Stack) -> None:
    """A client's own id of an image is answered 400, and no engine hears of it."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}, "uuid": "x"}
    body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
    reply = await stack.call("POST", "/v1/chat/completions", body, bearer(KEYS["alice"]))
    assert (reply.status, reply.json()["error"]["param"]) == (400, "messages[0].content[0].uuid")
    assert salts(stack) == []


async def test_tokenize_has_no_salt(stack: Stack) -> None:
    """Routes that cache nothing are passed on as they came."""
    reply = await stack.call("POST", "/tokenize", {"model": MODEL, "prompt": "a"}, bearer(KEYS["alice"]))
    assert reply.status == 200
    assert salts(stack) == [None]


async def test_the_ledger_knows_the_tenant(stack: Stack) -> None:
    """A record has the tenant's name, and can be looked for by it; the key and the salt are nowhere."""
    for name in ("alice", "bob", "alice"):
        await ask(stack, name)
    await until(lambda: stack.gateway.ledger.totals["consumed"].count == 3)

    async def records(query: str) -> Sequence[Any]:
        reply = await stack.call("GET", f"/admin/v1/handoffs{query}", None, bearer(ADMIN))
        assert not any(key in reply.body.decode() for key in (*KEYS.values(), *map(str, salts(stack))))
        return [record["tenant"] for record in reply.json()["records"]]

    assert [await records(q) for q in ("", "?tenant=bob", "?tenant=carol")] == [["alice", "bob", "alice"], ["bob"], []]


async def test_engines_see_no_header_of_the_client(stack: Stack) -> None:
    """Only the request id and the trace go on; whatever else a client sends cannot steer or open an engine."""
    trace = [("traceparent", "00-a-b-01"), ("tracestate", "x=y")]
    mine = [("x-request-id", "mine-1"), *trace]
    forged = [
        ("x-disagg-handoff-id", "forged"),
        ("x-disagg-engine-key", "forged"),
        ("x-disagg-prefill", "forged"),
        ("x-data-parallel-rank", "7"),
        ("x-session-id", "forged"),
        ("cookie", "forged=1"),
        ("x-forwarded-for", "forged"),
    ]
    reply = await stack.call("POST", "/v1/completions", COMPLETION, [*bearer(KEYS["alice"]), *mine, *forged])
    assert reply.status == 200
    known = {"host", "content-type", "content-length", "x-request-id", ENGINE_KEY_HEADER}
    [prefill], [decode] = stack.prefill[0].engine.seen, stack.decode[0].engine.seen
    assert set(prefill.headers) == known | set(dict(trace))
    assert set(decode.headers) == known | {"x-disagg-handoff-id", *dict(trace)}
    assert decode.headers["x-request-id"] == "mine-1" != prefill.headers["x-request-id"]
    assert "forged" not in json.dumps([prefill.headers, decode.headers])


async def test_header_limit(config: GatewayConfig) -> None:
    """Headers beyond the limit are answered 431, before any key is looked at."""
    config = GatewayConfig.model_validate(config.model_dump() | {"max_header_bytes": 500})
    async with running_stack(config=config) as stack:
        for headers in (bearer(KEYS["alice"]), JSON_HEADERS):
            reply = await stack.call("POST", "/v1/completions", COMPLETION, [*headers, ("x-long", "x" * 500)])
            assert (reply.status, reply.json()["error"]["code"]) == (431, "headers_too_large")
        assert (await ask(stack, "alice")).status == 200


async def test_prompt_limits() -> None:
    """Prompts and their tokens beyond the limits are answered 400, and no engine hears of them."""
    config = GatewayConfig(max_prompts=2, max_prompt_tokens=40)
    async with running_stack(config=config) as stack:
        reply = await stack.complete(["a", "b", "c"])
        assert (reply.status, reply.json()["error"]["param"]) == (400, "prompt")
        for reply in (await stack.complete("x" * 41), await stack.complete(["a", "x" * 41])):
            assert (reply.status, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert not any(replica.engine.seen for replica in stack.replicas)
        assert (await stack.complete("x" * 40)).status == (await stack.complete(["a", "b"])).status == 200


@pytest.mark.parametrize("spliced", [True, False])
async def test_stream_limit(spliced: bool) -> None:
    """A stream that takes too long ends with an OpenAI error event and [DONE], and its engine stops."""
    async with running_stack(config=GatewayConfig(max_stream_s=0.1), spliced=spliced, itl_ms=20) as stack:
        reply = await stack.complete(PROMPT, stream=True, max_tokens=500, ignore_eos=True)
        assert reply.status == 200 and len(reply.events) > 2
        assert json.loads(reply.events[-2])["error"]["code"] == "stream_time_limit"
        assert reply.events[-1] == "[DONE]"
        assert stack.metric("disagg_stream_limit_reached_total") == 1
        await stack.settled()
        whole = await stack.complete(PROMPT, stream=True, max_tokens=2)
        assert "error" not in whole.body.decode() and whole.events[-1] == "[DONE]"


EVENT, HALF = b'data: {"choices":[]}\n\n', b'data: {"choices":[{"te'


def halves(go_on: asyncio.Event) -> Hook:
    """Answer with an event, after `go_on` with half of the next one, and with nothing more."""

    async def hook(scope: Scope, receive: Receive, send: Send) -> bool:
        if "completions" not in scope["path"]:
            return False
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": HALF, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        return True

    return hook


async def cut_in_mid_event(stack: Stack, cut: Callable[[], None], **fields: Any) -> bytes:
    """The body of a stream of which `halves` comes, and which is cut when half an event may be at the client."""
    go_on = asyncio.Event()
    stack.decode[0].engine.hook = halves(go_on)
    async with stack.streaming(prompt=PROMPT, **fields) as connection:
        await connection.head()
        body = await connection.chunk()
        go_on.set()
        while part := await connection.chunk():
            body += part
            if body == EVENT + HALF:
                cut()
    return body


def code_behind(sent: bytes, body: bytes) -> str:
    """The code of the error event that ends a stream behind `sent`."""
    assert body.startswith(sent + b"data: {") and body.endswith(b"\n\ndata: [DONE]\n\n")
    code: str = json.loads(body[len(sent) + 6 :].split(b"\n\n")[0])["error"]["code"]
    return code


@pytest.mark.parametrize("spliced", [True, False])
@pytest.mark.parametrize("fields", [{"seed": 1}, {}], ids=["as it comes", "whole events"])
async def test_stream_limit_in_mid_event(spliced: bool, fields: Any) -> None:
    """The error of a stream that is cut in the middle of an event is an event of its own."""
    async with running_stack(config=GatewayConfig(max_stream_s=0.1), spliced=spliced) as stack:
        body = await cut_in_mid_event(stack, lambda: None, **fields)
        sent = EVENT + HALF + b"\n\n" if fields else EVENT
        assert code_behind(sent, body) == "stream_time_limit"


@pytest.mark.parametrize("spliced", [True, False])
async def test_loss_in_mid_event(spliced: bool) -> None:
    """So is the error of a stream whose replica is lost there, and that nobody can go on with."""
    async with running_stack(spliced=spliced) as stack:
        body = await cut_in_mid_event(stack, stack.decode[0].cut, seed=1)
        assert code_behind(EVENT + HALF + b"\n\n", body) == "replica_lost"


async def test_engines_answer_nobody_else(stack: Stack) -> None:
    """An engine's own address answers only who has its key, also on routes that vLLM leaves open."""
    for replica in stack.replicas:
        body = {**COMPLETION, "kv_transfer_params": {DO_REMOTE_DECODE: True}}
        for method, path, sent in (
            ("POST", "/v1/completions", body),
            ("POST", "/v1/chat/completions", CHAT),
            ("GET", "/v1/models", None),
            ("POST", "/tokenize", {"prompt": "a"}),
            ("GET", "/disagg/v1/stats", None),
            ("POST", "/disagg/v1/abort", {"request_id": "x"}),
            ("POST", "/disagg/v1/settle", {"handoff_ids": ["x"]}),
            ("POST", "/disagg/v1/probe", {"prompt_token_ids": [1]}),
            ("POST", "/health", {}),
            ("GET", "/nothing", None),
        ):
            for headers in ({}, {ENGINE_KEY_HEADER: replica.key + "x"}, {ENGINE_KEY_HEADER: ""}):
                reply = await request(method, replica.server.url + path, sent, headers=headers)
                assert (reply.status, reply.json()["error"]["type"]) == (401, "AuthenticationError")
        assert (await request("GET", f"{replica.server.url}/health")).status == 200
        known = {ENGINE_KEY_HEADER: replica.key}
        assert (await request("GET", f"{replica.server.url}/disagg/v1/stats", headers=known)).status == 200
        assert not replica.engine.seen or {seen.path for seen in replica.engine.seen} == {"/health"}


async def test_the_engines_key_is_not_told(stack: Stack) -> None:
    """Neither the admin API nor a representation of a replica has it."""
    reply = await stack.call("GET", "/admin/v1/pools", None, bearer(ADMIN))
    said = reply.body.decode() + repr(stack.gateway.membership.members("decode")) + repr(stack.gateway.clients)
    assert not any(replica.key in said for replica in stack.replicas)


async def test_a_replica_that_left_is_still_told(stack: Stack) -> None:
    """Its key is remembered while it drains, and that of its successor at the same name is the new one."""
    left = stack.decode[0]
    client = stack.client(left)
    stack.decode.clear()
    stack.announce()
    stack.gateway.membership.forget(left.incarnation)
    assert client.closed and (await client.stats()).incarnation == left.incarnation
    stack.decode.append(left)
    await left.restart()
    stack.announce()
    await stack.warmed()
    await ask(stack, "alice")


@pytest.mark.parametrize(("max_header_bytes", "status"), [(21, 200), (20, 431)])
async def test_size_of_headers(max_header_bytes: int, status: int, tmp_path: Path) -> None:
    """All of them count, with what stands between them; as many bytes as the limit pass."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    edge = Edge(
        app,
        table=RouteTable([]),
        keys=None,
        admin_key=AdminKey(str(tmp_path / "admin")),
        max_header_bytes=max_header_bytes,
        retry_after_s=1,
        refuse=lambda request, error: Response(status_code=shape_of(error).status),
    )
    headers = [(b"a", b"x" * 10), (b"bc", b"")]
    await edge({"type": "http", "method": "GET", "path": "/", "headers": headers}, receive, send)
    assert sent[0]["status"] == status
