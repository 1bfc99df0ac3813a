# SPDX-License-Identifier: Apache-2.0
"""Who an engine answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pools.client.routes import ENGINE_KEY_HEADER
from pools.replica.engine_key import EngineKey, make_key
from transport.errors import ConfigError

NAME = ENGINE_KEY_HEADER.encode()


def test_a_key_of_its_own() -> None:
    """Without a file every replica has another one, fit for a header."""
    keys = {make_key(None) for _ in range(20)}
    assert len(keys) == 20 and all(len(key) >= 32 and key.isascii() and key.isprintable() for key in keys)


def test_a_key_from_a_file(tmp_path: Path) -> None:
    """The file's one word; without one the replica does not start, and says so without it."""
    (tmp_path / "key").write_text(" an-operator's-key\n")
    assert make_key(str(tmp_path / "key")) == "an-operator's-key"
    for name, content in {"empty": b" \n", "two": b"one two", "break": b"one\r\ntwo", "binary": b"\xff"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("empty", "two", "break", "binary", "missing"):
        with pytest.raises(ConfigError, match="engine_key_file") as caught:
            make_key(str(tmp_path / name))
        assert "one" not in str(caught.value).replace("one key", "")


@pytest.mark.parametrize(
    ("method", "path", "value", "admitted"),
    [
        ("POST", "/v1/completions", b"key", True),
        ("GET", "/disagg/v1/stats", b"key", True),
        ("POST", "/v1/completions", b"kex", False),
        ("POST", "/v1/completions", b"", False),
        ("POST", "/v1/completions", None, False),
        ("GET", "/v1/models", None, False),
        ("GET", "/health", None, True),
        ("GET", "/metrics", None, True),
        ("POST", "/health", None, False),
        ("HEAD", "/metrics", None, False),
        ("GET", "/metrics/", None, False),
        ("GET", "/disagg/v1/health", None, False),
    ],
)
def test_who_is_admitted(method: str, path: str, value: bytes | None, admitted: bool) -> None:
    """Whoever has the key, and everyone on the two routes of scrapers."""
    headers = [(b"host", b"x")] + ([] if value is None else [(NAME, value)])
    assert EngineKey("key").admits(method, path, headers) is admitted
    assert EngineKey(None).admits(method, path, headers)
