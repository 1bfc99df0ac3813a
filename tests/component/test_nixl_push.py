# SPDX-License-Identifier: Apache-2.0
"""Both halves of NIXL push without engines: vLLM's own code between them, a fake agent below.

What needs a failure at one exact moment is here; the rest is in `tests/engine/test_nixl_push.py`.
"""

from __future__ import annotations

import queue
import threading
import time
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import PUSH_REG_NOTIF_PREFIX, NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_scheduler import NixlPushConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_worker import NixlPushConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.v1.request import RequestStatus

from transport.errors import UpstreamChangedError
from transport.handoff_params import DO_REMOTE_PREFILL, HANDOFF_ID, offer_params
from transport.in_engine.nixl_push.offers import Offers
from transport.in_engine.nixl_push.scheduler import PushScheduler
from transport.in_engine.nixl_push.waits import Waits
from transport.in_engine.nixl_push.worker import OneAtATime, PushWorker
from transport.in_engine.patches.borrowed import BORROWED
from transport.upstream.guard import require
from transport.upstream.names import Borrowed

CONSUME: dict[str, Any] = {
    DO_REMOTE_PREFILL: True,
    "remote_engine_id": "p",
    "remote_host": "10.0.0.5",
    "remote_port": 4711,
    "tp_size": 1,
    "remote_request_id": "g",
    HANDOFF_ID: "g",
}
PRODUCE = offer_params("g")
LEASE_S = 30


def test_fit_is_checked() -> None:
    """The installed vLLM has what is extended here, and one that has not is refused with the name of the method."""
    require(BORROWED, "transport.in_engine.nixl_push")
    name = "vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_worker:NixlPushConnectorWorker._xfer_blocks"
    wrong = Borrowed(name, ("transport.in_engine.nixl_push.worker",), holds=("no such line",))
    with pytest.raises(UpstreamChangedError, match=r"NixlPushConnectorWorker\._xfer_blocks .*'no such line'"):
        require([wrong], "transport.in_engine.nixl_push")


# The scheduler's half


class NoThread(Waits):
    """Rules without the thread that asks."""

    def _run(self) -> None:
        return


def scheduler(role: str, kind: type[Any] = PushScheduler) -> Any:
    half = kind.__new__(kind)
    half._produces = role == "producer"
    half.engine_id, half.side_channel_host, half.side_channel_port = "e", "10.0.0.6", 4712
    half._kv_lease_duration, half._push_registration_timeout, half.use_host_buffer = LEASE_S, 480.0, False
    half.transfer_tp_size, half._is_hma_required, half._has_mamba, half._bounded_replay = 1, False, False, False
    parallel = types.SimpleNamespace(tensor_parallel_size=1, decode_context_parallel_size=1, pipeline_parallel_size=1)
    half.vllm_config = types.SimpleNamespace(parallel_config=parallel, num_prefill_lookahead_tokens=0)
    half.kv_cache_config = types.SimpleNamespace(select_transfer_block_ids=lambda ids: ids)
    half._push_pending_registrations, half._push_registration_deadlines = {}, {}
    half._finished_request_blocks, half._newly_finished_push_blocks = {}, {}
    half._reqs_need_recv, half._reqs_need_send, half._reqs_need_save = {}, {}, {}
    half._reqs_in_batch, half._reqs_not_processed = set(), set()
    half._heartbeat_by_engine, half._heartbeat_req_engine, half._last_heartbeat_time = {}, {}, 0.0
    half._heartbeat_interval = LEASE_S // 6
    half._offers, half._waits = Offers("e"), NoThread(LEASE_S)
    half._held, half._new_handoffs, half._unread = {}, {}, []
    return half


def request(params: dict[str, Any], status: RequestStatus = RequestStatus.WAITING) -> Any:
    return types.SimpleNamespace(
        request_id="r",
        kv_transfer_params=dict(params),
        status=status,
        num_computed_tokens=32,
        prompt_token_ids=[1] * 32,
    )


def allocated(half: Any, taken: Any, num_tokens: int = 32) -> None:
    blocks = types.SimpleNamespace(get_unhashed_block_ids_all_groups=lambda: ([4, 5],))
    half.update_state_after_alloc(taken, blocks, num_tokens)


@pytest.mark.parametrize(
    ("role", "params", "acts"),
    [
        ("consumer", CONSUME, True),
        ("producer", CONSUME, False),
        ("consumer", {**CONSUME, "remote_port": "4711"}, False),
        *(("consumer", {k: v for k, v in CONSUME.items() if k != gone}, False) for gone in list(CONSUME)[1:]),
    ],
)
def test_parameters_are_checked_on_arrival(role: str, params: dict[str, Any], acts: bool) -> None:
    """A decode engine acts on complete parameters only, and a prefill engine on none of a decode leg."""
    half, taken = scheduler(role), request(params)
    half.on_new_request(taken)
    assert taken.kv_transfer_params[DO_REMOTE_PREFILL] is acts
    assert bool(half._heartbeat_req_engine) is acts


def test_vllm_ends_of_parameters_that_lack_a_key() -> None:
    """Why they are checked: vLLM's own scheduler raises, which ends EngineCore. Gone upstream: drop the check."""
    half, taken = scheduler("consumer", NixlPushConnectorScheduler), request(CONSUME)
    del taken.kv_transfer_params["tp_size"]
    with pytest.raises(KeyError, match="tp_size"):
        allocated(half, taken)


def test_vllm_waits_for_ever() -> None:
    """Why decode asks: vLLM's watchdog drops a registration and fails no request. Gone upstream: see what it does."""
    half, taken = scheduler("consumer", NixlPushConnectorScheduler), request(CONSUME)
    half._push_registration_timeout = -1.0
    allocated(half, taken)
    meta = half.build_connector_meta(None)
    assert not half._push_registration_deadlines and not hasattr(meta, "lost")
    assert list(meta.reqs_to_recv) == ["r"] and not meta.reqs_not_processed


def test_a_registration_names_the_handoff_and_is_waited_for() -> None:
    """A request that gets its blocks is registered under the gateway's id, once, also after a preemption."""
    half, taken = scheduler("consumer"), request(CONSUME)
    half.on_new_request(taken)
    allocated(half, taken)
    meta = half.build_connector_meta(None)
    assert meta.push_registrations["r"]["handoff_id"] == "g" and "r" in half._waits
    allocated(half, taken)
    assert not half.build_connector_meta(None).push_registrations


def test_a_prompt_in_the_prefix_cache_is_told() -> None:
    """Nothing is registered; the hand-off is unread, and its heartbeats end."""
    half, taken = scheduler("consumer"), request(CONSUME)
    half.on_new_request(taken)
    allocated(half, taken, num_tokens=0)
    assert half.take_unread() == ["g"] and half.take_unread() == []
    assert "r" not in half._waits and not half._heartbeat_req_engine


def test_an_end_before_the_blocks_is_unread() -> None:
    """A request that is aborted in the queue asks nothing of the prefill engine."""
    half, ended = scheduler("consumer"), request(CONSUME, RequestStatus.FINISHED_ABORTED)
    half.on_new_request(ended)
    assert half.request_finished(ended, ([],)) == (False, None)
    assert half.take_unread() == ["g"] and not half._reqs_need_recv and not half._heartbeat_req_engine


@pytest.mark.parametrize(("failed", "aborted", "told"), [(False, False, []), (True, False, ["g"]), (True, True, ["g"])])
def test_the_end_of_a_wait(failed: bool, aborted: bool, told: list[str]) -> None:
    """KV that came is told by nobody; what failed or was aborted is unread, once."""
    half, taken = scheduler("consumer"), request(CONSUME)
    allocated(half, taken)
    if aborted:
        taken.status = RequestStatus.FINISHED_ABORTED
        half.request_finished(taken, ([4, 5],))
    output = types.SimpleNamespace(
        finished_sending=None, finished_recving={"r"}, failed_recving={"r"} if failed else set()
    )
    half.update_connector_output(output)
    assert half.take_unread() == told and "r" not in half._waits


@pytest.mark.parametrize(
    ("status", "held"),
    [
        (RequestStatus.FINISHED_LENGTH_CAPPED, True),
        (RequestStatus.FINISHED_STOPPED, True),
        (RequestStatus.FINISHED_ABORTED, False),
    ],
)
def test_a_prompt_that_ended_is_offered_or_gone(status: RequestStatus, held: bool) -> None:
    """Whole prompts are offered under the hand-off's id, others are gone at once; the answer names nothing."""
    half = scheduler("producer")
    assert half.request_finished(request(PRODUCE, status), ([4, 5],)) == (held, None)
    meta = half.build_connector_meta(None)
    assert meta.handoff_ids == ({"r": "g"} if held else {})
    assert list(meta.push_finished_blocks) == (["r"] if held else [])
    assert half._offers.gone("e", ["g"], []) == ([] if held else ["g"])
    if held:
        half.update_connector_output(types.SimpleNamespace(finished_sending={"r"}, finished_recving=None))
        assert half._offers.gone("e", ["g"], []) == ["g"] and not half.has_pending_push_work()


def test_what_was_settled_early_is_held_and_not_offered() -> None:
    """Whoever stores it still finds it held; no worker hears of it."""
    half = scheduler("producer")
    half.settle(["g"])
    assert half.request_finished(request(PRODUCE, RequestStatus.FINISHED_LENGTH_CAPPED), ([4],)) == (True, None)
    meta = half.build_connector_meta(None)
    assert not meta.handoff_ids and not meta.push_finished_blocks and list(meta.reqs_to_send) == ["r"]


# The worker's half


class Quiet(PushWorker):
    """Never set up, so there is nothing to shut down."""

    def __del__(self) -> None:
        pass


class Agent:
    """Writes that are under way until `state` says otherwise."""

    def __init__(self) -> None:
        self.state = "PROC"
        self.written: list[int] = []

    def check_xfer_state(self, handle: int) -> str:
        return self.state

    def get_xfer_telemetry(self, handle: int) -> Any:
        return types.SimpleNamespace(totalBytes=8, descCount=1, xferDuration=1, postDuration=1)

    def release_xfer_handle(self, handle: int) -> None:
        return


def worker(monkeypatch: pytest.MonkeyPatch, *, submits: Callable[[str], bool] = lambda req_id: True) -> Any:
    """A prefill worker with an agent of ours; `submits`: whether a write can be begun."""
    half = Quiet.__new__(Quiet)
    half.nixl_wrapper = Agent()
    half.tp_rank, half.pcp_rank, half.pcp_dcp_sharded, half.world_size = 0, 0, False, 1
    half._lease_extension, half._registration_ttl_s, half.use_host_buffer = 20, 120.0, False
    half.transfer_topo = types.SimpleNamespace(tp_ratio=lambda size: 1)
    half.xfer_stats = NixlKVConnectorStats()
    half._handshake_lock, half._sending_transfers_lock = threading.RLock(), threading.Lock()
    half._remote_agents, half._engine_last_active = {"d": {}}, {}
    half._recving_metadata, half._recving_transfers, half._recv_failures = {}, defaultdict(list), set()
    half._failed_recv_reqs, half._invalid_block_ids, half._pending_recv_notifs = queue.Queue(), queue.Queue(), {}
    half._replicated_pcp_done_sending, half._reqs_to_send, half._reqs_to_process = set(), {}, set()
    half.consumer_notification_counts_by_req = defaultdict(int)
    half.expected_consumer_notifications_by_req = {}
    half._sending_transfers, half._send_failures = defaultdict(list), set()
    half._push_finished_blocks, half._pending_d_registrations = {}, {}
    for name in ("_reg_send_inbox", "_finished_blocks_inbox", "_pending_completion_notifs", "_evict_finished_inbox"):
        setattr(half, name, queue.Queue())
    half._push_writer_wake = threading.Event()
    half._handoff_ids, half._req_ids, half._ended, half._settled = {}, {}, {}, set()
    half._registrations, half._num_submitted, half._state_lock = OrderedDict(), 0, threading.Lock()
    half._writing, half._withdrawn, half._failed_sends = set(), OrderedDict(), queue.SimpleQueue()
    monkeypatch.setattr(half, "_cleanup_remote_engines", lambda: None, raising=False)
    monkeypatch.setattr(half, "_ensure_handshake", lambda *args, **kwargs: None, raising=False)

    def transfer(self: Any, req_id: str, meta: Any) -> None:
        if submits(req_id):
            half._num_submitted += 1
            half.nixl_wrapper.written.append(1)
            with half._sending_transfers_lock:
                half._sending_transfers[req_id].append(1)

    monkeypatch.setattr(NixlPushConnectorWorker, "_xfer_blocks_for_req", transfer)
    monkeypatch.setattr(NixlPushConnectorWorker, "_logical_to_kernel_block_ids", lambda self, ids, ratio: ids)
    half._physical_blocks_per_logical_kv_block = 1
    return half


def offer(half: Any, req_id: str = "r", handoff_id: str = "g", lease_s: float = LEASE_S) -> None:
    """The scheduler's word that a prompt is done, and the writer's look at it."""
    meta = NixlConnectorMetadata()
    meta.handoff_ids, meta.lost = {req_id: handoff_id}, set()
    meta.push_finished_blocks, meta.reqs_in_batch = {req_id: ([4, 5],)}, {req_id}
    meta.scheduler_clock = time.perf_counter()
    meta.reqs_to_send = {req_id: meta.scheduler_clock + lease_s}
    half.start_load_kv(meta)
    rid, blocks = half._finished_blocks_inbox.get_nowait()
    if (found := half._pop_matching_registration(rid)) is not None:
        half._do_start_push_kv(rid, blocks, found)
    else:
        half._push_finished_blocks[rid] = blocks


def register(half: Any, handoff_id: str = "g") -> None:
    registration = {
        "request_id": "d-r",
        "handoff_id": handoff_id,
        "decode_engine_id": "d",
        "decode_host": "h",
        "decode_port": 1,
        "decode_tp_size": 1,
        "local_block_ids": [[7, 8]],
    }
    half._handle_push_reg_notif(PUSH_REG_NOTIF_PREFIX + msgspec.msgpack.encode(registration))


def outcome(half: Any) -> tuple[set[str], dict[str, str]]:
    """What a step reports as sent, and how it ended."""
    sent = half.get_transfer_results().finished_sending
    return sent, {req_id: end for req_id, (end, _) in half.take_ended().items()}


@pytest.mark.parametrize("first", ["prompt", "registration"])
def test_both_sides_meet_by_the_handoff(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Whichever comes first, the write begins once and its end is the hand-off's; another one's stays where it is."""
    half = worker(monkeypatch)
    register(half, "other")
    for step in (offer, register) if first == "prompt" else (register, offer):
        assert not half.nixl_wrapper.written
        step(half)
    assert half.nixl_wrapper.written == [1] and outcome(half) == (set(), {})
    half.nixl_wrapper.state = "DONE"
    assert outcome(half) == ({"r"}, {"r": "consumed"})
    assert list(half._registrations) == ["other"]
    assert not (half._handoff_ids or half._req_ids or half._writing or half._reqs_to_send)


def test_a_lease_does_not_end_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are read until the write is over; nor does settling end it."""
    half = worker(monkeypatch)
    register(half)
    offer(half, lease_s=-1)
    half.settle({"r"})
    assert outcome(half) == (set(), {})
    half.nixl_wrapper.state = "DONE"
    assert outcome(half) == ({"r"}, {"r": "consumed"})


def test_vllm_frees_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why leases are held back: vLLM frees blocks with the write under way. Gone upstream: drop the override."""
    half = worker(monkeypatch)
    register(half)
    offer(half, lease_s=-1)
    monkeypatch.setattr(PushWorker, "_reap_expired_send_leases", NixlPushConnectorWorker._reap_expired_send_leases)
    assert half.get_transfer_results().finished_sending == {"r"} and half._sending_transfers["r"]


@pytest.mark.parametrize("how", ["settled", "expired"])
def test_what_has_ended_is_not_written_any_more(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A registration that the writer already has for a hold that is over begins nothing."""
    half = worker(monkeypatch)
    offer(half, lease_s=-1 if how == "expired" else LEASE_S)
    if how == "settled":
        half.settle({"r", "unknown"})
    assert outcome(half) == ({"r"}, {"r": "released" if how == "settled" else "expired"})
    half._xfer_blocks_for_req("r", None)
    assert not half.nixl_wrapper.written and half._evict_finished_inbox.get_nowait() == "r"


def test_a_write_that_fails_releases_its_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler frees the blocks and whoever waits hears that they are gone, without waiting for a lease."""
    half = worker(monkeypatch)
    register(half)
    offer(half)
    half.nixl_wrapper.state = "ERR"
    monkeypatch.setattr(half, "_log_failure", lambda **kwargs: None, raising=False)
    assert outcome(half) == ({"r"}, {"r": "released"})
    assert not half._writing and not half._reqs_to_send


def test_a_write_that_cannot_begin_releases_its_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when nothing could be submitted."""
    half = worker(monkeypatch, submits=lambda req_id: False)
    register(half)
    offer(half)
    assert outcome(half) == ({"r"}, {"r": "released"})


def test_a_handshake_that_fails_releases_the_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when the decode engine cannot be reached for one."""
    half = worker(monkeypatch)
    handshake: Future[Any] = Future()
    monkeypatch.setattr(half, "_ensure_handshake", lambda *args, **kwargs: handshake, raising=False)
    monkeypatch.setattr(half, "_log_failure", lambda **kwargs: None, raising=False)
    register(half)
    offer(half)
    assert outcome(half) == (set(), {})
    handshake.set_exception(RuntimeError("refused"))
    assert outcome(half) == ({"r"}, {"r": "released"})


def test_an_old_registration_begins_no_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decode engine may have heard nothing for so long that it gave the blocks away."""
    half = worker(monkeypatch)
    register(half)
    half._registrations["g"]["received_at"] -= 121
    offer(half)
    assert not half.nixl_wrapper.written and outcome(half) == ({"r"}, {"r": "released"})
    register(half, "a")
    half._registrations["a"]["received_at"] -= 121
    register(half, "b")
    assert list(half._registrations) == ["b"]


@pytest.mark.parametrize("notif", [b"\xff", msgspec.msgpack.encode([1]), msgspec.msgpack.encode({"request_id": "d"})])
def test_a_registration_that_cannot_be_read_is_dropped(monkeypatch: pytest.MonkeyPatch, notif: bytes) -> None:
    """The writer goes on to the next notification."""
    half = worker(monkeypatch)
    half._handle_push_reg_notif(PUSH_REG_NOTIF_PREFIX + notif)
    assert not half._registrations


def test_heartbeats_name_the_handoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode engine that queues extends the lease of its hand-off, and of no other."""
    half = worker(monkeypatch)
    offer(half, lease_s=1)
    offer(half, "r2", "g2", lease_s=1)
    half._handle_heartbeat("g,unknown")
    now = time.perf_counter()
    assert half._reqs_to_send["r"] > now + 10 > half._reqs_to_send["r2"]


def test_lost_kv_fails_on_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scheduler calls lost is reported as failed, once; what has come by then is not."""
    half = worker(monkeypatch)
    half._is_hma_required = True
    half._recving_metadata["r"] = types.SimpleNamespace()
    meta = NixlConnectorMetadata()
    meta.handoff_ids, meta.lost = {}, {"r", "over"}
    half.start_load_kv(meta)
    results = half.get_transfer_results()
    assert (results.finished_recving, results.failed_recving) == ({"r"}, {"r"})
    assert not half.get_transfer_results().finished_recving


def test_the_agent_is_called_by_one_thread_at_a_time() -> None:
    """Calls of two threads do not overlap, and what is no method is passed on."""
    inside, overlaps = threading.Semaphore(1), []

    class Slow:
        name = "agent"

        def call(self) -> None:
            overlaps.append(not inside.acquire(blocking=False))
            time.sleep(0.01)
            inside.release()

    agent = OneAtATime(Slow())
    threads = [threading.Thread(target=agent.call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [False] * 4 and agent.name == "agent"
