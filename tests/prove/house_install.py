# SPDX-License-Identifier: Apache-2.0
"""Line 5: the wheel and its three dependencies, as pip installs them in a fresh environment, beside real engines."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.prove.report import ROOT, Row
from tests.support.base_install import FIRST_CLIENT, BaseInstall, base_closure, build_wheel, create
from tests.support.stack import Stack, running, tiny_model

LINE = 5
IMPORT_MS = 150.0
NUM_IMPORTS = 20
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def base_install() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="disagg-base-") as directory:
        where = Path(directory)
        install = create(where / "env")
        pip = [sys.executable, "-m", "pip", "--python", str(install.python), "install", "--quiet"]
        subprocess.run([*pip, str(build_wheel(where))], check=True)
        elsewhere = where / "elsewhere"
        (elsewhere / ".cache").mkdir(parents=True)
        (elsewhere / ".cache" / "tiny-model").symlink_to(tiny_model())
        rows = [_packages(install), _help(install, elsewhere), *_checks(install, elsewhere)]
        with running(ROOT / "configs" / "quickstart.yaml", name="prove-base-install") as stack:
            rows += [_status(install, elsewhere, stack), *(_scale(install, elsewhere, stack, size) for size in (2, 1))]
        # Last, with the engines gone: it is the one figure of time.
        return [*rows, *_imports(install)]


def _packages(install: BaseInstall) -> Row:
    found, expected = install.distributions(), {"disagg", *base_closure()}
    unasked = found - expected
    return Row(
        LINE, "packages beside the wheel, its three and theirs", ", ".join(unasked) or "none", "none", not unasked
    )


def _help(install: BaseInstall, cwd: Path) -> Row:
    said = install.run("disagg", "--help", cwd=cwd)
    return Row(LINE, "disagg --help", _outcome(said), "exit 0", said.returncode == 0)


def _checks(install: BaseInstall, cwd: Path) -> list[Row]:
    rows = []
    for file in CONFIGS:
        said = install.run("disagg", "check", str(file), cwd=cwd)
        last = said.stdout.strip().rpartition("\n")[2].rpartition(": ")[2]
        reported = not said.stderr and last.startswith("ok" if said.returncode == 0 else "cannot start")
        rows.append(
            Row(LINE, f"disagg check {file.name}", last or _outcome(said), "ok", reported and not said.returncode)
        )
    return rows


def _status(install: BaseInstall, cwd: Path, stack: Stack) -> Row:
    said = install.run("disagg", "status", "--url", stack.url, cwd=cwd, DISAGG_API_KEY=stack.admin_key)
    shown = "prefill: target 1, routable 1" in said.stdout and "decode: target 1, routable 1" in said.stdout
    return Row(LINE, "disagg status", _outcome(said), "both pools, routable", said.returncode == 0 and shown)


def _scale(install: BaseInstall, cwd: Path, stack: Stack, size: int) -> Row:
    command = ("disagg", "scale", "decode", str(size), "--url", stack.url)
    said = install.run(*command, cwd=cwd, DISAGG_API_KEY=stack.admin_key)
    with stack.client() as client:
        reached = client.pool("decode").status().has_size(size)
    figure = said.stdout.strip() or _outcome(said)
    return Row(LINE, f"disagg scale decode {size}", figure, f"{size} ready", said.returncode == 0 and reached)


def _imports(install: BaseInstall) -> list[Row]:
    imports = install.import_ms(num_runs=NUM_IMPORTS)
    client = install.import_ms(FIRST_CLIENT, num_runs=NUM_IMPORTS)
    median = statistics.median(imports)
    return [
        Row(LINE, f"import of the SDK, median of {NUM_IMPORTS}", _ms(imports), f"{IMPORT_MS:g} ms", median < IMPORT_MS),
        Row(LINE, "the same and a first client", _ms(client), "printed", True),
    ]


def _ms(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ms ({min(values):.0f} to {max(values):.0f})"


def _outcome(said: subprocess.CompletedProcess[str]) -> str:
    words = said.stderr.strip().rpartition("\n")[2]
    return f"exit {said.returncode}" + (f": {words[:80]}" if words else "")
