# SPDX-License-Identifier: Apache-2.0
"""How many file descriptors a replica's process, its engine and a cache server may have.

Ray's workers start with the shell's limit, often 1024. UCX stops listening for good when it has none left for a
connection that comes in, and the engine's other ports keep everybody waiting meanwhile.
"""

from __future__ import annotations

import errno
import resource

OWN_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
"""Of a connection that fails because this process has run out of something, which says nothing of the other side."""
_ENOUGH = 65_535
"""What vLLM's own server asks for."""


def wanted(soft: int, hard: int) -> int:
    """The soft limit to set: as much as is allowed, up to 65,535; never less than it is. Pure."""
    infinite = resource.RLIM_INFINITY
    if soft == infinite or soft >= _ENOUGH:
        return soft
    return _ENOUGH if hard == infinite else max(soft, min(hard, _ENOUGH))


def raise_limit() -> None:
    """For this process and those that it starts from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted(soft, hard), hard))
