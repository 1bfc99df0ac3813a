# SPDX-License-Identifier: Apache-2.0
"""Line 3: either pool is lost, once and again or for a minute, and nobody who asks notices but for a pause."""

from __future__ import annotations

from tests.prove.faults_decode import PAUSE_S, mid_stream
from tests.prove.faults_prefill import one_replica, whole_pool
from tests.prove.faults_rows import room
from tests.prove.report import Row

NUM_KILLS = 10
LINE = 3


def no_pool_is_needed(num_kills: int = NUM_KILLS, away_s: float = 60.0) -> list[Row]:
    rows = mid_stream(num_kills, sizes=(1, 1), line=LINE, what="1P1D, decode: ", seed=31)
    rows += one_replica(
        num_kills,
        sizes=(1, 1),
        line=LINE,
        what="1P1D, prefill: ",
        max_gap_s=lambda chosen: PAUSE_S + chosen.recompute_s,
        seed=32,
    )
    for pool in ("prefill", "decode"):
        rows.append(Row(LINE, f"2P2D, the whole {pool} pool is away for {away_s:g} s", "below", "", True))
        rows += whole_pool(away_s, pool=pool, sizes=(2, 2), line=LINE, max_first_good_s=None, then=room)
    return rows
