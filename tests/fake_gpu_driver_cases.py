"""What is given back to the CUDA driver, on the libcuda for tests. test_file_gpu.py runs it in its own process.

If this failed, closing after a kernel has failed would end in that kernel's error once more, with the rest left behind;
or memory that is freed twice would go unseen.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fake_cuda
import gpunvme
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.kept import Lane
from gpunvme.gpu.memory import GpuMemory
from gpunvme.memory import address_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fake_cuda import FakeCuda

PAGE = mmap.PAGESIZE


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    cuda = fake_cuda.use()
    yield cuda
    cuda.reset()


@pytest.fixture
def gpu(fake: FakeCuda) -> Iterator[Gpu]:
    made = Gpu(0)
    yield made
    made.close()


def let_a_kernel_fail(fake: FakeCuda, gpu: Gpu, memory: GpuMemory) -> None:
    fake.fail_copy(fake_cuda.ILLEGAL_ADDRESS)
    gpu.to_gpu(memory.address, memory.host, PAGE, 0)
    with pytest.raises(gpunvme.CudaError, match="ILLEGAL_ADDRESS"):
        gpu.synchronize(0)


def test_what_is_not_there_cannot_be_given_back(gpu: Gpu) -> None:
    plain, (locked, _) = gpu.allocate(PAGE), gpu.allocate_host(PAGE)
    array = np.zeros(2 * PAGE, np.uint8)
    page = -(-address_of(array) // PAGE) * PAGE
    gpu.register(page, PAGE)
    for give_back, address in ((gpu.free, plain), (gpu.free_host, locked), (gpu.unregister, page)):
        give_back(address)
        with pytest.raises(gpunvme.CudaError, match=r"INVALID_VALUE|NOT_REGISTERED") as caught:
            give_back(address)  # twice
        assert caught.value.code in (fake_cuda.INVALID_VALUE, fake_cuda.HOST_MEMORY_NOT_REGISTERED)
    with pytest.raises(gpunvme.CudaError, match="INVALID_VALUE"):
        gpu.free(64)


def test_after_a_kernel_failed_everything_can_be_given_back(fake: FakeCuda, gpu: Gpu) -> None:
    before = fake.counters()
    memory, lane, plain = GpuMemory(gpu, PAGE), Lane(gpu), gpu.allocate(PAGE)
    array = np.zeros(2 * PAGE, np.uint8)
    page = -(-address_of(array) // PAGE) * PAGE
    gpu.register(page, PAGE)
    let_a_kernel_fail(fake, gpu, memory)
    with pytest.raises(gpunvme.CudaError, match="ILLEGAL_ADDRESS"):
        gpu.allocate(PAGE)
    gpu.free(plain)
    gpu.unregister(page)
    memory.close()
    lane.close()
    # All of it was tried: the first that is refused does not keep the others.
    after = fake.counters()
    for what in ("live_allocations", "live_host_allocations", "live_host_registrations", "live_streams", "live_events"):
        assert getattr(after, what) == getattr(before, what), what


@pytest.mark.parametrize("code", [4, 201, 709])
def test_a_context_that_somebody_has_destroyed_keeps_nothing(fake: FakeCuda, gpu: Gpu, code: int) -> None:
    plain = gpu.allocate(PAGE)
    fake.fail_call("cuCtxPushCurrent", code)
    gpu.free(plain)
    gpu.free(plain)
