"""P2PDMA without PCI memory: a file stands for it, and the kernel's answers are made up.

What a user would lose: bytes that pass through the processor without a word, memory that is taken away under a
transfer, and refusals without a reason.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpunvme
from gpunvme.cufile.facts import Place
from gpunvme.errors import Cancelled, DeadlineExceeded, FileError, PathError, SpanError, TruncatedError, UriError
from gpunvme.nvme.sysfs import Machine
from gpunvme.p2pdma import mappings, probe, reasons, requests
from gpunvme.p2pdma.memory import P2pMemory

PEER, DRIVE = "0000:04:00.0", "0000:03:00.0"
MIB = 1 << 20


def function(root: Path, address: str, *above: str, driver: str = "nvme", code: str = "0x010802") -> Path:
    """Describe a PCI function as sysfs does."""
    place = root.joinpath("sys/devices/pci0000:00", *above, address)
    place.mkdir(parents=True)
    (place / "class").write_text(code)
    (place / "resource").write_text("0x0 0x0 0x0\n")
    (root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
    (place / "driver").symlink_to(root / f"sys/bus/pci/drivers/{driver}")
    bus = root / "sys/bus/pci/devices"
    bus.mkdir(parents=True, exist_ok=True)
    (bus / address).symlink_to(place)
    return place


def with_p2pmem(place: Path, nbytes: int = 8 * MIB) -> None:
    folder = place / "p2pmem"
    folder.mkdir()
    (folder / "available").write_text(f"{nbytes}\n")
    with (folder / "allocate").open("wb") as file:
        file.truncate(nbytes)


def kernel(root: Path, setting: str) -> None:
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/sys/kernel/osrelease").write_text("7.2\n")
    (root / "boot").mkdir()
    (root / "boot/config-7.2").write_text(setting + "\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    root = tmp_path / "machine"
    kernel(root, "CONFIG_PCI_P2PDMA=y")
    with_p2pmem(function(root, PEER, "0000:01:00.0", "0000:02:01.0"))
    return Machine(root)


@pytest.fixture
def memory(machine: Machine) -> Iterator[P2pMemory]:
    with P2pMemory(PEER, 4 * MIB, machine=machine) as made:
        yield made


@pytest.fixture(autouse=True)
def on_a_drive(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of this machine are on a drive; nothing is known of it."""
    place = Place("ext4", "/dev/nvme0n1", "", ("nvme0n1",), frozenset({"pcie"}))
    monkeypatch.setattr(probe, "place_of", lambda fd: place)
    monkeypatch.setattr(reasons, "place_of", lambda fd, root: place)
    probe.forget()
    yield
    probe.forget()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    name = tmp_path / "file"
    with name.open("wb") as made:
        made.write(contents(3 * MIB + 1000).tobytes())
        os.fsync(made.fileno())
        os.posix_fadvise(made.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with gpunvme.open(name) as opened:
        if opened._file.direct_refusal:
            pytest.skip(f"no O_DIRECT here: {opened._file.direct_refusal}")
    return name


def contents(nbytes: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)


def answering(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have the kernel refuse every request of a drive's."""

    def refuse(piece: requests.Piece, write: bool) -> requests.Moved:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(requests, "carry_direct", refuse)


# --- memory


def test_memory_is_found_by_its_address_until_it_is_given_back(machine: Machine) -> None:
    with P2pMemory(PEER, 10_000, machine=machine) as memory:
        array = memory.numpy()
        array[:] = 7
        found = mappings.mapping_of(gpunvme.Span(array.ctypes.data + 100, 50))
        assert found is not None
        assert found.provider == PEER
        assert np.asarray(memory).base is not None
        with pytest.raises(SpanError, match="past the memory"):
            mappings.mapping_of(gpunvme.Span(array.ctypes.data + 9_000, 2_000))
        with pytest.raises(SpanError, match="arrays of the memory"):
            memory.close()
        assert mappings.mapping_of(memory.span) is found
        address = array.ctypes.data
        del array
    assert mappings.mapping_of(gpunvme.Span(address, 10)) is None
    with pytest.raises(SpanError, match="given back"):
        _ = memory.span
    memory.close()


def test_an_array_that_outlives_it_is_still_known(machine: Machine) -> None:
    array = P2pMemory(PEER, 4096, machine=machine).numpy()
    span = gpunvme.Span(array.ctypes.data, 4096)
    assert mappings.mapping_of(span) is not None
    del array
    assert mappings.mapping_of(span) is None


def test_it_is_not_unmapped_under_a_transfer(memory: P2pMemory) -> None:
    found = mappings.mapping_of(memory.span)
    assert found is not None
    found.hold()
    with pytest.raises(SpanError, match="used by a transfer"):
        memory.close()
    found.release()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: kernel(root, "# CONFIG_PCI_P2PDMA is not set"), "there is no PCI device"),
        (lambda root: (kernel(root, ""), function(root, PEER)), "no P2PDMA"),
        (lambda root: (kernel(root, "CONFIG_PCI_P2PDMA=y"), function(root, PEER)), "no controller memory buffer"),
        (
            lambda root: (kernel(root, "CONFIG_PCI_P2PDMA=y"), function(root, PEER, driver="vfio-pci")),
            "nvme driver does not drive it",
        ),
        (
            lambda root: (kernel(root, "CONFIG_PCI_P2PDMA=y"), function(root, PEER, code="0x020000")),
            "its driver publishes none",
        ),
        (lambda root: (function(root, PEER) / "p2pmem").mkdir(), "Linux 6.2"),
    ],
)
def test_why_there_is_no_memory(tmp_path: Path, change: Callable[[Path], object], said: str) -> None:
    change(tmp_path)
    with pytest.raises(PathError, match=said):
        P2pMemory(PEER, 4096, machine=Machine(tmp_path))


def test_what_is_asked_for_is_checked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UriError):
        P2pMemory("nonsense", 4096, machine=machine)
    with pytest.raises(SpanError):
        P2pMemory(PEER, 0, machine=machine)

    def exhausted(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("gpunvme.p2pdma.memory.mmap.mmap", exhausted)
    with pytest.raises(SpanError, match="8388608 are free"):
        P2pMemory(PEER, 4096, machine=machine)


# --- transfers


def test_it_goes_straight_and_never_by_the_page_cache(memory: P2pMemory, file: Path) -> None:
    with gpunvme.open(file) as opened:
        assert opened.explain(memory).chosen == "p2pdma"
        done = opened.read_into(memory, nbytes=3 * MIB + 1000)
        assert (done.path, done.direct_bytes, done.cached_bytes) == ("p2pdma", 3 * MIB + 1000, 0)
        assert done.bounced_bytes == 1000 % opened._file.offset_align
        assert PEER in str(done)
        assert np.array_equal(memory.numpy()[: 3 * MIB + 1000], contents(3 * MIB + 1000))
        # What is in the page cache comes from the drive all the same; an array of it is it.
        file.read_bytes()
        done = opened.read_into(memory.numpy()[:MIB])
        assert (done.path, done.direct_bytes, done.cached_bytes, done.bounced_bytes) == ("p2pdma", MIB, 0, 0)
        assert opened.read_into(np.zeros(MIB, np.uint8)).path == "host"
        out = opened.gather([5, 8192], 4096, memory.span.part(0, 8192))
        assert out.nbytes == 8192
        assert opened.last_transfer is not None
        assert (opened.last_transfer.path, opened.last_transfer.bounced_bytes) == ("p2pdma", 4096)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2 * MIB),
    st.integers(0, MIB),
    st.integers(0, 5000),
    st.booleans(),
)
def test_every_range_arrives(
    tmp_path_factory: pytest.TempPathFactory, offset: int, nbytes: int, place: int, write: bool
) -> None:
    folder = tmp_path_factory.mktemp("range")
    kernel(folder, "CONFIG_PCI_P2PDMA=y")
    with_p2pmem(function(folder, PEER))
    data = contents(3 * MIB + 1000)
    name = folder / "file"
    data.tofile(name)
    with P2pMemory(PEER, 2 * MIB, machine=Machine(folder)) as memory, gpunvme.open(name, "r+") as file:
        span = memory.span.part(place, nbytes)
        if write:
            memory.numpy()[:] = 255 - data[: 2 * MIB]
            data[offset : offset + nbytes] = memory.numpy()[place : place + nbytes]
            file.write_from(span, offset)
            assert np.array_equal(np.fromfile(name, np.uint8), data)
        else:
            memory.numpy()[:] = 0
            file.read_into(span, offset)
            assert np.array_equal(memory.numpy()[place : place + nbytes], data[offset : offset + nbytes])
            assert not memory.numpy()[place + nbytes :].any()
            assert not memory.numpy()[:place].any()


@pytest.mark.parametrize("number", sorted(reasons.REFUSALS))
@pytest.mark.parametrize("write", [False, True])
def test_a_refusal_goes_through_host_memory_and_says_so(
    memory: P2pMemory, file: Path, monkeypatch: pytest.MonkeyPatch, number: int, write: bool
) -> None:
    answering(monkeypatch, number)
    with gpunvme.open(file, "r+") as opened:
        memory.numpy()[:] = 9
        done = opened.write_from(memory, nbytes=MIB) if write else opened.read_into(memory, nbytes=MIB)
        assert (done.path, done.bounced_bytes) == ("host", MIB)
        assert errno.errorcode[number] in done.reason
        expected = np.full(MIB, 9, np.uint8) if write else contents(MIB)
        assert np.array_equal(memory.numpy()[:MIB], expected)
        assert np.array_equal(np.fromfile(file, np.uint8, MIB), expected)
    with (
        gpunvme.open(file, "r+", path="p2pdma") as strict,
        pytest.raises(PathError, match=errno.errorcode[number]),
    ):
        strict.write_from(memory, nbytes=MIB) if write else strict.read_into(memory, nbytes=MIB)


def test_a_refusal_after_the_end_is_no_wait_for_ever(
    memory: P2pMemory, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = threading.Event(), threading.Event()

    def refuse_late(piece: requests.Piece, write: bool) -> requests.Moved:
        begun.set()
        gate.wait(30)
        raise OSError(errno.EREMOTEIO, "")

    monkeypatch.setattr(requests, "carry_direct", refuse_late)
    with gpunvme.open(file) as opened:
        transfer = opened.read_into(memory, nbytes=MIB, wait=False)
        assert begun.wait(30)
        transfer.cancel()
        gate.set()
        with pytest.raises(Cancelled):
            transfer.wait(20)


def test_other_errors_are_errors(memory: P2pMemory, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, errno.EIO)
    with gpunvme.open(file) as opened, pytest.raises(FileError) as caught:
        opened.read_into(memory, nbytes=MIB)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(file))


def test_a_probe_is_remembered_for_a_file_system(
    memory: P2pMemory, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def no_way(*_: object) -> str:
        asked.append(1)
        return "no way"

    monkeypatch.setattr(probe, "_read", no_way)
    for _ in range(3):
        with gpunvme.open(file) as opened:
            done = opened.read_into(memory, nbytes=MIB)
            assert done.bounced_bytes == MIB
            assert "no way" in done.reason
    assert len(asked) == 1
    with gpunvme.open(file, path="p2pdma") as opened, pytest.raises(PathError, match="no way"):
        opened.read_into(memory, nbytes=MIB)


def test_a_file_system_that_reads_by_the_page_cache_is_found_out(
    memory: P2pMemory, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def buffered(fd: int, views: list[object], offset: int) -> int:
        file.read_bytes()
        return real(fd, views, offset)

    monkeypatch.setattr("gpunvme.p2pdma.probe.os.preadv", buffered)
    with gpunvme.open(file) as opened:
        verdict = next(each for each in opened.explain(memory) if each.path == "p2pdma")
    assert not verdict.usable
    assert "page cache" in verdict.reason


def test_the_devices_are_named_that_have_no_way(tmp_path: Path, machine: Machine) -> None:
    place = function(machine.root, "0000:09:00.0")
    (place / "nvme/nvme0/nvme0n1").mkdir(parents=True)
    block = machine.root / "sys/class/block"
    block.mkdir(parents=True)
    (block / "nvme0n1").symlink_to(place / "nvme/nvme0/nvme0n1")
    name = tmp_path / "file"
    name.touch()
    with name.open() as opened:
        said = reasons.refused(errno.EREMOTEIO, opened.fileno(), PEER, machine)
        assert "0000:09:00.0" in said
        assert "PCIe switch" in said
        assert "PCIe switch" not in reasons.refused(errno.EFAULT, opened.fileno(), PEER, machine)
        near = function(machine.root, DRIVE, "0000:01:00.0", "0000:02:00.0")
        (near / "nvme/nvme0/nvme0n1").mkdir(parents=True)
        (block / "nvme0n1").unlink()
        (block / "nvme0n1").symlink_to(near / "nvme/nvme0/nvme0n1")
        assert "PCIe switch" not in reasons.refused(errno.EREMOTEIO, opened.fileno(), PEER, machine)


def test_a_file_that_ends_is_an_error(memory: P2pMemory, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = requests.carry_direct

    def cut(piece: requests.Piece, write: bool) -> requests.Moved:
        os.truncate(file, MIB + 100)
        return real(piece, write)

    monkeypatch.setattr(requests, "carry_direct", cut)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with gpunvme.open(file) as opened, pytest.raises(TruncatedError, match="truncated"):
        opened.read_into(memory, nbytes=3 * MIB)
    give_up = time.monotonic() + 20
    while len(os.listdir("/proc/self/fd")) != before:  # the last threads are about to end
        assert time.monotonic() < give_up, "the file stays open"
        time.sleep(0.01)
        gc.collect()


def test_it_is_cancelled_and_expires(memory: P2pMemory, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate = threading.Event(), threading.Event()
    real = requests.carry_direct

    def slow(piece: requests.Piece, write: bool) -> requests.Moved:
        begun.set()
        gate.wait(30)
        return real(piece, write)

    monkeypatch.setattr(requests, "carry_direct", slow)
    with gpunvme.open(file) as opened:
        transfer = opened.read_into(memory, nbytes=2 * MIB, wait=False)
        assert begun.wait(30)
        transfer.cancel()
        assert not transfer.done, "the drive still writes to it"
        with pytest.raises(SpanError, match="used by a transfer"):
            memory.close()
        gate.set()
        with pytest.raises(Cancelled):
            transfer.wait(30)
        gate.clear()
        late = opened.read_into(memory, nbytes=2 * MIB, wait=False, timeout=0.05)
        threading.Timer(0.3, gate.set).start()
        with pytest.raises(DeadlineExceeded):
            late.wait(30)


def test_ordinary_memory_is_not_mixed_in(memory: P2pMemory, file: Path) -> None:
    plain = np.zeros(4096, np.uint8)
    with gpunvme.open(file) as opened:
        for first, second in ((memory.span.part(0, 10), plain), (plain, memory.span.part(0, 10))):
            with pytest.raises(SpanError, match="PCI memory"):
                gpunvme.read_many([(opened, 0, first), (opened, 0, second)])


def test_what_it_is_for(file: Path) -> None:
    with gpunvme.open(file) as opened:
        verdict = next(each for each in opened.explain() if each.path == "p2pdma")
        assert "P2pMemory" in verdict.reason
    with gpunvme.open(file, path="p2pdma") as opened, pytest.raises(PathError, match="P2pMemory"):
        opened.read_into(np.zeros(10, np.uint8))
