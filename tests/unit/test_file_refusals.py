"""What cannot be done is refused before a byte moves, by an error that says what is wrong and where.

A check that comes too late leaves half of a buffer or of a file overwritten; one that is missing, a crash.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import files
import gpunvme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 10_000
GUARD = 0xA5


@pytest.fixture
def place(tmp_path: Path) -> Path:
    files.make(tmp_path / "file", SIZE)
    return tmp_path / "file"


@pytest.fixture
def file(place: Path) -> Iterator[gpunvme.File]:
    with gpunvme.open(place, "r+") as opened:
        yield opened


def block(nbytes: int) -> np.ndarray[Any, Any]:
    return np.full(nbytes, GUARD, np.uint8)


def read_only(memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    view = memory.view()
    view.flags.writeable = False
    return view


#: What does not do as a destination of 100 bytes: (what to make of memory, what the error says).
NO_DESTINATION: dict[str, tuple[Callable[[np.ndarray[Any, Any]], Any], str]] = {
    "read-only numpy": (read_only, "read-only"),
    "bytes": (lambda memory: memory.tobytes(), "read-only"),
    "read-only memoryview": (lambda memory: memoryview(memory).toreadonly(), "read-only"),
    "read-only Span": (lambda memory: gpunvme.Span(memory.ctypes.data, 100, "cpu", writable=False), "read-only"),
    "every other byte": (lambda memory: memory[::2], "not contiguous"),
    "backwards": (lambda memory: memory[::-1], "not contiguous"),
    "transposed": (lambda memory: memory[:100].reshape(10, 10).T, "not contiguous"),
    "column": (lambda memory: memory[:100].reshape(10, 10)[:, 1], "not contiguous"),
    "memoryview of every other byte": (lambda memory: memoryview(memory)[::2], "not contiguous"),
    "broadcast": (lambda memory: np.broadcast_to(memory[:1], (100,)), "not contiguous"),
    "objects": (lambda memory: np.empty(20, object), "Python objects"),
    "objects in a structure": (lambda memory: np.empty(9, [("a", "i4"), ("b", object)]), "Python objects"),
    "a list": (lambda memory: memory.tolist(), "not memory: builtins.list"),
    "a str": (lambda memory: "a" * 100, "not memory: builtins.str"),
    "None": (lambda memory: None, "not memory: builtins.NoneType"),
    "an int": (lambda memory: memory.ctypes.data, "not memory: builtins.int"),
}


@pytest.mark.parametrize("what", NO_DESTINATION)
@pytest.mark.parametrize("call", ["read_into", "gather", "read_many"])
def test_no_destination(file: gpunvme.File, what: str, call: str) -> None:
    make, message = NO_DESTINATION[what]
    memory = block(200)
    destination = make(memory)
    calls: dict[str, Callable[[], object]] = {
        "read_into": lambda: file.read_into(destination),
        "gather": lambda: file.gather([0, 8], 8, out=destination),
        "read_many": lambda: gpunvme.read_many([(file, 0, destination)]),
    }
    if destination is None and call == "gather":
        pytest.skip("for gather, None is new memory")
    with pytest.raises(gpunvme.SpanError, match=message):
        calls[call]()
    assert (memory == GUARD).all()


@pytest.mark.parametrize("what", [what for what, (_, message) in NO_DESTINATION.items() if message != "read-only"])
def test_no_source(place: Path, file: gpunvme.File, what: str) -> None:
    before = place.read_bytes()
    with pytest.raises(gpunvme.SpanError, match=NO_DESTINATION[what][1]):
        file.write_from(NO_DESTINATION[what][0](block(200)))
    assert place.read_bytes() == before


#: (arguments of read_into after the destination of 100 bytes, error, what it says)
BAD_RANGES: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((-1,), gpunvme.RangeError, "-1"),
    ((SIZE - 99,), gpunvme.RangeError, "10000 bytes; bytes 9901 to 10001"),
    ((SIZE, 1), gpunvme.RangeError, "10000 bytes"),
    ((SIZE + 1, 0), gpunvme.RangeError, "10000 bytes"),
    ((2**63, 1), gpunvme.RangeError, "10000 bytes"),
    ((2**64, 1), gpunvme.RangeError, "10000 bytes"),
    ((np.int64(2**63 - 1), 100), gpunvme.RangeError, "10000 bytes"),
    ((np.uint32(2**32 - 1), 100), gpunvme.RangeError, "10000 bytes"),
    ((0, 101), gpunvme.SpanError, "100 bytes; 101 were asked for"),
    ((0, -1), gpunvme.SpanError, "-1"),
    ((0.0,), TypeError, "float"),
    ((np.float32(1),), TypeError, "float"),
    ((0, 5.0), TypeError, "float"),
    (("1",), TypeError, "str"),
    ((None,), TypeError, "None"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_RANGES)
@pytest.mark.parametrize("wait", [True, False])
def test_bad_ranges_to_read(
    file: gpunvme.File, arguments: tuple[Any, ...], error: type[Exception], message: str, wait: bool
) -> None:
    memory = block(100)
    with pytest.raises(error, match=message):
        file.read_into(memory, *arguments, wait=wait)
    assert (memory == GUARD).all()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1,), gpunvme.RangeError),
        ((SIZE + 1,), gpunvme.RangeError),
        ((0, SIZE + 1), gpunvme.RangeError),
        ((0, -1), gpunvme.RangeError),
        ((1.5,), TypeError),
        ((0, 1.0), TypeError),
    ],
)
def test_bad_ranges_to_read_into_new_memory(
    file: gpunvme.File, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        file.read(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1,), gpunvme.RangeError),
        ((0, 101), gpunvme.SpanError),
        ((0, -1), gpunvme.SpanError),
        ((1.0,), TypeError),
        ((2**63 - 4096,), (gpunvme.RangeError, gpunvme.FileError)),
        ((2**63,), gpunvme.RangeError),
        ((2**63 - 50,), gpunvme.RangeError),
        ((2**70,), gpunvme.RangeError),
    ],
)
@pytest.mark.parametrize("wait", [True, False])
def test_bad_ranges_to_write(
    place: Path, file: gpunvme.File, arguments: tuple[Any, ...], error: Any, wait: bool
) -> None:
    before = place.read_bytes()
    with pytest.raises(error):
        file.write_from(block(100), *arguments, wait=wait)
    assert place.read_bytes() == before


def test_a_destination_larger_than_what_is_left(file: gpunvme.File) -> None:
    memory = block(SIZE + 1)
    with pytest.raises(gpunvme.RangeError, match="10000 bytes"):
        file.read_into(memory)
    assert (memory == GUARD).all()


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([0, SIZE - 7, 5, SIZE], gpunvme.RangeError, "read number 1 asks for bytes 9993 to 10001 .2 of 4 reads"),
        ([0, 1, -1], gpunvme.RangeError, "read number 2 asks for bytes -1 to 7"),
        ([2**63], gpunvme.RangeError, "9223372036854775808"),
        (np.array([0, 2**64 - 1], np.uint64), gpunvme.RangeError, "18446744073709551615"),
        ([-(2**63)], gpunvme.RangeError, "read number 0"),
        ([2**63 - 1], gpunvme.RangeError, "read number 0"),
        ([0.0, 1.0], TypeError, "float"),
        (np.zeros((2, 2), np.int64), TypeError, r"one dimension, not shape \(2, 2\)"),
        (5, TypeError, "one dimension"),
        (["0"], TypeError, "integers"),
        ([True], TypeError, "integers"),
        ([2**70], (gpunvme.RangeError, TypeError), "."),
        ([[0], [1, 2]], (TypeError, ValueError), "."),
    ],
)
def test_bad_offsets(file: gpunvme.File, offsets: Any, error: Any, message: str) -> None:
    memory = block(100)
    with pytest.raises(error, match=message):
        file.gather(offsets, 8, out=memory)
    assert (memory == GUARD).all()


@pytest.mark.parametrize(
    ("nbytes", "error"), [(0, gpunvme.RangeError), (-1, gpunvme.RangeError), (2.0, TypeError), (SIZE + 1, ValueError)]
)
def test_bad_sizes_of_gathered_ranges(file: gpunvme.File, nbytes: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        file.gather([0], nbytes)


def test_a_gather_into_too_little(file: gpunvme.File) -> None:
    memory = block(23)
    with pytest.raises(gpunvme.SpanError, match="23 bytes; 3 reads of 8 bytes need 24"):
        file.gather([0, 8, 16], 8, out=memory)
    assert (memory == GUARD).all()


def test_a_gather_whose_device_is_not_that_of_its_destination(file: gpunvme.File) -> None:
    with pytest.raises(gpunvme.SpanError, match="on cpu, not on cuda:1"):
        file.gather([0], 8, out=block(8), device="cuda:1")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", -1, 1.0, None, True, "", "CUDA"])
def test_names_of_no_device(file: gpunvme.File, device: Any) -> None:
    with pytest.raises(ValueError, match="unknown device"):
        file.read(0, 1, device)
    with pytest.raises(ValueError, match="unknown device"):
        file.explain(device)


def test_a_closed_file(place: Path) -> None:
    file = gpunvme.open(place, "r+")
    file.close()
    file.close()
    for use in (
        file.fileno,
        file.read,
        file.explain,
        lambda: file.size,
        lambda: file.read_into(bytearray(1)),
        lambda: file.gather([0], 1),
        lambda: file.gather([], 1),
        lambda: file.write_from(b"x"),
        lambda: gpunvme.read_many([(file, 0, bytearray(1))]),
    ):
        with pytest.raises(ValueError, match="is closed"):
            use()


def test_files_that_are_open_for_reading(place: Path) -> None:
    before = place.read_bytes()
    with gpunvme.open(place) as file:
        for options in ({}, {"atomic": True}, {"wait": False}):
            with pytest.raises(gpunvme.FileError, match="open for reading only; use mode"):
                file.write_from(b"x", **options)
    assert place.read_bytes() == before
    assert os.listdir(place.parent) == ["file"]


@pytest.mark.parametrize("mode", ["", "w+", "a", "rb", "x", "R", None, 0])
def test_modes_that_do_not_exist(place: Path, mode: Any) -> None:
    with pytest.raises(ValueError, match="use 'r', "):
        gpunvme.open(place, mode)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_missing_file_is_missing_for_everybody(tmp_path: Path, mode: str) -> None:
    """`except FileNotFoundError` is what programs have written already."""
    with pytest.raises(FileNotFoundError) as caught:
        gpunvme.open(tmp_path / "missing", mode)
    assert isinstance(caught.value, gpunvme.FileError)
    assert caught.value.filename == str(tmp_path / "missing")
    assert caught.value.errno == 2
    assert "missing" in str(caught.value)


def test_a_name_with_a_null_byte_is_no_name(place: Path) -> None:
    """The kernel would open what the name says up to there."""
    for mode in ("r", "r+", "w"):
        with pytest.raises(ValueError, match="null byte"):
            gpunvme.open(f"{place}\0.txt", mode)
    assert place.stat().st_size == SIZE


@pytest.mark.parametrize("mode", ["r", "r+", "w"])
def test_what_is_not_a_file(tmp_path: Path, mode: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(gpunvme.FileError, match="not a regular file"):  # and it does not wait for a writer
        gpunvme.open(tmp_path / "fifo", mode)
    with pytest.raises(gpunvme.FileError) as caught:
        gpunvme.open(tmp_path, mode)
    assert caught.value.errno == 21
    with pytest.raises(gpunvme.FileError, match="not a regular file"):
        gpunvme.open("/dev/null", mode)


def test_descriptors_that_do_not_do(place: Path) -> None:
    reader, writer = os.pipe()
    for_writing = os.open(place, os.O_WRONLY)
    for_reading = os.open(place, os.O_RDONLY)
    try:
        with pytest.raises(gpunvme.FileError, match="not a regular file"):
            gpunvme.open(reader)
        with pytest.raises(gpunvme.FileError, match="open for reading"):
            gpunvme.open(for_writing)
        for mode in ("r+", "w"):
            with pytest.raises(gpunvme.FileError, match="reading and writing"):
                gpunvme.open(for_reading, mode)
            with pytest.raises(gpunvme.FileError):
                gpunvme.open(for_writing, mode)
    finally:
        for fd in (reader, writer, for_writing, for_reading):
            os.close(fd)
    with pytest.raises(gpunvme.FileError) as caught:
        gpunvme.open(for_reading)
    assert caught.value.errno == 9
    with pytest.raises(ValueError, match="negative"):
        gpunvme.open(-1)
    assert place.stat().st_size == SIZE


def test_refused_transfers_leave_nothing_behind(file: gpunvme.File) -> None:
    for _ in range(100):
        with pytest.raises(TypeError):
            file.gather([0], 1.0, out=bytearray(8))
        with pytest.raises(gpunvme.SpanError):
            gpunvme.read_many([(file, 0, bytearray(8)), (file, 0, b"x")])
    assert file.read_into(bytearray(100), wait=False).wait().nbytes == 100


WITHOUT_RIGHTS = """
import os, sys
from pathlib import Path
import gpunvme
readable, secret, data = sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes()
os.setegid(65534), os.seteuid(65534)
for mode in ("r", "r+"):
    try:
        gpunvme.open(secret, mode)
    except PermissionError as error:
        assert isinstance(error, gpunvme.FileError) and error.errno == 13 and secret in str(error), error
    else:
        raise SystemExit("opened")
try:
    gpunvme.open(readable, "r+")
except PermissionError:
    pass
with gpunvme.open(readable) as file:
    for _ in range(2):
        transfer = file.read_into(memory := bytearray(len(data) - 3), 3)
        assert memory == data[3:], "other bytes"
        print(transfer.cached_bytes, transfer.direct_bytes, transfer.buffered_bytes, transfer.reason)
        assert file.gather([5, 0, 70000], 1000).numpy().tobytes() == data[5:1005] + data[:1000] + data[70000:71000]
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("heat", files.HEATS)
def test_somebody_without_rights(heat: str) -> None:
    """The kernel tells only those who may write a file what of it is cached; the others get the same bytes."""
    with tempfile.TemporaryDirectory(prefix="gpunvme-") as directory:  # pytest's own cannot be entered by others
        Path(directory).chmod(0o755)
        readable, secret, same = (Path(directory) / name for name in ("readable", "secret", "same"))
        same.write_bytes(files.make(readable, 3 * files.MIB + 5))
        files.make(secret, 10)
        readable.chmod(0o644)
        secret.chmod(0o600)
        files.heat(readable, heat)
        files.output(WITHOUT_RIGHTS, readable, secret, same)
