# SPDX-License-Identifier: Apache-2.0
"""How many file descriptors a replica's process, its engine and a cache server may have.

Ray's workers start with the shell's limit, often 1024. When no descriptor is left for an incoming connection, UCX stops
listening for good, and the engine's other ports keep callers waiting.
"""

from __future__ import annotations

import errno
import resource

OWN_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
"""Errors of a connection that fails because this side has run out of something. They say nothing of the other side."""
_ENOUGH = 65_535
"""What vLLM's own server asks for."""


def wanted(soft: int, hard: int) -> int:
    """The soft limit to set: as much as is allowed, up to 65,535; never less than it is. Pure."""
    infinite = resource.RLIM_INFINITY
    if soft == infinite or soft >= _ENOUGH:
        return soft
    return _ENOUGH if hard == infinite else max(soft, min(hard, _ENOUGH))


def raise_limit() -> None:
    """Raise the limit of this process and of those that it starts from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted(soft, hard), hard))
