# SPDX-License-Identifier: Apache-2.0
"""vLLM's client for the media that a request names by URL, kept off the addresses that only we can reach.

Engine and gateway both fetch such media. A client must not get them to ask a metadata service, a loopback port or a
private host on its behalf, not by a name that resolves there, and not by a redirect either. Where the operator names
the hosts (`allowed_media_domains`), these are asked and no others, wherever they are.

vLLM 0.32 chooses its client by `VLLM_MEDIA_CONNECTOR` from a registry that is made for others to add to. The tokenisers
of `mistral_common` fetch the same media once more, with a client of their own, in whose place they get this one.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import ipaddress
import os
import socket
import urllib.request
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import requests
from PIL import Image
from vllm import envs
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from pools.borrowed import MISTRAL_AUDIO, MISTRAL_IMAGE
from transport.upstream.replacing import replace

NAME = "disagg"
_VARIABLE = "VLLM_MEDIA_CONNECTOR"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""All IPv6 addresses that IANA has given out to be reached from anywhere."""


class RefusedHostError(RuntimeError):
    """A URL, or a redirect from it, leads to a host that is not asked."""


def install() -> None:
    """Let vLLM fetch media through this module in this process, unless its environment names another client."""
    MEDIA_CONNECTOR_REGISTRY.register(NAME)(GuardedMediaConnector)
    os.environ.setdefault(_VARIABLE, NAME)


def guard_tokenizers(allowed_media_domains: Sequence[str] | None) -> None:
    """Let the tokenisers of `mistral_common` in this process fetch media by the same rules, after `install`.

    A process that is forked from this one would have it, too, and fetches nothing: call it when EngineCore is there.

    Args:
        allowed_media_domains: the hosts that may be asked, as vLLM gets them; None or empty for all public addresses.
    """
    if os.environ.get(_VARIABLE) == NAME and importlib.util.find_spec("mistral_common") is not None:
        # The tokenisers run in a thread, without a loop.
        allowed_hosts = tuple(allowed_media_domains or ())
        replace(MISTRAL_IMAGE, functools.partial(_image_by, allowed_hosts=allowed_hosts))
        replace(MISTRAL_AUDIO, functools.partial(_audio_by, allowed_hosts=allowed_hosts))


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody can reach, also where it stands for another address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


def named_address(host: str) -> str | None:
    """The IP address that a URL's host is in itself, in whatever spelling; None for a name.

    A resolver and a proxy take `2852039166`, `0xa9fea9fe`, `169.254.43518` and `0251.0376.0251.0376` for the address
    that these stand for, as `inet_aton` of C does.
    """
    bare = host.rstrip(".")
    try:
        return str(ipaddress.ip_address(bare.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(bare))
    except OSError:
        return None


class _PublicResolver(aiohttp.ThreadedResolver):
    """Gives the public addresses of a name alone, and all of a proxy's."""

    def __init__(self, proxies: Collection[str], proxy_addresses: set[str]) -> None:
        super().__init__()
        self._proxies = proxies
        self._proxy_addresses = proxy_addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        """As aiohttp's. Raises RefusedHostError when the name has no public address."""
        found = await super().resolve(host, port, family)
        if host.lower() in self._proxies:
            self._proxy_addresses.update(one["host"] for one in found)
            return found
        public = [one for one in found if is_public(one["host"])]
        if found and not public:
            _refuse(", ".join(sorted({one["host"] for one in found})), "public addresses")
        return public


class GuardedConnection(HTTPConnection):
    """HTTP to public addresses, or to the named hosts alone."""

    def __init__(self, allowed_hosts: Sequence[str] = ()) -> None:
        super().__init__()
        self._async_client: aiohttp.ClientSession | None = None
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._proxies = frozenset(
            host for url in urllib.request.getproxies().values() if (host := urlsplit(url).hostname) is not None
        )
        self._proxy_addresses = {address for host in self._proxies if (address := named_address(host)) is not None}

    async def get_async_client(self) -> aiohttp.ClientSession:
        if self._async_client is None:
            resolver = None if self._allowed_hosts else _PublicResolver(self._proxies, self._proxy_addresses)
            connector = aiohttp.TCPConnector(socket_factory=self._socket, resolver=resolver)
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
        if not self._allowed_hosts and self._is_private(host):
            # What the URL itself names: a proxy would be what connects to it.
            _refuse(host, "public addresses")
        return await handler(request)

    def _is_private(self, host: str) -> bool:
        if (address := named_address(host)) is not None:
            return not is_public(address)
        name = host.rstrip(".")
        return name == "localhost" or name.endswith(".localhost") or name in self._proxies

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        """aiohttp calls it with each address that it is about to connect to: after DNS, and for redirects, too."""
        family, kind, protocol, _, where = address
        if not self._allowed_hosts and not is_public(where[0]) and where[0] not in self._proxy_addresses:
            _refuse(where[0], "public addresses")
        return socket.socket(family, kind, protocol)


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
        """As vLLM's. Raises VLLMValidationError, which is answered 400, for what this server does not fetch."""
        if self.allowed_local_media_path is None and url[:5].lower() == "file:":
            # vLLM raises a RuntimeError, which is answered 500 and tried again elsewhere.
            self._invalid(url, "files are not read; this server has no allowed_local_media_path (model.engine_kwargs)")
        try:
            return await super().load_from_url_async(url, *args, **kwargs)
        except (RefusedHostError, NotImplementedError) as exc:
            self._invalid(url, str(exc), exc)

    def _invalid(self, url: str, why: str, cause: Exception | None = None) -> NoReturn:
        raise VLLMValidationError(why, parameter="url", value=url[:200]) from cause


def _image_by(theirs: Callable[..., Any], *, allowed_hosts: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def download_image(url: str, timeout: float | None = None) -> Image.Image:
        return Image.open(BytesIO(_fetched(url, allowed_hosts, timeout or envs.VLLM_IMAGE_FETCH_TIMEOUT)))

    return download_image


def _audio_by(theirs: staticmethod[..., Any], *, allowed_hosts: tuple[str, ...]) -> staticmethod[..., Any]:
    from mistral_common.tokens.tokenizers.audio import Audio

    @functools.wraps(theirs.__func__)
    def from_url(url: str, strict: bool = True, timeout: float | None = None) -> Any:
        return Audio.from_bytes(_fetched(url, allowed_hosts, timeout or envs.VLLM_AUDIO_FETCH_TIMEOUT), strict=strict)

    return staticmethod(from_url)


def _fetched(url: str, allowed_hosts: tuple[str, ...], timeout_s: float) -> bytes:
    """What is at a URL. Blocks. Raises RefusedHostError, and what aiohttp raises."""

    async def fetch() -> bytes:
        connection = GuardedConnection(allowed_hosts)
        try:
            fetched: bytes = await connection.async_get_bytes(
                url, timeout=timeout_s, allow_redirects=envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS
            )
            return fetched
        finally:
            if connection._async_client is not None:
                await connection._async_client.close()

    with ThreadPoolExecutor(1) as thread:
        # vLLM's offline classes render in a thread that may run a loop already.
        return thread.submit(asyncio.run, fetch()).result()
