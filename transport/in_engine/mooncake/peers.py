# SPDX-License-Identifier: Apache-2.0
"""Tells when a process that listens on a TCP port is gone. Pure asyncio, knows neither vLLM nor ZMQ.

A ZMQ socket reconnects in silence, so code that waits for an answer on it never hears that the peer died. A refused
connection alone counts as death: the kernel of a living host says that nothing listens. A host that does not answer may
come back and still write KV. So it does not count as gone, and the caller's own time limit decides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

_PERIOD_S = 0.5
_CONNECT_S = 2.0
_REFUSALS = 2


async def refuses(host: str, port: int) -> bool:
    """True when the kernel of `host` says that nothing listens on `port`; False for every other outcome."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _CONNECT_S)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return False


class Peers:
    """Looks at peers while somebody waits for them; one look serves all who wait. Use it from one event loop."""

    def __init__(self, period_s: float = _PERIOD_S, refused: Callable[[str, int], Awaitable[bool]] = refuses) -> None:
        self._period_s = period_s
        self._refused = refused
        self._looks: dict[str, tuple[asyncio.Task[None], list[object]]] = {}

    async def gone(self, address: str) -> None:
        """Returns when `address` (`tcp://host:port`) has refused two connections in a row, and not before."""
        me = object()
        if address not in self._looks:
            self._looks[address] = (asyncio.create_task(self._look(address)), [])
        look, waiting = self._looks[address]
        waiting.append(me)
        try:
            await asyncio.shield(look)
        finally:
            waiting.remove(me)
            if not waiting:
                look.cancel()
                if self._looks.get(address, (None,))[0] is look:
                    del self._looks[address]

    async def _look(self, address: str) -> None:
        parts = urlsplit(address)
        refusals = 0
        while refusals < _REFUSALS:
            await asyncio.sleep(self._period_s)
            refusals = refusals + 1 if await self._refused(parts.hostname or "", parts.port or 0) else 0
