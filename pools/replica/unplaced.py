# SPDX-License-Identifier: Apache-2.0
"""What Serve says of replicas that Ray finds no place for. Pure."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

_WARNED = re.compile(
    r"Deployment '(?P<pool>\w+)' .* has (?P<number>\d+) replicas that have taken more than \d+s to be scheduled.*"
    r"Resources required for each replica: (?P<required>[\[{].*?[\]}]), total resources available: (?P<free>\{.*?\})"
)
"""Serve 2.60 says so every 30 s, in its log and as the deployment's status, of each replica whose process is not there
yet: for want of room, or because nodes are added, a runtime environment is installed or a process starts."""


@dataclass(frozen=True)
class Unplaced:
    """What a replica of one pool needs to be placed, and what there is."""

    required: Mapping[str, float]
    """What each replica needs, over all bundles of its placement group."""
    free: Mapping[str, float] | None
    """What the whole cluster has free of it. None where Serve does not say: with placement groups it compares names
    with bundles, and finds nothing."""
    pool: str = ""
    number: int = 0
    """How many of its replicas wait."""

    @classmethod
    def in_line(cls, line: str) -> Self | None:
        """From a line of Serve's; None for any other line."""
        found = _WARNED.search(line)
        if found is None:
            return None
        try:
            required, free = json.loads(found["required"]), json.loads(found["free"])
        except ValueError:
            return None
        if isinstance(required, dict):
            return cls(required, {name: free.get(name, 0.0) for name in required}, found["pool"], int(found["number"]))
        whole: Counter[str] = Counter()
        for bundle in required:
            whole.update(bundle)
        return cls(dict(whole), None, found["pool"], int(found["number"]))

    @property
    def lacks(self) -> bool:
        """Whether it is sure that the whole cluster has less free than one replica needs."""
        return self.free is not None and any(
            amount > self.free.get(name, 0.0) for name, amount in self.required.items()
        )

    def beside(self, free: Mapping[str, float]) -> Self:
        """The same with what the whole cluster has free."""
        return type(self)(self.required, {name: free.get(name, 0.0) for name in self.required}, self.pool, self.number)

    def __str__(self) -> str:
        words = "cannot be placed" if self.lacks else "have no place yet"
        return f"{self.number} replica(s) of {self.pool} {words}: {self.why}"

    @property
    def why(self) -> str:
        needs = f"each needs {_words(self.required)}"
        return needs if self.free is None else f"{needs}, free in the cluster is {_words(self.free)}"


def _words(amounts: Mapping[str, float]) -> str:
    """Such as `0.5 CPU, 2 GPU`."""
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(amounts.items()))
