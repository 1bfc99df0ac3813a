# SPDX-License-Identifier: Apache-2.0
"""How long the prefill side of a request may take before the decode engine computes the prompt itself. Pure.

The first token is due at a target. What the way out would cost, the prompt computed on decode, is kept back from it.
"""

from __future__ import annotations

_WEIGHT = 0.2
"""Of the newest measurement in the moving average."""
_MIN_MEASURED_TOKENS = 256
"""Of shorter prompts the time is mostly queue and overhead, and says nothing about tokens."""


class LocalRate:
    """How fast decode engines compute prompts: a moving average of prompt tokens/s up to the first byte."""

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        """None until a prompt was measured."""

    def expected_s(self, num_tokens: int) -> float | None:
        """How long a prompt should take."""
        return None if self.tokens_per_s is None else num_tokens / self.tokens_per_s

    def measured(self, num_tokens: int, seconds: float) -> None:
        """Take one local prefill. `seconds` are those from sending it to the first byte of its stream."""
        if num_tokens < _MIN_MEASURED_TOKENS or seconds <= 0:
            return
        rate = num_tokens / seconds
        old = self.tokens_per_s
        self.tokens_per_s = rate if old is None else old + _WEIGHT * (rate - old)


def prefill_allowance_s(
    num_tokens: int, *, prefill_timeout_s: float, first_token_target_s: float, local_tokens_per_s: float | None
) -> float:
    """Seconds for all prefill attempts of a prompt of `num_tokens`.

    The target less the expected local prefill, half the target when no rate is known. Where the local prefill takes
    more than half of the target, the prefill side gets as long as that: stopped any earlier, a prompt that only its
    length makes slow would always be computed twice.
    """
    if local_tokens_per_s is None:
        allowance = first_token_target_s / 2
    else:
        expected = num_tokens / local_tokens_per_s
        allowance = max(first_token_target_s - expected, expected)
    return min(prefill_timeout_s, allowance)


def attempt_until(now: float, deadline: float, *, another: bool) -> float:
    """When one attempt ends: half of what is left while `another` prefill replica could be tried, else all of it."""
    return now + max(0.0, deadline - now) / 2 if another else deadline
