"""Reading: whatever the offset, the destination and the page cache, the bytes are those of the file.

A wrong byte here is a wrong weight in somebody's model; a byte outside the destination is a crash somewhere else.
"""

from __future__ import annotations

import array
import mmap
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import files
import gpunvme
from files import HEATS, MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 5 * MIB + 1234
GUARD = 0xA5


class OnlyDLPack:
    """What knows DLPack and nothing else."""

    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self._memory = memory

    def __dlpack__(self, **options: Any) -> Any:
        return self._memory.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._memory.__dlpack_device__()


class OldDLPack(OnlyDLPack):
    """The same from before DLPack 1.0: no keywords."""

    def __dlpack__(self) -> Any:  # type: ignore[override]
        return self._memory.__dlpack__()


def address(memory: np.ndarray[Any, Any]) -> int:
    return int(memory.ctypes.data)


#: Ways to hand over a part of memory that is an array of bytes.
VIEWS: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "numpy": lambda part: part,
    "numpy 2-D": lambda part: part.reshape(1, -1),
    "memoryview": memoryview,
    "memoryview of int16": lambda part: memoryview(part).cast("h") if len(part) % 2 == 0 and len(part) else part,
    "DLPack": OnlyDLPack,
    "old DLPack": OldDLPack,
    "Span": lambda part: gpunvme.Span(address(part), part.nbytes, "cpu", owner=part) if part.nbytes else part,
    "numpy of float32": lambda part: part.view(np.float32) if len(part) % 4 == 0 else part,
}
#: Memory that is somebody else's.
OWNERS: dict[str, Callable[[int], Any]] = {
    "bytearray": bytearray,
    "array.array": lambda nbytes: array.array("B", bytes(nbytes)),
    "mmap": lambda nbytes: mmap.mmap(-1, nbytes) if nbytes else bytearray(),
    "Buffer": gpunvme.Buffer.empty,
    "numpy scalar array": lambda nbytes: np.zeros((), f"V{nbytes}") if nbytes else bytearray(),
}

ranges = st.tuples(
    st.integers(0, SIZE) | st.sampled_from([0, 511, 512, 4096, MIB, 2 * MIB - 1, SIZE - 1, SIZE]),
    st.integers(0, SIZE) | st.sampled_from([0, 1, 512, 4096, 65536, 65537, MIB, SIZE]),
).map(lambda pair: (pair[0], min(pair[1], SIZE - pair[0])))


def check(transfer: gpunvme.Transfer, nbytes: int, heat: str, *, in_memory: bool = False) -> None:
    """The report adds up, and is possible for a file in that state."""
    assert transfer.done
    assert transfer.nbytes == nbytes
    assert transfer.direct_bytes + transfer.cached_bytes + transfer.buffered_bytes == nbytes
    assert 0 <= transfer.bounced_bytes <= nbytes
    assert transfer.path == "host"
    assert transfer.seconds > 0 or nbytes == 0
    if heat == "hot":
        assert transfer.cached_bytes == nbytes
    if heat == "cold" and not in_memory:
        assert transfer.cached_bytes == 0


@given(span=ranges, heat=st.sampled_from(HEATS), shift=st.integers(0, 4096), view=st.sampled_from(sorted(VIEWS)))
def test_the_bytes_arrive_and_nothing_else_is_written(
    place: Path, data: bytes, file: gpunvme.File, span: tuple[int, int], heat: str, shift: int, view: str
) -> None:
    offset, nbytes = span
    files.heat(place, heat)
    room = np.full(shift + nbytes + 4096, GUARD, np.uint8)
    transfer = file.read_into(VIEWS[view](room[shift : shift + nbytes]), offset)
    assert room[shift : shift + nbytes].tobytes() == data[offset : offset + nbytes]
    assert (room[:shift] == GUARD).all()
    assert (room[shift + nbytes :] == GUARD).all()
    check(transfer, nbytes, heat)


@given(span=ranges, heat=st.sampled_from(HEATS), owner=st.sampled_from(sorted(OWNERS)))
def test_memory_of_every_kind(
    place: Path, data: bytes, file: gpunvme.File, span: tuple[int, int], heat: str, owner: str
) -> None:
    offset, nbytes = span
    files.heat(place, heat)
    destination = OWNERS[owner](nbytes)
    check(file.read_into(destination, offset), nbytes, heat)
    found = destination.numpy() if isinstance(destination, gpunvme.Buffer) else destination
    assert bytes(memoryview(found).cast("B")) == data[offset : offset + nbytes]


@given(span=ranges, heat=st.sampled_from(HEATS), room=st.integers(0, 5000))
def test_fewer_bytes_than_the_destination_has(
    place: Path, data: bytes, file: gpunvme.File, span: tuple[int, int], heat: str, room: int
) -> None:
    offset, nbytes = span
    files.heat(place, heat)
    destination = bytearray([GUARD]) * (nbytes + room)
    check(file.read_into(destination, offset, nbytes), nbytes, heat)
    assert destination == data[offset : offset + nbytes] + bytes([GUARD]) * room


@given(span=ranges, heat=st.sampled_from(HEATS))
def test_read_gives_new_memory(place: Path, data: bytes, file: gpunvme.File, span: tuple[int, int], heat: str) -> None:
    offset, nbytes = span
    files.heat(place, heat)
    buffer = file.read(offset, nbytes)
    assert buffer.numpy().tobytes() == data[offset : offset + nbytes]
    assert (buffer.nbytes, buffer.shape, buffer.device) == (nbytes, (nbytes,), "cpu")
    assert file.last_transfer is not None
    check(file.last_transfer, nbytes, heat)


def test_read_without_a_size_takes_the_rest(data: bytes, file: gpunvme.File) -> None:
    assert file.read(SIZE - 7).numpy().tobytes() == data[-7:]
    assert file.read(SIZE).nbytes == 0
    assert file.read().numpy().tobytes() == data


def test_a_cold_read_of_our_own_memory_goes_straight_there(place: Path, file: gpunvme.File) -> None:
    """Twice the memory traffic is what a bounce costs; `read` aligns its memory so that there is none."""
    files.cool(place)
    file.read(4096 * 3, 4 * MIB)
    assert file.last_transfer is not None
    if not file.last_transfer.direct_bytes:
        pytest.skip(f"O_DIRECT does not work here: {file.last_transfer.reason}")
    assert file.last_transfer.bounced_bytes == 0


def test_numbers_of_every_kind_are_offsets(data: bytes, file: gpunvme.File) -> None:
    for number in (7, np.int64(7), np.uint8(7), np.uint64(7)):
        destination = bytearray(9)
        file.read_into(destination, number, np.int16(9))
        assert destination == data[7:16]


def test_a_file_may_be_read_by_many_threads_at_once(place: Path, data: bytes, file: gpunvme.File) -> None:
    files.heat(place, "alternating")
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(20):
                offset = int(rng.integers(SIZE))
                nbytes = int(rng.integers(min(MIB, SIZE - offset) + 1))
                if file.read(offset, nbytes).numpy().tobytes() != data[offset : offset + nbytes]:
                    wrong.append((offset, nbytes))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must hear of it
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_descriptor_is_as_good_as_a_path(place: Path, data: bytes) -> None:
    with place.open("rb") as python_file:
        opened = gpunvme.open(python_file.fileno())
    with opened:  # its owner has closed it
        assert opened.read(1, 100).numpy().tobytes() == data[1:101]
        assert opened.name.startswith("<file descriptor")


def test_a_file_that_grew_can_be_read_to_its_new_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one")
    with gpunvme.open(path) as file:
        assert file.read().numpy().tobytes() == b"one"
        with path.open("ab") as more:
            more.write(b" two")
        assert file.size == 7
        assert file.read().numpy().tobytes() == b"one two"


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with gpunvme.open(path) as file:
        assert file.read().nbytes == 0
        transfer = file.read_into(bytearray())
        assert (transfer.nbytes, transfer.done) == (0, True)
        assert file.gather([], 8).shape == (0, 8)


def test_names_need_not_be_text(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9 \U0001f600"  # a byte that is not UTF-8
    data = files.make(path, 1000)
    with gpunvme.open(path) as file:
        assert file.name == str(path)
        assert file.read().numpy().tobytes() == data


def test_what_a_file_says_of_itself(place: Path, tmp_path: Path) -> None:
    with gpunvme.open(place) as file:
        assert (file.name, file.mode, file.size, file.closed) == (str(place), "r", SIZE, False)
        assert place.stat().st_ino == os.fstat(file.fileno()).st_ino
        assert str(place) in repr(file)
    assert file.closed
    assert "closed" in repr(file)
    with gpunvme.open(tmp_path / "new", "w") as made:
        assert (made.mode, made.size) == ("w", 0)
