# SPDX-License-Identifier: Apache-2.0
"""What `import disagg` offers and what it loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import disagg

_HEAVY = ("ray", "vllm", "torch", "fastapi", "starlette", "transformers", "numpy", "psutil", "msgspec")


def test_every_exported_name_exists() -> None:
    """`__all__`, the lazy table and `dir()` agree."""
    for name in disagg.__all__:
        assert getattr(disagg, name) is not None
    assert set(disagg.__all__) == {*disagg._HOMES, "__version__"}
    assert set(disagg.__all__) <= set(dir(disagg))


def test_unknown_name() -> None:
    """A name that does not exist is an AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="nonsense"):
        disagg.nonsense  # noqa: B018


def test_import_weight() -> None:
    """The SDK loads httpx, pydantic and asyncio when a client is made, and the commands load no serving stack."""
    code = (
        "import sys, disagg; disagg.Client, disagg.AsyncClient; import disagg.cli.main; "
        "early = {'asyncio', 'httpx', 'pydantic'} & set(sys.modules); assert not early, early; "
        "disagg.AsyncClient(); assert 'httpx' in sys.modules; "
        f"loaded = set({_HEAVY!r}) & set(sys.modules); assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
