"""The page cache as a benchmark needs it: a file made hot, cold or half-cached, and a check that it really is.

Nothing here needs privileges. Cold means *not in this kernel's page cache*; what the drive, a hypervisor or a
file server keeps to itself is out of reach and stays as it is.
"""

from __future__ import annotations

import mmap
import os
from typing import Literal

from gpunvme import _native

State = Literal["hot", "cold", "half", "alternating"]

MIB = 1 << 20
_COLD_AT_MOST = 0.01
_HOT_AT_LEAST = 0.999
_HALF_WITHIN = 0.05


class StateError(Exception):
    """A file could not be brought into the state that a case asks for; the message says how far it got."""


def resident_fraction(fd: int, nbytes: int) -> float | None:
    """Say how much of the start of a file is in the page cache.

    Parameters
    ----------
    fd : int
        The file.
    nbytes : int
        How many bytes from its start to look at.

    Returns
    -------
    float or None
        Between 0 and 1, or None where the kernel does not tell (a file of somebody else's, an old kernel).
    """
    pages = -(-nbytes // mmap.PAGESIZE)
    if pages == 0:
        return None
    cached = _native.cached_bytes(fd, 0, nbytes)
    return None if cached is None else min(1.0, cached / (pages * mmap.PAGESIZE))


def _read_through(fd: int, offset: int, nbytes: int, buffer: memoryview) -> None:
    """Bring a range into the page cache by reading it."""
    end = offset + nbytes
    while offset < end:
        got = os.preadv(fd, [buffer[: end - offset]], offset)
        if got == 0:
            return
        offset += got


def _drop(fd: int) -> None:
    """Write back what is dirty and drop the file's clean pages. Pages that somebody has mapped stay."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def bring(path: str, state: State, nbytes: int) -> float | None:
    """Bring the start of a file into a state of the page cache, and check that it is there.

    Parameters
    ----------
    path : str
        The file. It is read, never written.
    state : {"hot", "cold", "half", "alternating"}
        All of it cached; none of it; the first half; every other MiB, starting with the first.
    nbytes : int
        How many bytes from the file's start a case will use.

    Returns
    -------
    float or None
        The fraction that is cached now, or None where the kernel does not tell.

    Raises
    ------
    StateError
        If the file is not in that state afterwards.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fraction = resident_fraction(fd, nbytes)
        if state == "hot":
            with mmap.mmap(-1, 4 * MIB) as scratch, memoryview(scratch) as buffer:
                for _ in range(3):  # a busy machine takes pages away again
                    if fraction == 1.0:
                        break
                    _read_through(fd, 0, nbytes, buffer)
                    fraction = resident_fraction(fd, nbytes)
        else:
            for _ in range(3):  # pages still on their way through the kernel's per-CPU lists survive a first drop
                _drop(fd)
                fraction = resident_fraction(fd, nbytes)
                if fraction is None or fraction <= _COLD_AT_MOST:
                    break
            if fraction is not None and fraction > _COLD_AT_MOST:
                raise StateError(
                    f"{fraction:.0%} of the file stays in the page cache (mapped by a process, or a file system "
                    f"that lives in memory), so nothing can be read cold"
                )
        if state in ("half", "alternating"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead into what has to stay cold
            with mmap.mmap(-1, MIB) as scratch, memoryview(scratch) as buffer:
                if state == "half":
                    _read_through(fd, 0, nbytes // 2, buffer)
                else:
                    for offset in range(0, nbytes, 2 * MIB):
                        _read_through(fd, offset, min(MIB, nbytes - offset), buffer)
        fraction = resident_fraction(fd, nbytes)
    finally:
        os.close(fd)
    _check(state, fraction)
    return fraction


def _check(state: State, fraction: float | None) -> None:
    if fraction is None:
        return
    if state == "hot" and fraction < _HOT_AT_LEAST:
        raise StateError(f"only {fraction:.0%} of the file stays in the page cache: too little free memory")
    if state in ("half", "alternating") and abs(fraction - 0.5) > _HALF_WITHIN:
        raise StateError(f"{fraction:.0%} of the file is in the page cache where half was asked for")
