# SPDX-License-Identifier: Apache-2.0
"""Both halves of Mooncake's worker without engines: vLLM's own code between them, a fake network below.

What needs several ranks, or a failure at one exact moment, is here; the rest is in `test_mooncake`.
"""

from __future__ import annotations

import asyncio
import queue
import types
from collections import OrderedDict
from typing import Any

import msgspec
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    MooncakeConnectorMetadata,
    MooncakeConnectorWorker,
    MooncakeXferMetadata,
    MooncakeXferResponse,
    MooncakeXferResponseStatus,
    PullReqMeta,
)
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.stats import MooncakeKVConnectorStats

from transport.in_engine.mooncake.connector import Worker
from transport.in_engine.mooncake.receiver import _Asked

FINISH, CONTINUE = MooncakeXferResponseStatus.FINISH, MooncakeXferResponseStatus.CONTINUE


class Quiet(Worker):
    """Never set up, so there is nothing to shut down."""

    def __del__(self) -> None:
        pass


class Socket:
    """The answers that a decode engine gets."""

    def __init__(self) -> None:
        self.answers: list[MooncakeXferResponse] = []

    async def send_multipart(self, parts: tuple[bytes, bytes]) -> None:
        self.answers.append(msgspec.msgpack.decode(parts[1], type=MooncakeXferResponse))

    def told(self) -> dict[str, bool]:
        """Request id -> whether its KV came. A request that is told twice is an error."""
        told: dict[str, bool] = {}
        for answer in self.answers:
            for came, ids in ((True, answer.ok_reqs), (False, answer.err_reqs)):
                for req_id in ids or ():
                    assert req_id not in told
                    told[req_id] = came
        return told


def producer(monkeypatch: pytest.MonkeyPatch, *, consumer_ranks: int = 1) -> Any:
    """A prefill worker that writes when `write` says so; `write` is a future-returning function of the test."""
    worker = Quiet.__new__(Quiet)
    worker.is_kv_consumer, worker.is_kv_producer = False, True
    worker.reqs_need_send, worker.finished_sending_reqs = {}, set()
    worker._holds, worker._gone, worker._wanted_end, worker._ended = {}, OrderedDict(), {}, {}
    worker.xfer_stats = MooncakeKVConnectorStats()
    worker.transfer_topo = types.SimpleNamespace(
        handshake_target_ranks=lambda size: list(range(consumer_ranks)), local_replicates_kv_cache=False
    )
    worker.tp_rank, worker.tp_size, worker.pp_size, worker.use_mla = 0, 1, 1, True
    worker.opaque_packed_storages = set()
    worker._encoder = msgspec.msgpack.Encoder()
    worker._xfer_resp_decoder = msgspec.msgpack.Decoder(MooncakeXferResponse)
    worker.sender_loop = asyncio.get_running_loop()
    worker._sender_executor = None
    worker.engine = types.SimpleNamespace(batch_transfer_sync_write=lambda *_: 0)
    monkeypatch.setattr(worker, "_prepare_transfer_regions", lambda meta: ([], [], None), raising=False)

    async def build(self: Any, ready_reqs: Any, *_: Any) -> Any:
        return ([1], [2], [3], [], None) if ready_reqs else ([], [], [], [], None)

    monkeypatch.setattr(MooncakeConnectorWorker, "_build_transfer_params", build)
    return worker


def offer(*, ready: dict[str, str] | None = None, started: dict[str, str] | None = None, gone: Any = ()) -> Any:
    """The scheduler's metadata of one step; request id -> transfer id."""
    metadata = MooncakeConnectorMetadata()
    metadata.reqs_to_send.update({r: (t, [[5]]) for r, t in (ready or {}).items()})
    metadata.reqs_to_send.update({r: (t, []) for r, t in (started or {}).items()})
    metadata.reqs_not_processed.update(gone)
    return metadata


def pull(rank: int = 0, **transfers: str) -> MooncakeXferMetadata:
    """What one decode rank asks for; its request id -> transfer id."""
    return MooncakeXferMetadata(
        "10.0.0.6", 1, 1, rank, {d: (t, [[7]]) for d, t in transfers.items()}, [], [], [], ["layer"], [0], [0]
    )


async def outcomes(worker: Any) -> dict[str, str]:
    finished = await worker.fetch_finished_sending_reqs()
    ended = {req_id: outcome for req_id, (outcome, _) in worker.take_ended().items()}
    assert set(ended) == finished
    return ended


async def test_a_failed_write_ends_the_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the write fails decode is told, and the blocks go free instead of waiting for a reader who will not come."""
    worker, sock = producer(monkeypatch), Socket()
    worker.engine.batch_transfer_sync_write = lambda *_: -1
    await worker.record_send_reqs(offer(ready={"p": "t"}))
    await worker.send_kv_to_decode(b"", sock, pull(d="t"))
    assert sock.told() == {"d": False}
    assert await outcomes(worker) == {"p": "released"}


@pytest.mark.parametrize("where", ["building", "writing"])
async def test_an_error_of_vllm_ends_the_hold(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """An exception while a request is being sent does not leave it marked as being sent for ever."""
    worker, sock = producer(monkeypatch), Socket()

    def fail(*_: Any) -> None:
        raise AssertionError("no")

    if where == "building":
        monkeypatch.setattr(MooncakeConnectorWorker, "_build_transfer_params", fail)
    else:
        worker.engine.batch_transfer_sync_write = fail
    await worker.record_send_reqs(offer(ready={"p": "t"}))
    await worker.send_kv_to_decode(b"", sock, pull(d="t"))
    assert sock.told() == {"d": False}
    assert await outcomes(worker) == {"p": "released"}


async def test_one_of_a_batch_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two requests in one message the aborted one is told at once, while the other still waits for its prompt."""
    worker, sock = producer(monkeypatch), Socket()
    await worker.record_send_reqs(offer(started={"p1": "t1", "p2": "t2"}))
    asked = asyncio.create_task(worker.send_kv_to_decode(b"", sock, pull(d1="t1", d2="t2")))
    await asyncio.sleep(0.01)
    await worker.record_send_reqs(offer(gone=["t1"]))
    await asyncio.sleep(0.05)
    assert sock.told() == {"d1": False} and sock.answers[-1].status == CONTINUE
    await worker.record_send_reqs(offer(ready={"p2": "t2"}))
    await asked
    assert sock.told() == {"d1": False, "d2": True} and sock.answers[-1].status == FINISH
    assert await outcomes(worker) == {"p2": "consumed"}


async def test_unknown_and_repeated_ends_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving up what is not known, twice, is no error, and what is produced under that id later is not held."""
    worker, sock = producer(monkeypatch), Socket()
    await worker.record_send_reqs(offer(gone=["t"]))
    await worker.record_send_reqs(offer(gone=["t"], started={"p": "t"}))
    await worker.send_kv_to_decode(b"", sock, pull(d="t"))
    assert sock.told() == {"d": False} and sock.answers[-1].status == FINISH
    await worker.record_send_reqs(offer(ready={"p": "t"}))
    assert await outcomes(worker) == {"p": "released"}
    assert worker.reqs_need_send == {}


async def test_settling_while_it_is_written_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are not freed under a write: the hold ends as read when the write succeeds."""
    worker, sock = producer(monkeypatch), Socket()
    go, writing = asyncio.Event(), asyncio.Event()

    class Loop:
        async def run_in_executor(self, executor: Any, function: Any, *args: Any) -> Any:
            writing.set()
            await go.wait()
            return function(*args)

    worker.sender_loop = Loop()
    await worker.record_send_reqs(offer(ready={"p": "t"}))
    asked = asyncio.create_task(worker.send_kv_to_decode(b"", sock, pull(d="t")))
    await writing.wait()
    await worker._settle(["p"])
    assert await outcomes(worker) == {}
    go.set()
    await asked
    assert sock.told() == {"d": True}
    assert await outcomes(worker) == {"p": "consumed"}


async def test_settling_between_two_consumer_ranks_tells_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two decode ranks, settled after the first was served: the second is told, and the hold was released."""
    worker, first, second = producer(monkeypatch, consumer_ranks=2), Socket(), Socket()
    await worker.record_send_reqs(offer(ready={"p": "t"}))
    await worker.send_kv_to_decode(b"", first, pull(0, d="t"))
    assert await outcomes(worker) == {}
    await worker._settle(["p"])
    await worker.send_kv_to_decode(b"", second, pull(1, d="t"))
    assert (first.told(), second.told()) == ({"d": True}, {"d": False})
    assert await outcomes(worker) == {"p": "released"}


async def test_two_requests_under_one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two prompts with the same transfer id is not held; vLLM would hold the first for ever."""
    worker, sock = producer(monkeypatch), Socket()
    await worker.record_send_reqs(offer(started={"p1": "t", "p2": "t"}))
    await worker.record_send_reqs(offer(ready={"p1": "t"}))
    await worker.record_send_reqs(offer(ready={"p2": "t"}))
    assert await outcomes(worker) == {"p2": "released"}
    await worker.send_kv_to_decode(b"", sock, pull(d="t"))
    assert sock.told() == {"d": True}
    assert await outcomes(worker) == {"p1": "consumed"}


async def test_a_read_hand_off_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second decode engine with the same parameters is told at once instead of waiting for a prompt."""
    worker, sock = producer(monkeypatch), Socket()
    await worker.record_send_reqs(offer(ready={"p": "t"}))
    await worker.send_kv_to_decode(b"", Socket(), pull(d="t"))
    await worker.send_kv_to_decode(b"", sock, pull(d="t"))
    assert sock.told() == {"d": False} and "consumed" in str(sock.answers[0].err_msg)
    assert await outcomes(worker) == {"p": "consumed"}


def consumer() -> Any:
    worker = Quiet.__new__(Quiet)
    worker.finished_recving_reqs, worker._is_hma_required = set(), False
    worker._invalid_block_ids, worker._failed_recv_reqs = queue.Queue(), queue.Queue()
    worker.xfer_stats = MooncakeKVConnectorStats()
    return worker


def asked_of(workers: int, *req_ids: str) -> list[_Asked]:
    """What each of `workers` prefill workers is asked for, as vLLM's `receive_kv` shares it out."""
    metas = {
        r: PullReqMeta(r, f"t-{r}", [[i]], "p", "http://p", pull_tasks_count=workers) for i, r in enumerate(req_ids)
    }
    return [_Asked(metas) for _ in range(workers)]


def test_a_request_fails_when_its_last_worker_has_answered() -> None:
    """One failed worker of two frees nothing while the other may still write; then the request fails, once."""
    worker = consumer()
    first, second = asked_of(2, "r")
    worker.process_pulling_result(MooncakeXferResponse(FINISH, err_reqs=["r"], err_msg="no"), first)
    assert worker.finished_recving_reqs == set() and worker._invalid_block_ids.empty()
    worker.process_pulling_result(MooncakeXferResponse(FINISH, ok_reqs=["r"]), second)
    assert worker.finished_recving_reqs == {"r"}
    assert worker.get_block_ids_with_load_errors() == {0}
    worker._handle_failed_recv(second, ["r"], "again")
    assert worker.get_block_ids_with_load_errors() == set()


def test_what_has_arrived_does_not_fail_with_the_rest() -> None:
    """An answer that breaks off fails the rest; vLLM fails all of it, and one that had arrived then ends EngineCore."""
    worker = consumer()
    (asked,) = asked_of(1, "a", "b")
    worker.process_pulling_result(MooncakeXferResponse(CONTINUE, ok_reqs=["a"]), asked)
    assert worker.finished_recving_reqs == {"a"}
    worker.finished_recving_reqs.clear()
    worker._handle_failed_recv(asked, list(asked), "broken off")
    assert worker.finished_recving_reqs == {"b"}
    assert worker.get_block_ids_with_load_errors() == {1}
