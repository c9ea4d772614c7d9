"""Partition tables, file systems and members of volumes, recognised by the magic numbers that they begin or end with.

A reader of our own, because it must also work where the kernel has no block device: on a namespace that a driver in
user space has. `blkid` knows more formats and is asked besides where there is one (`safety`). Offsets and magic numbers
are those of each format's own documentation, named beside them; util-linux's libblkid agrees with them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# Returns ``nbytes`` bytes at an offset; both lie within the device.
Read = Callable[[int, int], bytes]

_HEAD = 320 << 10  # ZFS's first label ends at 256 KiB, reiserfs and others begin at 64 KiB
_TAIL = 128 << 10
_BLOCK_SIZES = (512, 4096)

#: The kind of our own catalogs.
CATALOG = "gpunvme catalog"


@dataclass(frozen=True)
class Signature:
    """What was found, and where.

    ``kind`` is "partition table", "file system", "volume member", "swap area", "encrypted volume" or `CATALOG`.
    """

    kind: str
    name: str
    offset: int

    def __str__(self) -> str:
        text = f"{self.kind} ({self.name})" if self.kind != self.name else self.name
        article = "an" if text[0] in "aeiou" else "a"
        return f"{article} {text}"


# (kind, name, offset, magic). Formats that take more than comparing bytes are recognised below.
_MAGIC = (
    ("file system", "ext2, ext3 or ext4", 0x438, b"\x53\xef"),  # s_magic, Documentation/filesystems/ext4/super.rst
    ("file system", "XFS", 0, b"XFSB"),
    ("file system", "Btrfs", 0x10040, b"_BHRfS_M"),
    ("file system", "bcachefs", 0x1018, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
    ("volume member", "bcache", 0x1018, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    ("file system", "F2FS", 0x400, b"\x10\x20\xf5\xf2"),
    ("file system", "NTFS", 3, b"NTFS    "),
    ("file system", "exFAT", 3, b"EXFAT   "),
    ("file system", "FAT", 0x36, b"FAT12   "),
    ("file system", "FAT", 0x36, b"FAT16   "),
    ("file system", "FAT", 0x52, b"FAT32   "),
    ("file system", "ISO 9660", 0x8001, b"CD001"),
    ("file system", "squashfs", 0, b"hsqs"),
    ("file system", "EROFS", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("file system", "JFS", 0x8000, b"JFS1"),
    ("file system", "ReiserFS", 0x10034, b"ReIsEr"),
    *(("file system", "OCFS2", 1024 << shift, b"OCFSV2") for shift in range(4)),  # in its third block
    ("file system", "GFS2", 0x10000, b"\x01\x16\x19\x70"),
    ("encrypted volume", "LUKS", 0, b"LUKS\xba\xbe"),
    ("encrypted volume", "LUKS", 0x4000, b"SKUL\xba\xbe"),  # LUKS2's second header, where the first is damaged
    ("encrypted volume", "BitLocker", 3, b"-FVE-FS-"),
    ("volume member", "Linux RAID 1.1", 0, b"\xfc\x4e\x2b\xa9"),  # md_p.h, MD_SB_MAGIC a92b4efc
    ("volume member", "Linux RAID 1.2", 4096, b"\xfc\x4e\x2b\xa9"),
    ("volume member", "Ceph BlueStore", 0, b"bluestore block device"),
    *((CATALOG, CATALOG, slot, b"GPUNVMEC") for slot in (0, 64 << 10)),  # docs/catalog-format.md; one of two is enough
)
_ZFS_UBERBLOCK = (0x00BAB10C).to_bytes(8, "little"), (0x00BAB10C).to_bytes(8, "big")


def find_signatures(read: Read, nbytes: int) -> list[Signature]:
    """Return what a device of ``nbytes`` bytes holds, in the order of their offsets; empty if nothing is recognised.

    Parameters
    ----------
    read
        Called for the first 320 KiB and the last 128 KiB of the device.
    nbytes
        Size of the device in bytes.
    """
    head = read(0, min(nbytes, _HEAD)) if nbytes else b""
    tail_at = max(0, nbytes - _TAIL)
    tail = read(tail_at, nbytes - tail_at) if nbytes else b""
    found = [Signature(kind, name, offset) for kind, name, offset, magic in _MAGIC if head[offset:].startswith(magic)]
    for look in (_partition_tables, _lvm, _swap, _zfs):
        found += look(head)
    found += _at_the_end(tail, tail_at, nbytes)
    return sorted(dict.fromkeys(found), key=lambda signature: signature.offset)


def find_signature(read: Read, nbytes: int) -> str:
    """Say what a device holds, as part of a sentence; empty if nothing is recognised. Parameters: `find_signatures`."""
    return in_words(find_signatures(read, nbytes))


def in_words(signatures: Iterable[Signature]) -> str:
    """Say what was found, as part of a sentence."""
    return " and ".join(dict.fromkeys(map(str, signatures)))


def _partition_tables(head: bytes) -> Iterator[Signature]:
    for block in _BLOCK_SIZES:
        if head[block:].startswith(b"EFI PART"):  # UEFI Specification 2.10, section 5.3.2
            yield Signature("partition table", "GPT", block)
    # A boot sector of a file system also ends with 55h AAh: what makes it a table are entries (a type, a length).
    if head[510:512] == b"\x55\xaa":
        entries = (head[at : at + 16] for at in range(446, 510, 16))
        if any(entry[4] and struct.unpack_from("<I", entry, 12)[0] and entry[0] in (0, 0x80) for entry in entries):
            yield Signature("partition table", "MBR", 510)


def _lvm(head: bytes) -> Iterator[Signature]:
    # A label in one of the first four sectors of 512 bytes (LVM2, lib/label/label.h).
    for sector in range(4):
        if head[sector * 512 :].startswith(b"LABELONE"):
            yield Signature("volume member", "LVM", sector * 512)


def _swap(head: bytes) -> Iterator[Signature]:
    # At the end of the first page, whose size is that of the machine which made it (mkswap(8)).
    for page in (4096, 8192, 16384, 65536):
        if head[page - 10 : page] in (b"SWAPSPACE2", b"SWAP-SPACE"):
            yield Signature("swap area", "swap area", page - 10)


def _zfs(head: bytes) -> Iterator[Signature]:
    # The first label's uberblocks, 1 KiB or more each, lie from 128 to 256 KiB (ZFS On-Disk Specification, 1.2).
    for offset in range(128 << 10, min(len(head), 256 << 10), 1024):
        if head[offset : offset + 8] in _ZFS_UBERBLOCK:
            yield Signature("volume member", "ZFS", offset)
            return


def _at_the_end(tail: bytes, start: int, nbytes: int) -> Iterator[Signature]:
    places = [
        # The backup of a GPT whose beginning was overwritten.
        *(("partition table", "GPT, backup", nbytes - block, b"EFI PART") for block in _BLOCK_SIZES),
        # md_p.h: 1.0 lies at least 8 KiB from the end, 0.90 in the last whole 64 KiB.
        ("volume member", "Linux RAID 1.0", ((nbytes // 512 - 16) & ~7) * 512, b"\xfc\x4e\x2b\xa9"),
        ("volume member", "Linux RAID 0.90", (nbytes & ~0xFFFF) - 0x10000, b"\xfc\x4e\x2b\xa9"),
        ("volume member", "Intel RAID", nbytes - 1024, b"Intel Raid ISM Cfg Sig. "),
    ]
    for kind, name, offset, magic in places:
        if offset >= start and tail[offset - start :].startswith(magic):
            yield Signature(kind, name, offset)
