"""Which controllers are left alone, and what is said about it: machines written by the test.

If one of these fails, somebody's file system is written over.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme.safety import Claim, check_safe
from gpunvme.nvme.sysfs import Machine
from nvme_machine import BDF, MIB, Tree, simple

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def ext4(nbytes: int = MIB) -> bytes:
    data = bytearray(nbytes)
    data[0x438:0x43A] = b"\x53\xef"
    return bytes(data)


def said_about(root: Path, overwrite: str | None = None) -> str:
    with pytest.raises(UnsafeDeviceError) as caught:
        check_safe(BDF, overwrite, Machine(root))
    return str(caught.value)


def test_unused_empty_drive_is_safe(tmp_path: Path) -> None:
    simple(tmp_path).process(7, "sh", "/dev/null", "socket:[1]")
    check_safe(BDF, machine=Machine(tmp_path))


def test_controller_without_namespaces_is_safe(tmp_path: Path) -> None:
    Tree(tmp_path).pci(driver="vfio-pci")
    check_safe(BDF, machine=Machine(tmp_path))


# --- in use: no word helps


def mounted(tree: Tree) -> None:
    tree.mounts("40 1 259:0 / /data\\040disk rw - ext4 /dev/nvme0n1 rw")


def partition_mounted(tree: Tree) -> None:
    tree.partition("nvme0n1", "nvme0n1p2", "259:2")
    tree.mounts("40 1 259:2 / /home rw,relatime shared:1 - xfs /dev/nvme0n1p2 rw")


def volume_mounted(tree: Tree) -> None:
    tree.partition("nvme0n1", "nvme0n1p2", "259:2")
    tree.block("dm-3", "253:3")
    tree.file("/sys/class/block/dm-3/dm/name", "vg-home")
    tree.holder("nvme0n1p2", "dm-3")
    tree.mounts("40 1 253:3 / /home rw - ext4 /dev/mapper/vg-home rw")


def volume_active(tree: Tree) -> None:
    tree.block("dm-3", "253:3")
    tree.file("/sys/class/block/dm-3/dm/name", "vg-home")
    tree.holder("nvme0n1", "dm-3")


def raid_member(tree: Tree) -> None:
    tree.block("md127", "9:127")
    tree.folder("/sys/class/block/md127/md")
    tree.holder("nvme0n1", "md127")


def swap(tree: Tree) -> None:
    tree.partition("nvme0n1", "nvme0n1p3", "259:3")
    tree.file("/proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1p3 partition 1 0 -2")


def swap_volume(tree: Tree) -> None:
    volume_active(tree)
    tree.file("/proc/swaps", "Filename Type Size Used Priority\n/dev/mapper/vg-home partition 1 0 -2")


def btrfs(tree: Tree) -> None:
    # Its own device number; its source names this drive.
    tree.mounts("40 1 0:35 /@ /srv rw - btrfs /dev/nvme0n1 rw")


def btrfs_second_device(tree: Tree) -> None:
    tree.mounts("40 1 0:35 /@ /srv rw - btrfs /dev/sda rw")
    tree.folder("/sys/fs/btrfs/1111-2222/devices/nvme0n1")


def root_is_on_it(tree: Tree) -> None:
    tree.partition("nvme0n1", "nvme0n1p2", "259:2")
    tree.mounts("30 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw", "31 1 259:2 /var /snap rw - ext4 /dev/nvme0n1p2 rw")


def efi_is_on_it(tree: Tree) -> None:
    tree.partition("nvme0n1", "nvme0n1p1", "259:1")
    tree.mounts("30 1 259:1 / /boot/efi rw - vfat /dev/nvme0n1p1 rw")


def mounted_in_a_container(tree: Tree) -> None:
    tree.process(900, "postgres", mounts="mnt:[2]")
    tree.mounts("40 1 259:0 / /var/lib/data rw - ext4 /dev/nvme0n1 rw", process="900")


@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (mounted, ["nvme0n1 is mounted at /data disk (ext4)", "umount /data disk"]),
        (partition_mounted, ["nvme0n1p2 is mounted at /home (xfs)", "umount /home"]),
        (volume_mounted, ["dm-3 (vg-home) is mounted at /home", "nvme0n1p2 is part of", "vgchange -an"]),
        (
            volume_active,
            ["nvme0n1 is part of the device-mapper or LVM volume dm-3 (vg-home)", "dmsetup remove vg-home"],
        ),
        (raid_member, ["nvme0n1 is part of the RAID md127", "mdadm --stop /dev/md127"]),
        (swap, ["nvme0n1p3 is used as swap", "swapoff /dev/nvme0n1p3"]),
        (swap_volume, ["dm-3 (vg-home) is used as swap", "swapoff /dev/mapper/vg-home"]),
        (btrfs, ["nvme0n1 is mounted at /srv (btrfs)"]),
        (btrfs_second_device, ["nvme0n1 belongs to the mounted Btrfs 1111-2222", "findmnt"]),
        (root_is_on_it, ["nvme0n1p2 is the boot disk: / is mounted from it", "mounted at /snap"]),
        (efi_is_on_it, ["nvme0n1p1 is the boot disk: /boot/efi"]),
        (mounted_in_a_container, ["nvme0n1 is mounted at /var/lib/data (ext4) for process 900 (postgres)"]),
    ],
)
def test_what_is_in_use_is_refused_whatever_is_said(
    tmp_path: Path, arrange: Callable[[Tree], None], words: list[str]
) -> None:
    arrange(simple(tmp_path))
    for overwrite in (None, BDF):
        said = said_about(tmp_path, overwrite)
        assert said.startswith(f"{BDF} is left alone")
        for word in words:
            assert word in said
        assert "overwrite=" not in said


def test_copies_of_our_mounts_are_not_told_again(tmp_path: Path) -> None:
    """systemd gives services mounts of their own: to "stop process 1" would be the advice for each drive."""
    tree = simple(tmp_path)
    tree.partition("nvme0n1", "nvme0n1p2", "259:2")
    lines = ("30 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw", "40 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw")
    tree.mounts(*lines)
    tree.process(1, "systemd-udevd", mounts="mnt:[2]")
    tree.mounts(*lines, "41 1 259:0 / /private rw - ext4 /dev/nvme0n1 rw", process="1")
    said = said_about(tmp_path, None)
    assert "nvme0n1 is mounted at /data (ext4): umount /data" in said
    assert said.count("process 1 (systemd-udevd)") == 2  # of /private alone: whose it is, and to be stopped
    assert "nvme0n1 is mounted at /private (ext4) for process 1 (systemd-udevd): stop process 1" in said


def test_exclusive_use_that_leaves_no_other_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # ZFS, bcache, a target: the kernel lets nobody else open it exclusively.
    simple(tmp_path)
    really = os.open

    def busy(path: str | os.PathLike[str], flags: int, *more: int) -> int:
        if str(path).endswith("/dev/nvme0n1"):
            assert flags & os.O_EXCL
            raise OSError(16, "Device or resource busy")
        return really(path, flags, *more)

    monkeypatch.setattr(os, "open", busy)
    said = said_about(tmp_path, BDF)
    assert "nvme0n1 is in use by the kernel" in said
    assert "lsblk" in said


def test_device_that_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    tree = simple(tmp_path)
    tree.path("/dev/nvme0n1").unlink()
    assert "nvme0n1 cannot be looked at (No such file or directory)" in said_about(tmp_path, BDF)


def test_without_privilege_nothing_is_called_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path)
    really = os.open

    def denied(path: str | os.PathLike[str], flags: int, *more: int) -> int:
        if str(path).endswith("/dev/nvme0n1"):
            raise PermissionError(13, "Permission denied")
        return really(path, flags, *more)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(TransportError, match="as root"):
        check_safe(BDF, BDF, Machine(tmp_path))


# --- data and open files: allowed by the exact word


def test_file_system_is_refused_until_the_device_is_named(tmp_path: Path) -> None:
    simple(tmp_path, ext4())
    said = said_about(tmp_path)
    assert "nvme0n1 holds a file system (ext2, ext3 or ext4)" in said
    assert "wipefs" in said
    assert f'overwrite="{BDF}"' in said
    check_safe(BDF, BDF, Machine(tmp_path))


@pytest.mark.parametrize("word", ["yes", "1", "01:00.0", "0000:01:00.1", "nvme0n1", BDF.upper() + " ", ""])
def test_no_other_word_will_do(tmp_path: Path, word: str) -> None:
    simple(tmp_path, ext4())
    assert f"overwrite={word!r} is not this device" in said_about(tmp_path, word)


def test_partition_table_of_a_drive_without_partitions(tmp_path: Path) -> None:
    data = bytearray(MIB)
    data[512:520] = b"EFI PART"
    simple(tmp_path, bytes(data))
    assert "nvme0n1 holds a partition table (GPT)" in said_about(tmp_path)


@pytest.mark.parametrize("table", [b"", b"EFI PART"])
def test_a_catalog_is_no_reason_against_taking_a_device(tmp_path: Path, table: bytes) -> None:
    """It is there to be read in user space; whoever writes there is stopped by then (test_write_guard.py)."""
    data = bytearray(MIB)
    data[65536:65544] = b"GPUNVMEC"
    data[512 : 512 + len(table)] = table
    simple(tmp_path, bytes(data))
    if table:
        assert "nvme0n1 holds a partition table (GPT): " in said_about(tmp_path)
    else:
        check_safe(BDF, machine=Machine(tmp_path))


def test_what_only_blkid_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path)
    tool = tmp_path / "bin/blkid"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n[ $# = 4 ] && echo TYPE=nilfs2\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert "nvme0n1 holds what blkid calls nilfs2" in said_about(tmp_path)
    tool.write_text("#!/bin/sh\nexit 8\n")
    assert "blkid cannot tell apart" in said_about(tmp_path)
    tool.write_text("#!/bin/sh\nexit 2\n")
    check_safe(BDF, machine=Machine(tmp_path))


@pytest.mark.parametrize("name", ["nvme0n1", "nvme0n1p1", "nvme0", "ng0n1"])
def test_open_devices_name_who_has_them(tmp_path: Path, name: str) -> None:
    tree = simple(tmp_path)
    tree.partition("nvme0n1", "nvme0n1p1", "259:1")
    tree.file("/sys/class/nvme/nvme0/dev", "240:0")
    tree.file("/sys/class/nvme-generic/ng0n1/dev", "241:0")
    tree.process(77, "smartd", "/dev/null", f"/dev/{name}")
    tree.process(78, "other", "/dev/nvme1n1")
    said = said_about(tmp_path)
    assert f"{name} is open in process 77 (smartd)" in said
    assert "78" not in said
    check_safe(BDF, BDF, Machine(tmp_path))


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    tree = simple(tmp_path, ext4())
    tree.controller(entries=("nvme0n1", "nvme0n2"))
    tree.block("nvme0n2", "259:9", nsid=2)
    tree.mounts("40 1 259:9 / /mnt rw - ext4 /dev/nvme0n2 rw")
    said = said_about(tmp_path)
    assert "nvme0n1 holds a file system" in said
    assert "nvme0n2 is mounted at /mnt" in said
    assert "what is in use stays refused" in said


def test_claim_holds_the_namespaces_while_it_is_open(tmp_path: Path) -> None:
    tree = simple(tmp_path)

    def descriptors() -> int:
        target = str(tree.path("/dev/nvme0n1"))
        found = 0
        for entry in os.listdir("/proc/self/fd"):
            try:
                found += os.readlink(f"/proc/self/fd/{entry}") == target
            except OSError:
                pass
        return found

    with Claim(BDF, Machine(tmp_path)) as claim:
        assert claim.namespaces == ("nvme0n1",)
        assert descriptors() == 1
    assert descriptors() == 0


def test_unreadable_sectors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path)

    def broken(_fd: int, _nbytes: int, _offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    assert "nvme0n1 cannot be read (Input/output error)" in said_about(tmp_path, BDF)


def test_mountinfo_with_strange_lines(tmp_path: Path) -> None:
    simple(tmp_path).mounts("", "1 2", "40 1 259:0 / / rw - ", "x - y", "40 1 8:1 / /a rw - ext4 none rw")
    check_safe(BDF, machine=Machine(tmp_path))
