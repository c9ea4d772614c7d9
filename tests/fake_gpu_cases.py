"""What holds between files and GPU memory, on the libcuda for tests. test_file_gpu.py runs it in its own process.

The fake's device memory cannot be touched by the host, its streams run when they are ready, and it aborts where memory
is freed under a copy: what is right here is right for reasons that hold on a GPU.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fake_cuda
import files
import gpunvme
from files import HEATS, MIB
from gpunvme.memory import span_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fake_cuda import FakeCuda, FakeDeviceBuffer

SIZE = 20 * MIB + 1234
GUARD = 0xA5


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    cuda = fake_cuda.use()
    yield cuda
    gc.collect()
    cuda.reset()


@pytest.fixture
def file(place: Path, data: bytes) -> Iterator[gpunvme.File]:
    with gpunvme.open(place) as opened:
        yield opened


def guarded(fake: FakeCuda, nbytes: int, device: int = 0) -> FakeDeviceBuffer:
    """Device memory of that size, with 64 bytes of room before and behind."""
    buffer = fake.alloc(nbytes + 128, device)
    buffer.poke(bytes([GUARD]) * (nbytes + 128))
    return buffer


def part(buffer: FakeDeviceBuffer, nbytes: int) -> gpunvme.Span:
    return gpunvme.Span(buffer.ptr + 64, nbytes, f"cuda:{buffer.device}", owner=buffer)


def found(buffer: FakeDeviceBuffer, nbytes: int) -> bytes:
    everything = buffer.peek()
    assert everything[:64] == everything[64 + nbytes :] == bytes([GUARD]) * 64
    return everything[64 : 64 + nbytes]


def mend(fake: FakeCuda) -> None:
    """The GPU is as good as new; buffers stay."""
    fake.control("fake_cuda_reset")


ranges = st.tuples(
    st.integers(0, SIZE) | st.sampled_from([0, 4096, 4 * MIB, SIZE]),
    st.integers(0, SIZE) | st.sampled_from([0, 1, 512, 65536, 65537, MIB, 4 * MIB, 8 * MIB, SIZE]),
).map(lambda pair: (pair[0], min(pair[1], SIZE - pair[0])))
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@relaxed
@given(span=ranges, heat=st.sampled_from(HEATS), device=st.sampled_from([0, 1]), wait=st.booleans())
def test_reading(
    fake: FakeCuda,
    place: Path,
    data: bytes,
    file: gpunvme.File,
    span: tuple[int, int],
    heat: str,
    device: int,
    wait: bool,
) -> None:
    offset, nbytes = span
    files.heat(place, heat)
    fake.set_copy_time(jitter_us=200, seed=nbytes)
    with guarded(fake, nbytes, device) as buffer:
        transfer = file.read_into(part(buffer, nbytes), offset, wait=wait).wait()
        assert found(buffer, nbytes) == data[offset : offset + nbytes]
    assert transfer.nbytes == nbytes == transfer.direct_bytes + transfer.cached_bytes + transfer.buffered_bytes
    assert transfer.bounced_bytes == nbytes
    if heat == "hot":
        assert transfer.cached_bytes == nbytes
    if heat == "cold":
        assert transfer.cached_bytes == 0
    if nbytes > MIB:
        assert "through page-locked memory" in transfer.reason


@relaxed
@given(
    nbytes=st.sampled_from([1, 8, 100, 4096, 5000, 600_000]),
    count=st.integers(0, 3000),
    seed=st.integers(0, 100),
    heat=st.sampled_from(HEATS),
    device=st.sampled_from([0, 1]),
)
def test_gathering(
    fake: FakeCuda, place: Path, data: bytes, nbytes: int, count: int, seed: int, heat: str, device: int
) -> None:
    files.heat(place, heat)
    count = min(count, 8 * MIB // nbytes)
    offsets = np.random.default_rng(seed).integers(0, SIZE - nbytes, count)
    expected = b"".join(data[offset : offset + nbytes] for offset in offsets)
    with gpunvme.open(place) as file, guarded(fake, len(expected), device) as buffer:
        file.gather(offsets, nbytes, out=part(buffer, len(expected)))
        assert found(buffer, len(expected)) == expected


@relaxed
@given(seed=st.integers(0, 1000), heat=st.sampled_from(HEATS), count=st.integers(1, 40))
def test_reading_many(
    fake: FakeCuda, place: Path, data: bytes, file: gpunvme.File, seed: int, heat: str, count: int
) -> None:
    files.heat(place, heat)
    rng = np.random.default_rng(seed)
    offsets = sorted(int(offset) for offset in rng.integers(0, SIZE, count))
    sizes = [min(int(rng.integers(0, 3 * MIB)), SIZE - offset) for offset in offsets]
    buffers: list[FakeDeviceBuffer] = []

    def parts() -> Iterator[tuple[gpunvme.File, int, Any]]:
        for offset, nbytes in zip(offsets, sizes, strict=True):
            buffers.append(guarded(fake, nbytes))
            yield file, offset, part(buffers[-1], nbytes)

    assert gpunvme.read_many(parts()).nbytes == sum(sizes)
    for offset, nbytes, buffer in zip(offsets, sizes, buffers, strict=True):
        assert found(buffer, nbytes) == data[offset : offset + nbytes]
        buffer.free()


@relaxed
@given(
    offset=st.integers(0, 3 * MIB) | st.sampled_from([0, 4096, MIB]),
    nbytes=st.integers(0, 9 * MIB) | st.sampled_from([0, 1, 4096, MIB, 8 * MIB]),
    device=st.sampled_from([0, 1]),
)
def test_writing(
    fake: FakeCuda, tmp_path_factory: pytest.TempPathFactory, offset: int, nbytes: int, device: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "from-gpu"
    old, new = files.make(path, MIB), files.contents(nbytes, seed=2)
    fake.set_copy_time(jitter_us=200, seed=nbytes)
    with gpunvme.open(path, "r+") as file, fake.alloc(nbytes + 1, device) as buffer:
        buffer.poke(new)
        transfer = file.write_from(buffer, offset, nbytes)
    expected = bytearray(old)
    if nbytes:
        expected.extend(bytes(max(0, offset + nbytes - len(old))))
        expected[offset : offset + nbytes] = new
    assert path.read_bytes() == expected
    assert transfer.bounced_bytes == nbytes


def test_an_atomic_write(fake: FakeCuda, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    data = files.contents(3 * MIB + 5)
    with gpunvme.open(tmp_path / "file", "r+") as file, fake.alloc(len(data)) as buffer:
        buffer.poke(data)
        file.write_from(buffer, atomic=True)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("nbytes", [100, 65536, 6 * MIB])
@pytest.mark.parametrize("heat", ["hot", "cold"])
@pytest.mark.parametrize("wait", [True, False])
def test_a_read_waits_for_what_its_stream_has_to_do(
    fake: FakeCuda, place: Path, data: bytes, file: gpunvme.File, nbytes: int, heat: str, wait: bool
) -> None:
    """A kernel that still writes the destination, or another that still reads it, comes first."""
    files.heat(place, heat)
    stream = fake.create_stream()
    with fake.alloc(nbytes) as buffer, fake.alloc(nbytes) as copy:
        buffer.poke(b"o" * nbytes)
        buffer.copy_to(copy, stream=stream, delay_us=20_000)
        buffer.fill(7, stream=stream, delay_us=20_000)
        file.read_into(buffer, 5, stream=stream, wait=wait).wait()
        assert buffer.peek() == data[5 : 5 + nbytes]
        assert copy.peek() == b"o" * nbytes
        # And it is there for every stream.
        other = fake.create_stream()
        buffer.copy_to(copy, stream=other)
        fake.synchronize(other)
        assert copy.peek() == data[5 : 5 + nbytes]
        fake.destroy_stream(other)
    fake.destroy_stream(stream)


@pytest.mark.parametrize("nbytes", [100, 6 * MIB])
def test_a_write_waits_for_what_its_stream_has_to_do(fake: FakeCuda, tmp_path: Path, nbytes: int) -> None:
    stream = fake.create_stream()
    with fake.alloc(nbytes) as buffer, gpunvme.open(tmp_path / "file", "w") as file:
        buffer.poke(b"o" * nbytes)
        buffer.fill(7, stream=stream, delay_us=30_000)
        file.write_from(buffer, stream=stream)
        assert (tmp_path / "file").read_bytes() == bytes([7]) * nbytes
    fake.destroy_stream(stream)


def test_gathers_and_many_parts_wait_for_it_too(fake: FakeCuda, data: bytes, file: gpunvme.File) -> None:
    stream = fake.create_stream()
    with fake.alloc(200) as buffer:
        buffer.fill(7, stream=stream, delay_us=30_000)
        file.gather([5, 1000], 100, out=buffer, stream=stream)
        assert buffer.peek() == data[5:105] + data[1000:1100]
        buffer.fill(7, stream=stream, delay_us=30_000)
        gpunvme.read_many([(file, 3, buffer)], stream=stream)
        assert buffer.peek() == data[3:203]
    fake.destroy_stream(stream)


def test_the_default_stream_where_no_framework_has_one(fake: FakeCuda, data: bytes, file: gpunvme.File) -> None:
    with fake.alloc(MIB) as buffer:
        buffer.fill(7, delay_us=30_000)
        file.read_into(buffer, 9)
        assert buffer.peek() == data[9 : 9 + MIB]


#: (what is said of 1000 bytes on GPU 1, error, message)
WRONG = {
    "another GPU": (lambda buffer: gpunvme.Span(buffer.ptr, 1000, "cuda:0"), "cuda:0, and is on cuda:1"),
    "no memory at all": (lambda buffer: gpunvme.Span(buffer.ptr + (1 << 40), 1000, "cuda:1"), "not GPU memory"),
    "past the end": (lambda buffer: gpunvme.Span(buffer.ptr + 1, 1000, "cuda:1"), "past the end of their allocation"),
    "host memory": (lambda buffer: gpunvme.Span(id(buffer), 1000, "cuda:1"), "not GPU memory"),
}


@pytest.mark.parametrize("what", WRONG)
def test_memory_that_is_not_what_is_said_of_it(
    fake: FakeCuda, tmp_path: Path, data: bytes, file: gpunvme.File, what: str
) -> None:
    """Checked with the driver: a copy to a wrong address breaks the GPU's context for the whole process."""
    make, message = WRONG[what]
    with fake.alloc(1000, 1) as buffer, gpunvme.open(tmp_path / "new", "w") as new:
        buffer.poke(bytes([GUARD]) * 1000)
        span = make(buffer)
        for use in (
            lambda: file.read_into(span),
            lambda: file.read_into(span, wait=False),
            lambda: file.gather([0, 500], 500, out=span),
            lambda: gpunvme.read_many([(file, 0, span)]),
            lambda: new.write_from(span),
        ):
            with pytest.raises(gpunvme.SpanError, match=message):
                use()
        assert buffer.peek() == bytes([GUARD]) * 1000
        assert new.size == 0


def test_arrays_with_gaps(fake: FakeCuda, file: gpunvme.File) -> None:
    class Strided:
        def __init__(self, buffer: FakeDeviceBuffer, shape: Any, strides: Any, read_only: bool = False) -> None:
            interface = {"shape": shape, "strides": strides, "typestr": "<f4", "version": 3}
            self.__cuda_array_interface__ = {**interface, "data": (buffer.ptr, read_only)}

    with fake.alloc(4096) as buffer:
        for shape, strides in (((4, 4), (4, 16)), ((8,), (8,)), ((4, 4), (32, 4)), ((3,), (0,))):
            with pytest.raises(gpunvme.SpanError, match="not contiguous"):
                file.read_into(Strided(buffer, shape, strides))
        with pytest.raises(gpunvme.SpanError, match="read-only"):
            file.read_into(Strided(buffer, (4,), None, read_only=True))
        assert file.read_into(Strided(buffer, (2, 3), (12, 4))).nbytes == 24
        assert file.read_into(Strided(buffer, (1, 3), (9999, 4))).nbytes == 12
        assert file.read_into(Strided(buffer, (0, 3), (1, 1))).nbytes == 0


def test_a_gpu_that_is_not_there(fake: FakeCuda, file: gpunvme.File) -> None:
    explanation = file.explain("cuda:7")
    assert explanation.chosen is None
    assert "there is no cuda:7: the driver sees 2" in explanation.verdicts[0].reason
    with pytest.raises(gpunvme.CudaError):
        gpunvme.Buffer.empty(10, "cuda:7")
    with pytest.raises(gpunvme.CudaError):
        file.read(0, 10, "cuda:7")
    assert file.explain("cuda:1").chosen == "host"


def test_devices_are_not_mixed(fake: FakeCuda, file: gpunvme.File) -> None:
    with fake.alloc(100, 0) as first, fake.alloc(100, 1) as second:
        for other in (second, bytearray(100)):
            with pytest.raises(gpunvme.SpanError, match="on one device"):
                gpunvme.read_many([(file, 0, first), (file, 0, other)])


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("heat", ["hot", "cold"])
def test_copies_that_fail_on_the_gpu(fake: FakeCuda, place: Path, file: gpunvme.File, k: int, heat: str) -> None:
    """They fail long after the call that started them; an error overlooked is a model of zeros."""
    files.heat(place, heat)
    with fake.alloc(SIZE) as buffer:
        fake.fail_copy(fake_cuda.LAUNCH_FAILED, k)
        with pytest.raises(gpunvme.CudaError, match="LAUNCH_FAILED"):
            file.read_into(buffer)
        mend(fake)
        file.read_into(buffer)  # the fake's GPU is whole again, and so is the engine


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync", "cuEventRecord", "cuStreamWaitEvent", "cuEventCreate"])
def test_calls_that_fail(fake: FakeCuda, data: bytes, file: gpunvme.File, function: str) -> None:
    with fake.alloc(SIZE) as buffer:
        fake.fail_call(function, fake_cuda.ILLEGAL_ADDRESS)
        with pytest.raises(gpunvme.CudaError, match=function):
            file.read_into(buffer)
        mend(fake)
        file.read_into(buffer)
        assert buffer.peek() == data


def test_writes_that_fail_on_the_gpu_leave_the_file_as_long_as_it_was(fake: FakeCuda, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with fake.alloc(9 * MIB) as buffer, gpunvme.open(path, "r+") as file:
        fake.fail_copy(fake_cuda.LAUNCH_FAILED, 3)
        with pytest.raises(gpunvme.CudaError, match="LAUNCH_FAILED"):
            file.write_from(buffer, 3)
        mend(fake)
        assert path.read_bytes() == b"old"
        fake.fail_copy(fake_cuda.LAUNCH_FAILED)
        with pytest.raises(gpunvme.CudaError, match="LAUNCH_FAILED"):
            file.write_from(buffer, atomic=True)
        mend(fake)
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


def test_no_memory_left_on_the_gpu(fake: FakeCuda) -> None:
    fake.set_memory_limit(MIB)
    with pytest.raises(gpunvme.CudaError, match=r"cannot allocate 10485760 bytes on cuda:0.*OUT_OF_MEMORY"):
        gpunvme.Buffer.empty(10 * MIB, "cuda:0")


def test_a_buffer_on_the_gpu(fake: FakeCuda, data: bytes, file: gpunvme.File) -> None:
    before = fake.counters().live_allocations
    buffer = file.read(100, MIB + 3, "cuda:1")
    assert (buffer.nbytes, buffer.shape, buffer.device) == (MIB + 3, (MIB + 3,), "cuda:1")
    assert buffer.numpy().tobytes() == data[100 : 100 + MIB + 3]
    assert not hasattr(buffer, "__array_interface__")
    assert buffer.__cuda_array_interface__["data"] == (buffer.ptr, False)
    assert buffer.__dlpack_device__() == (2, 1)
    gathered = file.gather([5, 50], 10, device="cuda:0")
    assert gathered.numpy().tobytes() == data[5:15] + data[50:60]
    assert fake.counters().live_allocations == before + 2
    del buffer, gathered
    gc.collect()
    assert fake.counters().live_allocations == before


def test_a_buffer_by_dlpack(fake: FakeCuda, data: bytes, file: gpunvme.File) -> None:
    """As a framework asks for it, and back: the same memory, writable, alive as long as the capsule."""

    class Exported:
        def __init__(self, buffer: gpunvme.Buffer) -> None:
            self._buffer = buffer

        def __dlpack__(self, **options: Any) -> Any:
            return self._buffer.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self._buffer.__dlpack_device__()

    before = fake.counters().live_allocations
    buffer = gpunvme.Buffer.empty(1000, "cuda:1")
    for options in ({}, {"stream": -1}, {"stream": 1, "max_version": (1, 0)}, {"dl_device": (2, 1), "copy": None}):
        assert "dltensor" in repr(buffer.__dlpack__(**options))
    for options in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError):
            buffer.__dlpack__(**options)
    span = span_of(Exported(buffer), writable=False)
    assert (span.ptr, span.nbytes, str(span.device)) == (buffer.ptr, 1000, "cuda:1")
    span = span_of(Exported(buffer), writable=True)
    del buffer
    gc.collect()
    file.read_into(span, 7)
    assert gpunvme.memory.Buffer(span, (1000,)).numpy().tobytes() == data[7:1007]
    del span
    gc.collect()
    assert fake.counters().live_allocations == before


def test_nothing_is_left_on_the_gpu(fake: FakeCuda, tmp_path: Path, file: gpunvme.File) -> None:
    with fake.alloc(SIZE) as buffer:
        file.read_into(buffer)  # streams, events and page-locked memory that the engine keeps
        before = fake.counters().live()
        for _ in range(20):
            file.read_into(buffer, wait=False).wait()
            file.gather([0, 50], 10, out=buffer)
            file.read_into(buffer, 0, 100)
        with pytest.raises(gpunvme.RangeError):
            file.read_into(buffer, 1)
        gc.collect()
        after = fake.counters().live()
        assert after["live_events"] <= before["live_events"] + 64  # kept for copies to come
        assert {**after, "live_events": 0} == {**before, "live_events": 0}


def test_memory_is_kept_until_the_gpu_is_done_with_it(fake: FakeCuda, data: bytes, file: gpunvme.File) -> None:
    """The fake aborts the process if memory is freed under a copy."""
    fake.hold()
    transfer = file.read_into(gpunvme.Buffer.empty(4 * MIB, "cuda:0"), wait=False)
    gc.collect()
    time.sleep(0.05)
    assert not transfer.done
    with pytest.raises(gpunvme.DeadlineExceeded, match="goes on"):
        transfer.wait(timeout=0.05)
    del transfer
    gc.collect()
    fake.release()
    fake.wait_idle()
    file.read_into(bytearray(MIB), wait=False).wait()
    gc.collect()


def test_cancelling_while_the_gpu_copies(fake: FakeCuda, file: gpunvme.File) -> None:
    with fake.alloc(SIZE) as buffer:
        fake.hold()
        transfer = file.read_into(buffer, wait=False)
        files.wait_until(lambda: fake.calls("cuMemcpyHtoDAsync") > 0)
        transfer.cancel()
        assert not transfer.done  # a copy is still to come
        fake.release()
        with pytest.raises(gpunvme.Cancelled):
            transfer.wait()
        assert fake.counters().pending_operations == 0


def test_a_gpu_that_does_not_answer(fake: FakeCuda, file: gpunvme.File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpunvme.transfer._GRACE", 0.05)
    with fake.alloc(SIZE) as buffer:
        fake.hold()
        with pytest.raises(gpunvme.DeadlineExceeded, match="stays reserved"):
            file.read_into(buffer, timeout=0.05)
        fake.release()
        fake.wait_idle()
        file.read_into(buffer)


def test_ctrl_c_while_the_gpu_copies(fake: FakeCuda, file: gpunvme.File) -> None:
    with fake.alloc(SIZE) as buffer:
        fake.hold()

        def interrupt() -> None:
            files.wait_until(lambda: fake.calls("cuMemcpyHtoDAsync") > 0)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            fake.release()

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            file.read_into(buffer)
        thread.join()
        assert fake.counters().pending_operations == 0  # `buffer` may be freed


def test_forked_children_are_refused_clearly(fake: FakeCuda, data: bytes, file: gpunvme.File) -> None:
    with fake.alloc(1000) as buffer:
        file.read_into(buffer)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for use in (lambda: file.read(0, 10, "cuda:0"), lambda: gpunvme.Buffer.empty(10, "cuda:0")):
            try:
                use()
                said.append("read")
            except gpunvme.CudaError as error:
                said.append(str(error))
        said.append(str(file.explain("cuda:0")))
        if file.read(3, 200_000).numpy().tobytes() == data[3:200_003]:
            said.append("host memory is fine")
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    # Both refusals, and the lines of the paths that would ask CUDA: host, and p2pdma where the kernel has it.
    assert said.count("forked from one that used it") in {3, 4}
    assert said.endswith("host memory is fine")


PAGEABLE = """
import sys
import fake_cuda, files, gpunvme
fake = fake_cuda.use()
fake.set_page_lock_limit(0)
path = files.Path(sys.argv[1])
with gpunvme.open(path) as file, fake.alloc(file.size) as buffer:
    for heat in ("hot", "cold"):
        files.heat(path, heat)
        print(file.read_into(buffer).reason)
        assert buffer.peek() == path.read_bytes()
"""


def test_page_locking_refused(place: Path, data: bytes) -> None:
    """Slower by half, and nobody would know why."""
    for line in files.output(PAGEABLE, place).splitlines():
        assert line.endswith("through pageable memory, page-locking was refused"), line


ENDING = """
import sys
import fake_cuda, gpunvme
fake = fake_cuda.use()
fake.set_copy_time(delay_us=2000)
file = gpunvme.open(sys.argv[1])
buffer = gpunvme.Buffer.empty(file.size, "cuda:1")
transfer = file.read_into(buffer, wait=False)
"""


def test_the_interpreter_ends_while_the_gpu_copies(place: Path, data: bytes) -> None:
    for _ in range(3):
        files.output(ENDING, place)


def test_catalogs_from_and_to_the_gpu(fake: FakeCuda, tmp_path: Path) -> None:
    nbytes = 8 * MIB + 4000  # more than a piece, and no whole number of blocks
    stream = fake.create_stream()
    for target in (tmp_path / "catalog", "nvme+soft:ram?size=32MiB&lba=4096"):
        with gpunvme.Catalog.create(target) as catalog, guarded(fake, nbytes) as buffer:
            buffer.fill(7, stream=stream, delay_us=30_000)
            region = catalog.add(1, part(buffer, nbytes), record_size=4, stream=stream)
            buffer.poke(bytes([GUARD]) * buffer.nbytes)
            assert catalog.verify() == []
            assert catalog.read_kind(1).numpy().tobytes() == bytes([7]) * region.nbytes
            catalog.read_kind(1, out=part(buffer, nbytes))
            assert found(buffer, nbytes) == bytes([7]) * nbytes
            catalog.replace(1, np.arange(nbytes // 4, dtype=np.uint32))
            expected = np.arange(nbytes // 4, dtype=np.uint32).tobytes()
            assert catalog.read_kind(1, device="cuda:1").numpy().tobytes() == expected
            assert catalog.gather_kind(1, [9, 3], device="cuda:0").numpy().view(np.uint32).ravel().tolist() == [9, 3]
    fake.destroy_stream(stream)
