"""The drives beneath a file system, from sysfs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpunvme.doctor.mounts import Mount
    from gpunvme.doctor.system import System


@dataclass(frozen=True)
class BlockDevice:
    """One whole drive (or volume): what sysfs says about it.

    ``model`` is None where the driver gives none, as virtio does; ``parts`` are the drives beneath a
    device-mapper or RAID volume.
    """

    name: str
    model: str | None
    rotational: bool | None
    logical_block_size: int | None
    scheduler: str | None
    parts: tuple[BlockDevice, ...] = ()

    def drives(self) -> list[BlockDevice]:
        """Return the drives at the bottom: the device itself, or what it is made of."""
        return [drive for part in self.parts for drive in part.drives()] if self.parts else [self]


def block_device(system: System, name: str) -> BlockDevice | None:
    """Describe the block device ``name`` (such as ``nvme0n1p2``); a partition leads to its drive."""
    where = system.resolve(f"/sys/class/block/{name}")
    if where is None:
        return None
    if system.exists(f"{where}/partition"):
        where = os.path.dirname(where)
    whole = os.path.basename(where)
    rotational = system.read_int(f"{where}/queue/rotational")
    scheduler = system.read(f"{where}/queue/scheduler")
    parts = [block_device(system, part) for part in system.names(f"{where}/slaves")]
    return BlockDevice(
        name=whole,
        model=system.read(f"{where}/device/model") or system.read(f"{where}/dm/name") or None,
        rotational=None if rotational is None else bool(rotational),
        logical_block_size=system.read_int(f"{where}/queue/logical_block_size"),
        scheduler=_chosen(scheduler) if scheduler else None,
        parts=tuple(part for part in parts if part is not None),
    )


def _chosen(scheduler: str) -> str:
    """Return the word in brackets: ``none [mq-deadline]`` means mq-deadline."""
    for word in scheduler.split():
        if word.startswith("["):
            return word.strip("[]")
    return scheduler


def device_of_mount(system: System, mount: Mount) -> BlockDevice | None:
    """Return the drive beneath a mount, or None where there is none or sysfs does not lead there."""
    if not mount.device_number.startswith("0:"):
        where = system.resolve(f"/sys/dev/block/{mount.device_number}")
        if where is not None:
            return block_device(system, os.path.basename(where))
    # btrfs and others give files a device number of their own; their source names the drive.
    if mount.source.startswith("/dev/"):
        name = os.path.basename(os.path.realpath(mount.source)) if system.root.samefile("/") else mount.source[5:]
        return block_device(system, name)
    return None
