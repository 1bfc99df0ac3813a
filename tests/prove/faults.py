# SPDX-License-Identifier: Apache-2.0
"""`make prove-faults`: what failures, drains and tenants have to show, on real engines, a function a line."""

from __future__ import annotations

import sys

from tests.prove.report import main

LINES = {
    1: "tests.prove.faults_prefill:one_replica",
    2: "tests.prove.faults_prefill:whole_pool",
    3: "tests.prove.faults_decode:mid_stream",
    4: "tests.prove.faults_hang:engine_stopped",
    5: "tests.prove.faults_restart:restarts",
    6: "tests.prove.faults_drain:drains",
    7: "tests.prove.faults_gateway:gateways",
    8: "tests.prove.faults_garbage:garbage",
    9: "tests.prove.faults_tenants:tenants",
    10: "tests.prove.faults_soak:soak",
}

if __name__ == "__main__":
    sys.exit(main("faults", LINES))
