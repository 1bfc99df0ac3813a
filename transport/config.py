# SPDX-License-Identifier: Apache-2.0
"""Settings of KV transport, and the base class and field types that every config model shares.

A config model is frozen and refuses unknown keys; each field says its unit and why the default is what it
is. Nothing here reads the environment or a file.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """Base of every config model: frozen, unknown keys refused, docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def refusal(kind: str, message: str, *, field: str, allowed: str, action: str) -> PydanticCustomError:
    """The error of a check over several fields. `field` is the one to change, below the model that raises it."""
    context = {"text": message, "field": field, "allowed": allowed, "action": action}
    return PydanticCustomError(kind, "{text}", context)


def check_rdma(protocol: str, device_name: str | None) -> None:
    """Raise when an RDMA device is missing, or named for a link that has none."""
    if protocol == "rdma" and device_name is None:
        message = "is missing: with protocol rdma it says which device to use"
        action = "name one that `ibv_devices` lists, or set protocol: tcp"
        raise refusal("rdma_device", message, field="device_name", allowed="e.g. mlx5_0", action=action)
    if protocol == "tcp" and device_name is not None:
        message = f"{device_name!r} has no effect with protocol tcp"
        raise refusal(
            "rdma_device", message, field="device_name", allowed="null", action="remove it or set protocol: rdma"
        )


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A duration in seconds; fractions are allowed, zero is not."""
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(min_length=1)]


class NixlConfig(Config):
    """KV over NIXL, between the memories of a prefill and a decode engine."""

    type: Literal["nixl"] = "nixl"
    """Which connector moves KV."""
    mode: Literal["pull", "push"] = "pull"
    """Who moves it. `pull`: the decode engine reads, after the prefill leg. `push`: the prefill engine writes, and both
    legs are sent at once."""
    backends: Annotated[tuple[Name, ...], Field(min_length=1)] = ("UCX",)
    """NIXL plugins to try, in order. UCX picks the fastest link it finds (RDMA, NVLink, shared memory, TCP)."""
    kv_lease_duration_s: Annotated[int, Field(ge=6)] = 30
    """Seconds a prefill engine keeps KV for a decode engine that has not asked for it, and in push mode that a decode
    engine waits for KV. Both pools get the same value. Below 6 the heartbeat period, a sixth of it in whole seconds,
    would be zero; raise it when requests wait long between the two legs."""
    side_channel_host: Name | None = None
    """Address on which an engine answers NIXL handshakes. Unset means the address of the replica's node;
    set it when engines reach each other over another network than Ray does. It applies to every replica, so with
    more than one node it must be a name that each node resolves to itself."""


class MooncakeConfig(Config):
    """KV over Mooncake: a prefill engine writes the blocks into the decode engine's memory, both legs at once."""

    type: Literal["mooncake"]
    """Which connector moves KV."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Link that Mooncake's transfer engine uses. `rdma` needs `device_name`."""
    device_name: Name | None = None
    """RDMA device or devices, comma-separated, e.g. `mlx5_0`. Only for `rdma`, and required there."""
    num_workers: PositiveInt = 4
    """Threads of one engine that send KV. vLLM's own default is 10, made for a machine with many cores."""
    kv_lease_duration_s: Annotated[int, Field(ge=6)] = 30
    """Seconds a prefill engine keeps KV that no decode engine has asked for, and that a decode engine waits for KV.
    vLLM's own default is 480."""
    connector_timeout_s: PositiveInt = 10
    """Seconds that one request to a prefill engine's bootstrap server may take. vLLM's own default is 30. A dead
    prefill process is noticed sooner, because its port refuses connections."""

    @model_validator(mode="after")
    def _device(self) -> Self:
        check_rdma(self.protocol, self.device_name)
        return self


TransportConfig = Annotated[NixlConfig | MooncakeConfig, Field(discriminator="type")]
"""How KV moves between the pools."""
