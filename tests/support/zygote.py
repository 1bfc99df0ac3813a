# SPDX-License-Identifier: Apache-2.0
"""Engines forked from one process that has vLLM imported. Linux only.

Three processes of an engine import vLLM, which is nine tenths of the CPU time of its start. This program imports it
once, without starting a thread, and forks a process for each request. That one forks EngineCore, where a replica's
process spawns it, and EngineCore its workers. Two things differ from `tests.support.engine_process`: vLLM's plugins are
loaded once, in the first of these processes, and the worker holds the pipe that tells of the end of EngineCore.

A request is one message on the socket whose path is the program's only argument: the engine's settings as JSON, with
the descriptors of its stdin, stdout and stderr. The answer is the new process' id. The program ends with its stdin.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tests.support.replaced import PYTHONPATH

MAX_REQUEST_BYTES = 65536


class ForkedProcess:
    """A process that the zygote forked, as far as `subprocess.Popen` is used for engines."""

    def __init__(self, pid: int, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """0 once it has ended, whatever its exit code was, which only its parent learns."""
        return self._ended(0)

    def wait(self, timeout: float) -> int:
        """Returns when it has ended. Raises subprocess.TimeoutExpired."""
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired([f"engine {self.pid}"], timeout)
        return 0

    def kill(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _ended(self, timeout_s: float) -> int | None:
        readable, _, _ = select.select([self._pidfd], [], [], timeout_s)
        return 0 if readable else None


class Zygote:
    """The program, started with the first fork. Its environment is what every engine forked from it has in common."""

    def __init__(self, env: Mapping[str, str], *, cwd: Path, log: Path) -> None:
        self._env, self._cwd, self._log = {**os.environ, **env, "PYTHONPATH": PYTHONPATH}, cwd, log
        self._folder = tempfile.TemporaryDirectory(prefix="disagg-zygote-")
        self._path = str(Path(self._folder.name) / "socket")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def fork(self, settings: Mapping[str, Any], stderr: BinaryIO) -> ForkedProcess:
        """A process that runs `tests.support.engine_process.main` with these settings; waits for the import."""
        with self._lock:
            if self._process is None:
                self._process = self._started()
            stdin, stdin_writer = os.pipe()
            stdout_reader, stdout = os.pipe()
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                    connection.connect(self._path)
                    message = json.dumps(dict(settings)).encode()
                    socket.send_fds(connection, [message], [stdin, stdout, stderr.fileno()])
                    pid = int(connection.recv(64))
            finally:
                os.close(stdin)
                os.close(stdout)
        return ForkedProcess(pid, os.fdopen(stdin_writer, "wb"), os.fdopen(stdout_reader, "rb"))

    def stop(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(30)
        self._folder.cleanup()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.zygote", self._path],
                cwd=self._cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=self._env,
            )
        assert process.stdout is not None
        with process.stdout as said:
            if not said.readline():
                raise RuntimeError(f"the zygote did not come up; see {self._log}")
        return process


def preload() -> None:
    """Import what an engine's processes import, but for the connectors, whose libraries read the environment."""
    import multiprocessing

    import vllm.entrypoints.launchers.app
    import vllm.entrypoints.openai.api_server
    import vllm.utils.system_utils
    import vllm.v1.core.sched.async_scheduler
    import vllm.v1.engine.coordinator
    import vllm.v1.engine.core
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker
    from vllm.platforms.cpu import CpuPlatform

    import pools.engine.vllm_engine
    import pools.replica.server  # noqa: F401
    import tests.support.engine_process  # noqa: F401

    for module in (
        vllm.utils.system_utils,
        vllm.v1.engine.coordinator,
        vllm.v1.engine.utils,
        vllm.v1.executor.multiproc_executor,
    ):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")

    # A worker puts C++ in the place of Triton's kernels and looks through all modules for them. That is before it loads
    # a connector, but EngineCore, of which it is a copy here, has loaded its own, and vLLM's search trips over what
    # LMCache imports (`vars(value).get` in llvmlite). So it is done here, before there is any connector.
    CpuPlatform.register_triton_kernel_overrides()
    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)


def serve(path: str) -> None:
    """Fork for each request until stdin ends."""
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads != 1:
        raise RuntimeError(f"importing vLLM has started {num_threads - 1} threads, which a fork would lose")
    # Nobody waits for the children.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            with connection:
                message, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
                pid = os.fork()
                if pid == 0:
                    listener.close()
                    connection.close()
                    run(json.loads(message), fds)
                for fd in fds:
                    os.close(fd)
                connection.send(str(pid).encode())


def run(settings: dict[str, Any], fds: list[int]) -> None:
    """Be an engine's process, and end."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        os.environ.update(settings["env"])
        import uvloop

        from tests.support.engine_process import main

        uvloop.run(main(settings))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    preload()
    gc.freeze()
    serve(sys.argv[1])
