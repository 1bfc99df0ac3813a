# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP protocol for the private ports, with time limits for requests that do not come, and with bounds.

uvicorn waits for ever for the first byte, for the rest of a head and for a body. It takes heads of any length, and
connections until the process has no file descriptors. This module builds on `HttpToolsProtocol`, which is not a public
interface: `tests/unit/transport/test_bounded_http.py` fails when uvicorn changes it.
"""

from __future__ import annotations

import asyncio
import http
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

logger = logging.getLogger(__name__)

EXTENSION = "disagg.protocol"
"""Key in the `extensions` of an ASGI scope. Its value is the `BoundedProtocol` of the request's connection."""
_SECOND_LOOK_S = 0.2
"""Extra time after a deadline: a process that was busy finds its timers due before it has read what came in time."""
_PEER_LOOK_S = 0.5
"""How often the server looks whether a client that has sent further requests ahead is still there."""
_TCP_GONE = frozenset((7, 8, 9))
"""States CLOSE, CLOSE_WAIT and LAST_ACK of Linux' `tcp_info`: the peer has closed its side."""
_OFFER_HEADERS = frozenset((b"upgrade", b"http2-settings"))

Admits = Callable[[Mapping[str, Any]], bool]
"""Takes the ASGI scope of a request; returns whether the request shows that its sender may use this port."""
Stage = Literal["head", "body", "whole"]
"""How much of the current request is here."""


@dataclass(frozen=True)
class HttpLimits:
    """What a connection may take."""

    head_s: float = 10.0
    """Seconds from the connection, or from the first byte of a later request, to the end of the request's head."""
    body_s: float = 120.0
    """Seconds from the head to the end of the body. Time in which the application does not read is not counted."""
    max_head_bytes: int = 65_536
    """Bytes of request line and headers. A longer head is answered with 431."""
    max_connections: int = 4096
    """Connections at once, and never more than half of the process' file descriptors. Beyond it the server closes the
    oldest silent connection, so that a client with an admitted request gets in. `bounded_protocol` says what silent
    means."""


class Door:
    """The connections of one server: how many may be open, which are silent, and how many were closed and why."""

    def __init__(self, name: str, limits: HttpLimits, admits: Admits = lambda scope: True) -> None:
        """`name` is for the log."""
        self.admits = admits
        self.limits = limits
        self.closed: Counter[str] = Counter()
        """Connections that were closed for what they sent or did not send, by reason."""
        self._name = name
        self._silent: dict[BoundedProtocol, None] = {}

    @property
    def max_connections(self) -> int:
        """The limit that follows from the process' present limit of file descriptors, which may be raised meanwhile."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = self.limits.max_connections
        return most if soft == resource.RLIM_INFINITY else min(most, soft // 2)

    def entered(self, connection: BoundedProtocol, num_connections: int) -> None:
        """A new connection; closes the oldest silent one, perhaps this one, when there are too many."""
        self._silent[connection] = None
        if num_connections > self.max_connections:
            oldest = next(iter(self._silent))
            self.left(oldest)
            self.count("too many connections")
            oldest.transport.abort()

    def left(self, connection: BoundedProtocol) -> None:
        """The connection is gone, or has sent a whole request that is admitted."""
        self._silent.pop(connection, None)

    def count(self, reason: str) -> None:
        """One more connection was closed; the first of each reason is logged."""
        self.closed[reason] += 1
        if self.closed[reason] == 1:
            logger.warning("%s: a connection is closed: %s. Further ones are counted only", self._name, reason)


def bounded_protocol(
    name: str, limits: HttpLimits | None = None, *, admits: Admits = lambda scope: True
) -> type[BoundedProtocol]:
    """A class for `http` of one uvicorn server's config. Set `ws="none"` beside it: there are no web sockets.

    An offer to upgrade to another protocol is ignored, and the request is answered as HTTP/1.1. Java's client offers
    h2c with every first request.

    A connection is silent until it has sent a whole request that `admits` accepts. Other requests are answered too.
    """
    return type("BoundedProtocol", (BoundedProtocol,), {"door": Door(name, limits or HttpLimits(), admits)})


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Make the class with `bounded_protocol`, which gives it a door."""

    door: Door
    _stage: Stage = "head"
    _head_bytes = 0
    _deadline: asyncio.TimerHandle | None = None
    _status = 400
    _offered: bytes | None = None
    """The head of a request that offers an upgrade, without the offer. Empty when it asks for a tunnel."""
    _unfinished: tuple[RequestResponseCycle, ...] = ()
    """Requests of this connection that are not answered yet, in their order. A client that sends ahead has several."""
    _peer_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for("head")
        self.door.entered(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self._waited()
        self.door.left(self)
        # uvicorn tells the newest request alone, and the older ones would run to their ends for nobody.
        for cycle in self._unfinished:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        self._unfinished = ()
        if self._peer_look is not None:
            self._peer_look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but a lone line feed does not stop the keep-alive timer, and offers to upgrade are ignored.

        Bad requests are counted here; uvicorn would log each of them.
        """
        if self.parser is None or self.transport.is_closing():
            return
        fed = data
        while True:
            try:
                self.parser.feed_data(fed)
            except httptools.HttpParserUpgrade as exc:
                if not self._offered:
                    self._refuse("a tunnel to another server")
                    return
                # The parser takes what follows for another protocol. Another one reads the request without its offer.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
                fed, self._offered = self._offered + fed[exc.args[0] :], None
            except httptools.HttpParserError:
                self._refuse("it is not HTTP/1.1" if self._status == 400 else "its head is too large")
                return
            else:
                self._after(data)
                return

    def _after(self, data: bytes) -> None:
        if self._stage == "whole":
            return
        if self._stage == "head":
            self._head_bytes += len(data)
            if self._head_bytes > self.door.limits.max_head_bytes:
                self._status = 431
                self._refuse("its head is too large")
                return
        if self._deadline is None:
            self._wait_for(self._stage)

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        self._stage, self._head_bytes = "head", 0
        super().on_message_begin()
        cast(dict[str, Any], self.scope)["extensions"] = {EXTENSION: self}

    def on_headers_complete(self) -> None:
        self._waited()
        self._stage = "body"
        if len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers) > self.door.limits.max_head_bytes:
            self._status = 431
            raise ValueError("the head is too large")
        if self.parser.should_upgrade():
            self._offered = self._head_without_offer()
            return
        super().on_headers_complete()
        self._unfinished = (*(cycle for cycle in self._unfinished if not cycle.response_complete), self.cycle)
        if len(self._unfinished) > 1 and self._peer_look is None:
            self._look_for_peer()

    def on_body(self, body: bytes) -> None:
        if self._offered is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offered is not None:
            return
        self._waited()
        self._stage = "whole"
        if self.door.admits(self.scope):
            self.door.left(self)
        super().on_message_complete()

    def _refuse(self, reason: str) -> None:
        self.door.count(reason)
        self._waited()
        if self.cycle is not None and not self.cycle.response_complete:
            # The bad bytes came behind a request that is being answered. A second answer would end up inside the first.
            self.transport.abort()
            return
        phrase = http.HTTPStatus(self._status).phrase
        head = f"HTTP/1.1 {self._status} {phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        self.transport.write(head.encode())
        self.transport.close()

    def _head_without_offer(self) -> bytes:
        """The head of the current request without its offer to upgrade; empty when it asks for a tunnel."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            return b""
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(t for t in value.split(b",") if t.strip().lower() not in _OFFER_HEADERS)
            if name not in _OFFER_HEADERS:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _look_for_peer(self) -> None:
        """End the connection of a client that has left.

        uvicorn reads nothing while a second request waits for the first one's answer, so the transport does not notice.
        """
        self._peer_look = None
        if self.transport.is_closing() or sum(not cycle.response_complete for cycle in self._unfinished) < 2:
            return
        if has_left(self.transport.get_extra_info("socket")):
            self.transport.abort()
            return
        self._peer_look = self.loop.call_later(_PEER_LOOK_S, self._look_for_peer)

    def _wait_for(self, stage: Stage) -> None:
        limits = self.door.limits
        seconds = limits.head_s if stage == "head" else limits.body_s
        self._deadline = self.loop.call_later(seconds, self._late, stage, False)

    def _waited(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self, stage: Stage, looked_twice: bool) -> None:
        if self.flow.read_paused:
            # The application is slow, not the client.
            self._wait_for(stage)
        elif not looked_twice:
            self._deadline = self.loop.call_later(_SECOND_LOOK_S, self._late, stage, True)
        else:
            self._deadline = None
            self.door.count(f"its {stage} did not come in time")
            self.transport.abort()


def has_left(sock: socket.socket | None) -> bool:
    """Whether the peer of a TCP connection has closed it; False where the system does not tell."""
    tcp_info = getattr(socket, "TCP_INFO", None)
    if sock is None or tcp_info is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return sock.getsockopt(socket.IPPROTO_TCP, tcp_info, 1)[0] in _TCP_GONE


def closed_by(protocol: Any) -> dict[str, int]:
    """How many connections a class of `bounded_protocol` has closed, by reason."""
    return dict(protocol.door.closed)
