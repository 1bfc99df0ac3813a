# SPDX-License-Identifier: Apache-2.0
"""Write `requirements/cpu.lock` from one resolver call over the `cpu` and `dev` extras; nothing is installed.

One call, because the parts of the stack do not resolve when one is added to a finished environment. Run it with
`make lock`. Where pip does not find `torch==...+cpu`, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
TOOLS = ["setuptools>=77", "uv", "wheel"]
DROPPED = {
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
}


def resolve() -> dict[str, str]:
    """Version by normalised name of everything the two extras need, as pip resolves it in this interpreter."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["dev"], *TOOLS]
    wanted = [f"{name}+cpu" if name.startswith("torch==") else name for name in wanted]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), *wanted], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in found}


def render(versions: dict[str, str]) -> str:
    """Text of the lock file: a header that names what is left out, then one `name==version` a line, sorted."""
    header = [
        "# SPDX-License-Identifier: Apache-2.0",
        f"# The CPU stack and the development tools, resolved on Python {sys.version_info[0]}.{sys.version_info[1]},"
        " Linux x86-64.",
        "# Regenerate with `make lock`. Install with `make setup`: it is complete, so nothing is resolved (--no-deps).",
        "# Left out on purpose:",
        *(f"#   {name}: {reason}" for name, reason in DROPPED.items() if name in versions),
    ]
    pins = [f"{name}=={version}" for name, version in sorted(versions.items()) if name not in DROPPED]
    return "\n".join([*header, *pins]) + "\n"


if __name__ == "__main__":
    LOCK.write_text(render(resolve()))
    print(f"wrote {LOCK.relative_to(ROOT)}")
