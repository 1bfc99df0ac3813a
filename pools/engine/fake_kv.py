# SPDX-License-Identifier: Apache-2.0
"""The KV memory of the fake engine: blocks in use, a prefix cache, and hand-offs pinned until fetched or expired.

Holds no bytes, only who would hold them. The side channel lets a decode engine fetch or release a hand-off; it
speaks one JSON line each way over TCP and stands for NIXL's handshake, READ and notification.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pools.engine.base import KVTransferParams
from pools.engine.fake_text import fold

logger = logging.getLogger(__name__)

_SIDE_CHANNEL_TIMEOUT_S = 5.0
"""As NIXL's handshake."""


def num_blocks_of(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


@dataclass
class _Handoff:
    prompt_state: int
    num_tokens: int
    num_blocks: int
    expires_at: float


class FakeKV:
    """Blocks of one fake engine. Used from one event loop; nothing here waits."""

    def __init__(self, *, num_blocks: int, block_size: int, lease_s: float, clock: Callable[[], float]) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_expired = 0
        self._lease_s = lease_s
        self._clock = clock
        self._num_held = 0
        self._num_pinned = 0
        self._handoffs: dict[str, _Handoff] = {}
        self._cached: OrderedDict[tuple[str, int], None] = OrderedDict()

    @property
    def usage(self) -> float:
        """Share of blocks held by running requests and by hand-offs that nobody fetched yet."""
        self.expire()
        return (self._num_held + self._num_pinned) / self.num_blocks

    def try_hold(self, num_blocks: int) -> bool:
        """Take blocks for a running request; False when too few are free."""
        self.expire()
        if self._num_held + self._num_pinned + num_blocks > self.num_blocks:
            return False
        self._num_held += num_blocks
        return True

    def free(self, num_blocks: int) -> None:
        self._num_held -= num_blocks

    def cached_tokens(self, token_ids: Sequence[int], salt: str) -> int:
        """Tokens of the longest cached prefix, whole blocks only, and never the whole prompt."""
        num_cached = 0
        for key in self._keys(token_ids[:-1], salt):
            if key not in self._cached:
                break
            num_cached += self.block_size
        return num_cached

    def cache(self, token_ids: Sequence[int], salt: str) -> None:
        """Remember the whole blocks of a prompt, least recently used ones out first."""
        for key in self._keys(token_ids, salt):
            self._cached[key] = None
            self._cached.move_to_end(key)
        while len(self._cached) > self.num_blocks:
            self._cached.popitem(last=False)

    def _keys(self, token_ids: Sequence[int], salt: str) -> list[tuple[str, int]]:
        keys: list[tuple[str, int]] = []
        state = 0
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            state = fold(token_ids[start : start + self.block_size], state)
            keys.append((salt, state))
        return keys

    def pin(self, request_id: str, token_ids: Sequence[int]) -> list[int]:
        """Keep a finished prompt for a decode engine until fetched, released or expired; returns block ids."""
        num_blocks = num_blocks_of(len(token_ids), self.block_size)
        self._handoffs[request_id] = _Handoff(
            fold(token_ids), len(token_ids), num_blocks, self._clock() + self._lease_s
        )
        self._num_pinned += num_blocks
        return list(range(1, num_blocks + 1))

    def unpin(self, request_id: str) -> _Handoff | None:
        """End a hand-off; None when it is unknown, over or expired."""
        self.expire()
        handoff = self._handoffs.pop(request_id, None)
        if handoff is not None:
            self._num_pinned -= handoff.num_blocks
        return handoff

    def expire(self) -> None:
        """Drop the hand-offs whose lease ran out. Leases start in order, so the oldest is first."""
        now = self._clock()
        while self._handoffs:
            request_id, handoff = next(iter(self._handoffs.items()))
            if handoff.expires_at > now:
                return
            del self._handoffs[request_id]
            self._num_pinned -= handoff.num_blocks
            self.num_expired += 1


class SideChannel:
    """The port on which decode engines fetch and release this engine's hand-offs."""

    def __init__(self, kv: FakeKV, *, engine_id: str, host: str, port: int) -> None:
        self._kv = kv
        self._engine_id = engine_id
        self._server: asyncio.Server | None = None
        self.host = host
        self.port = port
        """The kernel's choice after `start` when it was 0."""

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be bound."""
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await asyncio.wait_for(reader.readline(), _SIDE_CHANNEL_TIMEOUT_S)
            writer.write(json.dumps(self._answer(json.loads(line))).encode() + b"\n")
            await writer.drain()
        except (OSError, ValueError, TimeoutError) as exc:
            logger.warning("side channel: %s", exc)
        finally:
            writer.close()

    def _answer(self, request: Any) -> dict[str, Any]:
        if not isinstance(request, dict) or request.get("engine_id") != self._engine_id:
            return {"found": False}
        handoff = self._kv.unpin(str(request.get("request_id")))
        if handoff is None:
            return {"found": False}
        return {"found": True, "prompt_state": handoff.prompt_state, "num_tokens": handoff.num_tokens}


def handoff_id(params: KVTransferParams | None) -> tuple[str, str] | None:
    """(engine id, request id) that a decode leg's parameters name; None when they name none."""
    if not params or not params.get("do_remote_prefill"):
        return None
    engine_id, request_id = params.get("remote_engine_id"), params.get("remote_request_id")
    if not isinstance(engine_id, str) or not isinstance(request_id, str):
        return None
    return engine_id, request_id


async def end_handoff(params: KVTransferParams) -> dict[str, Any] | None:
    """Tell the prefill engine that a hand-off is over; its record, or None when it is unknown or unreachable."""
    named = handoff_id(params)
    if named is None:
        return None
    try:
        async with asyncio.timeout(_SIDE_CHANNEL_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(params.get("remote_host"), params.get("remote_port"))
            try:
                writer.write(json.dumps({"engine_id": named[0], "request_id": named[1]}).encode() + b"\n")
                reply = json.loads(await reader.readline())
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, ValueError, TypeError, TimeoutError) as exc:
        logger.warning("hand-off %s: prefill engine did not answer: %r", named[1], exc)
        return None
    return reply if isinstance(reply, dict) and reply.get("found") else None
