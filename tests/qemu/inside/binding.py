"""In a guest: taking controllers from the kernel, and every reason not to.

0000:00:08.0 "first" is empty; 0000:00:09.0 "table" has a partition table; 0000:00:0a.0 and .1, "left" and "right",
share an IOMMU group.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess

from checking import as_nobody, check, modprobe, namespace_path, refusal, settle, shell

from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme.bind import bind, unbind
from gpunvme.nvme.safety import Claim
from gpunvme.nvme.sysfs import Machine, find_function, group_members
from gpunvme.nvme.vfio import VfioTransport

FIRST, TABLE, LEFT, RIGHT = "0000:00:08.0", "0000:00:09.0", "0000:00:0a.0", "0000:00:0a.1"
TEXT = b"written by the kernel\n"


@check()
def mounted_partition_is_refused() -> None:
    modprobe("nvme", "crc32c_generic", "ext4")
    disk = namespace_path(TABLE)
    settle(f"{disk}p1")
    shell(f"mkfs.ext4 -q -F {disk}p1 && mkdir -p /mnt/t && mount -t ext4 {disk}p1 /mnt/t")
    with open("/mnt/t/file", "wb") as file:
        file.write(TEXT)
    for word in (None, TABLE):
        said = refusal(UnsafeDeviceError, bind, TABLE, overwrite=word)
        assert f"{os.path.basename(disk)}p1 is mounted at /mnt/t (ext4): umount /mnt/t" in said, said
    assert find_function(TABLE).driver == "nvme"
    with open("/mnt/t/file", "rb") as file:
        assert file.read() == TEXT
    shell("umount /mnt/t")


@check()
def mount_in_another_namespace_is_refused() -> None:
    disk = namespace_path(TABLE)
    other = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"mount -t ext4 {disk}p1 /mnt/t && echo ready && exec sleep 60"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "ready\n"
        assert disk not in shell("cat /proc/self/mountinfo")
        said = refusal(UnsafeDeviceError, bind, TABLE, overwrite=TABLE)
        assert "is mounted at /mnt/t (ext4) for process" in said, said
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


@check()
def partition_table_is_refused_until_named() -> None:
    disk = namespace_path(TABLE)
    said = refusal(UnsafeDeviceError, bind, TABLE)
    assert "holds a partition table (MBR)" in said, said
    assert f'overwrite="{TABLE}"' in said, said
    assert "is not this device" in refusal(UnsafeDeviceError, bind, TABLE, overwrite="0000:00:09.1")
    assert bind(TABLE, overwrite=TABLE).after == "vfio-pci"
    assert not os.path.exists(disk)
    assert unbind(TABLE).after == "nvme"
    # Nothing of it was lost.
    settle(f"{namespace_path(TABLE)}p1")
    shell(f"mount -t ext4 {namespace_path(TABLE)}p1 /mnt/t")
    with open("/mnt/t/file", "rb") as file:
        assert file.read() == TEXT
    shell("umount /mnt/t")


@check()
def swap_is_refused() -> None:
    disk = namespace_path(FIRST)
    shell(f"mkswap {disk} && swapon {disk}")
    said = refusal(UnsafeDeviceError, bind, FIRST, overwrite=FIRST)
    assert f"is used as swap: swapoff {disk}" in said, said
    shell(f"swapoff {disk}")
    said = refusal(UnsafeDeviceError, bind, FIRST)
    assert "holds a swap area" in said, said
    shell(f"dd if=/dev/zero of={disk} bs=64k count=1 conv=fsync")


class DeviceMapper:
    """A linear mapping over a whole disk, by the ioctls of linux/dm-ioctl.h: no dmsetup in this guest."""

    def __init__(self, name: str, disk: str) -> None:
        modprobe("dm_mod")
        settle("/dev/mapper/control")
        self.name = name
        self.control = os.open("/dev/mapper/control", os.O_RDWR)
        sectors = int(shell(f"cat /sys/class/block/{os.path.basename(disk)}/size"))
        numbers = shell(f"cat /sys/class/block/{os.path.basename(disk)}/dev").strip()
        target = b"".join(
            [
                (0).to_bytes(8, "little"),
                sectors.to_bytes(8, "little"),
                (0).to_bytes(4, "little"),
                (40 + 32).to_bytes(4, "little"),
                b"linear".ljust(16, b"\0"),
                f"{numbers} 0".encode().ljust(32, b"\0"),
            ]
        )
        self.call(3)  # DM_DEV_CREATE
        self.call(9, target)  # DM_TABLE_LOAD
        self.call(6)  # DM_DEV_SUSPEND, which resumes

    def call(self, number: int, target: bytes = b"") -> None:
        head = bytearray(312)
        for at, value in ((0, 4), (12, 312 + len(target)), (16, 312), (20, int(bool(target)))):
            head[at : at + 4] = value.to_bytes(4, "little")
        head[48 : 48 + len(self.name)] = self.name.encode()
        fcntl.ioctl(self.control, 3 << 30 | 312 << 16 | 0xFD << 8 | number, head + target, True)

    def remove(self) -> None:
        self.call(4)  # DM_DEV_REMOVE
        os.close(self.control)


@check()
def volume_is_refused() -> None:
    disk = namespace_path(FIRST)
    volume = DeviceMapper("precious", disk)
    try:
        said = refusal(UnsafeDeviceError, bind, FIRST, overwrite=FIRST)
        assert f"{os.path.basename(disk)} is part of the device-mapper or LVM volume dm-0 (precious)" in said, said
    finally:
        volume.remove()


@check()
def whatever_else_claims_it_is_refused() -> None:
    """The kernel lets one at a time open a block device exclusively: who has it need not be known."""
    disk = namespace_path(FIRST)
    fd = os.open(disk, os.O_RDONLY | os.O_EXCL)
    try:
        assert "is in use by the kernel" in refusal(UnsafeDeviceError, bind, FIRST, overwrite=FIRST)
    finally:
        os.close(fd)


@check()
def open_device_names_who_has_it() -> None:
    disk = namespace_path(FIRST)
    holder = subprocess.Popen(["sh", "-c", f"exec 3<{disk}; echo; exec sleep 60"], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        said = refusal(UnsafeDeviceError, bind, FIRST)
        assert f"is open in process {holder.pid} (sleep)" in said, said
        # The word lets it go, and the process finds its device gone.
        assert bind(FIRST, overwrite=FIRST).after == "vfio-pci"
        assert unbind(FIRST).after == "nvme"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@check()
def nobody_mounts_between_looking_and_taking() -> None:
    disk = namespace_path(TABLE)
    with Claim(TABLE) as claim:
        assert claim.namespaces == (os.path.basename(disk),)
        done = subprocess.run(["mount", "-t", "ext4", f"{disk}p1", "/mnt/t"], capture_output=True, check=False)
        assert done.returncode != 0, "it was mounted although it is claimed"
    shell(f"mount -t ext4 {disk}p1 /mnt/t && umount /mnt/t")


@check()
def driver_that_does_not_take_it_is_undone() -> None:
    said = refusal(TransportError, bind, FIRST, driver="no-such-driver")
    assert "there is no driver no-such-driver" in said, said
    assert find_function(FIRST).driver == "nvme"
    # virtio-pci looks at the device and refuses it.
    said = refusal(TransportError, bind, FIRST, driver="virtio-pci", timeout=1)
    assert "virtio-pci did not take it" in said, said
    assert find_function(FIRST).driver == "nvme"
    namespace_path(FIRST)
    with open(f"/sys/bus/pci/devices/{FIRST}/driver_override") as override:
        assert override.read().strip() == "(null)"


@check()
def ordinary_user_changes_nothing() -> None:
    said = as_nobody(lambda: refusal(TransportError, bind, FIRST))
    assert "root" in said, said
    assert find_function(FIRST).driver == "nvme"


@check()
def shared_group_names_the_other() -> None:
    group = find_function(LEFT).iommu_group
    assert {each.address for each in group_members(group)} == {LEFT, RIGHT}
    bind(LEFT)
    said = refusal(TransportError, VfioTransport, LEFT)
    assert f"group {group} with {RIGHT} (NVMe) with nvme" in said, said
    bind(RIGHT)
    VfioTransport(LEFT).close()
    unbind(LEFT)
    unbind(RIGHT)
    assert (find_function(LEFT).driver, find_function(RIGHT).driver) == ("nvme", "nvme")


@check()
def module_is_loaded_when_needed() -> None:
    subprocess.run(["rmmod", "vfio_pci"], check=True)
    assert not os.path.exists("/sys/bus/pci/drivers/vfio-pci")
    bind(FIRST)
    # The kernel's driver may be missing too.
    subprocess.run(["rmmod", "nvme"], check=True)
    assert unbind(FIRST).after == "nvme"
    namespace_path(FIRST)


@check()
def interrupted_bind_is_undone() -> None:
    class Interrupted(Machine):
        def write(self, name: str, text: str) -> None:
            super().write(name, text)
            if name.endswith("/driver/unbind"):
                os.kill(os.getpid(), signal.SIGINT)

    refusal(KeyboardInterrupt, bind, FIRST, machine=Interrupted())
    assert find_function(FIRST).driver == "nvme"
    namespace_path(FIRST)
