# SPDX-License-Identifier: Apache-2.0
"""`python -m pools.engine.fake`: one fake engine as a process that prints its URL."""

from __future__ import annotations

from pools.engine.fake.engine import main

main()
