"""Ranges of a namespace's bytes, moved by kernels: what the ``gpu-nvme`` path does for one namespace.

Whole blocks go to their place at once. Where only a part of a block is wanted, whole blocks are read into GPU memory
of the path's own, and a kernel cuts the part out. What is pending goes by one launch, as far as it fits: rows of one
size to memory that adjoins, or a table of ranges. Kernels are launched on a stream of the path's own when the work that
was queued on the caller's stream has ended, never before: none of ours may wait there for work that waits for us. One
at a time is in flight: a second one may need memory, and allocating that may wait for the first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import Cancelled, CommandError, DeadlineExceeded, Error, Failed
from gpunvme.gpu.kept import CUT, MOST_CUTS, KeptQueues
from gpunvme.gpu.moves import EXTENT, MOST_EXTENTS
from gpunvme.memory import Span
from gpunvme.nvme.movement import describe_failures
from gpunvme.transfer import Report, Transfer, format_bytes

if TYPE_CHECKING:
    from gpunvme.gpu.jobs import KernelMovement
    from gpunvme.paths.base import Order

NAME = "gpu-nvme"
_MOST_PIECES = 1 << 20  # commands of a launch: what queues keep memory for
_STEP = 0.05  # seconds after which a thread that drives looks whether it was told to stop
_LOOK_HARD, _NAP = 0.0005, 0.00005
_TELLING_SECONDS = 0.01  # a shorter transfer says nothing about speed


@dataclass(slots=True)
class _Launch:
    """One kernel of the queues, in flight; then, for parts of blocks, the one that cuts them out."""

    transfer: Transfer
    nbytes: int  # that are wanted
    cuts: NDArray[np.void] | None
    cutting: bool = False

    @property
    def job(self) -> KernelMovement:
        """What its transfer waits for."""
        return cast("KernelMovement", self.transfer._movement)


@dataclass(slots=True)
class _Rows:
    """Rows of whole blocks, to be packed."""

    lbas: NDArray[np.int64]
    blocks: int
    span: Span
    cuts: NDArray[np.void] | None = None  # the span is a lane's
    nbytes: int = 0


@dataclass(slots=True)
class _Pending:
    """What was added and not begun."""

    ranges: deque[list[int]] = field(default_factory=deque)  # [lba, bytes, address]
    rows: deque[_Rows] = field(default_factory=deque)
    cuts: list[tuple[int, int, int, int]] = field(default_factory=list)  # lba, first byte of the block, bytes, address

    def __bool__(self) -> bool:
        return bool(self.ranges or self.rows or self.cuts)


def _cut_up(
    lbas: NDArray[np.uint64], blocks: NDArray[np.uint64], addresses: NDArray[np.uint64], most: int, block_bytes: int
) -> NDArray[np.void]:
    """Ranges as extents of at most ``most`` blocks each, in order."""
    counts = (blocks.astype(np.int64) + most - 1) // most
    whose = np.repeat(np.arange(len(counts)), counts)
    # Number of each extent within its range, then its first block there.
    done = (np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64) * np.uint64(most)
    table = np.empty(len(whose), EXTENT)
    table["lba"] = lbas[whose] + done
    table["memory"] = addresses[whose] + done * np.uint64(block_bytes)
    table["blocks"] = np.minimum(blocks[whose] - done, np.uint64(most))
    return table


class RangeMovement:
    """Bytes of one namespace on their way, by kernels.

    Parameters
    ----------
    kept
        The queues.
    order
        What holds for the whole transfer.
    """

    def __init__(self, kept: KeptQueues, order: Order) -> None:
        self._kept = kept
        self._queues = queues = kept.queues
        self._order = order
        self._namespace = queues.namespace
        self._block = queues.namespace.block_size
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._sealed = self._alone = False
        self._pending = _Pending()
        self._flying: _Launch | None = None
        self._failure: Exception | None = None
        self._failed: list[Failed] = []
        self._stopped_by: Error | None = None
        self._commands = self._launches = self._moved = self._bounced = self._cut_bytes = 0
        self._ranged = self._gathered = False
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._lane = kept.take_lane()
        try:
            kept.gpu.record(self._lane.event, order.stream or 0)
        except BaseException:
            kept.give_lane(self._lane)
            raise
        self._called = False  # whether the caller's stream has come to where the transfer may begin

    # --- adding

    def add_part(self, offset: int, span: Span) -> None:
        """Add a range of bytes."""
        if not span.nbytes:
            return
        self._ranged = True
        block, end = self._block, offset + span.nbytes
        whole = min(end, -(-offset // block) * block)  # where whole blocks begin
        body = (end - whole) // block * block
        if offset < whole:
            self._add_cut(offset, whole, span.ptr)
        if body:
            self._add_blocks(whole // block, body, span.ptr + whole - offset)
        if whole + body < end:
            self._add_cut(whole + body, end, span.ptr + whole + body - offset)

    def _add_cut(self, start: int, end: int, address: int) -> None:
        lba, first = divmod(start, self._block)
        self._pending.cuts.append((lba, first, end - start, address))

    def _add_blocks(self, lba: int, nbytes: int, address: int) -> None:
        # What adjoins in the namespace and in memory is one range; writes are cut as large as a launch may be.
        most = _MOST_PIECES * self._queues.slot_bytes // self._block * self._block if self._order.write else nbytes
        if self._pending.ranges and not self._order.write:
            before = self._pending.ranges[-1]
            if before[0] + before[1] // self._block == lba and before[2] + before[1] == address:
                before[1] += nbytes
                return
        for at in range(0, nbytes, most):
            self._pending.ranges.append([lba + at // self._block, min(most, nbytes - at), address + at])

    def add_gather(self, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads of ``nbytes`` each, packed in order into ``span``."""
        if not len(offsets):
            return
        self._gathered = True
        lbas, starts = np.divmod(offsets, self._block)
        if nbytes % self._block == 0 and not starts.any():
            blocks = nbytes // self._block
            most = self._most_rows(blocks)
            for at in range(0, len(lbas), most):
                some = lbas[at : at + most]
                part = span.part(at * nbytes, len(some) * nbytes)
                self._pending.rows.append(_Rows(some, blocks, part, nbytes=part.nbytes))
            return
        # Each row of as many blocks as the worst placed one needs, inside of the namespace.
        blocks = min(-(-(int(starts.max()) + nbytes) // self._block), self._namespace.blocks)
        inside = np.minimum(lbas, self._namespace.blocks - blocks)
        starts += (lbas - inside) * self._block
        most = min(MOST_CUTS, self._lane.bounce.nbytes // (blocks * self._block))
        addresses = span.ptr + np.arange(len(lbas), dtype=np.uint64) * np.uint64(nbytes)
        for at in range(0, len(lbas), most):
            some_rows = slice(at, at + most)
            self._pending.rows.append(
                self._cut_rows(inside[some_rows], blocks, starts[some_rows], nbytes, addresses[some_rows])
            )

    def _most_rows(self, blocks: int) -> int:
        return max(1, _MOST_PIECES // -(-blocks * self._block // self._queues.slot_bytes))

    def _cut_rows(
        self,
        lbas: NDArray[np.int64],
        blocks: int,
        starts: NDArray[np.int64],
        nbytes: NDArray[np.int64] | int,
        addresses: NDArray[np.uint64],
    ) -> _Rows:
        """Rows read into the lane's memory, of each of which a part is wanted elsewhere."""
        row, bounce = blocks * self._block, self._lane.bounce
        cuts = np.empty(len(lbas), CUT)
        cuts["from"] = bounce.ptr + np.arange(len(lbas), dtype=np.uint64) * np.uint64(row) + starts.astype(np.uint64)
        cuts["to"] = addresses
        cuts["nbytes"] = nbytes
        return _Rows(lbas, blocks, bounce.part(0, len(lbas) * row), cuts, int(cuts["nbytes"].sum()))

    def begin(self) -> None:
        """Begin what was added, as far as there is room."""
        with self._lock:
            self._advance()

    def seal(self) -> None:
        """Say that everything was added."""
        self._sealed = True
        if self._order.background:
            self._go_on_alone()

    # --- moving

    def _advance(self) -> None:
        """See what has ended, and launch what comes next. The caller holds the lock."""
        if self._done.is_set():
            return
        try:
            if self._flying is not None and self._is_over(self._flying):
                self._flying = None
            if self._failure is not None or self._stopped_by is not None:
                self._pending = _Pending()
            if self._flying is None and self._pending and self._may_begin():
                self._flying = self._launch_next()
                if self._flying is not None and self._stopped_by is not None:
                    self._flying.transfer.cancel()
        except (Error, ValueError) as error:
            self._fail(error)
        if self._sealed and self._flying is None and not self._pending:
            self._end()

    def _may_begin(self) -> bool:
        self._called = self._called or self._kept.gpu.happened(self._lane.event)
        return self._called

    def _launch_next(self) -> _Launch | None:
        pending = self._pending
        if pending.ranges:
            return self._launch_write() if self._order.write else self._launch_ranges()
        most = min(MOST_CUTS, self._lane.bounce.nbytes // self._block)
        if not pending.rows and pending.cuts and (self._sealed or len(pending.cuts) >= most):
            some, pending.cuts = pending.cuts[:most], pending.cuts[most:]
            lbas, starts, sizes, addresses = (np.array(each, np.int64) for each in zip(*some, strict=True))
            pending.rows.append(self._cut_rows(lbas, 1, starts, sizes, addresses.view(np.uint64)))
        if not pending.rows:
            return None
        rows = pending.rows.popleft()
        transfer = self._queues.gather(rows.lbas, rows.span, blocks=rows.blocks, stream=self._lane.stream, wait=False)
        return self._launched(transfer, rows.nbytes, rows.cuts)

    def _launch_write(self) -> _Launch:
        lba, nbytes, address = self._pending.ranges.popleft()
        span = Span(address, nbytes, self._order.device)
        blocks = nbytes // self._block
        transfer = self._queues.scatter(np.array([lba]), span, blocks=blocks, stream=self._lane.stream, wait=False)
        return self._launched(transfer, nbytes, None)

    def _launch_ranges(self) -> _Launch:
        """Read as many of the pending ranges as one launch may have pieces."""
        queues, stream, pending = self._queues, self._lane.stream, self._pending.ranges
        piece = queues._moves.extent_blocks * self._block
        some, left = [pending.popleft()], MOST_EXTENTS
        left -= -(-some[0][1] // piece)
        while pending and (pieces := -(-pending[0][1] // piece)) <= left:
            left -= pieces
            some.append(pending.popleft())
        lbas, sizes, addresses = np.array(some, np.uint64).T
        total, size = int(sizes.sum()), some[0][1]
        if len(some) == 1:
            span = Span(some[0][2], size, self._order.device)
            return self._launched(queues.stream(some[0][0], size, span, stream=stream, wait=False), size, None)
        if size <= queues.slot_bytes and np.all(sizes == size) and np.all(np.diff(addresses) == size):
            span = Span(some[0][2], total, self._order.device)
            blocks = size // self._block
            transfer = queues.gather(lbas.astype(np.int64), span, blocks=blocks, stream=stream, wait=False)
            return self._launched(transfer, total, None)
        table = _cut_up(lbas, sizes // np.uint64(self._block), addresses, queues._moves.extent_blocks, self._block)
        return self._launched(queues._moves.extents(table, stream), total, None)

    def _launched(self, transfer: Transfer, nbytes: int, cuts: NDArray[np.void] | None) -> _Launch:
        launch = _Launch(transfer, nbytes, cuts)
        transfer._count_with_whole()
        launch.job.repeat_lost()  # nothing follows on the lane's stream before it has ended
        return launch

    def _is_over(self, launch: _Launch) -> bool:
        try:
            return self._look(launch)
        except CommandError as error:
            self._failed += error.failures
            self._fail(error)
        except (Error, ValueError) as error:
            self._fail(error)
        return True

    def _look(self, launch: _Launch) -> bool:
        if launch.cutting:
            if not self._kept.has_cut(self._lane):
                return False
            self._moved += launch.nbytes
            self._bounced += launch.nbytes
            self._cut_bytes += launch.nbytes
            return True
        if not launch.transfer.done:
            return False
        self._commands += launch.job.commands
        self._launches += launch.job.launches
        launch.transfer.wait(0)  # raises what it failed with
        if launch.cuts is None:
            self._moved += launch.nbytes
            self._bounced += launch.transfer.bounced_bytes
            return True
        self._kept.cut(self._lane, launch.cuts)
        launch.cutting = True
        return False

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error

    def _end(self) -> None:
        self._seconds = time.perf_counter() - self._start
        if self._stopped_by is not None:
            self._failure = self._stopped_by
        elif isinstance(self._failure, CommandError):
            self._failure = CommandError(f"{self._queues.name}: {describe_failures(self._failed)}", self._failed)
        self._kept.give_lane(self._lane)
        tells = self._ranged != self._gathered and self._seconds > _TELLING_SECONDS and not self._order.write
        if self._failure is None and tells:
            self._kept.note_speed(self._moved / self._seconds, gather=self._gathered)
        self._done.set()

    def _go_on_alone(self) -> None:
        with self._lock:
            if not self._alone and not self._done.is_set():
                self._alone = True
                threading.Thread(target=self._drive_to_end, name="gpunvme-gpu-nvme", daemon=True).start()

    def _drive_to_end(self) -> None:
        while not self._done.is_set():
            self._drive(_STEP)

    def _drive(self, seconds: float) -> None:
        """Look after it for a while, at most so long."""
        start = time.monotonic()
        if not self._lock.acquire(timeout=seconds):
            return  # another thread drives it
        try:
            while True:
                self._advance()
                waited = time.monotonic() - start
                if self._done.is_set() or waited >= seconds:
                    return
                if self._flying is not None and not self._flying.cutting:
                    self._flying.job.wait(seconds - waited)
                else:
                    time.sleep(0 if waited < _LOOK_HARD else _NAP)
        finally:
            self._lock.release()

    def wait(self, seconds: float) -> bool:
        """Wait for the end at most so long, looking after it meanwhile."""
        if self._alone or not self._sealed:  # whoever looks after transfers may ask before anything was added
            return self._done.wait(seconds)
        give_up = time.monotonic() + seconds
        while not self._done.is_set() and (left := give_up - time.monotonic()) > 0:
            self._drive(left)
        return self._done.is_set()

    def cancel(self) -> None:
        """Begin nothing more."""
        self._stop(Cancelled("the transfer was cancelled"))

    def expire(self) -> None:
        """Begin nothing more, for the deadline has passed."""
        self._stop(DeadlineExceeded("the transfer was not complete by its deadline"))

    def _stop(self, error: Error) -> None:
        if self._done.is_set():
            return
        self._stopped_by = self._stopped_by or error
        flying = self._flying
        if flying is not None:
            flying.transfer.cancel()
        self._sealed = True  # nothing that may still be added is begun
        self._go_on_alone()  # whoever waited may have had enough

    def failure(self) -> Exception | None:
        """Why it failed, or None."""
        return self._failure if self._done.is_set() else None

    # --- reporting

    def report(self) -> Report:
        """What was done so far."""
        seconds = self._seconds if self._done.is_set() else time.perf_counter() - self._start
        moved, bounced = self._moved, self._bounced
        flying = self._flying
        if flying is not None and flying.cuts is None:
            now = flying.transfer._now()
            moved, bounced = moved + now.direct_bytes, bounced + now.bounced_bytes
        return Report(NAME, self._reason(), seconds, direct_bytes=moved, bounced_bytes=bounced)

    def _reason(self) -> str:
        if not self._launches:
            return "nothing was moved"
        said = f"{self._commands} commands in {self._launches} launches by {self._kept.how}"
        if self._cut_bytes:
            said += f", {format_bytes(self._cut_bytes)} of blocks that were wanted in part cut out on the GPU"
        return said
