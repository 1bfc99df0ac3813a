# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM's arguments, read from source."""

from __future__ import annotations

from pools.plan.engine_kwargs import field_names, unknown_engine_kwargs

SOURCE = """
@dataclass
class EngineArgs:
    model: str = "x"
    _private: int = 0
    plain = 3

class Other:
    hidden: int = 0
"""


def test_field_names() -> None:
    """Public annotated fields of the named classes count, nothing else."""
    assert field_names(SOURCE, ["EngineArgs"]) == {"model"}


def test_all_known() -> None:
    """Known names give no message."""
    assert unknown_engine_kwargs(["seed"], {"seed", "dtype"}) is None


def test_unknown_with_guess() -> None:
    """A misspelt name comes with the nearest one; dashes count as underscores."""
    message = unknown_engine_kwargs(["max-model-len", "zzz"], {"max_model_len", "dtype"})
    assert message == "vLLM has no argument 'max-model-len' (did you mean 'max_model_len'?), 'zzz'"
