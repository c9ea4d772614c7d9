"""Memory of an NVMe controller, mapped into this process: `P2pMemory`."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import AccessDeniedError, PathError, SpanError, file_error
from gpunvme.memory import CPU, Buffer, Span
from gpunvme.nvme.sysfs import Machine, parse_bdf
from gpunvme.p2pdma import reasons
from gpunvme.p2pdma.mappings import Mapping

_PAGE = mmap.PAGESIZE


class P2pMemory(Buffer):
    """Memory of a PCI device that other devices read and write: p2pmem, as an NVMe controller memory buffer offers it.

    A destination and a source like any other: `File.read_into` and `File.write_from` have the file's drive read and
    write it by itself, where the machine can. The host sees it too, one slow access over PCI Express at a time:
    `numpy` is for small amounts. A context manager. It is allocated by mmap(2) of the device's ``p2pmem/allocate``
    (Documentation/ABI/testing/sysfs-bus-pci; Linux 6.2 and later), which only root may open.

    Parameters
    ----------
    bdf
        PCI address of the device, such as ``0000:01:00.0``.
    nbytes
        Size in bytes. One page more is taken, for probes.
    machine
        Where the device is looked for; a test has one of its own.

    Raises
    ------
    UriError
        If ``bdf`` is no PCI address.
    PathError
        If the device offers no such memory; says why.
    AccessDeniedError
        If this process may not open it.
    SpanError
        If there is not enough of it.
    """

    def __init__(self, bdf: str, nbytes: int, *, machine: Machine | None = None) -> None:
        if nbytes <= 0:
            raise SpanError(f"{nbytes} bytes are no memory")
        machine = machine or Machine()
        self.bdf = parse_bdf(bdf)
        folder = reasons.p2pmem_folder(self.bdf)
        missing = reasons.why_no_p2pmem(self.bdf, machine)
        if missing:
            raise PathError(missing)
        name = str(machine.path(f"{folder}/allocate"))
        rounded = -(-nbytes // _PAGE) * _PAGE
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            raise AccessDeniedError(errno.EACCES, "peer-to-peer memory is allocated by root only", name) from None
        except OSError as error:
            raise file_error(error, "open", name) from None
        try:
            memory = mmap.mmap(fd, rounded + _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                free = machine.read_int(f"{folder}/available")
                raise SpanError(f"{self.bdf} has no {rounded + _PAGE} bytes of memory left: {free} are free") from None
            raise file_error(error, "mmap", name) from None
        finally:
            os.close(fd)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))  # the export ends with the expression
        self._map: mmap.mmap | None = memory
        self._mapping = Mapping(address, nbytes, self.bdf, address + rounded)
        # Arrays of it may outlive this object, and keep it mapped: it is found by its address as long as that.
        weakref.finalize(memory, self._mapping.forget).atexit = False
        super().__init__(Span(address, nbytes, CPU, True, memory), (nbytes,))

    @property
    def span(self) -> Span:
        """The memory as a `Span` that keeps it alive.

        Raises
        ------
        SpanError
            If it was given back.
        """
        self._opened()
        return super().span

    def _opened(self) -> mmap.mmap:
        if self._map is None:
            raise SpanError(f"the memory of {self.bdf} was given back")
        return self._map

    def numpy(self) -> NDArray[np.uint8]:
        """The bytes as a NumPy array: a view, which keeps the memory from being given back."""
        return np.frombuffer(self._opened(), np.uint8, count=self.nbytes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        raise AttributeError("arrays of it are made by __array__, which keeps it mapped")

    def close(self) -> None:
        """Give it back; nothing happens the second time.

        Raises
        ------
        SpanError
            If a transfer is using it, or arrays of it are alive.
        """
        if self._map is None:
            return
        if not self._mapping.retire():
            raise SpanError(f"the memory of {self.bdf} is used by a transfer: wait for it first")
        try:
            self._map.close()
        except BufferError:
            self._mapping.restore()
            raise SpanError(f"arrays of the memory of {self.bdf} are in use: let them go first") from None
        self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except SpanError:
            if kind is None:  # else the error that is under way may hold the arrays
                raise

    def __repr__(self) -> str:
        state = f"of {self.nbytes} bytes" if self._map is not None else "given back"
        return f"<gpunvme.P2pMemory {state}, {self.bdf}>"
