# SPDX-License-Identifier: Apache-2.0
"""What the newest releases of vLLM, Ray, LMCache and NIXL still have of the names that this project borrows.

`make check-upstream`, or `python scripts/check_upstream.py vllm==0.33.0` for one release. Nothing is installed: the
sources are read out of the wheel that pip would take, of which only they are fetched where the index answers requests
for a part of a file, else the whole. They stay in `.cache/upstream/`. Each name of the lists is compared with what is
installed here, the tested version, and the report is the list of work for an upgrade. Compiled names are not seen.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pools import borrowed as of_pools  # noqa: E402
from transport.in_engine.patches import borrowed as of_engines  # noqa: E402
from transport.upstream.compare import Found, digest, problem  # noqa: E402
from transport.upstream.names import TESTED, Borrowed  # noqa: E402
from transport.upstream.sources import ReadModule, Sources  # noqa: E402

CACHE = ROOT / ".cache" / "upstream"
PACKAGES = {"vllm": "vllm", "ray": "ray", "lmcache": "lmcache", "nixl": "nixl-cu13"}
"""Distribution by package whose newest release is looked at. We borrow no Python name of Mooncake's own: vLLM's
connector is what we extend; of its engine that connector uses what is in `MOONCAKE`."""
MOONCAKE = "mooncake-transfer-engine-cuda13"
BLOCK = 1 << 20
MARKS = {"same": "=", "changed": "~", "broken": "!", "moved": "!", "gone": "!"}


@dataclass(frozen=True)
class Finding:
    """One name in the newer release."""

    name: Borrowed
    state: Literal["same", "changed", "broken", "moved", "gone"]
    """`changed` is another body, other parameters or other members with which all our expectations still hold."""
    words: str = ""
    diff: str = ""


def judge(name: Borrowed, tested: Found | None, newest: Found | None, homes: Iterable[str] = ()) -> Finding:
    """What has become of one name. Pure.

    Args:
        homes: `module:name` of what is called alike elsewhere in the newer release.
    """
    fault = problem(name, newest)
    if newest is None:
        elsewhere = sorted(homes)
        return Finding(name, "moved" if elsewhere else "gone", ", ".join(elsewhere[:4]))
    diff = "" if tested is None else _diff(tested.source, newest.source)
    if fault is not None:
        return Finding(name, "broken", fault, diff)
    if tested is not None and tested.parameters != newest.parameters:
        return Finding(name, "changed", f"takes ({', '.join(newest.parameters or ())})", diff)
    if tested is None or digest(tested.source) == digest(newest.source):
        return Finding(name, "same")
    old, new = _members(tested.source), _members(newest.source)
    if old is None or new is None:
        return Finding(name, "changed", f"{_size(diff)} in its source", diff)
    # Of a class the members that are used have entries of their own; of the others it matters which there are.
    words = [f"{verb} {', '.join(sorted(some))}" for verb, some in (("gained", new - old), ("lost", old - new)) if some]
    return Finding(name, "changed" if words else "same", "; ".join(words))


def _members(source: str) -> set[str] | None:
    """Names of the methods of a class; None for anything else."""
    (node,) = ast.parse(textwrap.dedent(source)).body or (None,)
    if not isinstance(node, ast.ClassDef):
        return None
    return {one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}


def _diff(old: str, new: str) -> str:
    return "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), "tested", "newest", n=2, lineterm=""))


def _size(diff: str) -> str:
    lines = diff.splitlines()[2:]
    return f"+{sum(line.startswith('+') for line in lines)} -{sum(line.startswith('-') for line in lines)} lines"


def report(package: str, version: str, findings: Iterable[Finding], *, with_diffs: bool = False) -> str:
    """Everything but what is the same, name by name, and how many of each. Pure."""
    found = list(findings)
    counts = Counter(one.state for one in found)
    lines = [f"{package} {version} (tested: {TESTED[package]}): {len(found)} names, {_counts(counts)}"]
    for one in sorted(found, key=lambda f: (MARKS[f.state] != "!", f.name.name)):
        if one.state != "same":
            lines.append(f"  {MARKS[one.state]} {one.state:<8}{one.name.name}")
            lines.append(f"             {one.words}; used in {', '.join(one.name.used_in)}".replace("  ;", ""))
            if with_diffs and one.diff:
                lines += [f"             | {line}" for line in one.diff.splitlines()[2:]]
    return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[state]} {state}" for state in MARKS if counts[state]) or "none"


def homes_of(name: str, modules: Iterable[str], read: ReadModule) -> Iterator[str]:
    """Where else a top-level class or function of that name is defined. Reads as text first: most files lack it."""
    wanted = name.partition(":")[2].partition(".")[0]
    for module in modules:
        text = read(module) or ""
        if any(f"\n{word} {wanted}{end}" in f"\n{text}" for word in ("class", "def", "async def") for end in "(:["):
            yield f"{module}:{wanted}"


def installed(module: str) -> str | None:
    """Text of a module of this environment, which is not imported."""
    parts = module.split(".")
    top = importlib.util.find_spec(parts[0])
    if top is None or not top.submodule_search_locations:
        return None
    return _text(Path(next(iter(top.submodule_search_locations))).parent, module)


def _text(root: Path, module: str) -> str | None:
    path = root.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    return None


class RemoteFile(io.RawIOBase):
    """A file behind HTTP that is read in blocks. Raises OSError where the server sends no parts."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self._url, self._client, self._at = url, client, 0
        self._blocks: dict[int, bytes] = {}
        self.num_fetched = 0
        head = client.get(url, headers={"range": "bytes=-1"})
        if head.status_code != 206:
            raise OSError(f"status {head.status_code} for a part of a file")
        self._size = int(head.headers["content-range"].rpartition("/")[2])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        parts = []
        while self._at < end:
            number, start = divmod(self._at, BLOCK)
            part = self._block(number)[start : start + end - self._at]
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            last = min((number + 1) * BLOCK, self._size) - 1
            answer = self._client.get(self._url, headers={"range": f"bytes={number * BLOCK}-{last}"})
            if answer.status_code != 206:
                raise OSError(f"status {answer.status_code} for a part of a file")
            self._blocks[number] = answer.content
            self.num_fetched += len(answer.content)
        return self._blocks[number]


def release(requirement: str) -> tuple[str, str]:
    """Version and URL of the wheel that pip would install for a requirement. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
        command += ["--only-binary", ":all:", "--report", str(out), requirement]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        (item,) = json.loads(out.read_text())["install"]
    return item["metadata"]["version"], item["download_info"]["url"]


def fetch(distribution: str, requirement: str) -> tuple[str, Path]:
    """Version, and the folder with the Python files of its wheel."""
    version, url = release(requirement)
    folder = CACHE / f"{distribution}-{version}"
    if not folder.is_dir():
        started = time.monotonic()
        partial = folder.with_suffix(".partial")
        try:
            with httpx.Client(follow_redirects=True, timeout=120) as client:
                remote = RemoteFile(url, client)
                _unpack(zipfile.ZipFile(remote), partial)
            fetched = remote.num_fetched
        except (OSError, httpx.HTTPError) as exc:
            print(f"{distribution} {version}: the whole wheel is fetched ({exc})", file=sys.stderr)
            with tempfile.TemporaryDirectory() as whole:
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
                subprocess.run([*command, "--dest", whole, f"{distribution}=={version}"], check=True)
                (wheel,) = Path(whole).glob("*.whl")
                _unpack(zipfile.ZipFile(wheel), partial)
                fetched = wheel.stat().st_size
        partial.rename(folder)
        took = time.monotonic() - started
        print(f"{distribution} {version}: {fetched / 2**20:.0f} MiB in {took:.0f} s", file=sys.stderr)
    return version, folder


def _unpack(wheel: zipfile.ZipFile, folder: Path) -> None:
    """The Python files, in the order in which they lie in the archive."""
    for member in sorted(wheel.infolist(), key=lambda one: one.header_offset):
        if member.filename.endswith(".py"):
            wheel.extract(member, folder)


def check(package: str, requirement: str) -> tuple[str, list[Finding]]:
    """Every borrowed name of one package in the release that pip takes for the requirement."""
    version, folder = fetch(PACKAGES[package], requirement)
    read = functools.partial(_text, folder)
    own = "nixl_cu13" if package == "nixl" else package
    # The wheel is alone, so what is installed must not be followed into other packages either.
    tested = Sources(lambda module: installed(module) if module.partition(".")[0] in (package, own) else None)
    newest = Sources(read)
    modules = [path.relative_to(folder).with_suffix("").as_posix().replace("/", ".") for path in folder.rglob("*.py")]
    findings = []
    for name in dict.fromkeys((*of_engines.BORROWED, *of_pools.BORROWED)):
        if name.package == package:
            found = newest.find(name.name.replace(f"{package}.", f"{own}.", 1) if own != package else name.name)
            homes = homes_of(name.name, modules, read) if found is None else ()
            findings.append(judge(name, tested.find(name.name), found, homes))
    return version, findings


def main() -> int:
    """0 when everything was looked at, whatever was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "requirement", nargs="*", help="releases, as `vllm==0.33.0`; the newest of each package if none"
    )
    parser.add_argument("--diff", action="store_true", help="show what changed in each source")
    arguments = parser.parse_args()
    wanted = arguments.requirement or [*PACKAGES.values(), MOONCAKE]
    unknown = [one for one in wanted if one.partition("==")[0] not in (*PACKAGES.values(), MOONCAKE)]
    if unknown:
        parser.error(f"{', '.join(unknown)}: only {', '.join((*PACKAGES.values(), MOONCAKE))} are looked at")
    with ThreadPoolExecutor() as threads:
        for text in threads.map(functools.partial(_report, with_diffs=arguments.diff), wanted):
            print(text, flush=True)
    return 0


def _report(requirement: str, *, with_diffs: bool) -> str:
    distribution = requirement.partition("==")[0]
    if distribution == MOONCAKE:
        return _mooncake(requirement)
    package = next(own for own, name in PACKAGES.items() if name == distribution)
    version, findings = check(package, requirement)
    return report(package, version, findings, with_diffs=with_diffs)


def _mooncake(requirement: str) -> str:
    version, _ = release(requirement)
    return (
        f"mooncake {version}: no Python name is borrowed; vLLM's connector loads the compiled `mooncake.engine`, and "
        "what we take of that connector is listed under vllm"
    )


if __name__ == "__main__":
    sys.exit(main())
