"""Gathers and reads of many parts: every range in its place, whatever their order, overlap and number.

These are what embedding tables and checkpoints are read by: one range in another's place is silent nonsense.
"""

from __future__ import annotations

import array
import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import files
import gpunvme
from files import HEATS, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 6 * MIB + 777
GUARD = 0xA5


def only_buffer_protocol(offsets: list[int]) -> Any:
    return memoryview(array.array("q", offsets))


FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "int64": lambda offsets: np.array(offsets, np.int64),
    "uint64": lambda offsets: np.array(offsets, np.uint64),
    "int32": lambda offsets: np.array(offsets, np.int32),
    "big-endian": lambda offsets: np.array(offsets, ">i8"),
    "strided": lambda offsets: np.repeat(np.array(offsets, np.int64), 2)[::2],
    "reversed": lambda offsets: np.array(offsets[::-1], np.int64)[::-1],
    "memoryview": only_buffer_protocol,
}


@st.composite
def gathers(draw: st.DrawFn) -> tuple[list[int], int]:
    nbytes = draw(st.sampled_from([1, 8, 100, 512, 1000, 4096, 5000, 65536, 512 << 10, (512 << 10) + 1, 700_000]))
    count = draw(st.integers(0, 2000 if nbytes <= 5000 else 8))
    order = draw(st.sampled_from(["random", "sorted", "adjacent", "same", "blocks"]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    offsets = rng.integers(0, SIZE - nbytes + 1, count)
    if order == "sorted":
        offsets.sort()
    elif order == "adjacent":
        offsets = np.minimum(int(rng.integers(SIZE)) + np.arange(count) * nbytes, SIZE - nbytes)
    elif order == "same":
        offsets[:] = offsets[:1]
    elif order == "blocks":
        offsets = np.minimum(offsets // 4096 * 4096, SIZE - nbytes)
    return [int(offset) for offset in offsets], nbytes


@given(what=gathers(), heat=st.sampled_from(HEATS), form=st.sampled_from(sorted(FORMS)), out=st.booleans())
def test_every_range_in_its_place(
    place: Path, data: bytes, what: tuple[list[int], int], heat: str, form: str, out: bool
) -> None:
    offsets, nbytes = what
    files.heat(place, heat)
    file = gpunvme.open(place)  # anew: pages that an earlier gather has mapped would not leave the cache
    expected = b"".join(data[offset : offset + nbytes] for offset in offsets)
    if out:
        room = np.full(len(expected) + 4097, GUARD, np.uint8)
        destination = room[1 : 1 + len(expected) + 96]
        assert file.gather(FORMS[form](offsets), nbytes, out=destination) is destination
        assert room[1 : 1 + len(expected)].tobytes() == expected
        assert room[0] == GUARD
        assert (room[1 + len(expected) :] == GUARD).all()
    else:
        found = file.gather(FORMS[form](offsets), nbytes)
        assert found.shape == (len(offsets), nbytes)
        assert found.numpy().tobytes() == expected
    report = file.last_transfer
    assert report is not None
    assert report.nbytes == len(expected) == report.direct_bytes + report.cached_bytes + report.buffered_bytes
    if heat == "hot":
        assert report.cached_bytes == len(expected)


def test_a_gather_of_a_hot_file_twice(place: Path, data: bytes) -> None:
    """The second one goes by a mapping that the first one prepared."""
    files.warm(place)
    file = gpunvme.open(place)
    offsets = np.arange(0, SIZE - 64, 64, dtype=np.int64)
    np.random.default_rng(3).shuffle(offsets)
    expected = b"".join(data[offset : offset + 64] for offset in offsets)
    for _ in range(2):
        assert file.gather(offsets, 64).numpy().tobytes() == expected


def test_offsets_may_change_once_the_gather_is_done(place: Path, data: bytes, file: gpunvme.File) -> None:
    offsets = np.array([100, 200], np.int64)
    found = file.gather(offsets, 10)
    offsets[:] = 0
    assert found.numpy().tobytes() == data[100:110] + data[200:210]


@given(
    seed=st.integers(0, 10_000),
    heat=st.sampled_from(HEATS),
    count=st.integers(0, 60),
    largest=st.sampled_from([1, 100, 5000, 300_000, 3 * MIB]),
    lazily=st.booleans(),
)
def test_many_parts(
    place: Path, data: bytes, file: gpunvme.File, seed: int, heat: str, count: int, largest: int, lazily: bool
) -> None:
    files.heat(place, heat)
    rng = np.random.default_rng(seed)
    offsets = [int(offset) for offset in rng.integers(0, SIZE, count)]
    if seed % 2:
        offsets.sort()
    sizes = [min(int(rng.integers(0, largest + 1)), SIZE - offset, MIB * 8 // (count or 1)) for offset in offsets]
    rooms: list[np.ndarray[Any, Any]] = []

    def parts() -> Iterator[tuple[gpunvme.File, int, Any]]:
        for offset, nbytes in zip(offsets, sizes, strict=True):
            rooms.append(np.full(nbytes + 3, GUARD, np.uint8))
            yield file, offset, rooms[-1][1 : 1 + nbytes]

    transfer = gpunvme.read_many(parts() if lazily else list(parts()))
    for offset, nbytes, room in zip(offsets, sizes, rooms, strict=True):
        assert room.tobytes() == bytes([GUARD]) + data[offset : offset + nbytes] + bytes([GUARD] * 2)
    assert transfer.nbytes == sum(sizes)
    assert transfer.direct_bytes + transfer.cached_bytes + transfer.buffered_bytes == transfer.nbytes


def test_many_files_as_one_transfer(tmp_path: Path) -> None:
    expected, parts = [], []
    for number in range(20):
        expected.append(files.make(tmp_path / str(number), 100_000 + number, seed=number))
        opened = gpunvme.open(tmp_path / str(number))
        parts.append((opened, 0, bytearray(100_000 + number)))
    files.cool(tmp_path / "7")
    seen: list[tuple[int, int]] = []
    transfer = gpunvme.read_many(parts, progress=lambda done, total: seen.append((done, total)))
    assert [bytes(part[2]) for part in parts] == expected
    assert transfer.nbytes == sum(map(len, expected))
    assert seen[-1] == (transfer.nbytes, transfer.nbytes)


def test_parts_move_while_later_ones_are_still_made(place: Path, data: bytes, file: gpunvme.File) -> None:
    """More parts than one batch: memory for a checkpoint is allocated while it is read."""
    taken: list[bytearray] = []
    reports: list[tuple[int, int]] = []

    def parts() -> Iterator[tuple[gpunvme.File, int, Any]]:
        for number in range(10_000):
            taken.append(bytearray(64))
            yield file, number * 64, taken[-1]

    transfer = gpunvme.read_many(parts(), progress=lambda done, total: reports.append((done, total)), total=640_000)
    assert b"".join(taken) == data[:640_000]
    assert transfer.nbytes == 640_000
    assert len(reports) >= 3
    assert reports == sorted(reports)
    assert {total for _, total in reports} == {640_000}


def test_destinations_of_a_generator_are_kept_alive(place: Path, data: bytes, file: gpunvme.File) -> None:
    files.cool(place)
    kept = np.zeros(MIB, np.uint8)

    def parts() -> Iterator[tuple[gpunvme.File, int, Any]]:
        for number in range(30):
            yield file, number * 1000, np.zeros(MIB, np.uint8)  # nobody else holds it
        yield file, 5 * MIB, kept

    transfer = gpunvme.read_many(parts(), wait=False)
    gc.collect()
    others = [np.full(MIB, GUARD, np.uint8) for _ in range(30)]  # takes the memory of those that were let go
    transfer.wait()
    assert kept.tobytes() == data[5 * MIB : 6 * MIB]
    assert all((other == GUARD).all() for other in others)


def test_nothing_to_read_is_no_error() -> None:
    transfer = gpunvme.read_many([])
    assert (transfer.nbytes, transfer.done, transfer.path) == (0, True, "host")


def test_an_error_in_the_generator_stops_what_was_started(place: Path, file: gpunvme.File) -> None:
    def parts() -> Iterator[tuple[gpunvme.File, int, Any]]:
        for _ in range(5000):
            yield file, 0, bytearray(1000)
        raise RuntimeError("no memory left for the next tensor")

    with pytest.raises(RuntimeError, match="next tensor"):
        gpunvme.read_many(parts())
    assert file.read(0, 10).nbytes == 10  # and nothing is left behind


@pytest.mark.parametrize("bad", [0, 1, 4999])
def test_a_bad_part_stops_what_was_started(place: Path, file: gpunvme.File, bad: int) -> None:
    parts = [(file, SIZE if number == bad else 0, bytearray(100)) for number in range(5000)]
    with pytest.raises(gpunvme.RangeError, match=str(SIZE)):
        gpunvme.read_many(parts)
