# SPDX-License-Identifier: Apache-2.0
"""What proofs ask of Ray Serve itself, through the dashboard of a running stack: deploy a file, and what runs where."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.support.stack import ROOT, Stack, wait_until

_DASHBOARD = re.compile(r"http://[\w.]+:\d+")


@contextlib.contextmanager
def open_dashboard() -> Iterator[None]:
    """Stacks that start meanwhile have a dashboard that asks nobody for a token. It listens on this machine only."""
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_AUTH_MODE"]
        else:
            os.environ["RAY_AUTH_MODE"] = before


def dashboard(stack: Stack) -> str:
    """URL of the dashboard of the stack's Ray, as its log says."""
    for line in stack.log.read_text(errors="replace").splitlines():
        if "View the dashboard at" in line and (found := _DASHBOARD.search(line)):
            return found.group()
    raise RuntimeError(f"{stack.log} names no dashboard")


def deploy(stack: Stack, config: Path) -> None:
    """`serve deploy`. Returns when Serve has taken the file, not when it is done with it."""
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(config), "--address", dashboard(stack)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120, stdout=subprocess.DEVNULL)


def application(stack: Stack) -> dict[str, Any]:
    """Serve's details of the one application; empty while nobody tells them."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    with contextlib.suppress(RuntimeError, ConnectionError, OSError):
        details = ServeSubmissionClient(dashboard(stack)).get_serve_details()
        found: dict[str, Any] = next(iter(details["applications"].values()), {})
        return found
    return {}


def serve_replicas(stack: Stack, deployment: str) -> dict[str, int]:
    """Process ids of the running replicas of a deployment, by replica id."""
    replicas = application(stack).get("deployments", {}).get(deployment, {}).get("replicas", [])
    return {r["replica_id"]: int(r["pid"]) for r in replicas if r["state"] == "RUNNING" and r["pid"]}


def wait_settled(stack: Stack, timeout_s: float = 300.0) -> float:
    """Seconds until Serve says that the application runs and nothing of it starts or stops."""

    def settled() -> bool:
        app = application(stack)
        parts = app.get("deployments", {}).values()
        return app.get("status") == "RUNNING" and all(
            part["status"] == "HEALTHY" and all(r["state"] == "RUNNING" for r in part["replicas"]) for part in parts
        )

    return wait_until(settled, timeout_s, "the application runs as its file says", 0.5)


def controller(stack: Stack) -> psutil.Process:
    """The process of Serve's controller."""
    family = psutil.Process(stack.process.pid).children(recursive=True)
    found = [process for process in family if "ServeController" in " ".join(process.cmdline()[:1])]
    assert len(found) == 1, f"{len(found)} controllers"
    return found[0]
