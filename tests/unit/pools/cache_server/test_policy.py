# SPDX-License-Identifier: Apache-2.0
"""When a cache server is restarted, and when it ends. Times are numbers."""

from __future__ import annotations

import pytest

from pools.cache_server.policy import (
    GRACE_S,
    LEASE_S,
    MAX_FAILED_PROBES,
    MAX_RESTART_DELAY_S,
    MAX_RETRY_DELAY_S,
    QUICK_DEATH_S,
    RENEW_PERIOD_S,
    START_TIMEOUT_S,
    Leases,
    LeaseTimes,
    Life,
    restart_delay_s,
    restart_pause_s,
    retry_delay_s,
    why_it_ended,
)


def _healthy(since: float = 0.0) -> Life:
    life = Life()
    life.started(since)
    life.probed(True, since)
    return life


def test_the_first_server_is_started_at_once() -> None:
    """Nothing runs, so it starts; a running one is waited for."""
    life = Life()
    assert life.step(0.0) == "start"
    life.started(0.0)
    assert life.step(1.0) == "wait"


def test_a_server_that_dies_after_a_long_life_is_restarted_at_once() -> None:
    """Its death says nothing about its settings."""
    life = _healthy()
    life.died(QUICK_DEATH_S + 1)
    assert life.step(QUICK_DEATH_S + 1) == "start"
    assert life.num_restarts == 1


def test_a_server_that_says_it_is_silent_is_killed_at_once() -> None:
    """No further probe is waited for, whether it was healthy or not; its successor starts afresh."""
    never = Life()
    never.started(0.0)
    for life in (_healthy(), never):
        life.silenced()
        assert life.step(0.1) == "kill"
        life.died(0.1)
        life.started(1.0)
        assert life.step(1.1) == "wait"


def test_a_crash_loop_is_slowed_down_and_forgiven() -> None:
    """The first early death costs nothing, each further one doubles the wait, a long life ends it."""
    life, now, waits = Life(), 0.0, []
    for _ in range(9):
        life.started(now)
        life.died(now)
        waits.append(life.start_at - now)
        now = life.start_at
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    life.started(now)
    life.probed(True, now)
    life.died(now + QUICK_DEATH_S)
    assert life.start_at == now + QUICK_DEATH_S and life.num_quick_deaths == 0


@pytest.mark.parametrize("num_quick_deaths", [-1, 0, 1, 5, 6, 100, 100_000])
def test_a_delay_is_bounded(num_quick_deaths: int) -> None:
    """No number of deaths overflows or stops the restarts."""
    assert 0.0 <= restart_delay_s(num_quick_deaths) <= MAX_RESTART_DELAY_S


def test_a_restart_lasts_long_enough_for_engines_to_notice() -> None:
    """With the start of LMCache, 3 s at least, two heartbeats go by; a crash loop's own delays are not added."""
    assert [restart_pause_s(interval) for interval in (0.5, 1.5, 3.0, 10.0, 1e3)] == [0, 0, 3, 17, 60]
    life = Life(pause_s=3.0)
    life.started(0.0)
    life.probed(True, 0.0)
    life.died(QUICK_DEATH_S + 1)
    assert life.step(QUICK_DEATH_S + 3) == "wait" and life.step(QUICK_DEATH_S + 4) == "start"
    for _ in range(9):
        life.started(0.0)
        life.died(0.0)
    assert life.start_at == MAX_RESTART_DELAY_S


def test_a_lost_server_is_made_again_ever_more_slowly() -> None:
    """From one renewal to a minute, and no number of tries overflows."""
    assert [retry_delay_s(tries, 3.0) for tries in (1, 2, 3, 4, 5, 6, 7, 10**6)] == [3, 6, 12, 24, 48, 60, 60, 60]
    assert MAX_RETRY_DELAY_S == 60


def test_a_server_that_misses_several_probes_is_killed() -> None:
    """One answer in between is enough to go on."""
    life = _healthy()
    for _ in range(MAX_FAILED_PROBES - 1):
        life.probed(False, 1.0)
    assert life.step(1.0) == "wait"
    life.probed(True, 1.0)
    for _ in range(MAX_FAILED_PROBES):
        assert life.step(1.0) == "wait"
        life.probed(False, 1.0)
    assert life.step(1.0) == "kill"


def test_a_server_that_starts_may_miss_probes_until_its_time_is_up() -> None:
    """It imports for seconds and answers nothing meanwhile."""
    life = Life()
    life.started(0.0)
    for _ in range(100):
        life.probed(False, 1.0)
    assert life.step(START_TIMEOUT_S - 1) == "wait"
    assert life.step(START_TIMEOUT_S + 1) == "kill"


def test_a_used_server_goes_on() -> None:
    """Renewed leases keep it, even when Serve does not list the application."""
    leases = Leases(idle_since=0.0)
    now = 0.0
    while now < 10 * GRACE_S:
        leases.renew("a", now)
        assert not leases.over(now, unwanted=True)
        now += RENEW_PERIOD_S


def test_a_server_without_users_waits_for_a_grace() -> None:
    """A replaced replica finds it; after the grace it ends."""
    leases = Leases(idle_since=0.0)
    leases.renew("a", 100.0)
    leases.release("a", 110.0)
    assert not leases.over(110.0 + GRACE_S - 1, unwanted=False)
    assert leases.over(110.0 + GRACE_S, unwanted=False)
    leases.renew("b", 120.0)
    assert not leases.over(121.0, unwanted=False)


def test_a_killed_replica_counts_until_its_lease_is_over() -> None:
    """Nobody says that it left; the grace runs from when its lease ended."""
    leases = Leases(idle_since=0.0)
    leases.renew("a", 100.0)
    assert leases.num_users(100.0 + LEASE_S - 1) == 1
    assert leases.num_users(100.0 + LEASE_S) == 0
    assert not leases.over(100.0 + LEASE_S + GRACE_S - 1, unwanted=False)
    assert leases.over(100.0 + LEASE_S + GRACE_S, unwanted=False)


@pytest.mark.parametrize(("unwanted", "end_s"), [(False, 20.0), (True, 5.0)], ids=["in use", "gone"])
def test_a_server_that_nobody_came_to_ends(unwanted: bool, end_s: float) -> None:
    """After the grace, and after the time of a lease when nobody is expected: a restarted actor has forgotten who uses
    it, and hears of them within one."""
    leases = Leases(idle_since=0.0, times=LeaseTimes(lease_s=5.0, grace_s=20.0))
    assert not leases.over(end_s - 1, unwanted=unwanted)
    assert leases.over(end_s, unwanted=unwanted)
    leases.renew("a", end_s)
    assert not leases.over(end_s + 4, unwanted=unwanted)


def test_a_server_of_an_application_that_is_gone_ends_at_once() -> None:
    """Unless somebody uses it, and an unknown user's leave changes nothing."""
    leases = Leases(idle_since=0.0)
    leases.renew("a", 1.0)
    leases.release("nobody", 1.0)
    assert not leases.over(2.0, unwanted=True)
    leases.release("a", 2.0)
    assert leases.over(2.0, unwanted=True)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "it said nothing"),
        (["one", "two "], "two"),
        (
            [
                "Traceback",
                "zmq.error.ZMQError: Address already in use",
                "ERROR:    Application startup failed. Exiting.",
            ],
            "zmq.error.ZMQError: Address already in use",
        ),
        (
            ["usage: lmcache", "lmcache server: error: argument --port: invalid"],
            "lmcache server: error: argument --port: invalid",
        ),
    ],
    ids=["nothing", "no error", "traceback", "arguments"],
)
def test_the_reason_of_an_end_is_its_last_error(lines: list[str], expected: str) -> None:
    """What follows an error, such as the tracker's leak warning, does not hide it."""
    assert why_it_ended(lines) == expected
