"""Requests in batches: submitted together, and looked at until all have been answered."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpunvme.cufile import library
from gpunvme.cufile.requests import Counted, Piece, Refused, carry_now, located, no_progress
from gpunvme.errors import CufileError, Error

_BATCH_MODE = 1
_COMPLETE = 0x10
_STATUS = {1: "waiting", 2: "pending", 4: "invalid", 8: "canceled", 0x10: "complete", 0x20: "timed out", 0x40: "failed"}
_CANCELED = 8
# How long one look at a batch waits for completions.
_LOOK_NANOSECONDS = 20_000_000
_LOOKS_AFTER_REFUSAL = 50


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

    def turn(self, stopped: Callable[[], bool], write: bool, counted: Callable[[], Counted]) -> bool | None:
        """Look at it once, and give it back at its end; see `pool.Visited`.

        Raises
        ------
        CufileError, FileError, TruncatedError, CudaError
            At the end, for the first request that failed.
        """
        if stopped():
            self.cancel()
        came = self.look()
        if not self.complete:
            return came
        try:
            if not stopped():
                self.settle(write, counted())
        finally:
            self.destroy()
        return None

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
                raise no_progress(piece, write)
            carry_now(piece, write, counted, got)

    def destroy(self) -> None:
        """Give the batch back."""
        library.call("batch_io_destroy", self._number)


def _entry_error(status: int, returned: int) -> Error:
    if returned < 0:
        return library.error_of_code("batch request", -returned)
    return CufileError(f"cuFile's batch request is {_STATUS.get(status, f'in state {status:#x}')}")
