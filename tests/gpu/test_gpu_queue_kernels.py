"""NVMe queues that a GPU drives, against the software controller: kernels of the user's own.

On a real GPU with ``-m gpu``; on the emulated one, smaller, by tests/soft/test_emulated_gpu_queues.py. If this failed,
lanes that go different ways would hang, or be given each other's bytes.
"""

from __future__ import annotations

import numpy as np
import pytest
from gpu_queue_machine import (
    BLOCK,
    DIVERGED,
    EMULATED,
    GPU,
    MARKS,
    all_slots_are_free,
    few,
    launch,
    lone,
    machine,
    on_gpu,
    rows_of,
    some_lbas,
)

import gpunvme
from gpunvme.memory import Buffer

pytestmark = MARKS


@pytest.mark.parametrize(("depth", "count"), [(4, 1), (64, 2)])
@pytest.mark.parametrize("block", [1, 17, 256])
def test_diverged_lanes_partial_warps_and_more_threads_than_slots(
    stored: bytes, depth: int, count: int, block: int
) -> None:
    threads = few(4000, 600) if depth > 4 else few(600, 150)
    with machine(stored, depth=depth, count=count, timeout=20) as m:
        out, fates = Buffer.empty(threads * 2048, GPU), Buffer.empty(threads * 8, GPU)
        launch(DIVERGED, "run", -(-threads // block), block, m.queues, m.queues.count, out, fates, threads)
        got = out.numpy().reshape(threads, 2048)
        assert not fates.numpy().any()
        for me in range(threads):
            if me % 3 == 0:
                nbytes = (1 + me % 4) * BLOCK
                assert got[me, :nbytes].tobytes() == stored[me * BLOCK : me * BLOCK + nbytes]
            elif me % 5 == 1:
                assert got[me].tobytes() == stored[(me + 7) * BLOCK : (me + 11) * BLOCK]
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


def test_warps_and_blocks_read_and_write_together(stored: bytes) -> None:
    with machine(stored, slot_bytes=8192) as m:
        bad = on_gpu(np.zeros(1, np.uint64))
        m.queues.gather([0], Buffer.empty(BLOCK, GPU))
        out = Buffer.empty(64 * 100 * BLOCK, GPU)
        launch(GROUPS, "by_warp", 16, 128, m.queues, m.queues.count, out, bad, 100)
        assert out.numpy().tobytes() == rows_of(stored, np.arange(64) * 3, 100)
        launch(GROUPS, "by_block", 40, 96, m.queues, m.queues.count, out, bad, 0)
        assert not bad.numpy().any()
        written = m.namespace.read(8192, 40 * 32).numpy()
        expected = np.frombuffer(rows_of(stored, np.arange(40) * 5, 32), np.uint8) ^ 0x55
        assert written.tobytes() == expected.tobytes()
        assert all_slots_are_free(m.queues)


# More warps than slots: most find none at first.
@pytest.mark.parametrize(("depth", "warps"), [(64, 8), (4, 8), (2, 5)])
@pytest.mark.parametrize("blocks", [1, 8])
def test_a_warp_sends_one_command_at_a_time(stored: bytes, depth: int, warps: int, blocks: int) -> None:
    with machine(stored, depth=depth, timeout=20) as m:
        rounds = few(40, 6)
        nbytes = warps * rounds * blocks * BLOCK
        memory = Buffer.empty(nbytes, GPU)
        assert not lone(m.queues, memory, warps, rounds, blocks).any()
        assert memory.numpy().tobytes() == stored[:nbytes]
        other = on_gpu(np.frombuffer(stored[-nbytes:], np.uint8) ^ 0x33)
        assert not lone(m.queues, other, warps, rounds, blocks, writes=True).any()
        assert m.namespace.read(0, nbytes // BLOCK).numpy().tobytes() == other.numpy().tobytes()
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


def test_tokens_overlap_reading_and_computing(stored: bytes) -> None:
    threads = few(1024, 256)
    with machine(stored, depth=32) as m:
        sums, bad = Buffer.empty(threads * 8, GPU), on_gpu(np.zeros(1, np.uint64))
        launch(TOKENS, "run", threads // 128, 128, m.queues, m.queues.count, sums, bad)
        got = sums.numpy().view(np.uint64)
        assert not bad.numpy().any()
        expected = np.frombuffer(stored, np.uint8)[: threads * 2 * BLOCK].reshape(threads, -1).sum(1, dtype=np.uint64)
        assert (got == expected).all()
        assert all_slots_are_free(m.queues)


def test_a_users_kernel_is_told_of_a_timeout_and_the_queues_recover(stored: bytes) -> None:
    with machine(stored, timeout=0.3, driver={"timeout": 0.3}) as m:
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
        assert rows.numpy().tobytes() == rows_of(stored, lbas, 1)
        assert m.queues.recoveries >= 1


@pytest.mark.skipif(EMULATED, reason="no NVRTC compiles for the emulated GPU")
def test_a_kernel_that_does_not_compile_says_where() -> None:
    with pytest.raises(gpunvme.CudaError, match=r"mine\.cu\(1\).*undeclared|mine\.cu\(1\).*undefined"):
        gpunvme.gpu.compile('extern "C" __global__ void run() { undeclared(); }', name="mine.cu")
