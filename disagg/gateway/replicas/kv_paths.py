# SPDX-License-Identifier: Apache-2.0
"""What the gateway knows of the KV between the two replicas of each pair: whether it moves and is right. Pure.

A warm-up proves that KV moves, not that the KV is right. So a warm-up does not clear a pair whose KV was found wrong.
Only a checked answer that comes out the same clears the pair.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

Key = tuple[str, str]
"""Incarnations of the prefill and the decode replica: what is known of a pair ends when either replica does."""

THRESHOLD = 2
"""Different answers in a row that take a pair out of routing."""
_FIRST_REST_S = 60.0
_MAX_REST_S = 3600.0


@dataclass
class _Path:
    verified: bool
    """Whether the last proof succeeded."""
    num_different: int = 0
    """Answers in a row that came out different."""
    num_rests: int = 0
    """Times that the pair was taken out of routing since an answer last came out the same."""


class KvPaths:
    """The last proof of each pair. Not thread-safe."""

    def __init__(self) -> None:
        self._paths: dict[Key, _Path] = {}

    def warmed(self, key: Key) -> None:
        """KV has moved."""
        path = self._paths.setdefault(key, _Path(True))
        path.verified = not (path.num_different or path.num_rests)

    def not_warmed(self, key: Key) -> None:
        """No KV has moved."""
        self._paths.setdefault(key, _Path(False)).verified = False

    def same(self, key: Key) -> None:
        """An answer made of moved KV came out the same without it."""
        self._paths[key] = _Path(True)

    def different(self, key: Key) -> float | None:
        """Count an answer that came out different. Returns seconds for which the pair must rest, None for not yet."""
        path = self._paths.setdefault(key, _Path(False))
        path.verified = False
        path.num_different += 1
        if path.num_different < THRESHOLD:
            return None
        rest_s: float = min(_FIRST_REST_S * 2**path.num_rests, _MAX_REST_S)
        path.num_different = 0
        path.num_rests += 1
        return rest_s

    def is_suspect(self, key: Key) -> bool:
        """Whether the last answer that was checked was different."""
        path = self._paths.get(key)
        return path is not None and bool(path.num_different or path.num_rests)

    @property
    def any_suspect(self) -> bool:
        return any(path.num_different or path.num_rests for path in self._paths.values())

    def verified(self, key: Key) -> bool | None:
        """Whether the last proof succeeded; None before the first one."""
        path = self._paths.get(key)
        return None if path is None else path.verified

    def retain(self, incarnations: Collection[str]) -> None:
        """Forget all pairs but those of these replicas."""
        known = frozenset(incarnations)
        self._paths = {pair: path for pair, path in self._paths.items() if known.issuperset(pair)}
