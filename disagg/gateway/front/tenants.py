# SPDX-License-Identifier: Apache-2.0
"""A client's name, and the `cache_salt` that keeps its KV apart from that of others in every tier. Pure.

vLLM puts the salt into the hash of a prompt's first block, and with it into the key of every later one; host memory and
disk use these hashes, and LMCache has the salt in its keys. Source: vLLM 0.32 `generate_block_hash_extra_keys`,
LMCache 0.5.6 `ObjectKey`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from disagg.errors import InvalidRequestError

FIELD = "cache_salt"
SCOPE_KEY = "disagg.tenant"
"""Key of an ASGI scope that holds the request's `Tenant`. Absent where clients need no key."""
_SALT_CHARACTERS = 32
"""In base64url: 192 bits, and no character that LMCache refuses."""
_encode_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Tenant:
    """Who a key belongs to."""

    name: str
    cache_salt: str | None = None
    """Salt of all its requests; None when tenants share KV."""


def salt_of(secret: bytes, name: str) -> str:
    """The salt of a tenant: the same for the same secret, after any restart, and of no use to guess the secret."""
    return _text(hmac.digest(secret, name.encode(), "sha256"))


def mixed(tenant_salt: str, client_salt: str) -> str:
    """The salt of a request whose client sends a salt. It divides the tenant's KV, and reaches no other tenant's."""
    return _text(hashlib.sha256(f"{tenant_salt}\0{client_salt}".encode("utf-8", "surrogatepass")).digest())


def salted(body: dict[str, Any], raw: bytes, tenant: Tenant) -> bytes:
    """Put the tenant's salt into `body`; returns the body's bytes with it.

    The client's bytes are kept as they are where it sent no salt: the field goes in front of them.

    Args:
        raw: a JSON object that is not empty, from which `body` was decoded.

    Raises:
        InvalidRequestError: the client's own salt is none that vLLM takes.
    """
    if tenant.cache_salt is None:
        return raw
    if FIELD not in body:
        body[FIELD] = tenant.cache_salt
        # Only white space can come before the brace. A base64url salt needs no escapes.
        brace = raw.index(b"{") + 1
        return b'%b"%b":"%b",%b' % (raw[:brace], FIELD.encode(), tenant.cache_salt.encode(), raw[brace:])
    given = body[FIELD]
    if given is not None and (not isinstance(given, str) or not given):
        raise InvalidRequestError(f"{FIELD} must be a non-empty string", param=FIELD)
    body[FIELD] = tenant.cache_salt if given is None else mixed(tenant.cache_salt, given)
    # Encode the body again: if it had two fields of this name, the client's would win.
    return _encode_json(body)


def check_media_ids(body: Mapping[str, Any], tenant: Tenant) -> None:
    """Raises InvalidRequestError when a message names its media by an id of the client's own.

    vLLM 0.32 takes a content part's `uuid` as the key of its processor and encoder caches, without any salt: it would
    find what another tenant sent under that id, or put something else in its place.
    """
    if tenant.cache_salt is None or not isinstance(messages := body.get("messages"), list):
        return
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and part.get("uuid") is not None:
                param = f"messages[{i}].content[{j}].uuid"
                raise InvalidRequestError(f"{param} is not taken: media are known by their content here", param=param)


def _text(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest)[:_SALT_CHARACTERS].decode("ascii")
