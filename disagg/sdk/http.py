# SPDX-License-Identifier: Apache-2.0
"""Sends the requests of the SDK over httpx, and turns httpx's errors into the SDK's.

The one module of the SDK that imports httpx. A client imports it when it is made, so importing the SDK stays cheap.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from disagg.errors import APIConnectionError, APITimeoutError, ClientError
from disagg.sdk.messages import ApiCall, Reply, headers

_FAILURES = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, UnicodeError)
"""All that a request may raise: httpx's own, and what it lets through of sockets, TLS and names of hosts."""


class Http:
    """Connections to one server, with blocking calls. Threads may share it."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        timeout_s: float,
        ca_file: str | Path | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Raises `ValueError` when `url`, `api_key`, `ca_file` or a proxy of the environment cannot be used."""
        self.base_url = base_url(url)
        self._timeout_s = timeout_s
        sent = headers(api_key)
        with _refusals():
            self._client = httpx.Client(
                headers=sent,
                timeout=timeout_s,
                transport=transport,
                verify=_trusted(ca_file),
                trust_env=transport is None and not is_loopback(self.base_url),
            )

    def send(self, call: ApiCall) -> Reply:
        """The server's answer, whatever its status. Raises `ClientError` when there is none."""
        url = self.base_url + call.path
        try:
            return _reply(self._client.request(call.method, url, json=call.json))
        except _FAILURES as exc:
            raise _translate(exc, url=url, timeout_s=self._timeout_s) from exc

    def close(self) -> None:
        """Closes the connections. Does nothing when called again."""
        self._client.close()


class AsyncHttp:
    """`Http` for asyncio. Belongs to one event loop."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        timeout_s: float,
        ca_file: str | Path | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As `Http`."""
        self.base_url = base_url(url)
        self._timeout_s = timeout_s
        sent = headers(api_key)
        with _refusals():
            self._client = httpx.AsyncClient(
                headers=sent,
                timeout=timeout_s,
                transport=transport,
                verify=_trusted(ca_file),
                trust_env=transport is None and not is_loopback(self.base_url),
            )

    async def send(self, call: ApiCall) -> Reply:
        """As `Http.send`."""
        url = self.base_url + call.path
        try:
            return _reply(await self._client.request(call.method, url, json=call.json))
        except _FAILURES as exc:
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
    if parsed.userinfo:
        raise ValueError(
            f"base_url names a user of {parsed.host}, and the admin key goes in its place; leave what is before @ out"
        )
    return str(parsed).rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own. No proxy of the environment reaches it: it would ask itself."""
    host = httpx.URL(url).host
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _trusted(ca_file: str | Path | None) -> ssl.SSLContext | bool:
    """What httpx checks certificates against. Raises OSError or ssl.SSLError."""
    file = ca_file or os.environ.get("SSL_CERT_FILE")
    return ssl.create_default_context(cafile=str(file)) if file else True


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what httpx and ssl raise for settings that they cannot use into `ValueError`."""
    try:
        yield
    except ImportError as exc:
        raise ValueError(
            "a proxy variable (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY) names a SOCKS proxy, which needs the package "
            "socksio; install it, or add the server to NO_PROXY"
        ) from exc
    except ssl.SSLError as exc:
        raise ValueError(f"the file of certificates cannot be used: {exc.reason or exc}") from exc
    except OSError as exc:
        raise ValueError(f"cannot read the file of certificates {exc.filename or ''}: {exc.strerror}") from exc
    except (httpx.InvalidURL, ValueError) as exc:
        raise ValueError(f"{exc} (the proxy variables ALL_PROXY, HTTPS_PROXY and HTTP_PROXY)") from exc


def _reply(response: httpx.Response) -> Reply:
    request = response.request
    return Reply(request.method, str(request.url), response.status_code, response.reason_phrase, response.content)


def _translate(exc: Exception, *, url: str, timeout_s: float) -> ClientError:
    """The SDK's error for one of httpx, or of what is below it."""
    if "CERTIFICATE_VERIFY_FAILED" in str(exc):
        why = str(exc).rpartition("certificate verify failed: ")[2].partition(" (_ssl")[0]
        message = (
            f"the certificate of {url} is not trusted: {why}; with --ca-file (ca_file) name who signed it, or a "
            "self-signed one itself"
        )
        return APIConnectionError(message, url=url)
    if any(word in str(exc) for word in ("WRONG_VERSION_NUMBER", "record layer failure")):
        return APIConnectionError(f"{url} does not speak TLS; ask it by http://", url=url)
    if isinstance(exc, httpx.ProxyError):
        return APIConnectionError(f"the proxy for {url} refused: {exc}; add the server to NO_PROXY", url=url)
    if isinstance(exc, httpx.ConnectTimeout | httpx.ConnectError):
        reason = "it did not accept within the timeout" if isinstance(exc, httpx.TimeoutException) else str(exc)
        message = f"cannot connect to {url}: {reason}; start the server, or correct the URL"
        return APIConnectionError(message, url=url)
    if isinstance(exc, httpx.TimeoutException):
        return APITimeoutError(f"{url} did not answer within {timeout_s:g} s; raise the timeout or try again", url=url)
    again = "try again, by https:// if the server serves TLS" if url.startswith("http:") else "try again"
    return APIConnectionError(f"the connection to {url} broke: {str(exc) or type(exc).__name__}; {again}", url=url)
