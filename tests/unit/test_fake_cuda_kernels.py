"""The fake libcuda's kernels: modules, launches, streams, errors. The emulated GPU itself is tested by test_simt.cpp.

If the fake lied here, the tests of GPU queues would call right what hangs or goes wrong on a GPU.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from ctypes import addressof, byref, c_char_p, c_double, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import pytest

import emulated_gpu
import fake_cuda
from fake_cuda import FakeCuda, FakeDeviceBuffer

SOURCE = """
struct Big { unsigned long long words[20]; };
extern "C" __global__ void fill(unsigned* out, unsigned char count, double value, Big big) {
  const unsigned me = blockIdx.x * blockDim.x + threadIdx.x;
  if (me < count) out[me] = static_cast<unsigned>(value) + me + static_cast<unsigned>(big.words[19]);
}
extern "C" __global__ void wait_for(unsigned* flag) {
  while (atomicAdd(flag, 0u) == 0) __nanosleep(100);
}
extern "C" __global__ void set(unsigned* flag, unsigned value) { atomicExch(flag, value); }
extern "C" __global__ void trap() { __trap(); }
"""
NOT_FOUND, NOT_SUPPORTED, INVALID_IMAGE = 500, 801, 200
PAGE = 4096


class Gpu:
    """Device 0 with the kernels of SOURCE."""

    def __init__(self, fake: FakeCuda, image: bytes) -> None:
        self.fake = fake
        fake.control("fake_cuda_run_kernels", 1)
        self.ok("cuInit", 0)
        self.context = c_uint64()
        self.ok("cuDevicePrimaryCtxRetain", byref(self.context), 0)
        self.ok("cuCtxPushCurrent_v2", self.context)
        self.module = c_uint64()
        self.ok("cuModuleLoadData", byref(self.module), c_char_p(image))
        # Now: nothing may be loaded while a kernel runs.
        self.functions = {name: self._function(name) for name in ("fill", "wait_for", "set", "trap")}

    def call(self, function: str, *arguments: Any) -> int:
        return int(getattr(self.fake.lib, function)(*arguments))

    def ok(self, function: str, *arguments: Any) -> None:
        assert self.call(function, *arguments) == 0, function

    def _function(self, name: str) -> c_uint64:
        function = c_uint64()
        self.ok("cuModuleGetFunction", byref(function), self.module, name.encode())
        return function

    def launch(self, name: str, *arguments: Any, threads: int = 1, stream: int = 0, blocks: int = 1) -> int:
        parameters = (c_void_p * max(1, len(arguments)))(*(addressof(each) for each in arguments))
        grid, block = [c_uint(blocks), c_uint(1), c_uint(1)], [c_uint(threads), c_uint(1), c_uint(1)]
        return self.call(
            "cuLaunchKernel", self.functions[name], *grid, *block, c_uint(0), c_uint64(stream), parameters, None
        )

    def stream(self) -> int:
        stream = c_uint64()
        self.ok("cuStreamCreate", byref(stream), 1)
        return stream.value


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    fake = fake_cuda.load()
    gpu = Gpu(fake, emulated_gpu.library(SOURCE))
    yield gpu
    fake.reset()
    gpu.call("cuCtxPopCurrent_v2", byref(c_uint64()))
    gpu.call("cuDevicePrimaryCtxRelease_v2", 0)


def words(buffer: FakeDeviceBuffer, count: int) -> list[int]:
    return list((c_uint * count).from_buffer_copy(buffer.peek(0, 4 * count)))


def test_kernels_get_their_parameters_as_they_were_at_the_launch(gpu: Gpu) -> None:
    out = gpu.fake.alloc(PAGE)
    pointer, value, big = c_uint64(out.ptr), c_double(1000), (c_uint64 * 20)(*range(20))
    gpu.fake.hold()
    assert gpu.launch("fill", pointer, c_ubyte(70), value, big, threads=40, blocks=2) == 0
    pointer.value = value.value = big[19] = 0
    gpu.fake.release()
    gpu.ok("cuCtxSynchronize")
    assert words(out, 71) == [1019 + me for me in range(70)] + [0xA5A5A5A5]


def test_kernels_copies_and_fills_keep_the_streams_order(gpu: Gpu) -> None:
    out, stream, host = gpu.fake.alloc(PAGE), gpu.stream(), c_void_p()
    gpu.ok("cuMemHostAlloc", byref(host), c_size_t(PAGE), 3)
    device = c_uint64()
    gpu.ok("cuMemHostGetDevicePointer_v2", byref(device), host, 0)
    assert gpu.call("cuMemHostGetDevicePointer_v2", byref(device), c_void_p(64), 0) == fake_cuda.INVALID_VALUE
    got = (c_uint * 2).from_address(device.value)
    gpu.fake.hold()
    assert gpu.launch("set", c_uint64(out.ptr), c_uint(7), stream=stream) == 0
    gpu.ok("cuMemcpyDtoHAsync_v2", host, c_uint64(out.ptr), c_size_t(4), c_uint64(stream))
    gpu.ok("cuMemsetD8Async", c_uint64(out.ptr), c_ubyte(1), c_size_t(8), c_uint64(stream))
    gpu.ok("cuMemcpyDtoHAsync_v2", c_void_p(device.value + 4), c_uint64(out.ptr + 4), c_size_t(4), c_uint64(stream))
    gpu.fake.release()
    gpu.ok("cuStreamSynchronize", c_uint64(stream))
    assert list(got) == [7, 0x01010101]
    gpu.ok("cuMemFreeHost", host)


def test_a_kernel_that_spins_holds_up_its_stream_only(gpu: Gpu) -> None:
    flag, spins, other = gpu.fake.alloc(PAGE), gpu.stream(), gpu.stream()
    flag.poke(bytes(PAGE))
    event = c_uint64()
    gpu.ok("cuEventCreate", byref(event), 2)
    assert gpu.launch("wait_for", c_uint64(flag.ptr), threads=40, stream=spins) == 0
    gpu.ok("cuEventRecord", event, c_uint64(spins))
    assert gpu.launch("set", c_uint64(flag.ptr + 64), c_uint(1), stream=other) == 0
    gpu.ok("cuStreamSynchronize", c_uint64(other))
    assert gpu.call("cuEventQuery", event) == fake_cuda.NOT_READY
    assert gpu.launch("set", c_uint64(flag.ptr), c_uint(1), stream=other) == 0
    gpu.ok("cuCtxSynchronize")
    assert gpu.call("cuEventQuery", event) == 0
    gpu.ok("cuEventDestroy_v2", event)


def test_what_cannot_be_launched_is_refused(gpu: Gpu) -> None:
    assert gpu.call("cuModuleGetFunction", byref(c_uint64()), gpu.module, b"unknown") == NOT_FOUND
    assert gpu.call("cuModuleGetFunction", byref(c_uint64()), c_uint64(1), b"set") == fake_cuda.INVALID_HANDLE
    out = c_uint64(gpu.fake.alloc(PAGE).ptr)
    for threads, blocks in ((0, 1), (1025, 1), (1, 0)):
        assert gpu.launch("set", out, c_uint(1), threads=threads, blocks=blocks) == fake_cuda.INVALID_VALUE
    assert gpu.launch("set", out, c_uint(1), stream=99) == fake_cuda.INVALID_HANDLE
    # The package's own kernels, whatever the image: a fatbin, say.
    module = c_uint64()
    gpu.ok("cuModuleLoadData", byref(module), c_char_p(b"\x50\xed\x55\xba" + bytes(60)))
    gpu.ok("cuModuleGetFunction", byref(c_uint64()), module, b"gpunvme_gather")
    assert gpu.call("cuModuleGetFunction", byref(c_uint64()), module, b"set") == NOT_FOUND
    for attribute, value in ((75, 9), (76, 0), (10, 32)):
        answer = c_int()
        gpu.ok("cuDeviceGetAttribute", byref(answer), attribute, 0)
        assert answer.value == value
    gpu.fake.control("fake_cuda_run_kernels", 0)
    assert gpu.call("cuModuleLoadData", byref(module), c_char_p(bytes(64))) == NOT_SUPPORTED


def test_another_gpus_context_has_nothing_of_this_ones(gpu: Gpu) -> None:
    """Code that forgets which GPU is current must fail here as it does where there are several."""
    out, here, host, event = gpu.fake.alloc(PAGE), gpu.stream(), c_void_p(), c_uint64()
    allocated, registered = c_uint64(), (c_ubyte * PAGE)()
    gpu.ok("cuMemHostAlloc", byref(host), c_size_t(PAGE), 0)
    gpu.ok("cuMemHostRegister_v2", registered, c_size_t(PAGE), 2)
    gpu.ok("cuMemAlloc_v2", byref(allocated), c_size_t(PAGE))
    gpu.ok("cuEventCreate", byref(event), 2)
    other = c_uint64()
    gpu.ok("cuDevicePrimaryCtxRetain", byref(other), 1)
    gpu.ok("cuCtxPushCurrent_v2", other)
    there, address = gpu.stream(), c_uint64()
    handle, context = fake_cuda.INVALID_HANDLE, fake_cuda.INVALID_CONTEXT
    assert gpu.launch("set", c_uint64(out.ptr), c_uint(1)) == handle
    assert gpu.launch("set", c_uint64(out.ptr), c_uint(1), stream=there) == handle
    assert gpu.call("cuModuleGetFunction", byref(c_uint64()), gpu.module, b"set") == handle
    assert gpu.call("cuMemsetD8Async", c_uint64(out.ptr), c_ubyte(1), c_size_t(8), c_uint64(here)) == handle
    assert gpu.call("cuEventRecord", event, c_uint64(there)) == handle
    assert gpu.call("cuMemFree_v2", allocated) == context
    assert gpu.call("cuMemFreeHost", host) == context
    assert gpu.call("cuMemHostUnregister", registered) == context
    # What is not portable is not this GPU's; what cuMemHostAlloc makes always is.
    assert gpu.call("cuMemHostGetDevicePointer_v2", byref(address), registered, 0) == fake_cuda.INVALID_VALUE
    gpu.ok("cuMemHostGetDevicePointer_v2", byref(address), host, 0)
    # Copies, waits and queries may name another GPU's streams and events.
    gpu.ok("cuMemcpyHtoDAsync_v2", c_uint64(out.ptr), host, c_size_t(8), c_uint64(here))
    gpu.ok("cuStreamWaitEvent", c_uint64(there), event, 0)
    gpu.ok("cuStreamSynchronize", c_uint64(here))
    gpu.ok("cuEventQuery", event)
    gpu.ok("cuCtxPopCurrent_v2", byref(c_uint64()))
    assert gpu.launch("set", c_uint64(out.ptr), c_uint(1), stream=there) == handle
    for function, what in (("cuMemFree_v2", allocated), ("cuMemFreeHost", host), ("cuMemHostUnregister", registered)):
        gpu.ok(function, what)
    gpu.ok("cuEventDestroy_v2", event)
    gpu.ok("cuDevicePrimaryCtxRelease_v2", 1)


def test_a_trap_is_an_error_of_its_device_for_good(gpu: Gpu) -> None:
    out, stream = gpu.fake.alloc(PAGE), gpu.stream()
    assert gpu.launch("trap", threads=33, stream=stream) == 0
    assert gpu.call("cuStreamSynchronize", c_uint64(stream)) == fake_cuda.LAUNCH_FAILED
    assert gpu.launch("set", c_uint64(out.ptr), c_uint(1)) == fake_cuda.LAUNCH_FAILED
    assert gpu.call("cuCtxSynchronize") == fake_cuda.LAUNCH_FAILED
    assert gpu.call("cuMemAlloc_v2", byref(c_uint64()), c_size_t(1)) == fake_cuda.LAUNCH_FAILED
    context = c_uint64()
    gpu.ok("cuDevicePrimaryCtxRetain", byref(context), 1)
    gpu.ok("cuCtxPushCurrent_v2", context)
    gpu.ok("cuCtxSynchronize")
    popped = c_uint64()
    gpu.ok("cuCtxPopCurrent_v2", byref(popped))
    assert popped.value == context.value
    assert gpu.call("cuCtxSynchronize") == fake_cuda.LAUNCH_FAILED


def test_contexts_are_a_stack(gpu: Gpu) -> None:
    assert gpu.call("cuCtxPushCurrent_v2", c_uint64(5)) == fake_cuda.INVALID_CONTEXT
    answers = []

    def in_another_thread() -> None:
        popped = c_uint64()
        answers.append(gpu.call("cuCtxSynchronize"))
        gpu.ok("cuCtxPushCurrent_v2", gpu.context)
        answers.append(gpu.call("cuCtxSynchronize"))
        gpu.ok("cuCtxPopCurrent_v2", byref(popped))
        answers.append(gpu.call("cuCtxPopCurrent_v2", byref(popped)))

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    assert answers == [fake_cuda.INVALID_CONTEXT, 0, fake_cuda.INVALID_CONTEXT]


def test_device_memory_is_reachable_only_where_kernels_run(gpu: Gpu) -> None:
    buffer = gpu.fake.alloc(PAGE)
    buffer.poke(b"here")
    assert ctypes.string_at(buffer.ptr, 4) == b"here"
    reachable = "from ctypes import *; cuda.control('fake_cuda_run_kernels', 1); b = cuda.alloc(4096); p = b.ptr; "
    for program in (
        "import ctypes; ctypes.string_at(cuda.alloc(4096).ptr, 1)",
        reachable + "string_at(p + 4096, 1)",
        reachable + "b.free(); string_at(p, 1)",
    ):
        assert in_child(program).returncode == -signal.SIGSEGV


def in_child(program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parent.parent)
    prologue = f"import sys; sys.path[:0] = [{tests!r}, {str(Path(__file__).parent)!r}]\nimport fake_cuda\n"
    command = [sys.executable, "-c", f"{prologue}cuda = fake_cuda.load()\n{program}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


MEANWHILE = """
import test_fake_cuda_kernels as t
from ctypes import *
gpu = t.Gpu(cuda, open(sys.argv[1], "rb").read())
flag, other, host = cuda.alloc(4096), cuda.alloc(4096), c_void_p()
flag.poke(bytes(4096))
gpu.ok("cuMemHostAlloc", byref(host), c_size_t(4096), 3)
registered = (c_ubyte * 4096)()
gpu.launch("wait_for", c_uint64(flag.ptr), stream=gpu.stream())
"""
CALLS = {
    "cuMemAlloc": 'gpu.call("cuMemAlloc_v2", byref(c_uint64()), c_size_t(1))',
    "cuMemFree": 'gpu.call("cuMemFree_v2", c_uint64(other.ptr))',
    "cuMemHostAlloc": 'gpu.call("cuMemHostAlloc", byref(c_void_p()), c_size_t(1), 3)',
    "cuMemFreeHost": 'gpu.call("cuMemFreeHost", host)',
    "cuMemHostRegister": 'gpu.call("cuMemHostRegister_v2", registered, c_size_t(4096), 3)',
    "cuModuleLoadData": 'gpu.call("cuModuleLoadData", byref(c_uint64()), c_char_p(bytes(64)))',
    "cuModuleGetFunction": 'gpu.call("cuModuleGetFunction", byref(c_uint64()), gpu.module, b"set")',
}


@pytest.mark.parametrize("function", CALLS)
def test_what_may_wait_for_a_kernel_that_runs_aborts(gpu: Gpu, function: str, tmp_path: Path) -> None:
    image = tmp_path / "kernels.so"
    image.write_bytes(emulated_gpu.library(SOURCE))
    child = in_child(f"{MEANWHILE}while True: {CALLS[function]}", image)  # it runs soon
    assert child.returncode == -signal.SIGABRT, child.stderr
    assert f"fake libcuda: {function} is called while a kernel runs" in child.stderr


def test_or_waits_for_it(gpu: Gpu) -> None:
    flag, stream = gpu.fake.alloc(PAGE), gpu.stream()
    flag.poke(bytes(PAGE))
    gpu.fake.control("fake_cuda_wait_for_kernels", 1)
    assert gpu.launch("wait_for", c_uint64(flag.ptr), stream=stream) == 0
    timer = threading.Timer(0.1, lambda: flag.poke(b"\1"))
    timer.start()
    pointer = c_uint64()
    gpu.ok("cuMemAlloc_v2", byref(pointer), c_size_t(1))
    gpu.ok("cuMemFree_v2", pointer)
    timer.join()
    gpu.ok("cuStreamSynchronize", c_uint64(stream))
