"""One transfer by cuFile, from its requests to the proof of which way they went."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native
from gpunvme.cufile import buffers, evidence, reports
from gpunvme.cufile.batches import Batch
from gpunvme.cufile.cuda import context
from gpunvme.cufile.driver import before_close, driver
from gpunvme.cufile.handles import Handle, handle_of
from gpunvme.cufile.lanes import Lane
from gpunvme.cufile.pool import pool
from gpunvme.cufile.requests import Counted, Piece, Refused, carry_now, clear_of, cut
from gpunvme.errors import Cancelled, DeadlineExceeded, PathError, SpanError
from gpunvme.memory import Span
from gpunvme.paths.base import OpenMovement, Order, Part, Source
from gpunvme.paths.host import HostPath
from gpunvme.transfer import Report

_MOST_LANES = 4  # streams of one transfer: cuFile carries what is in one of them one after the other
_LANE_PIECES = 4  # requests that are queued in one at a time: what cannot be cancelled any more
_MOST_IN_BATCH = 128  # cuFile's own default for the largest batch
_GRACE = 5.0  # seconds that the end of a process waits for what is in flight

# A part of a movement's work. True: there is more, at once; False: more, after a rest; None: it is done.
_Task = Callable[[], bool | None]


class CufileMovement:
    """One transfer between files and the memory of one GPU.

    Parameters
    ----------
    order
        What holds for the whole of it.
    path
        Name of the path that it was given to.
    strict
        Whether another path's carrying it is an error.
    host
        Carries the unaligned heads and tails of writes: cuFile would read the rest of the block and write it back,
        over whatever others wrote there meanwhile.
    """

    def __init__(self, order: Order, path: str, strict: bool, host: HostPath) -> None:
        self._order = order
        self._path = path
        self._strict = strict
        self._host = host
        self._driver = driver()
        self._context = context(order.device.index)
        self._pool = pool(order.device.index)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._tasks: deque[_Task] = deque()
        self._streamed: deque[Piece] = deque()
        self._lanes = 0
        self._outstanding = 0
        self._sealed = False
        self._failure: Exception | None = None
        self._counts: dict[int, Counted] = {}
        self._asked = 0
        self._ways: set[str] = set()
        self._notes: dict[str, None] = {}
        self._holds: list[buffers.Hold] = []
        self._handles: dict[int, Handle] = {}
        self._edges: OpenMovement | None = None
        self._started = time.perf_counter()
        self._seconds: float | None = None
        self._report: Report | None = None
        self._evidence: evidence.Evidence | None = None
        self._ready = False
        self._use_streams = order.background and self._driver.properties.streams
        # The transfer is ordered behind what is queued now, not behind what is queued by the time that it starts.
        self._event = self._context.record(order.stream or 0)
        self._witness = evidence.Witness(self._driver, self._context, order.write)
        _movements.add(self)

    # --- what is to be carried

    def _handle(self, file: Source) -> Handle:
        if not isinstance(file, _native.SourceFile):
            raise SpanError("files and namespaces cannot be parts of one transfer")
        handle = handle_of(file)
        self._handles[handle.number] = handle
        return handle

    def _hold(self, span: Span) -> buffers.Hold:
        hold = buffers.REGISTRATIONS.hold(self._context, span.ptr, span.nbytes)
        self._holds.append(hold)
        if hold.problem:
            self._notes[hold.problem] = None
        return hold

    def _ordered(self, handle: Handle, how: str) -> bool:
        """Whether requests of a file may be made in batches or in stream order.

        Not in compatibility mode: cuFileBatchIOSubmit of cuFile 1.15 did not return there, and a call that does not
        return cannot be taken back.
        """
        if handle.only_compat:
            self._notes[f"not {how} (only compatibility mode is possible for the file)"] = None
        return not handle.only_compat

    def add(self, parts: Sequence[Part]) -> None:
        """Add ranges to be moved.

        Raises
        ------
        PathError
            If a write has no whole block, or cuFile refuses the file.
        """
        for file, offset, span in parts:
            self._asked += span.nbytes
            if not span.nbytes:
                continue
            handle = self._handle(file)
            hold = self._hold(span)
            pieces = list(clear_of(cut(handle, span.ptr, hold.registered, offset, span.nbytes), hold.taken))
            if self._order.write:
                pieces = self._without_edges(file, offset, span, pieces)
            with self._lock:
                if self._use_streams and self._ordered(handle, "in stream order"):
                    self._streamed.extend(pieces)
                    for _ in range(min(len(pieces), _MOST_LANES - self._lanes)):
                        self._lanes += 1
                        self._start(self._in_stream_order())
                else:
                    for piece in pieces:
                        self._start(self._one_by_one([piece]))

    def _without_edges(self, file: Source, offset: int, span: Span, pieces: list[Piece]) -> list[Piece]:
        bodies = [piece for piece in pieces if piece.aligned]
        if not bodies:
            raise PathError(
                f"path {self._path!r} cannot carry this: {span.nbytes} bytes at {offset} have no whole block of "
                f"{pieces[0].handle.align} bytes, and cuFile would write their neighbours, too; use path='host'"
            )
        edges = [piece for piece in pieces if not piece.aligned]
        if edges:
            if self._edges is None:
                self._edges = self._host.begin(self._order)
            self._edges.add(
                [Part(file, each.file_offset, span.part(each.address - span.ptr, each.nbytes)) for each in edges]
            )
        return bodies

    def add_gather(self, file: Source, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads of ``nbytes`` each, packed in order into ``span``."""
        self._asked += span.nbytes
        handle = self._handle(file)
        hold = self._hold(span)
        cuts = (Piece(handle, span.ptr + i * nbytes, hold.registered, int(at), nbytes) for i, at in enumerate(offsets))
        pieces = list(clear_of(cuts, hold.taken))
        most = min(self._driver.properties.max_batch or _MOST_IN_BATCH, _MOST_IN_BATCH)
        with self._lock:
            begin = self._in_batch if self._ordered(handle, "in batches") else self._one_by_one
            for first in range(0, len(pieces), most):
                self._start(begin(pieces[first : first + most]))

    def seal(self) -> None:
        """Say that nothing more comes."""
        if self._edges is not None:
            self._edges.seal()
        with self._lock:
            self._sealed = True
            self._changed.notify_all()

    # --- carrying it: called by the pool

    def _start(self, task: _Task) -> None:
        if self._failure is not None:
            return
        self._tasks.append(task)
        self._outstanding += 1
        self._pool.add(self)

    def visit(self) -> bool | None:
        """Do a part of the work; see `pool.Visited`."""
        with self._lock:
            if not self._tasks:
                return None
            task = self._tasks.popleft()
        more: bool | None = None
        try:
            more = task()
        except Exception as error:  # noqa: BLE001 - whoever waits hears of it
            self._fail(error)
        with self._lock:
            if more is not None:
                self._tasks.append(task)
                return more
            self._outstanding -= 1
            self._changed.notify_all()
            return None

    def _may_begin(self) -> bool:
        """Whether the caller's stream is past what it had queued: only lanes let the GPU wait for that.

        A thread that waited for it might wait for another transfer.
        """
        if not self._ready:
            self._ready = self._is_stopped() or self._context.happened(self._event)
        return self._ready

    def _counted(self) -> Counted:
        return self._counts.setdefault(threading.get_ident(), Counted())

    def _is_stopped(self) -> bool:
        return self._failure is not None

    def _one_by_one(self, pieces: Sequence[Piece]) -> _Task:
        def task() -> bool | None:
            if not self._may_begin():
                return False
            self._carry(pieces)
            return None

        return task

    def _carry(self, pieces: Sequence[Piece]) -> None:
        self._ways.add("by threads")
        for piece in pieces:
            if self._is_stopped():
                return
            carry_now(piece, self._order.write, self._counted())

    def _in_batch(self, pieces: list[Piece]) -> _Task:
        batch: Batch | None = None

        def task() -> bool | None:
            nonlocal batch
            if batch is None:
                if not self._may_begin():
                    return False
                if self._is_stopped():
                    return None
                try:
                    if not self._driver.properties.batches:
                        raise Refused("the driver has no batches")
                    batch = Batch(pieces, self._order.write)
                except Refused as refusal:
                    self._notes[f"not in batches ({refusal})"] = None
                    self._carry(pieces)
                    return None
                self._ways.add("in batches")
            return batch.turn(self._is_stopped, self._order.write, self._counted)

        return task

    def _in_stream_order(self) -> _Task:
        lane: Lane | None = None

        def task() -> bool | None:
            nonlocal lane
            if lane is not None and not lane.settled(self._is_stopped, self._order.write, self._counted):
                return False
            with self._lock:
                wanted = [] if self._is_stopped() else [self._streamed.popleft() for _ in range(self._lane_room())]
                if not wanted:
                    self._lanes -= 1
            if not wanted:
                if lane is not None:
                    lane.close()
                return None
            try:
                lane = lane or Lane(self._context, self._event)
                taken = lane.enqueue(wanted, self._order.write)
            except Refused as refusal:
                self._not_streamed(wanted, str(refusal), lane)
                return None
            self._ways.add("in stream order")
            with self._lock:
                self._streamed.extendleft(reversed(wanted[taken:]))
            return False

        return task

    def _lane_room(self) -> int:
        """Pieces for one lane now: a fair share, so that the last ones are not all in one."""
        return min(_LANE_PIECES, -(-len(self._streamed) // max(1, self._lanes)))

    def _not_streamed(self, pieces: list[Piece], refusal: str, lane: Lane | None) -> None:
        self._notes[f"not in stream order ({refusal})"] = None
        if lane is not None:
            lane.close()
        with self._lock:
            self._use_streams = False
            self._lanes -= 1
            pieces += self._streamed
            self._streamed.clear()
            for piece in pieces:
                self._start(self._one_by_one([piece]))

    # --- its end

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if self._failure is None and not (self._sealed and not self._outstanding):
                self._failure = error
                self._streamed.clear()
            self._changed.notify_all()
        if self._edges is not None:
            self._edges.cancel()

    def cancel(self) -> None:
        """Stop as soon as possible."""
        self._fail(Cancelled("the transfer was cancelled"))

    def expire(self) -> None:
        """Stop as soon as possible, for the deadline has passed."""
        self._fail(DeadlineExceeded("the transfer was not complete by its deadline"))

    def wait(self, seconds: float) -> bool:
        """Wait for the end at most so long."""
        limit = time.monotonic() + seconds
        with self._changed:
            while not self._over():
                left = limit - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        if self._edges is not None and not self._edges.wait(max(0.0, limit - time.monotonic())):
            return False
        self._finish()
        return True

    def _over(self) -> bool:
        """Whether nothing of it is in flight; one that failed or was stopped need not be sealed."""
        return not self._outstanding and (self._sealed or self._failure is not None)

    def _finish(self) -> None:
        with self._lock:
            if self._seconds is not None:
                return
            self._seconds = time.perf_counter() - self._started
            counted = self._sum()
            if counted.bodies + counted.edges and self._failure is None:
                places = {handle.place.rdma for handle in self._handles.values()} - {""}
                self._evidence = self._witness.testify(counted.bodies, counted.edges, "; ".join(sorted(places)))
            self._witness.leave()
            for hold in self._holds:
                hold.release()
            self._handles.clear()
            self._holds.clear()
            self._context.destroy_event(self._event)
            shown = self._evidence
            if shown is not None and self._strict and self._failure is None and shown.path != self._path:
                self._failure = PathError(f"path {self._path!r} was asked for, and did not carry this: {shown.reason}")

    def failure(self) -> Exception | None:
        """Why it failed, or None."""
        if self._failure is None and self._edges is not None:
            return self._edges.failure()
        return self._failure

    # --- what is said of it

    def _sum(self) -> Counted:
        total = Counted()
        for counted in list(self._counts.values()):
            total.merge(counted)
        return total

    def report(self) -> Report:
        """What was done so far. Which path it was is known at the end."""
        if self._report is not None:
            return self._report
        counted = self._sum()
        edges = None if self._edges is None else self._edges.report()
        over = self._seconds is not None
        seconds = self._seconds if self._seconds is not None else time.perf_counter() - self._started
        report = reports.report(
            self._path if over and not self._asked else "cufile",
            seconds,
            counted,
            edges,
            shown=self._evidence,
            over=over,
            asked=self._asked,
            how=" and ".join(sorted(self._ways)) or "by threads",
            driver=self._driver,
            notes=list(self._notes),
        )
        if over:
            self._report = report
        return report


_movements: weakref.WeakSet[CufileMovement] = weakref.WeakSet()


def _stop_all() -> bool:
    """Before the driver is closed: stop what is in flight; whether all of it came back."""
    running = list(_movements)
    for movement in running:
        movement.cancel()
    limit = time.monotonic() + _GRACE
    return all(movement.wait(max(0.0, limit - time.monotonic())) for movement in running)


before_close(_stop_all)
