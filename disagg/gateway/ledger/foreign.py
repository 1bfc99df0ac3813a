# SPDX-License-Identifier: Apache-2.0
"""Books of the hand-offs of other gateway replicas, as the engines tell of them.

When a gateway is killed, its own ledger is lost. Every other gateway has the killed one's hand-offs in these books. The
request and the reason are missing, because only the killed gateway knew them. Bounded like the ledger itself.
"""

from __future__ import annotations

from collections.abc import Callable

from disagg.gateway.ledger.ledger import Ledger
from transport.handoff_params import is_warm_up

_MAX_OPEN = 16_384


def foreign_ledger(
    own: Ledger, *, num_records: int, unknown_after_s: float, on_count: Callable[[str, int, int], None]
) -> Ledger:
    """A ledger of all hand-offs that are not in `own`, warm-ups of pairs excepted. Arguments are those of `Ledger`."""

    def owns(handoff_id: str) -> bool:
        return not own.is_own(handoff_id) and not is_warm_up(handoff_id)

    return Ledger(
        num_records=num_records, unknown_after_s=unknown_after_s, max_open=_MAX_OPEN, on_count=on_count, owns=owns
    )
