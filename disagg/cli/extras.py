# SPDX-License-Identifier: Apache-2.0
"""Says which packages a command lacks, before it imports any of them.

The base install has httpx, pydantic and PyYAML. A command that needs more asks here first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from disagg.errors import ConfigError


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def require(command: str, packages: Sequence[str], installed: Callable[[str], bool] = _is_installed) -> None:
    """Raises `ConfigError` that names the packages which are not installed, and how to install them."""
    missing = [package for package in packages if not installed(package)]
    if missing:
        raise ConfigError(
            f"{command} needs {', '.join(missing)}, which the base install leaves out; "
            "install disagg[cpu] or disagg[gpu]"
        )
