"""What only running code can tell about a machine, asked through the engine."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Probes:
    """What only running code can tell, as functions, so that a test can answer instead of the machine.

    Parameters
    ----------
    engine_reason
        Why the native engine cannot be imported; empty if it can.
    io_uring_reason
        Why an io_uring cannot be set up; empty if it can.
    cuda_reason
        Why CUDA cannot be used; empty if it can.
    cuda_devices
        The CUDA devices: ``name``, ``pci_bus_id`` and whatever else the engine knows.
    cachestat_works
        Whether the kernel tells us which bytes of a file it caches.
    cufile_library
        Where a libcufile is installed, or None. It must not be opened to find out: without a GPU
        that can hang for ever.
    """

    engine_reason: Callable[[], str]
    io_uring_reason: Callable[[], str]
    cuda_reason: Callable[[], str]
    cuda_devices: Callable[[], Sequence[Mapping[str, Any]]]
    cachestat_works: Callable[[], bool]
    cufile_library: Callable[[], str | None]


def native_probes() -> Probes:
    """Return the probes of the machine that we are running on."""
    return Probes(
        engine_reason=_engine_reason,
        io_uring_reason=_io_uring_reason,
        cuda_reason=_cuda_reason,
        cuda_devices=_cuda_devices,
        cachestat_works=_cachestat_works,
        cufile_library=_cufile_library,
    )


def _engine_reason() -> str:
    try:
        import gpunvme._native  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def _io_uring_reason() -> str:
    from gpunvme import _native

    return str(_native.io_uring_reason())


def _cuda_reason() -> str:
    from gpunvme import _native

    return str(_native.cuda_unavailable_reason())


def _cuda_devices() -> Sequence[Mapping[str, Any]]:
    from gpunvme import _native

    return list(_native.cuda_devices())


def _cachestat_works() -> bool:
    """Ask about a file of our own: the kernel refuses to tell about files that we may not write."""
    from gpunvme import _native

    with tempfile.TemporaryFile() as file:
        file.write(b"\0" * 4096)
        file.flush()
        return _native.cached_bytes(file.fileno(), 0, 4096) is not None


def _cufile_library() -> str | None:
    return installed_cufile(_ld_so_cache(), _pip_folders())


def installed_cufile(linker_cache: bytes, folders: Sequence[Path]) -> str | None:
    """Find a libcufile without opening it.

    Parameters
    ----------
    linker_cache
        The bytes of ``/etc/ld.so.cache``.
    folders
        Folders to look into as well, such as those of pip packages.

    Returns
    -------
    str or None
        The library's file name, or None if there is none.
    """
    for name in linker_cache.split(b"\0"):
        text = name.decode("utf-8", "replace")
        if text.startswith("/") and os.path.basename(text).startswith("libcufile.so"):
            return text
    for folder in folders:
        for found in sorted(folder.glob("libcufile.so*")):
            return str(found)
    return None


def _ld_so_cache() -> bytes:
    try:
        return Path("/etc/ld.so.cache").read_bytes()
    except OSError:
        return b""


def _pip_folders() -> list[Path]:
    """Return where the nvidia-cufile packages and a CUDA toolkit keep the library."""
    folders = [Path("/usr/local/cuda/lib64")]
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or []) if spec else []:
        folders += [Path(base) / part / "lib" for part in ("cufile", "cu13", "cu12")]
    return folders
