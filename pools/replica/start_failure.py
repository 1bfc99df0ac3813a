# SPDX-License-Identifier: Apache-2.0
"""Why a replica did not come up, in one line that a person can act on, and how that line is told.

Serve tries again by itself. The line goes to the replica's log, where `disagg serve` reads it, and into the error that
Serve shows as the status of the deployment.
"""

from __future__ import annotations

import json
import logging
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pools.errors import EngineStartError

logger = logging.getLogger(__name__)

MARK = "disagg: a replica did not start: "
"""In front of a `StartFailure` as JSON, in the log of the replica."""
_SIGNALLED = re.compile(r"Failed core proc\(s\): \{[^}]*: -(\d+)")
_KILLED_FOR_MEMORY = int(signal.SIGKILL)
_MAX_CHARACTERS = 400


@dataclass(frozen=True)
class StartFailure:
    """One replica that did not come up."""

    pool: str
    replica_id: str
    reason: str
    """The root cause, as `ValueError: ...`."""

    def line(self) -> str:
        """As it stands in a log."""
        return MARK + json.dumps({"pool": self.pool, "replica_id": self.replica_id, "reason": self.reason})

    @classmethod
    def in_line(cls, line: str) -> Self | None:
        """The failure that a line of a log tells of; None for any other line."""
        _, found, told = line.partition(MARK)
        if not found:
            return None
        try:
            fields = json.loads(told)
            return cls(str(fields["pool"]), str(fields["replica_id"]), str(fields["reason"]))
        except (ValueError, KeyError, TypeError):
            return None


def not_started(pool: str, replica_id: str, error: BaseException, notes: Path | None = None) -> EngineStartError:
    """Tell in the log why a replica does not come up. Returns the error to raise, which Serve shows.

    Args:
        error, notes: as of `root_cause`.
    """
    cause = root_cause(error, notes)
    logger.error("%s", StartFailure(pool, replica_id, cause).line())
    return EngineStartError(f"{pool} replica {replica_id} did not start: {cause}")


def root_cause(error: BaseException, notes: Path | None) -> str:
    """What kept an engine from starting.

    Args:
        error: what the replica caught.
        notes: the file in which the engine's processes have noted their failures; the first one is the root.
    """
    cause = _root_cause(error, notes)
    return cause if len(cause) <= _MAX_CHARACTERS else f"{cause[:_MAX_CHARACTERS]}..."


def _root_cause(error: BaseException, notes: Path | None) -> str:
    noted = _first_line(notes)
    if noted is not None:
        return noted
    innermost = error
    while isinstance(innermost, EngineStartError) and innermost.__cause__ is not None:
        innermost = innermost.__cause__
    words = " ".join(str(innermost).split())
    if (found := _SIGNALLED.search(words)) is not None:
        number = int(found[1])
        if number == _KILLED_FOR_MEMORY:
            return "EngineCore was killed (signal 9), as the system does when memory runs out"
        return f"EngineCore was ended by signal {number} ({signal.Signals(number).name})"
    return f"{type(innermost).__name__}: {words}" if words else type(innermost).__name__


def _first_line(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return next((line for line in file.read_text(errors="replace").splitlines() if line.strip()), None)
    except OSError:
        return None
