"""Files mapped into this process, by address.

Python's own `mmap` keeps a descriptor of its own and cannot be unmapped while anything looks at it; here the address
is what counts, and who unmaps says when.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import weakref

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
_MADV_REMOVE = 9


class Mapping:
    """Part of a file, shared and mapped. It is unmapped by `close`, or when nothing refers to it any more.

    Parameters
    ----------
    fd
        The file; it may be closed afterwards.
    nbytes, offset
        Which part, in bytes, whole pages.
    writable
        Whether it is mapped for writing too.

    Raises
    ------
    OSError
        If the kernel refuses, or (EINVAL) the file ends before the part does: touching that would be fatal.
    """

    def __init__(self, fd: int, nbytes: int, offset: int = 0, *, writable: bool = True) -> None:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and offset + nbytes > status.st_size:
            raise OSError(22, "the file ends before the part to be mapped")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, fd, offset)
        if address is None or address == _FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        self.address: int = address
        self.nbytes = nbytes
        self._end = weakref.finalize(self, _libc.munmap, address, nbytes)
        self._end.atexit = False  # until the very end somebody may be using it, and then the kernel unmaps it anyway

    def discard(self, offset: int, nbytes: int) -> None:
        """Give the memory of whole pages of a memfd back; they read as zeroes from here on."""
        if _libc.madvise(self.address + offset, nbytes, _MADV_REMOVE) != 0:
            ctypes.memset(self.address + offset, 0, nbytes)

    def keep(self) -> None:
        """Leave it mapped until the process ends, because somebody may still be using it."""
        self._end.detach()

    def close(self) -> None:
        """Unmap. Only when nobody uses the memory any more."""
        self._end()
