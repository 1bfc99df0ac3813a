# SPDX-License-Identifier: Apache-2.0
"""`make prove-serve`: what "serve a model disaggregated" has to show, on real engines, a function a line."""

from __future__ import annotations

import sys

from tests.prove.report import main

LINES = {
    1: "tests.prove.serve_clone:clean_clone",
    2: "tests.prove.serve_clone:clean_clone_test",
    3: "tests.prove.serve_tokens:same_tokens",
    4: "tests.prove.serve_xpyd:xpyd",
    5: "tests.prove.serve_leaving:leaving",
    6: "tests.prove.serve_bad_input:bad_input",
    7: "tests.prove.serve_bench:bench",
    8: "tests.prove.serve_scale:scale",
    9: "tests.prove.serve_docs:documented",
}

if __name__ == "__main__":
    sys.exit(main("serve", LINES))
