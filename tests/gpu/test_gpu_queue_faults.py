"""NVMe queues that a GPU drives, against the software controller: all its faults.

On a real GPU with ``-m gpu``; on the emulated one, smaller, by tests/soft/test_emulated_gpu_queues.py. If this failed,
kernels would hang, or compute with wrong bytes.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from gpu_queue_machine import (
    BLOCK,
    GPU,
    MARKS,
    SIZE,
    Int64s,
    all_slots_are_free,
    few,
    lone,
    machine,
    on_gpu,
    rows_of,
    some_lbas,
)

import gpunvme
from gpunvme.memory import Buffer

pytestmark = MARKS


HARMLESS = ["delay:20@0.05", "reorder@0.5", "duplicate-cqe@0.3", "unknown-cid@0.3", "torn-cqe@0.1", "stale-phase@0.1"]
LOST = ["drop@0.02", "drop#5", "cq-stall#4"]


@pytest.mark.parametrize("fault", [*HARMLESS, ",".join(HARMLESS)])
def test_what_must_be_borne_costs_nothing_but_time(stored: bytes, fault: str) -> None:
    with machine(stored) as m:
        m.inject(fault)
        rows = few(1500, 400)
        lbas = some_lbas(m.namespace, rows, 2)
        out = Buffer.empty(rows * 2 * BLOCK, GPU)
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(stored, lbas, 2)
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
def test_lost_completions_are_repeated_when_somebody_waits(stored: bytes, fault: str, kernel: str) -> None:
    with machine(stored, timeout=0.3, driver={"timeout": 0.3}) as m:
        m.inject(fault)
        lbas = np.random.default_rng(1).permutation(m.namespace.blocks)[:300]
        rows = Buffer.empty(300 * BLOCK, GPU)
        if kernel == "gather":
            done = m.queues.gather(lbas, rows)
            assert rows.numpy().tobytes() == rows_of(stored, lbas, 1)
        elif kernel == "stream":
            whole = Buffer.empty(SIZE, GPU)
            done = m.queues.stream(0, SIZE, whole)
            assert whole.numpy().tobytes() == stored
        else:
            done = m.queues.scatter(lbas, rows)
            m.inject("")
            everything = m.namespace.read().numpy().tobytes()
            assert rows_of(everything, lbas, 1) == rows.numpy().tobytes()
        assert done.done
        assert m.queues.recoveries > 0
        assert m.controller.aborts + m.controller.resets > 0
        assert all_slots_are_free(m.queues)


def test_lost_completions_are_reported_where_work_may_follow(stored: bytes) -> None:
    with machine(stored, timeout=few(0.3, 2.0), driver={"timeout": 0.3}) as m:
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
        assert out.numpy().tobytes() == rows_of(stored, lbas, 1)


def test_a_controller_that_answers_nothing_is_an_error_within_the_deadlines(stored: bytes) -> None:
    with machine(stored, timeout=0.2, driver={"timeout": 0.3}) as m:
        m.inject("drop")
        rows = few(5000, 1000)
        out = Buffer.empty(rows * BLOCK, GPU)
        with pytest.raises(gpunvme.CommandError, match="never answered"):
            m.queues.gather(some_lbas(m.namespace, rows, 1), out)
        m.inject("")
        lbas = some_lbas(m.namespace, 100, 1)
        m.queues.gather(lbas, Buffer.empty(100 * BLOCK, GPU))


def test_errors_name_their_rows(stored: bytes) -> None:
    with machine(stored) as m:
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
        assert got[good].tobytes() == rows_of(stored, lbas[good], 1)
        kept = [number for number, lba in enumerate(lbas) if lba in bad and (got[number] == 0xEE).all()]
        assert len(kept) == 2  # nobody else's bytes
        m.inject("error:0x004#2,error:0x082#9")  # these may be tried again
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(stored, lbas, 1)
        assert all_slots_are_free(m.queues)


@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_lone_command_is_tried_four_times(stored: bytes, failures: int) -> None:
    with machine(stored, count=1) as m:
        before = m.controller.transport.controller.stats()["commands"]
        m.inject(",".join(f"error:0x004#{number}" for number in range(1, failures + 1)))
        memory = Buffer.empty(8 * BLOCK, GPU)
        ended = lone(m.queues, memory, warps=1, rounds=1, blocks=8)
        assert ended.tolist() == [[0 if failures < 4 else 4]]
        assert m.controller.transport.controller.stats()["commands"] - before == min(failures + 1, 4)
        if failures < 4:
            assert memory.numpy().tobytes() == stored[: 8 * BLOCK]
        assert all_slots_are_free(m.queues)


def test_a_lone_command_that_is_not_answered_ends_at_its_deadline(stored: bytes) -> None:
    with machine(stored, count=1, timeout=few(0.3, 1.0), driver={"timeout": 0.3}) as m:
        m.inject("drop#3")
        # Both now: what brings a lost command back launches kernels, and allocating may wait for them.
        memory, out = on_gpu(np.full(6 * BLOCK, 0xEE, np.uint8)), Buffer.empty(BLOCK, GPU)
        fates = lone(m.queues, memory, warps=1, rounds=6, blocks=1)[0] >> np.uint64(32)
        assert fates[:3].tolist() == [0, 0, 1]  # after it, the host may already have stopped the queue
        for number, row in enumerate(memory.numpy().reshape(6, BLOCK)):
            expected = stored[number * BLOCK : (number + 1) * BLOCK] if fates[number] == 0 else b"\xee" * BLOCK
            assert row.tobytes() == expected
        m.queues.gather([5], out)
        assert out.numpy().tobytes() == stored[5 * BLOCK : 6 * BLOCK]


def test_more_failures_than_are_listed_are_counted(stored: bytes) -> None:
    with machine(stored) as m:
        m.inject("error:0x281!")
        lbas = some_lbas(m.namespace, 4200, 1)
        with pytest.raises(gpunvme.CommandError) as caught:
            m.queues.gather(lbas, Buffer.empty(4200 * BLOCK, GPU))
        assert len(caught.value.failures) == 4096
        assert all_slots_are_free(m.queues)


def test_lbas_on_the_gpu_are_checked_one_by_one(stored: bytes) -> None:
    with machine(stored) as m:
        lbas = Int64s(on_gpu(np.array([1, m.namespace.blocks, 3, -1, 2**62], np.int64)))
        out = Buffer.empty(5 * BLOCK, GPU)
        with pytest.raises(gpunvme.CommandError, match="SC 80h, DNR") as caught:
            m.queues.gather(lbas, out)
        assert len(caught.value.failures) == 3
        got = out.numpy().reshape(5, BLOCK)
        assert got[0].tobytes() + got[2].tobytes() == rows_of(stored, [1, 3], 1)


@pytest.mark.parametrize("when", [1, 40])
def test_a_controller_that_fails_is_reset_and_the_rest_is_read(stored: bytes, when: int) -> None:
    with machine(stored, timeout=0.5, driver={"timeout": 0.5}) as m:
        m.inject(f"cfs#{when}")
        rows = few(2000, 500)
        lbas = some_lbas(m.namespace, rows, 1)
        out = Buffer.empty(rows * BLOCK, GPU)
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(stored, lbas, 1)
        assert m.controller.resets >= 1


def test_a_reset_by_somebody_else_is_survived(stored: bytes) -> None:
    with machine(stored) as m:
        rows = few(3000, 500)
        lbas = some_lbas(m.namespace, rows, 1)
        out = Buffer.empty(rows * BLOCK, GPU)
        for _ in range(5):
            transfer = m.queues.gather(lbas, out, wait=False)
            m.controller.reset()
            with contextlib.suppress(gpunvme.CommandError):
                transfer.wait(10)
            m.queues.gather(lbas, out)
            assert out.numpy().tobytes() == rows_of(stored, lbas, 1)
        assert all_slots_are_free(m.queues)


def test_a_controller_that_is_gone_ends_everything_and_closing_works(stored: bytes) -> None:
    with machine(stored, timeout=0.3, driver={"timeout": 0.3}) as m:
        m.inject("device-gone#10")
        out = Buffer.empty(2000 * BLOCK, GPU)
        with pytest.raises(gpunvme.NvmeError):
            m.queues.gather(some_lbas(m.namespace, 2000, 1), out)
        with pytest.raises(gpunvme.NvmeError):
            m.queues.gather([0], Buffer.empty(BLOCK, GPU))
    with machine(stored) as m:
        m.queues.gather([0], Buffer.empty(BLOCK, GPU))


def test_a_transfers_deadline_and_cancelling(stored: bytes) -> None:
    with machine(stored, timeout=0.5) as m:
        m.inject("slow:50")
        lbas = some_lbas(m.namespace, 20000, 1)
        out = Buffer.empty(20000 * BLOCK, GPU)
        with pytest.raises(gpunvme.DeadlineExceeded):
            m.queues.gather(lbas, out, timeout=0.2)
        transfer = m.queues.gather(lbas, out, wait=False)
        transfer.cancel()
        with pytest.raises(gpunvme.Cancelled):
            transfer.wait(10)
