"""Which drives `gpunvme accept` leaves alone: if these fail, somebody's data is written over."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

import gpunvme
from gpunvme.accept.drive import Drive, look_at
from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme.sysfs import Machine
from nvme_machine import BDF, MIB, Tree, simple

SIZE = 64 * MIB


def empty(root: Path, nbytes: int = SIZE) -> Tree:
    """A machine whose drive holds nothing but zeros."""
    tree = simple(root, b"")
    add(tree, "nvme0n1", nbytes)
    return tree


def add(tree: Tree, name: str, nbytes: int) -> None:
    with tree.path(f"/dev/{name}").open("wb") as disk:
        disk.truncate(nbytes)
    tree.file(f"/sys/class/block/{name}/size", str(nbytes // 512))


def put(tree: Tree, offset: int, data: bytes, name: str = "nvme0n1") -> None:
    with tree.path(f"/dev/{name}").open("r+b") as disk:
        disk.seek(offset)
        disk.write(data)


def look(tree: Tree, erase: str | None = BDF) -> Drive:
    return look_at("01:00.0", erase, Machine(tree.root))


def refusal(tree: Tree, erase: str | None = BDF) -> str:
    with pytest.raises(UnsafeDeviceError) as caught:
        look(tree, erase)
    return str(caught.value)


def test_an_empty_drive_is_taken_and_its_ends_are_not_written(tmp_path: Path) -> None:
    drive = look(empty(tmp_path))
    assert (drive.address, drive.nsid, drive.nbytes, drive.block_size) == (BDF, 1, SIZE, 512)
    assert drive.area >= 8 * MIB
    assert drive.area % MIB == drive.area_nbytes % MIB == drive.far % MIB == 0
    assert drive.area_nbytes == 8 * MIB
    assert drive.area + drive.area_nbytes <= drive.far <= SIZE - 8 * MIB


def mbr() -> bytes:
    return (
        bytes(446)
        + struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", 2048, 4096)
        + bytes(48)
        + b"\x55\xaa"
    )


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (0, mbr(), "partition table (MBR)"),
        (512, b"EFI PART", "partition table (GPT)"),
        (SIZE - 512, b"EFI PART", "GPT, backup"),
        (0, b"XFSB", "file system (XFS)"),
        (0x438, b"\x53\xef", "ext2, ext3 or ext4"),
        (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID 1.2"),
        (512, b"LABELONE", "volume member (LVM)"),
        (128 << 10, (0x00BAB10C).to_bytes(8, "little"), "volume member (ZFS)"),
        (0, b"LUKS\xba\xbe", "encrypted volume (LUKS)"),
        (4086, b"SWAPSPACE2", "swap area"),
    ],
)
def test_what_has_a_signature_is_left_alone_whatever_is_said(
    tmp_path: Path, offset: int, data: bytes, said: str
) -> None:
    tree = empty(tmp_path)
    put(tree, offset, data)
    text = refusal(tree)
    assert said in text
    assert "--erase" not in text, "no word helps, and none is offered"


def test_a_catalog_of_ours_is_left_alone(tmp_path: Path) -> None:
    tree = empty(tmp_path)
    with gpunvme.Catalog.create(str(tree.path("/dev/nvme0n1"))):
        pass
    assert "holds data at byte" in refusal(tree)


def test_data_where_it_would_be_written_is_left_alone(tmp_path: Path) -> None:
    tree = empty(tmp_path)
    drive = look(tree)
    for start, nbytes in ((drive.area, drive.area_nbytes), (drive.far, MIB), (0, MIB), (SIZE - MIB, MIB)):
        for offset in (start, start + random.randrange(nbytes), start + nbytes - 1):
            put(tree, offset, b"\x01")
            assert f"holds data at byte {offset}" in refusal(tree)
            put(tree, offset, b"\x00")
    look(tree)


def test_data_elsewhere_is_found_by_samples(tmp_path: Path) -> None:
    tree = empty(tmp_path)
    put(tree, 20 * MIB, b"\xff" * (256 << 10))
    assert "holds data at byte" in refusal(tree)


def test_every_namespace_has_to_be_empty(tmp_path: Path) -> None:
    tree = empty(tmp_path)
    tree.controller(entries=("nvme0n1", "nvme0n2"))
    tree.block("nvme0n2", "259:1", b"", nsid=2)
    add(tree, "nvme0n2", SIZE)
    look(tree)
    put(tree, 3, b"x", "nvme0n2")
    assert "nvme0n2 is left alone" in refusal(tree)


def test_what_is_in_use_is_left_alone(tmp_path: Path) -> None:
    tree = empty(tmp_path)
    tree.mounts("40 1 259:0 / /home rw - ext4 /dev/nvme0n1 rw")
    assert "mounted at /home" in refusal(tree)
    tree.mounts()
    tree.file("/proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1 partition 1 0 -2")
    assert "is used as swap" in refusal(tree)
    tree.file("/proc/swaps", "")
    tree.holder("nvme0n1", "md0")
    tree.file("/sys/class/block/md0/md/level", "raid1")
    assert "is part of the RAID" in refusal(tree)


def test_a_drive_that_a_process_has_open_is_left_alone(tmp_path: Path) -> None:
    tree = empty(tmp_path)
    tree.process(77, "dd", "/dev/nvme0n1")
    assert "is open in process 77 (dd)" in refusal(tree)


def test_without_its_address_nothing_is_written(tmp_path: Path) -> None:
    tree = empty(tmp_path)
    assert f"--erase {BDF}" in refusal(tree, None)
    # Short, or another one's: typed by hand it is the whole address.
    for word in ("01:00.0", "0000:02:00.0", "yes"):
        assert f"'{word}' is not it" in refusal(tree, word)


def test_a_drive_that_the_kernel_cannot_look_at_is_left_alone(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.pci(driver="vfio-pci")
    assert "is with vfio-pci" in refusal(tree)
    assert f"gpunvme nvme unbind {BDF}" in refusal(tree)
    (tmp_path / "other").mkdir()
    tree = Tree(tmp_path / "other")
    tree.pci(driver=None)
    assert "is with no driver" in refusal(tree)


def test_a_drive_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"no namespace of 32\.0 MiB or more"):
        look(empty(tmp_path, 16 * MIB))


def test_looking_writes_nothing(tmp_path: Path) -> None:
    tree = empty(tmp_path)
    os.chmod(tree.path("/dev/nvme0n1"), 0o400)
    before = os.stat(tree.path("/dev/nvme0n1"))
    look(tree)
    after = os.stat(tree.path("/dev/nvme0n1"))
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
