"""Numbers and structures of the kernel's VFIO and iommufd interfaces.

From ``include/uapi/linux/vfio.h`` and ``include/uapi/linux/iommufd.h``; ``Documentation/driver-api/vfio.rst`` and
``Documentation/userspace-api/iommufd.rst`` explain them. Every structure begins with its own size, which the kernel
checks; names are the kernel's without their prefix.
"""

from __future__ import annotations

import ctypes
import fcntl
import struct
from ctypes import c_int32, c_uint32, c_uint64
from typing import Self

_TYPE = ord(";")


def _vfio(number: int) -> int:
    return _TYPE << 8 | (100 + number)  # _IO(VFIO_TYPE, VFIO_BASE + number)


def _iommufd(number: int) -> int:
    return _TYPE << 8 | (0x80 + number)  # _IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + number)


API_VERSION = 0

# --- ioctls of a container (/dev/vfio/vfio)
GET_API_VERSION = _vfio(0)
CHECK_EXTENSION = _vfio(1)
SET_IOMMU = _vfio(2)
IOMMU_GET_INFO = _vfio(12)
IOMMU_MAP_DMA = _vfio(13)
IOMMU_UNMAP_DMA = _vfio(14)

# --- of a group (/dev/vfio/NUMBER)
GROUP_GET_STATUS = _vfio(3)
GROUP_SET_CONTAINER = _vfio(4)
GROUP_GET_DEVICE_FD = _vfio(6)

# --- of a device
DEVICE_GET_INFO = _vfio(7)
DEVICE_GET_REGION_INFO = _vfio(8)
DEVICE_GET_IRQ_INFO = _vfio(9)
DEVICE_SET_IRQS = _vfio(10)
DEVICE_RESET = _vfio(11)
DEVICE_BIND_IOMMUFD = _vfio(18)
DEVICE_ATTACH_IOMMUFD_PT = _vfio(19)

# --- of iommufd (/dev/iommu)
IOAS_ALLOC = _iommufd(1)
IOAS_IOVA_RANGES = _iommufd(4)
IOAS_MAP = _iommufd(5)
IOAS_UNMAP = _iommufd(6)

TYPE1V2_IOMMU = 3
NOIOMMU_IOMMU = 8

GROUP_VIABLE = 1 << 0

DEVICE_FLAG_RESET = 1 << 0
DEVICE_FLAG_PCI = 1 << 1

REGION_FLAG_READ = 1 << 0
REGION_FLAG_WRITE = 1 << 1
REGION_FLAG_MMAP = 1 << 2
REGION_FLAG_CAPS = 1 << 3
REGION_CAP_SPARSE_MMAP = 1

IOMMU_INFO_CAPS = 1 << 1
TYPE1_CAP_IOVA_RANGE = 1

DMA_MAP_READ = 1 << 0  # the device may read it
DMA_MAP_WRITE = 1 << 1

IOAS_MAP_FIXED_IOVA = 1 << 0
IOAS_MAP_WRITEABLE = 1 << 1
IOAS_MAP_READABLE = 1 << 2

IRQ_SET_DATA_NONE = 1 << 0
IRQ_SET_DATA_EVENTFD = 1 << 2
IRQ_SET_ACTION_TRIGGER = 1 << 5
MSIX_IRQS = 2  # VFIO_PCI_MSIX_IRQ_INDEX

# Indices of a PCI device's regions (VFIO_PCI_*_REGION_INDEX).
BAR0_REGION = 0
CONFIG_REGION = 7


class _Sized(ctypes.Structure):
    """A structure whose first field is its own size."""

    @classmethod
    def new(cls, **fields: int) -> Self:
        return cls(ctypes.sizeof(cls), **fields)


class GroupStatus(_Sized):
    """Of `GROUP_GET_STATUS`."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32))
    flags: int


class DeviceInfo(_Sized):
    """Of `DEVICE_GET_INFO`."""

    _fields_ = (
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("num_regions", c_uint32),
        ("num_irqs", c_uint32),
        ("cap_offset", c_uint32),
    )
    flags: int
    num_regions: int


class RegionInfo(_Sized):
    """Of `DEVICE_GET_REGION_INFO`; capabilities may follow."""

    _fields_ = (
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("index", c_uint32),
        ("cap_offset", c_uint32),
        ("size", c_uint64),
        ("offset", c_uint64),
    )
    argsz: int
    flags: int
    cap_offset: int
    size: int
    offset: int


class IrqInfo(_Sized):
    """Of `DEVICE_GET_IRQ_INFO`."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("index", c_uint32), ("count", c_uint32))
    count: int


class Type1Info(_Sized):
    """Of `IOMMU_GET_INFO`; capabilities may follow."""

    _fields_ = (
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("iova_pgsizes", c_uint64),
        ("cap_offset", c_uint32),
    )
    argsz: int
    flags: int
    cap_offset: int


class Type1Map(_Sized):
    """Of `IOMMU_MAP_DMA`."""

    _fields_ = (
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("vaddr", c_uint64),
        ("iova", c_uint64),
        ("size", c_uint64),
    )


class Type1Unmap(_Sized):
    """Of `IOMMU_UNMAP_DMA`."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("iova", c_uint64), ("size", c_uint64))
    size: int


class BindIommufd(_Sized):
    """Of `DEVICE_BIND_IOMMUFD`."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("iommufd", c_int32), ("out_devid", c_uint32))


class AttachIommufd(_Sized):
    """Of `DEVICE_ATTACH_IOMMUFD_PT`."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("pt_id", c_uint32))


class IoasAlloc(_Sized):
    """Of `IOAS_ALLOC`."""

    _fields_ = (("size", c_uint32), ("flags", c_uint32), ("out_ioas_id", c_uint32))
    out_ioas_id: int


class IoasIovaRanges(_Sized):
    """Of `IOAS_IOVA_RANGES`."""

    _fields_ = (
        ("size", c_uint32),
        ("ioas_id", c_uint32),
        ("num_iovas", c_uint32),
        ("reserved", c_uint32),
        ("allowed_iovas", c_uint64),
        ("out_iova_alignment", c_uint64),
    )
    num_iovas: int


class IoasMap(_Sized):
    """Of `IOAS_MAP`."""

    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("ioas_id", c_uint32),
        ("reserved", c_uint32),
        ("user_va", c_uint64),
        ("length", c_uint64),
        ("iova", c_uint64),
    )


class IoasUnmap(_Sized):
    """Of `IOAS_UNMAP`."""

    _fields_ = (("size", c_uint32), ("ioas_id", c_uint32), ("iova", c_uint64), ("length", c_uint64))


class IovaRange(ctypes.Structure):
    """The range from ``start`` to ``last``, both included; VFIO and iommufd have the same one."""

    _fields_ = (("start", c_uint64), ("last", c_uint64))
    start: int
    last: int


def call(fd: int, request: int, argument: ctypes.Structure | bytearray | int = 0) -> int:
    """Make an ioctl; return what it returns. A structure or bytearray is passed by address and may be changed.

    Raises
    ------
    OSError
        As the kernel answers.
    """
    if isinstance(argument, int):
        return int(fcntl.ioctl(fd, request, argument))
    return int(fcntl.ioctl(fd, request, argument, True))


def call_with_capabilities(fd: int, request: int, info: _Sized) -> bytearray:
    """Make an ioctl that returns a structure with a chain of capabilities behind it; return all of its bytes."""
    nbytes = ctypes.sizeof(info)
    while True:
        data = bytearray(bytes(info)[:nbytes].ljust(nbytes, b"\0"))
        struct.pack_into("=I", data, 0, nbytes)
        call(fd, request, data)
        # Too small a buffer is answered with the size that is needed, and without capabilities.
        (needed,) = struct.unpack_from("=I", data)
        if needed <= nbytes:
            return data
        nbytes = needed


def capability(data: bytes | bytearray, first: int, wanted: int) -> int | None:
    """Return the offset of a capability in what `call_with_capabilities` returned; ``first`` is its ``cap_offset``."""
    offset, seen = first, set()
    while 0 < offset <= len(data) - 8 and offset not in seen:
        seen.add(offset)
        found, _version, following = struct.unpack_from("=HHI", data, offset)
        if found == wanted:
            return offset
        offset = following
    return None


def ranges_of(data: bytes | bytearray, offset: int) -> list[tuple[int, int]]:
    """Return the pairs of 64-bit numbers in a capability: header, u32 count, u32 reserved, pairs."""
    (count,) = struct.unpack_from("=I", data, offset + 8)
    return [struct.unpack_from("=QQ", data, offset + 16 + 16 * number) for number in range(count)]
