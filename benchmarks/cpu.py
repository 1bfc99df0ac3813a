# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of processes and all their children, from /proc (Linux).

Uses the scheduler's nanosecond accounting of each thread; where the kernel keeps none, the 10 ms ticks of the
process. `python -m benchmarks.cpu PID ... --interval 5` prints the share of one CPU.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def descendants(pids: Iterable[int]) -> set[int]:
    """`pids` and every live process below them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    left = list(pids)
    while left:
        pid = left.pop()
        if pid not in found and Path(f"/proc/{pid}").exists():
            found.add(pid)
            left += children.get(pid, [])
    return found


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def command(pid: int) -> str:
    """Command line of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def cpu_seconds(pid: int) -> float:
    """User and system time of one process so far; 0 when it is gone. Ended threads count from their ticks only."""
    root = Path(f"/proc/{pid}")
    try:
        nanoseconds = sum(int((task / "schedstat").read_text().split()[0]) for task in (root / "task").iterdir())
        if nanoseconds:
            return nanoseconds / 1e9
        fields = (root / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S
    except (OSError, IndexError):
        return 0.0


class CpuMeter:
    """CPU seconds between two looks, by group of processes."""

    def __init__(self, groups: Callable[[], dict[str, set[int]]]) -> None:
        """`groups` names the processes to look at; it is asked once, at the start."""
        self._groups = groups()
        self._before = {pid: cpu_seconds(pid) for pids in self._groups.values() for pid in pids}
        self._started_at = time.perf_counter()

    def read(self) -> dict[str, float]:
        """CPU seconds of each group since the start."""
        return {
            name: sum(max(0.0, cpu_seconds(pid) - self._before[pid]) for pid in pids)
            for name, pids in self._groups.items()
        }

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pid", type=int, nargs="+")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds")
    args = parser.parse_args()
    meter = CpuMeter(lambda: {f"{pid} {command(pid)[:60]}": {pid} for pid in sorted(descendants(args.pid))})
    time.sleep(args.interval)
    for name, seconds in meter.read().items():
        print(f"{100 * seconds / meter.elapsed_s:6.1f} %  {name}")


if __name__ == "__main__":
    main()
