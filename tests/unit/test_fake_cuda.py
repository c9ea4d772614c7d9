"""The fake libcuda itself: what the engine's tests would lose if it lied.

A fake that copies at once hides a slot reused too early; one whose events pass too early or too late hides a missing
wait; one that forgets an error or a live object hides a swallowed error or a leak.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fake_cuda
from fake_cuda import FakeCuda, FakeCudaError

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent.parent
FRESH = 0xA5
NBYTES = 4096


class Driver:
    """The driver's functions, called as the engine calls them."""

    def __init__(self, fake: FakeCuda) -> None:
        self.lib = fake.lib

    def call(self, function: str, *arguments: Any) -> int:
        return int(getattr(self.lib, function)(*arguments))

    def ok(self, function: str, *arguments: Any) -> None:
        assert self.call(function, *arguments) == 0, function

    def make_current(self, device: int = 0) -> None:
        self.ok("cuInit", 0)
        context = c_void_p()
        self.ok("cuDevicePrimaryCtxRetain", byref(context), device)
        self.ok("cuCtxSetCurrent", context)

    def stream(self, flags: int = fake_cuda.STREAM_NON_BLOCKING) -> c_void_p:
        stream = c_void_p()
        self.ok("cuStreamCreate", byref(stream), flags)
        return stream

    def event(self) -> c_void_p:
        event = c_void_p()
        self.ok("cuEventCreate", byref(event), 2)
        return event

    def page_locked(self, nbytes: int = NBYTES) -> Any:
        pointer = c_void_p()
        self.ok("cuMemHostAlloc", byref(pointer), c_size_t(nbytes), 1)
        assert pointer.value is not None
        return (ctypes.c_ubyte * nbytes).from_address(pointer.value)

    def to_device(self, to: int, source: Any, stream: c_void_p, nbytes: int = NBYTES) -> int:
        return self.call("cuMemcpyHtoDAsync_v2", c_uint64(to), source, c_size_t(nbytes), stream)

    def to_host(self, target: Any, from_: int, stream: c_void_p, nbytes: int = NBYTES) -> int:
        return self.call("cuMemcpyDtoHAsync_v2", target, c_uint64(from_), c_size_t(nbytes), stream)


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    cuda = fake_cuda.load()
    yield cuda
    cuda.reset()


@pytest.fixture
def driver(fake: FakeCuda) -> Iterator[Driver]:
    driver = Driver(fake)
    driver.make_current()
    yield driver
    fake.reset()
    driver.call("cuCtxSetCurrent", None)


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    prologue = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import fake_cuda; cuda = fake_cuda.load()"
    command = [sys.executable, "-c", f"{prologue}\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# --- copies


def test_copy_reads_its_source_after_the_call_returned(fake: FakeCuda, driver: Driver) -> None:
    stream, source, target = driver.stream(), driver.page_locked(), fake.alloc(NBYTES)
    source[:] = [1] * NBYTES
    fake.hold()
    assert driver.to_device(target.ptr, source, stream) == 0
    source[:] = [2] * NBYTES  # an engine that does this without waiting for its event corrupts data
    assert target.peek() == bytes([FRESH] * NBYTES)
    fake.release()
    driver.ok("cuStreamSynchronize", stream)
    assert target.peek() == bytes([2] * NBYTES)


def test_copy_to_host_arrives_after_the_call_returned(fake: FakeCuda, driver: Driver) -> None:
    stream, target, source = driver.stream(), driver.page_locked(), fake.alloc(NBYTES)
    source.poke(b"x" * NBYTES)
    fake.hold()
    assert driver.to_host(target, source.ptr, stream) == 0
    assert bytes(target) == bytes([FRESH] * NBYTES)
    fake.release()
    driver.ok("cuStreamSynchronize", stream)
    assert bytes(target) == b"x" * NBYTES


def test_pageable_copies_are_staged_waited_for_and_counted(fake: FakeCuda, driver: Driver) -> None:
    stream, device = driver.stream(), fake.alloc(NBYTES)
    host = (ctypes.c_ubyte * NBYTES)(*[3] * NBYTES)
    fake.hold()
    assert driver.to_device(device.ptr, host, stream) == 0
    host[:] = [4] * NBYTES
    fake.release()
    assert driver.to_host(host, device.ptr, stream) == 0  # returns when it has arrived
    assert bytes(host) == bytes([3] * NBYTES)
    counters = fake.counters()
    assert (counters.pageable_copies, counters.bytes_to_device, counters.bytes_to_host) == (2, NBYTES, NBYTES)


def test_copy_takes_delay_and_bandwidth(fake: FakeCuda, driver: Driver) -> None:
    stream, source, target = driver.stream(), driver.page_locked(), fake.alloc(NBYTES)
    fake.set_copy_time(delay_us=10_000, bytes_per_second=NBYTES * 50)
    start = time.perf_counter()
    assert driver.to_device(target.ptr, source, stream) == 0
    driver.ok("cuStreamSynchronize", stream)
    assert time.perf_counter() - start >= 0.03


@pytest.mark.parametrize(("offset", "nbytes"), [(1, NBYTES), (0, NBYTES + 1), (-1, 2), (NBYTES, 1)])
def test_copy_beyond_an_allocation_is_refused(fake: FakeCuda, driver: Driver, offset: int, nbytes: int) -> None:
    stream, host, device = driver.stream(), driver.page_locked(2 * NBYTES), fake.alloc(NBYTES)
    for copy in (
        driver.to_device(device.ptr + offset, host, stream, nbytes),
        driver.to_host(host, device.ptr + offset, stream, nbytes),
    ):
        assert copy == fake_cuda.INVALID_VALUE


def test_copy_partly_page_locked_is_refused(fake: FakeCuda, driver: Driver) -> None:
    stream, device = driver.stream(), fake.alloc(3 * NBYTES)
    host = (ctypes.c_ubyte * (3 * NBYTES))()
    address = ctypes.addressof(host)
    driver.ok("cuMemHostRegister_v2", c_void_p(address), c_size_t(NBYTES), 1)
    assert driver.to_device(device.ptr, host, stream, 2 * NBYTES) == fake_cuda.INVALID_VALUE
    driver.ok("cuMemHostRegister_v2", c_void_p(address + NBYTES), c_size_t(NBYTES), 1)
    assert driver.to_device(device.ptr, host, stream, 2 * NBYTES) == fake_cuda.INVALID_VALUE
    for registered in (address, address + NBYTES):
        driver.ok("cuMemHostUnregister", c_void_p(registered))


# --- order


def test_stream_is_in_order_and_streams_are_not(fake: FakeCuda) -> None:
    slow, quick, buffer = fake.create_stream(), fake.create_stream(), fake.alloc(8)
    other = fake.alloc(8)
    with fake.gate(stream=slow):
        buffer.fill(1, stream=slow, delay_us=1000)
        buffer.fill(2, stream=slow)
        other.fill(9, stream=quick)
        fake.synchronize(quick)
        assert (other.peek(), buffer.peek()) == (bytes([9] * 8), bytes([FRESH] * 8))
    fake.synchronize(slow)
    assert buffer.peek() == bytes([2] * 8)


def test_event_passes_with_what_was_before_its_record(fake: FakeCuda, driver: Driver) -> None:
    stream, event, buffer = driver.stream(), driver.event(), fake.alloc(8)
    assert driver.call("cuEventQuery", event) == 0  # never recorded
    fake.hold()
    buffer.fill(1, stream=stream.value or 0)
    driver.ok("cuEventRecord", event, stream)
    assert driver.call("cuEventQuery", event) == fake_cuda.NOT_READY
    with fake.gate(stream=stream.value or 0):
        buffer.fill(2, stream=stream.value or 0)
        fake.release()
        driver.ok("cuEventSynchronize", event)
        assert buffer.peek() == bytes([1] * 8)
        driver.ok("cuEventRecord", event, stream)
        assert driver.call("cuEventQuery", event) == fake_cuda.NOT_READY  # it now stands for the second record
    driver.ok("cuEventSynchronize", event)
    assert buffer.peek() == bytes([2] * 8)


def test_wait_refers_to_the_record_before_it(fake: FakeCuda, driver: Driver) -> None:
    first, second, event, buffer = driver.stream(), driver.stream(), driver.event(), fake.alloc(8)
    seen = fake.alloc(8)
    fake.hold()
    buffer.fill(1, stream=first.value or 0, delay_us=10_000)
    driver.ok("cuEventRecord", event, first)
    driver.ok("cuStreamWaitEvent", second, event, 0)
    buffer.copy_to(seen, stream=second.value or 0)
    with fake.gate(stream=first.value or 0):
        buffer.fill(2, stream=first.value or 0)
        driver.ok("cuEventRecord", event, first)  # does not move the wait above
        driver.ok("cuEventDestroy_v2", event)  # nor does this undo it
        fake.release()
        driver.ok("cuStreamSynchronize", second)
    assert seen.peek() == bytes([1] * 8)


@pytest.mark.parametrize(("flags", "ordered"), [(0, True), (fake_cuda.STREAM_NON_BLOCKING, False)])
def test_legacy_default_stream_waits_for_blocking_streams_only(fake: FakeCuda, flags: int, ordered: bool) -> None:
    stream, buffer, seen, after = fake.create_stream(flags=flags), fake.alloc(8), fake.alloc(8), fake.alloc(8)
    with fake.gate(stream=stream):
        buffer.fill(1, stream=stream)
        buffer.copy_to(seen, stream=0)
        if ordered:
            after.fill(2, stream=fake.create_stream(flags=flags))  # blocking streams wait for the default stream
            time.sleep(0.02)
            assert after.peek() == bytes([FRESH] * 8)
        else:
            fake.synchronize(0)
        assert seen.peek() == bytes([FRESH] * 8)
    fake.synchronize(0)
    fake.synchronize(stream)
    assert seen.peek() == bytes([1 if ordered else FRESH] * 8)


def test_destroyed_stream_finishes_its_work(fake: FakeCuda, driver: Driver) -> None:
    stream, buffer = driver.stream(), fake.alloc(8)
    fake.hold()
    buffer.fill(5, stream=stream.value or 0)
    driver.ok("cuStreamDestroy_v2", stream)
    assert driver.call("cuStreamSynchronize", stream) == fake_cuda.INVALID_HANDLE
    fake.release()
    fake.wait_idle()
    assert buffer.peek() == bytes([5] * 8)


# --- errors


def test_injected_error_hits_the_call_it_was_meant_for(fake: FakeCuda, driver: Driver) -> None:
    fake.fail_call("cuStreamCreate", fake_cuda.OUT_OF_MEMORY, k=2)
    before = fake.counters().live_streams
    driver.stream()
    stream = c_void_p()
    assert driver.call("cuStreamCreate", byref(stream), 1) == fake_cuda.OUT_OF_MEMORY
    assert stream.value is None
    driver.stream()
    assert fake.counters().live_streams == before + 2
    assert fake.calls("cuStreamCreate") == 3
    with pytest.raises(FakeCudaError):
        fake.fail_call("cuMemcpyDtoD", fake_cuda.OUT_OF_MEMORY)  # the engine never calls it: a slip in a test


def test_failed_copy_shows_when_waited_for_and_stays(fake: FakeCuda, driver: Driver) -> None:
    stream, event, source = driver.stream(), driver.event(), driver.page_locked()
    good, bad, dropped = fake.alloc(NBYTES), fake.alloc(NBYTES), fake.alloc(NBYTES)
    source[:] = [1] * NBYTES
    fake.fail_copy(fake_cuda.LAUNCH_FAILED, k=2)
    fake.hold()
    for target in (good, bad, dropped):
        assert driver.to_device(target.ptr, source, stream) == 0
    driver.ok("cuEventRecord", event, stream)
    fake.release()
    assert driver.call("cuEventSynchronize", event) == fake_cuda.LAUNCH_FAILED
    assert driver.call("cuStreamSynchronize", stream) == fake_cuda.LAUNCH_FAILED
    assert driver.to_device(good.ptr, source, stream) == fake_cuda.LAUNCH_FAILED
    fresh = bytes([FRESH] * NBYTES)
    assert (good.peek(), bad.peek(), dropped.peek()) == (bytes([1] * NBYTES), fresh, fresh)
    driver.make_current(1)  # another device is not affected
    driver.ok("cuStreamSynchronize", driver.stream())


def test_calls_without_init_or_context(fake: FakeCuda) -> None:
    child = run_python(
        """
from ctypes import *
print(cuda.lib.cuDeviceGetCount(byref(c_int())), cuda.lib.cuStreamCreate(byref(c_void_p()), 1))
cuda.set_device_count(0)
print(cuda.lib.cuInit(0))
cuda.set_device_count(1)
print(cuda.lib.cuInit(0), cuda.lib.cuStreamCreate(byref(c_void_p()), 1), cuda.lib.cuDeviceGet(byref(c_int()), 1))
""",
    )
    assert child.stdout.split() == ["3", "3", "100", "0", "201", "101"], child.stderr


def test_context_is_current_in_its_thread_only(fake: FakeCuda, driver: Driver) -> None:
    returned: list[int] = []
    thread = threading.Thread(target=lambda: returned.append(driver.call("cuStreamSynchronize", None)))
    thread.start()
    thread.join()
    assert returned == [fake_cuda.INVALID_CONTEXT]


def test_forked_child_cannot_use_cuda(fake: FakeCuda) -> None:
    program = "import os; cuda.lib.cuInit(0); cuda.create_stream()\npid = os.fork()\n"
    program += "if pid == 0: os._exit(cuda.lib.cuInit(0))\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    child = run_python(program)
    assert child.stdout.split() == [str(fake_cuda.NOT_INITIALIZED)], child.stderr


def test_error_texts(fake: FakeCuda, driver: Driver) -> None:
    text = c_char_p()
    driver.ok("cuGetErrorName", 719, byref(text))
    assert text.value == b"CUDA_ERROR_LAUNCH_FAILED"
    assert driver.call("cuGetErrorString", 12345, byref(text)) == fake_cuda.INVALID_VALUE


# --- memory


def test_device_addresses_cannot_be_touched_by_the_host(fake: FakeCuda) -> None:
    child = run_python("import ctypes; ctypes.string_at(cuda.alloc(4096).ptr, 1)")
    assert child.returncode == -signal.SIGSEGV


def test_memory_given_back_in_flight_aborts(fake: FakeCuda) -> None:
    program = "buffer = cuda.alloc(4096); cuda.hold(); buffer.fill(1); buffer.free()"
    child = run_python(program)
    assert child.returncode == -signal.SIGABRT
    assert "has not finished" in child.stderr


def test_limits(fake: FakeCuda, driver: Driver) -> None:
    fake.set_memory_limit(fake.counters().live_allocated_bytes + NBYTES)
    first = fake.alloc(NBYTES)
    assert driver.call("cuMemAlloc_v2", byref(c_uint64()), c_size_t(1)) == fake_cuda.OUT_OF_MEMORY
    first.free()
    fake.alloc(NBYTES)
    fake.set_page_lock_limit(fake.counters().page_locked_bytes + NBYTES)
    host = driver.page_locked(NBYTES)
    assert driver.call("cuMemHostAlloc", byref(c_void_p()), c_size_t(1), 1) == fake_cuda.OUT_OF_MEMORY
    other = (ctypes.c_ubyte * NBYTES)()
    assert driver.call("cuMemHostRegister_v2", other, c_size_t(1), 1) == fake_cuda.OUT_OF_MEMORY
    driver.ok("cuMemFreeHost", host)
    driver.ok("cuMemHostRegister_v2", other, c_size_t(NBYTES), 1)
    driver.ok("cuMemHostUnregister", other)


def test_registrations(fake: FakeCuda, driver: Driver) -> None:
    host = (ctypes.c_ubyte * NBYTES)()
    address = ctypes.addressof(host)
    assert driver.call("cuMemHostUnregister", host) == fake_cuda.HOST_MEMORY_NOT_REGISTERED
    driver.ok("cuMemHostRegister_v2", host, c_size_t(NBYTES), 1)
    for begin, nbytes in ((address, NBYTES), (address + 10, 1), (address - 10, 11), (address + NBYTES - 1, 10)):
        returned = driver.call("cuMemHostRegister_v2", c_void_p(begin), c_size_t(nbytes), 1)
        assert returned == fake_cuda.HOST_MEMORY_ALREADY_REGISTERED
    assert driver.call("cuMemHostUnregister", c_void_p(address + 1)) == fake_cuda.INVALID_VALUE
    assert driver.call("cuMemFreeHost", host) == fake_cuda.INVALID_VALUE
    driver.ok("cuMemHostUnregister", host)
    assert driver.call("cuMemHostRegister_v2", c_void_p(4096), c_size_t(1), 1) == fake_cuda.INVALID_VALUE  # unmapped


def test_pointer_questions(fake: FakeCuda, driver: Driver) -> None:
    device, host, pageable = fake.alloc(5000, device=1), driver.page_locked(), ctypes.c_ubyte()
    kind, ordinal = c_uint(), c_int()
    driver.ok("cuPointerGetAttribute", byref(kind), 2, c_uint64(device.ptr + 4999))
    driver.ok("cuPointerGetAttribute", byref(ordinal), 9, c_uint64(device.ptr))
    assert (kind.value, ordinal.value) == (2, 1)
    driver.ok("cuPointerGetAttribute", byref(kind), 2, c_uint64(ctypes.addressof(host)))
    assert kind.value == 1
    for unknown in (device.ptr + 5000, ctypes.addressof(pageable), 0):
        assert driver.call("cuPointerGetAttribute", byref(kind), 2, c_uint64(unknown)) == fake_cuda.INVALID_VALUE
    base, nbytes = c_uint64(), c_size_t()
    driver.ok("cuMemGetAddressRange_v2", byref(base), byref(nbytes), c_uint64(device.ptr + 17))
    assert (base.value, nbytes.value) == (device.ptr, 5000)


def test_leaks_are_counted(fake: FakeCuda, driver: Driver) -> None:
    before = fake.counters().live()
    stream, event, host, device = driver.stream(), driver.event(), driver.page_locked(), c_uint64()
    driver.ok("cuMemAlloc_v2", byref(device), c_size_t(NBYTES))
    registered = (ctypes.c_ubyte * 100)()
    driver.ok("cuMemHostRegister_v2", registered, c_size_t(100), 1)
    now = fake.counters().live()
    assert {name: now[name] - before[name] for name in before} == {
        "live_allocations": 1,
        "live_allocated_bytes": NBYTES,
        "live_host_allocations": 1,
        "live_host_registrations": 1,
        "page_locked_bytes": NBYTES + 100,
        "live_streams": 1,
        "live_events": 1,
    }
    driver.ok("cuStreamDestroy_v2", stream)
    driver.ok("cuEventDestroy_v2", event)
    driver.ok("cuMemFreeHost", host)
    driver.ok("cuMemFree_v2", device)
    driver.ok("cuMemHostUnregister", registered)
    assert fake.counters().live() == before


def test_exports_what_the_engine_loads(fake: FakeCuda) -> None:
    header = (TESTS.parent / "native/engine/cuda_driver.h").read_text()
    names = [line.split("(")[1].split(",")[0] for line in header.splitlines() if line.startswith("  X(")]
    assert len(names) > 20
    assert [name for name in names if not hasattr(fake.lib, name)] == []


def test_same_library_for_engine_and_controls(fake: FakeCuda) -> None:
    again = ctypes.CDLL(fake.path, mode=os.RTLD_LOCAL | os.RTLD_NOW)
    before = fake.calls("cuDriverGetVersion")
    again.cuDriverGetVersion(byref(c_int()))
    assert fake.calls("cuDriverGetVersion") == before + 1
