"""Memory for a controller without an IOMMU: pages that stay where they are, and their physical addresses.

Locked memory (mlock) is not enough: it stays in memory, but the kernel may move it to other pages, and the controller
would go on writing to the old ones. Pages that are registered as buffers of an io_uring are pinned for long
(FOLL_LONGTERM, ``Documentation/core-api/pin_user_pages.rst``): they do not move until the ring is closed.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import TransportError
from gpunvme.nvme.dma import PAGE
from gpunvme.nvme.vfio_group import LockedMemoryError, mapping_error

# x86-64 and the generic table agree (include/uapi/asm-generic/unistd.h).
_IO_URING_SETUP, _IO_URING_REGISTER = 425, 427
_REGISTER_BUFFERS = 0
_BUFFER_BYTES = 1 << 30  # the most that one registered buffer may have

# Documentation/admin-guide/mm/pagemap.rst
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def pin(address: int, nbytes: int) -> int:
    """Pin memory; return a file descriptor that holds it until it is closed.

    Raises
    ------
    LockedMemoryError
        If a limit is reached.
    TransportError
        If io_uring is not to be had.
    """
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params: all zero
    fd = int(_libc.syscall(_IO_URING_SETUP, 1, parameters))
    if fd < 0:
        code = ctypes.get_errno()
        raise TransportError(
            f"memory cannot be pinned: io_uring is refused ({os.strerror(code)}); sysctl kernel.io_uring_disabled=0"
        )
    pieces = range(0, nbytes, _BUFFER_BYTES)
    vectors = (_Iovec * len(pieces))(*(_Iovec(address + at, min(_BUFFER_BYTES, nbytes - at)) for at in pieces))
    if int(_libc.syscall(_IO_URING_REGISTER, fd, _REGISTER_BUFFERS, vectors, len(pieces))) < 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise mapping_error(OSError(code, os.strerror(code)), nbytes)
    return fd


def physical_addresses(address: int, nbytes: int, pagemap: str = "/proc/self/pagemap") -> NDArray[np.uint64]:
    """Return the physical address of each page of pinned memory.

    Raises
    ------
    TransportError
        If the kernel does not tell: it tells only who has CAP_SYS_ADMIN.
    """
    count = nbytes // PAGE
    try:
        fd = os.open(pagemap, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"{pagemap}: {error.strerror}; physical addresses are needed without an IOMMU") from error
    try:
        data = os.pread(fd, 8 * count, address // PAGE * 8)
    finally:
        os.close(fd)
    entries = np.frombuffer(data, np.uint64)
    if len(entries) != count or not np.all(entries & np.uint64(_PRESENT)):
        raise LockedMemoryError(f"{pagemap}: memory that was pinned is not there")
    frames = entries & np.uint64(_FRAME)
    if not np.all(frames):
        raise TransportError(
            f"{pagemap} hides physical addresses from this process: without an IOMMU it must run as root "
            f"(CAP_SYS_ADMIN) in the first user namespace"
        )
    return frames * np.uint64(PAGE)
