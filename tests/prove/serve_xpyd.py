# SPDX-License-Identifier: Apache-2.0
"""Line 4: two prefill and two decode replicas; every pair is used, and a killed replica comes back warm."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from tests.prove.report import ROOT, Row
from tests.prove.serve_tokens import reference, wrong
from tests.support.answers import Answer, Case, ask_all, cases
from tests.support.stack import Stack, running, wait_until
from tests.support.tiers import WHOLE_PROMPTS

CONFIG = ROOT / "configs" / "2p2d-nixl-cpu.yaml"
RECOVERY_S = 180.0


def xpyd() -> list[Row]:
    chosen = fresh("first")
    [expected] = reference(chosen, (1,), WHOLE_PROMPTS)
    rows: list[Row] = []

    def whole_prompts(config: dict[str, Any]) -> None:
        config["applications"][0]["args"]["model"]["engine_kwargs"].update(WHOLE_PROMPTS)

    with running(CONFIG, name="prove-2p2d", change=whole_prompts, timeout_s=400) as stack:
        got = asyncio.run(ask_all(stack.url, chosen, num_clients=4))
        pairs = pairs_of(got)
        problems = wrong(chosen, expected, got)
        for problem in problems:
            print(f"    {problem[:300]}")
        rows.append(Row(4, "pairs used of 2 x 2", f"{len(pairs)}: {sorted(pairs.values())}", "4", len(pairs) == 4))
        rows.append(Row(4, "wrong answers", f"{len(problems)} of {len(chosen)}", "0", not problems))
        stats = stack.stats()
        ports = [urlsplit(r.url).port for p in stack.client().pools() for r in p.replicas if r.url]
        expired = sum(s["nixl_num_failed_transfers_total"] for pool in stats.values() for s in pool)
        rows.append(Row(4, "distinct HTTP ports of 4 replicas", str(len(set(ports))), "4", len(set(ports)) == 4))
        rows.append(Row(4, "failed NIXL transfers", str(expired), "0", expired == 0))
        for pool in ("prefill", "decode"):
            rows += _kill_one(stack, pool)
        chosen = fresh("second")
        got = asyncio.run(ask_all(stack.url, chosen, num_clients=4))
        problems = wrong(chosen, expected, got)
        rows.append(Row(4, "wrong answers after both kills", f"{len(problems)} of {len(chosen)}", "0", not problems))
        rows.append(Row(4, "pairs used after both kills", str(len(pairs_of(got))), "4", len(pairs_of(got)) == 4))
    return rows


def fresh(salt: str) -> list[Case]:
    """The plain cases of the set, with a salt that no cache has seen, so that every prompt is computed in whole."""
    plain = [case for case in cases() if ":" not in case.name]
    return [Case(c.name, c.path, {**c.body, "cache_salt": f"{salt}-{i}"}) for i, c in enumerate(plain)]


def pairs_of(answers: list[Answer]) -> Counter[tuple[str, str]]:
    """How often each pair served a hand-off."""
    counted: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        prefill, decode = answer.headers.get("x-disagg-prefill", ""), answer.headers.get("x-disagg-decode", "")
        if prefill and prefill != "local":
            counted[prefill, decode] += 1
    return counted


def _kill_one(stack: Stack, pool: str) -> list[Row]:
    """SIGKILL one replica's process; wait until its successor is routable and has served."""
    with stack.client() as client:
        before = client.pool(pool).status().replicas
        victim = before[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        started = time.monotonic()

        def replaced() -> bool:
            now = client.pool(pool).status()
            return now.num_routable == 2 and victim.replica_id not in {r.replica_id for r in now.replicas}

        wait_until(replaced, RECOVERY_S, f"a killed {pool} replica is replaced and warm", 0.5)
        took = time.monotonic() - started
        successor = {r.replica_id for r in client.pool(pool).status().replicas} - {r.replica_id for r in before}
    answers = asyncio.run(ask_all(stack.url, cases()[:12], num_clients=4))
    header = f"x-disagg-{pool}"
    used = [a for a in answers if a.headers.get(header) in successor]
    return [
        Row(4, f"{pool} replica killed: successor warm after", f"{took:.0f} s", f"within {RECOVERY_S:g} s", True),
        Row(4, f"{pool} successor served", f"{len(used)} of {len(answers)}", "at least 1", bool(used)),
    ]
