"""Files wherever they are: in memory, on stacked file systems, on block devices, with holes, larger than 4 GiB.

O_DIRECT, cachestat and preadv2 mean something else in each of these places; the bytes must not.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import files
import gpunvme
from files import HEATS, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Reads, gathers and writes in a directory; prints what the last large read said.
EVERYTHING = """
import sys
from pathlib import Path
import files, gpunvme
path = Path(sys.argv[1]) / "file"
data = files.make(path, 5 * files.MIB + 321)
for offset, nbytes in ((0, len(data)), (1, 5), (4096, 4096), (511, 3 * files.MIB), (len(data) - 9, 9)):
    for _ in range(2):
        with gpunvme.open(path) as file:
            assert file.read(offset, nbytes).numpy().tobytes() == data[offset : offset + nbytes], (offset, nbytes)
with gpunvme.open(path, "r+") as file:
    offsets = list(range(len(data) - 100, 0, -997))
    expected = b"".join(data[offset : offset + 100] for offset in offsets)
    assert file.gather(offsets, 100).numpy().tobytes() == expected
    new = files.contents(3 * files.MIB + 7, seed=2)
    file.write_from(new, 4000)
    data = data[:4000] + new + data[4000 + len(new) :]
    file.write_from(b"end", len(data) + 10)
    data += bytes(10) + b"end"
    assert path.read_bytes() == data
    assert file.read().numpy().tobytes() == data
    print(file.explain().verdicts[0].reason)
    print(file.last_transfer.reason)
    print(file.last_transfer.cached_bytes, file.last_transfer.direct_bytes, file.last_transfer.buffered_bytes)
    file.write_from(data[::-1], atomic=True)
assert path.read_bytes() == data[::-1]
"""


@pytest.fixture
def in_memory() -> Iterator[Path]:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    directory = tempfile.mkdtemp(dir="/dev/shm", prefix="gpunvme-")
    yield Path(directory)
    shutil.rmtree(directory)


def test_tmpfs(in_memory: Path) -> None:
    """All of it is cached, and a report that spoke of a drive would be a lie."""
    explained, reason, counts = files.output(EVERYTHING, in_memory).splitlines()
    assert "in memory" in explained
    assert "O_DIRECT" not in reason
    assert counts == f"{5 * MIB + 321 + 13} 0 0"


def test_a_little_of_a_file_in_memory_is_copied_at_once(in_memory: Path) -> None:
    """As a transfer it takes four times the processor's time."""
    data = files.make(in_memory / "file", 100_000)
    with gpunvme.open(in_memory / "file") as file:
        assert file.read(1001, 4096).numpy().tobytes() == data[1001:5097]
        assert file.last_transfer is not None
        assert "by the calling thread" in file.last_transfer.reason


def test_holes_in_tmpfs_are_zeros(in_memory: Path) -> None:
    path = in_memory / "sparse"
    with path.open("wb") as sparse:
        sparse.truncate(3 * MIB)
        sparse.seek(MIB)
        sparse.write(b"x")
    with gpunvme.open(path) as file:
        assert file.read().numpy().tobytes() == path.read_bytes()
        assert file.gather([MIB, 2 * MIB], 100_000).numpy().tobytes() == b"x".ljust(200_000, b"\0")


def test_a_file_without_a_name(in_memory: Path) -> None:
    fd = os.memfd_create("nameless")
    try:
        os.write(fd, files.contents(MIB))
        with gpunvme.open(fd, "r+") as file:
            file.write_from(b"abc", MIB)
            assert file.read().numpy().tobytes() == files.contents(MIB) + b"abc"
    finally:
        os.close(fd)


@pytest.mark.parametrize("heat", HEATS)
def test_sparse_files(tmp_path: Path, heat: str) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as sparse:
        sparse.truncate(40 * MIB + 5)
        for offset in (3, 5 * MIB, 20 * MIB + 123):
            sparse.seek(offset)
            sparse.write(b"something")
    files.heat(path, heat)
    expected = path.read_bytes() if heat == "hot" else None
    with gpunvme.open(path) as file:
        found = file.read().numpy()
    assert found.tobytes() == (expected or path.read_bytes())
    assert found[20 * MIB + 123 :][:9].tobytes() == b"something"


CANNOT_MOUNT = 77
ON = """
set -e
mkdir "$1/lower" "$1/upper" "$1/merged"
{mount}
exec "$2" -X faulthandler -c "$3" "$1/merged"
"""


def mounted(mount: str, directory: Path) -> str:
    """Run `EVERYTHING` on a file system that only that process sees; what it prints."""
    files.need_mounts()
    script = ON.format(mount=mount)
    child = files.run([*files.PRIVATE_MOUNTS, "sh", "-c", script, "sh", directory, sys.executable, EVERYTHING])
    if child.returncode == CANNOT_MOUNT:
        pytest.skip(f"this cannot be mounted here: {child.stderr.strip()}")
    return files.ended_well(child)


def test_overlayfs(tmp_path: Path) -> None:
    """What containers have."""
    (tmp_path / "work").mkdir()
    options = 'lowerdir="$1/lower",upperdir="$1/upper",workdir="$1/work"'
    out = mounted(f'mount -t overlay -o {options} overlay "$1/merged" || exit 77', tmp_path)
    assert "page cache" in out


def test_overlayfs_over_tmpfs(tmp_path: Path) -> None:
    """What containers have where their images are in memory: O_DIRECT may open and then fail."""
    mount = 'mount -t tmpfs none "$1/upper"; mkdir "$1/upper/u" "$1/upper/w"; '
    options = 'lowerdir="$1/lower",upperdir="$1/upper/u",workdir="$1/upper/w"'
    mounted(f'{mount} mount -t overlay -o {options} overlay "$1/merged" || exit 77', tmp_path)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "ext2", "vfat", "f2fs"])
def test_other_file_systems(tmp_path: Path, kind: str) -> None:
    """Each in a file on a loop device. Their alignments, holes and inline files differ."""
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    image = tmp_path / "image"
    with image.open("wb") as sparse:
        sparse.truncate((320 if kind == "xfs" else 128) * MIB)
    make = f'mkfs.{kind} "$1/image" >/dev/null 2>&1 && mount -o loop "$1/image" "$1/merged" || exit 77'
    mounted(make, tmp_path)


def test_a_block_device(tmp_path: Path) -> None:
    image = tmp_path / "image"
    data = files.make(image, 4 * MIB)
    with files.loop_device(image) as device, gpunvme.open(device) as file:
        assert file.size == 4 * MIB
        for offset, nbytes in ((0, 4 * MIB), (1, 1), (511, 2 * MIB + 3), (4 * MIB - 1, 1)):
            assert file.read(offset, nbytes).numpy().tobytes() == data[offset : offset + nbytes]
        assert file.gather([5, 4096, 3 * MIB], 600).numpy().tobytes() == b"".join(
            data[offset : offset + 600] for offset in (5, 4096, 3 * MIB)
        )
        with pytest.raises(gpunvme.RangeError, match=str(4 * MIB)):
            file.read(4 * MIB, 1)
        for source in (device, file.fileno()):
            for mode in ("r+", "w"):
                with pytest.raises(gpunvme.FileError, match=r"block devices|reading and writing"):
                    gpunvme.open(source, mode)
    assert image.read_bytes() == data


def memory_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 0


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    places = [0, (1 << 32) - 5, (1 << 32) + 7, (9 << 30) - 9]
    with path.open("wb") as sparse:
        sparse.truncate(9 << 30)
        for place in places:
            sparse.seek(place)
            sparse.write(b"%09d" % (place % 10**9))
    with gpunvme.open(path, "r+") as file:
        for place in places:
            assert file.read(place, 9).numpy().tobytes() == b"%09d" % (place % 10**9)
        found = file.gather(places, 9).numpy().tobytes()
        assert found == b"".join(b"%09d" % (place % 10**9) for place in places)
        around = file.read((1 << 32) - 3 * MIB, 6 * MIB).numpy()
        assert around[3 * MIB - 5 :][:9].tobytes() == b"294967291"
        file.write_from(b"written", (5 << 30) + 1)
        assert file.read(5 << 30, 9).numpy().tobytes() == b"\0written\0"


@pytest.mark.slow
def test_a_read_of_more_than_4_gib(tmp_path: Path) -> None:
    size = (4 << 30) + 3 * MIB + 5
    if memory_available() < 3 * size:
        pytest.skip(f"{memory_available() >> 30} GiB of memory are available, too little for this")
    path = tmp_path / "sparse"
    with path.open("wb") as sparse:
        sparse.truncate(size)
        for place in (1, (1 << 32) - 2, size - 4):
            sparse.seek(place)
            sparse.write(b"here")
    with gpunvme.open(path) as file:
        found = file.read().numpy()
    assert found.nbytes == size
    assert np.count_nonzero(found) == 12
    for place in (1, (1 << 32) - 2, size - 4):
        assert found[place : place + 4].tobytes() == b"here"
