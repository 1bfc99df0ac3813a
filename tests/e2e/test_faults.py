# SPDX-License-Identifier: Apache-2.0
"""Short forms of `make prove-faults`, on real vLLM engines under Ray Serve."""

from __future__ import annotations

import pytest

from tests.support.faults import (
    Load,
    Reference,
    engine_core,
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


def test_a_killed_decode_engine_breaks_no_stream(real_stack: Stack, chosen: Reference) -> None:
    """Streams of a decode replica whose EngineCore is killed go on elsewhere, with the tokens of one engine."""
    with Load(real_stack.url, chosen.known) as load:
        load.wait_for(2)
        [victim, _] = replicas(real_stack, "decode")
        engine = engine_core(victim)
        load.wait_streaming(2, victim.replica_id)
        mark = kill9(engine)
        load.wait_for(6)
    with lighter(real_stack, chosen) as later:
        wait_replaced(real_stack, "decode", [victim], size=2)
    assert load.failed + later.failed == []
    assert load.wrong + later.wrong == []
    assert load.good_after(mark) is not None
    cut = [heard for heard in load.heard if heard.decode == victim.replica_id and heard.started < mark < heard.ended]
    assert len(cut) >= 2


def test_a_killed_prefill_pool_is_not_missed(real_stack: Stack, chosen: Reference) -> None:
    """While there is no prefill replica, decode computes the prompts; afterwards the new one does."""
    wait_warm(real_stack)
    with Load(real_stack.url, chosen.known) as load:
        load.wait_for(2)
        [victim] = replicas(real_stack, "prefill")
        mark = kill9(process_of(victim))
        load.wait_for(12)
    with lighter(real_stack, chosen) as later:
        [successor] = wait_replaced(real_stack, "prefill", [victim], size=1)
        wait_warm(real_stack)
        later.wait_for(2)
    assert load.failed + later.failed == []
    assert load.wrong + later.wrong == []
    assert "local" in [heard.prefill for heard in load.heard if heard.started >= mark]
    assert successor.replica_id in [heard.prefill for heard in later.heard]


def lighter(stack: Stack, chosen: Reference) -> Load:
    """A load that leaves the cores to the engine that starts meanwhile."""
    return Load(stack.url, chosen.known, clients=1, pause_s=1.0)
