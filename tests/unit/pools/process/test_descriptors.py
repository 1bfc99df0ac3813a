# SPDX-License-Identifier: Apache-2.0
"""The limit of file descriptors of a replica."""

from __future__ import annotations

import resource

import pytest

from pools.process.descriptors import wanted

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "limit"),
    [
        (1024, 1024, 1024),
        (1024, 20_000, 20_000),
        (1024, 2**20, 65_535),
        (1024, INFINITE, 65_535),
        (2**20, 2**20, 2**20),
        (INFINITE, INFINITE, INFINITE),
    ],
)
def test_as_much_as_is_allowed(soft: int, hard: int, limit: int) -> None:
    """Up to what a server needs, and never less than there was."""
    assert wanted(soft, hard) == limit
