# SPDX-License-Identifier: Apache-2.0
"""An application whose shared tier outlives it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tests.support.stack import ROOT, Stack, running
from tests.support.tiers import FLOAT32, tiers

DURABLE_FILES = "e2e-tiers-l2"
"""Folder below build/."""


def durable_application(files: str) -> AbstractContextManager[Stack]:
    """1P1D over Mooncake, LMCache with the sink `write_through`, and files in `files` behind its memory.

    It may not be scaled: `external_scaler_enabled` is off.
    """
    change = tiers(
        transport="mooncake",
        sink="write_through",
        l1_gib=0.25,
        l2=[{"type": "fs", "path": files}],
        blocks=200,
        engine_kwargs=FLOAT32,
    )

    def unscaled(config: dict[str, Any]) -> None:
        change(config)
        config["applications"][0]["external_scaler_enabled"] = False

    return running(ROOT / "configs" / "quickstart.yaml", name="e2e-tiers-mooncake", change=unscaled)
