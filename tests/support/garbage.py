# SPDX-License-Identifier: Apache-2.0
"""What a port scanner, another version or a broken client sends, for any port; and which ports a deployment opens."""

from __future__ import annotations

import contextlib
import errno
import random
import resource
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import psutil
import zmq

_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\x00") + b"\x00" + bytes(31)
"""ZMTP 3.0, the NULL mechanism."""
_READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
_WAIT_S = 0.1
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def kinds(seed: int = 8) -> dict[str, list[bytes]]:
    """What is sent on bare connections, by kind; each is sent alone and the connection closed after it."""
    chooser = random.Random(seed)
    sizes = (1, 2, 7, 8, 9, 16, 64, 255, 1024, 4096, 65_536, 2**20)
    return {
        "random bytes": [chooser.randbytes(size) for size in sizes],
        "constant bytes": [bytes([byte]) * 4096 for byte in (0x00, 0x0A, 0x41, 0x7F, 0xFF)],
        "lengths": [struct.pack(form, number) + b"x" * 64 for form in "<Q >Q <I >I".split() for number in (0, 1, 2**31)]
        + [b"\xff" * 8 + b"x" * 64, struct.pack("<Q", 2**20) + b'{"a":', struct.pack("<Q", 12) + b"not json at "],
        "truncated": [
            b"POST /v1/completions HT",
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n{",
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffff\r\nx",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            _GREETING[:11],
            _GREETING + _READY[:9],
            _GREETING + _READY + b"\x02\xff",
            _HTTP2[:24],
        ],
        "huge": [
            b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999\r\n\r\n" + b"[" * 2**20,
            b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n{"prompt":' + b"[" * 199_990,
            _GREETING + _READY + b"\x02" + struct.pack(">Q", 2**62) + b"x" * 2**16,
            _GREETING + _READY + b"\x02" + struct.pack(">Q", 2**24) + b"x" * 2**16,
        ],
    }


def messages() -> list[list[bytes]]:
    """Messages of several parts for a ZMQ socket, none of them what somebody waits for."""
    encode = msgspec.msgpack.encode
    return [
        [b""],
        [b"x"],
        [b"", b""],
        [b"", b"x"],
        [b"", encode((b"get_meta_msg", 99, 99))],
        [b"", encode((b"get_meta_msg", 0))],
        [b"", encode((b"get_meta_msg", -1, 2**63))],
        [b"", encode((b"another_msg", 0, 0))],
        [b"", encode({"get_meta_msg": [0, 0]})],
        [b"", b"\x91" * 4000],
        [b"", b"\xdd\xff\xff\xff\xff"],
        [b"\xc1", b"\xc1"],
        [encode(1), encode(10**6)],
        [encode(1), b"\xc1", b"x"],
        [b"x"] * 40,
        [b"x" * 2**20],
        [b"", b"x" * 2**20],
    ]


def throw(host: str, port: int, data: bytes, *, wait_s: float = _WAIT_S) -> str:
    """Send on a connection of its own and close it; what became of it, in a word."""
    try:
        with socket.create_connection((host, port), timeout=2.0) as sock:
            sock.settimeout(wait_s)
            with contextlib.suppress(TimeoutError, OSError):
                sock.sendall(data)
            try:
                answer = sock.recv(64)
            except TimeoutError:
                return "waits"
            except OSError:
                return "reset"
            return "answered" if answer else "closed"
    except ConnectionRefusedError:
        return "refused"
    except (OSError, TimeoutError):
        return "no connection"


def throw_all(host: str, port: int) -> dict[str, int]:
    """Every kind, then messages as ZMQ carries them, whatever the port speaks; how often it did what."""
    found: dict[str, int] = {}
    for payloads in kinds().values():
        for data in payloads:
            outcome = throw(host, port, data)
            found[outcome] = found.get(outcome, 0) + 1
            if outcome == "refused":
                return found
    send_messages(host, port)
    return found


def send_messages(host: str, port: int) -> None:
    """Each of `messages`, from a DEALER of its own. Returns when they are out, or after half a second each."""
    with zmq.Context() as context:
        for parts in messages():
            with context.socket(zmq.DEALER) as sock:
                sock.linger = 500
                sock.setsockopt(zmq.HANDSHAKE_IVL, 500)
                sock.setsockopt(zmq.IMMEDIATE, 1)
                sock.setsockopt(zmq.SNDTIMEO, 500)
                sock.connect(f"tcp://{host}:{port}")
                with contextlib.suppress(zmq.Again):
                    sock.send_multipart(parts)


@contextmanager
def silence(host: str, port: int, number: int) -> Iterator[list[socket.socket]]:
    """Connections that send nothing, as many of `number` as this process and the port take; closed afterwards.

    Raises this process' own bound on file descriptors as far as it may.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    open_: list[socket.socket] = []
    try:
        while len(open_) < number:
            batch = _connecting(host, port, min(200, number - len(open_)))
            connected = _connected(batch)
            open_ += connected
            if not connected:
                break
        yield open_
    finally:
        for sock in open_:
            # A reset, so that no port of ours is kept for a minute.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


def still_open(connections: list[socket.socket]) -> int:
    """How many the other side has not closed. Reads what it has sent, as ZMQ does at once."""
    return sum(_is_open(sock) for sock in connections)


def _is_open(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096, socket.MSG_DONTWAIT):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _connecting(host: str, port: int, number: int) -> list[socket.socket]:
    batch = []
    for _ in range(number):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        if sock.connect_ex((host, port)) not in (0, errno.EINPROGRESS):
            sock.close()
            continue
        batch.append(sock)
    return batch


def _connected(batch: list[socket.socket], timeout_s: float = 3.0) -> list[socket.socket]:
    """Those whose connection stands within `timeout_s`; the others are closed."""
    done: list[socket.socket] = []
    with selectors.DefaultSelector() as selector:
        for sock in batch:
            selector.register(sock, selectors.EVENT_WRITE)
        deadline = time.monotonic() + timeout_s
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(0.2):
                sock = key.fileobj  # type: ignore[assignment]
                selector.unregister(sock)
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    done.append(sock)
    for sock in set(batch).difference(done):
        sock.close()
    return done


@dataclass(frozen=True)
class Door:
    """One listening TCP port of a deployment."""

    host: str
    """An address that reaches it from this machine."""
    port: int
    pid: int
    process: str
    """Title of its process."""
    bound: str
    """The address that it is bound to."""
    rays: bool
    """Whether it is Ray's own: of one of its daemons, or a gRPC server in one of its workers."""

    def __str__(self) -> str:
        return f"{self.bound}:{self.port} {self.process}"


_DAEMONS = ("gcs_server", "raylet", "dashboard", "log_monitor", "runtime_env", "runtimeenv", "monitor.py", "ray::idle")


def doors(root: int) -> list[Door]:
    """Every listening TCP port of a process and its descendants, by process and port."""
    found = []
    top = psutil.Process(root)
    for process in [top, *top.children(recursive=True)]:
        try:
            title = _title(process)
            listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        except psutil.Error:
            continue
        for connection in listening:
            bound, port = connection.laddr
            host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1", "::1": "127.0.0.1"}.get(bound, bound)
            host = host.removeprefix("::ffff:")
            rays = any(word in title.lower() for word in _DAEMONS) or _speaks_grpc(host, port)
            found.append(Door(host, port, process.pid, title, bound, rays))
    # A socket that a parent has left to its child is one door.
    return sorted({(d.host, d.port): d for d in found}.values(), key=lambda d: (d.process, d.port))


def _title(process: psutil.Process) -> str:
    command = process.cmdline()
    words = [word.rsplit("/", 1)[-1] for word in command[:4]]
    return " ".join(words)[:60] or process.name()


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether the port answers HTTP/2's preface with a SETTINGS frame, as only Ray's gRPC servers do here."""
    try:
        with socket.create_connection((host, port), timeout=2.0) as sock:
            sock.settimeout(1.0)
            sock.sendall(_HTTP2)
            frame = sock.recv(9)
    except (OSError, TimeoutError):
        return False
    return len(frame) == 9 and frame[3] == 4
