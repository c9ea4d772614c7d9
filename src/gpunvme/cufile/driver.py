"""The cuFile driver of this process: opened once, its properties, its statistics, closed at the end."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from gpunvme import _native
from gpunvme.cufile import library
from gpunvme.cufile.probe import probe
from gpunvme.errors import CufileError, Error, PathError

_ALREADY_OPEN = 5026
_ALLOW_COMPAT, _POSIX_MODE = 1, 2  # bits of the control flags
_BATCH, _STREAMS, _P2P = 1, 2, 4  # bits of the feature flags
_DETAILED = 3  # level of the statistics that has GPUs


class _Properties(ctypes.Structure):
    """CUfileDrvProps_t. The bindings (13.5) take its address and have no type for it."""

    _fields_ = [
        ("nvfs_major", ctypes.c_uint),
        ("nvfs_minor", ctypes.c_uint),
        ("poll_threshold", ctypes.c_size_t),
        ("max_direct_io_kib", ctypes.c_size_t),
        ("status_flags", ctypes.c_uint),
        ("control_flags", ctypes.c_uint),
        ("feature_flags", ctypes.c_uint),
        ("device_cache_kib", ctypes.c_uint),
        ("buffer_cache_kib", ctypes.c_uint),
        ("device_pinned_kib", ctypes.c_uint),
        ("max_batch", ctypes.c_uint),
        ("batch_timeout_ms", ctypes.c_uint),
        ("room", ctypes.c_byte * 4096),  # for versions that know more
    ]


@dataclass(frozen=True, slots=True)
class Properties:
    """What the open driver says of itself (cuFileDriverGetProperties)."""

    nvidia_fs: tuple[int, int]
    status_flags: int
    control_flags: int
    feature_flags: int
    max_direct_io_bytes: int
    max_registered_bytes: int
    max_batch: int

    @property
    def p2pdma(self) -> bool:
        """Whether cuFile may use the kernel's P2PDMA."""
        return bool(self.feature_flags >> _P2P & 1)

    @property
    def batches(self) -> bool:
        """Whether it takes batches."""
        return bool(self.feature_flags >> _BATCH & 1)

    @property
    def streams(self) -> bool:
        """Whether it takes requests in a stream's order."""
        return bool(self.feature_flags >> _STREAMS & 1)

    @property
    def allows_compat(self) -> bool:
        """Whether it may carry bytes through host memory."""
        return bool(self.control_flags >> _ALLOW_COMPAT & 1)

    def supports(self, status_bit: int) -> bool:
        """Whether a bit of CUfileDriverStatusFlags is set: a kind of storage that nvidia-fs reaches."""
        return bool(self.status_flags >> status_bit & 1)


@dataclass(frozen=True, slots=True)
class Driver:
    """The open driver. ``no_statistics`` says why its statistics are off; "" where they are on."""

    version: int
    library: str
    properties: Properties
    no_statistics: str
    ours: bool

    def __str__(self) -> str:
        return f"cuFile {library.version_text(self.version)}"


_lock = threading.RLock()
_driver: Driver | None = None
_problem = ""
_process = 0
_closing: list[Callable[[], bool]] = []


def if_open() -> Driver | None:
    """The driver, if this process has it open."""
    return _driver if _process == os.getpid() else None


def problem() -> str:
    """Why it could not be opened when that was tried; "" if it was not, or could."""
    return _problem if _process == os.getpid() else ""


def driver() -> Driver:
    """Open the driver, once in a process.

    Raises
    ------
    PathError
        If it cannot be opened, or if the process was forked after it was.
    """
    global _driver, _problem, _process
    with _lock:
        if _process and _process != os.getpid():
            raise PathError("cuFile was used before this process was forked, and works only in the parent")
        _process = os.getpid()
        if _problem:
            raise PathError(_problem)
        if _driver is None:
            try:
                _driver = _open()
            except Error as error:
                _problem = f"cuFile cannot be used: {error}" if not isinstance(error, PathError) else str(error)
                raise PathError(_problem) from None
            atexit.register(close)
        return _driver


def _open() -> Driver:
    # Without a GPU cuFileDriverOpen never returns.
    if reason := _native.cuda_unavailable_reason():
        raise PathError(f"cuFile cannot be used: {reason}")
    if reason := library.why_absent():
        raise PathError(f"cuFile cannot be used: {reason}")
    library.set_log_file()
    if reason := probe().problem:
        raise PathError(f"cuFile cannot be used: {reason}")
    version = library.version()
    ours = True
    try:
        library.call("driver_open")
    except CufileError as error:
        if error.code != _ALREADY_OPEN:
            raise
        ours = False  # another library of this process did
    return Driver(version, library.loaded_file(), _properties(), _start_statistics(), ours)


def _properties() -> Properties:
    told = _Properties()
    library.call("driver_get_properties", ctypes.addressof(told))
    return Properties(
        (told.nvfs_major, told.nvfs_minor),
        told.status_flags,
        told.control_flags,
        told.feature_flags,
        told.max_direct_io_kib << 10,
        told.device_pinned_kib << 10,
        told.max_batch,
    )


def _start_statistics() -> str:
    try:
        library.call("set_stats_level", _DETAILED)
        library.call("stats_start")
    except (Error, AttributeError) as error:
        return f"cuFile's statistics cannot be switched on ({error})"
    return ""


def before_close(function: Callable[[], bool]) -> None:
    """Have a function called before the driver is closed; the last one first. It says whether closing is safe."""
    _closing.append(function)


def close() -> None:
    """Close the driver, unless something of it is still in flight: then it is left to the end of the process."""
    global _driver
    with _lock:
        if _driver is None or _process != os.getpid():
            return
        safe = all(function() for function in reversed(_closing))  # what comes after what is not safe is left
        if safe and _driver.ours:
            try:
                library.call("driver_close")
            except Error:
                pass  # the process ends; nobody could do anything about it
        _driver = None


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)
