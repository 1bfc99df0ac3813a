# SPDX-License-Identifier: Apache-2.0
"""`disagg check` about keys: who could ask, and what the files and variables hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.disagg.advice.test_check import A, args, base, check, top

__all__ = ["base"]

KEYS = "alice:alice-0123456789abcdef\n"
EXPOSED: dict[str, Any] = {
    "all interfaces": top(http_options={"host": "0.0.0.0"}),
    "another address": top(http_options={"host": "10.1.2.3"}),
    "no host, which Serve takes for all": top(http_options={"port": 8000}),
    "no options at all": lambda data: data.pop("http_options"),
}


@pytest.mark.parametrize("name", EXPOSED)
def test_no_strangers(name: str, base: dict[str, Any], tmp_path: Path) -> None:
    """An address that others reach is refused without keys; with keys or the word for none it is fine."""
    EXPOSED[name](base)
    report = check(base, tmp_path)
    [problem] = report.problems
    assert problem.path == f"{A}.gateway.api_keys" and not report.ok
    assert "127.0.0.1" in str(problem.allowed) and "allow_anonymous" in str(problem.action)
    (tmp_path / "keys").write_text(KEYS)
    args(gateway__api_keys={"type": "file", "path": "keys"})(base)
    assert check(base, tmp_path).problems == ()
    args(gateway={"admin": {"key_file": "key"}, "allow_anonymous": True})(base)
    assert check(base, tmp_path).problems == ()


def test_nobody_listens(base: dict[str, Any], tmp_path: Path) -> None:
    """Without a proxy there is no address to reach."""
    top(http_options={"host": "0.0.0.0"}, proxy_location="Disabled")(base)
    assert check(base, tmp_path).ok


FILE, ENV = {"type": "file", "path": "keys"}, {"type": "env", "variable": "API_KEYS"}


@pytest.mark.parametrize(
    ("fields", "field", "words", "severity"),
    [
        ({"gateway__api_keys": {**FILE, "path": "none"}}, "gateway.api_keys.path", "No such file", "warning"),
        ({"gateway__api_keys": {**FILE, "path": "broken"}}, "gateway.api_keys.path", "line 1 is not", "error"),
        ({"gateway__api_keys": {**FILE, "path": "binary"}}, "gateway.api_keys.path", "not UTF-8", "error"),
        ({"gateway__api_keys": ENV}, "gateway.api_keys.variable", "API_KEYS is not set", "warning"),
        ({"gateway__api_keys": {**ENV, "variable": "BROKEN"}}, "gateway.api_keys.variable", "line 1 is not", "error"),
        ({"gateway__api_keys": {"type": "vault"}}, "gateway.api_keys.type", "'vault' is not possible", "error"),
        (
            {"gateway__api_keys": FILE, "gateway__allow_anonymous": True},
            "gateway.allow_anonymous",
            "need a key",
            "error",
        ),
        ({"gateway__salt_secret_file": "secret"}, "gateway.salt_secret_file", "no effect", "error"),
        (
            {"gateway__api_keys": FILE, "gateway__salt_secret_file": "secret", "gateway__cache_salt": "shared"},
            "gateway.salt_secret_file",
            "no effect",
            "error",
        ),
        (
            {"gateway__api_keys": FILE, "gateway__salt_secret_file": "broken"},
            "gateway.salt_secret_file",
            "too short",
            "error",
        ),
        (
            {"gateway__api_keys": FILE, "gateway__salt_secret_file": "none"},
            "gateway.salt_secret_file",
            "No such file",
            "warning",
        ),
        ({"engine_key_file": "none"}, "engine_key_file", "No such file", "warning"),
        ({"engine_key_file": "empty"}, "engine_key_file", "holds no key", "error"),
        ({"gateway__cache_salt": "own"}, "gateway.cache_salt", "'tenant' or 'shared'", "error"),
        ({"gateway__max_stream_s": 0}, "gateway.max_stream_s", "too small", "error"),
    ],
)
def test_keys(
    fields: dict[str, Any], field: str, words: str, severity: str, base: dict[str, Any], tmp_path: Path
) -> None:
    """What is wrong is an error, what may be elsewhere a warning; no message has anything of a file."""
    (tmp_path / "keys").write_text(KEYS)
    (tmp_path / "broken").write_text("no-colon\n")
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "secret").write_text("0123456789abcdef")
    args(**fields)(base)
    report = check(base, tmp_path, environment={"BROKEN": "no-colon"})
    [problem] = report.problems
    assert (problem.path, problem.severity) == (f"{A}.{field}", severity)
    assert words in str(problem) and "no-colon" not in str(problem)


def test_paths_become_absolute(base: dict[str, Any], tmp_path: Path) -> None:
    """Replicas with other working directories find the files."""
    (tmp_path / "keys").write_text(KEYS)
    (tmp_path / "secret").write_text("0123456789abcdef")
    args(gateway__api_keys=FILE, gateway__salt_secret_file="secret", engine_key_file="key")(base)
    report = check(base, tmp_path)
    assert report.problems == () and report.config is not None
    keys = report.config.gateway.api_keys
    assert keys is not None and keys.type == "file" and keys.path == str(tmp_path / "keys")
    assert report.config.gateway.salt_secret_file == str(tmp_path / "secret")
    assert report.config.engine_key_file == str(tmp_path / "key")
