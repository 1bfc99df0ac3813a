# SPDX-License-Identifier: Apache-2.0
"""Host memory of the offload tier: where it comes from, and how all of it goes when the engine ends.

All of it is touched at the start. With too little memory the start fails, and no store ever does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import mmap
import os
import time

import torch
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

logger = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = getattr(mmap, "MADV_POPULATE_WRITE", 23)
_REGION_PREFIX = "disagg-"
_STALE_AFTER_S = 600.0


def private_memory(num_bytes: int) -> torch.Tensor:
    """`num_bytes` zero bytes of this process alone, every page of them in memory. int8.

    Raises:
        MemoryError: there is not that much.
    """
    started = time.perf_counter()
    try:
        area = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # No huge pages: finding them took up to seven times as long, and copies were no faster.
        _populate(area)
    except OSError as error:
        raise MemoryError(f"the offload tier needs {num_bytes / 1024**3:.2f} GiB of host memory: {error}") from error
    logger.info("KV offload: %.2f GiB of host memory in %.2f s", num_bytes / 1024**3, time.perf_counter() - started)
    return torch.frombuffer(area, dtype=torch.int8)


def _populate(area: mmap.mmap) -> None:
    try:
        area.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Linux before 5.14.
        torch.frombuffer(area, dtype=torch.int8)[:: mmap.PAGESIZE] = 0


def region_id(engine_id: str) -> str:
    """The id under which vLLM names a shared region, so that this project's files can be told from others."""
    return _REGION_PREFIX + engine_id


def mark_used(region: SharedOffloadRegion) -> None:
    """Mark the region's file as used, by a lock. The lock goes when this process ends, in whatever way."""
    if region.fd is not None:
        fcntl.flock(region.fd, fcntl.LOCK_SH)


def remove_stale_regions(directory: str = "/dev/shm") -> list[str]:
    """Remove files of regions that no process uses; returns their paths.

    An engine leaves a file only when it was killed while it started: later the file has no name any more. Young files
    stay, because their engine may not have marked them yet.
    """
    removed = []
    for path in glob.glob(f"{directory}/vllm_offload_{_REGION_PREFIX}*.mmap"):
        with contextlib.suppress(OSError):
            if time.time() - os.stat(path).st_ctime < _STALE_AFTER_S:
                continue
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
                removed.append(path)
            finally:
                os.close(fd)
    return removed


def drop_name(region: SharedOffloadRegion) -> None:
    """Remove the region's file name once every process has it open; the memory goes when the last of them ends."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(region.mmap_path)
    region._creator = False
