# SPDX-License-Identifier: Apache-2.0
"""The key of an engine's private HTTP: the server answers only who sends it. Gateways get it with the replica list."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from pools.client.routes import ENGINE_KEY_HEADER
from transport.errors import ConfigError

_NAME = ENGINE_KEY_HEADER.encode()
_OPEN = frozenset(("/health", "/metrics"))
"""Routes that scrapers and operators may ask without the key."""


def make_key(file: str | None) -> str:
    """The key in `file`, or a random key without a file. Blocks. Raises ConfigError when `file` gives no key."""
    if file is None:
        return secrets.token_urlsafe(32)
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not ASCII text"
        raise ConfigError(f"engine_key_file {file!r} cannot be read: {reason}", path="engine_key_file") from None
    if not usable_key(key):
        raise ConfigError(f"engine_key_file {file!r} must hold one key without spaces", path="engine_key_file")
    return key


def usable_key(text: str) -> bool:
    """Whether there is one key in `text`, around which white space may be."""
    key = text.strip()
    return bool(key) and all("!" <= character <= "~" for character in key)


class EngineKey:
    """Decides who may ask an engine. Pure."""

    def __init__(self, key: str | None) -> None:
        """With `key` None everyone may ask, as tests of a single engine need."""
        self._key = None if key is None else key.encode("ascii")

    def admits(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether to answer an HTTP request."""
        return (method == "GET" and path in _OPEN) or self.is_with(headers)

    def is_with(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether whoever sent these headers has the key."""
        if self._key is None:
            return True
        return any(name == _NAME and hmac.compare_digest(value, self._key) for name, value in headers)
