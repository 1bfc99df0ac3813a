# SPDX-License-Identifier: Apache-2.0
"""Sends the requests of the SDK over httpx, and turns httpx's errors into the SDK's.

The one module of the SDK that imports httpx. A client imports it when it is made, so importing the SDK stays cheap.
"""

from __future__ import annotations

import httpx

from disagg.errors import APIConnectionError, APITimeoutError, ClientError
from disagg.sdk.messages import ApiCall, Reply, headers


class Http:
    """Connections to one server, with blocking calls. Threads may share it."""

    def __init__(
        self, url: str, api_key: str | None, *, timeout_s: float, transport: httpx.BaseTransport | None
    ) -> None:
        """Raises `ValueError` when `url` or `api_key` cannot be used."""
        self.base_url = base_url(url)
        self._timeout_s = timeout_s
        self._client = httpx.Client(headers=headers(api_key), timeout=timeout_s, transport=transport)

    def send(self, call: ApiCall) -> Reply:
        """The server's answer, whatever its status. Raises `ClientError` when there is none."""
        url = self.base_url + call.path
        try:
            return _reply(self._client.request(call.method, url, json=call.json))
        except httpx.HTTPError as exc:
            raise _translate(exc, url=url, timeout_s=self._timeout_s) from exc

    def close(self) -> None:
        """Closes the connections. Does nothing when called again."""
        self._client.close()


class AsyncHttp:
    """`Http` for asyncio. Belongs to one event loop."""

    def __init__(
        self, url: str, api_key: str | None, *, timeout_s: float, transport: httpx.AsyncBaseTransport | None
    ) -> None:
        """As `Http`."""
        self.base_url = base_url(url)
        self._timeout_s = timeout_s
        self._client = httpx.AsyncClient(headers=headers(api_key), timeout=timeout_s, transport=transport)

    async def send(self, call: ApiCall) -> Reply:
        """As `Http.send`."""
        url = self.base_url + call.path
        try:
            return _reply(await self._client.request(call.method, url, json=call.json))
        except httpx.HTTPError as exc:
            raise _translate(exc, url=url, timeout_s=self._timeout_s) from exc

    async def close(self) -> None:
        """As `Http.close`."""
        await self._client.aclose()


def base_url(url: str) -> str:
    """`url` without a trailing slash. Raises `ValueError` unless it is an http or https address."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as exc:
        raise ValueError(f"base_url {url!r} is not an address; use one like http://127.0.0.1:8000") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"base_url {url!r} must start with http:// or https://, like http://127.0.0.1:8000")
    return str(parsed).rstrip("/")


def _reply(response: httpx.Response) -> Reply:
    request = response.request
    return Reply(request.method, str(request.url), response.status_code, response.reason_phrase, response.content)


def _translate(exc: httpx.HTTPError, *, url: str, timeout_s: float) -> ClientError:
    """The SDK's error for one of httpx."""
    if isinstance(exc, httpx.ConnectTimeout | httpx.ConnectError):
        reason = "it did not accept within the timeout" if isinstance(exc, httpx.TimeoutException) else str(exc)
        message = f"cannot connect to {url}: {reason}; start the server, or correct the URL"
        return APIConnectionError(message, url=url)
    if isinstance(exc, httpx.TimeoutException):
        return APITimeoutError(f"{url} did not answer within {timeout_s:g} s; raise the timeout or try again", url=url)
    return APIConnectionError(f"the connection to {url} broke: {exc or type(exc).__name__}; try again", url=url)
