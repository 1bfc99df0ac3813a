# SPDX-License-Identifier: Apache-2.0
"""Decisions about one supervised `lmcache server`: when it is restarted, and when nobody needs it any more. Pure.

Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

PROBE_PERIOD_S = 1.0
"""Between two probes of a server that runs."""
PROBE_TIMEOUT_S = 3.0
"""What one probe may take. A server that copies many gigabytes answers late, and is well."""
MAX_FAILED_PROBES = 4
"""Probes in a row that a server may miss before it counts as hung: at most 16 s."""
START_TIMEOUT_S = 120.0
"""From start to healthy. It imports torch, which takes 5 s, and 20 s on a disk that is cold."""
QUICK_DEATH_S = 30.0
"""A server that dies younger than this dies of its settings or its surroundings, and is restarted ever more slowly."""
MAX_RESTART_DELAY_S = 15.0
FASTEST_START_S = 3.0
"""Shortest time from a start to the first answer on any machine, because the server imports torch."""
MAX_RESTART_PAUSE_S = 60.0

RENEW_PERIOD_S = 3.0
"""How often a replica says that it uses the server."""
LEASE_S = 15.0
"""How long one such renewal holds."""
GRACE_S = 60.0
"""How long a server without users goes on, so that a replaced replica finds what its predecessor stored."""
MAX_RETRY_DELAY_S = 60.0
"""Longest time between two tries of a replica to make a lost server again."""
PORT_WAIT_S = 660.0
"""How long a new server waits for the configured port of its predecessor, whose replicas drain: for 600 s by default.
"""

Step = Literal["wait", "start", "kill"]


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds of the agreement between a server and its users."""

    renew_period_s: float = RENEW_PERIOD_S
    lease_s: float = LEASE_S
    grace_s: float = GRACE_S
    port_wait_s: float = PORT_WAIT_S


TIMES = LeaseTimes()

_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception): \S|^.{0,40}\berror: \S|\bLMCache ERROR\b")


def why_it_ended(lines: Sequence[str]) -> str:
    """The line of a server's output that says most: the last error, else the last line."""
    errors = [line for line in lines if _ERROR.search(line)]
    return (errors or list(lines) or ["it said nothing"])[-1].strip()


def restart_delay_s(num_quick_deaths: int) -> float:
    """Seconds to wait before the next start: none after a long life, then 0.5, 1, 2, ... up to 15."""
    if num_quick_deaths <= 0:
        return 0.0
    return float(min(0.5 * 2 ** min(num_quick_deaths - 1, 16), MAX_RESTART_DELAY_S))


def restart_pause_s(heartbeat_interval_s: float) -> float:
    """Seconds from the end of a server to the start of the next one, at least.

    An engine notices by two heartbeats without an answer that its server is gone. If a new server answers before that,
    the engine goes on with a registration that the new server does not know, and waits until a request times out. The
    pause is at most a minute. Pause and start together are well below the time that a replica waits for a server.
    """
    return min(max(0.0, 2 * heartbeat_interval_s - FASTEST_START_S), MAX_RESTART_PAUSE_S)


def retry_delay_s(num_tries: int, first_s: float) -> float:
    """Seconds until a replica tries again to make a lost server: doubled with every try, up to 60."""
    return float(min(first_s * 2 ** min(max(num_tries - 1, 0), 16), MAX_RETRY_DELAY_S))


@dataclass
class Life:
    """What the supervisor knows about its server."""

    pause_s: float = 0.0
    """From a death to the next start at least; `restart_pause_s`."""
    started_at: float | None = None
    """When the current process was started; None while none runs."""
    healthy_at: float | None = None
    """When the current process first answered; None until then."""
    start_at: float = 0.0
    """When the next process may be started."""
    num_failed_probes: int = 0
    """Probes that failed in a row."""
    num_quick_deaths: int = 0
    """Early deaths in a row."""
    num_restarts: int = 0
    """Starts after the first one."""

    def step(self, now: float) -> Step:
        """What to do: start a server, kill the one that hangs, or look again later."""
        if self.started_at is None:
            return "start" if now >= self.start_at else "wait"
        if self.num_failed_probes >= MAX_FAILED_PROBES:
            return "kill"
        return "kill" if self.healthy_at is None and now - self.started_at > START_TIMEOUT_S else "wait"

    def started(self, now: float) -> None:
        """A process runs."""
        self.started_at, self.healthy_at, self.num_failed_probes = now, None, 0

    def probed(self, answered: bool, now: float) -> None:
        """A probe of the running process came back."""
        if answered:
            self.num_failed_probes = 0
            self.healthy_at = self.healthy_at if self.healthy_at is not None else now
        elif self.healthy_at is not None:
            self.num_failed_probes += 1

    def silenced(self) -> None:
        """The server's output says that it will answer no more, so no further probe is waited for."""
        self.num_failed_probes = MAX_FAILED_PROBES

    def died(self, now: float) -> None:
        """The process is gone, by itself or killed."""
        quick = self.healthy_at is None or now - self.healthy_at < QUICK_DEATH_S
        # The first early death may be an accident, so only the next ones delay the start.
        self.start_at = now + max(restart_delay_s(self.num_quick_deaths if quick else 0), self.pause_s)
        self.num_quick_deaths = self.num_quick_deaths + 1 if quick else 0
        self.started_at, self.healthy_at = None, None
        self.num_restarts += 1


@dataclass
class Leases:
    """Who uses the server."""

    idle_since: float
    """When the last user left; the time of the start before the first one came."""
    times: LeaseTimes = TIMES
    _used: bool = False
    _until: dict[str, float] = field(default_factory=dict)

    def renew(self, user: str, now: float) -> None:
        """`user` uses the server for the next `lease_s` seconds."""
        self._used = True
        self._until[user] = now + self.times.lease_s

    def release(self, user: str, now: float) -> None:
        """`user` does not need it any more. Unknown users are fine."""
        if self._until.pop(user, None) is not None and not self._until:
            self.idle_since = now

    def num_users(self, now: float) -> int:
        """Users whose lease runs."""
        for user in [user for user, until in self._until.items() if until <= now]:
            self.release(user, now)
        return len(self._until)

    def over(self, now: float, *, unwanted: bool) -> bool:
        """Whether the server should end: it has no users, and it is unwanted or had none for the grace time.

        Args:
            unwanted: the application is gone, or a server with other settings waits for this one's port. A server
                that was never used still waits for the time of a lease: its actor may have been restarted, and users
                have yet to renew.
        """
        if self.num_users(now):
            return False
        enough = self.times.grace_s if not unwanted else 0.0 if self._used else self.times.lease_s
        return now - self.idle_since >= enough
