"""Requests as cuFile takes them: a range cut into pieces, and the three ways to have pieces carried."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpunvme.cufile import library
from gpunvme.cufile.cuda import Context
from gpunvme.cufile.handles import Handle
from gpunvme.errors import CufileError, Error, FileError, TruncatedError

# Large enough that a request's own cost does not show, small enough that all threads have some.
PIECE_BYTES = 16 << 20
_BATCH_MODE = 1
_COMPLETE = 0x10
_STATUS = {1: "waiting", 2: "pending", 4: "invalid", 8: "canceled", 0x10: "complete", 0x20: "timed out", 0x40: "failed"}
_CANCELED = 8
# How long one look at a batch waits for completions.
_LOOK_NANOSECONDS = 20_000_000
_LOOKS_AFTER_REFUSAL = 50
_UNANSWERED = -(2**62)


@dataclass(frozen=True, slots=True)
class Piece:
    """One request: ``nbytes`` at ``file_offset``, and ``base + base_offset`` in GPU memory."""

    handle: Handle
    base: int
    base_offset: int
    file_offset: int
    nbytes: int

    @property
    def aligned(self) -> bool:
        """Whether its place in the file is whole blocks, as the direct ways want it."""
        return (self.file_offset | self.nbytes) % self.handle.align == 0

    def rest(self, done: int) -> Piece:
        """What is left of it."""
        return Piece(self.handle, self.base, self.base_offset + done, self.file_offset + done, self.nbytes - done)


def cut(handle: Handle, base: int, file_offset: int, nbytes: int) -> Iterator[Piece]:
    """Cut a range into pieces: an unaligned head, whole blocks, an unaligned tail.

    The whole blocks can go directly; one unaligned byte would send all of them the other way.
    """
    end = file_offset + nbytes
    first = min(-(-file_offset // handle.align) * handle.align, end)
    last = max(end // handle.align * handle.align, first)
    bounds = [file_offset, first, last, end]
    for start, stop in itertools.pairwise(bounds):
        for at in range(start, stop, PIECE_BYTES):
            yield Piece(handle, base, at - file_offset, at, min(PIECE_BYTES, stop - at))


def located(error: Exception, piece: Piece) -> Exception:
    """The same error, with the file and the offset."""
    if isinstance(error, FileError):
        return type(error)(error.errno or 0, error.strerror or str(error), piece.handle.name, piece.file_offset)
    if isinstance(error, CufileError):
        return CufileError(f"{error}: {piece.handle.name!r} at offset {piece.file_offset}", error.code)
    return error


class Counted:
    """What was asked of cuFile; added to by many threads, each with one of its own, and summed at the end."""

    __slots__ = ("bodies", "buffered_bytes", "direct_bytes", "edge_bytes", "edges")

    def __init__(self) -> None:
        self.bodies = self.edges = 0
        self.direct_bytes = self.buffered_bytes = self.edge_bytes = 0

    def add(self, piece: Piece, nbytes: int) -> None:
        """Count a request that moved so much."""
        if piece.aligned:
            self.bodies += 1
        else:
            self.edges += 1
            self.edge_bytes += nbytes
        if piece.handle.direct:
            self.direct_bytes += nbytes
        else:
            self.buffered_bytes += nbytes

    def merge(self, other: Counted) -> None:
        """Add another one's counts."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def carry_now(piece: Piece, write: bool, counted: Counted, done: int = 0) -> None:
    """Carry a piece, of which so much is done already, by synchronous requests until nothing is left.

    Raises
    ------
    TruncatedError
        If the file ends before it.
    FileError, CufileError, CudaError
        If cuFile fails, or makes no progress.
    """
    function = "write" if write else "read"
    while done < piece.nbytes:
        rest = piece.rest(done)
        try:
            got = library.moved(
                function, rest.nbytes, rest.handle.number, rest.base, rest.nbytes, rest.file_offset, rest.base_offset
            )
        except Error as error:
            raise located(error, rest) from None
        counted.add(rest, got)
        if got == 0:
            raise _no_progress(rest, write)
        done += got


def _no_progress(piece: Piece, write: bool) -> Exception:
    if write:
        return located(CufileError("cuFile wrote nothing, and gave no error"), piece)
    return TruncatedError(0, "the file ended early", piece.handle.name, piece.file_offset)


# --- batches


class Refused(Exception):
    """cuFile takes no such requests here; nothing of them is in flight."""


class Batch:
    """Requests submitted together, and looked at until all have been answered."""

    def __init__(self, pieces: Sequence[Piece], write: bool) -> None:
        self.pieces = pieces
        self._left = set(range(len(pieces)))
        self._answers: list[tuple[int, int, int]] = []
        self._canceled = False
        try:
            self._number: int = library.call("batch_io_set_up", len(pieces))
        except CufileError as error:
            raise Refused(str(error)) from None
        module = library.bindings()
        # The bindings take addresses; cuFile may look at the entries until they are answered.
        self._entries: Any = np.zeros(len(pieces), module.io_params_dtype)
        self._events: Any = np.zeros(len(pieces), module.io_events_dtype)
        place = self._entries["u"]["batch"]
        self._entries["mode"] = _BATCH_MODE
        self._entries["opcode"] = int(write)
        self._entries["fh"] = [piece.handle.number for piece in pieces]
        self._entries["cookie"] = range(1, len(pieces) + 1)
        place["dev_ptr_base"] = [piece.base for piece in pieces]
        place["dev_ptr_offset"] = [piece.base_offset for piece in pieces]
        place["file_offset"] = [piece.file_offset for piece in pieces]
        place["size_"] = [piece.nbytes for piece in pieces]
        try:
            library.call("batch_io_submit", self._number, len(pieces), self._entries.ctypes.data, 0)
        except Error as error:
            self._after_refusal()
            raise Refused(str(error)) from None

    def _after_refusal(self) -> None:
        # Some entries may have been taken before the one that was not.
        self.cancel()
        for _ in range(_LOOKS_AFTER_REFUSAL):
            try:
                if not self.look():
                    break
            except Error:
                break
        self.destroy()

    def look(self) -> bool:
        """Wait a little for answers; whether any came."""
        count = ctypes.c_uint(len(self._left))
        timeout = (ctypes.c_int64 * 2)(0, _LOOK_NANOSECONDS)
        events = self._events
        library.call(
            "batch_io_get_status",
            self._number,
            1,
            ctypes.addressof(count),
            events.ctypes.data,
            ctypes.addressof(timeout),
        )
        for event in events[: min(count.value, len(events))]:
            number, status = int(event["cookie"]) - 1, int(event["status"])
            if number not in self._left or status in (1, 2):
                continue  # answered before, nobody's, or not at its end
            self._left.discard(number)
            # Unsigned in the bindings, though errors are negative.
            self._answers.append((number, status, int(np.uint64(event["ret"]).astype(np.int64))))
        return count.value > 0

    def cancel(self) -> None:
        """Ask cuFile to give up what it has not done; answers still come."""
        if not self._canceled:
            self._canceled = True
            try:
                library.call("batch_io_cancel", self._number)
            except Error:
                pass  # then they come when they come

    @property
    def complete(self) -> bool:
        """Whether every request was answered."""
        return not self._left

    def settle(self, write: bool, counted: Counted) -> None:
        """Look at the answers; carry what came back short.

        Raises
        ------
        CufileError, FileError, TruncatedError, CudaError
            For the first request that failed.
        """
        for number, status, returned in sorted(self._answers):
            piece = self.pieces[number]
            if status == _CANCELED:
                continue
            if status != _COMPLETE or returned < 0:
                raise located(_entry_error(status, returned), piece)
            got = library.checked_count("batch", returned, piece.nbytes)
            counted.add(piece, got)
            if got == 0:
                raise _no_progress(piece, write)
            carry_now(piece, write, counted, got)

    def destroy(self) -> None:
        """Give the batch back."""
        library.call("batch_io_destroy", self._number)


def _entry_error(status: int, returned: int) -> Error:
    if returned < 0:
        return library.error_of_code("batch request", -returned)
    return CufileError(f"cuFile's batch request is {_STATUS.get(status, f'in state {status:#x}')}")


# --- in a stream's order


class Lane:
    """A stream of our own, in whose order requests are carried.

    Parameters
    ----------
    of
        The GPU.
    after
        Event that the first request waits for, on the GPU: the host waits for nothing.
    """

    def __init__(self, of: Context, after: int) -> None:
        self._context = of
        self.stream = of.stream()
        try:
            of.let_wait(self.stream, after)
            library.call("stream_register", self.stream, 0)
        except CufileError as error:
            of.destroy_stream(self.stream)
            raise Refused(str(error)) from None
        except BaseException:
            of.destroy_stream(self.stream)
            raise
        self._pieces: list[Piece] = []
        self._words: Any = np.zeros((0, 4), np.int64)
        self._event = 0

    def enqueue(self, pieces: Sequence[Piece], write: bool) -> int:
        """Enqueue requests; how many cuFile took.

        Raises
        ------
        Refused
            If it took none.
        """
        # Size, file offset, offset in memory, and the answer: read and written when the stream comes to it.
        self._words = np.array(
            [(piece.nbytes, piece.file_offset, piece.base_offset, _UNANSWERED) for piece in pieces], np.int64
        )
        self._pieces = []
        start = self._words.ctypes.data
        for number, piece in enumerate(pieces):
            row = start + number * 32
            try:
                library.call(
                    "write_async" if write else "read_async",
                    piece.handle.number,
                    piece.base,
                    row,
                    row + 8,
                    row + 16,
                    row + 24,
                    self.stream,
                )
            except CufileError as error:
                if not number:
                    raise Refused(str(error)) from None
                break
            self._pieces.append(piece)
        self._event = self._context.record(self.stream)
        return len(self._pieces)

    @property
    def busy(self) -> bool:
        """Whether something of it is in flight, or not yet settled."""
        return bool(self._pieces)

    def answered(self) -> bool:
        """Whether the stream has passed everything that was enqueued."""
        return not self._event or self._context.happened(self._event)

    def settle(self, write: bool, counted: Counted) -> None:
        """Look at the answers; carry what came back short.

        Raises
        ------
        CufileError, FileError, TruncatedError, CudaError
            For the first request that failed.
        """
        self._context.destroy_event(self._event)
        pieces, self._pieces, self._event = self._pieces, [], 0
        function = "write_async" if write else "read_async"
        for piece, answer in zip(pieces, self._words[:, 3].tolist(), strict=False):
            if answer == _UNANSWERED:
                raise located(CufileError(f"cuFile's {function} left a request unanswered"), piece)
            try:
                got = library.checked_count(function, answer, piece.nbytes)
            except Error as error:
                raise located(error, piece) from None
            counted.add(piece, got)
            if got == 0:
                raise _no_progress(piece, write)
            carry_now(piece, write, counted, got)

    def close(self) -> None:
        """Give the stream back; nothing of it may be in flight."""
        try:
            library.call("stream_deregister", self.stream)
        except Error:
            pass  # cuFile has let it go by itself, after an error
        if self._event:
            self._context.destroy_event(self._event)
        self._context.destroy_stream(self.stream)
