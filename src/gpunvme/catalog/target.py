"""Where a catalog lies: a file, a block device or a namespace, always through a `File`; and who may write there."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from gpunvme import _native
from gpunvme.errors import CatalogError, DeadlineExceeded, Error, UnsafeDeviceError, file_error
from gpunvme.file import File
from gpunvme.nvme.signatures import find_signature
from gpunvme.paths.nvme import NamespaceSource, is_namespace

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace
    from gpunvme.transfer import Transfer

#: What a catalog can be opened on.
Source = str | os.PathLike[str] | File | Any

_HEAD_BYTES = _native.CATALOG["HEAD_BYTES"]
_GRACE_SECONDS = 60  # as long as a drive may take to answer
_UNIT = 4096  # what is written is a multiple of this, or of a larger block

# Who writes in this process, by `Target.key`: neither flock nor O_EXCL keeps threads of one process apart where they
# share an open file, and namespaces have neither.
_writers: set[object] = set()
_writers_lock = threading.Lock()


class Target:
    """Reads and writes of whole units, flushes, and the writer's lock. Made by `open_target`.

    Parameters
    ----------
    file
        Open for reading, or also for writing.
    writable
        Whether it will be written.
    word
        What must be repeated as ``overwrite=`` to lose what is there.
    """

    def __init__(self, file: File, *, writable: bool, word: str) -> None:
        self.file = file
        self.name = file.name
        self.word = word
        self.writable = False
        self._hangs = False
        self._close: weakref.finalize[..., Target] | None = None
        self._process = os.getpid()
        self._leave: weakref.finalize[..., Target] | None = None
        source = file._file
        self.namespace: Namespace | None = source.namespace if isinstance(source, NamespaceSource) else None
        self.fixed = source.is_block_device
        self.unit = max(_UNIT, self.namespace.block_size if self.namespace is not None else _UNIT)
        if writable:
            self._lock()

    def close_with(self, close: Callable[[], object]) -> None:
        """Say what else is closed at the end, or when the target is forgotten."""
        self._close = weakref.finalize(self, close)
        self._close.atexit = False  # controllers and files see to their own end

    @property
    def size(self) -> int:
        """Bytes in it now."""
        return self.file.size

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read a range into host memory."""
        return self.file.read(offset, nbytes).numpy().tobytes()

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes, followed by zeros up to a whole unit."""
        padded = np.zeros(-(-len(data) // self.unit) * self.unit, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        self.file.write_from(padded, offset)

    def flush(self) -> None:
        """Wait until everything that was written is on the drive."""
        self.file.flush()

    def stop(self, writing: Transfer) -> None:
        """Stop a write and wait for its end: until then, what it writes to must not be used for anything else."""
        writing.cancel()
        try:
            writing.wait(_GRACE_SECONDS)
        except DeadlineExceeded:
            self._hangs = True
        except Error:
            pass  # what stopped it is being raised already

    def check_writer(self) -> None:
        """Refuse to write without the lock.

        Raises
        ------
        CatalogError
            If it was opened for reading, or by the process that this one was forked from, or if a write never ended.
        """
        if self._hangs:
            raise CatalogError("a write that was stopped never ended: open the catalog anew", filename=self.name)
        if not self.writable:
            raise CatalogError("the catalog is open for reading only: use mode 'r+'", filename=self.name)
        if os.getpid() != self._process:
            raise CatalogError("the catalog belongs to the process that opened it for writing", filename=self.name)

    def close(self) -> None:
        """Give the lock back and close what was opened here."""
        if self.writable and os.getpid() == self._process:
            self.writable = False
            self._tell_driver(False)
            try:
                if self.namespace is None:
                    fcntl.flock(self.file.fileno(), fcntl.LOCK_UN)
            except (OSError, ValueError):
                pass  # closed already, and the lock with it
            if self._leave is not None:
                self._leave()
        if self._close is not None:
            self._close()

    def _lock(self) -> None:
        if self.file.mode == "r":
            raise CatalogError("the file is open for reading only", filename=self.name)
        if self.namespace is not None:
            # One process drives a controller, and there it has one object for every namespace.
            key: object = (id(self.namespace.controller), self.namespace.nsid)
        else:
            status = os.fstat(self.file.fileno())
            key = status.st_rdev if self.fixed else (status.st_dev, status.st_ino)
        with _writers_lock:
            if key in _writers:
                raise CatalogError("another object of this process writes this catalog", filename=self.name)
            if self.namespace is None:
                try:
                    fcntl.flock(self.file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise CatalogError("another process writes this catalog", filename=self.name) from None
                except OSError as error:
                    raise file_error(error, "cannot lock", self.name) from None
            _writers.add(key)
            self._leave = weakref.finalize(self, _writers.discard, key)
            self._leave.atexit = False
        self._tell_driver(True)
        self.writable = True

    def _tell_driver(self, writes: bool) -> None:
        """Say that what is written through this file is the catalog's own: others are refused where a catalog is."""
        source = self.file._native
        if isinstance(source, NamespaceSource):
            source.writes_catalog = writes

    # --- what is there already

    def contents(self) -> str:
        """Say what is on it, as part of a sentence; empty if nothing is.

        Of a file every byte counts; of a device, magic numbers of partition tables and file systems, and its first and
        last MiB, which are zeros (or ones, as erased flash reads) where nobody wrote.
        """
        size = self.size
        if not self.fixed:
            try:
                where = os.lseek(self.file.fileno(), 0, os.SEEK_DATA) if size else 0
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data in it: empty, or room that was only reserved
                    return ""
                raise file_error(error, "cannot look at", self.name) from None
            return f"data at byte {where}" if size else ""
        found = find_signature(self.read, size)
        if found:
            return found
        for begin in (0, max(0, size - _HEAD_BYTES)):
            data = self.read(begin, min(_HEAD_BYTES, size - begin))
            if data.strip(b"\0") and data.strip(b"\xff"):
                return f"data between bytes {begin} and {begin + len(data)}"
        return ""

    def check_empty(self, overwrite: str | None) -> bool:
        """Refuse to lose what is there; return whether anything is.

        Raises
        ------
        UnsafeDeviceError
            If anything is, and ``overwrite`` is not this target's word.
        """
        found = self.contents()
        if found and overwrite != self.word:
            asked = f" (overwrite={overwrite!r} is not its name)" if overwrite is not None else ""
            raise UnsafeDeviceError(
                f"{self.name} holds {found}; it would be lost. To make a catalog of it all the same: "
                f"overwrite={self.word!r}{asked}"
            )
        return bool(found)


def open_target(source: Source, mode: str, overwrite: str | None = None) -> Target:
    """Open what a catalog lies on.

    Parameters
    ----------
    source
        The path of a file or block device, ``nvme+URI``, a `Namespace`, or an open `File`, which is not closed.
    mode
        ``"r"`` or ``"r+"``.
    overwrite
        Passed to the controller of an ``nvme+URI``.

    Raises
    ------
    CatalogError
        If it is to be written and somebody else writes it.
    UnsafeDeviceError
        If it is to be written and the kernel uses it.
    FileError, NvmeError
        If it cannot be opened.
    """
    if mode not in ("r", "r+"):
        raise ValueError(f"mode {mode!r}: use 'r' or 'r+'")
    writable = mode == "r+"
    if isinstance(source, File):
        namespace = source._file.namespace if isinstance(source._file, NamespaceSource) else None
        word = source.name if namespace is None else _device_name(namespace)
        return Target(source, writable=writable, word=word)
    if is_namespace(source):
        return _open_namespace(source, mode, overwrite)
    return _open_path(os.fspath(source), writable)


def _open_path(name: str, writable: bool) -> Target:
    with ExitStack() as opened:
        try:
            block_device = writable and stat.S_ISBLK(os.stat(name).st_mode)
        except (OSError, ValueError):
            block_device = False  # opening it says what is wrong
        if block_device:
            from gpunvme.nvme.block_claim import claim_block_device

            claim = claim_block_device(name)
            opened.callback(os.close, claim)
            # Opened again, so that the claim ends with the catalog, whoever still has the report of a transfer.
            fd = os.open(f"/proc/self/fd/{claim}", os.O_RDWR | os.O_CLOEXEC)
            try:
                file = opened.enter_context(File(fd, "r+", name=name, claimed=True))
            finally:
                os.close(fd)
        else:
            file = opened.enter_context(File(name, "r+" if writable else "r"))
        target = Target(file, writable=writable, word=name)
        target.close_with(opened.pop_all().close)
        return target


def _open_namespace(source: str | Namespace, mode: str, overwrite: str | None) -> Target:
    with ExitStack() as opened:
        if isinstance(source, str):
            from gpunvme import nvme
            from gpunvme.nvme.uri import split_source

            uri, nsid = split_source(source)
            namespace = opened.enter_context(nvme.open(uri, overwrite=overwrite)).namespace(nsid)
        else:
            namespace = source
        target = Target(File(namespace, mode), writable=mode == "r+", word=_device_name(namespace))
        target.close_with(opened.pop_all().close)
        return target


def _device_name(namespace: Namespace) -> str:
    """Return what `Controller` takes as ``overwrite``."""
    return namespace.controller.transport.uri.partition(":")[2].partition("?")[0]
