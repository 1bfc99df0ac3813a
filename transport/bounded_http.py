# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP protocol for the private ports: with time limits for requests that do not come, and bounds.

uvicorn waits for ever for the first byte, for the rest of a head and for a body, takes heads of any length, and takes
connections until the process has no file descriptors. It hangs on `HttpToolsProtocol`, which is not a public
interface: `tests/unit/transport/test_bounded_http.py` fails when it changes.
"""

from __future__ import annotations

import asyncio
import http
import logging
import resource
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

EXTENSION = "disagg.protocol"
"""Under this name a scope's `extensions` have the protocol that the request came by."""
_SECOND_LOOK_S = 0.2
"""A process that was busy finds its timers due before it has read what came meanwhile; so it reads first."""

Admits = Callable[[Mapping[str, Any]], bool]
"""Whether a request, an ASGI scope, shows that its sender may be here."""
Stage = Literal["head", "body", "whole"]
"""How much of the current request is here."""


@dataclass(frozen=True)
class HttpLimits:
    """What a connection may take."""

    head_s: float = 10.0
    """From the connection, or from the first byte of a later request, to the end of its head."""
    body_s: float = 120.0
    """From the head to the end of the body. Time in which the application does not read is not counted."""
    max_head_bytes: int = 65_536
    """Request line and headers; beyond it 431."""
    max_connections: int = 4096
    """Connections at once, and never more than half of the process' file descriptors. Beyond it the oldest one that
    never sent a whole request, from somebody who may send one, is closed, so that whoever sends one gets in."""


class Door:
    """The connections of one server: how many, who has yet to send something, and how many were closed and why."""

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
        """As the process' limit of file descriptors is now: it may be raised after this class is made."""
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
        """It is gone, or has sent a whole request that is admitted."""
        self._silent.pop(connection, None)

    def count(self, reason: str) -> None:
        """One more was closed; the first of each reason is logged."""
        self.closed[reason] += 1
        if self.closed[reason] == 1:
            logger.warning("%s: a connection is closed: %s. Further ones are counted only", self._name, reason)


def bounded_protocol(
    name: str, limits: HttpLimits | None = None, *, admits: Admits = lambda scope: True
) -> type[BoundedProtocol]:
    """A class for `http` of one uvicorn server's config. Set `ws="none"` beside it: upgrades are refused.

    A connection that has sent nothing that `admits` counts as silent, though it is answered.
    """
    return type("BoundedProtocol", (BoundedProtocol,), {"door": Door(name, limits or HttpLimits(), admits)})


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Use it by `bounded_protocol`, which gives it a door."""

    door: Door
    _stage: Stage = "head"
    _head_bytes = 0
    _deadline: asyncio.TimerHandle | None = None
    _status = 400

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for("head")
        self.door.entered(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self._waited()
        self.door.left(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, which however stops the keep-alive timer for a lone line feed and logs every bad request."""
        if self.parser is None or self.transport.is_closing():
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse("an upgrade to another protocol")
        except httptools.HttpParserError:
            self._refuse("it is not HTTP/1.1" if self._status == 400 else "its head is too large")
        else:
            self._after(data)

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
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._waited()
        self._stage = "whole"
        if self.door.admits(self.scope):
            self.door.left(self)
        super().on_message_complete()

    def _refuse(self, reason: str) -> None:
        self.door.count(reason)
        self._waited()
        if self.cycle is not None and not self.cycle.response_complete:
            # What came behind a request that is being answered: an answer here would end up within that one.
            self.transport.abort()
            return
        phrase = http.HTTPStatus(self._status).phrase
        head = f"HTTP/1.1 {self._status} {phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        self.transport.write(head.encode())
        self.transport.close()

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


def closed_by(protocol: Any) -> dict[str, int]:
    """How many connections a class of `bounded_protocol` has closed, by reason."""
    return dict(protocol.door.closed)
