# SPDX-License-Identifier: Apache-2.0
"""Our MultiConnector in vLLM's hands, with children that only record: no engine is started."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from transport.config import NixlConfig
from transport.digests import chunk_digests
from transport.handoff_params import HANDOFF_ID, SETTLE, STORE
from transport.in_engine.outer.connector import MultiConnector
from transport.in_engine.outer.metadata import HandoffWorkerMetadata
from transport.launch import EngineFacts, launch


class Counted(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """A child's own metadata: adds up over ranks."""

    def __init__(self, count: int) -> None:
        self.count = count

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return Counted(self.count + other.count)


class Child:
    """What MultiConnector calls on a child, recorded."""

    def __init__(self, config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.matched: tuple[int | None, bool] = (0, False)
        self.delays = False
        self.worker_meta: KVConnectorWorkerMetadata | None = None

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        self.calls.append(("match", request.request_id))
        return self.matched

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.calls.append(("alloc", num_external_tokens))

    def on_new_request(self, request: Any) -> None:
        self.calls.append(("new", request.request_id))

    def request_finished(self, request: Any, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.calls.append(("finished", request.request_id))
        return self.delays, None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        self.calls.append(("meta", set(scheduler_output.finished_req_ids)))
        return KVConnectorMetadata()

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        self.calls.append(("output", getattr(output.kv_connector_worker_meta, "count", None)))

    def get_kv_connector_stats(self) -> None:
        return None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self.calls.append(("bind", None))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.calls.append(("load", None))

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return KVConnectorTransferResults()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self.worker_meta


class Transfer(Child):
    """A transfer child with the whole protocol."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ended: dict[str, Any] = {}
        self.unread: list[str] = []

    def settle(self, req_ids: set[str]) -> None:
        self.calls.append(("settle", set(req_ids)))

    def take_ended(self) -> dict[str, Any]:
        ended, self.ended = self.ended, {}
        return ended

    def take_unread(self) -> list[str]:
        unread, self.unread = self.unread, []
        return unread


class Tier(Child):
    """A tier without more than vLLM's interface."""


class SharedTier(Child):
    """A tier with a sink."""

    chunk_tokens = 4
    token_offset = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.adopts = False

    def token_ids(self, request: Any) -> list[int]:
        return [token + self.token_offset for token in request.all_token_ids]

    def skip(self, request: Any) -> None:
        self.calls.append(("skip", request.request_id))

    def hold(self, request: Any, handoff_id: str, store: str | None) -> None:
        self.calls.append(("hold", (handoff_id, store)))

    def decide(self, req_id: str, outcome: str) -> bool:
        self.calls.append(("decide", (req_id, outcome)))
        return self.adopts

    def take_events_of_sink(self) -> Iterable[dict[str, Any]]:
        return ()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes one side of the connector around recording children."""

    def build(*classes: type[Child], role: KVConnectorRole = KVConnectorRole.SCHEDULER, world_size: int = 2) -> Any:
        monkeypatch.setattr(
            MultiConnector,
            "_get_connector_classes_and_configs",
            staticmethod(lambda config: [(c, SimpleNamespace(kv_transfer_config=None)) for c in classes]),
        )
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}),
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=True),
            parallel_config=SimpleNamespace(world_size=world_size),
        )
        cache = SimpleNamespace(num_blocks=10, kv_cache_tensors=[SimpleNamespace(size=1000), SimpleNamespace(size=500)])
        return MultiConnector(config, role, cache)

    return build


def request(req_id: str, tokens: int = 12, **params: Any) -> Any:
    return SimpleNamespace(
        request_id=req_id,
        kv_transfer_params=params or None,
        all_token_ids=list(range(tokens)),
        num_computed_tokens=tokens,
        num_prompt_tokens=tokens,
        cache_salt=None,
    )


def blocks(*block_ids: int) -> Any:
    """New blocks of one group, after one that a prefix hit gave and the null block."""
    known = SimpleNamespace(block_id=1, block_hash=b"h", is_null=False)
    null = SimpleNamespace(block_id=0, block_hash=None, is_null=True)
    new = [SimpleNamespace(block_id=i, block_hash=None, is_null=False) for i in block_ids]
    return SimpleNamespace(blocks=([known, null, *new],))


def step(*finished: str) -> Any:
    return SimpleNamespace(finished_req_ids=set(finished))


def events(connector: MultiConnector) -> list[dict[str, Any]]:
    """The events of one step as they arrive in another process, without their times."""
    stats = connector.get_kv_connector_stats()
    if stats is None:
        return []
    sent = MsgpackDecoder().decode(MsgpackEncoder().encode(stats.to_dict()))
    assert all(event["at"] > 1e9 for event in sent["Handoffs"]["events"])
    return [{k: v for k, v in event.items() if k != "at"} for event in sent["Handoffs"]["events"]]


def test_a_hand_off_is_told_from_start_to_end(make: Any) -> None:
    """Produced with its size, handed to the sink before its own end, decided before vLLM frees the blocks, ended."""
    connector = make(Transfer, SharedTier)
    transfer, shared = connector.sub_connectors
    transfer.delays = True
    shared.adopts = True
    leg = request("r-1", **{HANDOFF_ID: "h-1", STORE: "always"})
    assert connector.request_finished_all_groups(leg, ([3, 0, 4],)) == (True, None)
    assert [call for call, _ in shared.calls] == ["hold", "finished"]
    assert shared.calls[0] == ("hold", ("h-1", "always"))
    # Two blocks of 150 bytes on each of two ranks.
    assert events(connector) == [{"kind": "produced", "id": "h-1", "tokens": 12, "bytes": 600}]
    meta = HandoffWorkerMetadata(metadata=(None, None), ended={"r-1": ("expired", None)})
    connector.update_connector_output(KVConnectorOutput(finished_sending={"r-1"}, kv_connector_worker_meta=meta))
    assert shared.calls[-1] == ("decide", ("r-1", "expired"))
    ended = {"kind": "ended", "id": "h-1", "outcome": "expired", "lease_left_s": None, "adopted": True}
    assert events(connector) == [ended]
    assert events(connector) == []


def test_what_the_transfer_child_does_not_hold_is_no_hand_off(make: Any) -> None:
    """A request that another child still stores makes no event, and its end none either."""
    connector = make(Transfer, SharedTier)
    connector.sub_connectors[1].delays = True
    assert connector.request_finished(request("r-1"), [1]) == (True, None)
    connector.update_connector_output(KVConnectorOutput(finished_sending={"r-1"}))
    assert events(connector) == []
    assert "hold" not in dict(connector.sub_connectors[1].calls)


def test_settle_stays_out_of_the_childrens_sight(make: Any) -> None:
    """A settle request reaches no child, not even as a finished id, and names the request of its hand-off to ranks."""
    connector = make(Transfer, SharedTier)
    connector.sub_connectors[0].delays = True
    connector.request_finished(request("r-1", **{HANDOFF_ID: "h-1"}), [1])
    for child in connector.sub_connectors:
        child.calls.clear()
    settle = request("settle-1", **{SETTLE: ["h-1", "h-2"]})
    connector.on_new_request(settle)
    assert connector.request_finished_all_groups(settle, ([],)) == (False, None)
    output = step("settle-1", "r-7")
    meta = connector.build_connector_meta(output)
    assert meta.settled == {"r-1"}
    assert output.finished_req_ids == {"r-7"}
    assert [child.calls for child in connector.sub_connectors] == [[("meta", {"r-7"})]] * 2
    assert connector.build_connector_meta(step()).settled == set()


def test_ranks_are_told_and_agree(make: Any) -> None:
    """Settled ids reach the transfer child of a rank after its metadata, and two ranks' reports become one."""
    scheduler = make(Transfer, Tier)
    scheduler.sub_connectors[0].delays = True
    scheduler.request_finished(request("r-1"), [1])
    scheduler.request_finished(request("settle-1", **{SETTLE: ["r-1"]}), [])
    meta = pickle.loads(pickle.dumps(scheduler.build_connector_meta(step())))
    aggregator = KVOutputAggregator(2)
    outputs = []
    for rank, ended in enumerate(({"r-1": ("consumed", 9.0)}, {"r-1": ("released", 7.0)})):
        worker = make(Transfer, Tier, role=KVConnectorRole.WORKER)
        transfer, tier = worker.sub_connectors
        worker.bind_connector_metadata(meta)
        worker.start_load_kv(None)
        assert [call for call, _ in transfer.calls] == ["bind", "load", "settle"]
        assert transfer.calls[-1] == ("settle", {"r-1"})
        transfer.ended = ended
        tier.worker_meta = Counted(rank + 1)
        output = KVConnectorOutput(
            finished_sending={"r-1"}, kv_connector_worker_meta=worker.build_connector_worker_meta()
        )
        outputs.append(ModelRunnerOutput.with_kv_conn_output_only(pickle.loads(pickle.dumps(output))))
    both = aggregator.aggregate(outputs)
    assert both is not None
    scheduler.update_connector_output(both.kv_connector_output)
    assert events(scheduler)[1:] == [
        {"kind": "ended", "id": "r-1", "outcome": "released", "lease_left_s": 7.0, "adopted": False}
    ]
    assert ("output", 3) in scheduler.sub_connectors[1].calls


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_without_news_does_not_hide_anothers(make: Any, first: bool) -> None:
    """A rank whose children have metadata and no ends, beside one with ends and no metadata: both survive."""
    scheduler = make(Transfer, Tier)
    with_meta, with_ends = (make(Transfer, Tier, role=KVConnectorRole.WORKER) for _ in range(2))
    with_meta.sub_connectors[1].worker_meta = Counted(1)
    with_ends.sub_connectors[0].ended = {"r-1": ("expired", None)}
    metas = [w.build_connector_worker_meta() for w in (with_meta, with_ends)]
    merged = metas[0].aggregate(metas[1]) if first else metas[1].aggregate(metas[0])
    assert merged.ended == {"r-1": ("expired", None)}
    assert merged.metadata[1].count == 1
    scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=merged))


def test_nothing_is_sent_when_nothing_happened(make: Any) -> None:
    """A step without news costs no metadata and no statistics."""
    worker = make(Transfer, Tier, role=KVConnectorRole.WORKER)
    assert worker.build_connector_worker_meta() is None
    assert make(Transfer, Tier).get_kv_connector_stats() is None


def test_transfer_goes_before_tiers(make: Any) -> None:
    """What the transfer child claims is looked up nowhere else; a tier with state of its own is told."""
    connector = make(Transfer, Tier, SharedTier)
    transfer, tier, shared = connector.sub_connectors
    transfer.matched = (8, True)
    tier.matched = (12, True)
    assert connector.get_num_new_matched_tokens(request("r-1"), 0) == (8, True)
    assert tier.calls == []
    assert shared.calls == [("skip", "r-1")]
    connector.update_state_after_alloc(request("r-1"), blocks(5), 8)
    assert [dict(child.calls)["alloc"] for child in connector.sub_connectors] == [8, 0, 0]
    assert events(connector) == []


@pytest.mark.parametrize(
    ("offload", "shared", "expected", "source"),
    [
        ((4, True), (8, True), (8, True), "SharedTier"),
        ((8, True), (4, True), (8, True), "Tier"),
        ((8, True), (8, True), (8, True), "Tier"),
        ((0, False), (0, False), (0, False), None),
        ((None, False), (8, True), (None, False), None),
        ((8, True), (None, True), (None, False), None),
    ],
)
def test_the_tier_with_most_tokens_loads(make: Any, offload: Any, shared: Any, expected: Any, source: Any) -> None:
    """The largest hit wins, the nearer tier among equals, and nobody while one is still looking; all are asked."""
    connector = make(Transfer, Tier, SharedTier)
    _, connector.sub_connectors[1].matched, connector.sub_connectors[2].matched = None, offload, shared
    assert connector.get_num_new_matched_tokens(request("r-1"), 4) == expected
    assert all(child.calls == [("match", "r-1")] for child in connector.sub_connectors)
    if source is not None:
        connector.update_state_after_alloc(request("r-1"), blocks(5), expected[0])
        assert events(connector) == []
        connector.update_connector_output(KVConnectorOutput(finished_recving={"r-1"}))
        (loaded,) = events(connector)
        assert (loaded["kind"], loaded["source"], loaded["tokens"]) == ("loaded", source, 8)
        # Twelve tokens, of which four were there: the second and third chunk of four.
        assert len(loaded.get("chunks", ())) == (2 if source == "SharedTier" else 0)
        # The same request again, when its load is over.
        connector.update_state_after_alloc(request("r-1"), blocks(5), 0)
        assert events(connector) == []


@pytest.mark.parametrize("how", ["invalid", "failed", "aborted"])
def test_a_load_that_failed_is_not_told(make: Any, how: str) -> None:
    """Nothing came from the tier that anybody used."""
    connector = make(Transfer, SharedTier)
    connector.sub_connectors[1].matched = (8, True)
    connector.get_num_new_matched_tokens(request("r-1"), 4)
    connector.update_state_after_alloc(request("r-1"), blocks(5, 6), 8)
    if how == "aborted":
        connector.request_finished(request("r-1"), [1, 5, 6])
    output = KVConnectorOutput(
        finished_recving={"r-1"},
        failed_recving={"r-1"} if how == "failed" else set(),
        invalid_block_ids={6} if how == "invalid" else set(),
    )
    connector.update_connector_output(output)
    assert events(connector) == []


def test_chunks_are_named_by_what_the_tier_stores(make: Any) -> None:
    """A prompt with images is known to the tier by other tokens, which a rescue of it names as well."""
    connector = make(Transfer, SharedTier)
    shared = connector.sub_connectors[1]
    shared.matched, shared.token_offset = (8, True), 100
    connector.get_num_new_matched_tokens(request("r-1"), 4)
    connector.update_state_after_alloc(request("r-1"), blocks(5), 8)
    connector.update_connector_output(KVConnectorOutput(finished_recving={"r-1"}))
    (loaded,) = events(connector)
    assert loaded["chunks"] == chunk_digests(list(range(100, 112)), 4, None)[1:]


class OffloadingConnector(Child):
    """The host tier, with what is used of its scheduler half."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connector_scheduler: Any = SimpleNamespace(_current_batch_allocated_block_ids=set())


@pytest.mark.parametrize(("loader", "given"), [(0, {5, 6}), (1, set()), (2, {5, 6}), (None, set())])
def test_the_host_tier_learns_which_blocks_others_load_into(make: Any, loader: int | None, given: set[int]) -> None:
    """Its pending stores of these blocks' former KV must be over before another child writes to them."""
    connector = make(Transfer, OffloadingConnector, SharedTier)
    if loader is not None:
        connector.sub_connectors[loader].matched = (8, True)
    tokens, _ = connector.get_num_new_matched_tokens(request("r-1"), 4)
    connector.sub_connectors[1].connector_scheduler._current_batch_allocated_block_ids = set()
    connector.update_state_after_alloc(request("r-1"), blocks(5, 6), tokens)
    assert connector.sub_connectors[1].connector_scheduler._current_batch_allocated_block_ids == given


def test_vllms_host_tier_waits_for_stores_of_such_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set that is added to is the one that vLLM flushes by, and it is new after each step."""
    scheduler = OffloadingConnectorScheduler.__new__(OffloadingConnectorScheduler)
    for name in ("_build_partial_tail_store_jobs", "_build_store_jobs"):
        monkeypatch.setattr(scheduler, name, lambda _: {})
    monkeypatch.setattr(scheduler, "_update_req_states", lambda _: None)
    scheduler.manager = SimpleNamespace(on_schedule_end=lambda _: None)  # type: ignore[assignment]
    scheduler._req_status = {}
    scheduler._current_batch_load_jobs, scheduler._current_batch_jobs_to_flush = {}, set()
    scheduler._block_id_to_pending_jobs = {5: {41}, 7: {42}}
    scheduler._current_batch_allocated_block_ids = {5, 6}
    output: Any = SimpleNamespace(scheduled_new_reqs=[], preempted_req_ids=None, finished_req_ids=())
    meta: Any = scheduler.build_connector_meta(output)
    assert meta.jobs_to_flush == {41}
    assert scheduler._current_batch_allocated_block_ids == set()


def test_another_vllms_host_tier_is_refused_at_start(make: Any) -> None:
    """Without that set KV would be stored under the wrong name, in silence."""

    class Other(Child):
        connector_scheduler = SimpleNamespace()

    Other.__name__ = "OffloadingConnector"
    with pytest.raises(RuntimeError, match="_current_batch_allocated_block_ids"):
        make(Transfer, Other)
    make(Transfer, Other, role=KVConnectorRole.WORKER)


def test_unread_is_passed_on(make: Any) -> None:
    """A decode engine's scheduler side says which hand-offs nobody read."""
    connector = make(Transfer)
    connector.sub_connectors[0].unread = ["h-1"]
    assert events(connector) == [{"kind": "unread", "id": "h-1"}]


def test_vllms_loggers_take_the_statistics() -> None:
    """vLLM's log line and Prometheus metrics work beside events, and with a child that has no Prometheus class."""
    facts = EngineFacts(role="prefill", platform="cpu", host="h", listener_port=1, engine_id="e")
    config = KVTransferConfig(**launch(NixlConfig(), facts).kv_transfer_config)
    nixl = {
        **{key: [] for key in ("transfer_duration", "post_duration", "bytes_transferred", "num_descriptors")},
        **{key: [] for key in ("num_failed_transfers", "num_failed_notifications", "num_failed_handshakes")},
        "num_kv_expired_reqs": [1],
        "num_notifications_after_expiry": [],
    }
    payload = {"Handoffs": {"events": [{"kind": "unread", "at": 1.0, "id": "h"}]}, "NixlConnector": nixl, "Odd": {}}
    log = KVConnectorLogging(config)
    log.observe(payload)
    log.observe({"Handoffs": payload["Handoffs"]})
    lines: list[Any] = []
    log.log(lambda *args: lines.append(args))
    assert "NixlConnector" in lines[0][1]
    assert "Handoffs" not in lines[0][1]
    vllm_config = SimpleNamespace(kv_transfer_config=config)
    prom = KVConnectorProm(vllm_config, ["model_name", "engine"], {0: ["m", "0"]})  # type: ignore[arg-type]
    prom.observe(payload)
    assert prom.prom_metrics is not None
