# SPDX-License-Identifier: Apache-2.0
"""API keys of clients: read from a file that may change while the gateway runs, or from the environment.

Keys are kept as digests. None of them is in a log, an error or a representation of an object.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from disagg.config import ApiKeysConfig, FileKeysConfig, GatewayConfig
from disagg.errors import AuthenticationError
from disagg.gateway.front.tenants import Tenant, salt_of
from disagg.key_lines import MIN_KEY_CHARACTERS, parse
from transport.errors import ConfigError

logger = logging.getLogger(__name__)

_LOOK_S = 1.0

Table = Mapping[bytes, tuple[bytes, Tenant]]
"""Digest of a key to the same digest and the tenant."""


class ApiKeys:
    """The keys that are valid at the moment."""

    def __init__(
        self,
        config: ApiKeysConfig,
        tenant_of: Callable[[str, str], Tenant],
        *,
        environment: Mapping[str, str],
        on_reload: Callable[[bool], None] = lambda ok: None,
    ) -> None:
        """Read the keys once; blocks on the file.

        Args:
            tenant_of: the tenant of a name and a key.
            environment: where the variable of `type: env` is looked for.
            on_reload: called at each change of the file, with whether the gateway took the new keys over.

        Raises:
            ConfigError: there are no keys, or they cannot be read.
        """
        self._config = config
        self._tenant_of = tenant_of
        self._environment = environment
        self._on_reload = on_reload
        # What a client sends is hashed with bytes that the client does not know. A look-up in a dict compares digests,
        # so its time then says nothing about any key.
        self._pepper = secrets.token_bytes(32)
        self._seen = self._mark()
        self._unread: tuple[object, str] | None = None
        """Mark of a file that could not be read, and why, as the log said it last."""
        try:
            self._table = self._read()
        except (OSError, ValueError) as exc:
            raise ConfigError(f"gateway.api_keys: {_reason(exc)}", path="gateway.api_keys") from None

    def tenant(self, authorization: bytes | None) -> Tenant:
        """The tenant whose key an `Authorization` header holds. Raises AuthenticationError, which does not tell why."""
        scheme, _, given = (authorization or b"").partition(b" ")
        if scheme.lower() == b"bearer":
            digest = self._digest(given.strip())
            known = self._table.get(digest)
            if known is not None and hmac.compare_digest(known[0], digest):
                return known[1]
        raise AuthenticationError("missing or wrong API key; send it as 'Authorization: Bearer <key>'")

    async def watch(self) -> None:
        """Run forever: take over the file when it has changed. While it cannot be read, the keys stay as they are."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Look once whether the file has changed, and read it then. Blocks. Does nothing for keys in the environment.

        A file that cannot be read is tried again with every look, because it may become readable without a change.
        """
        mark = self._mark()
        if mark == self._seen:
            self._unread = None
            return
        try:
            self._table = self._read()
        except OSError as exc:
            unread = (mark, _reason(exc))
            if unread != self._unread:
                self._unread = unread
                self._unusable(exc)
            return
        except ValueError as exc:
            self._unusable(exc)
        else:
            logger.info("API keys taken over from the changed file: %d", len(self._table))
            self._on_reload(True)
        self._seen, self._unread = mark, None

    def _unusable(self, error: OSError | ValueError) -> None:
        logger.error("the file of API keys has changed and cannot be used, the old keys stay: %s", _reason(error))
        self._on_reload(False)

    def _mark(self) -> tuple[int, ...] | None:
        """A value that changes with the file of keys; None for keys in the environment."""
        if not isinstance(self._config, FileKeysConfig):
            return None
        try:
            found = Path(self._config.path).stat()
        except OSError:
            return ()
        # The ctime changes also with a mode alone, or with new content of the same size when the mtime was set back.
        return found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns, found.st_size

    def _read(self) -> Table:
        if isinstance(self._config, FileKeysConfig):
            text = Path(self._config.path).read_text(encoding="utf-8")
        elif self._config.variable in self._environment:
            text = self._environment[self._config.variable]
        else:
            raise ValueError(f"the environment variable {self._config.variable} is not set for the gateway")
        return self._digested(parse(text))

    def _digested(self, keys: Iterable[tuple[str, str]]) -> Table:
        digests = ((self._digest(key.encode()), self._tenant_of(name, key)) for name, key in keys)
        return {digest: (digest, tenant) for digest, tenant in digests}

    def _digest(self, key: bytes) -> bytes:
        return hashlib.sha256(self._pepper + key).digest()


def keys_of(config: GatewayConfig, environment: Mapping[str, str], on_reload: Callable[[bool], None]) -> ApiKeys | None:
    """The keys that the configuration names, with each tenant's salt; None when clients need none. Blocks on files.

    Raises:
        ConfigError: keys or the secret of the salts cannot be read.
    """
    if config.api_keys is None:
        return None
    secret = _salt_secret(config.salt_secret_file)

    def tenant_of(name: str, key: str) -> Tenant:
        return Tenant(name, salt_of(secret or key.encode(), name) if config.cache_salt == "tenant" else None)

    return ApiKeys(config.api_keys, tenant_of, environment=environment, on_reload=on_reload)


def _salt_secret(file: str | None) -> bytes | None:
    if file is None:
        return None
    try:
        secret = Path(file).read_bytes().strip()
    except OSError as exc:
        raise ConfigError(
            f"gateway.salt_secret_file cannot be read: {_reason(exc)}", path="gateway.salt_secret_file"
        ) from None
    if len(secret) < MIN_KEY_CHARACTERS:
        raise ConfigError(
            f"gateway.salt_secret_file holds fewer than {MIN_KEY_CHARACTERS} bytes", path="gateway.salt_secret_file"
        )
    return secret


def _reason(error: OSError | ValueError) -> str:
    """What went wrong, without any content of the file."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
