"""Whether a drive reaches a device's memory: asked by one small read, and remembered."""

from __future__ import annotations

import ctypes
import os
import threading

from gpunvme import _native
from gpunvme.cufile.facts import place_of
from gpunvme.p2pdma import reasons
from gpunvme.p2pdma.mappings import Mapping

_PAGE = 4096

_lock = threading.Lock()
_known: dict[tuple[int, str], str] = {}


def why_not(file: _native.SourceFile, mapping: Mapping) -> str:
    """Why a file cannot be read into a device's memory, or nothing.

    A page of the file is read into the spare page of the mapping. What comes of it holds for every file of the same
    file system. It is tried again where it told nothing: an empty file, or one that is in the page cache altogether.
    A hole is filled by the processor, so "nothing" is no promise: requests are checked too.
    """
    fd = file.fileno()
    refusal = reasons.why_no_file(file, place_of(fd))
    if refusal:
        return refusal
    key = os.fstat(fd).st_dev if not file.is_block_device else os.fstat(fd).st_rdev, mapping.provider
    with _lock:
        if key in _known:
            return _known[key]
    answer = _read(file, mapping)
    if answer is None:
        return ""
    with _lock:
        return _known.setdefault(key, answer)


def forget() -> None:
    """Ask again."""
    with _lock:
        _known.clear()


def _read(file: _native.SourceFile, mapping: Mapping) -> str | None:
    """Why a small read failed, "" if it did not; None where it tells nothing."""
    offset = _uncached_page(file)
    if offset is None or mapping.spare is None:
        return None
    try:
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return f"it needs O_DIRECT, which was refused: {error.strerror}"
    try:
        # The processor, were it to fill the page, would take the bytes out of the page cache.
        os.preadv(fd, [(ctypes.c_char * _PAGE).from_address(mapping.spare)], offset)
    except OSError as error:
        return reasons.refused(error.errno or 0, fd, mapping.provider) if error.errno in reasons.REFUSALS else None
    finally:
        os.close(fd)
    if _native.cached_bytes(file.fileno(), offset, _PAGE):
        return "the file system reads through the page cache, in spite of O_DIRECT"
    return ""


def _uncached_page(file: _native.SourceFile) -> int | None:
    """A whole page of a file that is not in the page cache, or None."""
    pages = file.size() // _PAGE
    for page in dict.fromkeys((0, pages // 2, pages - 1)):
        if pages and _native.cached_bytes(file.fileno(), page * _PAGE, _PAGE) == 0:
            return page * _PAGE
    return None
