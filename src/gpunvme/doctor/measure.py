"""``gpunvme doctor --probe``: what this machine really does, measured in a few seconds.

The drive is read; what is written is a nameless file that is gone with its descriptor. A probe that cannot run has a
line that says why.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.pairs import drives, gpus, name_of
from gpunvme.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpunvme.doctor.system import System

_MIB = 2**20
_COPIED = 128 * _MIB  # at a time: as large as the engine's ring
_COPIES = 8
_READ = 256 * _MIB
_DEPTH = 16
_ROUND_TRIPS = 200
_TRY_AGAIN = "look at what the driver says (sudo dmesg), then try again"
_ANOTHER_FILE = "name a large file that can be read: gpunvme doctor --probe FILE"
_DOORBELLS, _PAGE = 0x1000, 0x1000  # offset in BAR0; NVMe over PCIe Transport Specification 1.0, section 3.1.2


class Copier(Protocol):
    """What the probes need of `gpunvme.gpu.driver.Gpu`."""

    def allocate(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def allocate_host(self, nbytes: int) -> tuple[int, int]: ...
    def free_host(self, address: int) -> None: ...
    def register(self, address: int, nbytes: int, *, io: bool = False) -> int: ...
    def unregister(self, address: int) -> None: ...
    def to_gpu(self, target: int, source: int, nbytes: int, stream: int) -> None: ...
    def to_host(self, target: int, source: int, nbytes: int, stream: int) -> None: ...
    def stream(self) -> int: ...
    def synchronize(self, stream: int | None = None) -> None: ...
    def destroy(self, *, stream: int = 0, event: int = 0) -> None: ...
    def close(self) -> None: ...


def measure(system: System, path: str, open_gpu: Callable[[int], Copier] | None = None) -> list[Finding]:
    """Run every probe.

    Parameters
    ----------
    system
        The machine.
    path
        A file to read, or a folder on the drive that is meant.
    open_gpu
        Opens a GPU by its number; tests have one of their own.

    Returns
    -------
    list of Finding
        A line a probe: green with the figure, or yellow with the reason why there is none.
    """
    findings = [probe_drive(path)]
    reason = system.probes.cuda_reason()
    if reason and not gpus(system):
        return findings
    if reason:
        topics = ("probe: copies", "probe: round trip", "probe: doorbells")
        return findings + [
            unknown(topic, "not measured", f"CUDA cannot be used ({reason})", "see line CUDA") for topic in topics
        ]
    if open_gpu is None:
        from gpunvme.gpu.driver import Gpu

        open_gpu = Gpu
    for number, described in enumerate(system.probes.cuda_devices()):
        name = f"cuda:{number} {described.get('name', '')}".strip()
        try:
            gpu = open_gpu(number)
        except (Error, OSError) as error:
            findings.append(unknown("probe: copies", name, str(error), _TRY_AGAIN))
            continue
        try:
            findings += _guarded("probe: copies", probe_copies, gpu, name)
            findings += _guarded("probe: round trip", probe_round_trip, gpu, name)
            findings += probe_doorbells(system, gpu, name)
        finally:
            gpu.close()
    return findings


def _guarded(topic: str, probe: Callable[[Copier, str], Finding], gpu: Copier, name: str) -> list[Finding]:
    try:
        return [probe(gpu, name)]
    except (Error, OSError, MemoryError) as error:
        return [unknown(topic, name, str(error), _TRY_AGAIN)]


def probe_drive(path: str) -> Finding:
    """Read up to 256 MiB of a file, O_DIRECT in depth; in a folder, of a file made for it."""
    from gpunvme import _native

    memory = mmap.mmap(-1, _READ)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    try:
        if os.path.isdir(path):
            with tempfile.TemporaryFile(dir=path) as file:
                fd = file.fileno()
                block = os.urandom(_MIB)  # a drive that compresses or removes doubles has nothing to do
                for i in range(_READ // _MIB):
                    os.pwrite(fd, i.to_bytes(8, "little") + block[8:], i * _MIB)
                os.fsync(fd)
                seconds = float(_native.direct_read(f"/proc/self/fd/{fd}", address, _READ, _MIB, _DEPTH))
            nbytes = _READ
        else:
            nbytes = min(os.stat(path).st_size, _READ) // _MIB * _MIB
            if not nbytes:
                return unknown("probe: drive", path, "less than 1 MiB tells nothing", _ANOTHER_FILE)
            seconds = float(_native.direct_read(path, address, nbytes, _MIB, _DEPTH))
    except (OSError, RuntimeError, Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return unknown("probe: drive", path, why, _ANOTHER_FILE)
    if seconds <= 0:
        return unknown("probe: drive", path, "the clock did not move", _TRY_AGAIN)
    rate = nbytes / seconds / 1e9
    fact = f"{path}: {rate:.2f} GB/s, O_DIRECT, {nbytes // _MIB} MiB, {_DEPTH} reads of 1 MiB in flight"
    return Finding(Level.GREEN, "probe: drive", fact)


def probe_copies(gpu: Copier, name: str) -> Finding:
    """Copy page-locked memory to the GPU and back: what no transfer through host memory can exceed."""
    host, _ = gpu.allocate_host(_COPIED)
    device = stream = 0
    try:
        device = gpu.allocate(_COPIED)
        stream = gpu.stream()
        rates = []
        for copy, target, source in ((gpu.to_gpu, device, host), (gpu.to_host, host, device)):
            copy(target, source, _COPIED, stream)
            gpu.synchronize(stream)
            start = time.perf_counter()
            for _ in range(_COPIES):
                copy(target, source, _COPIED, stream)
            gpu.synchronize(stream)
            rates.append(_COPIES * _COPIED / max(time.perf_counter() - start, 1e-9) / 1e9)
    finally:
        _release(gpu, host, device, stream)
    fact = f"{name}: host to GPU {rates[0]:.1f} GB/s, GPU to host {rates[1]:.1f} GB/s"
    return Finding(Level.GREEN, "probe: copies", fact)


def probe_round_trip(gpu: Copier, name: str) -> Finding:
    """Copy 8 bytes to the GPU and back and wait for both: the least that a small transfer by copies takes."""
    host, _ = gpu.allocate_host(_PAGE)
    device = stream = 0
    try:
        device = gpu.allocate(_PAGE)
        stream = gpu.stream()
        taken = []
        for _ in range(_ROUND_TRIPS):
            start = time.perf_counter()
            gpu.to_gpu(device, host, 8, stream)
            gpu.to_host(host, device, 8, stream)
            gpu.synchronize(stream)
            taken.append(time.perf_counter() - start)
    finally:
        _release(gpu, host, device, stream)
    middle = statistics.median(taken) * 1e6
    return Finding(
        Level.GREEN, "probe: round trip", f"{name}: 8 bytes there and back in {middle:.1f} µs, by two copies"
    )


def _release(gpu: Copier, host: int, device: int, stream: int) -> None:
    gpu.synchronize()
    if stream:
        gpu.destroy(stream=stream)
    if device:
        gpu.free(device)
    gpu.free_host(host)


def probe_doorbells(system: System, gpu: Copier, name: str) -> list[Finding]:
    """Register the page of each drive's doorbells for the GPU. Nothing in it is read or written."""
    found = []
    for drive in drives(system):
        pair = f"{name} and {name_of(system, drive)}"
        try:
            fd = os.open(system.path(f"/sys/bus/pci/devices/{drive.address}/resource0"), os.O_RDWR | os.O_CLOEXEC)
            try:
                page = mmap.mmap(fd, _PAGE, offset=_DOORBELLS)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            found.append(unknown("probe: doorbells", pair, f"BAR0 cannot be mapped: {why} (root, and not locked down)"))
            continue
        view = np.frombuffer(page, np.uint8)
        address = view.ctypes.data
        try:
            gpu.register(address, _PAGE, io=True)
            gpu.unregister(address)
            found.append(Finding(Level.GREEN, "probe: doorbells", f"{pair}: kernels can ring them"))
        except Error as error:
            found.append(
                Finding(
                    Level.YELLOW,
                    "probe: doorbells",
                    f"{pair}: {error}",
                    cost="a host thread forwards doorbells: later, and a CPU is busy with it",
                    fix="another kernel or driver may allow it; GPU queues choose by themselves",
                )
            )
        finally:
            del view
            page.close()
    return found
