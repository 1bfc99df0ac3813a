# SPDX-License-Identifier: Apache-2.0
"""Line 2: five starts that cannot succeed, by `disagg serve` on real engines: told, ended, and nothing left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from disagg.cli.processes import shared_files
from tests.prove.report import ROOT, Row
from tests.support.stack import BUILD, free_port, tiny_model, write_config

LINE = 2
TOLD_S = 5.0
ENDED_S = 90.0
GIVEN_UP_AFTER_S = 300.0

Change = Callable[[dict[str, Any]], None]


@dataclass
class Start:
    """One `disagg serve` that is to fail."""

    what: str
    change: Change
    reason: str
    """What the terminal must say, as the engine or Ray says it."""
    dies: str
    """What the log says when the first engine dies, or a place is first looked for in vain."""
    told_at: float | None = None
    died_at: float | None = None
    lines: list[str] = field(default_factory=list)


def starts_that_cannot_succeed() -> list[Row]:
    rows = []
    for start in (_bad_value(), _no_kv_space(), _no_tier(), _no_model(), _no_place()):
        rows += _run(start)
    return rows


def _args(**changes: Any) -> Change:
    """Sets entries of `args`, at `a__b__c`."""

    def apply(config: dict[str, Any]) -> None:
        for path, value in changes.items():
            *parents, last = path.split("__")
            found = config["applications"][0]["args"]
            for parent in parents:
                found = found.setdefault(parent, {})
            found[last] = value

    return apply


def _bad_value() -> Start:
    return Start(
        "a value that only the model's own code refuses",
        _args(model__engine_kwargs__hf_overrides={"num_attention_heads": 7}),
        "num_heads (7) is not divisible",
        "num_heads (7) is not divisible",
    )


def _no_kv_space() -> Start:
    return Start(
        "no memory for the KV of one prompt",
        _args(model__engine_kwargs__num_gpu_blocks_override=4),
        "KV space",
        "KV space",
    )


def _no_tier() -> Start:
    return Start(
        "a tier that the engine cannot use",
        _args(offload={"cpu_gib": 0.25, "block_tokens": 48}),
        "not a multiple",
        "not a multiple",
    )


def _no_model() -> Start:
    model = BUILD / "no-model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(tiny_model(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"], "model_type": "none"}))
    return Start("a model that is none", _args(model__source=str(model)), "none", "none")


def _no_place() -> Start:
    def change(config: dict[str, Any]) -> None:
        for deployment in config["applications"][0]["deployments"]:
            if deployment["name"] == "decode":
                deployment["ray_actor_options"] = {"resources": {"a_thing_that_no_node_has": 1}}

    # Serve itself says so half a minute after it has looked for one.
    return Start("a place that no node has", change, "a_thing_that_no_node_has", "replicas that have taken more than")


def _run(start: Start) -> list[Row]:
    name = "prove-use-start"
    config = write_config(ROOT / "configs" / "quickstart.yaml", name=name, port=free_port(), change=start.change)
    log = BUILD / f"{name}.log"
    log.unlink(missing_ok=True)
    before = shared_files()
    began, began_at = time.monotonic(), time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "disagg.cli.main", "serve", str(config), "--log-file", str(log)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    reader = threading.Thread(target=_read, args=(process, start), daemon=True)
    reader.start()
    while process.poll() is None and time.monotonic() - began < GIVEN_UP_AFTER_S:
        if start.died_at is None and log.exists() and start.dies in log.read_text(errors="replace"):
            start.died_at = time.monotonic()
        time.sleep(0.05)
    if process.poll() is None:
        process.terminate()
    code = process.wait(120)
    reader.join(10)
    took = time.monotonic() - began
    for line in start.lines:
        print(f"    | {line}")
    return [
        *_rows(start, code, took),
        _nothing("files left in /dev/shm", [file.name for file in sorted(shared_files() - before)]),
        _nothing("processes left", _processes_left(began_at)),
    ]


def _rows(start: Start, code: int, took: float) -> list[Row]:
    told = next((line for line in start.lines if start.reason in line), None)
    delay = None
    if start.told_at is not None:
        # What the check refuses is told before any engine starts.
        delay = 0.0 if start.died_at is None else max(0.0, start.told_at - start.died_at)
    shown = "never" if delay is None else f"{delay:.2f} s"
    ended = f"{took:.0f} s, code {code}"
    return [
        Row(LINE, f"{start.what}: told", (told or "not at all")[:110], start.reason, told is not None),
        Row(LINE, "after the first death", shown, f"{TOLD_S:g} s", delay is not None and delay <= TOLD_S),
        Row(LINE, "ended after", ended, f"{ENDED_S:g} s, code not 0", took <= ENDED_S and code > 0),
    ]


def _nothing(what: str, found: list[str]) -> Row:
    return Row(LINE, what, ", ".join(found) or "0", "0", not found)


def _read(process: subprocess.Popen[bytes], start: Start) -> None:
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip("\n")
        start.lines.append(line)
        if start.told_at is None and start.reason in line:
            start.told_at = time.monotonic()


def _processes_left(began: float) -> list[str]:
    """Of Ray, of engines and of ours, started since then and still there."""
    left = []
    for process in psutil.process_iter(["pid", "create_time", "cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        ours = any(word in words for word in ("ray", "VLLM", "lmcache", "disagg"))
        if ours and process.info["create_time"] > began and process.info["status"] != psutil.STATUS_ZOMBIE:
            left.append(f"{process.pid} {words[:60]}")
    return left
