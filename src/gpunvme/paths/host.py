"""The ``host`` path: page cache and O_DIRECT, through the engine's page-locked ring where a GPU is at the other end."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native, totals
from gpunvme.errors import Cancelled, SpanError
from gpunvme.memory import Device, Span, address_of
from gpunvme.paths.base import OpenMovement, Order, Part, Source, Verdict
from gpunvme.transfer import Report, error_from_native, format_bytes, raise_native

_ending = False
_waiting: set[int] = set()  # threads in the engine's wait


def _end() -> None:
    # The interpreter is about to free the memory that workers read into, and to end the daemon threads that wait for
    # them: one that is still inside the engine then takes the process down with it.
    global _ending
    _ending = True
    _native.shutdown()
    give_up = time.monotonic() + 1
    while _waiting and time.monotonic() < give_up:
        time.sleep(0.001)


atexit.register(_end)
os.register_at_fork(after_in_child=_waiting.clear)


class HostPath:
    """Works for every file and every device; the others are measured against it."""

    name = "host"

    def __init__(self) -> None:
        self._speeds: dict[tuple[int, Device], float] = {}

    def verdict(self, file: Source, device: Device) -> Verdict:
        """Say whether the device is there; files are always possible."""
        if not isinstance(file, _native.SourceFile):
            return Verdict(self.name, False, "a namespace that this process drives is no file of the kernel's")
        if device.is_gpu:
            missing = _native.cuda_unavailable_reason()
            if missing:
                return Verdict(self.name, False, missing)
            count = len(_native.cuda_devices())
            if device.index >= count:
                return Verdict(self.name, False, f"there is no {device}: the driver sees {count} GPU(s)")
        how = "cached bytes are copied from the page cache"
        refusal = file.direct_refusal
        how += f", others read through it ({refusal})" if refusal else ", others read O_DIRECT"
        if not refusal:
            why_threads = _why_threads()
            how += f" by threads ({why_threads})" if why_threads else " by io_uring"
            how += " (`gpunvme doctor` says who refuses it, and how to allow it)" if _native.io_uring_reason() else ""
        if device.is_gpu:
            how += "; through page-locked host memory and the copy engine"
        return Verdict(self.name, True, how)

    def speed(self, file: Source, device: Device, *, gather: bool = False) -> float | None:
        """Bytes per second of the last large transfer between this file's drive and the device."""
        return self._speeds.get((os.fstat(file.fileno()).st_dev, device))

    def begin(self, order: Order) -> OpenMovement:
        """Begin a transfer."""
        return HostMovement(self, order)

    def small_read(self, part: Part, stream: int | None) -> Report | None:
        """Read a little cached data at once, in this thread; None if this has to be a transfer."""
        file, offset, span = part
        if not isinstance(file, _native.SourceFile):
            return None
        start = time.perf_counter()
        try:
            if not _native.small_read(file, offset, span.nbytes, span.device.native, stream or 0, span.ptr):
                return None
        except _native.Failure as failure:
            # It never becomes a transfer, and counts all the same.
            totals.count(Report(self.name, "failed", time.perf_counter() - start), failed=True)
            raise_native(failure)
        seconds = time.perf_counter() - start
        bounced = span.nbytes if span.device.is_gpu else 0
        how = "copied from the page cache by the calling thread"
        return Report(self.name, how, seconds, 0, span.nbytes, 0, bounced)

    def note_speed(self, file: _native.SourceFile, device: Device, report: Report) -> None:
        """Remember how fast a transfer was, if it was large enough to tell."""
        if report.seconds > 0.01:
            self._speeds[os.fstat(file.fileno()).st_dev, device] = report.moved_bytes / report.seconds


class HostMovement:
    """One transfer of the engine."""

    def __init__(self, path: HostPath, order: Order) -> None:
        self._path = path
        self._order = order
        self._files: dict[_native.SourceFile, int] = {}
        self._noted = False
        if _ending and threading.current_thread() is not threading.main_thread():
            raise Cancelled("the interpreter is ending")
        try:
            self._job = _native.Job.make(order.write, order.device.native, order.stream, order.timeout)
        except _native.Failure as failure:
            raise_native(failure)

    def _number(self, file: Source) -> int:
        if not isinstance(file, _native.SourceFile):
            raise SpanError("files and namespaces cannot be parts of one transfer")
        number = self._files.get(file)
        if number is None:
            number = self._files[file] = self._job.add_file(file)
        return number

    def add(self, parts: Sequence[Part]) -> None:
        """Add ranges to be moved."""
        try:
            self._job.add([(self._number(file), offset, span.nbytes, span.ptr) for file, offset, span in parts])
        except _native.Failure as failure:
            raise_native(failure)

    def add_gather(self, file: Source, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads; ``offsets`` is kept by the caller until the transfer is done."""
        try:
            self._job.add_gather(self._number(file), address_of(offsets), len(offsets), nbytes, span.ptr)
        except _native.Failure as failure:
            raise_native(failure)

    def seal(self) -> None:
        """Say that nothing more comes."""
        self._job.seal()

    def wait(self, seconds: float) -> bool:
        """Wait for the end at most so long."""
        thread = threading.get_ident()
        _waiting.add(thread)
        try:
            done = self._job.wait(seconds)
        except _native.Failure as failure:
            raise_native(failure)
        finally:
            _waiting.discard(thread)
        if done and not self._noted and self._files and self._job.failure() is None:
            self._noted = True
            self._path.note_speed(next(iter(self._files)), self._order.device, self.report())
        return done

    def cancel(self) -> None:
        """Stop as soon as possible."""
        self._job.cancel()

    def expire(self) -> None:
        """Stop as soon as possible, for the deadline has passed."""
        self._job.expire()

    def failure(self) -> Exception | None:
        """Why it failed, or None."""
        failure = self._job.failure()
        return None if failure is None else error_from_native(failure)

    def report(self) -> Report:
        """What the engine counted so far."""
        counted = self._job.report()
        return Report(
            self._path.name,
            self._reason(counted),
            counted["seconds"],
            counted["direct_bytes"],
            counted["cached_bytes"],
            counted["buffered_bytes"],
            counted["bounced_bytes"],
        )

    def _reason(self, counted: _native.JobReport) -> str:
        write = self._order.write
        how = "io_uring"
        if counted["io_threads"]:
            how = f"threads ({_why_threads() or 'io_uring was refused'})"
            how = f"io_uring and {how}" if counted["io_uring"] else how
        said = []
        if counted["cached_bytes"]:
            amount = format_bytes(counted["cached_bytes"])
            mapped = " by its mapping" if counted["mapped_bytes"] else ""
            said.append(f"{amount} into the page cache" if write else f"{amount} from the page cache{mapped}")
        if counted["direct_bytes"]:
            said.append(f"{format_bytes(counted['direct_bytes'])} O_DIRECT by {how}")
        if counted["buffered_bytes"]:
            refusals = {file.direct_refusal for file in self._files} - {""}
            why = f" ({'; '.join(sorted(refusals))})" if refusals else ""
            said.append(f"{format_bytes(counted['buffered_bytes'])} read through the page cache{why}")
        if counted["bounced_bytes"] and self._order.device.is_gpu:
            kind = "pageable memory, page-locking was refused" if counted["pageable"] else "page-locked memory"
            said.append(f"through {kind}")
        elif counted["bounced_bytes"]:
            said.append(f"{format_bytes(counted['bounced_bytes'])} through aligned memory")
        return ", ".join(said) if said else "nothing was moved"


def _why_threads() -> str:
    """Why O_DIRECT requests are made by threads; "" where io_uring makes them."""
    return "GPUNVME_IO=threads" if os.environ.get("GPUNVME_IO") == "threads" else _native.io_uring_reason()
