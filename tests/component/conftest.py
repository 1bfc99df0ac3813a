# SPDX-License-Identifier: Apache-2.0
"""One thread for each test that computes with torch: several tests run at once."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
