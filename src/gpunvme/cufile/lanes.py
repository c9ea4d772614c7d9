"""Requests in a stream's order (cuFileReadAsync, cuFileWriteAsync)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpunvme.cufile import library
from gpunvme.cufile.cuda import Context
from gpunvme.cufile.requests import Counted, Piece, Refused, carry_now, located, no_progress
from gpunvme.errors import CufileError, Error

_UNANSWERED = -(2**62)


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

    def settled(self, stopped: Callable[[], bool], write: bool, counted: Callable[[], Counted]) -> bool:
        """Whether nothing of it is in flight; then what was answered is settled. After an error it is closed.

        Raises
        ------
        CufileError, FileError, TruncatedError, CudaError
            For the first request that failed.
        """
        if not self._pieces:
            return True
        try:
            if self._event and not self._context.happened(self._event):
                return False
            if not stopped():
                self.settle(write, counted())
        except BaseException:
            self.close()
            raise
        return True

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
                raise no_progress(piece, write)
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
