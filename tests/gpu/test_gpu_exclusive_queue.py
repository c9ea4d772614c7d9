"""NVMe queues that one warp each has for itself (``gpunvme/exclusive_queue.h``), against the software controller.

On a real GPU with ``-m gpu``; on the emulated one, smaller, by tests/soft/test_emulated_gpu_queues.py. If this failed,
who follows a list from block to block would be led astray, or a queue would be of no use to those who come after.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_queue_machine import (
    BLOCK,
    GPU,
    MARKS,
    all_slots_are_free,
    few,
    launch,
    machine,
    on_gpu,
    rows_of,
    some_lbas,
)

from gpunvme.memory import Buffer

pytestmark = MARKS

FOLLOW = """
// Each warp begins at a block of its own and follows what it reads: the next block's number is in the block. Of what it
// was told, each lane keeps the last outcome that was not well.
extern "C" __global__ void follow(const GpuQueue* queues, unsigned long long count, unsigned char* nodes,
                                  unsigned long long* path, unsigned long long* fates, unsigned long long* kept,
                                  unsigned long long steps, unsigned long long blocks, unsigned long long range) {
  const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  unsigned char* const node = nodes + warp * blocks * 512;
  unsigned long long lba = warp;
  unsigned long long fate = 0;
  ExclusiveQueue queue(queues[warp % count]);
  unsigned long long had = queue.is_exclusive();
  for (unsigned long long step = 0; step < steps; ++step) {
    const Outcome outcome = queue.read(lba, blocks, node);
    if (!outcome.ok()) fate = static_cast<unsigned long long>(outcome.fate) << 32 | outcome.status;
    // All lanes see all bytes.
    const unsigned long long* const words = reinterpret_cast<const unsigned long long*>(node);
    const unsigned long long number = words[0] ^ words[blocks * 64 - 1];
    if (threadIdx.x % 32 == 31) path[warp * steps + step] = lba;
    lba = outcome.ok() ? (number + step) % range : warp;
    __syncwarp();
  }
  had += 2 * queue.is_exclusive();
  fates[warp * 32 + threadIdx.x % 32] = fate;
  if (threadIdx.x % 32 == 0) kept[warp] = had;
}
"""

COPY = """
// Each warp writes the blocks of its own, one after the other, then reads them again, in the other order.
extern "C" __global__ void copy(const GpuQueue* queues, unsigned long long count, unsigned char* from,
                                unsigned char* to, unsigned long long* bad, unsigned long long rounds,
                                unsigned long long blocks) {
  const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  ExclusiveQueue queue(queues[warp % count]);
  for (unsigned long long round = 0; round < rounds; ++round) {
    const unsigned long long number = warp * rounds + round;
    if (!queue.write(number * blocks, blocks, from + number * blocks * 512).ok()) atomicAdd(bad, 1ull);
  }
  for (unsigned long long round = rounds; round-- > 0;) {
    const unsigned long long number = warp * rounds + round;
    if (!queue.read(number * blocks, blocks, to + number * blocks * 512).ok()) atomicAdd(bad, 1ull);
  }
  if (queue.read(~0ull, 1, to).status != kOutOfRange) atomicAdd(bad, 1ull);
}
"""


class Followed:
    """What FOLLOW tells."""

    def __init__(self, queues: Any, warps: int, steps: int, blocks: int, block: int, space: int) -> None:
        path, fates = Buffer.empty(warps * steps * 8, GPU), Buffer.empty(warps * 32 * 8, GPU)
        kept, nodes = Buffer.empty(warps * 8, GPU), Buffer.empty(warps * blocks * BLOCK, GPU)
        grid = -(-warps * 32 // block)
        launch(
            FOLLOW, "follow", grid, block, queues, queues.count, nodes, path, fates, kept, steps, blocks, space - blocks
        )
        self.path = path.numpy().view(np.uint64).reshape(warps, steps)
        told = fates.numpy().view(np.uint64).reshape(warps, 32)
        assert (told == told[:, :1]).all()  # all lanes are told the same
        self.fates = told[:, 0]
        self.was_exclusive = (kept.numpy().view(np.uint64) & 1).astype(bool)
        self.stayed_exclusive = (kept.numpy().view(np.uint64) & 2).astype(bool)


def expected_path(data: bytes, warp: int, steps: int, blocks: int, space: int) -> list[int]:
    words, lba, path = np.frombuffer(data, np.uint64), warp, []
    for step in range(steps):
        path.append(lba)
        number = int(words[lba * 64]) ^ int(words[(lba + blocks) * 64 - 1])
        lba = ((number + step) & 0xFFFFFFFFFFFFFFFF) % (space - blocks)
    return path


@pytest.mark.parametrize(("depth", "blocks"), [(64, 1), (4, 8), (2, 3), (64, 20)])
def test_a_list_is_followed_from_block_to_block(stored: bytes, depth: int, blocks: int) -> None:
    steps = few(3000, 150) // blocks
    with machine(stored, depth=depth, count=3) as m:
        for _ in range(2):
            seen = Followed(m.queues, 3, steps, blocks, 32, len(stored) // BLOCK)
            assert not seen.fates.any()
            assert seen.was_exclusive.all()
            assert seen.stayed_exclusive.all()
            for warp in range(3):
                assert seen.path[warp].tolist() == expected_path(stored, warp, steps, blocks, len(stored) // BLOCK)
            assert all_slots_are_free(m.queues)
        lbas = some_lbas(m.namespace, 500, 1)
        rows = Buffer.empty(500 * BLOCK, GPU)
        m.queues.gather(lbas, rows)
        assert rows.numpy().tobytes() == rows_of(stored, lbas, 1)
        stats = m.queues.stats()
        # Every command was counted: by those who had a queue, and by those who shared it.
        per_read = -(-blocks * BLOCK // 4096)
        assert sum(each["completed"] for each in stats) >= 2 * 3 * steps * per_read + 500 // 8
        assert all(each["late"] == each["unknown"] == each["bad_head"] == each["stuck"] == 0 for each in stats)


@pytest.mark.parametrize("block", [32, 128])
def test_warps_that_come_for_one_queue_share_it(stored: bytes, block: int) -> None:
    """At most one has it for itself at a time; the others wait for slots, and all are served."""
    warps, steps = few(16, 4), few(200, 12)
    with machine(stored, depth=8, count=2, timeout=20) as m:
        seen = Followed(m.queues, warps, steps, 1, block, len(stored) // BLOCK)
        assert not seen.fates.any()
        for warp in range(warps):
            assert seen.path[warp].tolist() == expected_path(stored, warp, steps, 1, len(stored) // BLOCK)
        assert all_slots_are_free(m.queues)


@pytest.mark.parametrize("blocks", [1, 8, 40])
def test_what_was_written_is_read(stored: bytes, blocks: int) -> None:
    warps, rounds = 2, few(300, 12) // blocks + 1
    nbytes = warps * rounds * blocks * BLOCK
    with machine(stored, slot_bytes=8192) as m:
        source = on_gpu(np.frombuffer(stored[-nbytes:], np.uint8) ^ 0x33)
        bad, target = on_gpu(np.zeros(1, np.uint64)), Buffer.empty(nbytes, GPU)
        launch(COPY, "copy", warps, 32, m.queues, m.queues.count, source, target, bad, rounds, blocks)
        assert not bad.numpy().any()
        assert target.numpy().tobytes() == source.numpy().tobytes()
        assert m.namespace.read(0, nbytes // BLOCK).numpy().tobytes() == source.numpy().tobytes()
        assert all_slots_are_free(m.queues)


@pytest.mark.parametrize("fault", ["duplicate-cqe@0.3", "unknown-cid@0.3", "torn-cqe@0.1", "stale-phase@0.1"])
def test_what_must_be_borne_costs_nothing_but_time(stored: bytes, fault: str) -> None:
    steps = few(500, 40)
    with machine(stored, depth=16, count=2) as m:
        m.inject(fault)
        seen = Followed(m.queues, 2, steps, 1, 32, len(stored) // BLOCK)
        assert m.injected() > 0
        assert not seen.fates.any()
        assert seen.stayed_exclusive.all()
        for warp in range(2):
            assert seen.path[warp].tolist() == expected_path(stored, warp, steps, 1, len(stored) // BLOCK)
        m.inject("")
        assert all_slots_are_free(m.queues)


def test_a_lost_completion_is_told_and_the_warp_goes_on(stored: bytes) -> None:
    with machine(stored, depth=16, count=1, timeout=1.5, driver={"timeout": 1.5}) as m:
        m.inject("drop#5")
        seen = Followed(m.queues, 1, few(100, 20), 1, 32, len(stored) // BLOCK)
        assert seen.was_exclusive.all()
        assert int(seen.fates[0]) >> 32 in (1, 2)  # given up, or the queues were made anew meanwhile
        assert not seen.stayed_exclusive.any()
        m.inject("")
        m.queues.recover()  # unless the watcher has done it already
        again = Followed(m.queues, 1, 20, 1, 32, len(stored) // BLOCK)
        assert not again.fates.any()
        assert again.stayed_exclusive.all()
        assert again.path[0].tolist() == expected_path(stored, 0, 20, 1, len(stored) // BLOCK)
        assert m.queues.recoveries >= 1


def test_an_error_is_an_answer_and_the_queue_is_kept(stored: bytes) -> None:
    with machine(stored, depth=16, count=1) as m:
        m.inject("error:0x281!#7")
        seen = Followed(m.queues, 1, 30, 1, 32, len(stored) // BLOCK)
        assert int(seen.fates[0]) == 0x281 | 1 << 14
        assert seen.stayed_exclusive.all()
        assert all_slots_are_free(m.queues)


EXAMPLE = Path(__file__).parents[2] / "examples" / "gpu_search_tree.py"


def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(few(100_000, 1_000)), str(few(5_000, 60))])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "; 0 failed" in said
    assert "equal: True" in said
