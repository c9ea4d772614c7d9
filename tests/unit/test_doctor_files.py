"""Where a file lies: mounts, drives and extents, as `gpunvme info` and `gpunvme doctor` tell them."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from gpunvme.doctor.block_device import device_of_mount
from gpunvme.doctor.extents import Extent, Layout, layout, parse_extents, summarize
from gpunvme.doctor.mounts import mount_of, parse_mountinfo, real_mount_of
from gpunvme.doctor.probes import native_probes
from gpunvme.doctor.system import System

if TYPE_CHECKING:
    from pathlib import Path

MOUNTINFO = """\
22 30 0:21 / /proc rw,nosuid shared:12 - proc proc rw
30 1 259:2 / / rw,relatime shared:1 master:2 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro
40 30 253:1 / /data rw,noatime - xfs /dev/mapper/vg-data rw,attr2
41 30 0:60 / /data/with\\040blank rw - tmpfs tmpfs rw,size=1k
a line that makes no sense
"""


def test_longest_mount_point_wins() -> None:
    mounts = parse_mountinfo(MOUNTINFO)
    assert len(mounts) == 4
    found = {name: mount_of(name, mounts) for name in ("/data/x", "/database", "/data/with blank/x")}
    assert {name: mount and mount.kind for name, mount in found.items()} == {
        "/data/x": "xfs",
        "/database": "ext4",  # not beneath /data, although it starts alike
        "/data/with blank/x": "tmpfs",
    }


def test_kernel_number_beats_the_name() -> None:
    mount = mount_of("/data/x", parse_mountinfo(MOUNTINFO), mount_id=30)
    assert mount is not None
    assert mount.mount_point == "/"


def test_later_mount_hides_the_earlier_one() -> None:
    twice = "1 0 0:1 / /x rw - tmpfs first rw\n2 0 0:2 / /x rw - ext4 second rw"
    mount = mount_of("/x/file", parse_mountinfo(twice))
    assert mount is not None
    assert mount.source == "second"


def test_mount_of_a_real_file(tmp_path: Path) -> None:
    with open("/proc/self/mountinfo") as text:
        mount = real_mount_of(str(tmp_path), text.read())
    assert mount is not None
    assert str(tmp_path).startswith(mount.mount_point)


def test_volume_leads_to_its_drives(tmp_path: Path) -> None:
    # A user wants the drive's model, not the name of the volume above it.
    volume = tmp_path / "sys/devices/virtual/block/dm-1"
    drive = tmp_path / "sys/devices/pci/nvme/nvme0/nvme0n1"
    for folder in (volume / "dm", volume / "slaves", drive / "queue", drive / "nvme0n1p3"):
        folder.mkdir(parents=True)
    (volume / "dm/name").write_text("vg-data\n")
    (drive / "nvme0n1p3/partition").write_text("3\n")
    (drive / "queue/rotational").write_text("0\n")
    (drive / "queue/scheduler").write_text("none [mq-deadline]\n")
    (drive / "queue/logical_block_size").write_text("512\n")
    (drive / "device").symlink_to("..")
    (drive.parent / "model").write_text("Fast Drive  \n")
    (tmp_path / "sys/class/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/class/block/dm-1").symlink_to("../../devices/virtual/block/dm-1")
    (tmp_path / "sys/class/block/nvme0n1p3").symlink_to("../../devices/pci/nvme/nvme0/nvme0n1/nvme0n1p3")
    (tmp_path / "sys/class/block/nvme0n1").symlink_to("../../devices/pci/nvme/nvme0/nvme0n1")
    (tmp_path / "sys/dev/block/253:1").symlink_to("../../devices/virtual/block/dm-1")
    (volume / "slaves/nvme0n1p3").symlink_to("../../../../pci/nvme/nvme0/nvme0n1/nvme0n1p3")
    mount = mount_of("/data", parse_mountinfo(MOUNTINFO))
    assert mount is not None
    device = device_of_mount(System(tmp_path, native_probes()), mount)
    assert device is not None
    assert (device.name, device.model) == ("dm-1", "vg-data")
    (bottom,) = device.drives()
    assert (bottom.name, bottom.model, bottom.rotational) == ("nvme0n1", "Fast Drive", False)
    assert (bottom.scheduler, bottom.logical_block_size) == ("mq-deadline", 512)


def test_extents_as_the_kernel_writes_them() -> None:
    reply = struct.pack("=QQIIII", 0, 2**64 - 1, 0, 2, 512, 0)
    reply += struct.pack("=QQQ2QI3I", 0, 8192, 4096, 0, 0, 0, 0, 0, 0)
    reply += struct.pack("=QQQ2QI3I", 8192, 12288, 4096, 0, 0, 0x801, 0, 0, 0)
    assert parse_extents(reply) == [Extent(0, 8192, 4096, 0), Extent(8192, 12288, 4096, 0x801)]


def test_sum_of_extents_counts_holes_and_joins_neighbours() -> None:
    extents = [
        Extent(0, 4096, 4096, 0),
        Extent(4096, 8192, 4096, 0x2000),  # right behind the first on the drive: one run
        Extent(16384, 65536, 8192, 0x800),  # behind a hole of 8 KiB
        Extent(24576, 90112, 4096, 0x1),  # reaches past the end of the file
    ]
    assert summarize(extents, 26000) == Layout(
        extents=4,
        runs=3,
        hole_bytes=8192,
        unwritten_bytes=8192,
        shared_bytes=4096,
        encoded_bytes=0,
        inline_bytes=0,
        delayed_bytes=0,
    )


def test_layout_of_a_real_file_or_the_reason(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
        told = layout(file.fileno())
    if isinstance(told, str):
        assert "extents" in told
    else:
        assert told.extents == 1
        assert told.hole_bytes == (1 << 20) - 4096


def test_layout_refused_is_said_in_words() -> None:
    with open("/proc/self/mountinfo") as file:
        assert isinstance(layout(file.fileno()), str)
