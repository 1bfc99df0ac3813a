# SPDX-License-Identifier: Apache-2.0
"""The route table: no route without a key, what the edge takes a path for, and `Retry-After` on every route."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from disagg.config import AdminConfig, GatewayConfig
from disagg.errors import RequestError
from disagg.gateway.app import create_app
from disagg.gateway.front.admin_key import AdminKey
from disagg.gateway.front.edge import Edge, KeyKind, Route, RouteTable, UnstatedRouteError
from disagg.gateway.front.openapi import Body
from disagg.gateway.front.responses import error_response
from disagg.gateway.routes import route_table
from pools.engine.base import Receive, Scope, Send
from pools.errors import NoReplicaError
from tests.support.gateway_stack import JSON_HEADERS, MODEL, Stack, respond, running_stack

ADMIN = "admin-0123456789"
RETRY_AFTER_S = 7


async def handler() -> Response:
    return Response()


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    (tmp_path / "admin").write_text(ADMIN)
    admin = AdminConfig(key_file=str(tmp_path / "admin"))
    async with running_stack(config=GatewayConfig(admin=admin, retry_after_s=RETRY_AFTER_S)) as running:
        yield running


def test_a_route_without_a_key_is_refused() -> None:
    """A line of the table that states no key makes no table, and the error names the route."""
    with pytest.raises(UnstatedRouteError, match=re.escape("GET /v2/{name} states no key")):
        RouteTable([Route("POST", "/v1", handler, "client"), Route("GET", "/v2/{name}", handler)])


async def _socket(websocket: object) -> None:
    raise AssertionError("nobody gets here")


ADDITIONS: dict[str, tuple[Callable[[FastAPI], object], str]] = {
    "route": (lambda app: app.add_api_route("/backdoor", handler), "GET /backdoor"),
    "another method": (lambda app: app.add_api_route("/health", handler, methods=["DELETE"]), "DELETE /health"),
    "mount": (lambda app: app.mount("/files", handler), "Mount /files"),
    "websocket": (lambda app: app.add_api_websocket_route("/socket", _socket), "APIWebSocketRoute /socket"),
}


@pytest.mark.parametrize(("add", "named"), ADDITIONS.values(), ids=ADDITIONS)
async def test_a_route_beside_the_table_fails_the_start(
    stack: Stack, add: Callable[[FastAPI], object], named: str
) -> None:
    """An app with a route that is in no table does not start, whatever kind of route it is, and the error names it."""
    app = create_app(stack.gateway)
    add(app)
    with pytest.raises(UnstatedRouteError, match=f"{re.escape(named)} states no key"):
        async with app.router.lifespan_context(app):
            pass


def test_every_route_of_the_app_is_in_the_table(stack: Stack) -> None:
    """FastAPI adds none of its own, such as those of its documentation pages."""
    table = route_table(stack.gateway.api, handler)
    found = {(method, route.path) for route in create_app(stack.gateway).routes for method in route.methods}
    assert found == {(route.method, route.path) for route in table.routes}


ROUTES: list[tuple[Any, str, KeyKind]] = [
    ("GET", "/a/{x}", "admin"),
    ("GET", "/a/b", "open"),
    ("POST", "/a/b", "client"),
    ("GET", "/c", "open"),
    ("GET", "/d/{x:path}", "client"),
    ("GET", "/d/e/{x}", "open"),
]


@pytest.mark.parametrize("path", ["/a/b", "/a/c", "/a", "/a/b/", "/c", "/c/", "//c", "/d/e", "/d/e/f", "/d/", "/", ""])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "DELETE"])
def test_the_edge_takes_a_path_as_the_router_does(method: str, path: str) -> None:
    """The key is that of the route which the router runs; for its 405 the strictest of the path, for 404 a client's."""
    table = RouteTable([Route(*line[:2], handler, line[2]) for line in ROUTES])
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    table.add_to(app)
    scope = {"type": "http", "method": method, "path": path, "headers": [], "root_path": ""}
    keys: dict[Match, list[KeyKind]] = {Match.FULL: [], Match.PARTIAL: [], Match.NONE: []}
    for route, (*_, key) in zip(app.routes, ROUTES, strict=True):
        keys[route.matches(scope)[0]].append(key)
    strictest = max(keys[Match.PARTIAL], key=("open", "client", "admin").index, default="client")
    assert table.key_for(method, path) == (keys[Match.FULL][0] if keys[Match.FULL] else strictest)


class Ended(Exception):
    """The edge let a request through."""


async def through_edge(path: str, *, root_path: str = "", status: int | None = None, **headers: str) -> Any:
    """Head of the answer to a GET through an edge; raises Ended when it is let in and `status` is None."""
    heads: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if status is None:
            raise Ended
        given = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": given})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            heads.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    def refuse(_: Request, error: RequestError) -> Response:
        return error_response(error)

    table = RouteTable([Route("GET", "/health", handler, "open"), Route("GET", "/admin/x", handler, "admin")])
    edge = Edge(
        app,
        table=table,
        keys=None,
        admin_key=AdminKey(None),
        max_header_bytes=1000,
        retry_after_s=RETRY_AFTER_S,
        refuse=refuse,
    )
    await edge({"type": "http", "method": "GET", "path": path, "root_path": root_path, "headers": []}, receive, send)
    return heads[0]


@pytest.mark.parametrize(
    ("path", "root_path", "admitted"),
    [
        ("/health", "", True),
        ("/admin/x", "", False),
        ("/app/health", "/app", True),
        ("/app/admin/x", "/app", False),
        ("/admin/x", "/app", False),
        ("/app/app/admin/x", "/app", True),
    ],
)
async def test_the_prefix_of_an_application(path: str, root_path: str, admitted: bool) -> None:
    """A path counts without the prefix under which Serve has the application, once."""
    if admitted:
        with pytest.raises(Ended):
            await through_edge(path, root_path=root_path)
    else:
        assert (await through_edge(path, root_path=root_path))["status"] == 403


@pytest.mark.parametrize(("status", "told"), [(429, True), (503, True), (200, False), (500, False), (408, False)])
async def test_retry_after_is_for_two_statuses(status: int, told: bool) -> None:
    """429 and 503 get the header, whoever answers; no other status does."""
    head = await through_edge("/health", status=status)
    assert head["headers"] == ([(b"retry-after", b"7")] if told else [])


async def test_an_engines_own_retry_after_stays() -> None:
    """The header is not said twice."""
    head = await through_edge("/health", status=503, **{"Retry-After": "60"})
    assert head["headers"] == [(b"Retry-After", b"60")]


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_on_every_route(stack: Stack, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Whatever route it is that answers 429 or 503, the client is told when to ask again."""
    api = stack.gateway.api
    table = route_table(api, handler)

    async def refusing(request: Request) -> Response:
        return Response(status_code=status)

    refused = RouteTable([Route(r.method, r.path, refusing, r.key) for r in table.routes])
    monkeypatch.setattr("disagg.gateway.app.route_table", lambda api, document: refused)
    app = create_app(stack.gateway)
    for route in table.routes:
        heads: list[Any] = []

        async def send(message: Any, heads: list[Any] = heads) -> None:
            heads.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        scope = {
            "type": "http",
            "method": route.method,
            "path": re.sub("{.*?}", "x", route.path),
            "query_string": b"",
            "headers": [(b"authorization", b"Bearer " + ADMIN.encode())],
        }
        await app(scope, receive, send)
        assert (heads[0]["status"], dict(heads[0]["headers"])[b"retry-after"]) == (status, b"7"), route.path


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_retry_after_on_what_an_engine_answers(stack: Stack, status: int, stream: bool) -> None:
    """An engine's own 429 reaches the client with the header, and so does what stands for its 503."""
    for replica in stack.replicas:
        replica.engine.hook = respond(status)
    for reply in (await stack.complete(stream=stream), await stack.chat(stream=stream)):
        assert reply.status == status
        assert reply.headers["retry-after"] == "7"


async def test_retry_after_of_the_admin_api(stack: Stack) -> None:
    """Scaling that has to wait says so, too."""
    stack.scaler.error = NoReplicaError("not yet")
    headers = [*JSON_HEADERS, ("authorization", f"Bearer {ADMIN}")]
    reply = await stack.call("POST", "/admin/v1/pools/decode/scale", {"num_replicas": 2}, headers)
    assert (reply.status, reply.headers["retry-after"]) == (503, "7")


async def test_retry_after_without_replicas() -> None:
    """Health and the routes that are passed on say it as long as there is no replica."""
    async with running_stack(num_prefill=0, num_decode=0) as stack:
        replies = [
            await stack.call("GET", "/health"),
            await stack.call("POST", "/tokenize", {"model": MODEL, "prompt": "a"}),
            await stack.call("POST", "/detokenize", {"model": MODEL, "tokens": [1]}),
        ]
        assert [(reply.status, reply.headers["retry-after"]) for reply in replies] == [(503, "5")] * 3


async def test_the_document_says_retry_after(stack: Stack) -> None:
    """Every 429 and 503 in the OpenAPI document has the header."""
    document = (await stack.call("GET", "/openapi.json")).json()
    responses = [
        response
        for operations in document["paths"].values()
        for operation in operations.values()
        for status, response in operation["responses"].items()
        if status in ("429", "503")
    ]
    assert responses and all("Retry-After" in response["headers"] for response in responses)


async def test_the_document_has_every_body_that_it_refers_to(stack: Stack) -> None:
    """What routes read is under `components`, by the names that the routes refer to."""
    document = (await stack.call("GET", "/openapi.json")).json()
    read = {
        operation["requestBody"]["content"]["application/json"]["schema"].get("$ref", "").rpartition("/")[2]
        for operations in document["paths"].values()
        for operation in operations.values()
        if "requestBody" in operation
    }
    assert read - {""} == set(get_args(Body)) <= set(document["components"]["schemas"])
