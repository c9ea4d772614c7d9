"""The drives of the guests: which controllers there are, where, and what is on them at first."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import guest

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def blank(path: Path, nbytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(nbytes)
    return path


def partitioned(path: Path, nbytes: int) -> Path:
    """A drive with one partition from 1 MiB to its end (an MBR)."""
    blank(path, nbytes)
    with path.open("r+b") as file:
        file.seek(446)
        sectors = (MIB // 512, (nbytes - MIB) // 512)
        file.write(struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", *sectors))
        file.seek(510)
        file.write(b"\x55\xaa")
    return path


def devices(folder: Path) -> list[str]:
    """QEMU's options for the controllers that the programs in `inside/` expect, with images in a folder."""
    return [
        *guest.nvme("first", "08.0"),
        *guest.namespace(blank(folder / "first1", 64 * MIB), "first1", bus="first", nsid=1),
        *guest.namespace(blank(folder / "first2", 32 * MIB), "first2", bus="first", nsid=2, lba=4096),
        *guest.namespace(blank(folder / "first3", 16 * MIB), "first3", bus="first", nsid=3),
        *guest.nvme("table", "09.0"),
        *guest.namespace(partitioned(folder / "table1", 32 * MIB), "table1", bus="table", nsid=1),
        *guest.nvme("left", "0a.0", multifunction="on"),
        *guest.namespace(blank(folder / "left1", MIB), "left1", bus="left", nsid=1),
        *guest.nvme("right", "0a.1"),
        *guest.namespace(blank(folder / "right1", MIB), "right1", bus="right", nsid=1),
        *guest.nvme("small", "0b.0", mdts=1, max_ioqpairs=1),
        *guest.namespace(blank(folder / "small1", 32 * MIB), "small1", bus="small", nsid=1, lba=4096),
    ]


def behind_iommu(folder: Path) -> list[str]:
    """The same, and an IOMMU."""
    return [*guest.iommu(), *devices(folder)]


def with_slow(folder: Path) -> list[str]:
    """The same, and a controller that takes a while: what was sent to it is still on its way when its driver dies."""
    slow = guest.namespace(blank(folder / "slow1", 32 * MIB), "slow1", bus="slow", nsid=1, iops=30)
    return [*behind_iommu(folder), *guest.nvme("slow", "0c.0"), *slow]


def to_be_accepted(folder: Path) -> list[str]:
    """Behind an IOMMU: an empty drive with memory of its own, one with a partition, one with data, one in use."""
    memory = {"cmb_size_mb": 16, "legacy-cmb": "off"}
    data = blank(folder / "data1", 32 * MIB)
    with data.open("r+b") as file:
        file.seek(11 * MIB + 77)
        file.write(b"x")
    return [
        *guest.iommu(),
        *guest.nvme("PRIVATE0815", "08.0", max_ioqpairs=8, **memory),
        *guest.namespace(blank(folder / "empty", 32 * MIB), "empty", bus="PRIVATE0815", nsid=1),
        *guest.nvme("table", "09.0"),
        *guest.namespace(partitioned(folder / "table1", 32 * MIB), "table1", bus="table", nsid=1),
        *guest.nvme("data", "0a.0"),
        *guest.namespace(data, "data1", bus="data", nsid=1),
    ]


def behind_switch(folder: Path) -> list[str]:
    """A drive and a peer with a controller memory buffer behind one PCIe switch, and a drive that is not."""
    return [
        *("-device", "pcie-root-port,id=root,bus=pcie.0,addr=05.0,chassis=1"),
        *("-device", "x3130-upstream,id=up,bus=root"),
        *("-device", "xio3130-downstream,id=down1,bus=up,chassis=2,slot=1"),
        *("-device", "xio3130-downstream,id=down2,bus=up,chassis=3,slot=2"),
        *guest.nvme("near", "00.0", bus="down1"),
        *guest.namespace(blank(folder / "near1", 256 * MIB), "near1", bus="near", nsid=1),
        *guest.namespace(blank(folder / "near2", 400 * MIB), "near2", bus="near", nsid=2),
        *guest.nvme("peer", "00.0", bus="down2", **{"cmb_size_mb": 64, "legacy-cmb": "off"}),
        *guest.namespace(blank(folder / "peer1", 16 * MIB), "peer1", bus="peer", nsid=1),
        *guest.nvme("far", "09.0"),
        *guest.namespace(blank(folder / "far1", 64 * MIB), "far1", bus="far", nsid=1),
    ]
