"""Opening files for the engine: names, descriptors, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from gpunvme import _native
from gpunvme.errors import FileError, file_error
from gpunvme.paths.base import Source
from gpunvme.paths.nvme import NamespaceSource
from gpunvme.transfer import raise_native

_NO_BLOCK_DEVICES = "block devices are written as catalogs only (gpunvme.Catalog.create)"


def open_path(name: str, mode: str) -> _native.SourceFile:
    """Open a file by its name."""
    if b"\0" in os.fsencode(name):
        raise ValueError("embedded null byte")
    try:
        if mode != "r" and stat.S_ISBLK(os.stat(name).st_mode):
            raise FileError(errno.EPERM, _NO_BLOCK_DEVICES, name)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        # The engine says what is wrong with the name.
    try:
        return _native.SourceFile.open(os.fsencode(name), mode)
    except _native.Failure as failure:
        raise_native(failure)


def open_descriptor(fd: int, name: str, mode: str, *, claimed: bool = False) -> _native.SourceFile:
    """Use a descriptor, of which a duplicate is made; ``claimed``: of a block device that may be written."""
    again = None
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_WRONLY:
            raise FileError(errno.EBADF, f"mode {mode!r} needs a descriptor that is open for reading", name)
        if flags & (os.O_APPEND | os.O_DIRECT):
            # Appending descriptors write elsewhere than they are told to; O_DIRECT ones refuse what is not aligned.
            again = os.open(f"/proc/self/fd/{fd}", flags & os.O_ACCMODE | os.O_CLOEXEC)
        file = _native.SourceFile.from_descriptor(fd if again is None else again, os.fsencode(name))
    except _native.Failure as failure:
        raise_native(failure)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise file_error(error, "cannot use the file descriptor", name) from None
    finally:
        if again is not None:
            os.close(again)
    if mode != "r" and not file.writable:
        raise FileError(errno.EBADF, f"mode {mode!r} needs a descriptor that is open for reading and writing", name)
    if mode != "r" and file.is_block_device and not claimed:
        raise FileError(errno.EPERM, _NO_BLOCK_DEVICES, name)
    if mode == "w":
        os.ftruncate(fd, 0)
    return file


def sync_source(source: Source, name: str) -> None:
    """Wait until what was written is on the drive."""
    if isinstance(source, NamespaceSource):
        source.flush()
        return
    try:
        os.fsync(source.fileno())
    except OSError as error:
        raise file_error(error, "fsync", name) from None
