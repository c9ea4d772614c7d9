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
from gpunvme.cufile import buffers, evidence
from gpunvme.cufile.cuda import context
from gpunvme.cufile.driver import before_close, driver
from gpunvme.cufile.handles import Handle, handle_of
from gpunvme.cufile.pool import pool
from gpunvme.cufile.requests import Batch, Counted, Lane, Piece, Refused, carry_now, cut
from gpunvme.errors import Cancelled, DeadlineExceeded, PathError, SpanError
from gpunvme.memory import Span
from gpunvme.paths.base import OpenMovement, Order, Part, Source
from gpunvme.paths.host import HostPath
from gpunvme.transfer import Report, format_bytes

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

    def _hold(self, span: Span) -> None:
        hold = buffers.REGISTRATIONS.hold(self._context, span.ptr, span.nbytes)
        self._holds.append(hold)
        if hold.problem:
            self._notes[hold.problem] = None

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
            self._hold(span)
            pieces = list(cut(handle, span.ptr, offset, span.nbytes))
            if self._order.write:
                pieces = self._without_edges(file, offset, span, pieces)
            with self._lock:
                if self._use_streams:
                    self._streamed.extend(pieces)
                    for _ in range(min(len(pieces), _MOST_LANES - self._lanes)):
                        self._lanes += 1
                        self._start(self._in_stream_order())
                else:
                    for piece in pieces:
                        self._start(self._at_once(piece))

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
            self._edges.add([Part(file, each.file_offset, span.part(each.base_offset, each.nbytes)) for each in edges])
        return bodies

    def add_gather(self, file: Source, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads of ``nbytes`` each, packed in order into ``span``."""
        self._asked += span.nbytes
        handle = self._handle(file)
        self._hold(span)
        pieces = [Piece(handle, span.ptr, i * nbytes, int(at), nbytes) for i, at in enumerate(offsets)]
        most = min(self._driver.properties.max_batch or _MOST_IN_BATCH, _MOST_IN_BATCH)
        with self._lock:
            for first in range(0, len(pieces), most):
                self._start(self._in_batch(pieces[first : first + most]))

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
            # Only lanes let the GPU wait; a thread that waited for the caller's stream might wait for another transfer.
            more = task() if self._may_begin() else False
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
        if not self._ready:
            self._ready = self._use_streams or self._failure is not None or self._context.happened(self._event)
        return self._ready

    def _counted(self) -> Counted:
        return self._counts.setdefault(threading.get_ident(), Counted())

    @property
    def _stopped(self) -> bool:
        return self._failure is not None

    def _at_once(self, piece: Piece) -> _Task:
        def task() -> None:
            if not self._stopped:
                self._ways.add("by threads")
                carry_now(piece, self._order.write, self._counted())

        return task

    def _in_batch(self, pieces: list[Piece]) -> _Task:
        batch: Batch | None = None

        def task() -> bool | None:
            nonlocal batch
            if batch is None:
                if self._stopped:
                    return None
                try:
                    if not self._driver.properties.batches:
                        raise Refused("the driver has no batches")
                    batch = Batch(pieces, self._order.write)
                except Refused as refusal:
                    self._notes[f"not in batches ({refusal})"] = None
                    self._ways.add("by threads")
                    for piece in pieces:
                        if not self._stopped:
                            carry_now(piece, self._order.write, self._counted())
                    return None
                self._ways.add("in batches")
            if self._stopped:
                batch.cancel()
            came = batch.look()
            if not batch.complete:
                return came
            try:
                if not self._stopped:
                    batch.settle(self._order.write, self._counted())
            finally:
                batch.destroy()
            return None

        return task

    def _in_stream_order(self) -> _Task:
        lane: Lane | None = None

        def task() -> bool | None:
            nonlocal lane
            if lane is not None and lane.busy:
                try:
                    if not lane.answered():
                        return False
                    if not self._stopped:
                        lane.settle(self._order.write, self._counted())
                except BaseException:
                    lane.close()
                    raise
            with self._lock:
                wanted = [] if self._stopped else [self._streamed.popleft() for _ in range(self._lane_room())]
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
            self._use_streams = self._ready = False
            self._lanes -= 1
            pieces += self._streamed
            self._streamed.clear()
            for piece in pieces:
                self._start(self._at_once(piece))

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
        cached = 0 if edges is None else edges.moved_bytes - edges.direct_bytes
        moved = counted.direct_bytes + counted.buffered_bytes
        shown = self._evidence
        through_host = moved if shown is None or shown.path == evidence.COMPAT else counted.edge_bytes
        over = self._seconds is not None
        report = Report(
            self._name(shown, over),
            self._reason(counted, edges, over),
            self._seconds if self._seconds is not None else time.perf_counter() - self._started,
            counted.direct_bytes + (0 if edges is None else edges.direct_bytes),
            cached,
            counted.buffered_bytes,
            through_host + (0 if edges is None else edges.bounced_bytes),
        )
        if over:
            self._report = report
        return report

    def _name(self, shown: evidence.Evidence | None, over: bool) -> str:
        if shown is not None:
            return shown.path
        return self._path if over and not self._asked else "cufile"

    def _reason(self, counted: Counted, edges: Report | None, over: bool) -> str:
        if not self._asked:
            return "nothing was moved"
        said = []
        how = " and ".join(sorted(self._ways)) or "by threads"
        requests = counted.bodies + counted.edges
        for nbytes, kind in ((counted.direct_bytes, "O_DIRECT"), (counted.buffered_bytes, "without O_DIRECT")):
            if nbytes:
                said.append(f"{format_bytes(nbytes)} {kind}")
        if said:
            said[-1] += f" in {requests} request{'s' if requests != 1 else ''} {how} ({self._driver})"
        if edges is not None:
            said.append(f"{format_bytes(edges.moved_bytes)} of head and tail by host")
        if self._evidence is not None:
            said.append(self._evidence.reason)
        elif not over:
            said.append("which way they go is known at the end")
        said += self._notes
        return ", ".join(said) or "nothing was moved"


_movements: weakref.WeakSet[CufileMovement] = weakref.WeakSet()


def _stop_all() -> bool:
    """Before the driver is closed: stop what is in flight; whether all of it came back."""
    running = list(_movements)
    for movement in running:
        movement.cancel()
    limit = time.monotonic() + _GRACE
    return all(movement.wait(max(0.0, limit - time.monotonic())) for movement in running)


before_close(_stop_all)
