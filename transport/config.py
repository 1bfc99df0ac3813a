# SPDX-License-Identifier: Apache-2.0
"""Settings of KV transport, and the base class and field types that every config model shares.

A config model is frozen and refuses unknown keys; each field says its unit and why the default is what it
is. Nothing here reads the environment or a file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Base of every config model: frozen, unknown keys refused, docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A duration in seconds; fractions are allowed, zero is not."""
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(min_length=1)]


class NixlConfig(Config):
    """KV over NIXL: a decode engine reads the blocks out of the prefill engine's memory."""

    type: Literal["nixl"] = "nixl"
    """Which connector moves KV."""
    backends: Annotated[tuple[Name, ...], Field(min_length=1)] = ("UCX",)
    """NIXL plugins to try, in order. UCX picks the fastest link it finds (RDMA, NVLink, shared memory, TCP)."""
    kv_lease_duration_s: Annotated[int, Field(ge=6)] = 30
    """Seconds a prefill engine keeps KV for a decode engine that has not asked for it. Both pools get the same
    value. Below 6 the heartbeat period, a sixth of it in whole seconds, would be zero; raise it when requests wait
    long between the two legs."""
    side_channel_host: Name | None = None
    """Address on which a prefill engine answers NIXL handshakes. Unset means the address of the replica's node;
    set it when engines reach each other over another network than Ray does. It applies to every replica, so with
    more than one node it must be a name that each node resolves to itself."""


TransportConfig = NixlConfig
"""How KV moves between the pools."""
