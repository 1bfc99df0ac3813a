# SPDX-License-Identifier: Apache-2.0
"""NIXL push: launch and legs, which hand-offs are offered or gone, and when a decode engine stops waiting."""

from __future__ import annotations

import threading
from collections.abc import Collection

import msgspec
import pytest
from pydantic import TypeAdapter, ValidationError

from transport.config import NixlConfig, TransportConfig
from transport.handoff_params import HANDOFF_ID, REMOTE_PREFILL
from transport.in_engine.nixl_push.offers import QUESTION, Offers, question
from transport.in_engine.nixl_push.waits import REFUSED_S, SILENT_LEASES, Answer, Peer, Rules, Waits, ask_peer
from transport.launch import EngineFacts, EngineLaunch, launch
from transport.transports import describe

PEER = Peer("10.0.0.5", 4711, "p-1")
LEASE_S = 30.0


def planned(role: str, **settings: object) -> EngineLaunch:
    facts = EngineFacts(role=role, platform="cuda", host="10.0.0.5", listener_port=4711, engine_id="p-1")  # type: ignore[arg-type]
    return launch(NixlConfig(mode="push", **settings), facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_child(role: str, kv_role: str) -> None:
    """The child is our class under vLLM's name, in the engine's own role, with the pull mode's settings."""
    (child,) = planned(role, kv_lease_duration_s=9).kv_transfer_config["kv_connector_extra_config"]["connectors"]
    assert child == {
        "kv_connector": "NixlPushConnector",
        "kv_connector_module_path": "transport.in_engine.nixl_push.connector",
        "kv_role": kv_role,
        "kv_buffer_device": "cuda",
        "kv_connector_extra_config": {"backends": ["UCX"], "kv_lease_duration": 9},
    }


def test_both_engines_are_asked() -> None:
    """Each makes a handshake with the other, so both listeners are watched, at the address of the setting."""
    transport = describe(NixlConfig(mode="push", side_channel_host="192.168.1.9"))
    for role in ("prefill", "decode"):
        facts = EngineFacts(role=role, platform="cpu", host="h", listener_port=7, engine_id="e")  # type: ignore[arg-type]
        listener = transport.listener(facts)
        assert listener is not None and (listener.host, listener.port) == ("192.168.1.9", 7)
        assert transport.env(facts)["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "192.168.1.9"


def test_the_legs() -> None:
    """A prefill leg needs no more than the hand-off's id; the decode leg names engine, address, ranks and hand-off."""
    transport = describe(NixlConfig(mode="push"))
    facts = EngineFacts(
        role="prefill", platform="cuda", host="h", listener_port=7, engine_id="p", tensor_parallel_size=4
    )
    assert transport.prefill_params("g-1") == {}
    assert transport.decode_params("g-1", transport.source(facts)) == {
        **REMOTE_PREFILL,
        "remote_engine_id": "p",
        "remote_host": "h",
        "remote_port": 7,
        "tp_size": 4,
        "pp_size": 1,
        "remote_request_id": "g-1",
        HANDOFF_ID: "g-1",
    }


def test_the_mode_is_one_of_two() -> None:
    """Pull unless the config says push; anything else is an error that names both."""
    adapter: TypeAdapter[TransportConfig] = TypeAdapter(TransportConfig)
    names = [describe(adapter.validate_python({"type": "nixl", **more})).name for more in ({}, {"mode": "push"})]
    assert names == ["nixl", "nixl-push"]
    with pytest.raises(ValidationError, match="'pull' or 'push'"):
        adapter.validate_python({"type": "nixl", "mode": "both"})


# The prefill engine's side


def test_an_id_is_offered_or_gone() -> None:
    """What is given up before it is offered is never offered; what is offered ends by itself alone."""
    offers = Offers("p-1")
    offers.give_up(["early"])
    assert not offers.offer("early") and offers.offer("written")
    offers.give_up(["written"])
    assert offers.gone("p-1", ["early", "written", "unknown"], []) == ["early"]
    offers.end("written")
    assert offers.gone("p-1", ["written"], []) == ["written"]
    assert not offers.offer("written")


def test_a_decode_engine_that_has_stopped_waiting() -> None:
    """Its word withdraws what is not offered yet, and not what is perhaps being written."""
    offers = Offers("p-1")
    offers.offer("written")
    assert offers.gone("p-1", [], ["written", "unknown"]) == ["unknown"]
    assert not offers.offer("unknown")


def test_another_engine_has_written_nothing() -> None:
    """Everything is gone for whoever asks for an engine of before a restart."""
    assert Offers("p-2").gone("p-1", ["a"], ["b"]) == ["a", "b"]


def test_ids_that_are_gone_are_forgotten_in_order() -> None:
    """Memory is bounded; the oldest goes first."""
    offers = Offers("p-1", remembered=2)
    for name in ("a", "b", "c"):
        offers.end(name)
    assert offers.gone("p-1", ["a", "b", "c"], []) == ["b", "c"]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        msgspec.msgpack.encode((b"get_meta_msg", 0, 0)),
        msgspec.msgpack.encode((QUESTION, "p-1", "a", "b")),
        msgspec.msgpack.encode((b"other", "p-1", ["a"], [])),
        msgspec.msgpack.encode((QUESTION, "p-1", [1], [])),
    ],
)
def test_what_is_no_question_is_not_answered(message: bytes) -> None:
    """The listener goes on to its next message."""
    assert Offers("p-1").answer_to([b"peer", b"", message]) is None


def test_a_question_and_its_answer() -> None:
    """An answer goes to who asked and lists what is gone."""
    offers = Offers("p-1")
    offers.end("a")
    answer = offers.answer_to([b"peer", b"", question("p-1", ["a", "b"], [])])
    assert answer == [b"peer", b"", msgspec.msgpack.encode(["a"])]
    assert offers.answer_to([b"peer", question("p-1", [], [])]) is None


# The decode engine's side


def rules() -> Rules:
    made = Rules(LEASE_S)
    made.start("r", "g", PEER, 0.0)
    return made


def test_gone_counts_when_it_is_said_twice_in_a_row() -> None:
    """The first time, the news of a write that has ended may still be under way."""
    waits = rules()
    answers: list[Answer] = [["g"], [], ["g"], ["g"], ["g"]]
    assert [waits.take(PEER, answer, 1.0) for answer in answers] == [[], [], [], ["r"], []]


def test_a_dead_peer_has_refused_for_a_while() -> None:
    """Its workers end after it; an answer in between begins the time anew."""
    waits = rules()
    assert waits.take(PEER, "refused", 1.0) == []
    assert waits.take(PEER, [], 1.5) == []
    assert waits.take(PEER, "refused", 2.0) == []
    assert waits.take(PEER, "refused", 2.0 + REFUSED_S) == ["r"]


def test_a_silent_peer_may_come_back() -> None:
    """Blocks stay for as long as it may still begin to write, counted from its last answer."""
    waits = rules()
    assert waits.take(PEER, [], 50.0) == []
    limit = 50.0 + SILENT_LEASES * LEASE_S
    assert waits.take(PEER, "silent", limit) == []
    assert waits.take(PEER, "silent", limit + 0.1) == ["r"]


def test_what_is_waited_for_longer_than_a_lease_is_given_up() -> None:
    """Then the peer is asked to withdraw it; so it is for a request that was aborted."""
    waits = rules()
    assert waits.questions(LEASE_S) == {PEER: (["g"], [])}
    assert waits.questions(LEASE_S + 0.1) == {PEER: ([], ["g"])}
    waits.waits["r"].given_up = True
    assert waits.questions(1.0) == {PEER: ([], ["g"])}


def test_the_end_of_a_wait_names_its_handoff_once() -> None:
    """Not when it was given up, which was told then; and a peer that nobody waits for is forgotten."""
    waits = rules()
    waits.start("r2", "g2", PEER, 0.0)
    waits.waits["r2"].given_up = True
    assert (waits.over("r"), waits.over("r2"), waits.over("r")) == ("g", None, None)
    assert not waits._heard and waits.take(PEER, ["g"], 1.0) == []


def test_the_thread_tells_what_is_lost_once() -> None:
    """What a peer calls gone comes out of `take_lost`, unless it is over by then, and shutting down ends the thread."""
    asked = threading.Semaphore(0)

    def ask(peer: Peer, waiting: Collection[str], given_up: Collection[str]) -> Answer:
        asked.release()
        return [*waiting, *given_up]

    waits = Waits(LEASE_S, ask=ask)
    waits.start("r", "g", PEER)
    waits.start("r2", "g2", PEER)
    assert waits.give_up("r2") == "g2" and waits.give_up("r2") is None and waits.give_up("x") is None
    for _ in range(2):
        assert asked.acquire(timeout=5)
    lost: set[str] = set()
    while not lost:
        lost = waits.take_lost()
    assert lost == {"r", "r2"} and waits.take_lost() == set()
    assert (waits.over("r"), waits.over("r2")) == ("g", None)
    assert "r" not in waits
    waits.shutdown()
    assert waits._thread is not None and not waits._thread.is_alive()


def test_a_question_that_cannot_be_asked_is_no_end() -> None:
    """The thread goes on, and asks again when it can."""
    answers: list[Answer] = [["g"], ["g"]]

    def ask(peer: Peer, waiting: Collection[str], given_up: Collection[str]) -> Answer:
        if len(answers) == 2 and not failed.is_set():
            failed.set()
            raise OSError("too many open files")
        return answers.pop()

    failed = threading.Event()
    waits = Waits(LEASE_S, ask=ask)
    waits.start("r", "g", PEER)
    lost: set[str] = set()
    while not lost:
        lost = waits.take_lost()
    assert failed.is_set() and lost == {"r"}
    waits.over("r")
    waits.shutdown()


def test_nobody_there() -> None:
    """A port that nobody listens on has refused; no answer is no word about any hand-off."""
    from pools.process.ports import free_port

    assert ask_peer(Peer("127.0.0.1", free_port("127.0.0.1"), "p"), ["g"], []) == "refused"
