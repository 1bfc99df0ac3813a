# SPDX-License-Identifier: Apache-2.0
"""The applications that the end-to-end tests share: one on real engines, one on fake ones.

Each is started once a module, so that they do not fill the memory together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.stack import ROOT, Stack, running


@pytest.fixture(scope="module")
def real_stack() -> Iterator[Stack]:
    """1P1D of real vLLM engines behind Serve's own proxy: `configs/quickstart.yaml`."""
    with running(ROOT / "configs" / "quickstart.yaml", name="e2e-real") as stack:
        yield stack


def use_fake_engines(config: dict[str, Any]) -> None:
    """Change a config to fake engines, which answer at once and need no memory."""
    args = config["applications"][0]["args"]
    args["engine"] = {"type": "fake", "itl_ms": 5}


@pytest.fixture(scope="module")
def fake_haproxy_stack() -> Iterator[Stack]:
    """1P1D of fake engines behind HAProxy: `configs/quickstart-haproxy.yaml`."""
    with running(
        ROOT / "configs" / "quickstart-haproxy.yaml", name="e2e-fake-haproxy", change=use_fake_engines
    ) as stack:
        yield stack
