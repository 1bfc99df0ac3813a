# SPDX-License-Identifier: Apache-2.0
"""Whether everything that `requirements/gpu.lock` installs finds the shared libraries it is linked against.

`make check-gpu-set`. Needs no GPU and installs nothing: the wheels are fetched once, 4 GB, and what their binaries link
against is kept in `build/gpu-set/`. Each library must be in the set where the loader finds it, come with a package of
the base image, or with the driver (`scripts/gpu_node.py` lists both). And each requirement that a wheel states must be
met by the lock. What a program opens by name while it runs is not seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import wheels as reader  # noqa: E402
from scripts.gpu_node import BASE, DRIVER, GLIBC, LOADED_FIRST, OPTIONAL, Optional, Package  # noqa: E402
from scripts.lock import GPU, pins  # noqa: E402
from scripts.wheels import Binary, Wheel, read_wheel  # noqa: E402

CACHE = ROOT / "build" / "gpu-set"
OUT = ROOT / "build" / "check-gpu-set.json"


By = Literal["set", "base", "driver", "optional", "missing"]


@dataclass(frozen=True)
class Link:
    """One library that one binary is linked against, and who brings it."""

    wheel: str
    path: str
    library: str
    by: By
    words: str = ""
    """The package of the base image, why it is optional, or what to do about a missing one."""


@dataclass(frozen=True)
class Unmet:
    """One requirement that the lock does not meet."""

    wheel: str
    requirement: str
    found: str
    """The version in the lock, or that it is absent."""


def judge(
    wheels: Iterable[Wheel],
    *,
    base: Iterable[Package] = BASE,
    driver: Iterable[str] = DRIVER,
    first: Iterable[str] = tuple(LOADED_FIRST),
    optional: Iterable[Optional] = OPTIONAL,
) -> list[Link]:
    """Who brings each library that a binary of the set is linked against. Pure.

    A library in the set counts where the binary's own search path reaches it, where it is in the same wheel, or where
    what is loaded `first` has loaded it. The last two do not help a program, which starts with nothing loaded.
    """
    wheels = list(wheels)
    at = {binary.path: binary for wheel in wheels for binary in wheel.binaries}
    loaded = {name for binary in _loaded(at, first) for name in binary.names}
    packages = {library: package.name for package in base for library in package.libraries}
    owners: dict[str, set[str]] = {}
    for wheel in wheels:
        for binary in wheel.binaries:
            for name in binary.names:
                owners.setdefault(name, set()).add(wheel.name)

    def brought(wheel: str, binary: Binary, library: str) -> tuple[By, str]:
        there = wheel in owners.get(library, ()) or library in loaded
        if _reached(binary, library, at) or (there and not binary.is_program):
            return "set", ""
        if library in packages:
            return "base", packages[library]
        if library in driver:
            return "driver", ""
        for entry in optional:
            if excuses(entry, wheel, binary.path, library):
                return "optional", entry.reason
        return "missing", action(wheel, library, owners)

    return [
        Link(wheel.name, binary.path, library, *brought(wheel.name, binary, library))
        for wheel in wheels
        for binary in wheel.binaries
        for library in binary.needed
    ]


def _reached(binary: Binary, library: str, at: Mapping[str, Binary]) -> Binary | None:
    return next((at[path] for folder in binary.folders if (path := f"{folder}/{library}") in at), None)


def _loaded(at: Mapping[str, Binary], first: Iterable[str]) -> list[Binary]:
    """What is loaded first, and all that this loads out of the set."""
    waiting = [path for path in at if any(fnmatchcase(path, pattern) for pattern in first)]
    seen = dict.fromkeys(waiting)
    while waiting:
        binary = at[waiting.pop()]
        reached = [found.path for library in binary.needed if (found := _reached(binary, library, at))]
        waiting += [path for path in reached if path not in seen]
        seen |= dict.fromkeys(reached)
    return [at[path] for path in seen]


def excuses(entry: Optional, wheel: str, path: str, library: str) -> bool:
    """Whether a library may be missing there by this entry. Pure."""
    named = entry.wheel == wheel and fnmatchcase(path, entry.path)
    return named and any(fnmatchcase(library, pattern) for pattern in entry.libraries)


def action(wheel: str, library: str, owners: Mapping[str, Iterable[str]]) -> str:
    """What to do about a missing library. Pure.

    Args:
        owners: the wheels that have a library, by its name.
    """
    if library in owners:
        return f"{', '.join(sorted(owners[library]))} has it for itself alone; {wheel} has to bring or to load its own"
    stem = library.partition(".so")[0]
    if others := sorted(name for name in owners if name.partition(".so")[0] == stem):
        return f"the set has {', '.join(others)}: take the build of {wheel} that is linked against it"
    return "add the package that brings it to the `gpu` extra, or to TO_INSTALL in scripts/gpu_node.py if a node has it"


def unmet(
    wheels: Iterable[Wheel], roots: Iterable[str], left_out: Iterable[str], environment: Mapping[str, str]
) -> tuple[list[Unmet], int]:
    """Requirements that the set does not meet, and how many there are in all. Pure.

    Every wheel of the set is asked, with the extras that others ask of it, as pip would.

    Args:
        roots: the requirements of this project.
        left_out: names that the lock leaves out on purpose.
        environment: values of the markers, as packaging has them.
    """
    by_name = {wheel.name: wheel for wheel in wheels}
    missing: dict[tuple[str, str], Unmet] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("disagg", line, "") for line in roots]
    waiting += [(wheel.name, line, "") for wheel in by_name.values() for line in wheel.requires]
    while waiting:
        asker, line, extra = waiting.pop()
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        if (asker, line) in seen or name in left_out:
            continue
        seen.add((asker, line))
        wheel = by_name.get(name)
        if wheel is None:
            missing[asker, line] = Unmet(asker, line, "absent")
        elif not wanted.specifier.contains(wheel.version, prereleases=True):
            missing[asker, line] = Unmet(asker, line, wheel.version)
        else:
            waiting += [(name, more, asked) for asked in wanted.extras for more in wheel.requires]
    return sorted(missing.values(), key=lambda one: (one.wheel, one.requirement)), len(seen)


def exchange(
    locked: Mapping[str, str], roots: Iterable[str], swaps: Mapping[str, Requirement]
) -> tuple[dict[str, str], list[str]]:
    """The pins and the project's requirements with some packages exchanged for others. Pure.

    Args:
        swaps: what comes instead, as `name==version`, by the name that goes.
    """
    chosen = {name: version for name, version in locked.items() if name not in swaps}
    chosen |= {canonicalize_name(new.name): str(new.specifier).removeprefix("==") for new in swaps.values()}
    kept = [line for line in roots if canonicalize_name(Requirement(line).name) not in swaps]
    return chosen, [*kept, *map(str, swaps.values())]


def fetch(chosen: Mapping[str, str]) -> list[Wheel]:
    """What the wheels of the pins say, of those that are not known yet from the wheels themselves.

    Raises CalledProcessError where pip finds none. Facts are kept by what reads them and by the Python they are for.
    """
    version = hashlib.sha256(Path(reader.__file__).read_bytes()).hexdigest()[:12]
    folder = CACHE / f"{sys.implementation.cache_tag}-{version}"
    facts = {name: folder / f"{name}-{Version(version)}.json" for name, version in chosen.items()}
    # `===`: to `==` a build `+cpu` of torch, where pip knows of one, is the newer of the two.
    lines = [f"{name}==={version}" for name, version in chosen.items() if not facts[name].exists()]
    if lines:
        _download(lines, folder / "wheels")
        started, size = time.monotonic(), 0
        for file in sorted((folder / "wheels").glob("*.whl")):
            wheel = read_wheel(file)
            size += wheel.size
            (folder / f"{wheel.name}-{Version(wheel.version)}.json").write_text(wheel.model_dump_json())
            file.unlink()
        print(f"read {size / 2**20:.0f} MiB in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return [Wheel.model_validate_json(file.read_text()) for file in facts.values()]


def _download(lines: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "requirements.txt"
    listing.write_text("\n".join(lines))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--progress-bar", "off", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), "--requirement", str(listing)]
    print(f"fetching {len(lines)} wheels", file=sys.stderr)
    started = time.monotonic()
    subprocess.run(command, check=True)
    size = sum(file.stat().st_size for file in folder.glob("*.whl"))
    print(f"fetched {size / 2**20:.0f} MiB in {time.monotonic() - started:.0f} s", file=sys.stderr)


def too_new(wheels: Iterable[Wheel]) -> list[Wheel]:
    """Wheels that ask for a newer glibc than a node must have. Pure."""
    return [wheel for wheel in wheels if wheel.glibc and wheel.glibc > GLIBC]


def report(links: Iterable[Link], wanting: Iterable[Unmet], newer: Iterable[Wheel]) -> Iterator[str]:
    """Everything that a reader has to know: what is optional, what a node brings, and last what is missing. Pure."""
    links = list(links)
    yield "optional, and not there:"
    groups: dict[tuple[str, str], list[Link]] = {}
    for one in links:
        if one.by == "optional":
            groups.setdefault((one.wheel, one.words), []).append(one)
    for (wheel, reason), some in groups.items():
        paths = sorted({one.path for one in some})
        yield f"  {wheel}: {', '.join(sorted({one.library for one in some}))}"
        yield f"    {paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
    yield "from the base image:"
    users = Counter((one.words, one.library) for one in links if one.by == "base")
    for package in BASE:
        yield f"  {package.name}: {', '.join(f'{x} ({users[package.name, x]})' for x in package.libraries)}"
    excused = [one for one in links if one.by == "optional"]
    present = {one.wheel for one in links}
    for entry in OPTIONAL:
        used = any(excuses(entry, one.wheel, one.path, one.library) for one in excused)
        if entry.wheel in present and not used:
            yield f"lacks nothing, its line in scripts/gpu_node.py can go: {entry.wheel} {entry.path}"
    for one in links:
        if one.by == "missing":
            yield f"MISSING {one.wheel} {one.path}: {one.library}; {one.words}"
    for lack in wanting:
        yield f"UNMET {lack.wheel} asks for {lack.requirement}, the lock has {lack.found}; change a pin of the extra"
    for wheel in newer:
        yield f"GLIBC {wheel.name} asks for {_dotted(wheel.glibc)}, GLIBC in scripts/gpu_node.py is {_dotted(GLIBC)}"


def summary(wheels: Iterable[Wheel], links: Iterable[Link], wanting: Iterable[Unmet], num_requirements: int) -> str:
    """One line of counts. Pure."""
    wheels, counts = list(wheels), Counter(one.by for one in links)
    size = sum(wheel.size for wheel in wheels) / 2**20
    oldest = max((wheel.glibc for wheel in wheels if wheel.glibc), default=None)
    return (
        f"{len(wheels)} wheels of {size:.0f} MiB, {sum(len(wheel.binaries) for wheel in wheels)} binaries, "
        f"{counts.total()} libraries asked for: {counts['set']} in the set, {counts['base']} of the base image, "
        f"{counts['driver']} of the driver, {counts['optional']} optional, {counts['missing']} missing; "
        f"{len(list(wanting))} of {num_requirements} requirements not met; glibc {_dotted(oldest)}"
    )


def _dotted(version: tuple[int, int] | None) -> str:
    return "any" if version is None else f"{version[0]}.{version[1]}"


def _swap(text: str) -> tuple[str, Requirement]:
    """The name that goes and the pin that comes of `name=other==version`. Raises ArgumentTypeError."""
    old, _, new = text.partition("=")
    try:
        wanted = Requirement(new)
    except InvalidRequirement as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: {exc}; give name=other==version") from exc
    if not str(wanted.specifier).startswith("=="):
        raise argparse.ArgumentTypeError(f"{text!r}: no version; give name=other==version")
    return canonicalize_name(old), wanted


def main() -> int:
    """0 when nothing is missing and every requirement is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--replace",
        type=_swap,
        action="append",
        default=[],
        metavar="NAME=OTHER==VERSION",
        help="look at the set with one package exchanged",
    )
    swaps = dict(parser.parse_args().replace)
    locked = pins(GPU.path.read_text())
    if unknown := set(swaps) - set(locked):
        parser.error(f"{', '.join(sorted(unknown))}: not in {GPU.path.relative_to(ROOT)}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    roots = [
        *project["dependencies"],
        *(line for name in GPU.extras for line in project["optional-dependencies"][name]),
    ]
    chosen, roots = exchange(locked, roots, swaps)
    wheels = fetch(chosen)
    links = judge(wheels)
    wanting, num_requirements = unmet(wheels, roots, GPU.dropped, default_environment())
    newer = too_new(wheels)
    for line in report(links, wanting, newer):
        print(line)
    last = summary(wheels, links, wanting, num_requirements)
    print(last)
    found = {
        "summary": last,
        "replaced": {name: str(new) for name, new in swaps.items()},
        "num_bytes": sum(wheel.size for wheel in wheels),
        "links": dict(Counter(one.by for one in links)),
        "missing": [asdict(one) for one in links if one.by == "missing"],
        "optional": [asdict(one) for one in links if one.by == "optional"],
        "unmet": [asdict(one) for one in wanting],
        "newer_glibc": [wheel.name for wheel in newer],
    }
    OUT.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if found["missing"] or wanting or newer else 0


if __name__ == "__main__":
    sys.exit(main())
