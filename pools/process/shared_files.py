# SPDX-License-Identifier: Apache-2.0
"""What a replica's processes have in shared memory, and its removal once they are gone.

vLLM's message queues are files of up to 240 MiB in `/dev/shm`. The process that makes such a file removes it, unless
that process is killed. So each replica keeps a record of the files of its processes, and locks the record for as long
as the replica lives. Every replica looks for records that are not locked, and removes those of their files that no
process uses. This works on Linux; elsewhere no file is found.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
_NAMES = ("psm_", "sem.mp-")
"""How the names of files of Python's `multiprocessing` begin. Other files have owners who look after them, like an
LMCache server."""
_STARTING_PERIOD_S = 1.0
"""Between two looks while the engine starts, for that is when it makes its files."""
_PERIOD_S = 30.0
_STARTING = "."
"""The name of a record begins with this until the record is locked."""


def mapped_by(processes: Iterable[int], directory: Path = SHARED_MEMORY) -> frozenset[Path]:
    """The files of `directory` that the given processes have mapped or open.

    Files are compared by inode: a semaphore is made under another name than it keeps, and the kernel goes on showing
    the first name.
    """
    names: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        names = {entry.inode(): Path(entry.path) for entry in os.scandir(directory)}
    if not names:
        return frozenset()
    inside = f"{directory}/"
    found: set[int] = set()
    for pid in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                if inside in line:
                    # address, permissions, offset, device, inode, path
                    found.add(int(line.split(maxsplit=5)[4]))
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith(inside):
                        found.add(link.stat().st_ino)
    return frozenset(names[inode] for inode in found & names.keys())


def records_directory() -> Path:
    """Where the records of this user are, on this machine or in this container."""
    return Path(tempfile.gettempdir(), f"disagg-shared-files-{os.getuid()}")


class SharedFiles:
    """The record of this process and its descendants."""

    def __init__(self, records: Path | None = None, shared: Path = SHARED_MEMORY) -> None:
        """Raises OSError when the directory of the records is another user's or cannot be made."""
        self._records = records or records_directory()
        self._shared = shared
        self._records.mkdir(mode=0o700, exist_ok=True)
        if self._records.stat().st_uid != os.getuid():
            raise PermissionError(f"{self._records} belongs to another user")
        name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        starting = self._records / f"{_STARTING}{name}"
        self._record = self._records / name
        self._file = starting.open("w+")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        starting.rename(self._record)
        self._noted: frozenset[str] = frozenset()
        self._noting = threading.Lock()
        self._period_s = _STARTING_PERIOD_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shared-files", daemon=True)

    def start(self) -> None:
        """Look now and then, in a thread of its own, until `stop` or the end of the process."""
        self._thread.start()

    def started(self) -> None:
        """The engine is up and has made its files: note them now, and look less often from here on. Blocks briefly."""
        self.note()
        self._period_s = _PERIOD_S

    def stop(self) -> None:
        """Give the record up. Call it when the engine has ended. Idempotent.

        The record is removed if none of its files is left; else a later `sweep` of another replica removes it.
        """
        self._stop.set()
        if self._file.closed:
            return
        if not any((self._shared / name).exists() for name in self._noted):
            self._record.unlink(missing_ok=True)
        self._file.close()

    def note(self) -> None:
        """Add to the record the files that this process and its descendants use and the record does not hold yet."""
        family = [os.getpid()]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [process.pid for process in psutil.Process().children(recursive=True)]
        names = {file.name for file in mapped_by(family, self._shared) if file.name.startswith(_NAMES)}
        with self._noting:
            if names <= self._noted:
                return
            self._noted |= names
            self._file.seek(0)
            json.dump(sorted(self._noted), self._file)
            self._file.truncate()
            self._file.flush()

    def sweep(self) -> list[str]:
        """Remove the files that replicas left when they ended. Returns the names of the removed files."""
        removed: list[str] = []
        busy: frozenset[Path] | None = None
        for record in sorted(self._records.iterdir()):
            if record == self._record or record.name.startswith(_STARTING):
                continue
            with contextlib.suppress(FileNotFoundError), record.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                busy = mapped_by(psutil.pids(), self._shared) if busy is None else busy
                left = [path for name in _read(file.read()) if (path := self._shared / name).exists()]
                for path in left:
                    if path not in busy and path.stat().st_uid == os.getuid():
                        path.unlink(missing_ok=True)
                        removed.append(path.name)
                if not any(path.exists() for path in left):
                    record.unlink(missing_ok=True)
        return removed

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self.note()
                if removed := self.sweep():
                    logger.info("removed %d files that killed processes left in %s", len(removed), self._shared)
            except Exception:
                logger.exception("cannot look after the files in %s", self._shared)


def _read(text: str) -> list[str]:
    """The names in a record. Names without a prefix of `_NAMES` are left out; a record that was cut short has none."""
    try:
        names = json.loads(text)
    except ValueError:
        return []
    if not isinstance(names, list):
        return []
    return [n for n in names if isinstance(n, str) and n.startswith(_NAMES) and "/" not in n]
