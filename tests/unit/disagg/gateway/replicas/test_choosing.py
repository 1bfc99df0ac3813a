# SPDX-License-Identifier: Apache-2.0
"""What runs on replicas: counted from the decision on, once, by one module."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

import disagg
from disagg.gateway.replicas.choosing import Chooser, Seat
from disagg.gateway.replicas.membership import DECODE, PREFILL, Membership
from disagg.routing.constraints import errand
from disagg.routing.least_loaded import LeastLoaded
from disagg.routing.views import RequestView
from tests.support.replica_clients import lonely_member, lonely_membership
from tests.unit.disagg.gateway.replicas.test_membership import info

PACKAGE = Path(disagg.__file__).parent
COUNTS = {"num_in_flight", "local_prefill_tokens"}
PLAIN = RequestView("chat", [[1, 2, 3]], 3, {})


@pytest.fixture
def members() -> Membership:
    """A warm pair."""
    membership = lonely_membership()
    membership.replace(PREFILL, [info("p0")])
    membership.replace(DECODE, [info("d0")])
    membership.mark_warm(membership.cold_pairs()[0])
    return membership


def counts(members: Membership) -> list[tuple[int, int]]:
    """Legs and prompt tokens of the prefill and of the decode replica."""
    both = [*members.members(PREFILL), *members.members(DECODE)]
    return [(member.num_in_flight, member.local_prefill_tokens) for member in both]


def chooser(members: Membership) -> Chooser:
    return Chooser(members, LeastLoaded(), max_local_prefill_tokens=100, max_prefill_alone_tokens=0)


def test_both_legs_are_held_from_the_decision_on(members: Membership) -> None:
    """Before anything is sent; what no leg has taken over is given back with the call."""
    with chooser(members).reserve(PLAIN) as reservation:
        assert reservation.decision.mode == "handoff" and counts(members) == [(1, 0), (1, 0)]
    assert counts(members) == [(0, 0), (0, 0)]
    reservation.release()
    assert counts(members) == [(0, 0), (0, 0)]


def test_a_leg_that_takes_its_hold_over_outlives_the_call(members: Membership) -> None:
    """An answer holds its decode replica until it is sent, and a prefill leg its own until it is answered."""
    with chooser(members).reserve(PLAIN) as reservation:
        decode = reservation.take_answering()
        assert reservation.pair is not None and reservation.pair.decode is decode.member
    assert counts(members) == [(0, 0), (1, 0)]
    with decode:
        pass
    decode.release()
    assert counts(members) == [(0, 0), (0, 0)]


def test_a_prompt_that_decode_computes_is_held_as_tokens(members: Membership) -> None:
    """Until it is computed; the leg goes on."""
    with chooser(members).reserve(errand(num_tokens=7)) as reservation:
        assert reservation.decision.mode == "local" and counts(members) == [(0, 0), (1, 7)]
        seat = reservation.take_answering()
    seat.prompt_computed()
    seat.prompt_computed()
    assert counts(members) == [(0, 0), (1, 0)]
    seat.release()
    assert counts(members) == [(0, 0), (0, 0)]


async def test_a_prompt_is_taken_as_computed_after_a_time() -> None:
    """Where the answer does not show when it is; a release before that leaves no timer behind."""
    member = lonely_member(info("d0"))
    late, early = Seat(member, 5), Seat(member, 6)
    late.expect_prompt_within(0.01)
    early.expect_prompt_within(0.01)
    early.release()
    assert (member.num_in_flight, member.local_prefill_tokens) == (1, 5)
    await asyncio.sleep(0.05)
    assert (member.num_in_flight, member.local_prefill_tokens) == (1, 0)
    late.release()
    assert (member.num_in_flight, member.local_prefill_tokens) == (0, 0)


def test_a_decision_for_nobody_holds_nothing(members: Membership) -> None:
    """It has no replica, and takes no turn."""
    nobody = RequestView("chat", [[1]], 1, {}, without=frozenset({"d0"}))
    with chooser(members).reserve(nobody) as reservation:
        assert reservation.pair is None and reservation.decision.refusal == "no_replica"
        assert counts(members) == [(0, 0), (0, 0)]
    assert [member.last_chosen for member in members.members(DECODE)] == [0]


def test_looking_holds_nothing_and_takes_no_turn(members: Membership) -> None:
    """`decide` and `sparing` leave everything as it is."""
    look = chooser(members)
    assert look.decide(PLAIN).mode == "handoff"
    assert look.sparing(PLAIN, ["d0"]) is PLAIN
    assert look.sparing(PLAIN, ["d1"]).without == {"d1"}
    assert counts(members) == [(0, 0), (0, 0)]
    assert [member.last_chosen for member in members.members(DECODE)] == [0]


def test_nothing_else_writes_the_counts() -> None:
    """In no other module of the gateway is a count of a replica assigned to."""
    writers = set()
    for path in (PACKAGE / "gateway" / "replicas").parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr in COUNTS and ast.unparse(target.value) != "self":
                    writers.add(path.name)
    assert writers == {"choosing.py"}


def test_nobody_else_calls_a_policy() -> None:
    """One module puts choices to the policy; all others ask it."""
    callers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "choose":
                callers.add(path.name)
    assert callers == {"choosing.py"}
