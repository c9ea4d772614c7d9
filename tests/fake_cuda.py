"""The fake libcuda (native/fake_cuda) as Python tests use it: device memory, user streams, delays, errors, counters.

``GPUNVME_FAKE_LIBCUDA`` names the library; conftest.py sets it where it finds a built one. The engine loads it
through ``GPUNVME_LIBCUDA``, which it reads on its first use of CUDA in the process; :func:`use` sets that. Both load
the same file and so share one state.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
NO_DEVICE = 100
INVALID_DEVICE = 101
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
NOT_READY = 600
ILLEGAL_ADDRESS = 700
HOST_MEMORY_ALREADY_REGISTERED = 712
HOST_MEMORY_NOT_REGISTERED = 713
LAUNCH_FAILED = 719

STREAM_NON_BLOCKING = 1

_HOST_FUNCTION = CFUNCTYPE(None, c_void_p)


class Counters(ctypes.Structure):
    """The fields of FakeCudaCounters in fake_cuda.h, in its order."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            "bytes_to_device",
            "bytes_to_host",
            "copies_to_device",
            "copies_to_host",
            "pageable_copies",
            "live_allocations",
            "live_allocated_bytes",
            "live_host_allocations",
            "live_host_registrations",
            "page_locked_bytes",
            "live_streams",
            "live_events",
            "retained_contexts",
            "pending_operations",
        )
    ]

    def live(self) -> dict[str, int]:
        """What exists now: equal before and after something that must not leak."""
        names = [name for name, *_ in self._fields_ if name.startswith(("live_", "page_locked"))]
        return {name: getattr(self, name) for name in names}


class FakeCudaError(Exception):
    """A control function failed; `code` is a CUresult."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} failed with CUDA error {code}")
        self.code = code


class FakeDeviceBuffer:
    """Device memory of the fake. The host cannot touch `ptr`; peek and poke can."""

    def __init__(self, cuda: FakeCuda, ptr: int, nbytes: int, device: int) -> None:
        self._cuda = cuda
        self.ptr = ptr
        self.nbytes = nbytes
        self.device = device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.ptr, False), "version": 3, "strides": None}

    def peek(self, offset: int = 0, nbytes: int | None = None) -> bytes:
        """The bytes as they are now, past all streams."""
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        data = bytearray(nbytes)
        into = (ctypes.c_char * nbytes).from_buffer(data)
        self._cuda.control("fake_cuda_peek", ctypes.addressof(into), self.ptr + offset, nbytes)
        return bytes(data)

    def poke(self, data: bytes, offset: int = 0) -> None:
        """Overwrites bytes now, past all streams."""
        self._cuda.control("fake_cuda_poke", self.ptr + offset, data, len(data))

    def fill(self, byte: int, *, stream: int = 0, delay_us: int = 0) -> None:
        """A user's kernel that writes this buffer, enqueued on a stream."""
        self._cuda.control("fake_cuda_launch_fill", self.device, stream, self.ptr, byte, self.nbytes, delay_us)

    def copy_to(self, other: FakeDeviceBuffer, *, stream: int = 0, delay_us: int = 0) -> None:
        """A user's kernel that reads this buffer (and writes another), enqueued on a stream."""
        nbytes = min(self.nbytes, other.nbytes)
        self._cuda.control("fake_cuda_launch_copy", self.device, stream, other.ptr, self.ptr, nbytes, delay_us)

    def free(self) -> None:
        """Gives the memory back. The fake aborts the process if a copy still uses it."""
        if self.ptr:
            ptr, self.ptr = self.ptr, 0
            self._cuda.control("fake_cuda_free", ptr)
            self._cuda.buffers.discard(self)

    def reallocate(self) -> None:
        """Freed, and as much allocated at the same address: to the driver it is other memory."""
        self._cuda.control("fake_cuda_reallocate", self.ptr)

    def __enter__(self) -> FakeDeviceBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()


class FakeCuda:
    """The library and its controls. The meaning of each is in native/fake_cuda/fake_cuda.h."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lib = ctypes.CDLL(path)
        self.buffers: set[FakeDeviceBuffer] = set()
        self._callbacks: list[Any] = []  # a ctypes callback must live as long as a stream may call it
        void, result = None, c_int
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "fake_cuda_reset": (void, []),
            "fake_cuda_set_device_count": (result, [c_int]),
            "fake_cuda_set_memory_limit": (result, [c_int, c_uint64]),
            "fake_cuda_set_page_lock_limit": (void, [c_uint64]),
            "fake_cuda_set_copy_time": (void, [c_uint64, c_uint64, c_uint64, c_uint64]),
            "fake_cuda_fail_call": (result, [c_char_p, c_uint64, c_int]),
            "fake_cuda_fail_copy": (result, [c_uint64, c_int]),
            "fake_cuda_hold": (void, []),
            "fake_cuda_release": (void, []),
            "fake_cuda_wait_idle": (void, []),
            "fake_cuda_run_kernels": (void, [c_int]),
            "fake_cuda_wait_for_kernels": (void, [c_int]),
            "fake_cuda_seed_kernels": (void, [c_uint64]),
            "fake_cuda_calls": (c_uint64, [c_char_p]),
            "fake_cuda_get_counters": (void, [POINTER(Counters)]),
            "fake_cuda_alloc": (result, [c_int, c_size_t, POINTER(c_uint64)]),
            "fake_cuda_free": (result, [c_uint64]),
            "fake_cuda_reallocate": (result, [c_uint64]),
            "fake_cuda_stream_create": (result, [c_int, c_uint, POINTER(c_void_p)]),
            "fake_cuda_stream_destroy": (result, [c_void_p]),
            "fake_cuda_stream_synchronize": (result, [c_int, c_void_p]),
            "fake_cuda_peek": (result, [c_void_p, c_uint64, c_size_t]),
            "fake_cuda_poke": (result, [c_uint64, c_char_p, c_size_t]),
            "fake_cuda_launch_fill": (result, [c_int, c_void_p, c_uint64, c_int, c_size_t, c_uint64]),
            "fake_cuda_launch_copy": (result, [c_int, c_void_p, c_uint64, c_uint64, c_size_t, c_uint64]),
            "fake_cuda_launch_host": (result, [c_int, c_void_p, _HOST_FUNCTION, c_void_p]),
        }
        self._checked = {name for name, (kind, _) in signatures.items() if kind is result}
        for name, (kind, parameters) in signatures.items():
            function = getattr(self.lib, name)
            function.restype = kind
            function.argtypes = parameters

    def control(self, function: str, *arguments: Any) -> Any:
        """Calls a control function; one that returns a CUresult raises unless it is success."""
        returned = getattr(self.lib, function)(*arguments)
        if function in self._checked and returned != 0:
            raise FakeCudaError(function, returned)
        return returned

    # Memory and streams of "the rest of the program".

    def alloc(self, nbytes: int, device: int = 0) -> FakeDeviceBuffer:
        pointer = c_uint64()
        self.control("fake_cuda_alloc", device, nbytes, byref(pointer))
        buffer = FakeDeviceBuffer(self, pointer.value, nbytes, device)
        self.buffers.add(buffer)
        return buffer

    def create_stream(self, device: int = 0, flags: int = STREAM_NON_BLOCKING) -> int:
        stream = c_void_p()
        self.control("fake_cuda_stream_create", device, flags, byref(stream))
        assert stream.value is not None
        return stream.value

    def destroy_stream(self, stream: int) -> None:
        self.control("fake_cuda_stream_destroy", stream)

    def synchronize(self, stream: int = 0, device: int = 0) -> None:
        self.control("fake_cuda_stream_synchronize", device, stream)

    def launch_host(self, function: Callable[[], object], *, stream: int = 0, device: int = 0) -> None:
        """Calls `function` on the stream's thread. It must not call the driver or the engine."""
        callback = _HOST_FUNCTION(lambda _: function())
        self._callbacks.append(callback)
        self.control("fake_cuda_launch_host", device, stream, callback, None)

    @contextlib.contextmanager
    def gate(self, *, stream: int = 0, device: int = 0) -> Iterator[threading.Event]:
        """A kernel that takes until the event is set, at the latest at the end of the block."""
        opened = threading.Event()
        self.launch_host(opened.wait, stream=stream, device=device)
        try:
            yield opened
        finally:
            opened.set()

    # Settings.

    def set_device_count(self, count: int) -> None:
        self.control("fake_cuda_set_device_count", count)

    def set_memory_limit(self, nbytes: int, device: int = 0) -> None:
        self.control("fake_cuda_set_memory_limit", device, nbytes)

    def set_page_lock_limit(self, nbytes: int) -> None:
        self.control("fake_cuda_set_page_lock_limit", nbytes)

    def set_copy_time(self, delay_us: int = 0, jitter_us: int = 0, bytes_per_second: int = 0, seed: int = 1) -> None:
        self.control("fake_cuda_set_copy_time", delay_us, jitter_us, bytes_per_second, seed)

    def fail_call(self, function: str, error: int, k: int = 1) -> None:
        """The k-th next call of the driver function returns `error` and does nothing."""
        self.control("fake_cuda_fail_call", function.encode(), k, error)

    def fail_copy(self, error: int = LAUNCH_FAILED, k: int = 1) -> None:
        """The k-th copy enqueued from now on fails in its turn; the error is sticky."""
        self.control("fake_cuda_fail_copy", k, error)

    def hold(self) -> None:
        self.control("fake_cuda_hold")

    def release(self) -> None:
        self.control("fake_cuda_release")

    def wait_idle(self) -> None:
        self.control("fake_cuda_wait_idle")

    # What happened.

    def calls(self, function: str) -> int:
        return int(self.control("fake_cuda_calls", function.encode()))

    def counters(self) -> Counters:
        counters = Counters()
        self.control("fake_cuda_get_counters", byref(counters))
        return counters

    def reset(self) -> None:
        """Settings, counters and errors as at the start, and the buffers of this wrapper freed."""
        self.control("fake_cuda_reset")
        for buffer in list(self.buffers):
            buffer.free()
        self._callbacks.clear()


_loaded: FakeCuda | None = None


def load() -> FakeCuda:
    """The library, reset, for tests that call it themselves. Skips the test where the library is not built."""
    global _loaded
    path = os.environ.get("GPUNVME_FAKE_LIBCUDA")
    if not path:
        pytest.skip("no libcuda for tests: run `make native-plain`, or name it in GPUNVME_FAKE_LIBCUDA")
    if _loaded is None or _loaded.path != path:
        _loaded = FakeCuda(path)
    _loaded.reset()
    return _loaded


def use() -> FakeCuda:
    """The same, after making it the libcuda of this process's engine and of its children's.

    For a fixture::

        @pytest.fixture
        def fake():
            cuda = fake_cuda.use()
            yield cuda
            cuda.reset()

    Call it before anything in the process has used CUDA through gpunvme: the engine chooses its libcuda once.
    """
    cuda = load()
    os.environ["GPUNVME_LIBCUDA"] = cuda.path
    return cuda
