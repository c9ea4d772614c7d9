"""The CUDA driver, as far as GPU queues need it: libcuda by ctypes, with our errors.

No CUDA package is needed, and calls run without the GIL. Everything works in the device's primary context, which torch,
CuPy and the CUDA runtime use too.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from gpunvme.errors import CudaError

_Out = POINTER(c_uint64)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_Out, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_uint64,),
    "cuCtxPopCurrent_v2": (_Out,),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (_Out, c_char_p),
    "cuModuleGetFunction": (_Out, c_uint64, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_uint64),
    "cuLaunchKernel": (c_uint64, *(c_uint,) * 7, c_uint64, POINTER(c_void_p), c_void_p),
    "cuMemAlloc_v2": (_Out, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemsetD8Async": (c_uint64, ctypes.c_ubyte, c_size_t, c_uint64),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_uint64),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_uint64),
    "cuMemHostAlloc": (_Out, c_size_t, c_uint),
    "cuMemFreeHost": (c_uint64,),
    "cuMemHostGetDevicePointer_v2": (_Out, c_void_p, c_uint),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuStreamCreate": (_Out, c_uint),
    "cuStreamDestroy_v2": (c_uint64,),
    "cuStreamSynchronize": (c_uint64,),
    "cuStreamWaitEvent": (c_uint64, c_uint64, c_uint),
    "cuEventCreate": (_Out, c_uint),
    "cuEventRecord": (c_uint64, c_uint64),
    "cuEventQuery": (c_uint64,),
    "cuEventDestroy_v2": (c_uint64,),
}
_NOT_READY = 600
_INVALID_HANDLE = 400
# CUDA_ERROR_INVALID_VALUE and CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED: what was to be given back is not there.
_NOT_THERE = 1, 713
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_WRITES_ORDERING = 118  # CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING
ORDERED_FOR_OWNER = 100  # CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
_HOST_PORTABLE_MAPPED = 3
_DMA_BUF = 1  # CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
_REGISTER_IOMEMORY = 4
_NON_BLOCKING = 1
_DISABLE_TIMING = 2
_LOCAL_BYTES = 3  # CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: asking loads the function


@functools.cache
def libcuda() -> ctypes.CDLL:
    """Open libcuda and initialise it.

    Raises
    ------
    CudaError
        If there is none, or it finds no GPU.
    """
    name = os.environ.get("GPUNVME_LIBCUDA", "libcuda.so.1")
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise CudaError(f"CUDA cannot be used: {name} cannot be opened ({error}); install the NVIDIA driver") from None
    for function, arguments in _PROTOTYPES.items():
        try:
            entry = getattr(library, function)
        except AttributeError:
            raise CudaError(f"CUDA cannot be used: {name} has no {function}; update the NVIDIA driver") from None
        entry.argtypes = arguments
        entry.restype = c_int
    library.cuGetErrorName.argtypes = library.cuGetErrorString.argtypes = (c_int, POINTER(c_char_p))
    result = library.cuInit(0)
    if result:
        raise CudaError(f"CUDA cannot be used: {_describe(library, 'cuInit', result)}")
    return library


def _describe(library: ctypes.CDLL, function: str, result: int) -> str:
    name, text = c_char_p(), c_char_p()
    library.cuGetErrorName(result, byref(name))
    library.cuGetErrorString(result, byref(text))
    return f"{function}: {(name.value or b'error ' + str(result).encode()).decode()} ({(text.value or b'').decode()})"


def call(function: str, *arguments: Any) -> None:
    """Call the driver.

    Raises
    ------
    CudaError
        If it answers with an error.
    """
    library = libcuda()
    result = getattr(library, function)(*arguments)
    if result:
        raise CudaError(_describe(library, function, result), result)


def _made(function: str, *arguments: Any) -> int:
    """What a function hands out by its first parameter."""
    out = c_uint64()
    call(function, byref(out), *arguments)
    return out.value


class Gpu:
    """One GPU's primary context, retained until `close`.

    Parameters
    ----------
    index
        Number of the GPU.
    """

    def __init__(self, index: int) -> None:
        count = c_int()
        call("cuDeviceGetCount", byref(count))
        if not 0 <= index < count.value:
            raise CudaError(f"there is no GPU {index}: CUDA has {count.value}")
        device = c_int()
        call("cuDeviceGet", byref(device), index)
        self.index = index
        self._device = device.value
        self.capability = (self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR))
        if self.capability < (7, 0):
            raise CudaError(
                f"cuda:{index} has compute capability {self.capability[0]}.{self.capability[1]}; 7.0 at least"
            )
        self._context = _made("cuDevicePrimaryCtxRetain", self._device)
        self._lock = threading.Lock()

    def _attribute(self, attribute: int) -> int:
        value = c_int()
        call("cuDeviceGetAttribute", byref(value), attribute, self._device)
        return value.value

    def writes_ordering(self) -> int:
        """For whom what others write into this GPU's memory is ordered: 0 nobody, 100 its own kernels, 200 every GPU.

        ``CUGPUDirectRDMAWritesOrdering`` of the CUDA driver API. 0, too, where the driver does not know.
        """
        try:
            return self._attribute(_WRITES_ORDERING)
        except CudaError:
            return 0

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context this thread's for a while."""
        call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            popped = c_uint64()
            libcuda().cuCtxPopCurrent_v2(byref(popped))

    def _give_back(self, function: str, handle: int) -> None:
        """Call what gives something back.

        A kernel that fails takes the whole context with it: from then on the driver answers every call with that
        kernel's error. It has taken everything itself, and nobody who gives something back can do anything about it.
        What was never there, or was given back already, is a mistake of the caller's, and raised.
        """
        try:
            with self.current():
                call(function, handle)
        except CudaError as error:
            if error.code in _NOT_THERE:
                raise

    def close(self) -> None:
        """Let go of the context."""
        with self._lock:
            if self._context:
                self._context = 0
                libcuda().cuDevicePrimaryCtxRelease_v2(self._device)

    # --- memory

    def allocate(self, nbytes: int) -> int:
        """New GPU memory."""
        with self.current():
            return _made("cuMemAlloc_v2", nbytes)

    def free(self, address: int) -> None:
        """Give GPU memory back."""
        self._give_back("cuMemFree_v2", address)

    def allocate_host(self, nbytes: int) -> tuple[int, int]:
        """New page-locked memory, zeroed: its address for the host and for the GPU."""
        with self.current():
            host = _made("cuMemHostAlloc", nbytes, _HOST_PORTABLE_MAPPED)
            ctypes.memset(host, 0, nbytes)
            return host, _made("cuMemHostGetDevicePointer_v2", host, 0)

    def free_host(self, address: int) -> None:
        """Give page-locked memory back."""
        self._give_back("cuMemFreeHost", address)

    def register(self, address: int, nbytes: int, *, io: bool = False) -> int:
        """Page-lock memory of this process; its address for the GPU. ``io``: it is a device's, as a BAR is."""
        flags = _HOST_PORTABLE_MAPPED | (_REGISTER_IOMEMORY if io else 0)
        with self.current():
            call("cuMemHostRegister_v2", address, nbytes, flags)
            return _made("cuMemHostGetDevicePointer_v2", address, 0)

    def address_of_host(self, address: int) -> int:
        """Address for this GPU of memory that was page-locked, by whichever GPU."""
        with self.current():
            return _made("cuMemHostGetDevicePointer_v2", address, 0)

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        self._give_back("cuMemHostUnregister", address)

    def export(self, address: int, nbytes: int) -> int:
        """A dma-buf of GPU memory, whole pages within one allocation: its file descriptor, to be closed.

        Raises
        ------
        CudaError
            If the driver or the GPU exports none.
        """
        function = "cuMemGetHandleForAddressRange"
        try:
            entry = getattr(libcuda(), function)
        except AttributeError:
            raise CudaError(f"the driver exports no GPU memory: it has no {function}; update it") from None
        fd = c_int(-1)
        with self.current():
            # By its own types: the size is 64 bits, and the flags too (CUDA 11.7 and later).
            result = entry(byref(fd), c_uint64(address), c_size_t(nbytes), c_int(_DMA_BUF), c_uint64(0))
        if result:
            raise CudaError(f"GPU memory cannot be exported: {_describe(libcuda(), function, result)}", result)
        return fd.value

    def fill(self, address: int, nbytes: int, stream: int) -> None:
        """Zero GPU memory, in a stream's order."""
        with self.current():
            call("cuMemsetD8Async", address, 0, nbytes, stream)

    def to_gpu(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy page-locked memory to the GPU, in a stream's order."""
        with self.current():
            call("cuMemcpyHtoDAsync_v2", target, source, nbytes, stream)

    def to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy GPU memory to page-locked memory, in a stream's order."""
        with self.current():
            call("cuMemcpyDtoHAsync_v2", target, source, nbytes, stream)

    # --- streams, events, kernels

    def stream(self) -> int:
        """New stream that no other one waits for."""
        with self.current():
            return _made("cuStreamCreate", _NON_BLOCKING)

    def event(self) -> int:
        """New event, without timing."""
        with self.current():
            return _made("cuEventCreate", _DISABLE_TIMING)

    def owns(self, stream: int) -> bool:
        """Whether a stream is of this context: only there can its events be recorded."""
        with self.current():
            event = _made("cuEventCreate", _DISABLE_TIMING)
            try:
                result = libcuda().cuEventRecord(event, stream)
            finally:
                libcuda().cuEventDestroy_v2(event)
        return int(result) != _INVALID_HANDLE

    def record(self, event: int, stream: int) -> None:
        """Let an event happen when the stream comes to it."""
        with self.current():
            call("cuEventRecord", event, stream)

    def wait_event(self, stream: int, event: int) -> None:
        """Let a stream wait for an event."""
        with self.current():
            call("cuStreamWaitEvent", stream, event, 0)

    def happened(self, event: int) -> bool:
        """Whether an event has happened.

        Raises
        ------
        CudaError
            If a kernel before it failed.
        """
        with self.current():
            result = libcuda().cuEventQuery(event)
        if result == _NOT_READY:
            return False
        if result:
            raise CudaError(_describe(libcuda(), "cuEventQuery", result), result)
        return True

    def synchronize(self, stream: int | None = None) -> None:
        """Wait for a stream, or for everything on this GPU."""
        with self.current():
            if stream is None:
                call("cuCtxSynchronize")
            else:
                call("cuStreamSynchronize", stream)

    def destroy(self, *, stream: int = 0, event: int = 0) -> None:
        """Give a stream or an event back."""
        if stream:
            self._give_back("cuStreamDestroy_v2", stream)
        if event:
            self._give_back("cuEventDestroy_v2", event)

    def load(self, image: bytes) -> int:
        """Load a module: a cubin, a fatbin or PTX. It stays until the process ends."""
        with self.current():
            return _made("cuModuleLoadData", image)

    def function(self, module: int, name: str) -> int:
        """A kernel of a module, loaded for good: its first launch loads nothing any more."""
        with self.current():
            function = _made("cuModuleGetFunction", module, name.encode())
            local = c_int()
            call("cuFuncGetAttribute", byref(local), _LOCAL_BYTES, function)
            return function

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: list[Any],
        stream: int,
        shared: int = 0,
    ) -> None:
        """Launch a kernel; ``arguments`` are ctypes values or buffers."""
        addresses = (c_void_p * max(1, len(arguments)))(*(ctypes.addressof(each) for each in arguments))
        with self.current():
            call("cuLaunchKernel", function, *grid, *block, shared, stream, addresses, None)
