"""Files on namespaces by the gpu-nvme path: the package's kernels on the emulated GPU, and a controller with faults.

test_file_gpu.py runs it in its own process.
"""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import emulated_gpu
import gpunvme
from fake_cuda import FakeCuda
from files import contents
from gpunvme import nvme
from gpunvme.cli import demo_gpu, main
from gpunvme.cli.exits import Exit
from gpunvme.gpu import GpuQueues, moves, range_movement
from gpunvme.memory import Buffer, Span

SIZE = 1 << 20
GPU = "cuda:0"


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    cuda = emulated_gpu.use()
    yield cuda
    gc.collect()
    cuda.reset()


class Machine:
    """A controller that can be told to misbehave, and its namespace as files."""

    def __init__(self, options: str = "", timeout: float = 5) -> None:
        uri = f"soft:ram?size={SIZE}&threads=2&queues=12{options}"
        self.controller = nvme.open(uri, queues=2, timeout=timeout)
        self.namespace = self.controller.namespace()
        self.data = contents(SIZE)
        self.namespace.write_from(self.data)

    def open(self, mode: str = "r") -> gpunvme.File:
        return gpunvme.open(self.namespace, mode, path="gpu-nvme")

    def inject(self, faults: str) -> None:
        self.controller.transport.controller.inject(faults, 1)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.controller.close()


@pytest.mark.parametrize("options", ["", "&lba=4096", "&lba=4096&mdts=1", "&mqes=15"])
def test_reading_and_writing(gpu: FakeCuda, options: str) -> None:
    with Machine(options) as m, m.open("r+") as file:
        for offset, nbytes in ((0, SIZE), (1, 4095), (4096, 8192), (12_345, 70_001), (SIZE - 1, 1), (7, 0)):
            buffer = file.read(offset, nbytes, GPU)
            assert buffer.numpy().tobytes() == m.data[offset : offset + nbytes]
            done = file.last_transfer
            assert done is not None
            assert (done.path, done.direct_bytes) == ("gpu-nvme", nbytes)
        for nbytes, step in ((4096, 4096), (700, 1), (8192, 4096)):
            offsets = np.random.default_rng(1).integers(0, (SIZE - nbytes) // step + 1, 40) * step
            rows = file.gather(offsets, nbytes, device=GPU).numpy()
            assert [row.tobytes() for row in rows] == [m.data[at : at + nbytes] for at in offsets]
        source = file.read(8192, 65536, GPU)
        done = file.write_from(source, 131_072, fsync=True)
        assert done.path == "gpu-nvme"
        assert "kernels on cuda:0" in done.reason
        everything = m.namespace.read().numpy().tobytes()
        assert everything == m.data[:131_072] + m.data[8192 : 8192 + 65536] + m.data[131_072 + 65536 :]


# (offset, bytes) of many ranges, and how many launches may carry them.
RANGES = {
    "rows of one size": ([(8192 * ((7 * at) % 120), 512) for at in range(100)], 1),
    "tensors": ([((3 * at * 4096) % (SIZE - 200_704), 512 * (1 + at * at % 130)) for at in range(40)], 1),
    "unaligned tensors": ([(1 + 12_000 * at, 9001 + at) for at in range(50)], 3),
    "large ones": ([(0, 150_016), (600_064, 200_704), (4096, 100_352)], 1),
}


@pytest.mark.parametrize("adjoining", [True, False])
@pytest.mark.parametrize("ranges", RANGES)
def test_many_ranges_are_few_launches(gpu: FakeCuda, ranges: str, adjoining: bool) -> None:
    """A launch for each tensor of a checkpoint would take longer than reading it."""
    wanted, most = RANGES[ranges]
    with Machine("&mdts=2") as m, m.open() as file:
        file.read(0, 512, GPU)
        gap = 0 if adjoining else 64
        memory = Buffer.empty(sum(nbytes + gap for _, nbytes in wanted), GPU)
        before = memory.numpy().tobytes()
        expected, at, parts = bytearray(before), 0, []
        for offset, nbytes in wanted:
            parts.append((file, offset, memory.span.part(at, nbytes)))
            expected[at : at + nbytes] = m.data[offset : offset + nbytes]
            at += nbytes + gap
        done = gpunvme.read_many(parts)
        assert memory.numpy().tobytes() == expected
        assert done.nbytes == done.direct_bytes == sum(nbytes for _, nbytes in wanted)
        launches = re.search(r"in (\d+) launches", done.reason)
        assert launches is not None
        assert int(launches[1]) <= most


@pytest.mark.parametrize("fault", ["drop#9", "cfs#6"])
def test_ranges_that_are_lost_are_read_again(gpu: FakeCuda, fault: str) -> None:
    with Machine("&mdts=1", timeout=0.3) as m, m.open() as file:
        file.read(0, 512, GPU)
        m.inject(fault)
        parts = [(file, 30_000 * at, Buffer.empty(10_000 + at, GPU)) for at in range(30)]
        gpunvme.read_many(parts)
        for _, offset, buffer in parts:
            assert buffer.numpy().tobytes() == m.data[offset : offset + buffer.nbytes]
        assert m.controller.aborts + m.controller.resets > 0


def test_a_range_that_fails_names_its_blocks(gpu: FakeCuda) -> None:
    with Machine("&mdts=1") as m, m.open() as file:
        file.read(0, 512, GPU)
        m.inject("error:0x281!#7")
        parts = [(file, 32_768 * at, Buffer.empty(8192 * (1 + at % 2), GPU)) for at in range(20)]
        with pytest.raises(gpunvme.CommandError) as caught:
            gpunvme.read_many(parts)
        (failure,) = caught.value.failures
        assert failure.lba % 16 == 0
        assert failure.lba % 64 < 32
        assert failure.blocks == 16


def test_more_ranges_than_a_launch_holds_are_several(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_movement, "MOST_EXTENTS", 8)
    with Machine("&mdts=1") as m, m.open() as file:
        parts = [(file, 20_480 * at, Buffer.empty(512 * (1 + 7 * (at % 5)), GPU)) for at in range(40)]
        done = gpunvme.read_many([*parts, (file, 0, Buffer.empty(SIZE, GPU))])
        for _, offset, buffer in parts:
            assert buffer.numpy().tobytes() == m.data[offset : offset + buffer.nbytes]
        launches = re.search(r"in (\d+) launches", done.reason)
        assert launches is not None
        assert 6 <= int(launches[1]) <= 20


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("fault", ["drop#9", "drop#4", "cfs#6"])
def test_what_is_lost_is_read_again(gpu: FakeCuda, fault: str, wait: bool) -> None:
    with Machine("&mdts=1", timeout=0.3) as m, m.open() as file:
        assert file.read(0, 4096, GPU).numpy().tobytes() == m.data[:4096]  # the queues are made
        m.inject(fault)
        buffer = Buffer.empty(200_001, GPU)
        file.read_into(buffer, 5, wait=wait).wait(60)
        assert buffer.numpy().tobytes() == m.data[5:200_006]
        assert m.controller.aborts + m.controller.resets > 0


def test_errors_name_their_blocks_and_the_next_read_works(gpu: FakeCuda) -> None:
    with Machine() as m, m.open() as file:
        file.read(0, 512, GPU)
        m.inject("error:0x281!#3")
        with pytest.raises(gpunvme.CommandError) as caught:
            file.gather(np.arange(20) * 512, 512, device=GPU)
        assert [(each.sct, each.sc, each.kind) for each in caught.value.failures] == [(2, 0x81, "status")]
        assert file.read(3, 5000, GPU).numpy().tobytes() == m.data[3:5003]


def test_a_deadline_is_kept(gpu: FakeCuda) -> None:
    with Machine() as m, m.open() as file:
        file.read(0, 512, GPU)
        m.inject("slow:300")
        start = time.monotonic()
        with pytest.raises(gpunvme.DeadlineExceeded):
            file.gather(np.arange(1000) * 512, 512, device=GPU, timeout=0.2)
        assert time.monotonic() - start < 20
        m.inject("")
        assert file.read(3, 5000, GPU).numpy().tobytes() == m.data[3:5003]


def test_a_read_comes_after_the_work_of_the_callers_stream(gpu: FakeCuda) -> None:
    with Machine() as m, m.open() as file, gpu.alloc(8192) as buffer:
        file.read(0, 512, GPU)
        stream = gpu.create_stream()
        buffer.fill(7, stream=stream, delay_us=50_000)  # were the read not behind this, its bytes would be lost
        file.read_into(Span(buffer.ptr, 8192, GPU), stream=stream)  # type: ignore[arg-type]
        assert buffer.peek() == m.data[:8192]
        gpu.destroy_stream(stream)


def test_threads_share_the_queues(gpu: FakeCuda) -> None:
    gpu.control("fake_cuda_wait_for_kernels", 1)
    failures: list[BaseException] = []
    with Machine() as m, m.open() as file:

        def use(number: int) -> None:
            try:
                for at in range(4):
                    offset = 1000 * number + 333 * at
                    assert file.read(offset, 9000, GPU).numpy().tobytes() == m.data[offset : offset + 9000]
            except BaseException as error:  # noqa: BLE001 - the main thread fails for it
                failures.append(error)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads)
    assert not failures


def test_nothing_is_allocated_while_a_kernel_of_ours_runs(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may let it wait for the kernel, and what the kernel waits for behind it: the emulated GPU aborts."""
    monkeypatch.setattr(moves, "_ROOM_PIECES", (64, 256))
    with Machine() as m, m.namespace.gpu_queues(0, count=2, depth=32) as queues:
        lbas = np.random.default_rng(1).integers(0, m.namespace.blocks, 600)
        jobs = [lbas[:rows] for rows in (50, 60, 200, 20, 600, 600, 270, 1)]
        outs = [Buffer.empty(len(rows) * 512, GPU) for rows in jobs]
        m.inject("slow:1")
        transfers = [queues.gather(rows, out, wait=False) for rows, out in zip(jobs, outs, strict=True)]
        for transfer in transfers:
            transfer.wait(60)
        for rows, out in zip(jobs, outs, strict=True):
            assert out.numpy().tobytes() == b"".join(m.data[lba * 512 : lba * 512 + 512] for lba in rows)


def test_transfers_at_once_get_memory_of_their_own(gpu: FakeCuda) -> None:
    with Machine() as m, m.open() as file:
        file.read(0, 512, GPU)
        outs = [Buffer.empty(9000 + at, GPU) for at in range(8)]
        m.inject("slow:1")
        transfers = [file.read_into(out, 1 + at, wait=False) for at, out in enumerate(outs)]
        for transfer in transfers:
            transfer.wait(60)
        for at, out in enumerate(outs):
            assert out.numpy().tobytes() == m.data[1 + at : 1 + at + out.nbytes]


def test_closing_ends_what_is_in_flight_and_gives_everything_back(gpu: FakeCuda) -> None:
    before = gpu.counters().live()
    with Machine() as m:
        file = m.open()
        file.read(0, 512, GPU)
        m.inject("slow:50")
        buffer = Buffer.empty(SIZE, GPU)
        transfer = file.read_into(buffer, wait=False)
        file.close()
        with pytest.raises((gpunvme.Error, ValueError)):
            transfer.wait(20)
        m.inject("")
        assert m.controller.queues_left() == 10
        with m.open() as again:
            assert again.read(0, 512, GPU).numpy().tobytes() == m.data[:512]
    del buffer, transfer
    gc.collect()
    assert {key: n for key, n in gpu.counters().live().items() if n > before[key]} == {}


@pytest.fixture
def small_demo(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("IMAGE_BYTES", SIZE), ("ROWS", 300), ("ROWS_ALONE", 30), ("ROUNDS", 1)):
        monkeypatch.setattr(demo_gpu, name, value)


def test_the_demo_of_gpu_queues(small_demo: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--gpu", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert found["placement"] in found["tiers"]
    assert all(found["tiers"][tier] for tier in ("host", "data", "full"))
    assert found["doorbell"] == "direct"
    assert [row["verified"] for row in found["gathers"]] == [30, 30, 300, 300]
    assert [row["path"] for row in found["in_order"]] == ["gpu-nvme", "nvme", "host"]
    assert main(["demo", "--gpu"]) == Exit.OK
    said = capsys.readouterr().out
    for word in ("Placements", "Doorbells: direct", "IOPS", "bit by bit", *found["tiers"].values()):
        assert word in said


def test_the_demo_sees_wrong_bytes(
    small_demo: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = GpuQueues.gather
    monkeypatch.setattr(GpuQueues, "gather", lambda self, lbas, out, **rest: gather(self, np.array(lbas) ^ 1, out))
    monkeypatch.setattr(GpuQueues, "_verify", lambda self: None, raising=False)
    assert main(["demo", "--gpu"]) == Exit.CHECK_FAILED
    assert "are not those of the image" in capsys.readouterr().err


def test_bad_use_is_refused_before_any_kernel_starts(gpu: FakeCuda) -> None:
    """Nothing may be half done, and nobody wants to learn of a wrong argument from a hung GPU."""
    gpu.set_device_count(2)
    with Machine("&mqes=256") as m, m.namespace.gpu_queues(0, count=2, depth=16) as queues:
        space, out, other = m.namespace, Buffer.empty(10 * 512, GPU), Buffer.empty(10 * 512, "cuda:1")
        launched = gpu.calls("cuLaunchKernel")
        cases: list[tuple[Any, Any, str]] = [
            (lambda: queues.gather([0], bytearray(512)), gpunvme.SpanError, "memory is on cpu"),
            (lambda: queues.gather([0], other, blocks=1), gpunvme.SpanError, "memory is on cuda:1"),
            (lambda: queues.scatter([0], other, blocks=1), gpunvme.SpanError, "driven by cuda:0"),
            (lambda: queues.gather(range(11), out, blocks=1), gpunvme.SpanError, "the memory has 5120"),
            (lambda: queues.gather(range(3), out), gpunvme.SpanError, "blocks="),
            (lambda: queues.stream(0, 11 * 512, out), gpunvme.SpanError, "has 5120 bytes"),
            (lambda: queues.stream(0, 100, out), gpunvme.RangeError, "whole number"),
            (lambda: queues.stream(space.blocks, 512, out), gpunvme.RangeError, "has 2048 blocks"),
            (lambda: queues.gather([0, 2048], out, blocks=1), gpunvme.RangeError, "read number 1"),
            (lambda: queues.gather([-1], out, blocks=1), gpunvme.RangeError, "read number 0"),
            (lambda: queues.gather([0], out, blocks=0), gpunvme.RangeError, "at least one"),
            (lambda: queues.gather([0.5], out), TypeError, "integers"),
            (lambda: queues.gather([0], Span(out.ptr, 9999, GPU)), gpunvme.SpanError, "past the end"),  # type: ignore[arg-type]
            (lambda: space.gpu_queues(0, depth=257), ValueError, r"2 to 256 entries \(CAP.MQES\)"),
            (lambda: space.gpu_queues(0, depth=1), ValueError, "depth is 1"),
            (lambda: space.gpu_queues(0, count=0), ValueError, "at least one queue"),
            (lambda: space.gpu_queues(0, count=9), gpunvme.NvmeError, "8 are left"),
            (lambda: space.gpu_queues(0, placement="moon"), ValueError, "placement is"),
            (lambda: space.gpu_queues(0, slot_bytes=0), ValueError, "slot_bytes"),
            (lambda: space.gpu_queues(0, timeout=0), ValueError, "timeout"),
            (lambda: space.gpu_queues(2), gpunvme.CudaError, "there is no GPU 2"),
            (lambda: space.gpu_queues("cpu"), gpunvme.SpanError, "not by cpu"),
        ]
        for use, error, message in cases:
            with pytest.raises(error, match=message):
                use()
        assert gpu.calls("cuLaunchKernel") == launched
        assert m.controller.queues_left() == 8, "what failed gave its queues back"
