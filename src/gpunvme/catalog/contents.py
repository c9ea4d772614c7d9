"""The bytes of a region on their way: streamed in pieces, summed as they pass, in bounded memory.

A region's checksum is the CRC-32 of zlib: it is in every Python, fast, and every other language has it. Sums of one
region cannot be shared between threads, those of several can; zlib works without the GIL.
"""

from __future__ import annotations

import ctypes
import mmap
import operator
import os
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from gpunvme.errors import RangeError
from gpunvme.file import File
from gpunvme.memory import Span, check_gpu_span, span_of
from gpunvme.streams import stream_handle

if TYPE_CHECKING:
    from gpunvme.catalog.target import Target
    from gpunvme.transfer import Transfer

#: Pieces are of this many bytes; at most two of them are in memory at a time.
PIECE = 8 << 20

#: Told how many more bytes are done.
Advance = Callable[[int], None]


class FilePart(NamedTuple):
    """A range of an open file, as the contents of a region.

    Attributes
    ----------
    file
        The file.
    offset
        Where it begins, in bytes.
    nbytes
        How many bytes.
    """

    file: File
    offset: int
    nbytes: int


class Contents:
    """What a region is made of: memory on the host or a GPU, or a range of a file.

    Parameters
    ----------
    source
        A tensor, an array, a buffer, a `Span` or a `FilePart`. It must not change until it is written.
    stream
        CUDA stream that GPU memory is read behind; if None, the current stream of its framework.

    Raises
    ------
    SpanError
        If it is no memory, or not contiguous.
    RangeError
        If a file does not have that range.
    """

    def __init__(self, source: Any, stream: Any = None) -> None:
        self._memory, self._stream = source, stream
        self._part: FilePart | None = None
        self._span: Span | None = None
        if isinstance(source, FilePart):
            file, offset, nbytes = source.file, operator.index(source.offset), operator.index(source.nbytes)
            if offset < 0 or nbytes < 0 or offset + nbytes > file.size:
                raise RangeError(
                    f"{file.name!r} has {file.size} bytes; bytes {offset} to {offset + nbytes} were asked for"
                )
            self._part = FilePart(file, offset, nbytes)
            self.nbytes = nbytes
        else:
            self._span = span_of(source, writable=False)
            if self._span.device.is_gpu:
                check_gpu_span(self._span, source)
            self.nbytes = self._span.nbytes

    def write(self, target: Target, offset: int, advance: Advance | None = None) -> int:
        """Write it to a target, followed by zeros up to a whole unit; return its checksum.

        Raises
        ------
        FileError, NvmeError, CudaError
            If it cannot be read or written; what is on the target there is then undefined.
        """
        checksum = 0
        writing: Transfer | None = None
        try:
            for piece in self._pieces():
                padded = _padded(piece, target.unit)
                if writing is not None:
                    writing.wait()
                writing = target.file.write_from(padded, offset, wait=False)
                checksum = zlib.crc32(piece, checksum)
                offset += len(padded)
                if advance is not None:
                    advance(len(piece))
            if writing is not None:
                writing.wait()
        except BaseException:
            if writing is not None:
                target.stop(writing)
            raise
        return checksum

    def _pieces(self) -> Iterator[memoryview]:
        """Yield it in order. A piece is good until the next but one is asked for."""
        if self._part is not None:
            file, begin, nbytes = self._part
            yield from _alternating(nbytes, lambda at, view: file.read_into(view, begin + at))
        elif self._span is not None and self._span.device.is_gpu:
            yield from self._gpu_pieces(self._span)
        elif self._span is not None:
            for at in range(0, self.nbytes, PIECE):
                yield _view(self._span.part(at, min(PIECE, self.nbytes - at)))

    def _gpu_pieces(self, span: Span) -> Iterator[memoryview]:
        # A file in memory: its writes are ordered behind the caller's stream as every write from a GPU is.
        stream = stream_handle(self._stream, self._memory, span.device)
        size = min(PIECE, span.nbytes)
        files, views = [], []
        for _ in range(2):
            fd = os.memfd_create("gpunvme-catalog", os.MFD_CLOEXEC)
            try:
                os.ftruncate(fd, max(1, size))
                files.append(File(fd, "r+"))
                views.append(memoryview(mmap.mmap(fd, max(1, size))))
            finally:
                os.close(fd)
        try:
            for number, at in enumerate(range(0, span.nbytes, PIECE)):
                part = span.part(at, min(PIECE, span.nbytes - at))
                files[number % 2].write_from(part, stream=stream)
                yield views[number % 2][: part.nbytes]
        finally:
            for file in files:
                file.close()


def sum_of(target: Target, offset: int, nbytes: int, advance: Advance | None = None) -> int:
    """Read a range of a target and return its checksum."""
    checksum = 0
    buffers = _buffers(nbytes)
    reading: Transfer | None = None
    try:
        for number, at in enumerate(range(0, nbytes, PIECE)):
            if reading is None:
                reading = target.file.read_into(buffers[0][: min(PIECE, nbytes)], offset, wait=False)
            reading.wait()
            piece = buffers[number % 2][: min(PIECE, nbytes - at)]
            following = at + PIECE
            if following < nbytes:
                ahead = buffers[(number + 1) % 2][: min(PIECE, nbytes - following)]
                reading = target.file.read_into(ahead, offset + following, wait=False)
            checksum = zlib.crc32(piece, checksum)
            if advance is not None:
                advance(len(piece))
    except BaseException:
        if reading is not None:
            reading.cancel()
        raise
    return checksum


def _buffers(nbytes: int) -> list[memoryview]:
    return [memoryview(mmap.mmap(-1, max(1, min(PIECE, nbytes)))) for _ in range(2)]


def _alternating(nbytes: int, fill: Callable[[int, memoryview], object]) -> Iterator[memoryview]:
    buffers = _buffers(nbytes)
    for number, at in enumerate(range(0, nbytes, PIECE)):
        piece = buffers[number % 2][: min(PIECE, nbytes - at)]
        fill(at, piece)
        yield piece


def _padded(piece: memoryview, unit: int) -> memoryview | bytearray:
    """Return a piece with zeros behind it up to a whole unit; pieces that are whole units are not copied."""
    return piece if len(piece) % unit == 0 else bytearray(piece) + bytes(-len(piece) % unit)


def _view(span: Span) -> memoryview:
    array = (ctypes.c_ubyte * span.nbytes).from_address(span.ptr)
    array.owner = span.owner  # type: ignore[attr-defined]  # the view keeps the array, and so the memory, alive
    return memoryview(array).cast("B")
