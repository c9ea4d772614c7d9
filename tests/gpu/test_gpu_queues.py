"""NVMe queues that a GPU drives, against the software controller: what comes with the package, and bad use.

On a real GPU with ``-m gpu``; on the emulated one, smaller, by tests/soft/test_emulated_gpu_queues.py. If this failed,
kernels would hang, or compute with wrong bytes.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time

import numpy as np
import pytest
from gpu_queue_machine import (
    BLOCK,
    EMULATED,
    GPU,
    MARKS,
    PRELUDE,
    SIZE,
    Int64s,
    all_slots_are_free,
    allocated_bytes,
    allocations_wait_for_kernels,
    few,
    machine,
    rows_of,
    some_lbas,
)

import fake_nvtx
import gpunvme
from gpunvme import nvme
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.registration import registrations
from gpunvme.memory import Buffer

pytestmark = MARKS


@pytest.mark.parametrize("depth", few([2, 3, 5, 37, 64, 100, 256], [2, 3, 37, 256]))
@pytest.mark.parametrize("count", few([1, 3, 8], [1, 3]))
def test_gather_brings_every_row(stored: bytes, depth: int, count: int) -> None:
    with machine(stored, depth=depth, count=count) as m:
        for rows, blocks in ((1, 1), (31, 1), (33, 3), (few(1000, 250), 8)):
            lbas = some_lbas(m.namespace, rows, blocks, rows)
            out = Buffer.empty(rows * blocks * BLOCK, GPU)
            done = m.queues.gather(lbas, out)
            assert out.numpy().tobytes() == rows_of(stored, lbas, blocks)
            assert done.path == "gpu-nvme"
            assert done.nbytes == done.direct_bytes == out.nbytes
            assert f"{rows} commands by kernels on cuda:0 over {count} queue" in done.reason
        assert all_slots_are_free(m.queues)


@pytest.mark.parametrize("blocks", few([9, 16, 17, 40, 300], [9, 17, 300]))
@pytest.mark.parametrize("slot_bytes", few([None, 8192, 12288, 65536], [None, 12288, 65536]))
def test_rows_larger_than_a_page_are_prp_lists_and_larger_than_a_slot_several_commands(
    stored: bytes, blocks: int, slot_bytes: int | None
) -> None:
    with machine(stored, slot_bytes=slot_bytes) as m:
        lbas = some_lbas(m.namespace, 50, blocks)
        out = Buffer.empty(50 * blocks * BLOCK, GPU)
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(stored, lbas, blocks)


@pytest.mark.parametrize("options", ["&lba=4096", "&mdts=1", "&dstrd=3", "&mpsmin=1&mpsmax=1", "&mdts=0"])
def test_other_controllers(stored: bytes, options: str) -> None:
    with machine(stored, options, slot_bytes=16384) as m:
        block = m.namespace.block_size
        lbas = some_lbas(m.namespace, 200, 3)
        out = Buffer.empty(200 * 3 * block, GPU)
        m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(stored, lbas, 3, block)
        whole = Buffer.empty(SIZE, GPU)
        m.queues.stream(0, SIZE, whole)
        assert whole.numpy().tobytes() == stored
        assert all_slots_are_free(m.queues)


def test_doorbells_on_pages_of_their_own(stored: bytes) -> None:
    """Queues that are made later have other pages than those that were made before; the first may go sooner."""
    with machine(stored, "&dstrd=10") as m:
        later = m.namespace.gpu_queues(0, count=2, depth=64)
        queues = [m.queues, later]
        assert later.doorbell == m.queues.doorbell
        pages: set[int] = set()
        if later.doorbell == "direct":
            indices = {index for each in queues for index in each._set.doorbells._indices()}
            pages = {m.controller.transport.doorbells + 4096 * index for index in indices}
            assert len(pages) == 8
            assert pages <= registrations._registered.keys()
        for each in (later, m.queues):
            out = Buffer.empty(50 * BLOCK, GPU)
            each.gather(np.arange(50), out)
            assert out.numpy().tobytes() == stored[: 50 * BLOCK]
            each.close()
        assert not pages & registrations._registered.keys()


@pytest.mark.parametrize("lba", [0, 7])
@pytest.mark.parametrize("blocks", [0, 1, 8, 9, 255, 256, 257, 5000, SIZE // BLOCK - 7])
def test_stream_brings_every_block_and_nothing_else(stored: bytes, lba: int, blocks: int) -> None:
    with machine(stored) as m:
        room = Buffer.empty(blocks * BLOCK + 64, GPU)
        before = room.numpy()[-64:].tobytes()
        m.queues.stream(lba, blocks * BLOCK, room)
        got = room.numpy().tobytes()
        assert got[: blocks * BLOCK] == stored[lba * BLOCK : (lba + blocks) * BLOCK]
        assert got[-64:] == before


def test_small_queues_stream_too(stored: bytes) -> None:
    """Fewer slots than the kernel has buffers: none may wait for a slot that it keeps from another."""
    for depth in (2, 3, 5):
        with machine(stored, depth=depth, count=1) as m:
            whole = Buffer.empty(SIZE, GPU)
            m.queues.stream(0, SIZE, whole)
            assert whole.numpy().tobytes() == stored
            assert all_slots_are_free(m.queues)


@pytest.mark.parametrize("slot_bytes", [None, 65536])
def test_scatter_is_the_inverse_of_gather(stored: bytes, slot_bytes: int | None) -> None:
    with machine(stored, slot_bytes=slot_bytes) as m:
        rows, blocks = few(400, 100), 20
        source = Buffer.empty(rows * blocks * BLOCK, GPU)
        m.queues.gather(np.arange(rows) * blocks, source)
        places = np.random.default_rng(2).permutation(m.namespace.blocks // blocks)[:rows] * blocks
        done = m.queues.scatter(places, source)
        assert done.nbytes == source.nbytes
        expected = bytearray(stored)
        for number, lba in enumerate(places):
            piece = stored[number * blocks * BLOCK : (number + 1) * blocks * BLOCK]
            expected[lba * BLOCK : (lba + blocks) * BLOCK] = piece
        assert m.namespace.read().numpy().tobytes() == expected
        assert all_slots_are_free(m.queues)


def test_forwarded_doorbells_carry_the_same(stored: bytes) -> None:
    with machine(stored, doorbell="forward") as m:
        assert m.queues.doorbell == "forward"
        lbas = some_lbas(m.namespace, 500, 8)
        out = Buffer.empty(500 * 8 * BLOCK, GPU)
        done = m.queues.gather(lbas, out)
        assert out.numpy().tobytes() == rows_of(stored, lbas, 8)
        assert "forwarded by a host thread" in done.reason


@pytest.mark.skipif(EMULATED, reason="PyTorch does not know the emulated GPU")
def test_lbas_and_kernels_are_in_the_streams_order(stored: bytes) -> None:
    torch = pytest.importorskip("torch")
    with machine(stored) as m:
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
            assert bytes(copy.cpu().numpy()) == rows_of(stored, lbas, 1)
            assert transfer.wait(5).done


STREAM_ORDER = """
extern "C" __global__ void late(unsigned long long ns) {
  for (const unsigned long long end = gpunvme::now_ns() + ns; gpunvme::now_ns() < end;) __nanosleep(1000);
}
"""


def test_a_kernel_runs_after_what_is_before_it_in_its_stream_and_before_what_is_behind(stored: bytes) -> None:
    with machine(stored) as m:
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
            assert ctypes.string_at(got, out.nbytes) == rows_of(stored, lbas, 1)
            assert transfer.wait(5).done
        gpu.free_host(host)
        gpu.free_host(got)
        gpu.destroy(stream=stream)


def test_many_jobs_and_threads_share_the_queues(stored: bytes) -> None:
    with machine(stored) as m:
        allocations_wait_for_kernels()
        threads, rounds, rows = few((8, 10, 700), (4, 2, 150))
        lbas = [some_lbas(m.namespace, rows, 4, seed) for seed in range(threads)]
        failures = []

        def use(number: int) -> None:
            try:
                for _ in range(rounds):
                    out = Buffer.empty(rows * 4 * BLOCK, GPU)
                    m.queues.gather(lbas[number], out, stream=0)
                    assert out.numpy().tobytes() == rows_of(stored, lbas[number], 4)
                    whole = Buffer.empty(SIZE, GPU)
                    m.queues.stream(0, SIZE, whole, stream=0)
                    assert whole.numpy().tobytes() == stored
            except Exception as error:  # noqa: BLE001 - the main thread fails for it
                failures.append(error)

        users = [threading.Thread(target=use, args=(number,)) for number in range(threads)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        assert not failures
        assert all_slots_are_free(m.queues)


# --- bad use


def test_bad_use_is_refused_before_any_kernel_runs(stored: bytes) -> None:
    with machine(stored) as m:
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


def test_closed_queues_say_so_and_ids_are_used_again(stored: bytes) -> None:
    with machine(stored, count=10) as m:
        for _ in range(5):
            m.queues.close()
            m.queues.close()
            with pytest.raises(ValueError, match="closed"):
                m.queues.gather([0], Buffer.empty(BLOCK, GPU))
            m.queues = m.namespace.gpu_queues(0, count=10, depth=16)
        m.controller.close()
        with pytest.raises(ValueError, match="closed"):
            m.queues.gather([0], Buffer.empty(BLOCK, GPU))


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


def test_launches_have_ranges(stored: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_nvtx.use(monkeypatch)
    with machine(stored, timeout=few(0.3, 2.0), driver={"timeout": 0.3}) as m:
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


def test_memory_that_is_let_go_while_a_kernel_runs_is_freed_behind_it(stored: bytes) -> None:
    """Freeing it at once would wait for the kernel, which may need what this thread is to do next."""
    with machine(stored, timeout=60) as m:
        m.inject("delay:300#1")
        rows, let_go = Buffer.empty(16 * BLOCK, GPU), Buffer.empty(1 << 20, GPU)
        lbas = some_lbas(m.namespace, 16, 1)
        held = allocated_bytes()
        transfer = m.queues.gather(lbas, rows, wait=False)
        del let_go
        gc.collect()
        assert allocated_bytes() == held or transfer.done
        transfer.wait(60)
        if EMULATED:
            assert allocated_bytes() == held - (1 << 20)
        assert rows.numpy().tobytes() == rows_of(stored, lbas, 1)


def test_a_job_is_not_over_before_it_is_launched(stored: bytes) -> None:
    """Other threads look after jobs, too: what its room still says is of another job."""
    with machine(stored) as m:
        rows, lbas = Buffer.empty(16 * BLOCK, GPU), some_lbas(m.namespace, 16, 1)
        thread = threading.Thread(target=m.queues.gather, args=(lbas, rows))
        with m.queues._set.gate:
            thread.start()
            while not m.queues._set.jobs:
                assert thread.is_alive()
                time.sleep(0.001)
            [job] = m.queues._set.jobs
            assert not job.wait(0.01)
        thread.join(60)
        assert not thread.is_alive()
        assert rows.numpy().tobytes() == rows_of(stored, lbas, 1)
