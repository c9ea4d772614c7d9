"""Memory that a controller can reach: what has an IOVA, and until when.

A controller knows memory by its I/O virtual address (IOVA), which the IOMMU, or a software controller's table,
translates. Whatever a controller reads or writes — queues, PRP lists, data — is a `DmaMemory`, and stays one until
the controller cannot use it any more.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native

if TYPE_CHECKING:
    from gpunvme.nvme.transport import Transport

# IOVAs are handed out, and memory is mapped, in units of the host's page.
PAGE = mmap.PAGESIZE


class DmaMemory:
    """A range of this process's memory that the controller can reach. A context manager.

    Parameters
    ----------
    address
        Of the first byte in this process, a multiple of 4096.
    nbytes
        Size in bytes.
    iovas
        IOVA of the first byte where IOVAs are contiguous, or one IOVA for each 4096 bytes.
    release
        Called once by `close`: takes the memory away from the controller.
    owner
        What the memory belongs to; views keep it alive, even past `close`.
    """

    def __init__(
        self,
        address: int,
        nbytes: int,
        iovas: int | NDArray[np.uint64],
        release: Callable[[], None] | None = None,
        owner: object = None,
    ) -> None:
        self.address = address
        self.nbytes = nbytes
        self.iovas = iovas
        self.owner = owner
        self._release = release

    @property
    def contiguous(self) -> bool:
        """Whether its IOVAs are one range."""
        return isinstance(self.iovas, int)

    def iova(self, offset: int = 0) -> int:
        """IOVA of the byte at ``offset``."""
        if isinstance(self.iovas, int):
            return self.iovas + offset
        return int(self.iovas[offset // PAGE]) + offset % PAGE

    def page_iovas(self, offset: int, count: int, page_bytes: int) -> NDArray[np.uint64]:
        """IOVAs of ``count`` pages of ``page_bytes`` bytes each, from ``offset`` on."""
        return np.array([self.iova(offset + i * page_bytes) for i in range(count)], np.uint64)

    def view(self, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """The bytes, writable."""
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are outside of {self.nbytes} bytes of DMA memory")
        array = (ctypes.c_uint8 * nbytes).from_address(self.address + offset)
        array.owner = self.owner  # type: ignore[attr-defined]  # a ctypes object takes attributes
        return memoryview(array).cast("B")

    def close(self) -> None:
        """Take it away from the controller. Only when no command that names it is in flight."""
        release, self._release = self._release, None
        self.owner = None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class IovaSpace:
    """Free IOVAs, handed out in pages, lowest first.

    Parameters
    ----------
    ranges
        ``(start, end)`` of what may be used; ``end`` is the first byte behind it.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._lock = threading.Lock()
        self._free = sorted((start, end) for start, end in ranges if start < end)

    def take(self, nbytes: int, align: int = PAGE) -> int:
        """A free range of at least ``nbytes`` bytes, a multiple of ``align``.

        Raises
        ------
        MemoryError
            If there is none.
        """
        nbytes = -(-nbytes // PAGE) * PAGE
        with self._lock:
            for number, (start, end) in enumerate(self._free):
                at = -(-start // align) * align
                if at + nbytes <= end:
                    rest = [(a, b) for a, b in ((start, at), (at + nbytes, end)) if a < b]
                    self._free[number : number + 1] = rest
                    return at
        raise MemoryError(f"no {nbytes} bytes of IOVAs are left")

    def give(self, iova: int, nbytes: int) -> None:
        """Give a range back."""
        end = iova + -(-nbytes // PAGE) * PAGE
        with self._lock:
            at = bisect.bisect(self._free, (iova, end))
            if at < len(self._free) and self._free[at][0] == end:
                end = self._free.pop(at)[1]
            if at > 0 and self._free[at - 1][1] == iova:
                iova = self._free.pop(at - 1)[0]
                at -= 1
            self._free.insert(at, (iova, end))


def page_range(address: int, nbytes: int) -> tuple[int, int]:
    """Start and size of the whole pages that hold a range of memory."""
    start = address // PAGE * PAGE
    return start, -(-(address + nbytes - start) // PAGE) * PAGE


def io_memory(memory: DmaMemory, address: int | None = None, nbytes: int | None = None) -> _native.IoMemory:
    """A range of DMA memory as commands see it; all of it by default."""
    address = memory.address if address is None else address
    nbytes = memory.nbytes if nbytes is None else nbytes
    offset = address - memory.address
    if isinstance(memory.iovas, int):
        return _native.IoMemory.mapped(address, nbytes, memory.iovas + offset)
    first, pages = offset // PAGE, -(-(offset % PAGE + nbytes) // PAGE)
    return _native.IoMemory.mapped_pages(address, nbytes, memory.iovas[first : first + pages], PAGE, offset % PAGE)


def allocate_aligned(transport: Transport, nbytes: int, alignment: int) -> DmaMemory:
    """New zeroed memory whose first byte has an IOVA that is a multiple of ``alignment``, a power of two."""
    if alignment <= PAGE:
        return transport.allocate(nbytes)
    whole = transport.allocate(nbytes + alignment - PAGE)
    skip = -whole.iova() % alignment
    iovas = whole.iova(skip) if isinstance(whole.iovas, int) else whole.iovas[skip // PAGE :]
    return DmaMemory(whole.address + skip, nbytes, iovas, whole.close, whole.owner)
