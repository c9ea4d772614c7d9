"""The little of the CUDA driver that cuFile's callers need: contexts of threads, events, what an address is."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_uint64, c_void_p
from typing import Any

from gpunvme import _native
from gpunvme.errors import CudaError

_Out = POINTER(c_uint64)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetUuid": (c_char_p, c_int),
    "cuDevicePrimaryCtxRetain": (_Out, c_int),
    "cuCtxGetCurrent": (_Out,),
    "cuCtxSetCurrent": (c_uint64,),
    "cuStreamCreate": (_Out, c_uint),
    "cuStreamDestroy_v2": (c_uint64,),
    "cuStreamWaitEvent": (c_uint64, c_uint64, c_uint),
    "cuEventCreate": (_Out, c_uint),
    "cuEventRecord": (c_uint64, c_uint64),
    "cuEventQuery": (c_uint64,),
    "cuEventDestroy_v2": (c_uint64,),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}
_BUFFER_ID = 7
_LEGACY_IPC_CAPABLE = 11
_NON_BLOCKING = 1
_NOT_READY = 600
_DISABLE_TIMING = 2


@functools.cache
def _libcuda() -> ctypes.CDLL:
    if reason := _native.cuda_unavailable_reason():  # which loads and initialises it
        raise CudaError(reason)
    name = os.environ.get("GPUNVME_LIBCUDA", "libcuda.so.1")
    library = ctypes.CDLL(name)
    for function, arguments in _PROTOTYPES.items():
        try:
            entry = getattr(library, function)
        except AttributeError:
            raise CudaError(f"CUDA cannot be used: {name} has no {function}; update the NVIDIA driver") from None
        entry.argtypes = arguments
        entry.restype = c_int
    return library


def _call(function: str, *arguments: Any) -> None:
    library = _libcuda()
    result = getattr(library, function)(*arguments)
    if result:
        name = c_char_p()
        library.cuGetErrorName(result, byref(name))
        raise CudaError(f"{function}: {(name.value or b'error ' + str(result).encode()).decode()}")


def _made(function: str, *arguments: Any) -> int:
    out = c_uint64()
    _call(function, byref(out), *arguments)
    return out.value


class Context:
    """The primary context of one GPU, which torch, CuPy and the CUDA runtime use too; never released."""

    def __init__(self, index: int) -> None:
        self.index = index
        device = c_int()
        _call("cuDeviceGet", byref(device), index)
        uuid = ctypes.create_string_buffer(16)
        _call("cuDeviceGetUuid", uuid, device.value)
        self.uuid = uuid.raw
        self._context = _made("cuDevicePrimaryCtxRetain", device.value)

    def make_current(self) -> None:
        """Make it this thread's for good."""
        _call("cuCtxSetCurrent", self._context)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it this thread's for a while."""
        before = _made("cuCtxGetCurrent")
        _call("cuCtxSetCurrent", self._context)
        try:
            yield
        finally:
            _libcuda().cuCtxSetCurrent(before)

    def stream(self) -> int:
        """New stream that no other one waits for."""
        with self.current():
            return _made("cuStreamCreate", _NON_BLOCKING)

    def record(self, stream: int) -> int:
        """New event, which happens when the stream has done what is queued there now."""
        with self.current():
            event = _made("cuEventCreate", _DISABLE_TIMING)
            try:
                _call("cuEventRecord", event, stream)
            except CudaError:
                _libcuda().cuEventDestroy_v2(event)
                raise
            return event

    def destroy_event(self, event: int) -> None:
        """Give an event back; work that waits for it still does."""
        with self.current():
            _libcuda().cuEventDestroy_v2(event)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back; work that is queued there is still done."""
        with self.current():
            _libcuda().cuStreamDestroy_v2(stream)

    def happened(self, event: int) -> bool:
        """Whether an event has happened.

        Raises
        ------
        CudaError
            If something before it failed.
        """
        with self.current():
            result = _libcuda().cuEventQuery(event)
            if result == _NOT_READY:
                return False
            if result:
                _call("cuEventQuery", event)
        return True

    def let_wait(self, stream: int, event: int) -> None:
        """Let a stream wait for an event."""
        with self.current():
            _call("cuStreamWaitEvent", stream, event, 0)

    @staticmethod
    def buffer_id(address: int) -> int | None:
        """Number of the allocation at an address, which no other one of this process ever gets.

        None where it is not known to stand for the same memory for as long as it lives: memory mapped by cuMemMap may
        change under its address, and memory of pools comes back to them.
        """
        library = _libcuda()
        plain = c_int()
        if library.cuPointerGetAttribute(byref(plain), _LEGACY_IPC_CAPABLE, address) or not plain.value:
            return None
        number = c_uint64()
        if library.cuPointerGetAttribute(byref(number), _BUFFER_ID, address):
            return None
        return number.value


@functools.cache
def context(index: int) -> Context:
    """Context of a GPU, one object for each.

    Raises
    ------
    CudaError
        If it cannot be had.
    """
    return Context(index)
