# SPDX-License-Identifier: Apache-2.0
"""What a wheel says of itself before it is installed: what it requires, and what its binaries link against."""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from elftools.elf.elffile import ELFFile
from packaging.metadata import parse_email
from packaging.utils import canonicalize_name, parse_wheel_filename
from pydantic import BaseModel, ConfigDict

MAGIC = b"\x7fELF"
MACHINE = "EM_X86_64"
OLD_NAMES = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
"""glibc of the platform tags that do not name it."""


class Binary(BaseModel):
    """One shared object or program of a wheel, of the dynamic section of its ELF header."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Below site-packages."""
    soname: str | None = None
    needed: tuple[str, ...] = ()
    """Names of the libraries that the loader looks for (DT_NEEDED)."""
    folders: tuple[str, ...] = ()
    """Folders below site-packages where it looks first (DT_RUNPATH and DT_RPATH with $ORIGIN)."""
    is_program: bool = False
    """Starts a process of its own, into which nothing has been loaded before."""

    @property
    def names(self) -> set[str]:
        """Under which others find it."""
        return {posixpath.basename(self.path), *((self.soname,) if self.soname else ())}


class Wheel(BaseModel):
    """One wheel."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Normalised."""
    version: str
    size: int
    """Bytes of the file."""
    glibc: tuple[int, int] | None = None
    """The oldest that it is tagged for; None without compiled code."""
    requires: tuple[str, ...] = ()
    binaries: tuple[Binary, ...] = ()
    num_foreign: int = 0
    """Binaries for other machines than x86-64, which are not looked at."""


def read_wheel(file: Path) -> Wheel:
    """Read every ELF file of a wheel, whatever its name. Unpacks each in memory, up to half a GB.

    Raises zipfile.BadZipFile or elftools' ELFError for a damaged one, KeyError for a wheel without METADATA.
    """
    name, version, _, tags = parse_wheel_filename(file.name)
    binaries, num_foreign = [], 0
    with zipfile.ZipFile(file) as archive:
        (metadata,) = [m for m in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", m)]
        fields, _ = parse_email(archive.read(metadata))
        for member in archive.infolist():
            with archive.open(member) as stream:
                if stream.read(len(MAGIC)) != MAGIC:
                    continue
                elf = ELFFile(io.BytesIO(MAGIC + stream.read()))
            if elf.header.e_machine == MACHINE:
                binaries.append(_read(elf, installed_path(member.filename)))
            else:
                num_foreign += 1
    return Wheel(
        name=canonicalize_name(name),
        version=str(version),
        size=file.stat().st_size,
        glibc=glibc(tag.platform for tag in tags),
        requires=tuple(fields.get("requires_dist", ())),
        binaries=tuple(binaries),
        num_foreign=num_foreign,
    )


def _read(elf: ELFFile, path: str) -> Binary:
    tags = [tag for segment in elf.iter_segments("PT_DYNAMIC") for tag in segment.iter_tags()]
    soname = next((tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME"), None)
    paths = [tag.runpath for tag in tags if tag.entry.d_tag == "DT_RUNPATH"]
    paths += [tag.rpath for tag in tags if tag.entry.d_tag == "DT_RPATH"]
    return Binary(
        path=path,
        soname=soname,
        needed=tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"),
        folders=tuple(folders(":".join(paths), path)),
        # Some libraries name a loader, too, so that they can print their version.
        is_program=soname is None and any(True for _ in elf.iter_segments("PT_INTERP")),
    )


def installed_path(member: str) -> str:
    """Where pip puts a file of a wheel, below site-packages. Pure."""
    return re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", member)


def folders(search: str, path: str) -> list[str]:
    """The folders of a search path that are below site-packages; others are those of the machine it was built on. Pure.

    Args:
        search: folders with colons between them.
        path: the binary that has it, below site-packages.
    """
    origin = re.compile(r"^\$(ORIGIN|\{ORIGIN\})")
    here = posixpath.dirname(path)
    found = [posixpath.normpath(origin.sub(here or ".", part)) for part in search.split(":") if origin.match(part)]
    return [folder for folder in found if not folder.startswith("..")]


def glibc(platforms: Iterable[str]) -> tuple[int, int] | None:
    """The oldest glibc among platform tags, as `manylinux_2_28_x86_64`; None where none names one. Pure."""
    found = []
    for platform in platforms:
        if named := re.match(r"manylinux_(\d+)_(\d+)_", platform):
            found.append((int(named[1]), int(named[2])))
        elif old := OLD_NAMES.get(platform.partition("_")[0]):
            found.append(old)
    return min(found, default=None)
