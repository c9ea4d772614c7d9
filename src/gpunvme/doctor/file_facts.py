"""What the system knows about one open file, without reading it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpunvme.doctor.block_device import device_of_mount
from gpunvme.doctor.extents import Layout, layout
from gpunvme.doctor.mounts import mount_id_of, mount_of, parse_mountinfo
from gpunvme.doctor.system import System

if TYPE_CHECKING:
    from gpunvme.doctor.block_device import BlockDevice
    from gpunvme.doctor.mounts import Mount


@dataclass(frozen=True)
class FileFacts:
    """What is known about a file; what is not known is None.

    Parameters
    ----------
    name
        The name that it was opened by.
    nbytes
        Its size.
    cached_bytes
        How much of it is in the page cache.
    layout
        Its extents summed up, or in words why they are not known.
    mount
        The mount that it lies on.
    drives
        The drives beneath.
    direct_io
        What O_DIRECT asks of memory and of offsets, in bytes.
    """

    name: str
    nbytes: int
    cached_bytes: int | None
    layout: Layout | str
    mount: Mount | None
    drives: tuple[BlockDevice, ...]
    direct_io: tuple[int, int] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts, for ``--json``."""
        told = self.layout
        return {
            "file": self.name,
            "nbytes": self.nbytes,
            "cached_bytes": self.cached_bytes,
            "extents": {"unknown": told} if isinstance(told, str) else asdict(told),
            "file_system": None if self.mount is None else asdict(self.mount),
            "drives": [asdict(drive) for drive in self.drives],
            "direct_io": None
            if self.direct_io is None
            else {"memory_alignment": self.direct_io[0], "offset_alignment": self.direct_io[1]},
        }


def file_facts(fd: int, name: str, nbytes: int) -> FileFacts:
    """Gather what the system knows about an open file.

    Parameters
    ----------
    fd
        Its descriptor.
    name
        The name that it was opened by.
    nbytes
        Its size.
    """
    from gpunvme import _native

    system = System()
    mounts = parse_mountinfo(system.read("/proc/self/mountinfo") or "")
    number = mount_id_of(fd)
    mount = mount_of(name, mounts, number) if number is not None else None
    device = device_of_mount(system, mount) if mount is not None else None
    cached = _native.cached_bytes(fd, 0, nbytes)
    return FileFacts(
        name=name,
        nbytes=nbytes,
        cached_bytes=None if cached is None else min(cached, nbytes),  # whole pages are counted
        layout=layout(fd),
        mount=mount,
        drives=tuple(device.drives()) if device is not None else (),
        direct_io=_native.dio_alignment(fd),
    )
