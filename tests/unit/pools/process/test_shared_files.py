# SPDX-License-Identifier: Apache-2.0
"""Files in shared memory of processes that were killed are removed, and no others."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pools.process.shared_files import SHARED_MEMORY, SharedFiles, mapped_by
from tests.support.stack import ROOT, wait_until

OWNER = """
import sys, time
from pathlib import Path
from pools.process.shared_files import SharedFiles
shared = Path(sys.argv[2])
held = [open(shared / name, "w") for name in sys.argv[3:]]
record = SharedFiles(Path(sys.argv[1]), shared)
record.note()
print("noted", flush=True)
time.sleep(600)
"""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shm"
    directory.mkdir()
    return directory


@contextmanager
def owner(records: Path, shared: Path, *names: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has `names` open and has noted it."""
    command = [sys.executable, "-c", OWNER, str(records), str(shared), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "noted\n"
        try:
            yield process
        finally:
            process.kill()


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path, shared: Path) -> None:
    """Its own files once it is dead; not while it lives, not another's, not those with other names."""
    other = shared / "psm_other"
    other.touch()
    mine = SharedFiles(tmp_path / "records", shared)
    with owner(tmp_path / "records", shared, "psm_a", "sem.mp-b", "lmcache_l1_pool_c") as process:
        assert mine.sweep() == []
        process.kill()
        process.wait()
        assert sorted(mine.sweep()) == ["psm_a", "sem.mp-b"]
    assert sorted(file.name for file in shared.iterdir()) == ["lmcache_l1_pool_c", "psm_other"]
    assert [file.name for file in (tmp_path / "records").iterdir()] == [mine._record.name]


def test_a_file_that_somebody_has_open_stays_until_he_is_done(tmp_path: Path, shared: Path) -> None:
    """An engine may outlive its replica for a moment."""
    mine = SharedFiles(tmp_path / "records", shared)
    with owner(tmp_path / "records", shared, "psm_a") as process, (shared / "psm_a").open():
        process.kill()
        process.wait()
        assert mine.sweep() == []
    assert mine.sweep() == ["psm_a"]
    assert mine.sweep() == []


def test_files_of_children_are_noted_and_remembered(tmp_path: Path, shared: Path) -> None:
    """Also once a child that had them is gone, for that is when they matter."""
    mine = SharedFiles(tmp_path / "records", shared)
    command = [sys.executable, "-c", f"import time; f = open({str(shared / 'psm_a')!r}, 'w'); time.sleep(600)"]
    with subprocess.Popen(command) as child:
        wait_until(lambda: bool(mapped_by([child.pid], shared)), 20, "the child has its file")
        mine.note()
        child.kill()
    mine.note()
    assert json.loads(mine._record.read_text()) == ["psm_a"]
    mine.stop()
    assert mine._record.exists()
    assert SharedFiles(tmp_path / "records", shared).sweep() == ["psm_a"]


def test_what_an_engine_has_when_it_is_up_is_noted_at_once(tmp_path: Path, shared: Path) -> None:
    """A replica that is killed just after its start leaves nothing that nobody knows of."""
    mine = SharedFiles(tmp_path / "records", shared)
    mine.start()
    try:
        with (shared / "psm_a").open("w"):
            mine.started()
            assert json.loads(mine._record.read_text()) == ["psm_a"]
    finally:
        mine.stop()


def test_a_semaphore_is_found_by_what_it_is() -> None:
    """The C library makes it under another name, which is the one in the process' maps."""
    before = set(SHARED_MEMORY.iterdir())
    semaphore = multiprocessing.get_context("spawn").Lock()
    new = {file for file in set(SHARED_MEMORY.iterdir()) - before if file.name.startswith("sem.mp-")}
    assert new & mapped_by([os.getpid()])
    del semaphore


def test_a_replica_that_left_nothing_leaves_no_record(tmp_path: Path, shared: Path) -> None:
    mine = SharedFiles(tmp_path / "records", shared)
    mine.start()
    mine.stop()
    mine.stop()
    assert list((tmp_path / "records").iterdir()) == []


@pytest.mark.parametrize("text", ["", "[", "3", "{}", '["../psm_a"]', '["psm_/../x"]', "[1]"])
def test_a_broken_record_removes_nothing(text: str, tmp_path: Path, shared: Path) -> None:
    (shared / "x").touch()
    mine = SharedFiles(tmp_path / "records", shared)
    (tmp_path / "records" / "1-broken").write_text(text)
    assert mine.sweep() == []
    assert (shared / "x").exists()


def test_a_directory_of_another_user_is_refused(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345678)
    with pytest.raises(PermissionError, match="another user"):
        SharedFiles(tmp_path / "records", shared)
