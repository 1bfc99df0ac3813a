# SPDX-License-Identifier: Apache-2.0
"""The loop of these tests, the one the gateway runs in, and its patience, cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from disagg.gateway.handoff import settling, transfer


def pytest_asyncio_loop_factories(
    config: object, item: object
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    try:
        import uvloop
    except ImportError:
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settling does not wait a whole second for an abort that takes microseconds here."""
    monkeypatch.setattr(settling, "_GRACE_S", 0.02)
    monkeypatch.setattr(transfer, "_ANSWER_GRACE_S", 0.02)
