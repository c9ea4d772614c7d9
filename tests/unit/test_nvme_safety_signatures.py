"""What lies on a namespace is recognised by its bytes alone, wherever they are read from.

A format that is missed here is a file system that is written over without a word.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpunvme
from gpunvme.nvme.signatures import find_signature, find_signatures

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 4 << 20
END = SIZE


def found_on(data: bytes) -> str:
    def read(offset: int, nbytes: int) -> bytes:
        assert offset >= 0
        assert offset + nbytes <= len(data)
        return bytes(data[offset : offset + nbytes])

    return find_signature(read, len(data))


def with_bytes(*places: tuple[int, bytes], nbytes: int = SIZE) -> bytes:
    data = bytearray(nbytes)
    for offset, text in places:
        data[offset : offset + len(text)] = text
    return bytes(data)


MD = b"\xfc\x4e\x2b\xa9"
MBR = (446, b"\x80" + bytes(3) + b"\x83" + bytes(3) + b"\0\x08\0\0" + b"\0\x10\0\0")


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([(512, b"EFI PART")], "a partition table (GPT)"),
        ([(4096, b"EFI PART")], "a partition table (GPT)"),
        ([(END - 512, b"EFI PART")], "a partition table (GPT, backup)"),
        ([(END - 4096, b"EFI PART")], "a partition table (GPT, backup)"),
        ([MBR, (510, b"\x55\xaa")], "a partition table (MBR)"),
        ([(0x438, b"\x53\xef")], "a file system (ext2, ext3 or ext4)"),
        ([(0, b"XFSB")], "a file system (XFS)"),
        ([(0x10040, b"_BHRfS_M")], "a file system (Btrfs)"),
        ([(0x400, b"\x10\x20\xf5\xf2")], "a file system (F2FS)"),
        ([(3, b"NTFS    ")], "a file system (NTFS)"),
        ([(0x52, b"FAT32   ")], "a file system (FAT)"),
        ([(0x8001, b"CD001")], "a file system (ISO 9660)"),
        ([(0x1018, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"))], "a file system (bcachefs)"),
        ([(0x1018, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"))], "a volume member (bcache)"),
        ([(512, b"LABELONE")], "a volume member (LVM)"),
        ([(1536, b"LABELONE")], "a volume member (LVM)"),
        ([(0, MD)], "a volume member (Linux RAID 1.1)"),
        ([(4096, MD)], "a volume member (Linux RAID 1.2)"),
        ([(END - 8192, MD)], "a volume member (Linux RAID 1.0)"),
        ([(END - 65536, MD)], "a volume member (Linux RAID 0.90)"),
        ([(END - 1024, b"Intel Raid ISM Cfg Sig. 1.0")], "a volume member (Intel RAID)"),
        ([(0, b"LUKS\xba\xbe\0\2")], "an encrypted volume (LUKS)"),
        ([(0x4000, b"SKUL\xba\xbe")], "an encrypted volume (LUKS)"),
        ([(4086, b"SWAPSPACE2")], "a swap area"),
        ([(65526, b"SWAPSPACE2")], "a swap area"),
        ([(128 << 10, bytes.fromhex("0cb1ba0000000000"))], "a volume member (ZFS)"),
        ([(200 << 10, bytes.fromhex("0000000000bab10c"))], "a volume member (ZFS)"),
        ([(0, b"bluestore block device\n")], "a volume member (Ceph BlueStore)"),
        ([(0, b"GPUNVMEC")], "a gpunvme catalog"),
        ([(65536, b"GPUNVMEC")], "a gpunvme catalog"),
        ([(0, b"GPUNVMEC"), (65536, b"GPUNVMEC")], "a gpunvme catalog"),
        ([(512, b"EFI PART"), (4096, MD)], "a partition table (GPT) and a volume member (Linux RAID 1.2)"),
    ],
)
def test_magic_numbers(places: list[tuple[int, bytes]], words: str) -> None:
    assert found_on(with_bytes(*places)) == words


def test_nothing_is_found_on_nothing() -> None:
    assert found_on(bytes(SIZE)) == ""
    assert found_on(b"") == ""


def test_boot_sector_without_partitions_is_no_table() -> None:
    assert found_on(with_bytes((510, b"\x55\xaa"))) == ""


@given(st.binary(max_size=2000), st.integers(0, 400 << 10))
def test_any_size_and_content_is_read_within_bounds(data: bytes, nbytes: int) -> None:
    found_on(data)
    whole = bytearray(nbytes)
    whole[: len(data)] = data[:nbytes]
    found_on(bytes(whole))


@pytest.mark.parametrize("nbytes", [4096, 64 << 10, 1 << 20])
def test_small_devices_are_read_to_their_end(nbytes: int) -> None:
    assert "backup" in found_on(with_bytes((nbytes - 512, b"EFI PART"), nbytes=nbytes))


def test_offsets_are_told_in_order() -> None:
    data = with_bytes((4096, MD), (512, b"EFI PART"), (END - 512, b"EFI PART"))
    found = find_signatures(lambda offset, nbytes: data[offset : offset + nbytes], SIZE)
    assert [each.offset for each in found] == [512, 4096, END - 512]


def test_catalogs_of_every_generation(tmp_path: Path) -> None:
    """Whichever of its two superblocks is there."""
    with gpunvme.Catalog.create(tmp_path / "catalog") as catalog:
        for _ in range(3):
            assert found_on((tmp_path / "catalog").read_bytes()) == "a gpunvme catalog"
            catalog.add(None, b"more")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["mkfs.ext4", "-q", "-F"], "ext4"),
        (["mkswap", "-q"], "swap"),
    ],
)
def test_what_the_real_programs_make(tmp_path: Path, command: list[str], word: str) -> None:
    program = shutil.which(command[0], path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    made = subprocess.run([program, *command[1:], image], capture_output=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    with image.open("rb") as file:

        def read(offset: int, nbytes: int) -> bytes:
            file.seek(offset)
            return file.read(nbytes)

        assert word in find_signature(read, 512 << 20)
