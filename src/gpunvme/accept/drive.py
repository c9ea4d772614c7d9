"""The drive before anything is done to it: whether it may be taken, and where on it may be written."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

from gpunvme.accept.job import MIB
from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme.bind import KERNEL_DRIVER
from gpunvme.nvme.safety import Claim
from gpunvme.nvme.sysfs import BlockDevice, ControllerInfo, Machine, list_controllers, nvme_function
from gpunvme.transfer import format_bytes

_LEAST_BYTES = 32 * MIB
_MOST_AREA = 256 * MIB
_EDGE = 8 * MIB  # neither end is written to: a new table or file system would begin there
_SAMPLES = 256  # besides what is written to, and both ends
_PAGE = 4096


@dataclass(frozen=True)
class Drive:
    """A drive that nobody uses and that holds nothing, and where on it may be written; see `Job`."""

    info: ControllerInfo
    firmware: str
    nsid: int
    nbytes: int
    block_size: int
    area: int
    area_nbytes: int
    far: int

    @property
    def address(self) -> str:
        """Its PCI address."""
        return self.info.function.address


def look_at(bdf: str, erase: str | None, machine: Machine) -> Drive:
    """Look at a drive; nothing is changed.

    Parameters
    ----------
    bdf
        Its PCI address.
    erase
        The address once more, in full: that it may be written to.
    machine
        Where sysfs and /dev are.

    Raises
    ------
    UriError, TransportError
        If it is no NVMe controller's address, or cannot be looked at.
    UnsafeDeviceError
        If it is in use, holds anything or cannot be looked at by the kernel, whatever ``erase`` is; or if ``erase`` is
        not its address.
    """
    function = nvme_function(bdf, machine)
    address = function.address
    if function.driver != KERNEL_DRIVER:
        raise UnsafeDeviceError(
            f"{address} is with {function.driver or 'no driver'}: the kernel cannot say what it holds. "
            f"`gpunvme nvme unbind {address}` gives it to the kernel's driver"
        )
    with Claim(address, machine) as claim:
        # No word lets what is on it go: whoever wants that wipes it first, and sees what that is.
        if claim.hazards:
            lines = [str(hazard) for hazard in claim.hazards]
            raise UnsafeDeviceError(
                f"{address} is left alone, it has to be empty and out of use:\n  " + ";\n  ".join(lines)
            )
        info = next(each for each in list_controllers(machine) if each.function.address == address)
        chosen = _namespace(info)
        for namespace in info.namespaces:
            wanted = [(chosen.area, chosen.area_nbytes), (chosen.far, MIB)] if namespace.nsid == chosen.nsid else []
            _refuse_data(namespace, wanted, machine)
    if erase != address:
        said = f" ({erase!r} is not it)" if erase is not None else ""
        raise UnsafeDeviceError(
            f"{address} holds nothing, as far as was looked. It will be written to, and nobody else may use it "
            f"meanwhile: say its address once more, --erase {address}{said}"
        )
    firmware = machine.read(f"/sys/bus/pci/devices/{address}/nvme/{info.name}/firmware_rev") or "unknown"
    return Drive(info, firmware, **vars(chosen))


@dataclass(frozen=True)
class _Chosen:
    nsid: int
    nbytes: int
    block_size: int
    area: int
    area_nbytes: int
    far: int


def _namespace(info: ControllerInfo) -> _Chosen:
    """Choose the first namespace that is large enough, and where on it."""
    for each in info.namespaces:
        if each.nsid is not None and each.nbytes >= _LEAST_BYTES:
            area = min(_MOST_AREA, each.nbytes // 8 // MIB * MIB)
            far = each.nbytes // MIB * MIB - _EDGE
            return _Chosen(each.nsid, each.nbytes, each.block_size, _EDGE, area, far)
    raise TransportError(
        f"{info.function.address} has no namespace of {format_bytes(_LEAST_BYTES)} or more; the namespaces that it "
        f"has: {', '.join(each.name for each in info.namespaces) or 'none'}"
    )


def _refuse_data(namespace: BlockDevice, wanted: list[tuple[int, int]], machine: Machine) -> None:
    device = machine.path(f"/dev/{namespace.name}")
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        where = first_data(fd, [*wanted, *_places(size)])
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    if where is not None:
        raise UnsafeDeviceError(
            f"{namespace.name} is left alone, it has to be empty: it holds data at byte {where}. If that may go, and "
            f"everything else on it: blkdiscard --zeroout {device}"
        )


def _places(size: int) -> Iterator[tuple[int, int]]:
    """Yield what is looked at besides what is written to: both ends, and pages all over it."""
    yield 0, min(MIB, size)
    yield max(0, size - MIB), min(MIB, size)
    step = max(size // _SAMPLES, _PAGE)
    chance = random.SystemRandom()
    for start in range(0, size - step + 1, step):
        yield start + chance.randrange(step // _PAGE) * _PAGE, _PAGE


def first_data(fd: int, places: list[tuple[int, int]]) -> int | None:
    """Return where the first byte that is not zero lies, or None.

    Parameters
    ----------
    fd
        A block device.
    places
        ``(offset, bytes)`` of what is looked at.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    for start, nbytes in places:
        for offset in range(start, start + nbytes, MIB):
            data = os.pread(fd, min(MIB, start + nbytes - offset), offset)
            rest = data.lstrip(b"\0")
            if rest:
                return offset + len(data) - len(rest)
    return None
