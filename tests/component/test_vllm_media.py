# SPDX-License-Identifier: Apache-2.0
"""Which hosts engine and gateway ask for the media that a request names by URL."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import socket
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import pytest
import vllm.envs as envs
from mistral_common.protocol.instruct.chunk import ImageURLChunk
from mistral_common.tokens.tokenizers import audio, image
from PIL import Image
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.renderers.mistral import safe_apply_chat_template

from pools.engine import vllm_media
from pools.engine.vllm_media import GuardedMediaConnector, RefusedHostError, is_public


class Text:
    """Media that is what was fetched."""

    def load_bytes(self, data: bytes) -> bytes:
        return data

    def load_base64(self, media_type: str, data: str) -> bytes:
        return base64.b64decode(data)

    def get_max_bytes(self) -> None:
        return None


class Server:
    """Answers `found`, or sends the client elsewhere, and counts who asks."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.port = 0
        self.location: str | None = None
        self.content = b"found"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_asked += 1
        await reader.readuntil(b"\r\n\r\n")
        if self.location is None:
            head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(self.content)}\r\nconnection: close\r\n\r\n"
            writer.write(head.encode() + self.content)
        else:
            head = f"HTTP/1.1 302 Found\r\nlocation: {self.location}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            writer.write(head.encode())
        writer.close()


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0) as listening:
        server.port = listening.sockets[0].getsockname()[1]
        yield server


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections belong to an event loop, and no proxy is between."""
    monkeypatch.setattr(GuardedMediaConnector, "_connections", {})
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


async def fetched(url: str, hosts: list[str] | None = None) -> Any:
    connector = GuardedMediaConnector(allowed_media_domains=hosts)
    try:
        return await connector.load_from_url_async(url, Text(), fetch_timeout=5)
    finally:
        for connection in GuardedMediaConnector._connections.values():
            if connection._async_client is not None:
                await connection._async_client.close()
        GuardedMediaConnector._connections.clear()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:db8::1"),
        *("fec0::1", "64:ff9b:1::7f00:1", "::127.0.0.1", "::ffff:0:127.0.0.1", "2001:0:7f00:1::1", "4000::1"),
    ],
)
def test_not_public(address: str) -> None:
    """Loopback, private, link-local, shared, documentation, and whatever stands for one of these."""
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::101:101"])
def test_public(address: str) -> None:
    assert is_public(address)


PRIVATE = ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "127.1", "localhost.", "a.localhost"]


@pytest.mark.parametrize("host", PRIVATE)
async def test_private_hosts_are_not_asked(host: str) -> None:
    """By address, by name and in any spelling: a client's error, and the server has seen no connection."""
    async with serving() as server:
        with pytest.raises((VLLMValidationError, VLLMUnprocessableEntityError), match="media_domains|Invalid URL"):
            await fetched(f"http://{host}:{server.port}/a.png")
        assert server.num_asked == 0


async def test_a_name_that_resolves_to_a_private_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is where the connection goes."""
    really = socket.getaddrinfo

    def resolved(host: Any, *args: Any, **kwargs: Any) -> Any:
        return really("127.0.0.1" if host == "images.example.com" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    async with serving() as server:
        with pytest.raises(VLLMValidationError, match=r"not fetched from 127\.0\.0\.1"):
            await fetched(f"http://images.example.com:{server.port}/a.png")
        assert server.num_asked == 0


RESOLVED: dict[str, list[str]] = {
    "one family": ["127.0.0.1", "10.0.0.1"],
    "both families": ["::1", "127.0.0.1", "169.254.169.254"],
}


@pytest.mark.parametrize("addresses", RESOLVED.values(), ids=list(RESOLVED))
async def test_a_name_of_several_private_addresses(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Told as the client's error too, with the reason."""
    resolved_to(monkeypatch, addresses)
    with pytest.raises(VLLMValidationError, match=r"not fetched from .*127\.0\.0\.1"):
        await fetched("http://images.example.com:9/a.png")


async def test_the_public_addresses_of_a_name_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no private one beside them."""
    async with serving() as server:
        resolved_to(monkeypatch, ["10.0.0.1", "127.0.0.1"])
        monkeypatch.setattr(vllm_media, "is_public", lambda address: address == "127.0.0.1")
        assert await fetched(f"http://images.example.com:{server.port}/a.png") == b"found"


def resolved_to(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    """Every name but numbers is found at these addresses."""

    def resolved(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        ends = [(address, port, 0, 0) if ":" in address else (address, port) for address in addresses]
        return [(family, socket.SOCK_STREAM, 6, "", end) for family, end in zip(families, ends, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


async def test_redirects_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A public host that sends the client to a private one."""
    async with serving() as public, serving() as private:
        public.location = f"http://127.0.0.1:{private.port}/secret"
        monkeypatch.setattr(vllm_media, "is_public", lambda address: not private_only)
        private_only = False
        assert await fetched(f"http://127.0.0.1:{public.port}/a") == b"found"
        assert (public.num_asked, private.num_asked) == (1, 1)
        # The first host, its address, and the host of the redirect.
        asked = iter([True, True, False])
        monkeypatch.setattr(vllm_media, "is_public", lambda address: next(asked))
        with pytest.raises(VLLMValidationError, match="not fetched from"):
            await fetched(f"http://127.0.0.1:{public.port}/a")
        assert (public.num_asked, private.num_asked) == (2, 1)


async def test_named_hosts_alone() -> None:
    """Where the operator names hosts they are asked wherever they are, no others are, and a redirect leads nowhere
    else."""
    async with serving() as named, serving() as other:
        url = f"http://localhost:{named.port}/a"
        assert await fetched(url, ["localhost"]) == b"found"
        for refused in (f"http://127.0.0.1:{other.port}/", f"http://example.com:{other.port}/"):
            with pytest.raises((VLLMValidationError, ValueError), match="localhost"):
                await fetched(refused, ["localhost"])
        named.location = f"http://127.0.0.1:{other.port}/"
        with pytest.raises(VLLMValidationError, match=r"not fetched from 127\.0\.0\.1; .* only localhost"):
            await fetched(url, ["localhost"])
        assert other.num_asked == 0


METADATA = [
    *("169.254.169.254", "2852039166", "0xa9fea9fe", "169.254.43518", "0251.0376.0251.0376", "169.254.169.254."),
    *("localhost", "LOCALHOST.", "[::ffff:169.254.169.254]"),
]


async def test_a_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in a private network; what it reaches is up to it, but for addresses that the URL itself names."""
    async with serving() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        assert await fetched("http://images.example.com/a.png") == b"found"
        for host in METADATA:
            with pytest.raises(VLLMValidationError, match="not fetched from"):
                await fetched(f"http://{host}/latest/meta-data")
        assert proxy.num_asked == 1


async def test_a_proxy_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its private address is connected to for what it fetches, and not for media of its own."""
    async with serving() as proxy:
        monkeypatch.setenv("http_proxy", f"http://proxy.internal:{proxy.port}")
        resolved_to(monkeypatch, ["127.0.0.1"])
        assert await fetched("http://images.example.com/a.png") == b"found"
        monkeypatch.setenv("no_proxy", "proxy.internal,images.example.com")
        for host in ("proxy.internal", "images.example.com"):
            with pytest.raises(VLLMValidationError, match="not fetched from"):
                await fetched(f"http://{host}:{proxy.port}/a.png")
        assert proxy.num_asked == 1


async def test_data_urls_and_files() -> None:
    """Data comes as ever, files do not."""
    assert await fetched("data:text/plain;base64,Zm91bmQ=") == b"found"
    for url in ("file:///etc/passwd", "FILE:///etc/passwd"):
        with pytest.raises(VLLMValidationError, match="allowed_local_media_path"):
            await fetched(url)
    with pytest.raises(VLLMValidationError, match="base64"):
        await fetched("data:text/plain,found")


@pytest.fixture
def mistral(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mistral_common` as nobody has touched it, and its like again behind the test."""
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", vllm_media.NAME)
    monkeypatch.setattr(image, "download_image", inspect.unwrap(image.download_image))
    monkeypatch.setattr(audio.Audio, "from_url", staticmethod(inspect.unwrap(audio.Audio.from_url)))


def told_by_mistral(url: str) -> str:
    """How vLLM's renderer refuses a chat with this image, after its own fetch."""

    class Tokenizer:
        def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
            return image.image_from_chunk(ImageURLChunk(image_url=url))

    with pytest.raises(ValueError) as refused:
        safe_apply_chat_template(Tokenizer(), [])  # type: ignore[arg-type]
    return str(refused.value)


@pytest.mark.usefixtures("mistral")
async def test_mistral_asks_no_private_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenisers fetch by the same rules, redirects and names included, and what is refused is a ValueError."""
    vllm_media.install()
    vllm_media.guard_tokenizers(None)
    async with serving() as public, serving() as private:
        url = f"http://127.0.0.1:{private.port}/a.png"
        for refused in (url, f"http://localhost:{private.port}/a.png"):
            assert "not fetched from" in await asyncio.to_thread(told_by_mistral, refused)
        with pytest.raises(RefusedHostError):
            await asyncio.to_thread(audio.Audio.from_url, url, strict=True, timeout=None)
        public.location = url
        asked = iter([True, True, False])
        monkeypatch.setattr(vllm_media, "is_public", lambda address: next(asked))
        assert "not fetched from" in await asyncio.to_thread(told_by_mistral, f"http://127.0.0.1:{public.port}/a.png")
        assert (public.num_asked, private.num_asked) == (1, 0)


@pytest.mark.usefixtures("mistral")
async def test_mistral_asks_named_hosts() -> None:
    """It gets an image from them, and from no others."""
    vllm_media.install()
    vllm_media.guard_tokenizers(["localhost"])
    async with serving() as server:
        picture = BytesIO()
        Image.new("RGB", (3, 2)).save(picture, "PNG")
        server.content = picture.getvalue()
        url = f"http://localhost:{server.port}/a.png"
        found = await asyncio.to_thread(image.image_from_chunk, ImageURLChunk(image_url=url))
        assert found.size == (3, 2)
        other = url.replace("localhost", "127.0.0.1")
        assert "only localhost" in await asyncio.to_thread(told_by_mistral, other)


@pytest.mark.usefixtures("mistral")
def test_vllm_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name in the environment, unless that names another client."""
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "")
    monkeypatch.delenv("VLLM_MEDIA_CONNECTOR")
    vllm_media.install()
    assert type(MEDIA_CONNECTOR_REGISTRY.load(envs.VLLM_MEDIA_CONNECTOR)) is GuardedMediaConnector
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "http")
    vllm_media.install()
    assert type(MEDIA_CONNECTOR_REGISTRY.load(envs.VLLM_MEDIA_CONNECTOR)) is MediaConnector
