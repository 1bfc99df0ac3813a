# SPDX-License-Identifier: Apache-2.0
"""What the config check asks the process that has vLLM imported, and what that answers. Both cross as JSON. Pure.

`pools.judge` is that process, `disagg.advice.values` asks.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pools.config import Platform


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolArguments(_Message):
    """The arguments of one pool's engines."""

    given: dict[str, Any]
    """What the config says: the model's arguments and the pool's own."""
    added: dict[str, Any]
    """What the framework sets beside them."""


class Question(_Message):
    """Everything that one check wants to know."""

    platform: Platform
    """What the engines compute on."""
    is_local: bool
    """Whether the model and all that belongs to it are directories of this machine."""
    pools: dict[str, PoolArguments]
    """By the pool's name."""


class Verdict(_Message):
    """One thing that vLLM does not take."""

    pool: str
    """Whose engines."""
    argument: str | None
    """Its name; None when no single argument is at fault."""
    loc: tuple[int | str, ...] = ()
    """Where in its value. Pydantic adds which of several types it tried."""
    kind: str
    """Pydantic's type of an error, or one of ours. `name`: vLLM's registry has no such name. `raised`: vLLM's code
    refuses it. `absent`: there is no such file. `not_importable`: there is no such module here."""
    message: str
    """vLLM's or pydantic's own words."""
    ctx: dict[str, Any] = Field(default_factory=dict)
    """Pydantic's context. Besides `what` and `names`: of what kind the name is, and which there are; `written`: the
    whole number that vLLM's command line makes of such text."""


class Answer(_Message):
    """What vLLM says."""

    verdicts: tuple[Verdict, ...]
    unjudged: tuple[str, ...]
    """What could not be judged, each with its reason, in words."""
