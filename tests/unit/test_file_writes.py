"""Writing: the file afterwards is what Python's own file object would have left, for every reader of it.

Large writes go past the page cache, small ones through it. A mistake in between leaves readers with old bytes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import files
import gpunvme
from files import MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOURCES: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda data: data,
    "bytearray": bytearray,
    "read-only memoryview": memoryview,
    "read-only numpy": lambda data: np.frombuffer(data, np.uint8),
    "misaligned numpy": lambda data: np.frombuffer(b"x" + data, np.uint8)[1:],
    "numpy of int16": lambda data: np.frombuffer(data, np.int16) if len(data) % 2 == 0 else data,
    "Buffer": lambda data: filled(gpunvme.Buffer.empty(len(data)), data),
    "Span": lambda data: filled(gpunvme.Buffer.empty(len(data)), data).span,
}


def filled(buffer: gpunvme.Buffer, data: bytes) -> gpunvme.Buffer:
    buffer.numpy()[:] = np.frombuffer(data, np.uint8)
    return buffer


writes = st.lists(
    st.tuples(
        st.integers(0, 3 * MIB) | st.sampled_from([0, 4096, MIB, 2 * MIB + 1]),
        st.integers(0, 3 * MIB) | st.sampled_from([0, 1, 4096, MIB - 1, MIB, 2 * MIB + 4096]),
        st.sampled_from(sorted(SOURCES)),
    ),
    min_size=1,
    max_size=4,
)


@given(
    before=st.sampled_from([0, 1, 4096, 2 * MIB + 5]),
    steps=writes,
    hot=st.booleans(),
    mode=st.sampled_from(["r+", "w"]),
)
def test_the_file_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, before: int, steps: list[tuple[int, int, str]], hot: bool, mode: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "written"
    model = bytearray(files.make(path, before))
    if not hot:
        files.cool(path)
    with gpunvme.open(path, mode) as file:
        if mode == "w":
            model.clear()
        for number, (offset, nbytes, source) in enumerate(steps):
            data = files.contents(nbytes, seed=number)
            transfer = file.write_from(SOURCES[source](data), offset)
            if nbytes and offset > len(model):
                model.extend(bytes(offset - len(model)))  # the gap is zeros
            model[offset : offset + nbytes] = data
            assert path.read_bytes() == model
            assert file.size == len(model)
            assert file.read().numpy().tobytes() == model
            assert transfer.done
            assert transfer.nbytes == nbytes == transfer.direct_bytes + transfer.cached_bytes
            assert transfer.buffered_bytes == 0
            assert transfer.path == "host"


def test_part_of_the_source(tmp_path: Path) -> None:
    with gpunvme.open(tmp_path / "file", "w") as file:
        assert file.write_from(b"abcdef", 2, 3).nbytes == 3
        assert (tmp_path / "file").read_bytes() == b"\0\0abc"


def test_a_large_write_goes_past_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    files.cool(path)
    buffer = gpunvme.Buffer.empty(4 * MIB)
    with gpunvme.open(path, "w") as file:
        transfer = file.write_from(buffer)
        if not transfer.direct_bytes:
            pytest.skip(f"O_DIRECT does not work here: {transfer.reason}")
    assert transfer.direct_bytes == 4 * MIB
    assert transfer.bounced_bytes == 0
    assert files.cached_pages(path) == 0


def test_writing_without_waiting(tmp_path: Path) -> None:
    data = files.contents(5 * MIB + 3)
    with gpunvme.open(tmp_path / "file", "w") as file:
        transfer = file.write_from(data, wait=False, fsync=True)
        assert transfer.wait() is transfer
    assert (tmp_path / "file").read_bytes() == data


def test_a_write_that_nobody_waits_for_is_made(tmp_path: Path) -> None:
    data = files.contents(5 * MIB + 3)
    with gpunvme.open(tmp_path / "file", "w") as file:
        file.write_from(bytearray(data), wait=False)  # nobody holds the source either
    files.wait_until(lambda: (tmp_path / "file").read_bytes() == data)


@pytest.mark.parametrize("wait", [True, False])
def test_done_means_on_the_drive_where_fsync_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    """Somebody who polls `done` before reporting a checkpoint as saved must be able to rely on it."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with gpunvme.open(tmp_path / "file", "w") as file:
        transfer = file.write_from(bytes(100), wait=wait, fsync=True)
        files.wait_until(lambda: transfer.done)
        assert synced == [file.fileno()]
        transfer.wait()
        assert synced == [file.fileno()]


def test_fsync_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with gpunvme.open(tmp_path / "file", "w") as file:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(gpunvme.FileError, match="fsync") as caught:
            file.write_from(b"data", fsync=True)
    assert caught.value.errno == 5


def test_a_descriptor_that_appends_is_written_where_it_is_told(tmp_path: Path) -> None:
    """pwrite on an O_APPEND descriptor goes to the end whatever the offset."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        with gpunvme.open(fd, "r+") as file:
            file.write_from(b"abc", 2)
    finally:
        os.close(fd)
    assert path.read_bytes() == b"01abc56789"


def test_a_descriptor_that_is_o_direct_takes_any_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"O_DIRECT does not work here: {error.strerror}")
    try:
        with gpunvme.open(fd, "r+") as file:
            file.write_from(b"abc", 1)
            assert file.read(0, 5).numpy().tobytes() == b"\0abc\x04"
            files.cool(path)
            assert file.read(3, 4097).numpy().tobytes() == path.read_bytes()[3:4100]
    finally:
        os.close(fd)


def test_mode_w_empties_and_r_plus_does_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    gpunvme.open(path, "r+").close()
    assert path.read_bytes() == b"old"
    gpunvme.open(path, "w").close()
    assert path.read_bytes() == b""
    path.write_bytes(b"old")
    with path.open("r+b") as python_file:
        gpunvme.open(python_file.fileno(), "w").close()
    assert path.read_bytes() == b""
