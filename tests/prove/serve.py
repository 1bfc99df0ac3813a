# SPDX-License-Identifier: Apache-2.0
"""`make prove-serve`: what "serve a model disaggregated" has to show, on real engines, a function a line."""

from __future__ import annotations

import sys

from tests.prove.report import Line, main
from tests.prove.serve_bad_input import bad_input
from tests.prove.serve_bench import bench
from tests.prove.serve_clone import clean_clone, clean_clone_test
from tests.prove.serve_docs import documented
from tests.prove.serve_leaving import leaving
from tests.prove.serve_scale import scale
from tests.prove.serve_tokens import same_tokens
from tests.prove.serve_xpyd import xpyd

LINES: dict[int, Line] = {
    1: clean_clone,
    2: clean_clone_test,
    3: same_tokens,
    4: xpyd,
    5: leaving,
    6: bad_input,
    7: bench,
    8: scale,
    9: documented,
}

if __name__ == "__main__":
    sys.exit(main("serve", LINES))
