"""Queues that have ten times fewer slots than threads that want one, for long, and a controller that errs at random.

On a real GPU for GPUNVME_SOAK_SECONDS (two minutes) with ``-m gpu`` and GPUNVME_TEST_LEVEL=long; for some seconds on
the emulated one, by tests/soft/test_emulated_gpu_queues.py. If this failed, a kernel would hang once in a day, or
compute with another row's bytes once in a million.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from gpu_queue_machine import (
    BLOCK,
    EMULATED,
    GPU,
    MARKS,
    SIZE,
    all_slots_are_free,
    few,
    launch,
    machine,
    on_gpu,
)

from gpunvme.memory import Buffer

pytestmark = MARKS if EMULATED else [*MARKS, pytest.mark.slow]

SECONDS = float(os.environ.get("GPUNVME_SOAK_SECONDS", few("120", "2")))
# Never more than a command may be repeated for, and none that ends a queue: every byte has to come.
FAULTS = "delay:3@0.002,reorder@0.3,duplicate-cqe@0.1,unknown-cid@0.1,torn-cqe@0.05,stale-phase@0.05"
DEPTH, QUEUES = 9, 2
THREADS = 10 * QUEUES * (DEPTH - 1)
WAYS = """
// Each thread reads a run of blocks in its own way, and compares every word with what the namespace has there.
extern "C" __global__ void soak(const GpuQueue* queues, unsigned long long count, unsigned long long seed,
                                unsigned char* out, unsigned long long threads, unsigned long long* bad) {
  const unsigned long long me = blockIdx.x * blockDim.x + threadIdx.x;
  if (me >= threads) return;
  unsigned char* const mine = out + me * 4096;
  unsigned long long number = (seed * 0x9e3779b97f4a7c15ull + me) * 0xbf58476d1ce4e5b9ull;
  for (unsigned round = 0; round < 4; ++round) {
    number = (number ^ number >> 29) * 0x94d049bb133111ebull + round;
    const unsigned blocks = 1 + number % 8;
    const GpuQueue& queue = queues[number / 8 % count];
    const unsigned long long lba = number / 64 % (queue.blocks - 8);
    if (number % 5 == 0) continue;  // lanes go different ways
    const Outcome outcome = read(queue, lba, blocks, mine);
    if (!outcome.ok()) {
      atomicAdd(bad, 1ull);
      continue;
    }
    const auto* const words = reinterpret_cast<const unsigned long long*>(mine);
    for (unsigned at = 0; at < blocks * 64; ++at) {
      if (words[at] != (lba * 64 + at) * 0x9e3779b97f4a7c15ull) atomicAdd(bad + 1, 1ull);
    }
  }
}
"""


def test_exhausted_queues_lose_and_mix_nothing_for_long() -> None:
    words = np.arange(SIZE // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    with machine(words.tobytes(), depth=DEPTH, count=QUEUES, timeout=60, driver={"timeout": 60}) as m:
        out, bad = Buffer.empty(THREADS * 4096, GPU), on_gpu(np.zeros(2, np.uint64))
        rows = np.random.default_rng(0).integers(0, m.namespace.blocks - 3, few(20_000, 200))
        gathered = Buffer.empty(len(rows) * 3 * BLOCK, GPU)
        expected = b"".join(words[lba * 64 : lba * 64 + 192].tobytes() for lba in rows.tolist())
        ends, rounds = time.monotonic() + SECONDS, 0
        while rounds == 0 or time.monotonic() < ends:
            rounds += 1
            m.inject(FAULTS, seed=rounds)
            launch(
                *(WAYS, "soak", -(-THREADS // 96), 96),
                *(m.queues, m.queues.count, rounds, out, THREADS, bad),
            )
            failed, wrong = bad.numpy().view(np.uint64)
            assert (failed, wrong) == (0, 0), f"in round {rounds}"
            m.queues.gather(rows, gathered)
            assert gathered.numpy().tobytes() == expected, f"in round {rounds}"
        assert m.injected() > 0
        assert m.controller.resets == 0
        m.inject("")
        assert all_slots_are_free(m.queues)
