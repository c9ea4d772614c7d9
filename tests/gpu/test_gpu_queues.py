"""NVMe queues that a GPU drives, against the software controller and all its faults.

On a real GPU with ``-m gpu``; on the emulated one, smaller, by tests/soft/test_emulated_gpu_queues.py. If this failed,
kernels would hang, or compute with wrong bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emulated_gpu
import fake_nvtx
import gpunvme
from gpunvme import nvme
from gpunvme.gpu.driver import Gpu
from gpunvme.memory import Buffer

EMULATED = emulated_gpu.is_wanted()
if EMULATED:
    fake = emulated_gpu.use()
else:
    pytestmark = pytest.mark.gpu
# What a program of a test begins with.
CHILD = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); import emulated_gpu\n"
CHILD += "if emulated_gpu.is_wanted(): emulated_gpu.use()\n"

# Where queues and data are: all of this holds in GPU memory, too.
PLACEMENT = os.environ.get("GPUNVME_TEST_PLACEMENT", "auto")
SIZE = 8 << 20
BLOCK = 512
GPU = "cuda:0"


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(5).integers(0, 256, SIZE, np.uint8).tobytes()


@pytest.fixture(autouse=True)
def no_memory_is_freed_at_any_time() -> Iterator[None]:
    """Freeing GPU memory while a kernel runs may wait for it: the emulated GPU aborts. Garbage goes between tests."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


class Machine:
    """A controller, its namespace, and GPU queues."""

    def __init__(self, data: bytes, options: str = "", driver: dict[str, Any] | None = None, **queues: Any) -> None:
        uri = f"soft:ram?size={SIZE}&threads=2&queues=12{options}"
        self.controller = nvme.open(uri, admin_timeout=5, **{"queues": 2, "timeout": 5, **(driver or {})})
        self.namespace = self.controller.namespace()
        self.namespace.write_from(data)
        self.queues = self.namespace.gpu_queues(0, **{"count": 2, "depth": 64, "placement": PLACEMENT, **queues})

    def inject(self, faults: str, seed: int = 1) -> None:
        self.controller.transport.controller.inject(faults, seed)

    def injected(self) -> int:
        stats = self.controller.transport.controller.stats()
        return sum(count for name, count in stats.items() if name.startswith("fault."))


def few(everywhere: Any, emulated: Any) -> Any:
    """How much of something: enough for a real GPU, or for the emulated one, which is slow."""
    return emulated if EMULATED and os.environ.get("GPUNVME_TEST_LEVEL") != "long" else everywhere


def on_gpu(array: Any) -> Buffer:
    """A copy of an array, as bytes in GPU memory."""
    gpu = Gpu(0)
    buffer, (host, _) = Buffer.empty(array.nbytes, GPU), gpu.allocate_host(array.nbytes)
    ctypes.memmove(host, array.ctypes.data, array.nbytes)
    gpu.to_gpu(buffer.ptr, host, array.nbytes, 0)
    gpu.synchronize(0)
    gpu.free_host(host)
    return buffer


class Int64s:
    """GPU memory as an array of 64-bit integers."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self._buffer.__cuda_array_interface__, "shape": (self._buffer.nbytes // 8,), "typestr": "<i8"}


def allocations_wait_for_kernels() -> None:
    """For threads that allocate while kernels of others run, which end by themselves. Otherwise that is an error."""
    if EMULATED:
        fake.control("fake_cuda_wait_for_kernels", 1)


PRELUDE = """
#include <gpunvme/device.h>
using namespace gpunvme;
"""
FREE_SLOTS = """
// Takes all slots that there are, then gives them back. One thread a queue.
extern "C" __global__ void free_slots(const GpuQueue* queues, unsigned* slots, unsigned long long most,
                                      unsigned long long* counts) {
  const GpuQueue& queue = queues[blockIdx.x];
  unsigned* const mine = slots + blockIdx.x * most;
  Token token;
  unsigned count = 0;
  while (claim(queue, token)) mine[count++] = token.slot;
  counts[blockIdx.x] = count;
  for (unsigned i = 0; i < count; ++i) {
    token.slot = mine[i];
    finish(queue, token);
  }
}
"""


def all_slots_are_free(queues: Any) -> bool:
    """Whether nothing that ran on the queues has kept a slot."""
    most = min(queues.depth, 1024)
    slots, counts = Buffer.empty(queues.count * most * 4, GPU), Buffer.empty(queues.count * 8, GPU)
    launch(FREE_SLOTS, "free_slots", queues.count, 1, queues, slots, most, counts)
    return bool((counts.numpy().view(np.uint64) == most - 1).all())


@contextlib.contextmanager
def machine(data: bytes, options: str = "", **queues: Any) -> Iterator[Machine]:
    made = Machine(data, options, **queues)
    with made.controller:
        yield made


def rows_of(data: bytes, lbas: Any, blocks: int, block: int = BLOCK) -> bytes:
    return b"".join(data[int(lba) * block : (int(lba) + blocks) * block] for lba in lbas)


def some_lbas(namespace: Any, count: int, blocks: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, namespace.blocks - blocks + 1, count)


# --- what comes with the package


@pytest.mark.parametrize("depth", few([2, 3, 5, 37, 64, 100, 256], [2, 3, 37, 256]))
@pytest.mark.parametrize("count", few([1, 3, 8], [1, 3]))
def test_gather_brings_every_row(data: bytes, depth: int, count: int) -> None:
    with machine(data, depth=depth, count=count) as m:
        for rows, blocks in ((1, 1), (31, 1), (33, 3), (few(1000, 250), 8)):
            lbas = some_lbas(m.namespace, rows, blocks, rows)
            out = Buffer.empty(rows * blocks * BLOCK, GPU)
            done = m.queues.gather(lbas, out)
            assert out.numpy().tobytes() == rows_of(data, lbas, blocks)
            assert done.path == "gpu-nvme"
            assert done.nbytes == done.direct_bytes == out.nbytes
            assert f"{rows} commands by kernels on cuda:0 over {count} queue" in done.reason
        assert all_slots_are_free(m.queues)


@pytest.mark.parametrize("blocks", few([9, 16, 17, 40, 300], [9, 17, 300]))
@pytest.mark.parametrize("slot_bytes", few([None, 8192, 12288, 65536], [None, 12288, 65536]))
def test_rows_larger_than_a_page_are_prp_lists_and_larger_than_a_slot_several_commands(
    data: bytes, blocks: int, slot_bytes: int | None
) -> None:
    with machine(data, slot_bytes=slot_bytes) as m:
        lbas = some_lbas(m.namespace, 50, blocks)
        out = Buffer.empty(50 * blocks * BLOCK, GPU)
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(data, lbas, blocks)


@pytest.mark.parametrize("options", ["&lba=4096", "&mdts=1", "&dstrd=3", "&mpsmin=1&mpsmax=1", "&mdts=0"])
def test_other_controllers(data: bytes, options: str) -> None:
    with machine(data, options, slot_bytes=16384) as m:
        block = m.namespace.block_size
        lbas = some_lbas(m.namespace, 200, 3)
        out = Buffer.empty(200 * 3 * block, GPU)
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(data, lbas, 3, block)
        whole = Buffer.empty(SIZE, GPU)
        m.queues.stream(0, SIZE, whole)
        assert whole.numpy().tobytes() == data
        assert all_slots_are_free(m.queues)


@pytest.mark.parametrize("lba", [0, 7])
@pytest.mark.parametrize("blocks", [0, 1, 8, 9, 255, 256, 257, 5000, SIZE // BLOCK - 7])
def test_stream_brings_every_block_and_nothing_else(data: bytes, lba: int, blocks: int) -> None:
    with machine(data) as m:
        room = Buffer.empty(blocks * BLOCK + 64, GPU)
        before = room.numpy()[-64:].tobytes()
        m.queues.stream(lba, blocks * BLOCK, room)
        got = room.numpy().tobytes()
        assert got[: blocks * BLOCK] == data[lba * BLOCK : (lba + blocks) * BLOCK]
        assert got[-64:] == before


def test_small_queues_stream_too(data: bytes) -> None:
    """Fewer slots than the kernel has buffers: none may wait for a slot that it keeps from another."""
    for depth in (2, 3, 5):
        with machine(data, depth=depth, count=1) as m:
            whole = Buffer.empty(SIZE, GPU)
            m.queues.stream(0, SIZE, whole)
            assert whole.numpy().tobytes() == data
            assert all_slots_are_free(m.queues)


@pytest.mark.parametrize("slot_bytes", [None, 65536])
def test_scatter_is_the_inverse_of_gather(data: bytes, slot_bytes: int | None) -> None:
    with machine(data, slot_bytes=slot_bytes) as m:
        rows, blocks = few(400, 100), 20
        source = Buffer.empty(rows * blocks * BLOCK, GPU)
        m.queues.gather(np.arange(rows) * blocks, source)
        places = np.random.default_rng(2).permutation(m.namespace.blocks // blocks)[:rows] * blocks
        done = m.queues.scatter(places, source)
        assert done.nbytes == source.nbytes
        expected = bytearray(data)
        for number, lba in enumerate(places):
            piece = data[number * blocks * BLOCK : (number + 1) * blocks * BLOCK]
            expected[lba * BLOCK : (lba + blocks) * BLOCK] = piece
        assert m.namespace.read().numpy().tobytes() == expected
        assert all_slots_are_free(m.queues)


def test_forwarded_doorbells_carry_the_same(data: bytes) -> None:
    with machine(data, doorbell="forward") as m:
        assert m.queues.doorbell == "forward"
        lbas = some_lbas(m.namespace, 500, 8)
        out = Buffer.empty(500 * 8 * BLOCK, GPU)
        done = m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(data, lbas, 8)
        assert "forwarded by a host thread" in done.reason


@pytest.mark.skipif(EMULATED, reason="PyTorch does not know the emulated GPU")
def test_lbas_and_kernels_are_in_the_streams_order(data: bytes) -> None:
    torch = pytest.importorskip("torch")
    with machine(data) as m:
        side = torch.cuda.Stream()
        lbas = some_lbas(m.namespace, 300, 1)
        for _ in range(5):
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                places = torch.as_tensor(lbas).cuda(non_blocking=True)
                out = torch.zeros(300 * BLOCK, dtype=torch.uint8, device="cuda")
                transfer = m.queues.gather(places, out, wait=False)
                copy = out.clone()
            side.synchronize()
            assert bytes(copy.cpu().numpy()) == rows_of(data, lbas, 1)
            assert transfer.wait(5).done


STREAM_ORDER = """
extern "C" __global__ void late(unsigned long long ns) {
  for (const unsigned long long end = gpunvme::now_ns() + ns; gpunvme::now_ns() < end;) __nanosleep(1000);
}
"""


def test_a_kernel_runs_after_what_is_before_it_in_its_stream_and_before_what_is_behind(data: bytes) -> None:
    with machine(data) as m:
        gpu = Gpu(0)
        lbas = some_lbas(m.namespace, 100, 1)
        kernel = gpunvme.gpu.compile(PRELUDE + STREAM_ORDER).kernel("late")
        host, _ = gpu.allocate_host(lbas.nbytes)
        got, _ = gpu.allocate_host(100 * BLOCK)
        places, out, stream = Buffer.empty(lbas.nbytes, GPU), Buffer.empty(100 * BLOCK, GPU), gpu.stream()
        for number in range(3):
            lbas = some_lbas(m.namespace, 100, 1, number)
            ctypes.memmove(host, lbas.ctypes.data, lbas.nbytes)
            kernel.launch(1, 1, 10_000_000, stream=stream)
            gpu.to_gpu(places.ptr, host, lbas.nbytes, stream)
            transfer = m.queues.gather(Int64s(places), out, stream=stream, wait=False)
            gpu.to_host(got, out.ptr, out.nbytes, stream)
            gpu.synchronize(stream)
            assert ctypes.string_at(got, out.nbytes) == rows_of(data, lbas, 1)
            assert transfer.wait(5).done
        gpu.free_host(host)
        gpu.free_host(got)
        gpu.destroy(stream=stream)


def test_many_jobs_and_threads_share_the_queues(data: bytes) -> None:
    with machine(data) as m:
        allocations_wait_for_kernels()
        threads, rounds, rows = few((8, 10, 700), (4, 2, 150))
        lbas = [some_lbas(m.namespace, rows, 4, seed) for seed in range(threads)]
        failures = []

        def use(number: int) -> None:
            try:
                for _ in range(rounds):
                    out = Buffer.empty(rows * 4 * BLOCK, GPU)
                    m.queues.gather(lbas[number], out, stream=0)
                    assert out.numpy().tobytes() == rows_of(data, lbas[number], 4)
                    whole = Buffer.empty(SIZE, GPU)
                    m.queues.stream(0, SIZE, whole, stream=0)
                    assert whole.numpy().tobytes() == data
            except Exception as error:  # noqa: BLE001 - the main thread fails for it
                failures.append(error)

        users = [threading.Thread(target=use, args=(number,)) for number in range(threads)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        assert not failures
        assert all_slots_are_free(m.queues)


# --- faults

HARMLESS = ["delay:20@0.05", "reorder@0.5", "duplicate-cqe@0.3", "unknown-cid@0.3", "torn-cqe@0.1", "stale-phase@0.1"]
LOST = ["drop@0.02", "drop#5", "cq-stall#4"]


@pytest.mark.parametrize("fault", [*HARMLESS, ",".join(HARMLESS)])
def test_what_must_be_borne_costs_nothing_but_time(data: bytes, fault: str) -> None:
    with machine(data) as m:
        m.inject(fault)
        rows = few(1500, 400)
        lbas = some_lbas(m.namespace, rows, 2)
        out = Buffer.empty(rows * 2 * BLOCK, GPU)
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(data, lbas, 2)
        assert m.injected() > 0
        assert m.controller.resets == 0
        assert all_slots_are_free(m.queues)
        counted = m.queues.stats()
        if fault == "duplicate-cqe@0.3":
            assert sum(each["late"] for each in counted) > 0
        if fault == "unknown-cid@0.3":
            assert sum(each["unknown"] + each["late"] for each in counted) > 0


@pytest.mark.parametrize("fault", LOST)
@pytest.mark.parametrize("kernel", ["gather", "stream", "scatter"])
def test_lost_completions_are_repeated_when_somebody_waits(data: bytes, fault: str, kernel: str) -> None:
    with machine(data, timeout=0.3, driver={"timeout": 0.3}) as m:
        m.inject(fault)
        lbas = np.random.default_rng(1).permutation(m.namespace.blocks)[:300]
        rows = Buffer.empty(300 * BLOCK, GPU)
        if kernel == "gather":
            done = m.queues.gather(lbas, rows)
            assert rows.numpy().tobytes() == rows_of(data, lbas, 1)
        elif kernel == "stream":
            whole = Buffer.empty(SIZE, GPU)
            done = m.queues.stream(0, SIZE, whole)
            assert whole.numpy().tobytes() == data
        else:
            done = m.queues.scatter(lbas, rows)
            m.inject("")
            everything = m.namespace.read().numpy().tobytes()
            assert rows_of(everything, lbas, 1) == rows.numpy().tobytes()
        assert done.done
        assert m.queues.recoveries > 0
        assert m.controller.aborts + m.controller.resets > 0
        assert all_slots_are_free(m.queues)


def test_lost_completions_are_reported_where_work_may_follow(data: bytes) -> None:
    with machine(data, timeout=few(0.3, 2.0), driver={"timeout": 0.3}) as m:
        m.inject("drop#7")
        lbas = some_lbas(m.namespace, 100, 1)
        out = Buffer.empty(100 * BLOCK, GPU)
        with pytest.raises(gpunvme.CommandError, match="never answered") as caught:
            m.queues.gather(lbas, out, wait=False).wait(10)
        lost = [each for each in caught.value.failures if each.kind == "timeout"]
        assert len(lost) == 1
        assert lost[0].lba in lbas
        m.inject("")
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(data, lbas, 1)


def test_a_controller_that_answers_nothing_is_an_error_within_the_deadlines(data: bytes) -> None:
    with machine(data, timeout=0.2, driver={"timeout": 0.3}) as m:
        m.inject("drop")
        rows = few(5000, 1000)
        out = Buffer.empty(rows * BLOCK, GPU)
        with pytest.raises(gpunvme.CommandError, match="never answered"):
            m.queues.gather(some_lbas(m.namespace, rows, 1), out)
        m.inject("")
        lbas = some_lbas(m.namespace, 100, 1)
        m.queues.gather(lbas, Buffer.empty(100 * BLOCK, GPU))


def test_errors_name_their_rows(data: bytes) -> None:
    with machine(data) as m:
        m.inject("error:0x281!#3,error:0x281!#50")
        lbas = some_lbas(m.namespace, 200, 1)
        out = on_gpu(np.full(200 * BLOCK, 0xEE, np.uint8))
        with pytest.raises(gpunvme.CommandError) as caught:
            m.queues.gather(lbas, out)
        assert {(each.sct, each.sc, each.dnr, each.kind) for each in caught.value.failures} == {
            (2, 0x81, True, "status")
        }
        assert len(caught.value.failures) == 2
        got = out.numpy().reshape(200, BLOCK)
        bad = {each.lba for each in caught.value.failures}
        good = [number for number, lba in enumerate(lbas) if lba not in bad]
        assert got[good].tobytes() == rows_of(data, lbas[good], 1)
        kept = [number for number, lba in enumerate(lbas) if lba in bad and (got[number] == 0xEE).all()]
        assert len(kept) == 2  # nobody else's bytes
        m.inject("error:0x004#2,error:0x082#9")  # these may be tried again
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(data, lbas, 1)
        assert all_slots_are_free(m.queues)


def test_more_failures_than_are_listed_are_counted(data: bytes) -> None:
    with machine(data) as m:
        m.inject("error:0x281!")
        lbas = some_lbas(m.namespace, 4200, 1)
        with pytest.raises(gpunvme.CommandError) as caught:
            m.queues.gather(lbas, Buffer.empty(4200 * BLOCK, GPU))
        assert len(caught.value.failures) == 4096
        assert all_slots_are_free(m.queues)


def test_lbas_on_the_gpu_are_checked_one_by_one(data: bytes) -> None:
    with machine(data) as m:
        lbas = Int64s(on_gpu(np.array([1, m.namespace.blocks, 3, -1, 2**62], np.int64)))
        out = Buffer.empty(5 * BLOCK, GPU)
        with pytest.raises(gpunvme.CommandError, match="SC 80h, DNR") as caught:
            m.queues.gather(lbas, out)
        assert len(caught.value.failures) == 3
        got = out.numpy().reshape(5, BLOCK)
        assert got[0].tobytes() + got[2].tobytes() == rows_of(data, [1, 3], 1)


@pytest.mark.parametrize("when", [1, 40])
def test_a_controller_that_fails_is_reset_and_the_rest_is_read(data: bytes, when: int) -> None:
    with machine(data, timeout=0.5, driver={"timeout": 0.5}) as m:
        m.inject(f"cfs#{when}")
        rows = few(2000, 500)
        lbas = some_lbas(m.namespace, rows, 1)
        out = Buffer.empty(rows * BLOCK, GPU)
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(data, lbas, 1)
        assert m.controller.resets >= 1


def test_a_reset_by_somebody_else_is_survived(data: bytes) -> None:
    with machine(data) as m:
        rows = few(3000, 500)
        lbas = some_lbas(m.namespace, rows, 1)
        out = Buffer.empty(rows * BLOCK, GPU)
        for _ in range(5):
            transfer = m.queues.gather(lbas, out, wait=False)
            m.controller.reset()
            with contextlib.suppress(gpunvme.CommandError):
                transfer.wait(10)
            m.queues.gather(lbas, out)
            assert out.numpy().tobytes() == rows_of(data, lbas, 1)
        assert all_slots_are_free(m.queues)


def test_a_controller_that_is_gone_ends_everything_and_closing_works(data: bytes) -> None:
    with machine(data, timeout=0.3, driver={"timeout": 0.3}) as m:
        m.inject("device-gone#10")
        out = Buffer.empty(2000 * BLOCK, GPU)
        with pytest.raises(gpunvme.NvmeError):
            m.queues.gather(some_lbas(m.namespace, 2000, 1), out)
        with pytest.raises(gpunvme.NvmeError):
            m.queues.gather([0], Buffer.empty(BLOCK, GPU))
    with machine(data) as m:
        m.queues.gather([0], Buffer.empty(BLOCK, GPU))


def test_a_transfers_deadline_and_cancelling(data: bytes) -> None:
    with machine(data, timeout=0.5) as m:
        m.inject("slow:50")
        lbas = some_lbas(m.namespace, 20000, 1)
        out = Buffer.empty(20000 * BLOCK, GPU)
        with pytest.raises(gpunvme.DeadlineExceeded):
            m.queues.gather(lbas, out, timeout=0.2)
        transfer = m.queues.gather(lbas, out, wait=False)
        transfer.cancel()
        with pytest.raises(gpunvme.Cancelled):
            transfer.wait(10)


# --- kernels of the user's own


def launch(source: str, name: str, grid: Any, block: Any, *arguments: Any) -> None:
    gpunvme.gpu.compile(PRELUDE + source).kernel(name).launch(grid, block, *arguments, stream=0)
    Gpu(0).synchronize(0)  # the tests allocate and load, which a kernel that runs may keep waiting


DIVERGED = """
// Every third lane reads, every fifth writes, some do nothing, and each reads another size.
extern "C" __global__ void run(const GpuQueue* queues, unsigned long long count, unsigned char* out,
                               unsigned long long* fates, unsigned long long threads) {
  const unsigned me = blockIdx.x * blockDim.x + threadIdx.x;
  if (me >= threads) return;
  const GpuQueue& queue = queues[me % count];
  Outcome outcome{Fate::kDone, 0, 0};
  if (me % 3 == 0) {
    outcome = read(queue, me, 1 + me % 4, out + me * 2048ull);
  } else if (me % 5 == 1) {
    outcome = read(queue, me + 7, 4, out + me * 2048ull);
  }
  fates[me] = static_cast<unsigned long long>(outcome.fate) << 32 | outcome.status;
}
"""


@pytest.mark.parametrize(("depth", "count"), [(4, 1), (64, 2)])
@pytest.mark.parametrize("block", [1, 17, 256])
def test_diverged_lanes_partial_warps_and_more_threads_than_slots(
    data: bytes, depth: int, count: int, block: int
) -> None:
    threads = few(4000, 600) if depth > 4 else few(600, 150)
    with machine(data, depth=depth, count=count, timeout=20) as m:
        out, fates = Buffer.empty(threads * 2048, GPU), Buffer.empty(threads * 8, GPU)
        launch(DIVERGED, "run", -(-threads // block), block, m.queues, m.queues.count, out, fates, threads)
        got = out.numpy().reshape(threads, 2048)
        assert not fates.numpy().any()
        for me in range(threads):
            if me % 3 == 0:
                nbytes = (1 + me % 4) * BLOCK
                assert got[me, :nbytes].tobytes() == data[me * BLOCK : me * BLOCK + nbytes]
            elif me % 5 == 1:
                assert got[me].tobytes() == data[(me + 7) * BLOCK : (me + 11) * BLOCK]
        assert all_slots_are_free(m.queues)


GROUPS = """
extern "C" __global__ void by_warp(const GpuQueue* queues, unsigned long long count, unsigned char* out,
                                   unsigned long long* bad, unsigned long long blocks) {
  const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const Outcome outcome = warp_read(queues[warp % count], warp * 3, blocks, out + warp * blocks * 512);
  if (!outcome.ok()) atomicAdd(bad, 1ull);
}
extern "C" __global__ void by_block(const GpuQueue* queues, unsigned long long count, unsigned char* out,
                                    unsigned long long* bad, unsigned long long blocks) {
  __shared__ unsigned char tile[16384];
  const GpuQueue& queue = queues[blockIdx.x % count];
  // All threads are told how it ended, also when the next read begins at once.
  Outcome outcome = block_read(queue, ~0ull, 32, tile);
  if (outcome.status != kOutOfRange) atomicAdd(bad, 1ull);
  outcome = block_read(queue, blockIdx.x * 5, 32, tile);
  if (!outcome.ok()) atomicAdd(bad, 1ull);
  for (unsigned i = threadIdx.x; i < 16384; i += blockDim.x) tile[i] ^= 0x55;
  __syncthreads();
  outcome = block_write(queue, 8192 + blockIdx.x * 32, 32, tile);
  if (!outcome.ok()) atomicAdd(bad, 1ull);
}
"""


def test_warps_and_blocks_read_and_write_together(data: bytes) -> None:
    with machine(data, slot_bytes=8192) as m:
        bad = on_gpu(np.zeros(1, np.uint64))
        m.queues.gather([0], Buffer.empty(BLOCK, GPU))
        out = Buffer.empty(64 * 100 * BLOCK, GPU)
        launch(GROUPS, "by_warp", 16, 128, m.queues, m.queues.count, out, bad, 100)
        assert out.numpy().tobytes() == rows_of(data, np.arange(64) * 3, 100)
        launch(GROUPS, "by_block", 40, 96, m.queues, m.queues.count, out, bad, 0)
        assert not bad.numpy().any()
        written = m.namespace.read(8192, 40 * 32).numpy()
        expected = np.frombuffer(rows_of(data, np.arange(40) * 5, 32), np.uint8) ^ 0x55
        assert written.tobytes() == expected.tobytes()
        assert all_slots_are_free(m.queues)


TOKENS = """
// Two reads on their way while something else is computed.
extern "C" __global__ void run(const GpuQueue* queues, unsigned long long count, unsigned long long* sums,
                               unsigned long long* bad) {
  const unsigned me = blockIdx.x * blockDim.x + threadIdx.x;
  const GpuQueue& queue = queues[me % count];
  Token tokens[2];
  unsigned long long sum = 0;
  for (unsigned i = 0; i < 2; ++i) {
    Fate fate;
    while ((fate = start(queue, tokens[i], kRead, 2 * me + i, 1)) == Fate::kFull && i == 0) reap(queue);
    if (fate == Fate::kFull) break;  // it holds one: it must not wait for another
    if (fate != Fate::kDone) atomicAdd(bad, 1ull);
  }
  for (unsigned i = 0; i < 2; ++i) {
    if (!tokens[i].has_slot()) {
      while (start(queue, tokens[i], kRead, 2 * me + i, 1) == Fate::kFull) reap(queue);
    }
    const Outcome outcome = wait(queue, tokens[i]);
    if (!outcome.ok()) {
      atomicAdd(bad, 1ull);
      continue;
    }
    const unsigned char* bytes = data(queue, tokens[i]);
    for (unsigned at = 0; at < 512; ++at) sum += bytes[at];
    finish(queue, tokens[i]);
  }
  sums[me] = sum;
}
"""


def test_tokens_overlap_reading_and_computing(data: bytes) -> None:
    threads = few(1024, 256)
    with machine(data, depth=32) as m:
        sums, bad = Buffer.empty(threads * 8, GPU), on_gpu(np.zeros(1, np.uint64))
        launch(TOKENS, "run", threads // 128, 128, m.queues, m.queues.count, sums, bad)
        got = sums.numpy().view(np.uint64)
        assert not bad.numpy().any()
        expected = np.frombuffer(data, np.uint8)[: threads * 2 * BLOCK].reshape(threads, -1).sum(1, dtype=np.uint64)
        assert (got == expected).all()
        assert all_slots_are_free(m.queues)


def test_a_users_kernel_is_told_of_a_timeout_and_the_queues_recover(data: bytes) -> None:
    with machine(data, timeout=0.3, driver={"timeout": 0.3}) as m:
        m.inject("drop#3,drop#20")
        threads = 64
        out, fates = Buffer.empty(threads * 2048, GPU), Buffer.empty(threads * 8, GPU)
        launch(DIVERGED, "run", 2, 32, m.queues, m.queues.count, out, fates, threads)
        kinds = fates.numpy().view(np.uint64) >> 32
        assert (kinds != 0).sum() >= 1
        assert set(kinds.tolist()) <= {0, 1, 2}
        m.inject("")
        m.queues.recover()  # unless the watcher has done it already
        lbas = some_lbas(m.namespace, 200, 1)
        rows = Buffer.empty(200 * BLOCK, GPU)
        m.queues.gather(lbas, rows)
        assert rows.numpy().tobytes() == rows_of(data, lbas, 1)
        assert m.queues.recoveries >= 1


HUNG = """
extern "C" __global__ void run(const GpuQueue* queues, volatile unsigned* go_on) {
  while (*go_on == 0) __nanosleep(1000);
}
"""
HANGING_PROGRAM = """
import sys, time
import gpunvme
from gpunvme import nvme
from gpunvme.gpu.driver import Gpu
controller = nvme.open("soft:ram?size=1MiB&queues=8", queues=2)
queues = controller.namespace().gpu_queues(0, count=2, depth=16)
kernel = gpunvme.gpu.compile(sys.argv[1]).kernel("run")
host, device = Gpu(0).allocate_host(4096)
kernel.launch(1, 32, queues, device, stream=0)
start = time.monotonic()
try:
    queues.close(timeout=1)
except gpunvme.DeadlineExceeded as error:
    assert "still runs" in str(error), error
else:
    sys.exit("close() did not say that a kernel hangs")
assert time.monotonic() - start < 10
assert controller.namespace().read(0, 8).nbytes == 4096  # the driver's own queues work on
controller.close()
print("closed", flush=True)
import ctypes
ctypes.c_uint32.from_address(host).value = 1
"""


def test_a_kernel_that_hangs_cannot_make_close_hang(data: bytes) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD + HANGING_PROGRAM, PRELUDE + HUNG],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.stdout == "closed\n", child.stderr


FAILING_PROGRAM = """
import gpunvme
from gpunvme import nvme
from gpunvme.memory import Buffer
controller = nvme.open("soft:ram?size=1MiB&queues=8", queues=2)
namespace = controller.namespace()
queues = namespace.gpu_queues(0, count=2, depth=16)
out = Buffer.empty(512, "cuda:0")
trap = gpunvme.gpu.compile('extern "C" __global__ void run() { __trap(); }').kernel("run")
trap.launch(1, 32, stream=0)
try:
    queues.gather([0], out, stream=0)
except gpunvme.CudaError as error:
    print("gather:", type(error).__name__)
assert namespace.read(0, 8).nbytes == 4096  # the driver's own queues work on
queues.close()
controller.close()
print("closed", flush=True)
"""


def test_a_kernel_that_fails_is_an_error_and_closing_works(data: bytes) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD + FAILING_PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.stdout == "gather: CudaError\nclosed\n", child.stderr


# --- other controllers

SERVER = """
import sys
from gpunvme.nvme.soft import soft_controller
from gpunvme.nvme.uri import parse_uri
from gpunvme.nvme.vfio_user.server import serve
serve(sys.argv[2], soft_controller(parse_uri(sys.argv[1])), mmap_doorbells=sys.argv[3] == "map",
      ready=lambda: print("ready", flush=True))
"""


@contextlib.contextmanager
def served(path: Path, doorbells: str = "map") -> Iterator[str]:
    uri = f"soft:ram?size={SIZE}&threads=2&queues=12"
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER, uri, str(path), doorbells], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child, child.stdout:
        try:
            assert child.stdout.readline() == "ready\n"
            yield f"vfio-user:{path}"
        finally:
            child.kill()


@pytest.mark.parametrize("doorbells", ["map", "messages"])
def test_a_controller_in_another_process(tmp_path: Path, data: bytes, doorbells: str) -> None:
    with served(tmp_path / "socket", doorbells) as uri, nvme.open(uri, queues=2) as controller:
        namespace = controller.namespace()
        namespace.write_from(data)
        with namespace.gpu_queues(0, count=4, depth=50) as queues:
            assert queues.doorbell == ("direct" if doorbells == "map" else "forward")
            lbas = some_lbas(namespace, 500, 8)
            out = Buffer.empty(500 * 8 * BLOCK, GPU)
            queues.gather(lbas, out)
            assert out.numpy().tobytes() == rows_of(data, lbas, 8)
            whole = Buffer.empty(SIZE, GPU)
            queues.stream(0, SIZE, whole)
            assert whole.numpy().tobytes() == data


KILLED_PROGRAM = """
import sys
import gpunvme
from gpunvme import nvme
from gpunvme.memory import Buffer
controller = nvme.open(sys.argv[1], queues=2)
namespace = controller.namespace()
queues = namespace.gpu_queues(0, count=4, timeout=60)
print("spinning", flush=True)
while True:
    queues.gather(range(1000), Buffer.empty(1000 * 512, "cuda:0"))
"""


def test_a_process_that_is_killed_while_its_kernel_runs_harms_nobody(tmp_path: Path, data: bytes) -> None:
    with served(tmp_path / "socket") as uri:
        for _ in range(few(2, 1)):
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD + KILLED_PROGRAM, uri], stdout=subprocess.PIPE, text=True
            )
            assert child.stdout is not None
            with child, child.stdout:
                assert child.stdout.readline() == "spinning\n"
                time.sleep(0.2)
                os.kill(child.pid, signal.SIGKILL)
        with nvme.open(uri, queues=2) as controller:
            namespace = controller.namespace()
            namespace.write_from(data)
            with namespace.gpu_queues(0, count=4) as queues:
                whole = Buffer.empty(SIZE, GPU)
                queues.stream(0, SIZE, whole)
                assert whole.numpy().tobytes() == data


# --- bad use


def test_bad_use_is_refused_before_any_kernel_runs(data: bytes) -> None:
    with machine(data) as m:
        q, out = m.queues, Buffer.empty(10 * BLOCK, GPU)
        with pytest.raises(gpunvme.RangeError):
            q.gather([0, m.namespace.blocks], out, blocks=1)
        with pytest.raises(gpunvme.RangeError):
            q.stream(m.namespace.blocks - 1, 2 * BLOCK, out)
        with pytest.raises(gpunvme.RangeError):
            q.stream(0, 100, out)
        with pytest.raises(gpunvme.SpanError):
            q.gather(np.arange(11), out, blocks=1)
        with pytest.raises(gpunvme.SpanError, match="blocks="):
            q.gather(np.arange(3), out)
        with pytest.raises(gpunvme.SpanError, match="cpu"):
            q.gather([0], bytearray(BLOCK))
        with pytest.raises(TypeError):
            q.gather([0.5], out)
        assert sum(each["completed"] for each in q.stats()) <= 8 + 1
        namespace = m.namespace
        for bad, error in (
            ({"depth": 1 << 20}, ValueError),
            ({"depth": 1}, ValueError),
            ({"count": 0}, ValueError),
            ({"count": 100}, gpunvme.NvmeError),
            ({"placement": "moon"}, ValueError),
            ({"doorbell": "bell"}, ValueError),
            ({"timeout": 0}, ValueError),
            ({"device": 99}, gpunvme.CudaError),
            ({"device": "cpu"}, gpunvme.SpanError),
        ):
            with pytest.raises(error):
                namespace.gpu_queues(**bad)
        assert len(m.controller.take_queue_ids(100)) == 8  # what failed gave its ids back


def test_closed_queues_say_so_and_ids_are_used_again(data: bytes) -> None:
    with machine(data, count=10) as m:
        for _ in range(5):
            m.queues.close()
            m.queues.close()
            with pytest.raises(ValueError, match="closed"):
                m.queues.gather([0], Buffer.empty(BLOCK, GPU))
            m.queues = m.namespace.gpu_queues(0, count=10, depth=16)
        m.controller.close()
        with pytest.raises(ValueError, match="closed"):
            m.queues.gather([0], Buffer.empty(BLOCK, GPU))


@pytest.mark.skipif(EMULATED, reason="no NVRTC compiles for the emulated GPU")
def test_a_kernel_that_does_not_compile_says_where() -> None:
    with pytest.raises(gpunvme.CudaError, match=r"mine\.cu\(1\).*undeclared|mine\.cu\(1\).*undefined"):
        gpunvme.gpu.compile('extern "C" __global__ void run() { undeclared(); }', name="mine.cu")


def test_a_controller_of_short_queues_needs_no_telling() -> None:
    """Who says nothing gets as many entries as there can be: not everybody knows CAP.MQES."""
    with nvme.open("soft:ram?size=1MiB&mqes=31&queues=8", queues=2, depth=8) as controller:
        namespace = controller.namespace()
        namespace.write_from(np.arange(4096, dtype=np.uint16).view(np.uint8))
        with namespace.gpu_queues(0, count=2) as queues:
            assert 2 <= queues.depth <= 32
            out = Buffer.empty(8192, GPU)
            queues.gather(range(16), out)
            assert (out.numpy().view(np.uint16) == np.arange(4096)).all()


# --- NVTX


def test_launches_have_ranges(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_nvtx.use(monkeypatch)
    with machine(data, timeout=few(0.3, 2.0), driver={"timeout": 0.3}) as m:
        m.queues.stream(0, 8 * BLOCK, Buffer.empty(8 * BLOCK, GPU))
        m.inject("drop#7")
        m.queues.gather(some_lbas(m.namespace, 100, 1), Buffer.empty(100 * BLOCK, GPU))
        assert m.queues.recoveries
        placement = m.queues.placement
    lasted = seen.lasted()
    made = [each for each in lasted if "GPU queues made on soft:ram" in each]
    assert made[-1].endswith(f"for cuda:0, placement {placement}"), lasted
    launches = [each for each in lasted if f"commands by kernels on {GPU} over 2 queues of soft:ram" in each]
    assert any(each.startswith("stream of ") for each in launches), lasted
    assert sum(each.startswith("gather of 100 ") for each in launches) >= 2, lasted
    assert ", launch " in launches[-1], lasted
    assert any("lost on GPU queues of soft:ram" in each for each in lasted), lasted
