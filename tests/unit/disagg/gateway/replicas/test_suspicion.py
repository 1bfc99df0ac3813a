# SPDX-License-Identifier: Apache-2.0
"""Which replica is slow, and when a pool is in a crash loop."""

from __future__ import annotations

from disagg.gateway.replicas.suspicion import CrashLoop, ProbeTime, Slowness


def test_slow_three_times_in_a_row() -> None:
    """More than five times the best, in three probes; the same probe counts once, and one good one clears it."""
    slowness = Slowness()
    for number, slow in ((1, False), (2, False), (2, False), (2, False), (3, True), (4, True)):
        found = slowness.judge({"a": ProbeTime(0.5, number), "b": ProbeTime(2.6, number)})
        assert found == ({"b"} if slow else set())
    assert slowness.judge({"a": ProbeTime(0.5, 5), "b": ProbeTime(2.4, 5)}) == set()


def test_not_slow() -> None:
    """Below a second nothing is slow, a pool that is slow as a whole neither, nor a replica that is alone."""
    slowness = Slowness()
    for number in range(1, 6):
        assert not slowness.judge({"a": ProbeTime(0.001, number), "b": ProbeTime(0.9, number)})
    for number in range(6, 12):
        assert not slowness.judge({"a": ProbeTime(3.0, number), "b": ProbeTime(8.0, number)})
    for number in range(12, 18):
        assert not slowness.judge({"b": ProbeTime(30.0, number)})


def test_a_new_incarnation_begins_anew() -> None:
    """What a replica had against it is forgotten with it."""
    slowness = Slowness()
    for number in range(1, 4):
        found = slowness.judge({"a": ProbeTime(0.1, number), "b": ProbeTime(9.0, number)})
    assert found == {"b"}
    slowness.judge({"a": ProbeTime(0.1, 4)})
    assert not slowness.judge({"a": ProbeTime(0.1, 5), "b": ProbeTime(9.0, 4)})


def test_crash_loop() -> None:
    """Three replicas within two minutes; each counts once, and old losses are forgotten."""
    loop = CrashLoop()
    assert not loop.count_loss("1", 0) and not loop.count_loss("2", 60) and not loop.count_loss("2", 61)
    assert not loop.is_on(61)
    assert loop.count_loss("3", 100) and loop.is_on(120)
    assert not loop.count_loss("4", 110) and loop.is_on(180)
    assert not loop.is_on(181)
    assert not loop.count_loss("5", 300)
    assert not loop.is_on(300)
