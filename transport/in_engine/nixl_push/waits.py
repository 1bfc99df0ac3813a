# SPDX-License-Identifier: Apache-2.0
"""KV that a decode engine waits for, and when it may stop waiting: rules, and the thread that asks. No vLLM imports.

vLLM 0.32 waits for ever for a write that never comes; its watchdog only logs a line. Here the scheduler side of the
decode engine asks the prefill engine, on the port of NIXL's handshakes, four times a second while it waits for KV.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import zmq

from transport.in_engine.nixl_push.offers import question

logger = logging.getLogger(__name__)

_PERIOD_S = 0.25
_ANSWER_S = 1.0
REFUSED_S = 2.0
"""Seconds for which a port must have refused connections before its engine counts as dead, its workers included."""
SILENT_LEASES = 4
"""A silent peer may be stopped and go on later. After so many leases of silence the decode engine waits no longer."""
WRITABLE_LEASES = 3
"""Leases after which a registration is too old for a write to begin. A write that has begun by then ends while the
decode engine still waits (`SILENT_LEASES`)."""
_MAX_ASKED = 50
"""Hand-offs in one question: the listener takes short messages only."""


@dataclass(frozen=True)
class Peer:
    """One prefill engine."""

    host: str
    port: int
    engine_id: str


Verdict = Literal["refused", "silent"]
Answer = Collection[str] | Verdict
"""The hand-offs that are gone, or why there is no answer."""


@dataclass
class _Wait:
    handoff_id: str
    peer: Peer
    since: float
    given_up: bool = False
    gone: bool = False
    lost: bool = False


@dataclass
class _Heard:
    """What a peer said last."""

    at: float
    refused_since: float | None = None


@dataclass
class Rules:
    """The waits of one engine and what their peers said. Pure; times are seconds of one clock."""

    lease_s: float
    waits: dict[str, _Wait] = field(default_factory=dict)
    """By request id."""
    _heard: dict[Peer, _Heard] = field(default_factory=dict)

    def start(self, req_id: str, handoff_id: str, peer: Peer, now: float) -> None:
        self.waits[req_id] = _Wait(handoff_id, peer, now)
        self._heard.setdefault(peer, _Heard(now))

    def over(self, req_id: str) -> str | None:
        """The KV came, or every rank has failed it. Returns the hand-off's id if it was waited for until now."""
        wait = self.waits.pop(req_id, None)
        if wait is None:
            return None
        if all(other.peer != wait.peer for other in self.waits.values()):
            del self._heard[wait.peer]
        return None if wait.given_up else wait.handoff_id

    def questions(self, now: float) -> dict[Peer, tuple[list[str], list[str]]]:
        """For each peer the hand-offs to ask about: those waited for, and those given up or older than a lease."""
        asked: dict[Peer, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for wait in self.waits.values():
            if not wait.lost:
                late = wait.given_up or now - wait.since > self.lease_s
                asked[wait.peer][late].append(wait.handoff_id)
        return dict(asked)

    def take(self, peer: Peer, answer: Answer, now: float) -> list[str]:
        """Take a peer's answer; returns the request ids whose KV will not be written any more.

        A hand-off must be gone in two answers in a row: NIXL's notification of a finished write may still be under way.
        """
        heard = self._heard.get(peer)
        if heard is None:
            return []
        mine = {req_id: wait for req_id, wait in self.waits.items() if wait.peer == peer and not wait.lost}
        if answer == "silent":
            dead = now - heard.at > SILENT_LEASES * self.lease_s
        elif answer == "refused":
            heard.refused_since = now if heard.refused_since is None else heard.refused_since
            dead = now - heard.refused_since >= REFUSED_S
        else:
            heard.at, heard.refused_since, dead = now, None, False
            for wait in mine.values():
                gone = wait.handoff_id in answer
                wait.lost, wait.gone = gone and wait.gone, gone
        for wait in mine.values():
            wait.lost = wait.lost or dead
        return [req_id for req_id, wait in mine.items() if wait.lost]


class Waits:
    """`Rules` and the thread that asks. Any thread may call any method but `start`. `shutdown` alone may block."""

    def __init__(
        self,
        lease_s: float,
        *,
        ask: Callable[[Peer, Collection[str], Collection[str]], Answer] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = Rules(lease_s)
        self._ask = ask or ask_peer
        self._clock = clock
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._stopped = threading.Event()
        self._lost: set[str] = set()
        self._thread: threading.Thread | None = None

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._rules.waits

    def start(self, req_id: str, handoff_id: str, peer: Peer) -> None:
        """The request has blocks and is registered with the prefill engine."""
        with self._lock:
            self._rules.start(req_id, handoff_id, peer, self._clock())
        self._some.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="disagg-push-waits", daemon=True)
            self._thread.start()

    def give_up(self, req_id: str) -> str | None:
        """The request was aborted. Returns its hand-off's id, or None if nobody waited for it.

        vLLM keeps the request's blocks until the KV has come or the hand-off is lost.
        """
        with self._lock:
            wait = self._rules.waits.get(req_id)
            if wait is None or wait.given_up:
                return None
            wait.given_up = True
            return wait.handoff_id

    def over(self, req_id: str) -> str | None:
        """See `Rules.over`."""
        with self._lock:
            waited_for = self._rules.over(req_id)
            if not self._rules.waits:
                self._some.clear()
            return waited_for

    def take_lost(self) -> set[str]:
        """Request ids whose KV will not be written any more, each once. Every rank is to fail their loads."""
        with self._lock:
            lost, self._lost = self._lost, set()
            return lost & self._rules.waits.keys()

    def shutdown(self) -> None:
        self._stopped.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join(2 * _ANSWER_S)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._some.wait()
            if self._stopped.wait(_PERIOD_S):
                return
            with self._lock:
                questions = self._rules.questions(self._clock())
            for peer, (waiting, given_up) in questions.items():
                answer = self._asked(peer, waiting, given_up)
                with self._lock:
                    lost = self._rules.take(peer, answer, self._clock())
                    self._lost.update(lost)
                if lost:
                    logger.warning("%d hand-offs of %s will not be written any more", len(lost), peer.engine_id)

    def _asked(self, peer: Peer, waiting: Collection[str], given_up: Collection[str]) -> Answer:
        try:
            return self._ask(peer, waiting, given_up)
        except Exception:
            # This process lacks memory or descriptors. "silent" makes the waits end at some time all the same.
            logger.exception("%s could not be asked", peer.engine_id)
            return "silent"


def ask_peer(peer: Peer, waiting: Collection[str], given_up: Collection[str]) -> Answer:
    """One prefill engine's answer, within about two seconds for each fifty hand-offs."""
    gone: set[str] = set()
    for some, late in _pages(waiting, given_up):
        answer = _ask(peer, question(peer.engine_id, some, late))
        if isinstance(answer, str):
            return answer
        gone.update(answer)
    return gone


def _pages(waiting: Collection[str], given_up: Collection[str]) -> Iterable[tuple[list[str], list[str]]]:
    asked = [(handoff_id, False) for handoff_id in waiting] + [(handoff_id, True) for handoff_id in given_up]
    for start in range(0, len(asked), _MAX_ASKED):
        page = asked[start : start + _MAX_ASKED]
        yield [i for i, late in page if not late], [i for i, late in page if late]


def _ask(peer: Peer, asked: bytes) -> Answer:
    host = f"[{peer.host}]" if ":" in peer.host else peer.host
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.linger = 0
        sock.setsockopt(zmq.IPV6, 1)
        sock.rcvtimeo = sock.sndtimeo = int(_ANSWER_S * 1000)
        sock.connect(f"tcp://{host}:{peer.port}")
        try:
            sock.send(asked)
            return msgspec.msgpack.decode(sock.recv(), type=list[str])
        except (zmq.ZMQError, msgspec.MsgspecError):
            pass
    try:
        socket.create_connection((peer.host, peer.port), timeout=_ANSWER_S).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        pass
    return "silent"
