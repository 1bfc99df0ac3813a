# SPDX-License-Identifier: Apache-2.0
"""What vLLM's code raises, as verdicts say it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

Error = dict[str, Any]
"""Fields of a `Verdict` but for its pool and its argument."""


def raised(exc: Exception) -> Error:
    """The verdict of code that refuses by raising."""
    return {"kind": "raised", "message": said(exc)}


def said(exc: Exception) -> str:
    """What an exception says, in one line."""
    if isinstance(exc, ValidationError):
        errors = exc.errors(include_url=False)
        text = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in errors)
    else:
        text = str(exc)
    if not text or isinstance(exc, KeyError):
        text = f"{type(exc).__name__} {text}"
    return " ".join(text.replace("Value error, ", "").split())
