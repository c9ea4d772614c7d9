"""Where a file's bytes lie on its drive: the FIEMAP ioctl, read and summed up."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FS_IOC_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQIIII")
_EXTENT = struct.Struct("=QQQ2QI3I")
_AT_ONCE = 512

_LAST = 0x1
_UNKNOWN = 0x2
_DELAYED = 0x4
_ENCODED = 0x8
_INLINE = 0x200
_UNWRITTEN = 0x800
_SHARED = 0x2000


@dataclass(frozen=True)
class Extent:
    """One run of a file's bytes: where it is in the file, where on the drive, how long, and its flags."""

    logical: int
    physical: int
    length: int
    flags: int


@dataclass(frozen=True)
class Layout:
    """A file's extents summed up; all but the counts are bytes of the file.

    ``extents`` is how many the file system reports, ``runs`` how many pieces of the drive they are
    when neighbours are joined.
    """

    extents: int
    runs: int
    hole_bytes: int
    unwritten_bytes: int
    shared_bytes: int
    encoded_bytes: int
    inline_bytes: int
    delayed_bytes: int


def parse_extents(reply: bytes) -> list[Extent]:
    """Return the extents in the kernel's answer to FS_IOC_FIEMAP."""
    mapped = _HEADER.unpack_from(reply)[3]
    found = []
    for index in range(mapped):
        values = _EXTENT.unpack_from(reply, _HEADER.size + index * _EXTENT.size)
        found.append(Extent(logical=values[0], physical=values[1], length=values[2], flags=values[5]))
    return found


def read_extents(fd: int) -> Iterator[Extent]:
    """Yield an open file's extents in order.

    Raises
    ------
    OSError
        The file system does not tell: EOPNOTSUPP on tmpfs, overlay and network file systems.
    """
    start = 0
    while True:
        request = bytearray(_HEADER.size + _AT_ONCE * _EXTENT.size)
        # No FIEMAP_FLAG_SYNC: looking at a file must not make it wait for its drive.
        _HEADER.pack_into(request, 0, start, 2**64 - 1 - start, 0, 0, _AT_ONCE, 0)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request, True)
        batch = parse_extents(bytes(request))
        yield from batch
        if not batch or batch[-1].flags & _LAST:
            return
        start = batch[-1].logical + batch[-1].length


def summarize(extents: Iterable[Extent], size: int) -> Layout:
    """Sum up the extents of a file of ``size`` bytes."""
    count = runs = covered = 0
    flagged = dict.fromkeys((_UNWRITTEN, _SHARED, _ENCODED, _INLINE, _DELAYED), 0)
    physical_end = logical_end = -1
    for extent in extents:
        count += 1
        inside = max(0, min(extent.logical + extent.length, size) - extent.logical)
        covered += inside
        for flag in flagged:
            if extent.flags & flag:
                flagged[flag] += inside
        placed = not extent.flags & (_UNKNOWN | _DELAYED | _INLINE)
        if not placed or extent.physical != physical_end or extent.logical != logical_end:
            runs += 1
        physical_end = extent.physical + extent.length if placed else -1
        logical_end = extent.logical + extent.length
    return Layout(
        extents=count,
        runs=runs,
        hole_bytes=max(0, size - covered),
        unwritten_bytes=flagged[_UNWRITTEN],
        shared_bytes=flagged[_SHARED],
        encoded_bytes=flagged[_ENCODED],
        inline_bytes=flagged[_INLINE],
        delayed_bytes=flagged[_DELAYED],
    )


def layout(fd: int) -> Layout | str:
    """Return an open file's layout, or in words why its file system does not tell."""
    try:
        return summarize(read_extents(fd), os.fstat(fd).st_size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            return "this file system does not report extents"
        return f"the kernel refused to report extents: {os.strerror(error.errno or 0)}"
