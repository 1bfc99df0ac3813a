# SPDX-License-Identifier: Apache-2.0
"""What the renderer makes of requests that vLLM's code cannot read, without vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from disagg.errors import InvalidRequestError
from disagg.gateway.front.aside import Aside
from disagg.gateway.front.render import VllmRenderer


class Model:
    """Validates nothing; reading it ends in `error`."""

    error: Exception

    @classmethod
    def model_validate(cls, body: dict[str, Any]) -> None:
        raise cls.error


@pytest.fixture
def renderer() -> VllmRenderer:
    made = VllmRenderer.__new__(VllmRenderer)
    made._models = {"chat": Model, "completions": Model}
    made._aside = Aside("renderer", max_at_once=1)
    return made


@pytest.mark.parametrize("num_bytes", [10, 10**6], ids=["in the loop", "aside"])
async def test_a_request_too_deep_to_be_read_is_refused(renderer: VllmRenderer, num_bytes: int) -> None:
    """No engine gets it, for it would fail there, too; whatever else vLLM says is left to an engine to say."""
    Model.error = RecursionError("maximum recursion depth exceeded")
    with pytest.raises(InvalidRequestError, match="nested too deep"):
        await renderer.prompts("chat", {}, num_bytes)
    Model.error = ValueError("no good")
    assert await renderer.prompts("chat", {}, num_bytes) is None
