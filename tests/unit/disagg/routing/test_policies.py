# SPDX-License-Identifier: Apache-2.0
"""What holds for every routing policy, over whatever requests and replicas."""

from __future__ import annotations

import random
from collections import Counter
from typing import get_args

import pytest

from disagg.config import PolicyName
from disagg.routing.policies import policy_for
from disagg.routing.views import Mode, PairView, ReplicaView, RequestView, Snapshot

PREFILL_IDS, DECODE_IDS = ("p0", "p1", "p2"), ("d0", "d1", "d2")
KV_FITS = ("a", "b")
NUM_CASES = 400


def some(rng: random.Random, ids: tuple[str, ...]) -> list[str]:
    """Some of these, each once, in any order."""
    return rng.sample(ids, rng.randint(0, len(ids)))


def replica(rng: random.Random, replica_id: str, peers: tuple[str, ...] = ()) -> ReplicaView:
    return ReplicaView(
        replica_id,
        num_in_flight=rng.randint(0, 3),
        last_chosen=rng.randint(0, 3),
        local_prefill_tokens=rng.randint(0, 3),
        slow=rng.random() < 0.3,
        draining=rng.random() < 0.3,
        kv_fit=rng.choice(KV_FITS),
        warm_peers=frozenset(some(rng, peers)),
    )


def snapshot_of(rng: random.Random) -> Snapshot:
    decodes = [replica(rng, replica_id) for replica_id in some(rng, DECODE_IDS)]
    split = rng.randint(0, len(decodes))
    pairs = [(prefill, decode) for prefill in PREFILL_IDS for decode in DECODE_IDS if rng.random() < 0.5]
    return Snapshot(
        tuple(replica(rng, replica_id, DECODE_IDS) for replica_id in some(rng, PREFILL_IDS)),
        tuple(decodes[:split]),
        tuple(decodes[split:]),
        {pair: rng.randint(1, 9) for pair in pairs},
        rng.randint(1, 6),
        rng.randint(0, 6),
    )


def request_of(rng: random.Random) -> RequestView:
    modes: tuple[Mode, ...] = ("handoff", "primed", "local", "prefill")
    return RequestView(
        "completions",
        [[1, 2, 3]],
        rng.randint(0, 5),
        {mode: "why" for mode in modes if rng.random() < 0.3},
        without=frozenset(some(rng, PREFILL_IDS + DECODE_IDS)) if rng.random() < 0.5 else frozenset(),
        decode_id=rng.choice([None, None, *DECODE_IDS]),
        kv_fit=rng.choice([None, *KV_FITS]),
        needs_room=rng.random() < 0.7,
    )


CASES = [(request_of(rng), snapshot_of(rng)) for rng in map(random.Random, range(NUM_CASES))]
POLICIES = pytest.mark.parametrize("name", get_args(PolicyName))


def test_the_cases_have_every_mode_and_refusal() -> None:
    """What holds for the cases below is shown on decisions of every kind."""
    decisions = [policy_for("least_loaded").choose(*case) for case in CASES]
    assert Counter(decision.mode for decision in decisions).keys() == set(get_args(Mode))
    refusals = {decision.refusal for decision in decisions if decision.refusal}
    # "why" is the word of requests that rule out every mode.
    assert refusals == {"no_warm_pair", "no_replica", "no_room", "other_kv_fit", "why"}


@POLICIES
def test_only_those_who_may_serve_are_chosen(name: PolicyName) -> None:
    """Hand-offs go through warm pairs of the snapshot; a last resort answers alone, and only where no other one may."""
    policy = policy_for(name)
    for request, snapshot in CASES:
        decision = policy.choose(request, snapshot)
        prefill = {replica.replica_id: replica for replica in snapshot.prefill}
        decode = {replica.replica_id: replica for replica in snapshot.decode}
        if decision.mode in ("handoff", "primed"):
            assert decision.decode_id in decode
            assert decision.decode_id in prefill[decision.prefill_id or ""].warm_peers
        elif decision.mode == "local":
            assert decision.prefill_id is None
            if decision.decode_id not in decode:
                assert decision.decode_id in {replica.replica_id for replica in snapshot.last_resort}
                assert not [replica for replica in snapshot.decode if allowed(request, replica)]
                assert not [replica for replica in snapshot.prefill if may_answer(request, snapshot, replica)]
        elif decision.mode == "prefill":
            assert decision.decode_id is None and decision.prefill_id in prefill
            assert not [replica for replica in snapshot.decode if allowed(request, replica)]
        else:
            assert decision.prefill_id is decision.decode_id is None and decision.refusal


@POLICIES
def test_constraints_hold(name: PolicyName) -> None:
    """No decision has a mode, a replica or a KV digest that the request rules out, or a replica without room."""
    policy = policy_for(name)
    for request, snapshot in CASES:
        decision = policy.choose(request, snapshot)
        assert decision.mode not in request.ruled_out
        assert not request.without & {decision.prefill_id, decision.decode_id}
        answering = decision.alone_id or decision.decode_id
        if answering is not None:
            everyone = (*snapshot.decode, *snapshot.last_resort, *snapshot.prefill)
            chosen = next(replica for replica in everyone if replica.replica_id == answering)
            assert allowed(request, chosen)
            taken = chosen.local_prefill_tokens
            limits = {"local": snapshot.max_local_prefill_tokens, "prefill": snapshot.max_prefill_alone_tokens}
            if decision.mode in limits and request.needs_room and taken:
                assert taken + request.num_tokens <= limits[decision.mode]


@POLICIES
def test_nobody_is_refused_while_somebody_may_serve(name: PolicyName) -> None:
    """A refusal has its word, and is for want of a pair, of a replica, of the right model or of room."""
    policy = policy_for(name)
    for request, snapshot in CASES:
        decision = policy.choose(request, snapshot)
        everyone = [replica for replica in (*snapshot.decode, *snapshot.last_resort) if allowed(request, replica)]
        everyone += [replica for replica in snapshot.prefill if may_answer(request, snapshot, replica)]
        if decision.mode == "none" and "local" not in request.ruled_out:
            assert decision.refusal == "no_room" if everyone else decision.refusal in ("no_replica", "other_kv_fit")


@POLICIES
def test_decisions_are_values(name: PolicyName) -> None:
    """The same request and snapshot give the same decision; the chosen one and the lost are all there was."""
    policy = policy_for(name)
    for request, snapshot in CASES:
        decision = policy.choose(request, snapshot)
        assert policy.choose(request, snapshot) == decision
        assert len(decision.not_chosen) == len(decision.candidates) - (decision.mode != "none")
        for candidate in decision.candidates:
            is_pair = isinstance(candidate, PairView)
            assert is_pair == (decision.mode in ("handoff", "primed"))


def may_answer(request: RequestView, snapshot: Snapshot, prefill: ReplicaView) -> bool:
    """Whether a prefill replica may answer alone, where no decode replica may."""
    ruled_out = "prefill" in request.ruled_out or request.decode_id is not None
    return not ruled_out and snapshot.max_prefill_alone_tokens > 0 and allowed(request, prefill)


def allowed(request: RequestView, replica: ReplicaView) -> bool:
    return (
        replica.replica_id not in request.without
        and request.decode_id in (None, replica.replica_id)
        and request.kv_fit in (None, replica.kv_fit)
    )


def test_modes_are_words_of_the_request_metric() -> None:
    """The modes are what `x-disagg-prefill`, the metrics and the documents call them."""
    assert get_args(Mode) == ("handoff", "primed", "local", "prefill", "none")
