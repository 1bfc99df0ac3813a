# SPDX-License-Identifier: Apache-2.0
"""Whether a model that is not on this machine can be had from the Hugging Face hub, before engines wait for it.

An engine asks for one file after the other and tries each again and again, which takes minutes without a network.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from pools.plan.checkpoint import local_directory

PATIENCE_S = 8.0
"""Seconds for the hub's answer. The lookup of its name counts."""


def trouble(
    source: str,
    environment: Mapping[str, str] = os.environ,
    *,
    revision: str = "main",
    token: str | None = None,
    patience_s: float = PATIENCE_S,
) -> str | None:
    """Why the model cannot be had, in words; None when it can. Blocks for `patience_s` seconds at most.

    A model that is on this machine, as a directory or in the hub's cache, is not asked for.

    Args:
        environment: the variables of the engines, which download it.
        revision: what of it they ask for.
        token: what they show, where the config says so.
    """
    if local_directory(source, Path.cwd()) is not None or environment.get("VLLM_USE_MODELSCOPE", "") in ("1", "True"):
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    cache = environment.get("HF_HUB_CACHE") or _below(environment.get("HF_HOME")) or constants.HF_HUB_CACHE
    if isinstance(try_to_load_from_cache(source, "config.json", cache_dir=cache, revision=revision), str):
        return None
    endpoint = environment.get("HF_ENDPOINT") or constants.ENDPOINT
    if constants.is_offline_mode() or environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"the model {source!r} is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask {endpoint}"
    found: list[str | None] = []
    # In a thread of its own, because the lookup of a name knows no time limit.
    token = token or environment.get("HF_TOKEN") or None
    url = f"{endpoint}/{source}/resolve/{revision}/config.json"
    asking = threading.Thread(
        target=lambda: found.append(_asked(source, endpoint, url, token, patience_s)), daemon=True
    )
    asking.start()
    asking.join(patience_s)
    return found[0] if found else f"the hub {endpoint} did not answer within {patience_s:g} s"


def _below(home: str | None) -> str | None:
    """The cache in the folder that HF_HOME names. Source: huggingface_hub 2.4 `constants.py`."""
    return str(Path(home).expanduser() / "hub") if home else None


def _asked(source: str, endpoint: str, url: str, token: str | None, patience_s: float) -> str | None:
    """Ask once, for a file that nearly every model has. The hub's own client asks five times."""
    import httpx
    from huggingface_hub import get_token

    token = token or get_token()
    try:
        answer = httpx.head(
            url,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=patience_s,
            follow_redirects=True,
        )
    except ImportError:
        return f"a proxy variable names a SOCKS proxy for {endpoint}, which needs the package socksio"
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as exc:
        return f"cannot reach the hub {endpoint} for the model {source!r}: {exc}"
    # Source: huggingface_hub 2.4 `hf_raise_for_status`.
    code = answer.headers.get("X-Error-Code", "")
    if answer.is_success or code == "EntryNotFound":
        return None
    if code == "GatedRepo":
        return f"the hub {endpoint} gives {source!r} only to who has accepted its terms: set HF_TOKEN"
    if code == "RepoNotFound" or answer.status_code in (401, 404):
        return f"the hub {endpoint} shows no model {source!r}: check its name, or set HF_TOKEN when it is private"
    return f"the hub {endpoint} answered {answer.status_code} for the model {source!r}"
