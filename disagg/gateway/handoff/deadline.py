# SPDX-License-Identifier: Apache-2.0
"""How long the prefill side of a request may take before the decode engine computes the prompt itself. Pure.

The first token is due within a target time. The gateway keeps back as much of that time as a local prefill would take,
so that one is still possible when the prefill side fails.
"""

from __future__ import annotations

_WEIGHT = 0.2
"""Weight of the newest measurement in the moving average."""
_MIN_MEASURED_TOKENS = 256
"""Shorter prompts are not measured: their time is mostly queue and overhead, and says nothing about tokens."""


class LocalRate:
    """How fast decode engines compute prompts: a moving average of prompt tokens/s up to the first byte."""

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        """None until a prompt was measured."""

    def expected_s(self, num_tokens: int) -> float | None:
        """Seconds that a decode engine should take to compute a prompt; None while no rate is known."""
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

    The allowance is the target less the expected time of a local prefill, or half the target while no rate is known. A
    local prefill may itself be expected to take more than half of the target. Then the allowance is that expected time:
    with a shorter one, a prompt that is slow only because it is long would always be computed twice. The allowance is
    never more than `prefill_timeout_s`.
    """
    if local_tokens_per_s is None:
        allowance = first_token_target_s / 2
    else:
        expected = num_tokens / local_tokens_per_s
        allowance = max(first_token_target_s - expected, expected)
    return min(prefill_timeout_s, allowance)


def attempt_until(now: float, deadline: float, *, another: bool) -> float:
    """When one attempt must end: after half of the time left if `another` one could be tried, else at `deadline`."""
    return now + max(0.0, deadline - now) / 2 if another else deadline
