"""`File`: what people open. Arguments are checked before anything moves."""

from __future__ import annotations

import errno
import operator
import os
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native
from gpunvme.arguments import checked_span, gathered_span, offsets_array
from gpunvme.errors import FileError, RangeError
from gpunvme.many import carry
from gpunvme.memory import Buffer, Device, Span, check_gpu_span
from gpunvme.opening import open_descriptor, open_path, sync_source
from gpunvme.p2pdma.mappings import mapping_of
from gpunvme.paths.base import Order, Part, Path, Source
from gpunvme.paths.choose import HOST, Explanation, check_forced, explain, explain_memory, pick, pick_for_memory
from gpunvme.paths.nvme import NamespaceSource, is_namespace, open_namespace
from gpunvme.replace import Replacement
from gpunvme.streams import stream_handle
from gpunvme.transfer import Progress, Transfer, raise_native

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace

_LARGEST_FILE = 2**63 - 1


def open(source: str | os.PathLike[str] | int | Namespace, mode: str = "r", *, path: str = "auto") -> File:
    """Open a file, block device or NVMe namespace.

    Parameters
    ----------
    source
        A path, or a file descriptor (duplicated: its owner may close it); ``nvme+URI?nsid=N``, or a
        `gpunvme.nvme.Namespace`, for the bytes of a namespace.
    mode
        ``"r"``: read; ``"r+"``: read and write a file that exists; ``"w"``: read and write a file that is created,
        or emptied if it exists. For a descriptor the mode must be one that it was opened for.
    path
        Name of the path that must carry every transfer, or ``"auto"`` for the best one.

    Raises
    ------
    FileError
        If the operating system refuses, or if it is neither a regular file nor a block device.
    """
    return File(source, mode, path=path)


class File:
    """An open file, between which and memory bytes are moved. A context manager.

    Several threads may use one `File`; a forked child may read into host memory with it. Made by `open`; ``name`` is
    what a file that is opened by its descriptor is called in errors, and ``claimed`` says that its descriptor is a
    block device's that nobody else uses and that may be written (`nvme.block_claim`).
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | int | Namespace,
        mode: str = "r",
        *,
        path: str = "auto",
        name: str | None = None,
        claimed: bool = False,
    ) -> None:
        if mode not in ("r", "r+", "w"):
            raise ValueError(f"mode {mode!r}: use 'r', 'r+' or 'w'")
        self._mode = mode
        self._forced = path
        self._paths: dict[tuple[Device, bool], Path] = {}
        self._path_name: str | None = None
        self._native: Source | None = None
        self.last_transfer: Transfer | None = None
        if isinstance(source, int):
            self._name = f"<file descriptor {source}>" if name is None else name
            self._native = open_descriptor(source, self._name, mode, claimed=claimed)
        elif is_namespace(source):
            opened = open_namespace(source, mode)
            self._native, self._name = opened, opened.namespace.name
        else:
            self._name = os.fspath(source)  # type: ignore[arg-type]  # no namespace: see above
            self._path_name = os.path.abspath(self._name)  # for atomic writes, wherever the process goes meanwhile
            self._native = open_path(self._name, mode)
        if path != "auto":
            check_forced(self._native, path)  # a path that does not exist is an error now

    @property
    def name(self) -> str:
        """The path that it was opened by."""
        return self._name

    @property
    def mode(self) -> str:
        """The mode that it was opened with."""
        return self._mode

    @property
    def size(self) -> int:
        """Size now, in bytes."""
        try:
            return self._file.size()
        except _native.Failure as failure:
            raise_native(failure)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._native is None

    def fileno(self) -> int:
        """File descriptor, for questions about the file; it belongs to this object."""
        return self._file.fileno()

    def flush(self) -> None:
        """Wait until everything that was written is on the drive.

        Raises
        ------
        FileError, NvmeError
            If some of it may not be.
        """
        sync_source(self._file, self._name)

    def close(self) -> None:
        """Close it. Transfers in flight keep what they need; those of a namespace end with its controller."""
        source, self._native = self._native, None
        if isinstance(source, NamespaceSource):
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._native is None else f"mode {self._mode!r}"
        return f"<gpunvme.File {self._name!r}, {state}>"

    @property
    def _file(self) -> Source:
        if self._native is None:
            raise ValueError(f"{self._name!r} is closed")
        return self._native

    def _path(
        self, span: Span, offset: int = 0, nbytes: int | None = None, *, write: bool = False, gather: bool = False
    ) -> Path:
        device, mapping = span.device, mapping_of(span)
        if mapping is not None:
            special = pick_for_memory(self._file, mapping, self._forced)
            if special is not None:
                return special
        path = self._paths.get((device, gather))
        if path is None:
            path, always = pick(self._file, device, self._forced, offset, nbytes, write=write, gather=gather)
            if always:
                self._paths[device, gather] = path
        return path

    def explain(self, device: Any = "cpu", *, measure: bool = False) -> Explanation:
        """Tell for every path whether it can carry bytes between this file and ``device``, and why.

        Parameters
        ----------
        device
            The other end; or a `P2pMemory`, for which a small read tells.
        measure
            Where cuFile can be used: measure it against the ``host`` path now, over a part of this file. It takes
            seconds, opens cuFile's driver, and is kept on disk: from then on ``path="auto"`` goes by it.
        """
        if measure:
            self._paths.clear()
        if isinstance(device, Buffer):
            mapping = mapping_of(device.span)
            if mapping is not None:
                return explain_memory(self._file, mapping, self._forced)
            device = device.device
        return explain(self._file, Device.parse(device), self._forced, measure=measure)

    def read_into(
        self,
        destination: Any,
        offset: int = 0,
        nbytes: int | None = None,
        *,
        stream: Any = None,
        wait: bool = True,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Read a range of the file into memory.

        Parameters
        ----------
        destination
            A contiguous, writable tensor, array, buffer or `Span`, on the host or a GPU.
        offset
            Where to start in the file, in bytes.
        nbytes
            How many bytes; the destination's size if None.
        stream
            CUDA stream that the read is ordered behind: it starts after the work that is queued there now. If None,
            the current stream of the destination's framework. When the transfer is done, the bytes are there for
            every stream.
        wait
            Whether to return only when it is done. If not, `Transfer.wait` before using the destination.
        progress
            Called as ``progress(bytes_done, bytes_total)`` by the thread that waits, about 20 times a second.
        timeout
            Deadline in seconds from now; after it the transfer is stopped.

        Raises
        ------
        RangeError
            If the file does not have that range.
        SpanError
            If the destination is too small, read-only or not contiguous.
        FileError, TruncatedError, CudaError, DeadlineExceeded, Cancelled
            If it fails on the way; the destination's content is then undefined.
        """
        offset = operator.index(offset)
        span = checked_span(destination, offset, nbytes, writable=True)
        self._check_range(offset, span.nbytes)
        path = self._path(span, offset, span.nbytes)
        order = Order(False, span.device, stream_handle(stream, destination, span.device), timeout, not wait)
        if span.device.is_gpu:
            check_gpu_span(span, destination)
        if wait and path is HOST:
            report = HOST.small_read(Part(self._file, offset, span), order.stream)
            if report is not None:
                if progress is not None:
                    progress(span.nbytes, span.nbytes)
                return Transfer.finished(report, span.nbytes)
        return self._move(path, order, offset, span, wait, progress)

    def read(self, offset: int = 0, nbytes: int | None = None, device: Any = "cpu") -> Buffer:
        """Read a range of the file into new memory; the rest of the file if ``nbytes`` is None.

        Raises the same errors as `read_into`.
        """
        offset = operator.index(offset)
        nbytes = max(0, self.size - offset) if nbytes is None else operator.index(nbytes)
        self._check_range(offset, nbytes)
        buffer = Buffer.empty(nbytes, device, congruent_to=offset)
        self.last_transfer = self.read_into(buffer, offset)
        return buffer

    def gather(
        self,
        offsets: Any,
        nbytes: int,
        out: Any = None,
        device: Any = None,
        *,
        stream: Any = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Read many small ranges of one size, packed in the order of ``offsets``.

        Parameters
        ----------
        offsets
            File offsets in bytes: a sequence of int, or a one-dimensional integer array or tensor on the host or a
            GPU. Neighbours in the list that adjoin in the file are read as one.
        nbytes
            Size of each range in bytes.
        out
            Where to: memory of ``len(offsets) * nbytes`` bytes at least. If None, a new `Buffer` of shape
            ``(len(offsets), nbytes)`` on ``device``.
        device
            Where to, if ``out`` is None: the host unless given.
        stream, progress, timeout
            As for `read_into`.

        Returns
        -------
        ``out``, or the new `Buffer`. `last_transfer` is the report.

        Raises
        ------
        RangeError
            If a range is not inside the file; says which.
        SpanError, TypeError, FileError, TruncatedError, CudaError, DeadlineExceeded, Cancelled
            As for `read_into`.
        """
        file = self._file
        nbytes = operator.index(nbytes)
        if nbytes <= 0:
            raise RangeError(f"nbytes is {nbytes}: each read must have at least one byte")
        places = offsets_array(offsets)
        self._check_places(places, nbytes)
        total = len(places) * nbytes
        if out is None:
            out = Buffer.empty(total, "cpu" if device is None else device, shape=(len(places), nbytes))
        span = gathered_span(out, device, total, f"{len(places)} reads of {nbytes} bytes")
        order = Order(False, span.device, stream_handle(stream, out, span.device), timeout)
        movement = self._path(span, gather=True).begin(order)

        def add() -> None:
            if nbytes > _native.MOST_GATHERED_BYTES:
                movement.add([Part(file, int(at), span.part(i * nbytes, nbytes)) for i, at in enumerate(places)])
            elif len(places):
                movement.add_gather(file, places, nbytes, span)

        self.last_transfer = carry(movement, order, total, (file, span, places), True, progress, add)
        return out

    def write_from(
        self,
        source: Any,
        offset: int = 0,
        nbytes: int | None = None,
        *,
        stream: Any = None,
        wait: bool = True,
        fsync: bool = False,
        atomic: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Write memory to the file, which grows as needed.

        Parameters
        ----------
        source
            A contiguous tensor, array, buffer or `Span`, on the host or a GPU.
        offset
            Where to start in the file, in bytes.
        nbytes
            How many bytes; the source's size if None.
        stream, wait, progress, timeout
            As for `read_into`. The source must not change until the transfer is done.
        fsync
            Whether the bytes are on the drive when the transfer is done.
        atomic
            Replace the whole file by the source: a temporary file beside it is written, fsynced and renamed, and the
            directory is fsynced. A crash leaves the old content or the new. Needs ``offset`` 0 and ``wait``.

        Raises
        ------
        FileError
            If the file is open for reading only, if the disk is full (found before anything is written, where
            the file system can reserve space), or on an I/O error. A file that grew is cut back to its old size.
        SpanError, RangeError, CudaError, DeadlineExceeded, Cancelled
            As for `read_into`.
        """
        if atomic:
            return self._replace(source, offset, nbytes, stream, wait, progress, timeout)
        file = self._file
        offset = operator.index(offset)
        span = checked_span(source, offset, nbytes, writable=False)
        if offset + span.nbytes > _LARGEST_FILE:
            raise RangeError(f"no file can have {offset + span.nbytes} bytes")
        if not file.writable:
            raise FileError(errno.EBADF, "the file is open for reading only; use mode 'r+' or 'w'", self._name)
        path = self._path(span, offset, span.nbytes, write=True)
        order = Order(True, span.device, stream_handle(stream, source, span.device), timeout, not wait)
        if span.device.is_gpu:
            check_gpu_span(span, source)
        old_size = self.size
        try:
            file.reserve(offset, span.nbytes)
        except _native.Failure as failure:
            self._cut_back(old_size)
            raise_native(failure)

        def on_done(success: bool) -> None:
            if not success:
                self._cut_back(old_size, file)
            elif fsync:
                sync_source(file, self._name)

        try:
            return self._move(path, order, offset, span, wait, progress, on_done)
        except BaseException:
            if wait:
                self._cut_back(old_size, file)
            raise

    def _replace(
        self,
        source: Any,
        offset: int,
        nbytes: int | None,
        stream: Any,
        wait: bool,
        progress: Progress | None,
        timeout: float | None,
    ) -> Transfer:
        if self._path_name is None:
            raise ValueError("atomic=True needs a file that was opened by its path")
        if self._mode == "r":
            raise FileError(errno.EBADF, "the file is open for reading only; use mode 'r+' or 'w'", self._name)
        if offset != 0 or not wait:
            raise ValueError("atomic=True replaces the whole file at once: offset must be 0 and wait True")
        with Replacement(self._path_name) as replacement:
            transfer = replacement.file.write_from(source, 0, nbytes, stream=stream, progress=progress, timeout=timeout)
        self._native = open_path(self._path_name, "r+")
        return transfer

    def _move(
        self,
        path: Path,
        order: Order,
        offset: int,
        span: Span,
        wait: bool,
        progress: Progress | None,
        on_done: Any = None,
    ) -> Transfer:
        part = Part(self._file, offset, span)
        movement = path.begin(order)
        return carry(movement, order, span.nbytes, part, wait, progress, lambda: movement.add([part]), on_done)

    def _check_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise self._out_of_range(offset, nbytes)

    def _out_of_range(self, offset: int, nbytes: int) -> RangeError:
        return RangeError(f"{self._name!r} has {self.size} bytes; bytes {offset} to {offset + nbytes} were asked for")

    def _check_places(self, places: NDArray[np.int64], nbytes: int) -> None:
        if not len(places):
            return
        size = self.size
        bad = np.flatnonzero((places < 0) | (places > size - nbytes))
        if len(bad):
            first = int(bad[0])
            raise RangeError(
                f"{self._name!r} has {size} bytes; read number {first} asks for bytes {places[first]} to "
                f"{int(places[first]) + nbytes} ({len(bad)} of {len(places)} reads are outside)"
            )

    def _cut_back(self, size: int, file: Source | None = None) -> None:
        file = self._file if file is None else file
        if not file.is_block_device and file.size() > size:
            os.ftruncate(file.fileno(), size)
