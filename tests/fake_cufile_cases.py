"""What holds of the ``cufile/…`` paths, on the libcufile and the libcuda for tests, under the real bindings.

test_cufile.py runs it in its own process. The fake moves real bytes between real files and device memory that the host
cannot touch; a read through a stale registration goes nowhere, as DMA into freed memory would.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import files
import gpunvme
from fake_cufile import COMPAT, NVIDIA_FS
from files import MIB
from gpunvme.cufile import buffers as registered
from gpunvme.cufile import library

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fake_cuda import FakeCuda, FakeDeviceBuffer
    from fake_cufile import FakeCufile

pytest_plugins = ["fake_cufile_fixtures"]

SIZE = 9 * MIB + 1234
GUARD = 0xA5
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def file(fakes: object, place: Path, data: bytes) -> Iterator[gpunvme.File]:
    with gpunvme.open(place, path=COMPAT) as opened:
        yield opened


def guarded(cuda: FakeCuda, nbytes: int, device: int = 0) -> FakeDeviceBuffer:
    buffer = cuda.alloc(nbytes + 128, device)
    buffer.poke(bytes([GUARD]) * (nbytes + 128))
    return buffer


def part(buffer: FakeDeviceBuffer, nbytes: int) -> gpunvme.Span:
    return gpunvme.Span(buffer.ptr + 64, nbytes, f"cuda:{buffer.device}", owner=buffer)


def found(buffer: FakeDeviceBuffer, nbytes: int) -> bytes:
    everything = buffer.peek()
    assert everything[:64] == everything[64 + nbytes :] == bytes([GUARD]) * 64
    return everything[64 : 64 + nbytes]


# --- bytes

ranges = st.tuples(
    st.integers(0, SIZE) | st.sampled_from([0, 1, 4096, 4 * MIB, SIZE]),
    st.integers(0, SIZE) | st.sampled_from([0, 1, 512, 4095, 4096, 4097, 65536, MIB, SIZE]),
).map(lambda pair: (pair[0], min(pair[1], SIZE - pair[0])))


@relaxed
@given(span=ranges, device=st.sampled_from([0, 1]), wait=st.booleans(), short=st.sampled_from([0, 0, 5000, 300_000]))
def test_reading(
    cuda: FakeCuda,
    cufile: FakeCufile,
    data: bytes,
    way: str,
    file_of_way: gpunvme.File,
    span: tuple[int, int],
    device: int,
    wait: bool,
    short: int,
) -> None:
    """Every range, by threads and in stream order, whatever alignment, and when cuFile gives less than was asked."""
    offset, nbytes = span
    cufile.set(short=short)
    with guarded(cuda, nbytes, device) as buffer:
        transfer = file_of_way.read_into(part(buffer, nbytes), offset, wait=wait).wait(30)
        assert found(buffer, nbytes) == data[offset : offset + nbytes]
    assert transfer.path == way or not nbytes
    assert transfer.nbytes == nbytes == transfer.direct_bytes + transfer.buffered_bytes
    if nbytes:
        assert "as cuFile counted" in transfer.reason
        assert ("by threads" if wait or way == COMPAT else "in stream order (cuFile") in transfer.reason
        assert "cuFile 1.16" in transfer.reason
    if way == COMPAT:
        assert transfer.bounced_bytes == nbytes
        if nbytes and not wait:
            assert "not in stream order (only compatibility mode is possible" in transfer.reason


@relaxed
@given(
    nbytes=st.sampled_from([1, 100, 4096, 5000, 70_000]),
    count=st.integers(0, 400),
    seed=st.integers(0, 100),
    at_once=st.sampled_from([1, 7, 1000]),
)
def test_gathering(
    cuda: FakeCuda,
    cufile: FakeCufile,
    data: bytes,
    way: str,
    file_of_way: gpunvme.File,
    nbytes: int,
    count: int,
    seed: int,
    at_once: int,
) -> None:
    """In batches, whose answers come in any portions; a short answer is carried to its end."""
    cufile.set(batch_at_once=at_once, short=3000 if seed % 3 == 0 else 0)
    offsets = np.random.default_rng(seed).integers(0, SIZE - nbytes, count)
    expected = b"".join(data[offset : offset + nbytes] for offset in offsets)
    with guarded(cuda, len(expected)) as buffer:
        file_of_way.gather(offsets, nbytes, out=part(buffer, len(expected)))
        assert found(buffer, len(expected)) == expected
    assert file_of_way.last_transfer is not None
    if count:
        said = "not in batches (only compatibility mode" if way == COMPAT else "in batches (cuFile"
        assert said in file_of_way.last_transfer.reason
        assert file_of_way.last_transfer.path == way


@relaxed
@given(
    offset=st.integers(0, 2 * MIB) | st.sampled_from([0, 4096, MIB]),
    nbytes=st.integers(8192, 3 * MIB) | st.sampled_from([8192, MIB]),
    wait=st.booleans(),
    short=st.sampled_from([0, 0, 50_000]),
)
def test_writing(
    cuda: FakeCuda,
    cufile: FakeCufile,
    way: str,
    tmp_path_factory: pytest.TempPathFactory,
    offset: int,
    nbytes: int,
    wait: bool,
    short: int,
) -> None:
    """What is around it stays, the file is as long as it must be, and cuFile writes nothing but whole blocks."""
    place = tmp_path_factory.getbasetemp() / "written"
    old, new = files.make(place, MIB), files.contents(nbytes, seed=2)
    cufile.set(short=short)
    unaligned = cufile.count("unaligned_io")
    with gpunvme.open(place, "r+", path=way) as opened, cuda.alloc(nbytes) as buffer:
        buffer.poke(new)
        transfer = opened.write_from(buffer, offset, wait=wait).wait(30)
        assert transfer.path == way
    expected = bytearray(old)
    expected.extend(bytes(max(0, offset + nbytes - len(old))))
    expected[offset : offset + nbytes] = new
    assert place.read_bytes() == expected
    if offset % 4096 or nbytes % 4096:
        assert "of head and tail by host" in transfer.reason
    if not short:
        assert cufile.count("unaligned_io") == unaligned


def test_a_write_without_a_whole_block(cuda: FakeCuda, tmp_path: Path) -> None:
    """cuFile would write the neighbours, too: an error that says so, and nothing written."""
    old = files.make(tmp_path / "file", 10_000)
    opened = gpunvme.open(tmp_path / "file", "r+", path=COMPAT)
    with opened, cuda.alloc(100) as buffer, pytest.raises(gpunvme.PathError, match="no whole block of 4096 bytes"):
        opened.write_from(buffer, 5000)
    assert (tmp_path / "file").read_bytes() == old


def test_many_files(cuda: FakeCuda, tmp_path: Path) -> None:
    contents = [files.make(tmp_path / str(i), 100_000 + i, seed=i) for i in range(5)]
    opened = [gpunvme.open(tmp_path / str(i), path=COMPAT) for i in range(5)]
    buffers_ = [cuda.alloc(len(content)) for content in contents]
    transfer = gpunvme.read_many(zip(opened, [0] * 5, buffers_, strict=True))
    assert [buffer.peek() for buffer in buffers_] == contents
    assert transfer.path == COMPAT
    for each in opened:
        each.close()


@pytest.mark.parametrize("wait", [True, False])
def test_a_read_waits_for_what_its_stream_has_to_do(
    cuda: FakeCuda, data: bytes, file_of_way: gpunvme.File, wait: bool
) -> None:
    stream = cuda.create_stream()
    with cuda.alloc(2 * MIB) as buffer, cuda.alloc(2 * MIB) as copy:
        buffer.poke(b"o" * 2 * MIB)
        buffer.copy_to(copy, stream=stream, delay_us=20_000)
        buffer.fill(7, stream=stream, delay_us=20_000)
        file_of_way.read_into(buffer, 5, stream=stream, wait=wait).wait(30)
        assert buffer.peek() == data[5 : 5 + 2 * MIB]
        assert copy.peek() == b"o" * 2 * MIB
    cuda.destroy_stream(stream)


def test_a_gather_waits_for_what_its_stream_has_to_do(cuda: FakeCuda, data: bytes, file_of_way: gpunvme.File) -> None:
    stream = cuda.create_stream()
    with cuda.alloc(200 * 4096) as buffer:
        buffer.fill(7, stream=stream, delay_us=50_000)
        file_of_way.gather(range(0, 200 * 4096, 4096), 4096, out=buffer, stream=stream)
        assert buffer.peek() == data[: 200 * 4096]
    cuda.destroy_stream(stream)


def test_nothing_is_asked_of_cufile_before_its_time(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, file: gpunvme.File
) -> None:
    stream = cuda.create_stream()
    with cuda.alloc(MIB) as buffer:
        file.read_into(buffer)  # the driver is open
        reads = cufile.calls("Read")
        with cuda.gate(stream=stream) as gate:
            thread = threading.Thread(target=lambda: file.read_into(buffer, 1, stream=stream))
            thread.start()
            time.sleep(0.1)
            assert cufile.calls("Read") == reads
            gate.set()
            thread.join(30)
        assert buffer.peek() == data[1 : 1 + MIB]
    cuda.destroy_stream(stream)


def test_transfers_behind_blocked_streams_keep_nobody_waiting(
    cuda: FakeCuda, data: bytes, file_of_way: gpunvme.File
) -> None:
    """However many transfers wait for a stream that waits for another transfer, that one goes on."""
    stream = cuda.create_stream()
    blocked = [cuda.alloc(MIB) for _ in range(40)]
    with cuda.gate(stream=stream) as gate, cuda.alloc(MIB) as free:
        jobs = [file_of_way.read_into(each, stream=stream, wait=False) for each in blocked]
        file_of_way.read_into(free, 3).wait(30)
        assert not any(job.done for job in jobs)
        gate.set()
        for job in jobs:
            job.wait(30)
    assert all(each.peek() == data[:MIB] for each in blocked)
    cuda.destroy_stream(stream)


# --- errors


@pytest.mark.parametrize("code", [-5008, -5, -1, -5011, -5099])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("wait", [True, False])
def test_negative_codes_are_no_byte_counts(
    cuda: FakeCuda, cufile: FakeCufile, direct_file: gpunvme.File, place: Path, code: int, k: int, wait: bool
) -> None:
    cufile.fail("Read" if wait else "ReadAsync", code, k)
    with cuda.alloc(4 * MIB) as buffer:
        with pytest.raises(gpunvme.Error) as caught:
            direct_file.read_into(buffer, wait=wait).wait(30)
        if code in (-5, -1):
            if not (code == -1 and not wait):  # in a stream's order there is no errno with it
                assert isinstance(caught.value, gpunvme.FileError)
                assert caught.value.errno == 5
                assert caught.value.filename == str(place)
        elif code == -5011:
            assert isinstance(caught.value, gpunvme.CudaError)
        else:
            assert isinstance(caught.value, gpunvme.CufileError)
            assert caught.value.code == -code
            assert str(place) in str(caught.value)
        # And the next one is as if nothing had been.
        assert direct_file.read_into(buffer, wait=wait).wait(30).path == NVIDIA_FS


@pytest.mark.parametrize("code", [0, -5008, -1])
def test_bindings_that_return_no_count(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, file: gpunvme.File, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As those of 13.0 do: a read that gave less, or an error code, would pass for a whole one."""
    library.bindings()
    monkeypatch.setattr(sys.modules["cuda.bindings"], "__version__", "13.0.3")
    monkeypatch.setattr(library.bindings(), "read", lambda *_: None)
    library._counting.cache_clear()
    try:
        cufile.set(short=5000)
        with cuda.alloc(MIB) as buffer:
            if code:
                cufile.fail("Read", code, 2)
                with pytest.raises(gpunvme.CufileError if code == -5008 else gpunvme.FileError) as caught:
                    file.read_into(buffer)
                assert getattr(caught.value, "errno", 5) == 5
            else:
                file.read_into(buffer, 3)
                assert buffer.peek() == data[3 : 3 + MIB]
    finally:
        library._counting.cache_clear()


def test_more_than_was_asked_for(cuda: FakeCuda, cufile: FakeCufile, file: gpunvme.File) -> None:
    cufile.set(too_much=10)
    with cuda.alloc(MIB) as buffer, pytest.raises(gpunvme.CufileError, match="says that it moved"):
        file.read_into(buffer)


@pytest.mark.parametrize("wait", [True, False])
def test_a_file_that_ends_early(cuda: FakeCuda, cufile: FakeCufile, tmp_path: Path, way: str, wait: bool) -> None:
    files.make(tmp_path / "file", 3 * MIB)
    stream = cuda.create_stream()
    failures = []
    with gpunvme.open(tmp_path / "file", path=way) as opened, cuda.alloc(3 * MIB) as buffer:

        def run() -> None:
            try:
                opened.read_into(buffer, stream=stream, wait=wait).wait(30)
            except gpunvme.Error as error:
                failures.append(error)

        begun = cuda.calls("cuEventRecord")
        with cuda.gate(stream=stream) as gate:
            thread = threading.Thread(target=run)
            thread.start()
            files.wait_until(lambda: cuda.calls("cuEventRecord") > begun)  # the range was found to be in the file
            os.truncate(tmp_path / "file", MIB)
            gate.set()
            thread.join(30)
    assert [type(failure) for failure in failures] == [gpunvme.TruncatedError]
    cuda.destroy_stream(stream)


@pytest.mark.parametrize("code", [-5012, -5])
def test_a_failing_entry_of_a_batch(cuda: FakeCuda, cufile: FakeCufile, direct_file: gpunvme.File, code: int) -> None:
    """Its count is unsigned in the bindings; it is an error all the same, and no other entry is lost sight of."""
    cufile.fail("entry", code, 150)
    kind = gpunvme.CufileError if code == -5012 else gpunvme.FileError
    with cuda.alloc(300 * 4096) as buffer, pytest.raises(kind, match="batch request"):
        direct_file.gather(range(0, 300 * 4096, 4096), 4096, out=buffer)


@pytest.mark.parametrize("call", ["BatchIOSetUp", "BatchIOSubmit"])
def test_batches_refused(cuda: FakeCuda, cufile: FakeCufile, data: bytes, direct_file: gpunvme.File, call: str) -> None:
    """Then the same bytes come one request after the other, and the report says why."""
    cufile.fail(call, 5049)
    with cuda.alloc(100 * 5000) as buffer:
        direct_file.gather(range(0, 500_000, 5000), 5000, out=buffer)
        assert buffer.peek() == data[:500_000]
    assert direct_file.last_transfer is not None
    assert "not in batches" in direct_file.last_transfer.reason
    assert "5049" in direct_file.last_transfer.reason


@pytest.mark.parametrize(("call", "k"), [("StreamRegister", 1), *(("submit ReadAsync", k) for k in range(1, 6))])
def test_stream_order_refused(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, direct_file: gpunvme.File, call: str, k: int
) -> None:
    cufile.fail(call, 5038, k)
    with cuda.alloc(8 * MIB) as buffer:
        transfer = direct_file.read_into(buffer, 7, wait=False).wait(30)
        assert buffer.peek() == data[7 : 7 + 8 * MIB]
    if k == 1:
        assert "not in stream order" in transfer.reason


def test_a_batch_that_hangs(cuda: FakeCuda, cufile: FakeCufile, direct_file: gpunvme.File) -> None:
    """Its memory stays reserved until cuFile has answered for every entry; then the deadline is what is told."""
    cufile.set(batch_hang=1)
    with cuda.alloc(100 * 4096) as buffer, pytest.raises(gpunvme.DeadlineExceeded):
        direct_file.gather(range(0, 100 * 4096, 4096), 4096, out=buffer, timeout=0.2)
    assert cufile.calls("BatchIOCancel") == 1


def test_cancelling(cuda: FakeCuda, cufile: FakeCufile, direct_file: gpunvme.File) -> None:
    cufile.set(delay_us=200_000)
    with cuda.alloc(9 * MIB) as buffer:
        job = direct_file.read_into(buffer, wait=False)
        files.wait_until(lambda: cufile.calls("ReadAsync") > 0)
        job.cancel()
        with pytest.raises(gpunvme.Cancelled):
            job.wait(30)
        assert job.done
        before = buffer.peek()
        cufile.set(delay_us=0)
        assert buffer.peek() == before  # nothing comes any more


def test_a_deadline(cuda: FakeCuda, cufile: FakeCufile, file: gpunvme.File) -> None:
    cufile.set(delay_us=100_000)
    with cuda.alloc(9 * MIB) as buffer, pytest.raises(gpunvme.DeadlineExceeded):
        file.read_into(buffer, timeout=0.05)


def test_a_file_that_cufile_does_not_take(cuda: FakeCuda, cufile: FakeCufile, tmp_path: Path) -> None:
    files.make(tmp_path / "file", MIB)
    with gpunvme.open(tmp_path / "file", path=COMPAT) as opened, cuda.alloc(MIB) as buffer:
        cufile.fail("HandleRegister", 5008)
        with pytest.raises(gpunvme.PathError, match=r"cuFile does not take .*5008"):
            opened.read_into(buffer)


def test_two_gpus_make_room_for_each_other(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, file: gpunvme.File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registrations are few: one GPU's memory is let go in its own context when another's takes its place."""
    monkeypatch.setattr(registered, "MOST_REGISTERED", 2)
    memory = [cuda.alloc(MIB, device) for device in (0, 1, 0, 1, 1, 0)]
    for _ in range(2):
        for buffer in memory:
            for _ in range(3):  # registered from the second time on
                file.read_into(buffer, 7)
                assert buffer.peek() == data[7 : 7 + MIB]
            assert cufile.count("live_buffers") == len(registered.REGISTRATIONS) <= 2
    assert cufile.count("registered_io") > 0


def test_nothing_is_left_behind(cuda: FakeCuda, cufile: FakeCufile, direct_file: gpunvme.File) -> None:
    """Streams and events, by transfers that end well and by those that do not."""
    live = []
    with cuda.alloc(4 * MIB) as buffer:
        for _ in range(4):
            direct_file.read_into(buffer, 1)
            direct_file.read_into(buffer, 1, wait=False).wait(30)
            direct_file.gather([0, 5], 4096, out=buffer)
            for function in ("ReadAsync", "submit ReadAsync", "StreamRegister"):
                cufile.fail(function, -5008 if function == "ReadAsync" else 5008)
                try:
                    direct_file.read_into(buffer, wait=False).wait(30)
                except gpunvme.CufileError:
                    pass
            job = direct_file.read_into(buffer, wait=False)
            job.cancel()
            with pytest.raises(gpunvme.Cancelled):
                job.wait(30)
            live.append(cuda.counters().live())
    assert live[1] == live[2] == live[3]  # the first turn may have brought up what stays
