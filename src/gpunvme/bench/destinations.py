"""Where the bytes of a benchmark arrive: memory of the host or of a GPU.

Needs neither PyTorch nor CuPy: what is measured is the plain copy that everybody's library makes.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Protocol

import gpunvme
from gpunvme import _native
from gpunvme.memory import Device

MIB = 1 << 20
STAGING = 512 * MIB
_POISON = 0xA5
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE


class Destination(Protocol):
    """Memory that every contestant of a case delivers to.

    Readers that can only fill host memory fill `window` and then say `arrived`: on the host that is the destination
    itself and costs nothing, for a GPU it is page-locked memory and a copy.

    Attributes
    ----------
    device : str
        ``"cpu"`` or ``"cuda:N"``.
    nbytes : int
        Its size.
    window_bytes : int
        How many bytes can be on their way at once.
    """

    device: str
    nbytes: int
    window_bytes: int

    def part(self, offset: int, nbytes: int) -> gpunvme.Span:
        """Return a part of it, as gpunvme takes it."""

    def window(self, offset: int) -> int:
        """Return the host address to read into for bytes that belong at an offset."""

    def arrived(self, offset: int, nbytes: int) -> None:
        """Bring what was read into the window to where it belongs."""

    def copy_from(self, address: int, offset: int, nbytes: int) -> None:
        """Copy from other host memory (a file's mapping) to where it belongs."""

    def fetch(self, offset: int, nbytes: int) -> bytes:
        """Return a part of what it holds."""

    def fetch_to_window(self, offset: int, nbytes: int) -> int:
        """Bring a part of it to the host and return the address where it is."""

    def poison(self) -> None:
        """Overwrite all of it."""

    def close(self) -> None:
        """Give the memory back."""


class HostDestination:
    """Ordinary host memory, all of it touched, in huge pages where the kernel gives them."""

    device = "cpu"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.window_bytes = nbytes
        self._memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._memory)
        pin = ctypes.c_char.from_buffer(self._memory)
        self._address = ctypes.addressof(pin)
        self._pin: ctypes.c_char | None = pin
        self.poison()

    def part(self, offset: int, nbytes: int) -> gpunvme.Span:
        return gpunvme.Span(self._address + offset, nbytes)

    def window(self, offset: int) -> int:
        return self._address + offset

    def arrived(self, offset: int, nbytes: int) -> None:
        pass

    def copy_from(self, address: int, offset: int, nbytes: int) -> None:
        ctypes.memmove(self._address + offset, address, nbytes)

    def fetch(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._view[offset : offset + nbytes])

    def fetch_to_window(self, offset: int, nbytes: int) -> int:
        return self._address + offset

    def poison(self) -> None:
        ctypes.memset(self._address, _POISON, self.nbytes)

    def close(self) -> None:
        self._pin = None
        self._view.release()
        self._memory.close()


class GpuDestination:
    """Memory of a GPU, with page-locked host memory beside it for readers that cannot reach a GPU."""

    def __init__(self, nbytes: int, ordinal: int) -> None:
        self.device = f"cuda:{ordinal}"
        self.nbytes = nbytes
        self.window_bytes = min(nbytes, STAGING)
        self._ordinal = ordinal
        self._address = _native.gpu_allocate(ordinal, nbytes)
        self._staging: HostDestination | None = None

    def part(self, offset: int, nbytes: int) -> gpunvme.Span:
        return gpunvme.Span(self._address + offset, nbytes, Device("cuda", self._ordinal))

    def window(self, offset: int) -> int:
        if self._staging is None:
            self._staging = HostDestination(self.window_bytes)
            page_lock(self._ordinal, self._staging.window(0), self.window_bytes)
        return self._staging.window(0)

    def arrived(self, offset: int, nbytes: int) -> None:
        self.copy_from(self.window(offset), offset, nbytes)

    def copy_from(self, address: int, offset: int, nbytes: int) -> None:
        _native.gpu_copy(self._ordinal, self._address + offset, address, nbytes, True)

    def fetch(self, offset: int, nbytes: int) -> bytes:
        held = ctypes.create_string_buffer(nbytes)
        _native.gpu_copy(self._ordinal, self._address + offset, ctypes.addressof(held), nbytes, False)
        return held.raw

    def fetch_to_window(self, offset: int, nbytes: int) -> int:
        address = self.window(offset)
        _native.gpu_copy(self._ordinal, self._address + offset, address, nbytes, False)
        return address

    def poison(self) -> None:
        poison = ctypes.create_string_buffer(bytes([_POISON]) * min(64 * MIB, self.nbytes), min(64 * MIB, self.nbytes))
        for offset in range(0, self.nbytes, len(poison)):
            self.copy_from(ctypes.addressof(poison), offset, min(len(poison), self.nbytes - offset))

    def close(self) -> None:
        if self._staging is not None:
            page_unlock(self._ordinal, self._staging.window(0))
            self._staging.close()
            self._staging = None
        if self._address:
            _native.gpu_free(self._ordinal, self._address)
            self._address = 0


def _in_context(ordinal: int, name: str, *arguments: object) -> None:
    """Call a function of libcuda with a GPU's primary context current."""
    library = ctypes.CDLL(os.environ.get("GPUNVME_LIBCUDA", "libcuda.so.1"))
    context, device = ctypes.c_void_p(), ctypes.c_int()
    for step, given in (
        ("cuInit", (ctypes.c_uint(0),)),
        ("cuDeviceGet", (ctypes.byref(device), ctypes.c_int(ordinal))),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
        ("cuCtxSetCurrent", (context,)),
        (name, arguments),
    ):
        result = getattr(library, step)(*given)
        if result != 0:
            raise gpunvme.CudaError(f"{step} failed with CUDA error {result}")


def page_lock(ordinal: int, address: int, nbytes: int) -> None:
    """Page-lock host memory, so that a GPU copies from it at full speed.

    Parameters
    ----------
    ordinal : int
        The GPU's number.
    address, nbytes : int
        The memory.
    """
    _in_context(
        ordinal, "cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE)
    )


def page_unlock(ordinal: int, address: int) -> None:
    """Undo `page_lock`; the memory can be freed then."""
    _in_context(ordinal, "cuMemHostUnregister", ctypes.c_void_p(address))


def destination(device: str, nbytes: int) -> Destination:
    """Make a destination.

    Parameters
    ----------
    device : str
        ``"cpu"`` or ``"cuda:N"``.
    nbytes : int
        Its size.

    Returns
    -------
    Destination
    """
    if device == "cpu":
        return HostDestination(nbytes)
    return GpuDestination(nbytes, Device.parse(device).index)


def resolve_device(device: str) -> str:
    """Turn what a person asks for into ``"cpu"`` or ``"cuda:N"``.

    Parameters
    ----------
    device : str
        ``"auto"`` takes the first GPU if there is one.

    Returns
    -------
    str

    Raises
    ------
    gpunvme.CudaError
        If a GPU is asked for and there is none of that number.
    """
    why = _native.cuda_unavailable_reason()
    count = 0 if why else len(_native.cuda_devices())
    if device == "auto":
        return "cuda:0" if count else "cpu"
    where = Device.parse(device)
    if where.is_gpu and where.index >= count:
        raise gpunvme.CudaError(f"no device {device!r} here: {why or f'CUDA finds {count} GPUs'}")
    return str(where)


def gpu_name(device: str) -> str:
    """Return the name of the GPU that ``"cuda:N"`` stands for."""
    ordinal = Device.parse(device).index
    return next((str(gpu["name"]) for gpu in _native.cuda_devices() if gpu["index"] == ordinal), "")
