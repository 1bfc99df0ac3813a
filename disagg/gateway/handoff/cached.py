# SPDX-License-Identifier: Apache-2.0
"""How much of a request's prompts some cache held before, where the engine that answers cannot tell.

An engine that reads KV after the prefill leg's answer tells it right, since that answer says what prefill had cached.
With both legs at once the engine hears nothing of it, and of a `primed` request it finds cached what the probe brought.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from disagg.gateway.handoff.transfer import ends_now
from pools.client.messages import PrefillReply


@dataclass(frozen=True)
class Cached:
    """Corrects the `cached_tokens` of one answer."""

    prompts: int | None = None
    """Tokens of all prompts that were cached before, whatever the engine says; None leaves it to the engine and `leg`.
    """
    leg: asyncio.Task[PrefillReply] | None = None
    """The prefill leg of a hand-off. It may still run when the answer begins."""

    def corrected(self, told: int) -> int:
        """The right figure where the engine reports `told`."""
        return max(told, had(self.leg)) if self.prompts is None else self.prompts

    async def known(self) -> None:
        """Wait until the figure is known."""
        if self.leg is not None:
            await told(self.leg)


async def told(leg: asyncio.Task[PrefillReply]) -> int:
    """As `had`, of a leg whose KV has been read."""
    await ends_now(leg)
    return had(leg)


def had(leg: asyncio.Task[PrefillReply] | None) -> int:
    """Prompt tokens that a prefill engine had cached; 0 while its leg runs, and when it failed."""
    if leg is None or not leg.done() or leg.cancelled() or leg.exception() is not None:
        return 0
    return leg.result().num_cached_tokens
