# SPDX-License-Identifier: Apache-2.0
"""Errors of the lowest layer."""

from __future__ import annotations

import pickle

import pytest

from transport.errors import ConfigError


@pytest.mark.parametrize("path", [None, "applications[0].args.model.source"])
def test_config_error_survives_pickling(path: str | None) -> None:
    """A ConfigError raised in a Ray process arrives with its message and path."""
    error = pickle.loads(pickle.dumps(ConfigError("no such directory", path=path)))
    assert (type(error), str(error), error.path) == (ConfigError, "no such directory", path)
