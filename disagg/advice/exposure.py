# SPDX-License-Identifier: Apache-2.0
"""Whether an application would serve strangers: where it listens, and whether it asks for keys. Pure."""

from __future__ import annotations

import ipaddress

from disagg.config import GatewayConfig

DEFAULT_HOST = "0.0.0.0"
"""What `serve run` binds when a file names no host. Source: Ray Serve 2.60 `HTTPOptionsSchema.host`."""

ALLOWED = "127.0.0.1, or keys: gateway.api_keys"
ACTION = "set gateway.api_keys, listen on 127.0.0.1, or write gateway.allow_anonymous: true when everyone may send"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name that is not `localhost` counts as reachable from elsewhere."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.localdomain", "ip6-localhost")


def strangers_served(gateway: GatewayConfig, host: str | None) -> str | None:
    """What is wrong with serving on `host`; None when nothing is.

    Args:
        host: None when nobody can reach it over HTTP.
    """
    if host is None or gateway.api_keys is not None or gateway.allow_anonymous or is_loopback(host):
        return None
    return f"{host!r} can be reached from other machines, and anyone there could send requests without a key"
