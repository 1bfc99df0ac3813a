# SPDX-License-Identifier: Apache-2.0
"""Short forms of `make prove-faults`, on real vLLM engines under Ray Serve."""

from __future__ import annotations

import pytest

from tests.support.faults import (
    Load,
    Reference,
    kill9,
    process_of,
    reference,
    replicas,
    wait_replaced,
    wait_warm,
)
from tests.support.stack import Stack


@pytest.fixture(scope="module")
def chosen() -> Reference:
    """A few requests whose answers an aggregated engine gives in one way only."""
    found = reference(8, longest=600, tokens=(80, 160))
    assert len(found.known) >= 6, found.words()
    return found


def test_a_killed_decode_replica_breaks_no_stream(faults_stack: Stack, chosen: Reference) -> None:
    """Streams of a decode replica that is killed go on elsewhere, with the tokens that one engine would have sent."""
    with Load(faults_stack.url, chosen.known) as load:
        load.wait_for(2)
        [victim, _] = replicas(faults_stack, "decode")
        load.wait_streaming(2, victim.replica_id)
        mark = kill9(process_of(victim))
        wait_replaced(faults_stack, "decode", [victim], size=2)
    assert load.failed == []
    assert load.wrong == []
    assert load.good_after(mark) is not None
    cut = [heard for heard in load.heard if heard.decode == victim.replica_id and heard.started < mark < heard.ended]
    assert len(cut) >= 2


def test_a_killed_prefill_pool_is_not_missed(faults_stack: Stack, chosen: Reference) -> None:
    """While there is no prefill replica, decode computes the prompts; afterwards the new one does."""
    wait_warm(faults_stack)
    with Load(faults_stack.url, chosen.known) as load:
        load.wait_for(2)
        [victim] = replicas(faults_stack, "prefill")
        mark = kill9(process_of(victim))
        [successor] = wait_replaced(faults_stack, "prefill", [victim], size=1)
        wait_warm(faults_stack)
        load.wait_for(8)
    assert load.failed == []
    assert load.wrong == []
    by = [heard.prefill for heard in load.heard if heard.started >= mark]
    assert "local" in by
    assert successor.replica_id in by
