# SPDX-License-Identifier: Apache-2.0
"""The first thing that a request meets: the limit of its headers and the client's key, before its body is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from disagg.errors import RequestError
from disagg.gateway.front.api_keys import ApiKeys
from disagg.gateway.front.limits import check_headers
from disagg.gateway.front.tenants import Tenant

KeyKind = Literal["client", "admin"]

_TENANT = "disagg.tenant"
_OPEN = frozenset(("/health", "/metrics"))
_ADMIN = "/admin/"
"""Has a key of its own."""


class Edge:
    """ASGI middleware. Whatever is not open by name needs a key, so that no new route is open by accident."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None,
        max_header_bytes: int,
        refuse: Callable[[Request, RequestError], Response],
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_header_bytes = max_header_bytes
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except RequestError as exc:
                await self._refuse(Request(scope), exc)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        check_headers(headers, self._max_header_bytes)
        if self._keys is None:
            return
        if key_for(scope["path"].removeprefix(scope.get("root_path", ""))) != "client":
            return
        scope[_TENANT] = self._keys.tenant(next((value for name, value in headers if name == b"authorization"), None))


def key_for(path: str) -> KeyKind | None:
    """Which key a route asks for; None for the open ones. Clients' keys only count where there are any."""
    if path in _OPEN:
        return None
    return "admin" if path.startswith(_ADMIN) else "client"


def tenant_of(scope: Any) -> Tenant | None:
    """Who sends a request; None where clients need no key."""
    found: Tenant | None = scope.get(_TENANT)
    return found
