# SPDX-License-Identifier: Apache-2.0
"""`make prove-use`: what breaks in use has to show, a function a line."""

from __future__ import annotations

import sys

from tests.prove.report import main

LINES = {
    1: "tests.prove.use_faults:each_fault",
    2: "tests.prove.use_starts:starts_that_cannot_succeed",
    3: "tests.prove.use_pools:no_pool_is_needed",
    4: "tests.prove.use_intake:others_stream_on",
    5: "tests.prove.use_gpu_set:gpu_set_loads",
    6: "tests.prove.use_first_day:first_day",
    7: "tests.prove.use_values:engine_values",
    8: "tests.prove.use_layouts:kv_layouts",
}

if __name__ == "__main__":
    sys.exit(main("use", LINES))
