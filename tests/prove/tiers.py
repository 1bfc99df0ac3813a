# SPDX-License-Identifier: Apache-2.0
"""`make prove-tiers`: what the KV tiers have to show, on real engines, a function a line."""

from __future__ import annotations

import sys

from tests.prove.report import main

LINES = {
    1: "tests.prove.tiers_tokens:same_tokens",
    2: "tests.prove.tiers_offload:overflow_pays",
    3: "tests.prove.tiers_rescue:nothing_is_wasted",
    4: "tests.prove.tiers_hot_path:hot_path",
    5: "tests.prove.tiers_server:server_dies",
    6: "tests.prove.tiers_storm:abort_storm",
    7: "tests.prove.tiers_mooncake:first_tokens",
    8: "tests.prove.tiers_durable:durable",
}

if __name__ == "__main__":
    sys.exit(main("tiers", LINES))
