"""`Transfer`: one movement of bytes, finished or not, and its report."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self

from gpunvme import totals
from gpunvme.errors import (
    AccessDeniedError,
    Cancelled,
    CudaError,
    DeadlineExceeded,
    Error,
    FileError,
    MissingFileError,
    TruncatedError,
)

Progress = Callable[[int, int], object]

# None unless NVTX ranges are asked for: then nothing is even imported.
_ranges: Any = None
if os.environ.get("GPUNVME_NVTX"):
    from gpunvme import nvtx_ranges

    _ranges = nvtx_ranges.ranges

# How often a waiting thread looks for Ctrl-C and calls a progress callback, in seconds.
_TICK = 0.05
# How long a stopped transfer may take to bring back what is in flight before its memory is left to it.
_GRACE = 5.0


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, counted where it was done. Sizes in bytes."""

    path: str
    reason: str
    seconds: float
    direct_bytes: int = 0
    cached_bytes: int = 0
    buffered_bytes: int = 0
    bounced_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """Bytes moved, by whichever way."""
        return self.direct_bytes + self.cached_bytes + self.buffered_bytes


class Movement(Protocol):
    """One transfer as a path carries it."""

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; whether it is done: nothing of it is in flight any more."""

    def cancel(self) -> None:
        """Stop as soon as possible."""

    def expire(self) -> None:
        """Stop as soon as possible, for the deadline has passed."""

    def failure(self) -> Exception | None:
        """Why it failed, or None."""

    def report(self) -> Report:
        """What was done so far."""


def stop(movement: Movement) -> None:
    """Cancel a movement and wait until nothing of it is in flight, or as long as a drive may take to answer."""
    movement.cancel()
    movement.wait(_GRACE)


class Transfer:
    """One movement of bytes between a file and memory.

    ``str(transfer)`` is a one-line report. A transfer can be awaited. Its memory and files are kept alive until
    nothing of it is in flight, even when nobody holds the transfer any more.
    """

    def __init__(
        self,
        movement: Movement,
        nbytes: int,
        *,
        keep: object = None,
        progress: Progress | None = None,
        deadline: float | None = None,
        on_done: Callable[[bool], None] | None = None,
    ) -> None:
        self._movement = movement
        self._nbytes = nbytes
        self._keep = keep
        self._progress = progress
        self._deadline = deadline
        self._on_done = on_done
        self._lock = threading.Lock()
        self._settled = False
        self._failure: BaseException | None = None
        self._report: Report | None = None
        self._part = False
        if _ranges is not None:
            self._range = _ranges.start(f"transfer of {format_bytes(nbytes)}")
        _remember(self)

    @classmethod
    def finished(cls, report: Report, nbytes: int) -> Self:
        """Make a transfer that is done already."""
        transfer = cls.__new__(cls)
        transfer._nbytes = nbytes
        transfer._report = report
        transfer._failure = None
        transfer._progress = None
        transfer._settled = True
        totals.count(report, failed=False)
        if _ranges is not None:
            _ranges.mark(f"transfer of {format_bytes(nbytes)} by {report.path}")
        return transfer

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not: nothing of it is in flight any more."""
        if not self._settled:
            self._settle()
        return self._settled

    @property
    def nbytes(self) -> int:
        """Bytes that were asked for."""
        return self._nbytes

    @property
    def path(self) -> str:
        """Name of the path that carried it."""
        return self._now().path

    @property
    def reason(self) -> str:
        """How the bytes travelled, from what each request did."""
        return self._now().reason

    @property
    def seconds(self) -> float:
        """Time from its start to its end, or to now."""
        return self._now().seconds

    @property
    def direct_bytes(self) -> int:
        """Bytes read from or written to the drive by O_DIRECT, the page cache left alone."""
        return self._now().direct_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes that were read out of the page cache, or written into it."""
        return self._now().cached_bytes

    @property
    def buffered_bytes(self) -> int:
        """Bytes that were read through the page cache, which had to fetch them first."""
        return self._now().buffered_bytes

    @property
    def bounced_bytes(self) -> int:
        """Bytes that passed through memory of ours between the file and the destination or source."""
        return self._now().bounced_bytes

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until it is done; return it.

        Parameters
        ----------
        timeout
            Seconds after which to give up waiting; the transfer goes on.

        Raises
        ------
        DeadlineExceeded
            If it is not done in time, by ``timeout`` or by its own deadline.
        Cancelled
            If it was cancelled.
        Error
            Whatever it failed with.
        KeyboardInterrupt
            On Ctrl-C: the transfer is cancelled first, and nothing writes into its memory any more.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        if not self._settled:
            try:
                self._wait(give_up)
            except DeadlineExceeded:
                raise
            except BaseException:  # Ctrl-C, or an error in the progress callback
                stop(self._movement)
                self._settle()
                raise
            self._settle()
        if self._failure is not None:
            raise self._failure
        return self

    def _wait(self, give_up: float | None) -> None:
        while True:
            now = time.monotonic()
            limits = [limit for limit in (give_up, self._deadline) if limit is not None]
            step = min([_TICK, *(max(0.0, limit - now) for limit in limits)])
            if self._movement.wait(step):
                break
            if self._progress is not None:
                self._progress(self._now().moved_bytes, self._nbytes)
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                self._movement.expire()
                if not self._movement.wait(_GRACE):
                    raise DeadlineExceeded(
                        f"the transfer passed its deadline and the drive has not answered for {_GRACE:.0f} s; "
                        "its memory stays reserved until it does"
                    )
                break
            if give_up is not None and now >= give_up:
                raise DeadlineExceeded("gave up waiting; the transfer goes on")
        if self._progress is not None and self._movement.failure() is None:
            self._progress(self._nbytes, self._nbytes)

    def _settle(self, *, patient: bool = True) -> None:
        """Take over the end of the movement, once, in whichever thread comes first.

        Who is not patient leaves it to the thread that is at it, which may be this one: what follows the end may be a
        transfer of its own.
        """
        if not self._lock.acquire(blocking=patient):
            return
        try:
            if self._settled or not self._movement.wait(0):
                return
            self._failure = self._movement.failure()
            try:
                if self._on_done is not None:
                    self._on_done(self._failure is None)
            except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits must hear of it
                self._failure = self._failure or error
            report = self._report = self._movement.report()
            self._keep = None
            self._settled = True
            if not self._part:
                totals.count(report, failed=self._failure is not None)
            if _ranges is not None:
                _ranges.end(self._range)
        finally:
            self._lock.release()
        _forget(self)

    def _count_with_whole(self) -> None:
        """Leave the counting to the transfer that this one is a part of."""
        self._part = True

    def _leave_to_parent(self) -> None:
        """In a forked child: the transfer is the parent's, and so is what follows its end."""
        self._lock = threading.Lock()
        self._report = Report("none", "the transfer runs in the parent process", 0.0)
        self._failure = Cancelled("the transfer was started by the parent process and runs only there")
        self._keep = None
        self._settled = True

    def cancel(self) -> None:
        """Stop it as soon as possible; `wait` then raises `Cancelled`. Does nothing when it is done."""
        if not self._settled:
            self._movement.cancel()

    def __await__(self) -> Generator[Any, None, Self]:
        import asyncio  # costs more than all the rest of this package

        return asyncio.get_running_loop().run_in_executor(None, self.wait).__await__()

    def _now(self) -> Report:
        return self._report if self._report is not None else self._movement.report()

    def __str__(self) -> str:
        now = self._now()
        if not self.done:
            return f"{format_bytes(now.moved_bytes)} of {format_bytes(self._nbytes)} so far by {now.path}"
        if self._failure is not None or (not self._settled and self._movement.failure() is not None):
            return f"failed after {format_bytes(now.moved_bytes)} of {format_bytes(self._nbytes)} by {now.path}"
        rate = f" ({self._nbytes / now.seconds / 1e9:.1f} GB/s)" if now.seconds > 0 else ""
        return f"{format_bytes(self._nbytes)} in {format_seconds(now.seconds)}{rate} by {now.path}: {now.reason}"

    def __repr__(self) -> str:
        return f"<gpunvme.Transfer: {self}>"


_unfinished: set[Transfer] = set()
_unfinished_lock = threading.Lock()


def _remember(transfer: Transfer) -> None:
    with _unfinished_lock:
        others = list(_unfinished)
        _unfinished.add(transfer)
    # Those that nobody waited for come to their end, and are let go, here.
    for other in others:
        other._settle(patient=False)


def _forget(transfer: Transfer) -> None:
    with _unfinished_lock:
        _unfinished.discard(transfer)


def _after_fork_in_child() -> None:
    # What the parent moves, it moves in its own memory and with its own threads.
    for transfer in _unfinished:
        transfer._leave_to_parent()
    _unfinished.clear()
    _unfinished_lock.release()


os.register_at_fork(
    before=_unfinished_lock.acquire,
    after_in_parent=_unfinished_lock.release,
    after_in_child=_after_fork_in_child,
)


def error_from_native(arguments: tuple[Any, ...]) -> Error:
    """Make our error from an engine's failure: kind, message, errno, file name as bytes, offset."""
    kind, message, number, name, offset = arguments
    if kind == "cuda":
        return CudaError(message)
    if kind == "cancelled":
        return Cancelled(message)
    if kind == "deadline":
        return DeadlineExceeded(message)
    where = (number, message, os.fsdecode(name) if name else None, offset if offset >= 0 else None)
    if kind == "truncated":
        return TruncatedError(*where)
    if isinstance(OSError(number, ""), FileNotFoundError):
        return MissingFileError(*where)
    if isinstance(OSError(number, ""), PermissionError):
        return AccessDeniedError(*where)
    return FileError(*where)


def raise_native(failure: Exception) -> NoReturn:
    """Raise our error for one of the engine's."""
    raise error_from_native(failure.args) from None


def format_bytes(nbytes: float) -> str:
    """``nbytes`` in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """``seconds`` in the unit that a person would choose."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
