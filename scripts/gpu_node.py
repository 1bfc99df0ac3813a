# SPDX-License-Identifier: Apache-2.0
"""What the GPU set may take from outside its wheels, and what of it need not load. `make check-gpu-set` reads it.

docs/operations.md tells operators of the same packages, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

GLIBC = (2, 34)
"""The oldest that a GPU node may have: that of Debian 12 is 2.36, of Ubuntu 22.04 2.35, of RHEL 9 2.34."""


@dataclass(frozen=True)
class Package:
    """A package of Debian and Ubuntu that a node must have."""

    name: str
    libraries: tuple[str, ...]
    why: str


IN_EVERY_IMAGE = (
    Package(
        "libc6",
        (
            "ld-linux-x86-64.so.2",
            "libc.so.6",
            "libdl.so.2",
            "libm.so.6",
            "libpthread.so.0",
            "libresolv.so.2",
            "librt.so.1",
            "libutil.so.1",
        ),
        "every binary",
    ),
    Package("libgcc-s1", ("libgcc_s.so.1",), "everything in C++"),
    Package("libstdc++6", ("libstdc++.so.6",), "everything in C++"),
    Package("zlib1g", ("libz.so.1",), "numba, cuDNN and NIXL; Python needs it, too"),
    Package("libssl3", ("libcrypto.so.3", "libssl.so.3"), "NIXL, OpenSSL 3; the `ssl` module of Python needs it, too"),
)
"""Also in an image that has little more than Python."""
TO_INSTALL = (
    Package("libibverbs1", ("libibverbs.so.1",), "Mooncake, RDMA or not"),
    Package("ibverbs-providers", ("libmlx5.so.1",), "Mooncake, RDMA or not; libibverbs1 only recommends it"),
    Package("libnuma1", ("libnuma.so.1",), "Mooncake"),
    Package("libcurl4", ("libcurl.so.4",), "Mooncake"),
    Package("librdmacm1", ("librdmacm.so.1",), "cuFile over RDMA"),
)
BASE = (*IN_EVERY_IMAGE, *TO_INSTALL)
DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")
"""What NVIDIA's driver brings, which a container gets from its host."""

LOADED_FIRST = {
    "torch/_C.*.so": "vLLM, LMCache and our connectors import torch before what links against it or against CUDA",
    "tvm_ffi/lib/libtvm_ffi.so": "xgrammar imports tvm_ffi before its own binary",
}
"""Binaries that a process has loaded before those of other wheels, with all that they load themselves. The loader takes
a library that is there already by its name."""


@dataclass(frozen=True)
class Optional:
    """Binaries that may lack libraries, because nothing is lost where these are not there."""

    wheel: str
    path: str
    """Pattern below site-packages."""
    libraries: tuple[str, ...]
    """Patterns of what may be missing; anything else is still missed."""
    reason: str


_NIXL = "NIXL skips plugins that do not load"
_UCX = "UCX skips modules that do not load"
_NVSHMEM = "NVSHMEM loads only the one that it is told to"

OPTIONAL = (
    Optional(
        "nixl-cu13",
        "*/libplugin_GPUNETIO.so",
        ("libdoca_*.so.2",),
        f"{_NIXL}; this one sends from GPUs by DOCA, and the engines use UCX",
    ),
    Optional("nixl-cu13", "*/libplugin_INFINIA.so", ("libred_*",), f"{_NIXL}; this one is for DDN's storage"),
    Optional(
        "nixl-cu13",
        "*/libplugin_LIBFABRIC.so",
        ("libfabric.so.1", "libhwloc.so.15"),
        f"{_NIXL}; this one is for AWS's EFA",
    ),
    Optional(
        "nixl-cu13",
        "*/libplugin_OBJ.so",
        ("libcuobjclient.so.1",),
        f"{_NIXL}; this one is for object stores, which LMCache reaches without NIXL",
    ),
    Optional(
        "nixl-cu13",
        "*/libtelemetry_exporter_doca.so",
        ("libdoca_telemetry_exporter.so.2",),
        f"{_NIXL}; telemetry to DOCA, which nothing here switches on",
    ),
    Optional(
        "nixl-cu13",
        "nixl_cu13.libs/ucx/libuct_ib_efa.so.*",
        ("libefa.so.1",),
        f"{_UCX}; this one is for AWS's EFA",
    ),
    Optional(
        "nixl-cu13",
        "nixl_cu13.libs/ucx/libuct_ib_mlx5_gdp.so.*",
        ("libflexio.so",),
        f"{_UCX}; this one needs NVIDIA's FlexIO, a separate product for network cards",
    ),
    Optional(
        "nixl-cu13",
        "nixl_cu13.libs/ucx/libucx_perftest_mad.so.*",
        ("libibmad.so.5", "libibumad.so.3"),
        f"{_UCX}; this one belongs to its own benchmark",
    ),
    Optional(
        "nixl-cu13", "nixl_cu13.scripts/*", ("libnixl*.so", "libserdes.so"), "examples, which nothing here starts"
    ),
    Optional(
        "nvidia-nvshmem-cu13",
        "nvidia/nvshmem/lib/nvshmem_bootstrap_*.so.3",
        ("libmpi.so.40", "liboshmem.so.40", "libpmix.so.2"),
        f"{_NVSHMEM}; these are for jobs that MPI, SHMEM or PMIx start",
    ),
    Optional(
        "nvidia-nvshmem-cu13",
        "nvidia/nvshmem/lib/nvshmem_transport_*.so.3",
        ("libfabric.so.1", "libucp.so.0", "libucs.so.0"),
        f"{_NVSHMEM}; these are for networks that only libfabric or UCX reaches",
    ),
    Optional(
        "mooncake-transfer-engine-cuda13",
        "mooncake/mooncake_client",
        ("libcudart.so.13",),
        "a client of Mooncake's store as a process of its own, which nothing here starts; "
        "by hand it needs LD_LIBRARY_PATH=<site-packages>/nvidia/cu13/lib",
    ),
    Optional(
        "mooncake-transfer-engine-cuda13",
        "mooncake/transfer_engine_bench",
        ("libcudart.so.13",),
        "Mooncake's own benchmark; by hand it needs LD_LIBRARY_PATH=<site-packages>/nvidia/cu13/lib",
    ),
    Optional(
        "cupy-cuda13x",
        "*/cutensor.*.so",
        ("libcutensor.so.2", "libcutensorMg.so.2"),
        "cupy imports it where cuTENSOR is there; LMCache uses streams and arrays of cupy alone",
    ),
    Optional(
        "cupy-cuda13x",
        "*cusolver.*.so",
        ("libcusolver.so.12",),
        "cupy imports it for linear algebra; LMCache uses streams and arrays of cupy alone",
    ),
    Optional(
        "numba",
        "numba/np/ufunc/*pool.*.so",
        ("libgomp.so.1.0.0", "libtbb.so.12"),
        "numba takes its own pool of threads where OpenMP or TBB is missing",
    ),
    Optional(
        "torchcodec",
        "torchcodec/libtorchcodec_*.so",
        ("libav*.so.*", "libsw*.so.*"),
        "one for each FFmpeg, of which torchcodec takes the one that is there; needed only for video and audio",
    ),
    Optional("torchcodec", "torchcodec/libtorchcodec_heic.so", ("libheif.so.1",), "needed only for images as HEIC"),
)
