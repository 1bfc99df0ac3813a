# SPDX-License-Identifier: Apache-2.0
"""What a running process has replaced in other packages, asked of it by a signal.

`tests/support/hook` is on the path of every process that tests start, so that its `sitecustomize` installs the handler
in all of them, spawned or forked.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from pools.borrowed import REPLACED as OF_POOLS
from transport.in_engine.patches.replaced import REPLACED as OF_ENGINES
from transport.upstream.loaded import is_ours
from transport.upstream.names import Platform, Process
from transport.upstream.replacing import chosen, replaced

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = f"{ROOT}:{ROOT / 'tests' / 'support' / 'hook'}"
_FOLDER = ROOT / "build" / "replaced"


def listed(process: Process, platform: Platform = "cpu") -> set[str]:
    """What the lists say of a process that is up and in no call."""
    return {one.name for one in chosen((*OF_ENGINES, *OF_POOLS), process, platform) if one.of != "a moment"}


def write() -> None:
    """In the process that is asked: modules and classes by attribute, and methods that one object has of its own."""
    names = sorted(replaced() | set(_of_instances()))
    _FOLDER.mkdir(parents=True, exist_ok=True)
    path = _FOLDER / f"{os.getpid()}.json"
    path.with_suffix(".new").write_text(json.dumps(names))
    path.with_suffix(".new").rename(path)


def _of_instances() -> Iterator[str]:
    # vLLM freezes what is there when an engine has started, and frozen objects are not told.
    gc.unfreeze()
    objects = gc.get_objects()
    gc.freeze()
    for one in objects:
        cls = type(one)
        # Of some classes it is not a text.
        if not str(cls.__module__).startswith(("vllm", "lmcache")):
            continue
        with contextlib.suppress(TypeError):
            own = vars(one)
            yield from (
                f"{cls.__module__}:{cls.__qualname__}.{name}"
                for name, value in list(own.items())
                if hasattr(cls, name) and is_ours(value)
            )


def ask(pid: int, timeout_s: float = 30.0) -> set[str]:
    """What the process `pid` has replaced. Raises TimeoutError when it does not answer."""
    path = _FOLDER / f"{pid}.json"
    path.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not say what it has replaced")
        time.sleep(0.05)
    return set(json.loads(path.read_text()))


def listener(url: str) -> psutil.Process:
    """The process that listens at the port of `url`."""
    port = urlsplit(url).port
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp")):
                return process
    raise LookupError(f"nobody listens at {url}")


def engine_processes(api: psutil.Process) -> dict[Process, psutil.Process]:
    """The processes of an engine of one rank whose AsyncLLM is in `api`, told by the titles that vLLM gives them."""
    found: dict[Process, psutil.Process] = {"api": api}
    for process in api.children(recursive=True):
        title = " ".join(process.cmdline())
        if "VLLM::EngineCore" in title:
            found["engine_core"] = process
        elif "VLLM::Worker" in title:
            found["worker"] = process
    return found
