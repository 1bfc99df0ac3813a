# SPDX-License-Identifier: Apache-2.0
"""Makes the local paths of a config absolute, so that replicas with other working directories find them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disagg.config import AppConfig, FileKeysConfig, GatewayConfig
from pools.plan.checkpoint import local_directory
from transport.tiers import FsL2Config, ManagedServerConfig, OffloadConfig, SharedCacheConfig

_PATH_KWARGS = (
    "tokenizer",
    "chat_template",
    "tool_parser_plugin",
    "reasoning_parser_plugin",
    "hf_config_path",
    "download_dir",
)


def resolve(config: AppConfig, base_dir: Path) -> AppConfig:
    """The same config with local paths made absolute, so that replicas with other working directories find them.

    Of `engine_kwargs`, a value that may be a path is made absolute if it exists below `base_dir`, else kept.
    """
    directory = local_directory(config.model.source, base_dir)
    model = config.model.model_copy(
        update={
            "source": str(directory) if directory else config.model.source,
            "engine_kwargs": _absolute(config.model.engine_kwargs, base_dir),
        }
    )
    gateway = config.gateway
    if gateway.admin.key_file is not None:
        key_file = (base_dir / Path(gateway.admin.key_file).expanduser()).absolute()
        gateway = gateway.model_copy(update={"admin": gateway.admin.model_copy(update={"key_file": str(key_file)})})
    gateway = _key_files(gateway, base_dir)
    engine_key_file = config.engine_key_file and _directory(config.engine_key_file, base_dir)
    offload, shared_cache = _offload(config.offload, base_dir), _cache(config.shared_cache, base_dir)
    return config.model_copy(
        update={
            "model": model,
            "gateway": gateway,
            "offload": offload,
            "shared_cache": shared_cache,
            "engine_key_file": engine_key_file,
        }
    )


def _key_files(gateway: GatewayConfig, base_dir: Path) -> GatewayConfig:
    keys, secret = gateway.api_keys, gateway.salt_secret_file
    if isinstance(keys, FileKeysConfig):
        keys = keys.model_copy(update={"path": _directory(keys.path, base_dir)})
    return gateway.model_copy(update={"api_keys": keys, "salt_secret_file": secret and _directory(secret, base_dir)})


def _offload(offload: OffloadConfig | None, base_dir: Path) -> OffloadConfig | None:
    if offload is None or offload.disk is None:
        return offload
    disk = offload.disk.model_copy(update={"path": _directory(offload.disk.path, base_dir)})
    return offload.model_copy(update={"disk": disk})


def _cache(cache: SharedCacheConfig | None, base_dir: Path) -> SharedCacheConfig | None:
    if cache is None or not isinstance(cache.server, ManagedServerConfig):
        return cache
    l2 = tuple(
        entry.model_copy(update={"path": _directory(entry.path, base_dir)}) if isinstance(entry, FsL2Config) else entry
        for entry in cache.server.l2
    )
    return cache.model_copy(update={"server": cache.server.model_copy(update={"l2": l2})})


def _directory(path: str, base_dir: Path) -> str:
    return str((base_dir / Path(path).expanduser()).absolute())


def _absolute(kwargs: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    def absolute(value: Any) -> Any:
        if not isinstance(value, str) or not value or "\n" in value or len(value) > 1024:
            return value
        path = base_dir / Path(value).expanduser()
        return str(path.absolute()) if path.exists() else value

    return {key: absolute(value) if key in _PATH_KWARGS else value for key, value in kwargs.items()}
