# SPDX-License-Identifier: Apache-2.0
"""The side channels of an engine go on whatever is sent to them. vLLM's and LMCache's own code, no engine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
import zmq
import zmq.asyncio
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    MooncakeConnectorWorker,
    MooncakeXferMetadata,
    MooncakeXferResponse,
    MooncakeXferResponseStatus,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import NixlBaseConnectorScheduler

from tests.support.garbage import messages, silence, still_open, throw_all
from tests.support.stack import free_port
from transport.errors import UpstreamChangedError
from transport.in_engine.mooncake import door as mooncake_door
from transport.in_engine.mooncake.connector import Worker
from transport.in_engine.mooncake.door import BootstrapServer, DoorContext
from transport.in_engine.nixl import listener as nixl_listener
from transport.in_engine.nixl.connector import NixlScheduler
from transport.upstream.guard import require
from transport.upstream.names import Borrowed

HOST = "127.0.0.1"
ANSWERS = {(0, 0): b"of rank 0", (0, 1): b"of rank 1"}
NUM_SILENT = 300


@contextlib.contextmanager
def nixl_side_channel(listen: Any) -> Iterator[tuple[int, threading.Thread]]:
    """A listener in a thread, started and stopped as vLLM does it."""
    port, ready, stop = free_port(), threading.Event(), threading.Event()
    thread = threading.Thread(target=listen, args=(ANSWERS, ready, stop, HOST, port), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield port, thread
    finally:
        stop.set()
        thread.join(5)
        assert not thread.is_alive()


def handshake(port: int, rank: int = 0, *, timeout_ms: int = 3000) -> list[bytes]:
    """As vLLM's decode worker asks. Raises zmq.Again without an answer."""
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.linger = 0
        sock.setsockopt(zmq.RCVTIMEO, timeout_ms)
        sock.connect(f"tcp://{HOST}:{port}")
        sock.send(msgspec.msgpack.encode((b"get_meta_msg", 0, rank)))
        return sock.recv_multipart()


def test_nixl_handshakes_go_on_after_garbage() -> None:
    """Whatever comes, every rank is still told to whoever asks properly, with the clock of this process."""
    with nixl_side_channel(nixl_listener.listen) as (port, thread):
        throw_all(HOST, port)
        before = time.perf_counter()
        for rank in (0, 1):
            metadata, clock = handshake(port, rank)
            assert metadata == ANSWERS[0, rank]
            assert before <= msgspec.msgpack.decode(clock) <= time.perf_counter()
        assert thread.is_alive()


def test_nixl_handshakes_go_on_beside_silence() -> None:
    """Connections that send nothing keep nobody out, and are closed after a while."""
    with nixl_side_channel(nixl_listener.listen) as (port, _), silence(HOST, port, NUM_SILENT) as connections:
        assert len(connections) == NUM_SILENT
        assert handshake(port)[0] == ANSWERS[0, 0]
        deadline = time.monotonic() + nixl_listener.HANDSHAKE_MS / 1000 + 5
        while still_open(connections):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("parts", messages(), ids=range(len(messages())))
def test_nixl_answers_handshakes_alone(parts: list[bytes]) -> None:
    """None of these has an answer."""
    assert nixl_listener.answer_to([b"peer", *parts], ANSWERS) is None


def test_vllms_own_listener_would_end() -> None:
    """The reason for ours: when vLLM's survives this, it can go."""

    def listen(*args: Any) -> None:
        with contextlib.suppress(ValueError, msgspec.DecodeError, KeyError):
            NixlBaseConnectorScheduler._nixl_handshake_listener(*args)

    with nixl_side_channel(listen) as (port, thread), zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.connect(f"tcp://{HOST}:{port}")
        sock.send_multipart([b"", b"x"])
        thread.join(10)
        assert not thread.is_alive()


def test_engines_load_ours() -> None:
    """vLLM starts the listener by this name."""
    assert NixlScheduler._nixl_handshake_listener is nixl_listener.listen


def test_another_vllm_is_refused() -> None:
    """A listener that speaks differently ends the start, with the name of what to read."""
    name = "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler:NixlBaseConnectorScheduler"
    method = f"{name}._nixl_handshake_listener"
    with pytest.raises(UpstreamChangedError, match=r"_nixl_handshake_listener .*'no such line'"):
        require([Borrowed(method, ("transport.in_engine.nixl.listener",), holds=("no such line",))], "transport")


class Sender(Worker):
    """A prefill worker with nothing but its side channel."""

    def __init__(self) -> None:
        self.async_zmq_ctx: zmq.asyncio.Context = DoorContext()
        self.hostname, self.num_sender_tasks, self.side_channel_port = HOST, 4, 0
        self.sender_worker_queue: asyncio.Queue[Any] = asyncio.Queue()
        self._encoder = msgspec.msgpack.Encoder()
        self._xfer_meta_decoder = msgspec.msgpack.Decoder(MooncakeXferMetadata)
        self.asked: list[MooncakeXferMetadata] = []

    def __del__(self) -> None:
        pass

    async def register_worker_with_bootstrap(self) -> None:
        pass

    async def send_kv_to_decode(self, identity: bytes, sock: Any, meta: Any) -> None:
        self.asked.append(meta)
        answer = MooncakeXferResponse(status=MooncakeXferResponseStatus.FINISH, ok_reqs=["d"])
        await sock.send_multipart((identity, self._encoder.encode(answer)))


async def _side_channel(sender: Any) -> asyncio.Task[None]:
    ready = asyncio.Event()
    listening = asyncio.create_task(MooncakeConnectorWorker._mooncake_sender_listener(sender, ready))
    await asyncio.wait_for(ready.wait(), 5)
    return listening


async def test_mooncakes_side_channel_goes_on_after_garbage() -> None:
    """A decode worker is answered after whatever came before, and silent connections are closed."""
    sender = Sender()
    listening = await _side_channel(sender)
    port = sender.side_channel_port
    await asyncio.to_thread(throw_all, HOST, port)
    with silence(HOST, port, NUM_SILENT) as connections:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as sock:
            sock.linger = 0
            sock.connect(f"tcp://{HOST}:{port}")
            meta = MooncakeXferMetadata(HOST, 1, 1, 0, {"d": ("t", [[7]])}, [], [], [])
            await sock.send(msgspec.msgpack.encode(meta))
            async with asyncio.timeout(10):
                answer = msgspec.msgpack.decode(await sock.recv(), type=MooncakeXferResponse)
        assert answer.ok_reqs == ["d"] and sender.asked == [meta]
        async with asyncio.timeout(mooncake_door.HANDSHAKE_MS / 1000 + 5):
            while still_open(connections):
                await asyncio.sleep(0.1)
    assert isinstance(sender.async_zmq_ctx, DoorContext)
    assert sender.async_zmq_ctx.num_refused > 0 and not listening.done()
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    sender.async_zmq_ctx.destroy(linger=0)


async def test_vllms_own_mooncake_channel_would_end() -> None:
    """The reason for ours: when vLLM's survives this, it can go."""
    sender = Sender()
    sender.async_zmq_ctx = zmq.asyncio.Context()
    listening = await _side_channel(sender)
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.connect(f"tcp://{HOST}:{sender.side_channel_port}")
        sock.send_multipart([b"", b"x"])
        await asyncio.wait_for(listening, 10)
    sender.async_zmq_ctx.destroy(linger=0)


@pytest.fixture
def bootstrap() -> Iterator[BootstrapServer]:
    server = BootstrapServer("127.0.0.2", free_port(), engine_id="p-1", tp_size=2, pp_size=1)
    server.start()
    yield server
    server.shutdown()


def test_the_bootstrap_server_survives_and_listens_at_its_address_alone(bootstrap: BootstrapServer) -> None:
    """Garbage and silence later it still tells its workers; nothing listens at another address of the node."""
    url = f"http://127.0.0.2:{bootstrap.port}"
    worker = {"engine_id": "p-1", "dp_rank": 0, "tp_rank": 1, "pp_rank": 0, "addr": "tcp://127.0.0.2:1"}
    assert httpx.post(f"{url}/register", json=worker).status_code == 200
    throw_all("127.0.0.2", bootstrap.port)
    with silence("127.0.0.2", bootstrap.port, NUM_SILENT) as connections:
        assert len(connections) == NUM_SILENT
        found = httpx.get(f"{url}/query", timeout=5).json()
        assert found == {"0": {"engine_id": "p-1", "worker_addr": {"1": {"0": "tcp://127.0.0.2:1"}}}}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{HOST}:{bootstrap.port}/query", timeout=5)


@pytest.mark.parametrize("change", [{"engine_id": "p-2"}, {"dp_rank": 1}, {"tp_rank": 2}, {"addr": "x" * 999}])
def test_the_bootstrap_server_takes_its_own_workers_only(bootstrap: BootstrapServer, change: dict[str, Any]) -> None:
    """Others would be asked for KV by decode engines, or fill the memory one by one."""
    url = f"http://127.0.0.2:{bootstrap.port}"
    worker = {"engine_id": "p-1", "dp_rank": 0, "tp_rank": 0, "pp_rank": 0, "addr": "tcp://127.0.0.2:1"}
    assert httpx.post(f"{url}/register", json=worker | change).status_code == 400
    assert httpx.get(f"{url}/query").json() == {}


def test_engines_start_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill worker of the first rank opens a bootstrap server at the configured address, and vLLM opens none."""
    made: list[tuple[Any, ...]] = []

    class Recorded:
        def __init__(self, host: str, port: int, **of_engine: Any) -> None:
            made.append((host, port, of_engine))

        def start(self) -> None:
            made.append(("started",))

    def init(self: Any, *_: Any) -> None:
        self.async_zmq_ctx = zmq.asyncio.Context()
        self.is_kv_consumer, self.tp_rank, self.pp_rank, self.tp_size, self.pp_size = False, 0, 0, 2, 1
        self.engine_id = "p-1"
        extra = {"bootstrap_server_address": "10.0.0.5:8123"}
        self.vllm_config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(get_from_extra_config=lambda key, default: extra.get(key, default))
        )

    monkeypatch.setattr("transport.in_engine.mooncake.connector.BootstrapServer", Recorded)
    monkeypatch.setattr("transport.in_engine.mooncake.sender.Sending.__init__", init)
    monkeypatch.setattr(Worker, "__del__", lambda self: None)
    worker = Worker()
    assert made == [("10.0.0.5", 8123, {"engine_id": "p-1", "tp_size": 2, "pp_size": 1}), ("started",)]
    assert isinstance(worker.async_zmq_ctx, DoorContext)
