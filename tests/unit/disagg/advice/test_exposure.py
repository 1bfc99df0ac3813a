# SPDX-License-Identifier: Apache-2.0
"""No API keys only where nobody else can ask."""

from __future__ import annotations

import pytest

from disagg.advice.exposure import is_loopback, strangers_served
from disagg.config import EnvKeysConfig, GatewayConfig

LOOPBACK = ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "LocalHost"]
REACHABLE = [
    "0.0.0.0",
    "::",
    "[::]",
    "10.0.0.1",
    "192.168.1.2",
    "example.net",
    "localhost.example.net",
    "",
    "127.0.0.1.x",
]


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback(host: str) -> None:
    """This machine alone."""
    assert is_loopback(host)
    assert strangers_served(GatewayConfig(), host) is None


@pytest.mark.parametrize("host", REACHABLE)
def test_reachable(host: str) -> None:
    """Whatever else needs keys, or the word that it needs none."""
    assert not is_loopback(host)
    trouble = strangers_served(GatewayConfig(), host)
    assert trouble is not None and repr(host) in trouble
    assert strangers_served(GatewayConfig(allow_anonymous=True), host) is None
    assert strangers_served(GatewayConfig(api_keys=EnvKeysConfig(type="env", variable="X")), host) is None


def test_nobody_listens() -> None:
    """Without HTTP nobody can ask."""
    assert strangers_served(GatewayConfig(), None) is None
