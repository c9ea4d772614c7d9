"""What the ``cufile/…`` paths register, what they say of themselves, and when they are chosen.

On the libcufile for tests; test_cufile.py runs it in its own process, as it does fake_cufile_cases.py.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from typing import TYPE_CHECKING

import pytest

import files
import gpunvme
from fake_cufile import COMPAT, NVIDIA_FS, P2PDMA, read
from files import MIB
from gpunvme.cufile import buffers, driver, facts
from gpunvme.paths import choose, measure, measured

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fake_cuda import FakeCuda
    from fake_cufile import FakeCufile

pytest_plugins = ["fake_cufile_fixtures"]

SIZE = 9 * MIB + 1234


@pytest.fixture
def file(fakes: object, place: Path, data: bytes) -> Iterator[gpunvme.File]:
    with gpunvme.open(place, path=COMPAT) as opened:
        yield opened


# --- what is registered


def test_memory_is_registered_when_it_is_used_again(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, file: gpunvme.File
) -> None:
    with cuda.alloc(MIB) as buffer:
        for use in range(4):
            file.read_into(buffer, use)
            assert buffer.peek() == data[use : use + MIB]
            assert cufile.calls("BufRegister") == (use > 0)
        assert cufile.count("registered_io") >= 3
    assert cufile.calls("HandleRegister") <= 1  # the same goes for the file


def test_memory_that_was_freed_and_allocated_again_at_the_same_address(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, file: gpunvme.File
) -> None:
    """The old registration leads to pages that are not this memory's any more: the bytes would never arrive."""
    with cuda.alloc(2 * MIB) as buffer:
        for _ in range(3):
            file.read_into(buffer)
        buffer.reallocate()
        buffer.poke(bytes(2 * MIB))
        file.read_into(buffer, 1)
        assert buffer.peek() == data[1 : 1 + 2 * MIB]
        # And where only a part of it is used, at another address than the one that is registered.
        file.read_into(buffer, 1)
        buffer.reallocate()
        file.read_into(gpunvme.Span(buffer.ptr + MIB, MIB, "cuda:0", owner=buffer), 2)
        assert buffer.peek(MIB) == data[2 : 2 + MIB]
    assert cufile.count("stale_io") == 0
    assert cufile.calls("BufDeregister") == 2


def test_a_longer_read_into_registered_memory(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, file: gpunvme.File
) -> None:
    with cuda.alloc(2 * MIB) as buffer:
        for nbytes in (MIB, MIB, MIB, 2 * MIB, 2 * MIB, 2 * MIB, MIB):
            file.read_into(buffer, 0, nbytes)
        assert buffer.peek() == data[: 2 * MIB]
        assert len(buffers.REGISTRATIONS) == 1


def test_parts_of_registered_memory_and_memory_around_it(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, file_of_way: gpunvme.File
) -> None:
    """A request is named by its registration's base, or by its own address: cuFile takes no other."""
    with cuda.alloc(6 * MIB) as buffer:

        def check(start: int, nbytes: int, offset: int, wait: bool = True) -> None:
            span = gpunvme.Span(buffer.ptr + start, nbytes, "cuda:0", owner=buffer)
            file_of_way.read_into(span, offset, wait=wait).wait(30)
            assert buffer.peek()[start : start + nbytes] == data[offset : offset + nbytes]

        for _ in range(3):
            check(2 * MIB, MIB, 1)
        registered = cufile.count("registered_io")
        for wait in (True, False):
            check(2 * MIB + 4096, 300_000, 4096, wait)  # within the registration
            file_of_way.gather([5, 9, 5000], 4096, out=gpunvme.Span(buffer.ptr + 2 * MIB + 77, 3 * 4096, "cuda:0"))
        assert cufile.count("registered_io") > registered
        assert cufile.calls("BufRegister") == 1
        for wait in (True, False, True):
            check(MIB, 5 * MIB, 3, wait)  # around it
        assert len(buffers.REGISTRATIONS) == 1


def test_a_longer_read_where_a_shorter_one_is_still_registered(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, file: gpunvme.File
) -> None:
    """A transfer in flight holds it; the request at its start must not be too long for it."""
    stream = cuda.create_stream()
    with cuda.alloc(2 * MIB) as buffer:
        short = gpunvme.Span(buffer.ptr, 70_000, "cuda:0", owner=buffer)
        file.read_into(short)
        with cuda.gate(stream=stream) as gate:
            held = file.read_into(short, stream=stream, wait=False)
            assert cufile.count("live_buffers") == 1
            for offset in (0, 7):
                file.read_into(buffer, offset)
                assert buffer.peek() == data[offset : offset + 2 * MIB]
            file.gather([3, MIB], MIB, out=buffer)
            assert buffer.peek() == data[3 : 3 + MIB] + data[MIB : 2 * MIB]
            assert cufile.count("live_buffers") == 1
            gate.set()
        held.wait(30)
        cuda.destroy_stream(stream)
        file.read_into(buffer, 5)
        assert buffer.peek() == data[5 : 5 + 2 * MIB]


def test_registrations_are_not_hoarded(cuda: FakeCuda, cufile: FakeCufile, file: gpunvme.File) -> None:
    held = [cuda.alloc(buffers.SMALLEST) for _ in range(buffers.MOST_REGISTERED + 10)]
    for _ in range(2):
        for each in held:
            file.read_into(each)
    assert cufile.count("live_buffers") == buffers.MOST_REGISTERED


def test_memory_that_cannot_be_registered(cuda: FakeCuda, cufile: FakeCufile, data: bytes, file: gpunvme.File) -> None:
    with cuda.alloc(MIB) as buffer:
        file.read_into(buffer)
        cufile.fail("BufRegister", 5036)
        assert "not registered with cuFile" in file.read_into(buffer).reason
        assert buffer.peek() == data[:MIB]


def test_handles_go_with_their_files(cuda: FakeCuda, cufile: FakeCufile, tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        files.make(tmp_path / str(number), MIB)
        with gpunvme.open(tmp_path / str(number), path=COMPAT) as opened, cuda.alloc(MIB) as buffer:
            opened.read_into(buffer)
            opened.read_into(buffer)
            assert cufile.calls("HandleRegister") == number + 1
        gc.collect()
    assert cufile.count("live_handles") == 0
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2  # the engine's own


# --- a file system that udev does not know, as in containers


@pytest.fixture
def udev(cufile: FakeCufile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Path) -> Iterator[Path]:
    """An empty database, and a libcufile that needs it; the entry that the file system would have in it."""
    folder = tmp_path / "run" / "udev" / "data"
    folder.mkdir(parents=True)
    number = os.stat(place).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    monkeypatch.setenv("GPUNVME_FAKE_UDEV", str(folder))
    missing, where = facts.missing_from_udev, facts.place_of
    monkeypatch.setattr(facts, "missing_from_udev", lambda where: missing(where, tmp_path))
    # Where the tests run on an overlay, its device is none of udev's.
    monkeypatch.setattr(facts, "place_of", lambda fd: dataclasses.replace(where(fd), device=name))
    driver.close()
    cufile.set(version=1150, udev=1)
    yield folder / f"b{name}"
    driver.close()


@pytest.mark.parametrize("version", [1150, 1200])
def test_a_file_system_that_udev_does_not_know(
    cuda: FakeCuda, cufile: FakeCufile, data: bytes, place: Path, udev: Path, version: int
) -> None:
    """Said before any attempt where the version is known to need it, else of the failure; and never by "auto"."""
    cufile.set(version=version)
    with gpunvme.open(place) as opened:
        before = {verdict.path: verdict for verdict in opened.explain("cuda")}[COMPAT]
        assert before.usable
        assert "may refuse the file: udev's database does not have" in before.reason
    for _ in range(2):
        with pytest.raises(gpunvme.PathError, match="-v /run/udev:/run/udev:ro") as caught:
            read(cuda, place, COMPAT)
        assert ("HANDLE_NOT_REGISTERED" in str(caught.value)) == (version == 1200)
        assert udev.name in str(caught.value)
    with gpunvme.open(place) as opened:
        after = {verdict.path: verdict for verdict in opened.explain("cuda")}[COMPAT]
        assert after.usable == (version == 1200)
    assert cufile.calls("HandleRegister") == (2 if version == 1200 else 0)
    assert read(cuda, place, "auto").path == "host"
    udev.write_text("I:1\nE:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem\n")
    assert read(cuda, place, COMPAT).path == COMPAT


# --- which way it was


@pytest.mark.parametrize("layout", [1, 3])
def test_nvidia_fs_shown(
    cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, with_nvidia_fs: None, layout: int
) -> None:
    """By both layouts that the statistics have had."""
    cufile.set(stats=layout)
    transfer = read(cuda, place, NVIDIA_FS)
    assert transfer.path == NVIDIA_FS
    assert "3 by nvidia-fs" in transfer.reason
    assert transfer.bounced_bytes == 0
    with gpunvme.open(place) as opened:
        verdicts = {verdict.path: verdict for verdict in opened.explain("cuda")}
        assert verdicts[NVIDIA_FS].usable
        assert not verdicts[COMPAT].usable


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": 0}, "through host memory"),
        ({"mode": 3}, "mixed"),
        ({"count": 0}, "nothing shows"),
        ({"stats": 2}, "do not have this GPU's UUID"),
    ],
)
def test_nvidia_fs_asked_for_and_not_shown(
    cuda: FakeCuda,
    cufile: FakeCufile,
    place: Path,
    data: bytes,
    with_nvidia_fs: None,
    settings: dict[str, int],
    says: str,
) -> None:
    """Whoever names a path wants that one or an error; what is not shown is not claimed."""
    cufile.set(**settings)
    with pytest.raises(gpunvme.PathError, match="did not carry this: .*" + says):
        read(cuda, place, NVIDIA_FS)


def test_heads_and_tails_through_host_memory(
    cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, with_nvidia_fs: None
) -> None:
    transfer = read(cuda, place, NVIDIA_FS, 2 * MIB, 1)
    assert transfer.path == NVIDIA_FS
    assert "2 of them unaligned" in transfer.reason
    assert transfer.bounced_bytes == 4096


def test_counters_against_the_kernel(
    cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libcufile counts nvidia-fs reads, and there is no such module: said, and no more than the least claimed."""
    cufile.set(mode=1)
    transfer = read(cuda, place, COMPAT)
    assert transfer.path == COMPAT
    assert "contradictory" in transfer.reason
    cufile.set(mode=2)
    monkeypatch.setattr(facts, "p2pdma", lambda: False)
    transfer = read(cuda, place, COMPAT)
    assert "the kernel has no P2PDMA" in transfer.reason


def test_no_statistics(cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes) -> None:
    driver.close()
    cufile.set(stats=0)
    transfer = read(cuda, place, COMPAT)
    assert transfer.path == COMPAT
    assert "nothing shows" in transfer.reason
    assert "cannot be switched on" in transfer.reason
    driver.close()


def test_p2pdma_shown(
    cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.close()
    cufile.set(props=2, mode=2)
    somewhere = facts.Place("ext4", "/dev/nvme0n1", "rw", ("nvme0n1",), frozenset({"pcie"}))
    monkeypatch.setattr(facts, "place_of", lambda *_: somewhere)
    monkeypatch.setattr(facts, "p2pdma", lambda: True)
    assert read(cuda, place, P2PDMA).path == P2PDMA
    monkeypatch.setattr(facts, "p2pdma", lambda: False)
    with pytest.raises(gpunvme.PathError, match="CONFIG_PCI_P2PDMA"):
        read(cuda, place, P2PDMA)
    driver.close()


def test_what_might_be_is_no_reason_to_refuse(
    cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the machine says P2PDMA is possible; the driver knows better, and is asked before a path is refused."""
    driver.close()
    somewhere = facts.Place("ext4", "/dev/nvme0n1", "rw", ("nvme0n1",), frozenset({"pcie"}))
    monkeypatch.setattr(facts, "place_of", lambda *_: somewhere)
    monkeypatch.setattr(facts, "p2pdma", lambda: True)
    monkeypatch.setattr(facts, "static_bar1", lambda: True)
    with gpunvme.open(place) as opened:
        assert {verdict.path for verdict in opened.explain("cuda") if verdict.usable} == {"host", P2PDMA}
    assert read(cuda, place, COMPAT).path == COMPAT
    with pytest.raises(gpunvme.PathError, match="driver properties do not have it"):
        read(cuda, place, P2PDMA)


def test_transfers_at_the_same_time_share_their_counters(
    cuda: FakeCuda, cufile: FakeCufile, file: gpunvme.File, data: bytes
) -> None:
    cufile.set(delay_us=30_000)
    with cuda.alloc(3 * MIB) as one, cuda.alloc(3 * MIB) as other:
        jobs = [file.read_into(each, wait=False) for each in (one, other)]
        reasons = [job.wait(30).reason for job in jobs]
        assert all("of other transfers at the same time" in reason for reason in reasons)
    assert all(job.path == COMPAT for job in jobs)


def test_where_it_cannot_be_used(cuda: FakeCuda, cufile: FakeCufile, file: gpunvme.File, place: Path) -> None:
    with pytest.raises(gpunvme.PathError, match="for GPU memory"):
        file.read_into(bytearray(10))
    with pytest.raises(gpunvme.PathError, match="nvidia-fs kernel module is not loaded"):
        read(cuda, place, NVIDIA_FS)
    with gpunvme.open("nvme+soft:ram?size=1MiB&nsid=1") as namespace:
        assert not any(verdict.usable for verdict in namespace.explain("cuda") if verdict.path.startswith("cufile"))
    if os.path.isdir("/dev/shm"):
        shared = "/dev/shm/gpunvme-test-cufile"
        with open(shared, "wb") as made:
            made.write(b"x" * MIB)
        try:
            assert read(cuda, shared, COMPAT, MIB).path == COMPAT  # type: ignore[arg-type]
        finally:
            os.unlink(shared)


def test_a_forked_child(cuda: FakeCuda, cufile: FakeCufile, file: gpunvme.File, data: bytes) -> None:
    """The driver is the parent's; the child is told so, and leaves what the parent has registered alone."""
    with cuda.alloc(MIB) as buffer:
        file.read_into(buffer)
        file.read_into(buffer)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                driver.driver()
            except gpunvme.PathError as error:
                code = 0 if "before this process was forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        file.read_into(buffer, 9)
        assert buffer.peek() == data[9 : 9 + MIB]


# --- chosen by measurement


def record(place: Path, host: measured.Rates, rival: measured.Rates, name: str = COMPAT) -> None:
    with gpunvme.open(place) as opened:
        key = measure.key(opened._file, gpunvme.Device("cuda", 0))  # type: ignore[arg-type]
    measured.keep(key, measured.Record({"host": host, name: rival}, 64 * MIB, 1e9))


def test_compatibility_mode_is_not_chosen_unmeasured(
    cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its driver is not even opened."""
    monkeypatch.setattr(choose, "_WORTH_MEASURING", MIB)
    driver.close()
    opens = cufile.calls("DriverOpen")
    assert read(cuda, place, "auto").path == "host"
    assert cufile.calls("DriverOpen") == opens
    with gpunvme.open(place) as opened:
        explanation = opened.explain("cuda")
        assert explanation.chosen == "host"
        assert "were not measured here" in str(explanation)
    assert not records.exists()


def test_measuring(cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, records: Path) -> None:
    """Both paths, hot and cold, kept on disk; the figures are those that are shown."""
    with gpunvme.open(place) as opened:
        explanation = opened.explain("cuda", measure=True)
        assert explanation.measured is not None
        assert "host hot" in explanation.measured or "host cold" in explanation.measured
        assert "cufile/compat" in explanation.measured
    assert records.exists()
    with gpunvme.open(place) as opened:
        assert opened.explain("cuda").measured == explanation.measured


def test_the_faster_one_is_chosen(cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, records: Path) -> None:
    rates = measured.Rates
    record(place, rates(hot=10e9, cold=1e9), rates(hot=2e9, cold=2e9))
    files.warm(place)
    assert read(cuda, place, "auto").path == "host"
    files.cool(place)
    assert read(cuda, place, "auto").path == COMPAT
    files.cool(place)
    assert read(cuda, place, "auto", 4096).path == "host"  # not worth the question
    record(place, rates(hot=10e9, cold=2.1e9), rates(hot=2e9, cold=2e9))
    files.cool(place)
    assert read(cuda, place, "auto").path == "host"


@pytest.mark.parametrize("rubbish", [b"", b"{", b"[]", b'{"format": 1, "records": {"a": 1}}', b"\xff" * 100])
def test_a_corrupted_record(
    cuda: FakeCuda, cufile: FakeCufile, place: Path, data: bytes, records: Path, rubbish: bytes
) -> None:
    records.parent.mkdir(parents=True)
    records.write_bytes(rubbish)
    assert read(cuda, place, "auto").path == "host"
    record(place, measured.Rates(1e9, 1e9), measured.Rates(2e9, 2e9))
    assert read(cuda, place, "auto").path == COMPAT


def test_a_direct_way_is_measured_before_it_is_used(
    cuda: FakeCuda,
    cufile: FakeCufile,
    place: Path,
    data: bytes,
    with_nvidia_fs: None,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "_WORTH_MEASURING", 8 * MIB)
    cufile.set(delay_us=60_000)  # whatever the machine: slower than the host path
    assert read(cuda, place, "auto", 8 * MIB).path == "host"
    assert records.exists()
    with gpunvme.open(place) as opened:
        assert NVIDIA_FS in str(opened.explain("cuda").measured)
