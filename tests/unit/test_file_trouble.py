"""Files that change, vanish or do not fit while bytes move: an error that says so, never a crash or half a file."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import files
import gpunvme
from files import HEATS, MIB

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 8 * MIB + 100


@pytest.mark.parametrize("heat", HEATS)
@pytest.mark.parametrize("left", [0, 1, 4096, 3 * MIB + 17, SIZE - 1])
def test_a_file_cut_off_after_it_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heat: str, left: int
) -> None:
    """What the file has left arrives or not; that it ended is always said, with the place."""
    path = tmp_path / "file"
    data = files.make(path, SIZE)
    files.heat(path, heat)
    with gpunvme.open(path) as file:
        monkeypatch.setattr(gpunvme.File, "size", SIZE)  # as if the file were cut off between check and read
        os.truncate(path, left)
        for read in (
            file.read,
            lambda: file.read_into(bytearray(SIZE - 5), 5),
            lambda: file.gather([0, SIZE - 1000], 1000),
            lambda: file.gather(SIZE - np.arange(64, SIZE, 64), 64),
            lambda: gpunvme.read_many([(file, 0, bytearray(SIZE))]),
        ):
            with pytest.raises(gpunvme.TruncatedError, match="ended before") as caught:
                read()
            assert caught.value.filename == str(path)
            assert caught.value.offset is not None
            assert 0 <= caught.value.offset <= SIZE
        if left:
            assert file.read(0, 1).numpy().tobytes() == data[:1]


def test_a_file_cut_off_again_and_again_while_it_is_read(tmp_path: Path) -> None:
    """Through its mapping too, where the kernel answers with SIGBUS."""
    path = tmp_path / "file"
    data = files.make(path, SIZE)
    expected = np.frombuffer(data, np.uint8)
    offsets = np.arange(0, SIZE - 64, 64)
    ended = threading.Event()

    def cut() -> None:
        while not ended.is_set():
            os.truncate(path, SIZE // 2)
            with path.open("r+b") as again:
                again.seek(SIZE // 2)
                again.write(data[SIZE // 2 :])

    cutter = threading.Thread(target=cut)
    cutter.start()
    counts = {"whole": 0, "truncated": 0}
    try:
        with gpunvme.open(path) as file:
            for number in range(60):
                try:
                    if number % 2:
                        found = file.gather(offsets, 64).numpy().reshape(-1)
                    else:
                        found = file.read(0, len(offsets) * 64).numpy()
                except (gpunvme.TruncatedError, gpunvme.RangeError):
                    counts["truncated"] += 1
                else:
                    counts["whole"] += 1
                    # What was read as the file grew back may be zeros. Nothing else.
                    wrong = found != expected[: len(found)]
                    assert not found[wrong].any()
    finally:
        ended.set()
        cutter.join()
    assert sum(counts.values()) == 60


@pytest.mark.parametrize("heat", HEATS)
def test_a_file_removed_while_it_is_open(tmp_path: Path, heat: str) -> None:
    path = tmp_path / "file"
    data = files.make(path, SIZE)
    files.heat(path, heat)
    with gpunvme.open(path) as file:
        path.unlink()
        assert file.read().numpy().tobytes() == data


@pytest.mark.parametrize("heat", ["cold", "hot"])
def test_a_file_closed_while_it_is_read(tmp_path: Path, heat: str) -> None:
    path = tmp_path / "file"
    data = files.make(path, SIZE)
    files.heat(path, heat)
    destination = bytearray(SIZE)
    with gpunvme.open(path) as file:
        transfer = file.read_into(destination, wait=False)
    transfer.wait()
    assert destination == data


IN_LITTLE_ROOM = """
import errno, os, sys
from pathlib import Path
import files, gpunvme
room = Path(sys.argv[1])
free = lambda: os.statvfs(room).f_bavail * os.statvfs(room).f_frsize

def refused(call, *names):
    try:
        call()
    except gpunvme.FileError as error:
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC, error
        assert error.filename == str(room / names[0]), error.filename
    else:
        raise SystemExit("written")
    assert sorted(os.listdir(room)) == sorted({*names, *kept}), os.listdir(room)

kept = {name for name in os.listdir(room)}
old = files.make(room / "old", 100_000)
large = files.contents(files.MIB * 12)
with gpunvme.open(room / "old", "r+") as file:
    before = free()
    for offset in (0, 5, 100_000, 99_999, 200_000):
        for options in ({}, {"wait": False}, {"fsync": True}):
            refused(lambda: file.write_from(large, offset, **options).wait(), "old")
            assert (room / "old").read_bytes() == old, (offset, options)
            assert file.size == len(old)
    refused(lambda: file.write_from(large, atomic=True), "old")
    assert (room / "old").read_bytes() == old
    assert free() > before - 65536, (free(), before)  # but for what the file system keeps of its own
    file.write_from(large[: files.MIB], 7)  # there is room for this
    assert (room / "old").read_bytes() == old[:7] + large[: files.MIB]
with gpunvme.open(room / "new", "w") as file:
    refused(lambda: file.write_from(large), "new", "old")
    assert file.size == 0
    refused(lambda: file.write_from(large, wait=False).wait(), "new", "old")
    assert file.size == 0
print("ended")
"""


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk(tmp_path: Path, kind: str) -> None:
    """An existing file keeps its bytes and its size, and the disk is not left full."""
    files.need_mounts()
    room, image = tmp_path / "room", tmp_path / "image"
    room.mkdir()
    with image.open("wb") as sparse:
        sparse.truncate(9 * MIB)
    mount = {
        "tmpfs": 'mount -t tmpfs -o size=8m none "$1" || exit 77',
        "ext4": 'mkfs.ext4 -q -O ^has_journal "$2" && mount -o loop "$2" "$1" || exit 77',
    }[kind]
    script = f'{mount}; exec "$3" -X faulthandler -c "$4" "$1"'
    child = files.run([*files.PRIVATE_MOUNTS, "sh", "-c", script, "sh", room, image, sys.executable, IN_LITTLE_ROOM])
    if child.returncode == 77:
        pytest.skip(f"this cannot be mounted here: {child.stderr.strip()}")
    assert files.ended_well(child) == "ended\n"


NO_LARGER_THAN_3_MIB = """
import errno, resource, signal, sys
from pathlib import Path
import files, gpunvme
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 * files.MIB, 3 * files.MIB))
path = Path(sys.argv[1])
with gpunvme.open(path, "r+") as file:
    for wait in (True, False):
        try:
            file.write_from(bytes(5 * files.MIB), 0, wait=wait).wait()
        except gpunvme.FileError as error:
            assert error.errno == errno.EFBIG, error
        else:
            raise SystemExit("written")
        assert path.read_bytes() == b"old"
"""


def test_a_file_that_may_not_grow_so_large(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    files.output(NO_LARGER_THAN_3_MIB, tmp_path / "file")


class RefusedError(Exception):
    pass


def test_a_write_cut_short_leaves_the_old_size(tmp_path: Path) -> None:
    """A file that grew and was not filled would look complete to whoever looks at its size."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(done: int, total: int) -> None:
        raise RefusedError

    with gpunvme.open(path, "r+") as file:
        with pytest.raises(RefusedError):
            file.write_from(bytes(64 * MIB), 3, progress=fail)
        assert file.size in (3, 3 + 64 * MIB)  # the last call comes when all is written
        with pytest.raises(gpunvme.DeadlineExceeded):
            file.write_from(bytes(64 * MIB), 3 + 64 * MIB, timeout=0.0)
        assert file.size in (3, 3 + 64 * MIB)
        transfer = file.write_from(bytes(64 * MIB), 200 * MIB, wait=False)
        transfer.cancel()
        try:
            transfer.wait()
        except gpunvme.Cancelled:
            assert file.size in (3, 3 + 64 * MIB)
        else:
            assert file.size == 264 * MIB
