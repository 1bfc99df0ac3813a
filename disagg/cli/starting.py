# SPDX-License-Identifier: Apache-2.0
"""What the log of a start says of replicas that do not come up, and when there is no hope left. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from disagg.cli.supervise import is_fatal
from pools.replica.start_failure import StartFailure
from pools.replica.unplaced import Unplaced

_MEMORY = ("killed due to memory pressure (OOM)", "killed due to the node running low on memory")
_OWN_RAY = "Started a local Ray instance"
_PATIENCE = 2
"""How often Serve may warn of replicas without a place, every 30 s, before that counts as for ever: where too little is
free, in a cluster of this machine alone. Slow processes come, and other clusters may grow."""


@dataclass
class Starting:
    """Reads the log line by line."""

    max_failures: int
    """How often replicas may fail, all together, before the start is given up."""
    hopeless: str | None = None
    """Why the start cannot succeed; None while it may."""
    last: StartFailure | None = None
    told: bool = False
    """Whether it has said why the start goes wrong, so that nobody has to read the log."""
    _failures: int = 0
    _unplaced: Counter[str] = field(default_factory=Counter)
    _no_room: set[str] = field(default_factory=set)
    _own_ray: bool = False
    _told: set[str] = field(default_factory=set)

    def feed(self, line: str) -> str | None:
        """Take the next line. Returns what a person should see of it at once, in words; mostly None."""
        if (failure := StartFailure.in_line(line)) is not None:
            return self._failed(failure)
        if (unplaced := Unplaced.in_line(line)) is not None:
            return self._without_place(unplaced)
        if _OWN_RAY in line:
            self._own_ray = True
        if any(mark in line for mark in _MEMORY):
            return self.once("Ray has ended a process because this machine runs out of memory")
        if is_fatal(line) and self.hopeless is None:
            self.hopeless = "the application did not start"
            if self.last is not None:
                self.hopeless += f": {self.last.pool}: {self.last.reason}"
        return None

    def _failed(self, failure: StartFailure) -> str:
        self.last, self.told = failure, True
        self._failures += 1
        number = self._failures
        if number >= self.max_failures and self.hopeless is None:
            self.hopeless = f"{number} replicas did not start, the last one of {failure.pool}: {failure.reason}"
        return f"{failure.pool} replica {failure.replica_id} did not start ({number}): {failure.reason}"

    def no_room(self, pool: str) -> None:
        """The gateway says that the cluster has too little free for a replica of this pool."""
        self._no_room.add(pool)

    def _without_place(self, unplaced: Unplaced) -> str | None:
        self.told = True
        self._unplaced[unplaced.pool] += 1
        words = str(unplaced)
        for_ever = self._own_ray and (unplaced.lacks or unplaced.pool in self._no_room)
        if for_ever and self._unplaced[unplaced.pool] >= _PATIENCE and self.hopeless is None:
            self.hopeless = words
        return self.once(words)

    def once(self, words: str) -> str | None:
        """`words` when they are said for the first time, else None."""
        if words in self._told:
            return None
        self._told.add(words)
        return words
