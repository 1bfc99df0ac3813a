# SPDX-License-Identifier: Apache-2.0
"""Command line, environment and shared-memory names of an `lmcache server`, from its settings. Pure.

Source: LMCache 0.5.6, `lmcache server --help` and `lmcache/v1/distributed/l2_adapters/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, assert_never

from transport.tiers import FsL2Config, L2Config, ManagedServerConfig, MooncakeStoreL2Config, RespL2Config, S3L2Config

REAP_TIMEOUT_S = 120
"""Seconds of silence after which the server forgets an engine that has sent heartbeats. An engine sends one every few
seconds, so a silent engine is dead; until it is forgotten the server holds on to its GPU memory. The server must never
forget a live engine: the engine would not register again, and its next load would hang (LMCache#4715)."""
REGISTRATION_GRACE_S = 10 * 365 * 24 * 3600
"""The same for an engine that has not sent a heartbeat yet. An engine sends the first one with its first request, so it
is ten years: the server keeps an engine that waits for its first request."""

HTTP_HOST = "127.0.0.1"
"""Where the HTTP API listens, on every node. The API asks for no key, and `GET /env` prints the server's environment:
the password of Redis and the cloud keys of the node. The keys stay in the environment, because boto3 looks there."""

_SHM_PREFIX = "lmcache_l1_pool_"
"""What LMCache puts before a segment's name."""

_L2_MODULES: Mapping[str, tuple[str, str]] = {
    "s3": ("boto3", "install boto3, from which LMCache takes the credentials"),
    "mooncake_store": ("lmcache.lmcache_mooncake", "build LMCache with MOONCAKE_INCLUDE_DIR; its wheels come without"),
}


def server_argv(
    config: ManagedServerConfig, *, platform: str, host: str, port: int, http_port: int, shm_name: str
) -> list[str]:
    """Arguments after `lmcache server`.

    Metrics are served at `/metrics` of the HTTP port, so there is no further port for Prometheus. The HTTP port is on
    loopback, because the HTTP API tells secrets; see `HTTP_HOST`.

    Args:
        platform: `cpu` engines copy through one shared-memory segment, which needs all of L1 allocated at start (pages
            are taken when they are first written). On `cuda` the server copies itself, out of pinned memory that grows.
        host: private address to which the message queue is bound. The queue does not ask who connects.
        shm_name: name from `new_shm_name`; unused on `cuda`.
    """
    argv = [
        *("--host", host, "--port", str(port), "--http-host", HTTP_HOST, "--http-port", str(http_port)),
        *("--supported-transfer-mode", "auto", "--chunk-size", str(config.chunk_tokens)),
        *("--max-workers", str(config.max_workers)),
        *("--l1-size-gb", f"{config.l1_gib:g}", "--eviction-policy", config.eviction_policy),
        *("--worker-reap-timeout-seconds", str(REAP_TIMEOUT_S)),
        *("--worker-registration-grace-seconds", str(REGISTRATION_GRACE_S)),
    ]
    if platform == "cpu":
        argv += ["--no-l1-use-lazy", "--shm-name", shm_name]
    else:
        argv += ["--l1-use-lazy", "--l1-init-size-gb", "1"]
    if config.l2:
        # The default policy writes every chunk to every L2 and keeps it in L1 as well.
        argv += ["--l2-store-policy", "default", "--l2-prefetch-policy", "default"]
    for l2 in config.l2:
        argv += ["--l2-adapter", json.dumps(l2_adapter(l2, host=host))]
    return argv


def l2_adapter(config: L2Config, *, host: str) -> dict[str, Any]:
    """The value of `--l2-adapter` for one storage, without secrets. JSON-able.

    Args:
        host: address of the server's node, as other members of a Mooncake store reach it.
    """
    match config:
        case FsL2Config():
            return {"type": "fs", "base_path": config.path}
        case RespL2Config():
            adapter: dict[str, Any] = {"type": "resp", "host": config.host, "port": config.port}
            return adapter | ({"username": config.username} if config.username else {})
        case S3L2Config():
            return {
                "type": "s3",
                "s3_endpoint": config.endpoint,
                "s3_region": config.region,
                "disable_tls": not config.tls,
            }
        case MooncakeStoreL2Config():
            adapter = {
                "type": "mooncake_store",
                "local_hostname": host,
                "metadata_server": config.metadata_server,
                "master_server_addr": config.master_server_address,
                "protocol": config.protocol,
                "global_segment_size": str(int(config.segment_gib * 2**30)),
            }
            return adapter | ({"rdma_devices": config.device_name} if config.device_name else {})
        case _:
            assert_never(config)


def server_env(config: ManagedServerConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """What the server's environment has beyond that of its parent: no telemetry, few log lines, the password."""
    env = {
        "LMCACHE_TRACK_USAGE": "false",
        "DO_NOT_TRACK": "1",
        "LMCACHE_LOG_LEVEL": "WARNING",
        "LMCACHE_DISABLE_BANNER": "1",
        "PYTHONWARNINGS": "ignore",
    }
    for l2 in config.l2:
        if isinstance(l2, RespL2Config) and l2.password_env is not None:
            env["LMCACHE_RESP_PASSWORD"] = environ[l2.password_env]
    return env


def server_problems(
    config: ManagedServerConfig, environ: Mapping[str, str], has_module: Callable[[str], bool]
) -> list[tuple[str, str]]:
    """Why a server with these settings cannot start on a node: pairs of a field's path below `server` and a reason.

    Args:
        environ: environment on the node.
        has_module: whether a Python module is installed there.
    """
    problems = []
    if not has_module("lmcache"):
        problems.append(("type", "the package lmcache is not installed"))
    passwords = {l2.password_env for l2 in config.l2 if isinstance(l2, RespL2Config)}
    for i, l2 in enumerate(config.l2):
        module, advice = _L2_MODULES.get(l2.type, (None, ""))
        if module is not None and not has_module(module):
            problems.append((f"l2[{i}].type", f"{l2.type} needs {module}, which is not installed; {advice}"))
        if isinstance(l2, RespL2Config) and l2.password_env is not None:
            if l2.password_env not in environ:
                problems.append((f"l2[{i}].password_env", f"{l2.password_env} is not set in the environment"))
            if len(passwords) > 1:
                problems.append((f"l2[{i}].password_env", "LMCache takes one password for all servers of type resp"))
    return problems


def shm_stem(port: int) -> str:
    """What the segments in `/dev/shm` of every server on this port begin with, and of no other server on the host."""
    return f"{_SHM_PREFIX}disagg-{port}-"


def new_shm_name(port: int, start: str) -> str:
    """Name of the segment of one start. Each start has its own: a dying server removes its segment only after its
    successor may have made one, and an engine with an old mapping must not write into the new one.

    Args:
        start: unique among the starts on this port.
    """
    return shm_stem(port) + start
