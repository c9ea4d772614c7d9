"""One transfer between files and mapped PCI memory, as `gpunvme.Transfer` drives it."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native
from gpunvme.errors import Cancelled, DeadlineExceeded, FileError, PathError, SpanError, file_error
from gpunvme.gpu.driver import Gpu
from gpunvme.memory import Span
from gpunvme.p2pdma import probe, reasons, requests
from gpunvme.p2pdma.gpu_mapping import GpuMapping
from gpunvme.p2pdma.mappings import Mapping, mapping_of
from gpunvme.p2pdma.requests import Bounce, Moved, Opened, Piece, cut
from gpunvme.paths.base import Order, Part, Source
from gpunvme.transfer import Report, format_bytes

NAME = "p2pdma"

_MOST_THREADS = 8  # of one transfer: requests in flight
_GRACE = 5.0  # seconds that the end of a process waits for what is in flight

_movements: weakref.WeakSet[P2pdmaMovement] = weakref.WeakSet()


class P2pdmaMovement:
    """Requests made by threads, which wait in the kernel without the interpreter's lock.

    Parameters
    ----------
    order
        What holds for the whole of it.
    strict
        Whether it is an error that the kernel refuses. If not, the bytes pass through our memory, and the report
        says why.
    """

    def __init__(self, order: Order, strict: bool) -> None:
        self._order = order
        self._strict = strict
        self._changed = threading.Condition()
        self._direct: deque[Piece] = deque()
        self._bounced: deque[Piece] = deque()
        self._threads = self._idle = self._in_flight = 0
        self._sealed = False
        self._stopped = False
        self._failure: Exception | None = None
        self._opened: dict[_native.SourceFile, Opened] = {}
        self._held: list[Mapping] = []
        self._gpu: list[GpuMapping] = []
        self._counted = Moved()
        self._refusals: dict[str, None] = {}
        self._asked: dict[tuple[int, str], str] = {}
        self._started = time.perf_counter()
        self._deadline = None if order.timeout is None else time.monotonic() + order.timeout
        self._seconds: float | None = None
        _movements.add(self)
        if order.device.is_gpu:
            # The transfer begins after what is queued in the stream now.
            gpu = Gpu(order.device.index)
            try:
                gpu.synchronize(order.stream or 0)
            finally:
                gpu.close()

    # --- what is to be moved

    def add(self, parts: Sequence[Part]) -> None:
        """Add ranges to be moved.

        Raises
        ------
        SpanError
            For ordinary memory: what is PCI memory and what is not are transfers of their own.
        PathError
            If the kernel cannot do it and the path was asked for by name.
        """
        for file, offset, span in parts:
            with self._changed:
                if span.nbytes == 0 or self._stopped:
                    continue
                opened = self._open(file)
                mapping, address = self._reach(span)
                bounce = self._may_not(opened, mapping)
                found = list(cut(opened, mapping.provider, offset, address, span.nbytes, bounce))
                self._direct.extend(piece for piece in found if piece.direct)
                self._bounced.extend(piece for piece in found if not piece.direct)
                self._employ(len(found))

    def _employ(self, pieces: int) -> None:
        for _ in range(min(_MOST_THREADS - self._threads, pieces - self._idle)):
            self._threads += 1
            threading.Thread(target=self._work, name="gpunvme-p2pdma", daemon=True).start()
        self._changed.notify_all()

    def add_gather(self, file: Source, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads, packed in order into ``span``."""
        self.add([Part(file, int(at), span.part(i * nbytes, nbytes)) for i, at in enumerate(offsets)])

    def _open(self, file: Source) -> Opened:
        if not isinstance(file, _native.SourceFile):
            raise SpanError("files and namespaces cannot be parts of one transfer")
        opened = self._opened.get(file)
        if opened is None:
            opened = self._opened[file] = Opened(file, self._order.write)
        return opened

    def _reach(self, span: Span) -> tuple[Mapping, int]:
        """The PCI memory that a span is in, held, and where the host sees the span."""
        if span.device.is_gpu:
            mapped = GpuMapping(span)
            self._gpu.append(mapped)
            return mapped.mapping, mapped.address
        mapping = mapping_of(span)
        if mapping is None:
            raise SpanError("PCI memory and ordinary memory cannot be parts of one transfer")
        mapping.hold()
        self._held.append(mapping)
        return mapping, span.ptr

    def _may_not(self, opened: Opened, mapping: Mapping) -> bool:
        """Whether it is known that a file's drive does not reach some memory."""
        key = opened.plain, mapping.provider
        if key not in self._asked:
            self._asked[key] = probe.why_not(opened.file, mapping)
            if self._asked[key]:
                self._refuse(self._asked[key])
        return bool(self._asked[key])

    def _refuse(self, why: str) -> None:
        if self._strict:
            raise PathError(f"path {NAME!r} cannot carry this: {why}")
        self._refusals[why] = None

    def seal(self) -> None:
        """Say that nothing more comes."""
        with self._changed:
            self._sealed = True
            self._changed.notify_all()
            self._end_if_done()

    # --- moving

    def _take(self) -> Piece | None:
        """Wait for a piece and take it; None if there is none any more. With the lock."""
        while True:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._stop(DeadlineExceeded("the transfer passed its deadline"))
            if self._stopped:
                return None
            if self._direct:
                return self._direct.popleft()
            # What the page cache takes of a write comes when no drive's request is in flight beside it.
            if self._bounced and (not self._order.write or (self._sealed and not self._in_flight)):
                return self._bounced.popleft()
            if self._sealed and not self._bounced:
                return None
            self._idle += 1
            self._changed.wait()
            self._idle -= 1

    def _work(self) -> None:
        bounce: Bounce | None = None
        while True:
            with self._changed:
                piece = self._take()
                if piece is None:
                    self._threads -= 1
                    self._end_if_done()
                    return
                self._in_flight += 1
            moved, failure = Moved(), None
            try:
                if piece.direct:
                    moved = self._direct_or_again(piece)
                else:
                    bounce = bounce or Bounce()
                    moved = bounce.carry(piece, self._order.write)
            except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it
                failure = error if isinstance(error, Exception) else Cancelled("the interpreter is ending")
            with self._changed:
                self._in_flight -= 1
                self._counted = Moved(*(one + more for one, more in zip(self._counted, moved, strict=True)))
                if failure is not None:
                    self._stop(failure)
                self._changed.notify_all()
                self._end_if_done()

    def _direct_or_again(self, piece: Piece) -> Moved:
        """Have the drive move a piece; where the kernel refuses, put it among those that pass through our memory."""
        write = self._order.write
        try:
            return requests.carry_direct(piece, write)
        except FileError:
            raise
        except OSError as error:
            if error.errno not in reasons.REFUSALS:
                raise file_error(error, "write" if write else "read", piece.opened.name, piece.offset) from None
            why = reasons.refused(error.errno, piece.opened.plain, piece.provider)
        with self._changed:
            self._refuse(why)
            if not self._stopped:
                self._bounced.append(piece._replace(direct=False))
        return Moved()

    # --- the end

    def _stop(self, failure: Exception) -> None:
        """Let nothing more begin. With the lock."""
        if self._seconds is None:
            if self._failure is None:
                # Its frames hold files open, and nobody needs them: it is raised again where somebody waits.
                self._failure = failure.with_traceback(None)
                self._failure.__context__ = None
            self._stopped = True
            self._direct.clear()
            self._bounced.clear()
            self._changed.notify_all()

    def _end_if_done(self) -> None:
        """Let go of everything, once, when nothing is in flight and nothing comes any more. With the lock."""
        waiting = bool(self._direct or self._bounced)
        if self._seconds is not None or self._in_flight or waiting or not (self._sealed or self._stopped):
            return
        self._seconds = time.perf_counter() - self._started
        for opened in self._opened.values():
            opened.close()
        for mapping in self._held:
            mapping.release()
        for mapped in self._gpu:
            mapped.close()
        self._opened.clear()
        self._held.clear()
        self._gpu.clear()
        self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for the end at most so long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._seconds is not None, seconds)

    def _give_up(self, failure: Exception) -> None:
        with self._changed:
            self._stop(failure)
            self._end_if_done()

    def cancel(self) -> None:
        """Stop as soon as possible."""
        self._give_up(Cancelled("the transfer was cancelled"))

    def expire(self) -> None:
        """Stop as soon as possible, for the deadline has passed."""
        self._give_up(DeadlineExceeded("the transfer passed its deadline"))

    def failure(self) -> Exception | None:
        """Why it failed, or None."""
        return self._failure if self._seconds is not None else None

    def report(self) -> Report:
        """What was done so far; another path's name where nothing went straight."""
        with self._changed:
            direct, cached, bounced = self._counted
            seconds = time.perf_counter() - self._started if self._seconds is None else self._seconds
            name = "host" if self._refusals and direct + cached == bounced else NAME
            by_cache = {"cached_bytes" if self._order.write else "buffered_bytes": cached}
            return Report(name, self._reason(), seconds, direct_bytes=direct, bounced_bytes=bounced, **by_cache)

    def _reason(self) -> str:
        direct, cached, bounced = self._counted
        straight = direct + cached - bounced
        whose = " and ".join(dict.fromkeys(provider for _, provider in self._asked))
        way = "from" if self._order.write else "into"
        said = [f"{format_bytes(straight)} O_DIRECT straight {way} memory of {whose}"] if straight else []
        if bounced:
            why = "; ".join(self._refusals) or "not whole blocks, or not aligned"
            said.append(f"{format_bytes(bounced)} through host memory ({why})")
        return ", ".join(said) or "nothing was moved"


def _end() -> None:
    give_up = time.monotonic() + _GRACE
    for movement in list(_movements):
        with contextlib.suppress(Exception):
            movement.cancel()
            movement.wait(max(0.0, give_up - time.monotonic()))


atexit.register(_end)
