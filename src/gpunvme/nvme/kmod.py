"""``kmod:/dev/gpunvmeN``: a controller through gpunvme's own kernel module (``kmod/``).

For what VFIO cannot do: memory of other devices, as dma-bufs, gets an address that the controller reaches. Memory of
this process is pinned and mapped by the kernel's DMA API, so that an IOMMU stays on. The module disables the controller
and ends its DMA before it lets go of any memory, however this process ends.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import TransportError
from gpunvme.nvme import kmod_uapi as uapi
from gpunvme.nvme.bind import find_users
from gpunvme.nvme.dma import PAGE, DmaMemory
from gpunvme.nvme.gpu_memory import GpuAccess, GpuDmaMemory, check_gpu_pages
from gpunvme.nvme.module_state import module_state, why_not_loaded, wrong_version
from gpunvme.nvme.sysfs import Machine
from gpunvme.nvme.vfio_group import LockedMemoryError, mapping_error
from gpunvme.transfer import format_bytes

_DOORBELLS = 0x1000  # offset in BAR0; NVMe over PCIe Transport Specification 1.0, section 3.1.2
# Below this, copying is cheaper than pinning pages and telling the IOMMU, twice.
_WORTH_MAPPING = 64 << 10


class KmodTransport:
    """The way to a controller that is bound to gpunvme's kernel module.

    Parameters
    ----------
    path
        Its device file.

    Raises
    ------
    TransportError
        If it cannot be opened, is another program's, or of another version: says what to do.
    """

    maps_any_memory = True
    bounce_below = _WORTH_MAPPING

    def __init__(self, path: str) -> None:
        self.uri = f"kmod:{path}"
        self._closed = False
        with ExitStack() as opened:
            self._fd = _open(path)
            opened.callback(os.close, self._fd)
            self.info = _info(self._fd, self.uri)
            self.gpu_access = _gpu_access(self.info)
            self._nbytes = int(self.info.mmap_nbytes)
            if self._nbytes < _DOORBELLS + 8:
                raise TransportError(f"{self.uri}: only {self._nbytes} bytes of BAR0 can be mapped, no doorbells")
            # The MSI-X table, where it is in the same BAR, is not ours to write.
            self._bar = mmap.mmap(self._fd, self._nbytes)
            opened.callback(self._bar.close)
            self._registers = ctypes.addressof(ctypes.c_char.from_buffer(self._bar))
            self.doorbells: int | None = self._registers + _DOORBELLS
            self.doorbells_nbytes = self._nbytes - _DOORBELLS
            opened.pop_all()

    # --- registers: a ctypes integer is read and written by one load or store of its width

    def read_register(self, offset: int, nbytes: int) -> int:
        """Read 4 or 8 bytes of BAR0."""
        low = ctypes.c_uint32.from_address(self._at(offset)).value
        if nbytes == 4:
            return low
        # Two reads, the lower half first: not every controller takes 64 bits at once.
        return ctypes.c_uint32.from_address(self._at(offset + 4)).value << 32 | low

    def write_register(self, offset: int, nbytes: int, value: int) -> None:
        """Write 4 or 8 bytes of BAR0."""
        ctypes.c_uint32.from_address(self._at(offset)).value = value & 0xFFFFFFFF
        if nbytes == 8:
            ctypes.c_uint32.from_address(self._at(offset + 4)).value = value >> 32

    def _at(self, offset: int) -> int:
        self._check_open()
        if offset % 4 or not 0 <= offset <= self._nbytes - 4:
            raise ValueError(f"there is no register at {offset:#x} of {self._nbytes:#x} bytes")
        return self._registers + offset

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.uri} is closed")

    # --- memory

    def allocate(self, nbytes: int) -> DmaMemory:
        """New memory that the controller can reach, zeroed, starting at a page.

        Raises
        ------
        LockedMemoryError
            If a limit on locked memory or on mappings is reached.
        """
        # Shared, so that a fork never makes this process's pages and the controller's differ.
        try:
            memory = mmap.mmap(-1, -(-nbytes // PAGE) * PAGE)
        except OSError as error:
            raise LockedMemoryError(f"there are no {format_bytes(nbytes)} of memory: {error.strerror}") from error
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        mapped = self.map(address, len(memory))
        return DmaMemory(address, nbytes, mapped.iovas, mapped.close, memory)

    def map(self, address: int, nbytes: int, writable: bool = True) -> DmaMemory:
        """Let the controller reach whole pages of this process's memory, until `DmaMemory.close`.

        Raises
        ------
        LockedMemoryError
            If a limit on locked memory or on mappings is reached.
        TransportError
            If this memory cannot be mapped: it is not there, read-only, or a file's.
        """
        return self._map(-1, address, address, nbytes, writable)

    def map_dmabuf(self, fd: int, offset: int, nbytes: int, address: int = 0, writable: bool = True) -> DmaMemory:
        """Let the controller reach a part of a dma-buf, until `DmaMemory.close`.

        Parameters
        ----------
        fd
            Of the dma-buf; it may be closed afterwards.
        offset, nbytes
            Which part; multiples of 4096.
        address
            What knows the memory's first byte in `DmaMemory`: an address of a mapping, a device pointer, or 0.
        writable
            Whether the controller may write to it.

        Raises
        ------
        TransportError
            If it is no dma-buf, the part is outside of it, or its exporter does not let this controller reach it.
        """
        return self._map(fd, offset, address, nbytes, writable)

    def map_gpu(self, address: int, nbytes: int, device: int, writable: bool = True) -> GpuDmaMemory:
        """Let the controller reach GPU memory, by a dma-buf of it; see `GpuTransport.map_gpu`.

        Raises
        ------
        CudaError
            If the GPU does not export it.
        TransportError
            If the exporter does not let this controller reach it.
        """
        from gpunvme.gpu.driver import Gpu

        check_gpu_pages(address, nbytes)
        gpu = Gpu(device)
        try:
            fd = gpu.export(address, nbytes)
        finally:
            gpu.close()
        try:
            mapped = self.map_dmabuf(fd, 0, nbytes, address, writable)
        finally:
            os.close(fd)
        return GpuDmaMemory(address, nbytes, device, mapped.iovas, mapped.close)

    def _map(self, fd: int, start: int, address: int, nbytes: int, writable: bool) -> DmaMemory:
        self._check_open()
        units = np.zeros(nbytes // uapi.UNIT, np.uint64)
        request = uapi.Map.new(
            flags=uapi.MAP_WRITE if writable else 0,
            address=start,
            nbytes=nbytes,
            addresses=units.ctypes.data,
            fd=fd,
        )
        try:
            uapi.call(self._fd, uapi.MAP, request)
        except OSError as error:
            raise _why_not_mapped(error, fd, nbytes) from error
        handle = int(request.handle)

        def release() -> None:
            # With the file, all of its mappings have ended.
            if not self._closed:
                uapi.call(self._fd, uapi.UNMAP, uapi.Unmap.new(handle=handle))

        return DmaMemory(address, nbytes, _joined(units), release)

    # --- interrupts

    @property
    def interrupt_vectors(self) -> int:
        """How many vectors the module has for the function."""
        return int(self.info.vectors)

    def set_interrupts(self, events: Sequence[int]) -> None:
        """Pass interrupts on; see `InterruptTransport`."""
        self._check_open()
        for vector in range(self.interrupt_vectors):
            event = events[vector] if vector < len(events) else -1
            uapi.call(self._fd, uapi.SET_VECTOR, uapi.Vector.new(vector=vector, fd=event))

    # --- the function as a whole

    def reset(self) -> None:
        """Reset the function, or disable the controller where it has no reset. No queue may be in use.

        Raises
        ------
        TransportError
            If the controller does not answer any more.
        """
        self._check_open()
        try:
            uapi.call(self._fd, uapi.RESET)
        except OSError as error:
            raise TransportError(f"{self.uri} cannot be reset: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the controller. From here on it can reach no memory of ours. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        self.doorbells = None
        # The file is released with the last mapping of it.
        self._bar.close()
        os.close(self._fd)


def _gpu_access(info: uapi.Info) -> GpuAccess:
    if info.flags & uapi.INFO_DMABUF:
        return GpuAccess("direct", "by dma-bufs, which the kernel module maps")
    return GpuAccess("none", "the kernel module was built for a kernel that gives it no dma-bufs")


def _joined(units: NDArray[np.uint64]) -> int | NDArray[np.uint64]:
    """The first address where the others follow it, as they do behind most IOMMUs; else all of them."""
    steps = np.diff(units)
    return int(units[0]) if np.all(steps == uapi.UNIT) else units


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"kmod:{path} cannot be opened: {_why_not_opened(error, path, Machine())}") from error


def _why_not_opened(error: OSError, path: str, machine: Machine) -> str:
    """Say why a device file of the module cannot be opened, and the way out."""
    if error.errno == errno.ENOENT:
        state = module_state(machine)
        there = ", ".join(f"/dev/{name}" for name in machine.names("/sys/class/gpunvme"))
        why = f"the module holds {there or 'no drive'}" if state.loaded else why_not_loaded(state)
        return f"it is not there: {why}. Then, as root: gpunvme nvme bind BDF --driver gpunvme (docs/install.md)"
    if error.errno == errno.EBUSY:
        users = ", ".join(find_users([path], machine)) or "it, or the child that inherited the file,"
        return f"another process drives it: end {users} first"
    return {
        errno.EACCES: f"no permission. As root: chown {os.getuid()} {path}; or for good, contrib/60-gpunvme.rules and "
        "the group nvme",
        errno.EPERM: "no IOMMU keeps the controller to what is mapped for it. Switch it on (firmware: VT-d or AMD-Vi; "
        "kernel: intel_iommu=on, and no iommu=pt), or be root (CAP_SYS_RAWIO)",
        errno.ENODEV: "the controller does not answer, or was taken away: gpunvme nvme list shows who has it",
    }.get(error.errno or 0, error.strerror or str(error))


def _info(fd: int, uri: str) -> uapi.Info:
    info = uapi.Info.new()
    try:
        uapi.call(fd, uapi.GET_INFO, info)
    except OSError as error:
        raise TransportError(f"{uri} is no device of gpunvme's kernel module ({error.strerror})") from error
    if info.version != uapi.VERSION:
        raise TransportError(f"{uri}: {wrong_version(info.version)}")
    return info


def _why_not_mapped(error: OSError, fd: int, nbytes: int) -> TransportError:
    if error.errno == errno.ENOSPC:
        return LockedMemoryError(
            f"{format_bytes(nbytes)} cannot be mapped for the device: too many separate mappings "
            "(/sys/module/gpunvme/parameters/max_mappings)"
        )
    if fd < 0:
        return mapping_error(error, nbytes)
    why = {
        errno.EINVAL: "it is no dma-buf, or its parts do not lie on pages",
        errno.EBADF: "there is no such file descriptor",
        errno.ERANGE: "the part is not inside of it",
        errno.ESTALE: "its exporter took it back",
    }.get(error.errno or 0, f"its exporter refuses: {error.strerror}")
    return TransportError(f"{format_bytes(nbytes)} of a dma-buf cannot be mapped for the device: {why}")
