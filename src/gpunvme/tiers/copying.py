"""A file copied to another drive and read back from there, at a pace."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from dataclasses import dataclass

from gpunvme.errors import FileError, TierError
from gpunvme.file import File
from gpunvme.tiers.directory import Signature
from gpunvme.tiers.pace import Pace
from gpunvme.transfer import Transfer

CHUNK = 8 << 20


class SourceChangedError(TierError):
    """The source was written to, or replaced, while it was copied."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What arrived: the checksum is BLAKE2b-128 of the content, in hexadecimal; ``inode`` is the copy's."""

    source: Signature
    inode: int
    nbytes: int
    mtime_ns: int
    checksum: str


def checksum_of(file: File, nbytes: int, pace: Pace | None = None) -> str:
    """Read ``nbytes`` bytes of a file and return their checksum.

    Raises
    ------
    RangeError, FileError
        If it has fewer; if it cannot be read.
    """
    return _stream(file, None, nbytes, pace)


def copy_verified(source_fd: int, copy_fd: int, name: str, pace: Pace) -> Copied:
    """Copy one open file into another, empty one; fsync it; read it back from its drive and compare.

    Mode bits and times are kept, holes are filled, extended attributes and owner are not copied.

    Raises
    ------
    SourceChangedError
        If the source is not afterwards what it was before.
    FileError
        If reading or writing fails (ENOSPC too), or if what was read back differs (EIO).
    Cancelled
        If the pace was told to stop.
    """
    before = os.fstat(source_fd)
    nbytes = before.st_size
    with File(source_fd, "r", name=name) as source, File(copy_fd, "r+", name=name) as copy:
        checksum = _stream(source, copy, nbytes, pace)
        os.fchmod(copy_fd, stat.S_IMODE(before.st_mode) & 0o777)
        os.utime(copy_fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.fsync(copy_fd)
        # Without this the page cache would be compared, not what arrived on the drive.
        os.posix_fadvise(copy_fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if copy.size != nbytes or checksum_of(copy, nbytes) != checksum:
            raise FileError(errno.EIO, "the copy reads back differently: its drive is not to be trusted", name)
    if Signature.of(os.fstat(source_fd)) != Signature.of(before):
        raise SourceChangedError(f"{name!r} changed while it was copied")
    after = os.fstat(copy_fd)
    return Copied(Signature.of(before), after.st_ino, nbytes, after.st_mtime_ns, checksum)


def _stream(source: File, copy: File | None, nbytes: int, pace: Pace | None) -> str:
    """Read all, hash it, and write it if there is a copy: one buffer is written while the next is read."""
    digest = hashlib.blake2b(digest_size=16)
    chunk = CHUNK if pace is None or pace.piece is None else min(CHUNK, pace.piece)
    buffers = [memoryview(mmap.mmap(-1, max(1, min(chunk, nbytes)))) for _ in range(2)]
    writing: Transfer | None = None
    try:
        for number, offset in enumerate(range(0, nbytes, chunk)):
            part = buffers[number % 2][: min(chunk, nbytes - offset)]
            if pace is not None:
                pace.take(len(part))
            source.read_into(part, offset)
            digest.update(part)
            if writing is not None:
                writing.wait()
            if copy is not None:
                writing = copy.write_from(part, offset, wait=False)
        if writing is not None:
            writing.wait()
    except BaseException:
        if writing is not None:
            writing.cancel()
        raise
    return digest.hexdigest()
