# SPDX-License-Identifier: Apache-2.0
"""What becomes of hand-offs, in the words that the ledger keeps and the metrics count."""

from __future__ import annotations

ENDS = ("consumed", "released", "rescued", "expired", "failed")
"""What becomes of a hand-off; exactly one of them. `rescued`: nobody read the KV and the shared cache keeps it."""
TOTALS = ("produced", *ENDS, "stored", "reused")
"""What is counted. `stored`: what the shared cache took of rescued hand-offs, and of consumed ones whose clients asked
for that. `reused`: what was later loaded from the shared cache. Both count full chunks only."""
