"""``soft:``: the software controller, in threads of this process."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from gpunvme import _native
from gpunvme.errors import UriError
from gpunvme.memory import address_of
from gpunvme.nvme.dma import PAGE, DmaMemory, IovaSpace
from gpunvme.nvme.gpu_memory import GPU_PAGE, GpuAccess, GpuDmaMemory, check_gpu_pages
from gpunvme.nvme.uri import Uri
from gpunvme.transfer import raise_native


def soft_controller(uri: Uri) -> _native.SoftController:
    """Start the software controller that a URI describes.

    Raises
    ------
    UriError
        If an option has a value that no controller can have.
    FileError
        If the image cannot be used: missing, too small, not a multiple of the LBA, locked by another controller.
    """
    options: dict[str, Any] = dict(uri.options)
    if uri.path != "ram":
        options["path"] = uri.path_bytes
    elif "size" not in options:
        raise UriError(f"{uri.text!r}: memory needs a size, as in soft:ram?size=64MiB")
    try:
        return _native.SoftController(options)
    except ValueError as error:
        raise UriError(f"{uri.text!r}: {error}") from None
    except _native.Failure as failure:
        raise_native(failure)


class SoftTransport:
    """The way to a software controller of this process's own.

    The controller reaches memory only through a table of IOVAs. They differ from addresses on purpose: who mixes them
    up is caught at once.
    """

    maps_any_memory = True
    bounce_below = 0
    gpu_access = GpuAccess("emulated", "emulated by the GPU's copy engine, which proves code, never speed")

    def __init__(self, uri: Uri) -> None:
        self.uri = uri.text
        self.controller = soft_controller(uri)
        self.doorbells: int | None = self.controller.doorbells_address
        self.doorbells_nbytes = self.controller.doorbells_nbytes
        self._space = IovaSpace([(1 << 32, 1 << 47)])

    def read_register(self, offset: int, nbytes: int) -> int:
        """Read 4 or 8 bytes of BAR0."""
        return self.controller.read(offset, nbytes)

    def write_register(self, offset: int, nbytes: int, value: int) -> None:
        """Write 4 or 8 bytes of BAR0."""
        self.controller.write(offset, nbytes, value)

    def allocate(self, nbytes: int) -> DmaMemory:
        """New memory that the controller can reach, zeroed."""
        memory = np.frombuffer(mmap.mmap(-1, -(-nbytes // PAGE) * PAGE), np.uint8)
        mapped = self.map(address_of(memory), len(memory))
        return DmaMemory(mapped.address, nbytes, mapped.iovas, mapped.close, memory)

    def map(self, address: int, nbytes: int, writable: bool = True) -> DmaMemory:
        """Enter whole pages of this process's memory into the controller's table."""
        iova = self._space.take(nbytes)
        self.controller.map(iova, nbytes, address, True, writable)

        def release() -> None:
            self.controller.unmap(iova, nbytes)
            self._space.give(iova, nbytes)

        return DmaMemory(address, nbytes, iova, release)

    def map_gpu(self, address: int, nbytes: int, device: int, writable: bool = True) -> GpuDmaMemory:
        """Enter GPU memory into the controller's table; see `GpuTransport.map_gpu`.

        The first time for a GPU, the controller makes what it copies with: call it before kernels run that wait.
        """
        check_gpu_pages(address, nbytes)
        iova = self._space.take(nbytes, GPU_PAGE)
        try:
            self.controller.map_gpu(iova, nbytes, address, device, True, writable)
        except _native.Failure as failure:
            self._space.give(iova, nbytes)
            raise_native(failure)

        def release() -> None:
            self.controller.unmap(iova, nbytes)
            self._space.give(iova, nbytes)

        return GpuDmaMemory(address, nbytes, device, iova, release)

    def reset(self) -> None:
        """Reset the function."""
        self.controller.reset()

    def close(self) -> None:
        """Stop the controller."""
        self.controller.stop()
