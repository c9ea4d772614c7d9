"""Files on namespaces by the gpu-nvme path, its queues played by Python. test_file_gpu.py runs it in its own process.

Device memory is the fake libcuda's, so nobody can take a short cut; kernels are played here, some looks after they were
launched. What real kernels do is tested in tests/gpu.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fake_cuda
import gpunvme
from fake_cuda import FakeCuda
from files import contents
from gpunvme import nvme
from gpunvme.errors import Failed
from gpunvme.gpu import kept as keeping
from gpunvme.memory import Span
from gpunvme.transfer import Report, Transfer

SIZE = 1 << 20
GUARD = 0xA5


class Job:
    """A launch of gather, scatter or stream, done after it was looked at a few times."""

    def __init__(self, machine: Machine, act: Any, commands: int, nbytes: int) -> None:
        self.machine, self.act, self.commands, self.nbytes, self.launches = machine, act, commands, nbytes, 1
        self.looks = 0
        self.ended = self.repeats = False
        self.error: Exception | None = None

    def repeat_lost(self) -> None:
        self.repeats = True

    def wait(self, seconds: float) -> bool:
        self.looks += 1
        if self.ended or self.looks < 3 or self.machine.hung:
            return self.ended
        self.ended = True
        self.machine.in_flight -= 1
        try:
            self.act()
        except gpunvme.Error as error:
            self.error = error
        return True

    def cancel(self) -> None:
        self.machine.hung = False
        self.error, self.act = gpunvme.Cancelled("cancelled"), lambda: None

    expire = cancel

    def failure(self) -> Exception | None:
        return self.error

    def report(self) -> Report:
        moved = self.nbytes if self.ended and self.error is None else 0
        return Report("gpu-nvme", "a test's", 0.0, direct_bytes=moved, bounced_bytes=moved)


class Queues:
    """GpuQueues, as far as the path uses them."""

    slot_bytes = 4096
    device, count, placement, doorbell_reason = "cuda:0", 2, "host", "a test's"

    def __init__(self, machine: Machine, namespace: Any) -> None:
        self.machine, self.namespace, self.name = machine, namespace, namespace.name
        self.closed = False

    def prepare(self, jobs: int) -> None:
        pass

    def _start(self, kind: str, stream: int, wait: bool, act: Any, commands: int, nbytes: int) -> Transfer:
        machine = self.machine
        assert not wait
        assert stream == machine.lane_stream, "on a stream of the path's own"
        assert machine.called, "nothing is launched before the caller's work has ended"
        machine.launches.append((kind, nbytes))
        machine.in_flight += 1
        assert machine.in_flight == 1
        return Transfer(Job(machine, act, commands, nbytes), nbytes)

    def gather(self, lbas: Any, out: Span, *, blocks: int, stream: int, wait: bool) -> Transfer:
        places = np.array(lbas)
        row = blocks * self.namespace.block_size
        assert out.nbytes == len(places) * row

        def act() -> None:
            bad = [int(lba) for lba in places if lba in self.machine.bad]
            if bad:
                every = [Failed(2, lba, blocks, 1, 0, 0x281, "status") for lba in bad]
                raise gpunvme.CommandError("bad blocks", every)
            data = b"".join(self.machine.read(self.namespace, int(lba), blocks) for lba in places)
            self.machine.poke(out.ptr, data)

        return self._start("gather", stream, wait, act, len(places), out.nbytes)

    def stream(self, lba: int, nbytes: int, out: Span, *, stream: int, wait: bool) -> Transfer:
        assert nbytes % self.namespace.block_size == 0

        def act() -> None:
            self.machine.poke(out.ptr, self.machine.read(self.namespace, lba, nbytes // self.namespace.block_size))

        return self._start("stream", stream, wait, act, 1, nbytes)

    # What the path asks of `Moves`.

    @property
    def _moves(self) -> Queues:
        return self

    extent_blocks = 16

    def extents(self, table: Any, stream: int) -> Transfer:
        blocks = table["blocks"]
        assert 0 < blocks.min() <= blocks.max() <= self.extent_blocks

        def act() -> None:
            for lba, memory, count in table.tolist():
                self.machine.poke(memory, self.machine.read(self.namespace, lba, count))

        nbytes = int(blocks.sum()) * self.namespace.block_size
        return self._start("extents", stream, False, act, len(table), nbytes)

    def while_quiet(self, make: Any) -> Any:
        assert self.machine.in_flight == 0
        return make()

    def begin_brief(self, launch: Any, event: int) -> None:
        launch()

    def end_brief(self, event: int) -> None:
        pass

    def scatter(self, lbas: Any, source: Span, *, blocks: int, stream: int, wait: bool) -> Transfer:
        (lba,) = lbas
        assert blocks * self.namespace.block_size == source.nbytes

        def act() -> None:
            self.namespace.write_from(self.machine.peek(source.ptr, source.nbytes), int(lba))

        return self._start("scatter", stream, wait, act, 1, source.nbytes)

    def close(self) -> None:
        self.closed = True
        self.machine.closed.append("queues")


class Machine:
    """A controller, a fake GPU, and what they saw."""

    def __init__(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = cuda
        self.launches: list[tuple[str, int]] = []
        self.made: list[Queues] = []
        self.closed: list[str] = []
        self.bad: set[int] = set()
        self.in_flight = self.looks = self.refused = 0
        self.lane_stream = 77
        self.called = False
        self.held = self.hung = False
        self.why = ""
        self.live: dict[int, Any] = {}
        monkeypatch.setattr(keeping, "Gpu", lambda index: self)
        monkeypatch.setattr(keeping, "own_kernels", lambda gpu: self)
        monkeypatch.setattr(sys.modules["gpunvme.gpu.compile"], "why_no_kernels", lambda: self.why)

    index = 0

    def read(self, namespace: Any, lba: int, blocks: int) -> bytes:
        return bytes(namespace.read(lba, blocks).numpy().tobytes())

    def peek(self, address: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self.cuda.control(
            "fake_cuda_peek", ctypes.addressof((ctypes.c_char * nbytes).from_buffer(data)), address, nbytes
        )
        return bytes(data)

    def poke(self, address: int, data: bytes) -> None:
        self.cuda.control("fake_cuda_poke", address, data, len(data))

    # The GPU's driver, as lanes use it.

    def stream(self) -> int:
        return self.lane_stream

    def event(self) -> int:
        return 5

    def allocate(self, nbytes: int) -> int:
        buffer = self.cuda.alloc(nbytes)
        self.live[buffer.ptr] = buffer
        return buffer.ptr

    def free(self, address: int) -> None:
        self.closed.append("lane")
        self.live.pop(address).free()

    def allocate_host(self, nbytes: int) -> tuple[int, int]:
        memory = ctypes.create_string_buffer(nbytes)
        self.live[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory), ctypes.addressof(memory)

    def free_host(self, address: int) -> None:
        del self.live[address]

    def destroy(self, **_: int) -> None:
        pass

    def record(self, event: int, stream: int) -> None:
        self.looks = 0
        if stream != self.lane_stream:
            self.called = False

    def happened(self, event: int) -> bool:
        self.looks += 1
        if self.looks < 3 or self.held:
            return False
        self.called = True
        return True

    def kernel(self, name: str) -> Machine:
        assert name == "gpunvme_cut"
        return self

    def launch(self, grid: int, block: int, table: int, count: int, *, stream: int) -> None:
        assert stream == self.lane_stream
        cuts = np.frombuffer(ctypes.string_at(table, count * keeping.CUT.itemsize), keeping.CUT)
        self.launches.append(("cut", int(cuts["nbytes"].sum())))
        for source, target, nbytes in cuts.tolist():
            self.poke(target, self.peek(source, nbytes))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    cuda = fake_cuda.use()
    made = Machine(cuda, monkeypatch)

    def gpu_queues(namespace: Any, device: Any, *, count: int) -> Queues:
        assert str(device) == "cuda:0"
        assert 1 <= count < namespace.controller.queues_left()  # one at least is left for the other GPU
        if made.refused:
            raise gpunvme.NvmeError("a test's refusal")
        made.made.append(Queues(made, namespace))
        return made.made[-1]

    monkeypatch.setattr("gpunvme.nvme.namespace.Namespace.gpu_queues", gpu_queues)
    yield made
    gc.collect()
    assert not keeping._kept
    assert not made.live
    cuda.reset()


@pytest.fixture(params=[512, 4096], scope="module")
def namespace(request: pytest.FixtureRequest) -> Iterator[tuple[nvme.Namespace, bytes]]:
    with nvme.open(f"soft:ram?size={SIZE}&lba={request.param}&queues=8", queues=2) as controller:
        data = contents(SIZE)
        space = controller.namespace()
        space.write_from(data)
        yield space, data


def gpu_span(machine: Machine, nbytes: int) -> tuple[Any, Span]:
    """Device memory with 64 bytes of room before and behind."""
    buffer = machine.cuda.alloc(nbytes + 128)
    buffer.poke(bytes([GUARD]) * (nbytes + 128))
    return buffer, Span(buffer.ptr + 64, nbytes, "cuda:0", owner=buffer)  # type: ignore[arg-type]


def found(buffer: Any, nbytes: int) -> bytes:
    everything = bytes(buffer.peek())
    assert everything[:64] == everything[64 + nbytes :] == bytes([GUARD]) * 64
    return everything[64 : 64 + nbytes]


relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
near = st.sampled_from([0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 70_001]) | st.integers(0, SIZE)


@relaxed
@given(offset=near, nbytes=near, wait=st.booleans())
def test_any_range_is_whole_blocks_by_kernels_and_the_rest_cut_out(
    machine: Machine, namespace: Any, offset: int, nbytes: int, wait: bool
) -> None:
    space, data = namespace
    nbytes = min(nbytes, SIZE - offset)
    machine.launches.clear()
    with gpunvme.open(space, path="gpu-nvme") as file:
        buffer, span = gpu_span(machine, nbytes)
        with buffer:
            done = file.read_into(span, offset, wait=wait).wait(10)
            assert found(buffer, nbytes) == data[offset : offset + nbytes]
    assert done.path == "gpu-nvme"
    assert done.direct_bytes == done.bounced_bytes == nbytes
    block = space.block_size
    whole = max(0, (offset + nbytes) // block - -(-offset // block)) * block
    kinds = dict(machine.launches)
    assert kinds.get("stream", 0) == whole
    assert kinds.get("cut", 0) == nbytes - whole
    assert ("cut out on the GPU" in done.reason) == (nbytes > whole)
    assert ("nothing was moved" in done.reason) == (nbytes == 0)


@relaxed
@given(seed=st.integers(0, 99), count=st.integers(0, 300), nbytes=st.sampled_from([1, 100, 512, 4096, 5000, 8192]))
@pytest.mark.parametrize("step", [1, 512, 4096])
def test_rows_of_any_size_and_place_are_gathered(
    machine: Machine, namespace: Any, seed: int, count: int, nbytes: int, step: int
) -> None:
    space, data = namespace
    offsets = np.random.default_rng(seed).integers(0, (SIZE - nbytes) // step + 1, count) * step
    if count:
        offsets[-1] = (SIZE - nbytes) // step * step  # the last blocks
    machine.launches.clear()
    with gpunvme.open(space, path="gpu-nvme") as file:
        buffer, span = gpu_span(machine, count * nbytes)
        with buffer:
            file.gather(offsets, nbytes, out=span)
            assert found(buffer, count * nbytes) == b"".join(data[at : at + nbytes] for at in offsets.tolist())
    assert file.last_transfer is not None
    assert file.last_transfer.path == "gpu-nvme"
    aligned = nbytes % space.block_size == 0 and not (offsets % space.block_size).any()
    assert any(kind == "cut" for kind, _ in machine.launches) == (count > 0 and not aligned)


def test_many_parts_are_one_transfer_and_one_launch(machine: Machine, namespace: Any) -> None:
    space, data = namespace
    block = space.block_size
    with gpunvme.open(space, path="gpu-nvme") as file, machine.cuda.alloc(40 * block) as buffer:
        where = [(0, 0, 8 * block), (8 * block, 8 * block, 4 * block), (100 * block + 7, 20 * block, 3 * block)]
        parts = [(file, offset, Span(buffer.ptr + at, n, "cuda:0")) for offset, at, n in where]  # type: ignore[arg-type]
        done = gpunvme.read_many(parts)
        for offset, at, n in where:
            assert buffer.peek(at, n) == data[offset : offset + n]
    assert done.direct_bytes == 15 * block
    assert machine.launches == [("extents", 14 * block), ("gather", 2 * block), ("cut", block)]


def test_blocks_are_written_from_the_gpu(machine: Machine) -> None:
    with nvme.open(f"soft:ram?size={SIZE}&queues=8", queues=2) as controller:
        space = controller.namespace()
        data = contents(8192, 3)
        with gpunvme.open(space, "r+", path="gpu-nvme") as file, machine.cuda.alloc(8192) as buffer:
            buffer.poke(data)
            done = file.write_from(Span(buffer.ptr, 8192, "cuda:0"), 1024, fsync=True)  # type: ignore[arg-type]
            with pytest.raises(gpunvme.SpanError, match="whole blocks"):
                file.write_from(Span(buffer.ptr, 100, "cuda:0"), 0)  # type: ignore[arg-type]
        assert (done.path, done.direct_bytes) == ("gpu-nvme", 8192)
        assert space.read(0, 20).numpy().tobytes() == bytes(1024) + data + bytes(1024)


def test_nothing_is_launched_before_the_callers_work_has_ended(machine: Machine, namespace: Any) -> None:
    space, data = namespace
    with gpunvme.open(space, path="gpu-nvme") as file, machine.cuda.alloc(4096) as buffer:
        machine.held = True
        transfer = file.read_into(Span(buffer.ptr, 4096, "cuda:0"), wait=False)  # type: ignore[arg-type]
        with pytest.raises(gpunvme.DeadlineExceeded):
            transfer.wait(0.05)
        assert not machine.launches
        machine.held = False
        transfer.wait(10)
        assert buffer.peek() == data[:4096]
        machine.held = True
        transfer = file.read_into(Span(buffer.ptr, 4096, "cuda:0"), wait=False)  # type: ignore[arg-type]
        transfer.cancel()
        with pytest.raises(gpunvme.Cancelled):
            transfer.wait(10)
        machine.held = False


def test_deadlines_and_cancelling_end_kernels_that_do_not(machine: Machine, namespace: Any) -> None:
    space, _ = namespace
    with gpunvme.open(space, path="gpu-nvme") as file, machine.cuda.alloc(4096) as buffer:
        span = Span(buffer.ptr, 4096, "cuda:0")  # type: ignore[arg-type]
        machine.hung = True
        with pytest.raises(gpunvme.DeadlineExceeded):
            file.read_into(span, timeout=0.1)
        machine.hung = True
        transfer = file.read_into(span, wait=False)
        transfer.cancel()
        with pytest.raises(gpunvme.Cancelled):
            transfer.wait(10)
        assert machine.in_flight == 0


def test_failed_commands_are_all_named_and_the_next_transfer_works(machine: Machine, namespace: Any) -> None:
    space, data = namespace
    block = space.block_size
    with gpunvme.open(space, path="gpu-nvme") as file:
        machine.bad = {3, 9}
        with pytest.raises(gpunvme.CommandError, match="2 commands failed") as caught:
            file.gather(np.arange(12) * block, block, device="cuda:0")
        assert {each.lba for each in caught.value.failures} == {3, 9}
        machine.bad = {2}
        with pytest.raises(gpunvme.CommandError, match="LBA 2 "):
            file.read(2 * block + 1, 5, "cuda:0")
        machine.bad = set()
        assert file.read(1, 5, "cuda:0").numpy().tobytes() == data[1:6]


def test_queues_are_made_once_and_closed_with_the_last_file(machine: Machine, namespace: Any) -> None:
    space, _ = namespace
    first, second = gpunvme.open(space, path="gpu-nvme"), gpunvme.open(space, path="gpu-nvme")
    assert not machine.made
    for file in (first, second, first):
        file.read(0, 4096, "cuda:0")
    assert len(machine.made) == 1
    first.close()
    assert not machine.closed
    second.close()
    assert machine.closed == ["queues", "lane", "lane"], "kernels end before their memory goes"
    with gpunvme.open(space, path="gpu-nvme") as third:
        third.read(0, 4096, "cuda:0")
    assert len(machine.made) == 2


def test_a_files_own_controller_is_closed_after_its_queues(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    close = nvme.Controller.close
    monkeypatch.setattr(nvme.Controller, "close", lambda self: (machine.closed.append("controller"), close(self))[1])
    with gpunvme.open("nvme+soft:ram?size=1MiB&queues=8", path="gpu-nvme") as file:
        assert file.read(0, 4096, "cuda:0").numpy().tobytes() == bytes(4096)
    assert machine.closed == ["queues", "lane", "lane", "controller"]


def test_auto_takes_them_where_they_were_seen_to_be_faster(
    machine: Machine, namespace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, _ = namespace
    monkeypatch.setattr("gpunvme.paths.nvme._TELLING_SECONDS", 0)
    monkeypatch.setattr("gpunvme.gpu.range_movement._TELLING_SECONDS", 0)
    with gpunvme.open(space) as file:
        assert file.explain("cuda:0").chosen == "nvme"
        file.read(0, 8192, "cuda:0")
        assert not machine.made, "'auto' makes no queues"
    with gpunvme.open(space, path="gpu-nvme") as forced:
        forced.read(0, 8192, "cuda:0")
        kept = keeping.look(space, gpunvme.Device.parse("cuda:0"))
        assert kept is not None
        assert kept.speed(gather=False)
        assert kept.speed(gather=True) is None
        for speed, path in ((1e15, "gpu-nvme"), (1.0, "nvme")):
            kept.note_speed(speed, gather=False)
            with gpunvme.open(space) as file:
                assert file.explain("cuda:0").chosen == path
                buffer = file.read(0, 8192, "cuda:0")
                assert buffer.nbytes == 8192
                assert file.last_transfer is not None
                assert file.last_transfer.path == path
                file.gather([0], 512, device="cuda:0")
                assert file.last_transfer.path == "nvme", "gathers have a speed of their own"


def test_reasons_why_not(machine: Machine, namespace: Any) -> None:
    space, _ = namespace

    def reason(device: str = "cuda:0") -> str:
        with gpunvme.open(space) as file:
            (verdict,) = (each for each in file.explain(device) if each.path == "gpu-nvme")
            assert not verdict.usable
            return verdict.reason

    def forced(device: str = "cuda:0") -> str:
        refused = pytest.raises(gpunvme.PathError, match="path 'gpu-nvme' cannot carry this: ")
        with refused as caught, gpunvme.open(space, path="gpu-nvme") as file:
            file.read(0, 512, device)
        return str(caught.value)

    assert "memory of their GPU only" in reason("cpu")
    assert "memory of their GPU only" in forced("cpu")
    machine.why = "gpunvme was built without nvcc"
    assert "without nvcc" in reason()
    assert "without nvcc" in forced()
    machine.why = ""
    taken = space.controller.take_queue_ids(100)
    try:
        assert "no I/O queue of soft:ram" in reason()
        assert "queues=2 now" in forced()
    finally:
        space.controller.give_queue_ids(taken)
    machine.refused = 1
    assert "a test's refusal" in forced()
    machine.refused = 0
    assert "there is no cuda:9" in reason("cuda:9")
