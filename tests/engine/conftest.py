# SPDX-License-Identifier: Apache-2.0
"""Engines of these tests are forked from one process that has vLLM imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.stack import forked_engines


@pytest.fixture(scope="session", autouse=True)
def _forked_engines() -> Iterator[None]:
    with forked_engines():
        yield
