# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode in separate pools, on Ray Serve and vLLM.

`Client`, `AsyncClient` and the errors load when they are first used, so `import disagg` costs nothing and never
loads Ray, vLLM or torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disagg.errors import (
        APIConnectionError,
        APIResponseError,
        APIStatusError,
        APITimeoutError,
        ClientError,
        ConfigError,
        DisaggError,
        ScaleTimeoutError,
    )
    from disagg.sdk.client import AsyncClient, Client

__version__ = "0.1.0"

_HOMES = {
    "APIConnectionError": "disagg.errors",
    "APIResponseError": "disagg.errors",
    "APIStatusError": "disagg.errors",
    "APITimeoutError": "disagg.errors",
    "AsyncClient": "disagg.sdk.client",
    "Client": "disagg.sdk.client",
    "ClientError": "disagg.errors",
    "ConfigError": "disagg.errors",
    "DisaggError": "disagg.errors",
    "ScaleTimeoutError": "disagg.errors",
}

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "Client",
    "ClientError",
    "ConfigError",
    "DisaggError",
    "ScaleTimeoutError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
