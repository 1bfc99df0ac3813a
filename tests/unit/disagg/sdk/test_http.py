# SPDX-License-Identifier: Apache-2.0
"""How SDK and client commands reach a server: proxies of the environment, TLS, and whatever a library raises."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from disagg.cli.main import main
from disagg.errors import APIConnectionError, ClientError
from disagg.sdk.client import AsyncClient, Client
from disagg.sdk.http import Http, is_loopback
from disagg.sdk.messages import ApiCall
from tests.support.certificates import Certificate, self_signed

HEALTH = (
    b'{"status": "ok", "reason": null, "pools": {"prefill": 1, "decode": 1}, "states": {}, '
    b'"num_warm_pairs": 1, "num_cold_pairs": 0}'
)
NOBODY = "127.0.0.1:9"


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(HEALTH)))
        self.end_headers()
        self.wfile.write(HEALTH)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(certificate: Certificate | None = None) -> Iterator[int]:
    """A server that is healthy. Yields its port."""
    server = HTTPServer(("127.0.0.1", 0), _Health)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert, certificate.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HTTP_PROXY", f"http://{NOBODY}"), ("ALL_PROXY", f"socks5://{NOBODY}"), ("all_proxy", "nonsense://x")],
)
def test_no_proxy_is_asked_for_a_loopback_address(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would ask itself, whatever the variable names."""
    monkeypatch.setenv(variable, value)
    with serving() as port:
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{port}"
            with Client(url) as client:
                assert client.health().ok

            async def ask(url: str = url) -> bool:
                async with AsyncClient(url) as client:
                    return (await client.health()).ok

            assert asyncio.run(ask())


def test_loopback_addresses() -> None:
    """By number and by name, and no others."""
    for host in ("127.0.0.1", "127.8.8.8", "[::1]", "localhost", "a.localhost"):
        assert is_loopback(f"http://{host}:8000"), host
    for host in ("10.0.0.1", "localhost.example.com", "example.com", "[fe80::1]"):
        assert not is_loopback(f"http://{host}:8000"), host


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("socks5://127.0.0.1:9", "SOCKS proxy, which needs the package socksio"),
        ("nonsense://x", "nonsense"),
        (f"http://{NOBODY}", "cannot connect"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a server elsewhere the proxies of the environment are asked, and what is wrong with them is said."""
    monkeypatch.setenv("ALL_PROXY", value)
    assert main(["status", "--url", "http://192.0.2.1:8000", "--timeout-s", "2"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-signed certificate is trusted when it is named, and refused in words that say so when it is not."""
    certificate = self_signed(tmp_path)
    with serving(certificate) as port:
        url = f"https://127.0.0.1:{port}"
        with Client(url, ca_file=certificate.cert) as client:
            assert client.health().ok
        with Client(url) as client, pytest.raises(APIConnectionError, match="not trusted: self.signed.*--ca-file"):
            client.health()
        other = self_signed(tmp_path, "other").cert
        with Client(url, ca_file=other) as client, pytest.raises(APIConnectionError, match="not trusted"):
            client.health()
        with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(APIConnectionError, match="https://"):
            client.health()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.cert))
        with Client(url) as client:
            assert client.health().ok
    with (
        serving() as port,
        Client(f"https://127.0.0.1:{port}") as client,
        pytest.raises(APIConnectionError, match="http://"),
    ):
        client.health()


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("nothing", "cannot be used")])
def test_certificates_that_cannot_be_read(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before anything is asked."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    assert main(["status", "--ca-file", str(file)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("no"),
        httpx.ReadTimeout("no"),
        httpx.RemoteProtocolError("no"),
        httpx.ProxyError("407"),
        httpx.TooManyRedirects("no"),
        httpx.DecodingError("no"),
        httpx.InvalidURL("no"),
        httpx.StreamClosed(),
        ssl.SSLError("no"),
        socket.gaierror("no"),
        OSError("no"),
        UnicodeError("label too long"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_library_raises_is_an_error_of_the_sdk(error: Exception) -> None:
    """httpx lets more through than its own errors."""

    def fails(request: httpx.Request) -> httpx.Response:
        raise error

    http = Http("http://127.0.0.1:8000", None, timeout_s=1, transport=httpx.MockTransport(fails))
    with pytest.raises(ClientError):
        http.send(ApiCall("GET", "/health"))


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the way to see where it came from."""

    def broken(self: Client) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr(Client, "pools", broken)
    assert main(["status"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["disagg: unexpected KeyError: 'a\\nb' (disagg --traceback shows where)"]
    with pytest.raises(KeyError):
        main(["--traceback", "status"])
