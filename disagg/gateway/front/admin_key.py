# SPDX-License-Identifier: Apache-2.0
"""The admin key in a file."""

from __future__ import annotations

import hmac
from pathlib import Path

from disagg.errors import AuthenticationError, PermissionDeniedError


class AdminKey:
    """The key that `gateway.admin.key_file` holds, read at each use so that it can be replaced without a restart."""

    def __init__(self, key_file: str | None) -> None:
        self._path = Path(key_file) if key_file else None

    def check(self, authorization: bytes | None) -> None:
        """Blocks on the file.

        Args:
            authorization: the request's header of that name.

        Raises:
            PermissionDeniedError: there is no key to match.
            AuthenticationError: the header does not match the key.
        """
        if self._path is None:
            raise PermissionDeniedError("the admin API is off; set gateway.admin.key_file in the application's args")
        try:
            key = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
            raise PermissionDeniedError(
                f"the admin key file cannot be read ({reason}); write a key to gateway.admin.key_file"
            ) from exc
        if not key:
            raise PermissionDeniedError("the admin key file is empty; write a key to gateway.admin.key_file")
        scheme, _, given = (authorization or b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise AuthenticationError("missing or wrong admin key; send it as 'Authorization: Bearer <key>'")
