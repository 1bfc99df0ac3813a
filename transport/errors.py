# SPDX-License-Identifier: Apache-2.0
"""Root of the error tree, and the errors of moving KV. The whole tree is drawn in `disagg.errors`."""

from __future__ import annotations


class DisaggError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(DisaggError):
    """A configuration cannot work. Fix the field at `path` and start again.

    Attributes:
        path: dotted path of the field, as written in the YAML file, or None when no single field is at fault.
    """

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (_config_error, (str(self), self.path))


def _config_error(message: str, path: str | None) -> ConfigError:
    return ConfigError(message, path=path)


class TransportError(DisaggError):
    """KV could not be moved. Prefill again, on this engine or another."""


class UpstreamChangedError(DisaggError):
    """A package that we rely on is not the one this version is made for. Install the tested one, or adapt the code."""
