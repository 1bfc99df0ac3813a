# SPDX-License-Identifier: Apache-2.0
"""The first thing that a request meets: the limit of its headers and the key that its route asks for.

The edge checks both before the body is read. The route table says which key a route asks for. FastAPI's routes and the
security of the OpenAPI document are made from the same table.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from disagg.errors import HeadersTooLargeError, RequestError
from disagg.gateway.front.admin_key import AdminKey
from disagg.gateway.front.api_keys import ApiKeys
from disagg.gateway.front.tenants import SCOPE_KEY

KeyKind = Literal["open", "client", "admin"]
"""What a request needs: no key; one of `gateway.api_keys`, where there are any; the admin key."""

_STRICT: tuple[KeyKind, ...] = ("open", "client", "admin")
_HEADER_LINE_BYTES = 4
"""Colon, space and line end."""
_LATER = frozenset((429, 503))
"""Statuses after which the same request may succeed, so that a client is told when to send it again."""


Handler = Callable[..., Awaitable[Response]]
"""A coroutine function whose parameters FastAPI fills: the request, or what stands in the path."""


@dataclass(frozen=True)
class Route:
    """A line of the route table."""

    method: Literal["GET", "POST"]
    path: str
    """As FastAPI writes it, with parameters in braces."""
    handler: Handler
    key: KeyKind | None = None
    """The key that a request of this route has to bring. A table with a route that states none is refused."""
    document: Mapping[str, Any] = field(default_factory=dict)
    """What FastAPI's document says of the route: further arguments of `FastAPI.add_api_route`."""


class UnstatedRouteError(ValueError):
    """A route that does not say which key it asks for. Nothing is served."""

    def __init__(self, method: str, path: str) -> None:
        super().__init__(
            f"the route {method} {path} states no key; give it one of {', '.join(_STRICT)} in the route table "
            "(disagg/gateway/routes.py)"
        )


class RouteTable:
    """All routes of a gateway, and the key of each."""

    def __init__(self, routes: Iterable[Route]) -> None:
        """Raises UnstatedRouteError that names the first route without a key."""
        self.routes = tuple(routes)
        for route in self.routes:
            if route.key is None:
                raise UnstatedRouteError(route.method, route.path)
        patterns = [(compile_path(route.path)[0], route) for route in self.routes]
        literal = [route.path for route in self.routes if "{" not in route.path]
        self._patterns: list[tuple[re.Pattern[str], Route]] = [(p, route) for p, route in patterns if "{" in route.path]
        # All routes that match a literal path, also those with parameters: the router takes the first one.
        self._literal = {path: [route for p, route in patterns if p.match(path)] for path in literal}

    def add_to(self, app: FastAPI) -> None:
        """Make the app's routes."""
        for route in self.routes:
            app.add_api_route(route.path, route.handler, methods=[route.method], **route.document)

    def check(self, app: FastAPI) -> None:
        """Raises UnstatedRouteError for a route of the app, of whatever kind, that is not in this table."""
        stated: set[tuple[str, str]] = {(route.method, route.path) for route in self.routes}
        for route in app.routes:
            path = getattr(route, "path", repr(route))
            for method in getattr(route, "methods", None) or (type(route).__name__,):
                if (method, path) not in stated:
                    raise UnstatedRouteError(method, path)

    def key_for(self, method: str, path: str) -> KeyKind:
        """The key of the route that the router takes.

        Another method of a known path needs the strictest key of that path. An unknown path needs a client's key. So
        neither tells a stranger which routes there are.
        """
        found = self._literal.get(path)
        if found is None:
            found = [route for pattern, route in self._patterns if pattern.match(path)]
        for route in found:
            if route.method == method and route.key is not None:
                return route.key
        return max((route.key for route in found if route.key is not None), key=_STRICT.index, default="client")


class Edge:
    """ASGI middleware: lets in whoever has the key of the route, and says `Retry-After` on every 429 and 503.

    A HEAD request goes on as GET, and its answer comes back without a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        table: RouteTable,
        keys: ApiKeys | None,
        admin_key: AdminKey,
        max_header_bytes: int,
        retry_after_s: int,
        refuse: Callable[[Request, RequestError], Response],
    ) -> None:
        """`keys`: None where clients need no key."""
        self._app = app
        self._table = table
        self._keys = keys
        self._admin_key = admin_key
        self._max_header_bytes = max_header_bytes
        self._retry_after = (b"retry-after", b"%d" % retry_after_s)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        is_head = scope["method"] == "HEAD"
        if is_head:
            scope = {**scope, "method": "GET"}

        # Not a coroutine function: it is called for every chunk of a stream that is not spliced.
        def with_retry_after(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start" and message["status"] in _LATER:
                headers = message.get("headers", ())
                if not any(name.lower() == b"retry-after" for name, _ in headers):
                    message["headers"] = [*headers, self._retry_after]
            if is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            return send(message)

        try:
            self._check(scope)
        except RequestError as exc:
            await self._refuse(Request(scope), exc)(scope, receive, with_retry_after)
            return
        await self._app(scope, receive, with_retry_after)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = 0
        for name, value in headers:
            size += len(name) + len(value) + _HEADER_LINE_BYTES
        if size > self._max_header_bytes:
            raise HeadersTooLargeError(
                f"the request headers are larger than {self._max_header_bytes} bytes, the limit of this server"
            )
        key = self._table.key_for(scope["method"], _route_path(scope))
        if key == "client" and self._keys is not None:
            scope[SCOPE_KEY] = self._keys.tenant(_authorization(headers))
        elif key == "admin":
            self._admin_key.check(_authorization(headers))


def _route_path(scope: Scope) -> str:
    """The path that the router matches, as Starlette takes it from a scope: without the prefix of the application."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root or not path.startswith(root):
        return path
    if path == root:
        return ""
    return path[len(root) :] if path[len(root)] == "/" else path


def _authorization(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    return next((value for name, value in headers if name == b"authorization"), None)
