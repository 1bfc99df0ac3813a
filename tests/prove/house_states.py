# SPDX-License-Identifier: Apache-2.0
"""Line 6: a quarantined prefill pool, as `/health`, the admin API, the SDK and `disagg status` tell it of a running
application whose prefill engine stands still."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import httpx

from disagg.cli.connection import KEY_VARIABLE
from tests.prove.faults_rows import CONFIG
from tests.prove.report import ROOT, Row
from tests.support.faults import engine_core, replicas, stopped, wait_warm
from tests.support.stack import Stack, running, wait_until

LINE = 6
POOL = "prefill"
FOUND_S = 30.0
WAIT_S = 5.0
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 4}


def quarantined_pool() -> list[Row]:
    with running(CONFIG, name="prove-house-states") as stack:
        victim = replicas(stack, POOL)[0]
        with stopped(engine_core(victim)) as mark:
            wait_until(lambda: replicas(stack, POOL)[0].state == "quarantined", FOUND_S, "it is quarantined", 0.05)
            found_s = time.monotonic() - mark
            rows = _rows(told(stack))
            rows += [_answer(stack), _wait(stack)]
        wait_warm(stack)
    found = Row(LINE, "a prefill engine stands still: quarantined", f"after {found_s:.1f} s", f"{FOUND_S:g} s", True)
    return [found, *rows]


@dataclass(frozen=True)
class Told:
    """One pool in the words of each: its state with the reason, and how many of its replicas serve."""

    health: str
    admin: str
    sdk: str
    status: str
    application: str
    """What `/health` says of the whole application."""
    decode: str
    """States of the decode replicas, as the admin API tells them."""


def told(stack: Stack) -> Told:
    """Asks all four, one right after the other."""
    health = httpx.get(f"{stack.url}/health", timeout=10)
    key = {"authorization": f"Bearer {stack.admin_key}"}
    pools = {p["name"]: p for p in httpx.get(f"{stack.url}/admin/v1/pools", headers=key, timeout=10).json()["pools"]}
    with stack.client() as client:
        pool = client.pool(POOL).status()
    command = [sys.executable, "-m", "disagg.cli.main", "status", "--url", stack.url]
    environment = {**os.environ, KEY_VARIABLE: stack.admin_key}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{POOL}:")]
    body = health.json()
    return Told(
        health=_words(body["states"][POOL]["state"], body["states"][POOL]["reason"], body["pools"][POOL]),
        admin=_words(pools[POOL]["state"], pools[POOL]["reason"], pools[POOL]["num_routable"]),
        sdk=_words(pool.state, pool.reason, pool.num_routable),
        status=line.partition("routable ")[2],
        application=f"{health.status_code} {body['status']}",
        decode=", ".join(replica["state"] for replica in pools["decode"]["replicas"]),
    )


def _words(state: str | None, reason: str | None, num_routable: int) -> str:
    """As `disagg status` puts it."""
    return f"{num_routable}, {state}" if reason is None else f"{num_routable}, {state} ({reason})"


def _rows(found: Told) -> list[Row]:
    expected = "0, quarantined (hang)"
    alike = {"/health": found.health, "admin API": found.admin, "SDK": found.sdk, "disagg status": found.status}
    return [
        *(
            Row(LINE, f"{who} tells the prefill pool", words, expected, words == expected)
            for who, words in alike.items()
        ),
        Row(LINE, "/health of the application", found.application, "200 degraded", found.application == "200 degraded"),
        Row(LINE, "decode replicas, which serve alone", found.decode, "routable", found.decode == "routable"),
    ]


def _answer(stack: Stack) -> Row:
    reply = httpx.post(f"{stack.url}/v1/chat/completions", json=CHAT, timeout=60)
    figure = f"{reply.status_code}, prefill {reply.headers.get('x-disagg-prefill')}"
    return Row(LINE, "a chat meanwhile", figure, "200, prefill local", figure == "200, prefill local")


def _wait(stack: Stack) -> Row:
    """A wait for the decode pool's size ends, although no pair is warm."""
    with stack.client() as client:
        operation = client.pool("decode").scale(1)
        operation.wait(timeout_s=FOUND_S)
    took_s = operation.elapsed_s
    return Row(LINE, "decode: scale(1).wait() returns", f"after {took_s:.1f} s", f"{WAIT_S:g} s", took_s <= WAIT_S)
