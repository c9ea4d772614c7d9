"""Files as cuFile knows them: one handle a file, registered on first use, until the file is let go."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import numpy as np

from gpunvme import _native
from gpunvme.cufile import facts, library, ways
from gpunvme.cufile.driver import before_close, driver
from gpunvme.errors import Error, PathError, file_error

_OPAQUE_FD = 1  # CU_FILE_HANDLE_TYPE_OPAQUE_FD
_NOT_REGISTERED = 5027  # CU_FILE_HANDLE_NOT_REGISTERED


class Handle:
    """One file's handle, on a descriptor of its own. Whoever has requests in flight holds it.

    Attributes
    ----------
    name
        The file's, as the kernel has it.
    number
        ``CUfileHandle_t``.
    direct
        Whether the descriptor is O_DIRECT, as anything but compatibility mode needs it.
    place
        Where the file is.
    align
        Offsets and sizes that O_DIRECT takes are multiples of this many bytes.
    only_compat
        Whether cuFile can do no better for the file than compatibility mode.
    """

    def __init__(self, file: _native.SourceFile) -> None:
        self.direct = not file.direct_refusal
        self.align = max(4096, file.offset_align)
        self.place = facts.place_of(file.fileno())
        opened = driver()
        self.only_compat = bool(ways.why_no_nvidia_fs(file, self.place, opened)) and bool(
            ways.why_no_p2pdma(file, self.place, opened)
        )
        flags = os.O_CLOEXEC | (os.O_RDWR if file.writable else os.O_RDONLY) | (os.O_DIRECT if self.direct else 0)
        link = f"/proc/self/fd/{file.fileno()}"
        self.name = _name(link)
        try:
            self._fd = os.open(link, flags)
        except OSError as error:
            raise file_error(error, "the file cannot be opened once more, for cuFile", self.name) from None
        try:
            self.number = _register(self._fd)
        except Error as error:
            os.close(self._fd)
            missing = facts.missing_from_udev(self.place) if getattr(error, "code", 0) == _NOT_REGISTERED else ""
            raise PathError(f"cuFile does not take {self.name!r}: {missing and missing + ': '}{error}") from None
        self._finalizer = weakref.finalize(self, _release, self.number, self._fd, os.getpid())
        self._finalizer.atexit = False  # the driver's end does it

    def close(self) -> None:
        """Deregister it; nothing of it may be in flight."""
        self._finalizer()


def _name(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return link


def _register(fd: int) -> int:
    descriptor: Any = np.zeros(1, library.bindings().descr_dtype)
    descriptor["type"] = _OPAQUE_FD
    descriptor["handle"]["fd"] = fd
    return int(library.call("handle_register", descriptor.ctypes.data))


def _release(number: int, fd: int, process: int) -> None:
    if process == os.getpid():  # a forked child has the parent's driver only in name
        try:
            library.call("handle_deregister", number)
        except Error:
            pass  # it is gone already
    os.close(fd)


_lock = threading.RLock()  # reentrant: a finalizer may run anywhere
_handles: weakref.WeakKeyDictionary[_native.SourceFile, Handle] = weakref.WeakKeyDictionary()
_all: weakref.WeakSet[Handle] = weakref.WeakSet()  # those whose file is gone, too


def handle_of(file: _native.SourceFile) -> Handle:
    """The handle of a file, registered if it is not yet.

    Raises
    ------
    FileError
        If the file cannot be opened once more.
    PathError
        If cuFile refuses it.
    """
    with _lock:
        handle = _handles.get(file)
        if handle is None:
            handle = _handles[file] = Handle(file)
            _all.add(handle)
        return handle


def _close_all() -> bool:
    with _lock:
        for handle in list(_all):
            handle.close()
        _handles.clear()
        _all.clear()
    return True


def _after_fork_in_child() -> None:
    global _lock, _handles, _all
    _lock, _all = threading.RLock(), weakref.WeakSet()
    _handles = weakref.WeakKeyDictionary()


before_close(_close_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
