# SPDX-License-Identifier: Apache-2.0
"""Listeners that answer, answer wrong, and do not answer."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from pools.config import FakeEngineConfig
from pools.engine.fake.engine import FakeEngine
from pools.health import listener_probe as module
from pools.health.listener_probe import listener_probe, mooncake_probe, nixl_probe
from pools.process.ports import free_port
from transport.config import MooncakeConfig
from transport.transports import describe

MOONCAKE = describe(MooncakeConfig(type="mooncake"))


class Listener(threading.Thread):
    """As vLLM's: decodes strictly, and dies of what it does not understand."""

    def __init__(self, parts: int) -> None:
        super().__init__(daemon=True)
        self.parts = parts
        self.asked: list[object] = []
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")

    def run(self) -> None:
        try:
            while True:
                identity, empty, message = self.socket.recv_multipart()
                word, pipeline_rank, tensor_rank = msgspec.msgpack.decode(message)
                self.asked.append((word, pipeline_rank, tensor_rank))
                self.socket.send_multipart([identity, empty, *[b"x"] * self.parts])
        except zmq.ContextTerminated:
            self.socket.close()


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    """Listeners that answer with two parts, as vLLM does, and with one."""
    started = [Listener(2), Listener(1)]
    for listener in started:
        listener.start()
    yield started
    for listener in started:
        listener.context.term()
        listener.join(5)


async def test_nixl(listeners: list[Listener]) -> None:
    """Two parts are an answer, one is not; each question is the one that every engine can answer."""
    good, bad = listeners
    assert await nixl_probe("127.0.0.1", good.port)(5)
    assert not await nixl_probe("127.0.0.1", bad.port)(5)
    assert good.asked == bad.asked == [(b"get_meta_msg", 0, 0)]


async def test_nixl_without_a_listener() -> None:
    """Nobody there, or one who says nothing, is a miss after the given time."""
    assert not await nixl_probe("127.0.0.1", free_port("127.0.0.1"))(0.05)
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    async with silent:
        assert not await nixl_probe("127.0.0.1", silent.sockets[0].getsockname()[1])(0.05)


async def test_what_fails_on_this_side_is_no_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file descriptor to ask with, both probes raise."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(zmq, "Context", full)
    monkeypatch.setattr(module, "http_get", full)
    for probe in (nixl_probe("127.0.0.1", 1), mooncake_probe("http://127.0.0.1:1")):
        with pytest.raises(OSError, match="too many"):
            await probe(0.05)


async def test_mooncake() -> None:
    """The bootstrap server answers while its engine lives."""
    config = FakeEngineConfig(type="fake")
    engine = FakeEngine("e", "prefill", config, model_id="tiny", transport=MOONCAKE)
    await engine.start()
    listener = MOONCAKE.listener(engine.facts)
    assert listener is not None
    probe = listener_probe(listener, fake=True)
    assert probe is not None
    assert await probe(5)
    await engine.shutdown()
    assert not await probe(1)
