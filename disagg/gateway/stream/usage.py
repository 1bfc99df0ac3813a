# SPDX-License-Identifier: Apache-2.0
"""Puts the right `cached_tokens` into answers whose engine could not know it.

The gateway searches for the bytes of the key: inside a JSON string every quote is escaped, so they are never text.
"""

from __future__ import annotations

import re

from disagg.gateway.handoff.cached import Cached

_KEY = b'"prompt_tokens_details":{'
_FIGURE = re.compile(rb'("prompt_tokens_details":\{(?:[^"{}]|"(?!cached_tokens")[^"]*")*"cached_tokens":)(\d+)')
_END = b"\n\n"


def corrected(data: bytes, cached: Cached) -> bytes:
    """A whole answer, or whole events of a stream, with the right figure. The rest stays as it is, byte for byte."""
    if _KEY not in data:
        return data
    return _FIGURE.sub(lambda found: found[1] + b"%d" % cached.corrected(int(found[2])), data)


class CorrectedStream:
    """One stream. Only whole events go on, so that no figure comes in two pieces."""

    def __init__(self, cached: Cached) -> None:
        self._cached = cached
        self._partial = b""

    def feed(self, data: bytes) -> bytes:
        """What goes to the client now. Never raises."""
        if self._partial:
            data = self._partial + data
        if data.endswith(_END):
            self._partial = b""
        else:
            end = data.rfind(_END) + 2 if _END in data else 0
            data, self._partial = data[:end], data[end:]
        return corrected(data, self._cached)

    def unfinished(self) -> bytes:
        """What is left of a stream that ended in the middle of an event."""
        partial, self._partial = self._partial, b""
        return partial
