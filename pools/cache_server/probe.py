# SPDX-License-Identifier: Apache-2.0
"""Asks an LMCache server over its message queue, as its engines do.

LMCache's own client needs torch, which is 350 MB in a process that only watches. Two requests without arguments are
all that is asked here; their numbers are frozen in LMCache, and a test compares them with the installed one.

Source: `lmcache/v1/multiprocess/transport/zmq_impl/` 0.5.6. A request is [uid, operation], an answer [uid, operation,
value], each frame in MessagePack. An operation that the server does not know is not answered.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio

from pools.errors import EngineStartError
from transport.tiers import ExternalServerConfig

GET_CHUNK_SIZE = 21
GET_EXPERIMENTAL = 32
_ANSWER_S = 5.0


async def ask(url: str, operation: int, *, timeout_s: float) -> Any:
    """Send one request and return the answer. Raises TimeoutError without one, ValueError for a wrong one.

    Args:
        url: `tcp://host:port`.
    """
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(url)
        request = [msgspec.msgpack.encode(1), msgspec.msgpack.encode(operation)]
        async with asyncio.timeout(timeout_s):
            await socket.send_multipart(request)
            answer = await socket.recv_multipart()
    try:
        uid, answered, value = (msgspec.msgpack.decode(frame) for frame in answer)
    except (msgspec.DecodeError, ValueError) as exc:
        raise ValueError(f"{url} speaks another protocol than LMCache's") from exc
    if (uid, answered) != (1, operation):
        raise ValueError(f"{url} answers another request than it was sent")
    return value


async def is_well(url: str, *, chunk_tokens: int, timeout_s: float) -> bool:
    """Whether the server's message queue answers, and with the right chunk size.

    The server's `/healthcheck` stays 200 when the queue's thread is dead.
    """
    try:
        return bool(await ask(url, GET_CHUNK_SIZE, timeout_s=timeout_s) == chunk_tokens)
    except (TimeoutError, ValueError, zmq.ZMQError):
        return False


async def http_get(url: str, *, timeout_s: float) -> tuple[int, str]:
    """Status and body of a GET; proxies of the environment are not asked. Raises OSError or HTTPException."""
    return await asyncio.to_thread(_get, url, timeout_s)


def _get(url: str, timeout_s: float) -> tuple[int, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


async def check_external(config: ExternalServerConfig) -> None:
    """Refuse an external server that engines could not use.

    Raises:
        EngineStartError: it does not answer, speaks another protocol, or has another chunk size or version.
    """
    field = "shared_cache.server.url"
    try:
        chunk_tokens = await ask(config.url, GET_CHUNK_SIZE, timeout_s=_ANSWER_S)
    except TimeoutError:
        raise EngineStartError(
            f"{field}: no LMCache server answers at {config.url} within {_ANSWER_S:g} s; start it first"
        ) from None
    except (ValueError, zmq.ZMQError) as exc:
        raise EngineStartError(f"{field}: {exc}") from exc
    if chunk_tokens != config.chunk_tokens:
        raise EngineStartError(
            f"shared_cache.server.chunk_tokens is {config.chunk_tokens}, but the server at {config.url} has "
            f"--chunk-size {chunk_tokens}"
        )
    # The newest of the numbered operations; the client of this version asks for it too.
    try:
        await ask(config.url, GET_EXPERIMENTAL, timeout_s=_ANSWER_S)
    except (TimeoutError, ValueError) as exc:
        raise EngineStartError(
            f"{field}: the server at {config.url} does not know all requests of LMCache {_installed()}; "
            "run the same version there"
        ) from exc
    if config.http_url is not None:
        await _check_version(config.http_url)


async def _check_version(http_url: str) -> None:
    field = "shared_cache.server.http_url"
    try:
        status, body = await http_get(f"{http_url}/lmc_version", timeout_s=_ANSWER_S)
        version = str(json.loads(body)) if status == 200 else ""
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise EngineStartError(f"{field}: {http_url} does not answer: {exc}") from exc
    if version.split(".")[:2] != _installed().split(".")[:2]:
        raise EngineStartError(
            f"{field}: the server's LMCache is {version or 'unknown'}, the engines' is {_installed()}; "
            "run the same version there"
        )


def _installed() -> str:
    return metadata.version("lmcache")
