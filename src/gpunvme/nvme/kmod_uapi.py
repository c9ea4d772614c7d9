"""Numbers and structures of the kernel module's interface: ``kmod/gpunvme_uapi.h``, which says what they mean."""

from __future__ import annotations

import ctypes
import fcntl
from ctypes import c_int32, c_uint32, c_uint64
from typing import Self

VERSION = 1
UNIT = 4096

INFO_IOMMU = 1 << 0
INFO_DMABUF = 1 << 1
MAP_WRITE = 1 << 0

_MAGIC = 0xB7
# include/uapi/asm-generic/ioctl.h
_WRITE, _READ = 1, 2


class _Sized(ctypes.Structure):
    """A structure whose first field is its size."""

    size: int

    @classmethod
    def new(cls, **fields: int) -> Self:
        """One with these fields, the others zero."""
        return cls(size=ctypes.sizeof(cls), **fields)


class Info(_Sized):
    """What there is."""

    version: int
    bar_nbytes: int
    mmap_nbytes: int
    vectors: int
    flags: int
    max_mappings: int

    _fields_ = (
        ("size", c_uint32),
        ("version", c_uint32),
        ("bar_nbytes", c_uint64),
        ("mmap_nbytes", c_uint64),
        ("vectors", c_uint32),
        ("flags", c_uint32),
        ("max_mappings", c_uint32),
        ("reserved", c_uint32),
    )


class Map(_Sized):
    """Memory for the function."""

    handle: int

    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("address", c_uint64),
        ("nbytes", c_uint64),
        ("addresses", c_uint64),
        ("fd", c_int32),
        ("handle", c_uint32),
    )


class Unmap(_Sized):
    """Memory that the function does not use any more."""

    _fields_ = (("size", c_uint32), ("handle", c_uint32))


class Vector(_Sized):
    """Where an interrupt goes."""

    _fields_ = (("size", c_uint32), ("vector", c_uint32), ("fd", c_int32), ("reserved", c_uint32))


def _number(direction: int, number: int, structure: type[_Sized] | None) -> int:
    nbytes = ctypes.sizeof(structure) if structure else 0
    return direction << 30 | nbytes << 16 | _MAGIC << 8 | number


GET_INFO = _number(_READ | _WRITE, 0, Info)
MAP = _number(_READ | _WRITE, 1, Map)
UNMAP = _number(_WRITE, 2, Unmap)
SET_VECTOR = _number(_WRITE, 3, Vector)
RESET = _number(0, 4, None)


def call(fd: int, number: int, argument: _Sized | None = None) -> None:
    """Call the module.

    Raises
    ------
    OSError
        If it refuses.
    """
    if argument is None:
        fcntl.ioctl(fd, number)
    else:
        fcntl.ioctl(fd, number, argument)
