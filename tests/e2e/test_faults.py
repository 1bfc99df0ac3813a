# SPDX-License-Identifier: Apache-2.0
"""A short form of `make prove-faults`, on real vLLM engines under Ray Serve."""

from __future__ import annotations

from tests.e2e.conftest import Expected
from tests.support.faults import Load, engine_core, kill9, process_of, replicas, wait_replaced, wait_warm
from tests.support.stack import Stack


def test_killed_engines_break_no_stream(real_stack: Stack, expected: Expected) -> None:
    """A decode engine is killed, and then the prefill pool; both are replaced.

    Streams of the decode replica whose EngineCore is killed go on elsewhere, with the tokens of one engine. While there
    is no prefill replica the other decode replica computes the prompts; afterwards the new one does.
    """
    known = expected.faults.known
    wait_warm(real_stack)
    with Load(real_stack.url, known) as load:
        load.wait_for(2)
        [decode, _] = replicas(real_stack, "decode")
        engine = engine_core(decode)
        load.wait_streaming(2, decode.replica_id)
        killed = kill9(engine)
        load.wait_for(6)
        [prefill] = replicas(real_stack, "prefill")
        missing = kill9(process_of(prefill))
        load.wait_for(12)
    # The cores are left to the engines that start meanwhile.
    with Load(real_stack.url, known, clients=1, pause_s=1.0) as later:
        [successor] = wait_replaced(real_stack, "prefill", [prefill], size=1)
        wait_replaced(real_stack, "decode", [decode], size=2)
        wait_warm(real_stack)
        later.wait_for(2)
    assert load.failed + later.failed == []
    assert load.wrong + later.wrong == []
    assert load.good_after(killed) is not None
    cut = [heard for heard in load.heard if heard.decode == decode.replica_id and heard.started < killed < heard.ended]
    assert len(cut) >= 2
    assert "local" in [heard.prefill for heard in load.heard if heard.started >= missing]
    assert successor.replica_id in [heard.prefill for heard in later.heard]
