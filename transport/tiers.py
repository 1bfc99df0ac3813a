# SPDX-License-Identifier: Apache-2.0
"""Settings of the tiers that keep KV beyond an engine's own memory: host memory, disk, and a shared LMCache."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from transport.config import Config, Name, Port, PositiveInt, Seconds, check_rdma, refusal

Gib = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A size in GiB; fractions are allowed, zero is not."""

Sink = Literal["off", "write_through", "evicted", "unused"]
"""What prefill engines store in the shared tier."""


class DiskConfig(Config):
    """A directory below the host memory of one node; vLLM's file-system tier."""

    path: Name
    """Directory, made when it is missing. A relative one is resolved against the working directory of whoever starts
    the application. Engines with the same model may share it, over a network file system too; not with a
    `prefix_caching_hash_algo` that each process seeds at random (xxhash). Nothing in it is ever removed: give it a
    quota or a job that deletes old files."""
    n_read_threads: PositiveInt = 4
    """Threads of one engine that read files."""
    n_write_threads: PositiveInt = 4
    """Threads of one engine that write files."""


class OffloadConfig(Config):
    """Host memory that keeps what falls out of an engine's own KV space; vLLM's OffloadingConnector on both pools."""

    cpu_gib: Gib
    """GiB of host memory of one engine: the total over all of its ranks, not a share of each. Every replica of both
    pools takes this much of its node."""
    eviction_policy: Literal["lru", "arc"] = "lru"
    """What leaves first when it is full. `arc` also weighs how often KV was used."""
    store_threshold: PositiveInt = 1
    """How often a prefix must have been seen before it is kept. 1 keeps everything; 2 spares the copy of prompts that
    never come again. Not with `disk`."""
    block_tokens: PositiveInt | None = None
    """Tokens moved as one piece: a multiple of the engine's KV block. Unset means one block."""
    disk: DiskConfig | None = None
    """A further tier on disk. Host memory is then a file of `cpu_gib` in /dev/shm, which must have room for that of all
    the node's engines; nothing of it is left when an engine ends."""

    @model_validator(mode="after")
    def _threshold(self) -> Self:
        if self.disk is not None and self.store_threshold > 1:
            raise refusal(
                "threshold_with_disk",
                f"{self.store_threshold} does not go with disk: the disk tier stores at first sight",
                field="store_threshold",
                allowed="1",
                action="remove it or disk",
            )
        return self


class FsL2Config(Config):
    """Files in a directory."""

    type: Literal["fs"]
    """Kind of storage."""
    path: Name
    """Directory, made when it is missing, resolved like `offload.disk.path`; on a shared file system all nodes' servers
    see the same KV."""


class RespL2Config(Config):
    """A server that speaks Redis's protocol."""

    type: Literal["resp"]
    """Kind of storage."""
    host: Name
    """Host of the server."""
    port: Port = 6379
    """Its port."""
    username: str = ""
    """User name; empty for none."""
    password_env: Name | None = None
    """Environment variable of the node that holds the password, so that neither a config file nor the process list
    shows it. LMCache takes one password for all servers of this type."""


class S3L2Config(Config):
    """A bucket of an S3-compatible object store."""

    type: Literal["s3"]
    """Kind of storage."""
    endpoint: Annotated[str, Field(pattern=r"^(s3://)?[^/\s]+$")]
    """Bucket and host, e.g. `s3://bucket.s3.eu-west-1.amazonaws.com`. The bucket is part of the host name; LMCache
    knows no other form. Credentials come from where boto3 finds them, and boto3 must be installed."""
    region: Name
    """Region of the bucket, e.g. `eu-west-1`; part of every signature."""
    tls: bool = True
    """False for a store of your own that speaks plain HTTP."""


class MooncakeStoreL2Config(Config):
    """A Mooncake store: memory of many nodes behind one master. Needs an LMCache built with it; its wheels are not."""

    type: Literal["mooncake_store"]
    """Kind of storage."""
    master_server_address: Name
    """`host:port` of the master."""
    metadata_server: Name
    """URL of the metadata server, or `P2PHANDSHAKE` for none."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Link of its transfer engine."""
    device_name: Name | None = None
    """RDMA device, required with `rdma`."""
    segment_gib: Gib = 1.0
    """GiB of its node's memory that each server adds to the store."""

    @model_validator(mode="after")
    def _device(self) -> Self:
        check_rdma(self.protocol, self.device_name)
        return self


L2Config = Annotated[FsL2Config | RespL2Config | S3L2Config | MooncakeStoreL2Config, Field(discriminator="type")]
"""Storage behind an LMCache server's memory; survives its restart."""


class ManagedServerConfig(Config):
    """One `lmcache server` per node with pool replicas, started and restarted by this application."""

    type: Literal["managed"] = "managed"
    """Who runs the server."""
    l1_gib: Gib = 1.0
    """GiB of host memory of one server, shared by all replicas of its node."""
    chunk_tokens: PositiveInt = 256
    """Tokens of one stored object: a multiple of the engines' KV block. KV that does not fill one is not stored."""
    # Not LMCache's IsolatedLRU: 0.5.6 asks it in L1 without the salt it needs, and its eviction thread ends by that.
    eviction_policy: Literal["LRU", "ARC", "noop"] = "LRU"
    """What leaves first when memory is full."""
    port: Port | None = None
    """Port for the engines. Unset: the kernel chooses; set it when a firewall must know it."""
    http_port: Port | None = None
    """Port for health, status and metrics of the server, on 127.0.0.1. Unset: the kernel chooses."""
    max_workers: PositiveInt = 4
    """Threads of one server that copy KV, and as many that look it up. LMCache's own default is 1."""
    l2: tuple[L2Config, ...] = ()
    """Storage behind its memory, asked in this order."""

    @model_validator(mode="after")
    def _ports(self) -> Self:
        if self.port is not None and self.port == self.http_port:
            raise refusal(
                "same_port",
                f"{self.http_port} is the port for the engines already",
                field="http_port",
                allowed="another port than server.port",
                action="change one of them, or leave both to the kernel",
            )
        return self


class ExternalServerConfig(Config):
    """An LMCache server that somebody else runs."""

    type: Literal["external"]
    """Who runs the server."""
    url: Name
    """`tcp://host:port` of the server's message queue, as every replica reaches it. On the same host as the replicas:
    engines and server share memory."""
    chunk_tokens: PositiveInt = 256
    """The server's own `--chunk-size`; another one is refused at start."""
    http_url: Annotated[str, Field(pattern=r"^http://[^/\s]+:\d+$")] | None = None
    """`http://host:port` of the server's HTTP port. With it a server of another LMCache version is refused at start,
    and `disagg status` knows where the server's own metrics are."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            whole = bool(parts.hostname and parts.port) and value == f"tcp://{parts.netloc}" and "@" not in value
        except ValueError:
            whole = False
        if not whole or any(character.isspace() for character in value):
            raise refusal(
                "server_url",
                f"{value!r} is not the address of a message queue",
                field="",
                allowed="tcp://host:port with a port of 1 to 65535",
                action="give the server's --host and --port",
            )
        return value


ServerConfig = Annotated[ManagedServerConfig | ExternalServerConfig, Field(discriminator="type")]
"""Where the shared tier is."""


class SharedCacheConfig(Config):
    """The tier that all replicas share: LMCache servers, which outlive engines."""

    type: Literal["lmcache"] = "lmcache"
    """What the tier is made of."""
    sink: Sink = "unused"
    """What prefill engines store. `unused`: only KV whose hand-off no decode engine consumed. `evicted`: what is about
    to leave the engine's own memory. `write_through`: every prompt. `off`: nothing, the tier is only read."""
    server: ServerConfig = ManagedServerConfig()
    """Where the tier is."""
    mq_timeout_s: Seconds = 10.0
    """Seconds an engine waits for the server's answer before it goes on without; LMCache's own default of 300 would
    stall an engine as long. Less than half of `hang_after_s` of either pool, which follows it unless set. A copy that
    is under way may take ten times as long on cuda, where the server does it and cannot be stopped."""
    heartbeat_interval_s: Seconds = 3.0
    """Seconds between two heartbeats of an engine; bounds how long a dead or a returned server stays unnoticed."""
