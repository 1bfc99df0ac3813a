# SPDX-License-Identifier: Apache-2.0
"""`make prove-house`: what the rooms, seams and doors have to show, a function a line.

`python -m tests.prove.house map` prints line 3 as a newcomer wants it: the files of one request, in order.
"""

from __future__ import annotations

import sys

from tests.prove import house_map
from tests.prove.report import main

LINES = {
    1: "tests.prove.house_tests:make_test",
    2: "tests.prove.house_same:same_behaviour_and_cost",
    3: "tests.prove.house_map:newcomers_map",
    4: "tests.prove.house_push:line4",
    5: "tests.prove.house_install:base_install",
    6: "tests.prove.house_seams:doors_and_states",
    7: "tests.prove.house_contracts:contracts",
    8: "tests.prove.house_upstream:replaced",
    9: "tests.prove.house_upstream:newest",
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["map"]:
        sys.exit(house_map.main(sys.argv[2:]))
    sys.exit(main("house", LINES))
