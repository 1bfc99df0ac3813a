# SPDX-License-Identifier: Apache-2.0
"""What is known of the KV between the two replicas of each pair: that it moves, and that it is right. Pure.

A warm-up proves that KV moves, not what it says. So a warm-up does not clear a pair whose KV was found wrong; an
answer that comes out the same does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

Key = tuple[str, str]
"""Incarnations of the prefill and the decode replica: what is known ends with either of them."""

THRESHOLD = 2
"""Different answers in a row that take a pair out of routing."""
_FIRST_REST_S = 60.0
_MAX_REST_S = 3600.0


@dataclass
class _Path:
    verified: bool
    """By the last proof."""
    num_different: int = 0
    """Answers in a row that came out different."""
    num_rests: int = 0
    """Times that the pair was taken out, without a same answer between them."""


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
        """An answer came out different; for how many seconds to leave the pair alone, None for not yet."""
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
