"""Files that a benchmark makes: where there is room, of bytes that no drive can shortcut, removed afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from gpunvme.bench.machine import IN_MEMORY, filesystem, size_text

_MIB = 1 << 20
_PIECE = 16 * _MIB


def roomy_directory(nbytes: int) -> str:
    """Choose where a temporary file of some size goes: a real file system with room, if there is one.

    Parameters
    ----------
    nbytes : int
        How much has to fit, twice over.

    Returns
    -------
    str
        A directory. It lives in memory only where no candidate on a drive has room.

    Raises
    ------
    OSError
        If no candidate has room.
    """
    candidates = [tempfile.gettempdir(), "/var/tmp", os.getcwd()]
    roomy = [
        name
        for name in dict.fromkeys(candidates)
        if os.access(name, os.W_OK) and shutil.disk_usage(name).free > 2 * nbytes
    ]
    on_drive = [name for name in roomy if filesystem(name)[0] not in IN_MEMORY]
    if not roomy:
        raise OSError(f"no room for {size_text(nbytes)} in any of {', '.join(candidates)}: name a file instead")
    return (on_drive or roomy)[0]


def random_pieces(nbytes: int) -> Iterator[memoryview]:
    """Yield random bytes, faster than a drive writes them.

    Parameters
    ----------
    nbytes : int
        How many in all.

    Yields
    ------
    memoryview
        Pieces that neither compress nor repeat from page to page.
    """
    stock = memoryview(os.urandom(_PIECE + _MIB))
    for number in range(-(-nbytes // _PIECE)):
        start = number * 4099 % _MIB
        yield stock[start : start + min(_PIECE, nbytes - number * _PIECE)]


@contextlib.contextmanager
def temporary_file(nbytes: int) -> Iterator[str]:
    """Make a file of random bytes for the length of a ``with`` block, and give its name.

    Raises
    ------
    OSError
        If there is no room for it.
    """
    handle, name = tempfile.mkstemp(prefix="gpunvme-bench-", dir=roomy_directory(nbytes))
    try:
        with open(handle, "wb") as file:
            file.writelines(random_pieces(nbytes))
        yield name
    finally:
        remove_quietly(name)


def remove_quietly(name: str) -> None:
    """Remove a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
