# SPDX-License-Identifier: Apache-2.0
"""Socket-to-socket streaming where uvicorn serves the client in this process (behind HAProxy, or alone).

The ASGI path costs a task switch and several calls a token. Here the engine's chunk is written to the client's
transport inside the call that received it. This module hangs on uvicorn's `HttpToolsProtocol`, which is not a public
interface: `tests/unit/disagg/gateway/stream/test_splice.py` fails when uvicorn changes it. Whenever anything is not as
expected, `splice_of` returns None, and the response goes over plain ASGI.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from pools.borrowed import BORROWED, HTTP_PROTOCOL
from pools.client.http1 import Exchange
from transport.bounded_http import EXTENSION, BoundedProtocol, Door, HttpLimits
from transport.upstream.guard import require
from transport.upstream.replacing import replace

_LIMITS = HttpLimits(body_s=600.0, max_head_bytes=2**20, max_connections=16_384)
"""Against clients that hold connections. `gateway.body_timeout_s` and `gateway.max_header_bytes` refuse far sooner."""


class SplicingProtocol(BoundedProtocol):
    """uvicorn's HTTP protocol, which tells a splice when the client is slow."""

    door = Door("the gateway's port", _LIMITS)
    _exchange: Exchange | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._exchange is not None:
            self._exchange.resume()

    async def splice(
        self,
        exchange: Exchange,
        through: Callable[[bytes], bytes] | None = None,
        *,
        noted: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        """Write every further chunk of `exchange` to the client, in chunked encoding. Raises ReplicaLostError.

        Args:
            through: makes of each chunk what the client gets; it must not raise.
            noted: called with each chunk, if there is no `through`.
        """
        write, is_closing = self.transport.write, self.transport.is_closing

        def to_client(data: bytes) -> None:
            noted(data)
            # When a client has left, uvloop raises on its closed transport, and the error would look like the engine's.
            if not is_closing():
                write(b"%x\r\n%b\r\n" % (len(data), data))

        def what_is_left(data: bytes) -> None:
            if (data := cast(Callable[[bytes], bytes], through)(data)) and not is_closing():
                write(b"%x\r\n%b\r\n" % (len(data), data))

        self._exchange = exchange
        try:
            sink = to_client if through is None else what_is_left
            await exchange.forward(sink, is_full=lambda: self.flow.write_paused)
        finally:
            self._exchange = None


def install() -> None:
    """Make every uvicorn server that starts later in this process speak through `SplicingProtocol`.

    Raises:
        UpstreamChangedError: uvicorn's protocol is not the one that `SplicingProtocol` extends.
    """
    require(BORROWED, "disagg.gateway.stream.splice")
    replace(HTTP_PROTOCOL, splicing)


def splicing(original: object) -> type[SplicingProtocol]:
    """The class that takes the place of uvicorn's default protocol class."""
    return SplicingProtocol


def protocol_of(scope: Any) -> SplicingProtocol | None:
    """The protocol of the client's connection; None unless it is a `SplicingProtocol` in the running loop."""
    protocol = (scope.get("extensions") or {}).get(EXTENSION)
    if not isinstance(protocol, SplicingProtocol) or protocol.loop is not asyncio.get_running_loop():
        return None
    return protocol


def splice_of(scope: Any) -> SplicingProtocol | None:
    """As `protocol_of`, but None unless the response is started, chunked, and the one under way on its connection."""
    protocol = protocol_of(scope)
    if protocol is None:
        return None
    cycle = protocol.cycle
    if cycle is None or not cycle.response_started or cycle.response_complete or not cycle.chunked_encoding:
        return None
    return protocol
