"""What the messages of vfio-user carry: DMA mappings, the device, its regions, its interrupts.

Forms and numbers are those of QEMU's docs/interop/vfio-user.rst, version 0.1, and of <linux/vfio.h>, from which most of
them come. ``argsz`` is the room that the sender has for the reply's payload, or, in a reply, the room that all of it
needs. Payloads may be longer than what is known of them, as they are from newer peers; never shorter.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Self, TypeVar

from gpunvme.nvme.vfio_user.messages import ProtocolError

_Payload = TypeVar("_Payload", bound=tuple[Any, ...])


def _unpack(cls: type[_Payload], form: struct.Struct, data: bytes) -> _Payload:
    if len(data) < form.size:
        raise ProtocolError(f"{cls.__name__} has at least {form.size} bytes, not {len(data)}")
    return cls(*form.unpack_from(data))


class DmaFlag(IntFlag):
    """What the server may do with memory."""

    READ = 1
    WRITE = 2


class DmaMap(NamedTuple):
    """Payload of DMA_MAP: the server may reach ``size`` bytes at ``address``, which are at ``offset`` of the file."""

    argsz: int
    flags: int
    offset: int
    address: int
    size: int

    def pack(self) -> bytes:
        """The payload."""
        return _DMA_MAP.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart."""
        return _unpack(cls, _DMA_MAP, data)


_DMA_MAP = struct.Struct("<IIQQQ")


class UnmapFlag(IntFlag):
    """Flags of DMA_UNMAP, as in the kernel's VFIO; version 0.1 names none, QEMU sends ALL."""

    GET_DIRTY_BITMAP = 1
    ALL = 2


class DmaUnmap(NamedTuple):
    """Payload of DMA_UNMAP and of its reply: takes back what one DMA_MAP gave."""

    argsz: int
    flags: int
    address: int
    size: int

    def pack(self) -> bytes:
        """The payload."""
        return _DMA_UNMAP.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart."""
        return _unpack(cls, _DMA_UNMAP, data)


_DMA_UNMAP = struct.Struct("<IIQQ")


class DmaAccess(NamedTuple):
    """Payload of DMA_READ and DMA_WRITE: ``nbytes`` bytes of the client's memory."""

    address: int
    nbytes: int
    data: bytes = b""

    def pack(self) -> bytes:
        """The payload."""
        return _DMA_ACCESS.pack(self.address, self.nbytes) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart; ``data`` is whatever follows."""
        return _unpack(cls, _DMA_ACCESS, data)._replace(data=data[_DMA_ACCESS.size :])


_DMA_ACCESS = struct.Struct("<QQ")


# ---- The device, its regions and interrupts


class DeviceFlag(IntFlag):
    """What a device is."""

    RESET = 1
    PCI = 2


class DeviceInfo(NamedTuple):
    """Payload of DEVICE_GET_INFO and of its reply."""

    argsz: int
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0

    def pack(self) -> bytes:
        """The payload."""
        return _WORDS4.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart."""
        return _unpack(cls, _WORDS4, data)


class Region(IntEnum):
    """Indices of a PCI device's regions; 0 to 5 are its BARs."""

    BAR0 = 0
    ROM = 6
    CONFIG = 7
    VGA = 8


REGIONS = 9


class RegionFlag(IntFlag):
    """What can be done with a region."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class Area(NamedTuple):
    """Part of a region that can be mapped."""

    offset: int
    size: int


class RegionInfo(NamedTuple):
    """Payload of DEVICE_GET_REGION_INFO and of its reply.

    ``offset`` is where the region's byte 0 would be in the file that comes with the reply. ``areas`` is None where the
    region can be mapped as a whole, if at all.
    """

    argsz: int
    flags: int = 0
    region: int = 0
    cap_offset: int = 0
    size: int = 0
    offset: int = 0
    areas: tuple[Area, ...] | None = None

    def pack(self) -> bytes:
        """The payload as a command or as a reply without areas."""
        return _REGION_INFO.pack(*self[:6])

    def pack_with_areas(self, room: int) -> bytes:
        """The payload as a reply with areas, unless it is longer than ``room``: then without, saying how long it is."""
        areas = self.areas or ()
        size = _REGION_INFO.size + _CAPABILITY.size + _SPARSE.size + _AREA.size * len(areas)
        full = self._replace(argsz=size, flags=self.flags | RegionFlag.CAPS, cap_offset=_REGION_INFO.size)
        if size > room:
            return full.pack()  # QEMU 11.1 takes no other cap_offset, although there is nothing yet
        sparse = _CAPABILITY.pack(_SPARSE_MMAP, 1, 0) + _SPARSE.pack(len(areas), 0)
        return full.pack() + sparse + b"".join(_AREA.pack(*area) for area in areas)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart, with the areas if there are any."""
        info = _unpack(cls, _REGION_INFO, data)
        if not info.flags & RegionFlag.CAPS or info.cap_offset == 0:
            return info
        if info.argsz > len(data):
            return info._replace(areas=())  # there was no room for them
        return info._replace(areas=_find_areas(data, info.cap_offset))


_REGION_INFO = struct.Struct("<IIIIQQ")
_CAPABILITY = struct.Struct("<HHI")  # id, version, offset of the next one or 0
_SPARSE = struct.Struct("<II")  # number of areas, reserved
_AREA = struct.Struct("<QQ")
_SPARSE_MMAP = 1
REGION_INFO_BYTES = _REGION_INFO.size


def _find_areas(data: bytes, at: int) -> tuple[Area, ...] | None:
    seen = _REGION_INFO.size  # capabilities come behind the structure and behind each other: the list cannot be a ring
    while at:
        if at < seen or at + _CAPABILITY.size > len(data):
            raise ProtocolError(f"a region's capability is at byte {at}, where it cannot be")
        kind, _, following = _CAPABILITY.unpack_from(data, at)
        seen = at + _CAPABILITY.size
        if kind == _SPARSE_MMAP:
            if seen + _SPARSE.size > len(data):
                raise ProtocolError("a region's list of areas is cut off")
            count, _ = _SPARSE.unpack_from(data, seen)
            start = seen + _SPARSE.size
            if count > (len(data) - start) // _AREA.size:
                raise ProtocolError(f"a region's list of {count} areas is cut off")
            return tuple(Area(*_AREA.unpack_from(data, start + i * _AREA.size)) for i in range(count))
        at = following
    return None


class Irq(IntEnum):
    """Indices of a PCI device's kinds of interrupts."""

    INTX = 0
    MSI = 1
    MSIX = 2


IRQS = 3


class IrqInfoFlag(IntFlag):
    """What can be done with a kind of interrupts."""

    EVENTFD = 1


class IrqInfo(NamedTuple):
    """Payload of DEVICE_GET_IRQ_INFO and of its reply."""

    argsz: int
    flags: int = 0
    kind: int = 0
    number: int = 0

    def pack(self) -> bytes:
        """The payload."""
        return _WORDS4.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart."""
        return _unpack(cls, _WORDS4, data)


class IrqSetFlag(IntFlag):
    """What DEVICE_SET_IRQS comes with, and what is to be done."""

    DATA_NONE = 0x01
    DATA_BOOL = 0x02
    DATA_EVENTFD = 0x04
    ACTION_MASK = 0x08
    ACTION_UNMASK = 0x10
    ACTION_TRIGGER = 0x20


class IrqSet(NamedTuple):
    """Payload of DEVICE_SET_IRQS, about ``number`` interrupts from ``start`` on."""

    argsz: int
    flags: int
    kind: int
    start: int
    number: int
    data: bytes = b""

    def pack(self) -> bytes:
        """The payload."""
        return _IRQ_SET.pack(*self[:5]) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart; ``data`` is whatever follows."""
        return _unpack(cls, _IRQ_SET, data)._replace(data=data[_IRQ_SET.size :])


_WORDS4 = struct.Struct("<IIII")
_IRQ_SET = struct.Struct("<IIIII")
DEVICE_INFO_BYTES = IRQ_INFO_BYTES = _WORDS4.size
IRQ_SET_BYTES = _IRQ_SET.size
DMA_MAP_BYTES = _DMA_MAP.size
DMA_UNMAP_BYTES = _DMA_UNMAP.size


class RegionAccess(NamedTuple):
    """Payload of REGION_READ and REGION_WRITE and of their replies: ``nbytes`` bytes at ``offset`` of a region."""

    offset: int
    region: int
    nbytes: int
    data: bytes = b""

    def pack(self) -> bytes:
        """The payload."""
        return _REGION_ACCESS.pack(self.offset, self.region, self.nbytes) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart; ``data`` is whatever follows."""
        return _unpack(cls, _REGION_ACCESS, data)._replace(data=data[_REGION_ACCESS.size :])


_REGION_ACCESS = struct.Struct("<QII")
