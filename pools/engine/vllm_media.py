# SPDX-License-Identifier: Apache-2.0
"""vLLM's client for the media that a request names by URL, kept off the addresses that only we can reach.

Engine and gateway both fetch such media. A client must not get them to ask a metadata service, a loopback port or a
private host on its behalf, not by a name that resolves there, and not by a redirect either. Where the operator names
the hosts (`allowed_media_domains`), these are asked and no others, wherever they are.

vLLM 0.32 chooses its client by `VLLM_MEDIA_CONNECTOR` from a registry that is made for others to add to.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import urllib.request
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import requests
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

NAME = "disagg"
_VARIABLE = "VLLM_MEDIA_CONNECTOR"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedHostError(RuntimeError):
    """A URL, or a redirect from it, leads to a host that is not asked."""


def install() -> None:
    """Let vLLM fetch media through this module in this process, unless its environment names another client."""
    MEDIA_CONNECTOR_REGISTRY.register(NAME)(GuardedMediaConnector)
    os.environ.setdefault(_VARIABLE, NAME)


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody can reach, also where it stands for another address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class GuardedConnection(HTTPConnection):
    """HTTP to public addresses, or to the named hosts alone."""

    def __init__(self, allowed_hosts: Sequence[str] = ()) -> None:
        super().__init__()
        self._async_client: aiohttp.ClientSession | None = None
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._proxies = frozenset(
            host for url in urllib.request.getproxies().values() if (host := urlsplit(url).hostname) is not None
        )

    async def get_async_client(self) -> aiohttp.ClientSession:
        if self._async_client is None:
            connector = aiohttp.TCPConnector(socket_factory=self._socket)
            self._async_client = aiohttp.ClientSession(
                trust_env=True, connector=connector, middlewares=(self._checked,)
            )
        return self._async_client

    def get_sync_client(self) -> requests.Session:
        # Only vLLM's offline classes use it. It knows no hook for each connection.
        raise RefusedHostError("media are fetched by the asynchronous client alone")

    async def _checked(self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> Any:
        """aiohttp calls it for the URL and for each redirect from it."""
        host = (request.url.host or "").lower()
        if self._allowed_hosts and host not in self._allowed_hosts:
            _refuse(host, f"only {', '.join(sorted(self._allowed_hosts))}")
        with contextlib.suppress(ValueError):
            # An address that the URL itself names: a proxy would be what connects to it.
            if not self._allowed_hosts and not is_public(host):
                _refuse(host, "public addresses")
        return await handler(request)

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        """aiohttp calls it with each address that it is about to connect to: after DNS, and for redirects, too."""
        family, kind, protocol, _, where = address
        if not self._allowed_hosts and not is_public(where[0]) and not self._is_proxy(where[0]):
            _refuse(where[0], "public addresses")
        return socket.socket(family, kind, protocol)

    def _is_proxy(self, address: str) -> bool:
        return any(address in {info[4][0] for info in socket.getaddrinfo(host, None)} for host in self._proxies if host)


def _refuse(host: str, allowed: str) -> NoReturn:
    raise RefusedHostError(
        f"media are not fetched from {host}; this server asks {allowed} (model.engine_kwargs.allowed_media_domains)"
    )


class GuardedMediaConnector(MediaConnector):
    """As vLLM's, through a `GuardedConnection`."""

    _connections: dict[tuple[str, ...], GuardedConnection] = {}  # noqa: RUF012 - vLLM makes a connector a request

    def __init__(
        self, media_io_kwargs: Any = None, *, allowed_media_domains: list[str] | None = None, **others: Any
    ) -> None:
        hosts = tuple(allowed_media_domains or ())
        connection = self._connections.setdefault(hosts, GuardedConnection(hosts))
        super().__init__(media_io_kwargs, connection, allowed_media_domains=allowed_media_domains, **others)

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().load_from_url_async(url, *args, **kwargs)
        except RefusedHostError as exc:
            raise VLLMValidationError(str(exc), parameter="url", value=url[:200]) from exc
