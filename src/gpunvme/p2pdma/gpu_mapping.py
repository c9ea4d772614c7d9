"""GPU memory as the host maps it: a dma-buf of the driver's, by mmap(2).

The kernel gives pages of it to other devices where the driver made some for all of its memory (a static BAR1). NVIDIA's
open driver 580 exports dma-bufs, and answers ENOTSUPP to mmap(2): `GpuMapping` says so.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os

from gpunvme.errors import CudaError, PathError
from gpunvme.gpu.driver import Gpu
from gpunvme.memory import Buffer, Span
from gpunvme.nvme.gpu_memory import GPU_PAGE
from gpunvme.p2pdma.mappings import Mapping

_PROBE_BYTES = 2 << 20  # what a driver allocates at least


class GpuMapping:
    """A span of GPU memory, mapped until `close`.

    Parameters
    ----------
    span
        The memory. Whole pages of the GPU's around it are mapped.

    Attributes
    ----------
    mapping
        Where the host sees it.
    address
        Of the span's first byte, for the host.

    Raises
    ------
    PathError
        If the driver exports it not, or lets nobody map it; says which.
    """

    def __init__(self, span: Span) -> None:
        first = span.ptr // GPU_PAGE * GPU_PAGE
        nbytes = -(-(span.ptr + span.nbytes - first) // GPU_PAGE) * GPU_PAGE
        try:
            gpu = Gpu(span.device.index)
            try:
                fd = gpu.export(first, nbytes)
            finally:
                gpu.close()
        except CudaError as error:
            raise PathError(f"{span.device}: {error}") from None
        try:
            memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise PathError(
                f"the driver of {span.device} does not let its dma-bufs be mapped ({why}); that takes a driver with a "
                "static BAR1 (RMForceStaticBar1=1) that makes pages of it"
            ) from None
        finally:
            os.close(fd)
        self._map = memory
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.mapping = Mapping(start, nbytes, str(span.device), None)
        self.address = start + span.ptr - first

    def close(self) -> None:
        """Unmap it, when no transfer uses it any more."""
        self.mapping.forget()
        self._map.close()


@functools.cache
def why_not(index: int) -> str:
    """Why memory of a GPU cannot be mapped, or nothing: by mapping a little of it."""
    try:
        memory = Buffer.empty(_PROBE_BYTES, index)
        GpuMapping(memory.span).close()
    except (CudaError, PathError) as error:
        return str(error)
    return ""
