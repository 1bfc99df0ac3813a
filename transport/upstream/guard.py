# SPDX-License-Identifier: Apache-2.0
"""The check at start: the names that a room of ours borrows exist and look as they did when they were tested."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import metadata

from transport.errors import UpstreamChangedError
from transport.upstream import loaded
from transport.upstream.compare import problem
from transport.upstream.names import DISTRIBUTIONS, OPTIONAL, TESTED, Borrowed


def require(names: Iterable[Borrowed], user: str) -> None:
    """Check what `user`, a module or a package of ours, borrows. Imports the modules that hold these names.

    Raises:
        UpstreamChangedError: some expectations do not hold. The message names all of them.
    """
    wrong = []
    for name in of_user(names, user):
        if name.package in OPTIONAL and importlib.util.find_spec(name.package) is None:
            continue
        fault = problem(name, loaded.find(name.name, with_source=bool(name.holds or name.body)))
        if fault is not None:
            wrong.append(f"{name.name} of {_version(name.package)} {fault}")
    if wrong:
        raise UpstreamChangedError(
            f"{user} does not fit what is installed: {'; '.join(wrong)}. Install the tested version (make setup), or "
            f"read the new code, adapt {user}, and then its entry in transport/in_engine/patches/borrowed.py or "
            "pools/borrowed.py; make check-upstream lists every such name of the newest releases"
        )


def of_user(names: Iterable[Borrowed], user: str) -> list[Borrowed]:
    """The entries that `user` uses: a module, or a package with all its modules."""
    return [name for name in names if any(f"{module}.".startswith(f"{user}.") for module in name.used_in)]


def _version(package: str) -> str:
    for distribution in DISTRIBUTIONS[package]:
        try:
            installed = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return f"{distribution} {installed} (tested: {TESTED[package]})"
    return f"{package} (tested: {TESTED[package]})"
