# SPDX-License-Identifier: Apache-2.0
"""How many requests this gateway replica carries at the moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class InFlight:
    """A count. Belongs to the gateway's loop."""

    num: int = 0
