# SPDX-License-Identifier: Apache-2.0
"""A fresh environment with this project's wheel and what the base install asks for, and nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("disagg", "pools", "transport")
BASE = ("httpx", "pydantic", "pyyaml")
IMPORT_SDK = "import disagg\ndisagg.Client, disagg.AsyncClient"
FIRST_CLIENT = 'import disagg\ndisagg.Client("http://127.0.0.1:8000").close()'
_TIMED = "import time\nstarted = time.{clock}()\n{code}\nprint((time.{clock}() - started) * 1000)"


@dataclass(frozen=True)
class BaseInstall:
    """The environment."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def run(self, *command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """The outcome of a program of this environment, such as `disagg`; nothing of the caller's own is in sight."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DISAGG_"))}
        path = f"{self.directory / 'bin'}:/usr/bin:/bin"
        return subprocess.run(
            [str(self.directory / "bin" / command[0]), *command[1:]],
            cwd=cwd,
            env={**clean, "PATH": path, **env},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def distributions(self) -> set[str]:
        """Normalised names of all that is installed."""
        names = self.run(
            "python", "-c", "import importlib.metadata as m; print(*(d.name for d in m.distributions()))", cwd=ROOT
        )
        return {_normal(name) for name in names.stdout.split()}

    def import_ms(self, code: str = IMPORT_SDK, *, clock: str = "perf_counter", num_runs: int = 10) -> list[float]:
        """Milliseconds that `code` takes in a process of its own, for each of `num_runs` processes."""
        timed = _TIMED.format(clock=clock, code=code)
        return [float(self.run("python", "-c", timed, cwd=self.directory).stdout) for _ in range(num_runs)]


def create(directory: Path) -> BaseInstall:
    """An environment without any package, pip included."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    return BaseInstall(directory)


def build_wheel(into: Path) -> Path:
    """The wheel of this checkout, built from a copy: what an earlier build left behind would get into it."""
    source = into / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(into)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = into.glob("*.whl")
    return wheel


def install_wheel(install: BaseInstall, wheel: Path) -> None:
    """Install the wheel alone; asks no index."""
    command = [sys.executable, "-m", "pip", "--python", str(install.python), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", "--no-warn-script-location", str(wheel)], check=True)


def copy_base(install: BaseInstall) -> None:
    """Copy the three dependencies and what they need from the environment that runs this, so that no index is asked."""
    (place,) = install.directory.glob("lib/python*/site-packages")
    for name in base_closure():
        for file in importlib.metadata.distribution(name).files or ():
            if file.parts[0] != ".." and file.suffix != ".pyc":
                target = place / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target)
    subprocess.run([str(install.python), "-m", "compileall", "-q", str(place)], check=True)


def base_closure() -> set[str]:
    """Names of the three dependencies and of everything that they need."""
    found: set[str] = set()
    queue = list(BASE)
    while queue:
        name = _normal(queue.pop())
        if name not in found:
            found.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or ())
            queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
