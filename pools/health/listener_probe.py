# SPDX-License-Identifier: Apache-2.0
"""Asks an engine's transport whether it still answers other engines. The engine's `/health` does not know.

Source: vLLM 0.32 `nixl/base_scheduler.py` (handshake listener) and Mooncake's `GET /query`. In an older
vLLM the listener's thread ends at any message but the one sent here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http.client import HTTPException
from typing import assert_never

import msgspec

from pools.cache_server.probe import http_get
from pools.process.descriptors import OWN_ERRORS
from transport.descriptor import Listener

ListenerProbe = Callable[[float], Awaitable[bool]]
"""Whether the listener answers within the given seconds. Raises when it cannot be asked, e.g. for want of memory."""

_QUESTION = msgspec.msgpack.encode((b"get_meta_msg", 0, 0))
"""For the metadata of pipeline rank 0, tensor rank 0, which every engine has."""
_NUM_PARTS = 2


def listener_probe(listener: Listener, *, fake: bool = False) -> ListenerProbe | None:
    """A probe that asks what every engine can answer at `listener`. None where a `fake` engine has no such listener."""
    match listener.protocol:
        case "nixl_handshake":
            return None if fake else nixl_probe(listener.host, listener.port)
        case "http_query":
            return mooncake_probe(listener.url)
        case _:
            assert_never(listener.protocol)


def nixl_probe(host: str, port: int) -> ListenerProbe:
    """A probe of NIXL's side channel."""
    address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    async def ask(timeout_s: float) -> bool:
        # In a thread: pyzmq's asyncio sockets poll through the event loop's own file descriptors, which an engine's
        # server should not pay for.
        return await asyncio.to_thread(_ask_nixl, address, timeout_s)

    return ask


def mooncake_probe(bootstrap_url: str) -> ListenerProbe:
    """A probe of Mooncake's bootstrap server."""

    async def ask(timeout_s: float) -> bool:
        try:
            status, _ = await http_get(f"{bootstrap_url}/query", timeout_s=timeout_s)
        except HTTPException:
            return False
        except OSError as exc:
            if exc.errno in OWN_ERRORS:
                raise
            return False
        return status == 200

    return ask


def _ask_nixl(address: str, timeout_s: float) -> bool:
    import zmq

    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.setsockopt(zmq.IPV6, 1)
        socket.rcvtimeo = socket.sndtimeo = int(timeout_s * 1000)
        socket.connect(address)
        try:
            socket.send(_QUESTION)
            return len(socket.recv_multipart()) == _NUM_PARTS
        except zmq.ZMQError:
            return False
