# SPDX-License-Identifier: Apache-2.0
"""What Serve says of replicas that Ray finds no place for. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

_WARNED = re.compile(
    r"Deployment '(?P<pool>\w+)' .* has (?P<number>\d+) replicas that have taken more than \d+s to be scheduled.*"
    r"Resources required for each replica: (?P<required>.*?), total resources available: (?P<free>\{.*?\})"
)
"""Serve 2.60 says so every 30 s, in its log and as the deployment's status."""


@dataclass(frozen=True)
class Unplaced:
    """What a replica of one pool needs to be placed, and what there is."""

    required: str
    """What each replica needs."""
    free: str
    """What the whole cluster has free."""
    pool: str = ""
    number: int = 0
    """How many of its replicas wait."""

    @classmethod
    def in_line(cls, line: str) -> Self | None:
        """From a line of Serve's; None for any other line."""
        found = _WARNED.search(line)
        return None if found is None else cls(found["required"], found["free"], found["pool"], int(found["number"]))

    @classmethod
    def of(cls, required: Mapping[str, float], free: Mapping[str, float]) -> Self:
        """From amounts of resources."""
        return cls(_words(required), _words({name: free.get(name, 0.0) for name in required}))

    def __str__(self) -> str:
        return f"{self.number} replica(s) of {self.pool} cannot be placed: {self.why}"

    @property
    def why(self) -> str:
        return f"each needs {self.required}, free in the cluster is {self.free}"


def lacking(required: Mapping[str, float], free: Mapping[str, float]) -> bool:
    """Whether a whole cluster has less free than one replica needs."""
    return any(amount > free.get(name, 0.0) for name, amount in required.items())


def _words(amounts: Mapping[str, float]) -> str:
    """Such as `0.5 CPU, 2 GPU`."""
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(amounts.items()))
