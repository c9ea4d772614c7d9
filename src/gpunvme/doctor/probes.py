"""What only running code can tell about a machine, asked through the engine."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpunvme.doctor.nvme_admin import ask_controller

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpunvme.doctor.nvme_admin import AdminAnswer


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
    nvme_admin
        What the controller behind a device file such as ``/dev/nvme0`` answers to Identify and to Get Log Page, or in
        words why it cannot be asked.
    environment
        The environment variables.
    """

    engine_reason: Callable[[], str]
    io_uring_reason: Callable[[], str]
    cuda_reason: Callable[[], str]
    cuda_devices: Callable[[], Sequence[Mapping[str, Any]]]
    cachestat_works: Callable[[], bool]
    cufile_library: Callable[[], str | None]
    nvme_admin: Callable[[str], AdminAnswer | str] = ask_controller
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


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
    from gpunvme.cufile.library import library_file

    return library_file()
