"""One launch of gather, scatter or stream, as `gpunvme.Transfer` waits for it."""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpunvme import nvtx_ranges
from gpunvme.errors import Cancelled, CommandError, CudaError, DeadlineExceeded, Error, Failed, NvmeError
from gpunvme.gpu.driver import Gpu
from gpunvme.nvme.movement import describe_failures
from gpunvme.transfer import Report

if TYPE_CHECKING:
    from gpunvme.gpu.moves import Moves

STATE_BYTES = 32  # JobState in kernels/job.cuh: what a launch counts, then the word that stops it
_COUNTED_BYTES = 24
_RECORD = np.dtype(  # Record in kernels/job.cuh
    [("piece", "u8"), ("lba", "u8"), ("blocks", "u4"), ("fate", "u4"), ("status", "u2"), ("cid", "u2"), ("queue", "u4")]
)
MOST_RECORDS = 4096
_KINDS = {0: "status", 1: "timeout", 2: "lost", 3: "timeout"}  # Fate in device.h
_SETTLED = 0
# Launches after which nothing more was moved before the job is given up.
_VAIN_LAUNCHES = 4
_LOOK_HARD = 0.0005  # seconds that a waiting thread looks all the time for
_NAP = 0.00005


class Room:
    """Memory that a job needs, kept for the next one: nothing may be allocated while a kernel waits.

    Parameters
    ----------
    gpu
        The GPU.
    pieces
        Commands that a job may have.
    """

    def __init__(self, gpu: Gpu, pieces: int) -> None:
        self._gpu = gpu
        self.most_pieces = pieces
        self.records = gpu.allocate(MOST_RECORDS * _RECORD.itemsize)
        self.state = gpu.allocate(STATE_BYTES)
        self.pieces = gpu.allocate(pieces)
        # Page-locked: what a job says in the end, its failures, one word, and LBAs or extents that come from the host.
        self._records_at = 64
        self._table_at = self._records_at + MOST_RECORDS * _RECORD.itemsize
        self.nbytes = self._table_at + 8 * pieces
        self.host, self.host_on_gpu = gpu.allocate_host(self.nbytes)
        self.event = gpu.event()

    @property
    def table(self) -> tuple[int, int]:
        """Where LBAs or extents are put: for the host, for the GPU. 8 bytes for each piece."""
        return self.host + self._table_at, self.host_on_gpu + self._table_at

    def begin(self, stream: int, *, again: bool) -> None:
        """Zero what a launch counts, in the stream's order."""
        self._gpu.fill(self.state, _COUNTED_BYTES, stream)
        if not again:
            self._gpu.fill(self.pieces, self.most_pieces, stream)

    def end(self, stream: int) -> None:
        """Bring back what the launch counted, and let the event happen."""
        self._gpu.to_host(self.host, self.state, STATE_BYTES, stream)
        self._gpu.record(self.event, stream)

    def counted(self) -> tuple[int, int, int]:
        """Commands, pieces moved, failures, of the launch that has ended."""
        commands, moved, failed = struct.unpack("<3Q", ctypes.string_at(self.host, 24))
        return commands, moved, failed

    def failures(self, count: int, stream: int) -> NDArray[np.void]:
        """The records of failures, on a stream that is ours."""
        nbytes = min(count, MOST_RECORDS) * _RECORD.itemsize
        self._gpu.to_host(self.host + self._records_at, self.records, nbytes, stream)
        self._gpu.synchronize(stream)
        return np.frombuffer(ctypes.string_at(self.host + self._records_at, nbytes), _RECORD)

    def set_stop(self, stop: bool, stream: int) -> None:
        """Tell the kernel to begin nothing more, or let the next one begin; on a stream that is ours."""
        ctypes.c_uint64.from_address(self.host + STATE_BYTES).value = int(stop)
        self._gpu.to_gpu(self.state + _COUNTED_BYTES, self.host + STATE_BYTES, 8, stream)
        self._gpu.synchronize(stream)

    def free(self) -> None:
        """Give everything back."""
        for address in (self.records, self.state, self.pieces):
            self._gpu.free(address)
        self._gpu.free_host(self.host)
        self._gpu.destroy(event=self.event)


class KernelMovement:
    """A job on its way.

    Parameters
    ----------
    queues
        What launches it.
    room
        Its memory.
    launch
        Launches it, on its stream; with True for what an earlier launch has not settled.
    kernel, opcode
        Its name, and the opcode of its commands.
    pieces, nbytes
        Commands and bytes in all.
    repeat
        Whether commands that were lost are repeated by further launches. Not where work of the caller's may follow
        in the stream: it would have run on data that was not there.
    """

    def __init__(
        self,
        queues: Moves,
        room: Room,
        launch: Callable[[bool], None],
        kernel: str,
        opcode: int,
        pieces: int,
        nbytes: int,
        *,
        repeat: bool,
    ) -> None:
        self._queues = queues
        self._room = room
        self._launch = launch
        self._kernel = kernel
        self._opcode = opcode
        self._pieces = pieces
        self._nbytes = nbytes
        self._repeat = repeat
        self._lock = threading.Lock()
        self._begun = self._ended = False
        self._failure: Exception | None = None
        self._stopped_by: Error | None = None
        self._commands = self._moved = self._launches = self._vain = 0
        self._failed: list[Failed] = []
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._range: Any = None  # of NVTX, from a launch to where its end is seen

    def repeat_lost(self) -> None:
        """Repeat lost commands even if nobody waits; for a stream in which nothing follows that needs the data."""
        self._repeat = True

    @property
    def commands(self) -> int:
        """Commands that were answered so far, well or not."""
        return self._commands

    @property
    def launches(self) -> int:
        """Launches so far."""
        return self._launches

    def begin(self) -> None:
        """Launch it for the first time."""
        self._start = time.perf_counter()
        self._launch_once()
        self._begun = True

    def _launch_once(self) -> None:
        self._launches += 1
        if nvtx_ranges.ranges is not None:
            number = f", launch {self._launches}" if self._launches > 1 else ""
            said = f"{self._kernel} of {self._pieces} commands by {self._queues.how}{number}"
            self._range = nvtx_ranges.ranges.start(said)
        try:
            self._launch(self._launches > 1)
        except BaseException:
            self._end_range()
            raise

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for the end."""
        start = time.perf_counter()
        while not self._ended:
            if self._look():
                break
            waited = time.perf_counter() - start
            if waited >= seconds:
                break
            time.sleep(0 if waited < _LOOK_HARD else _NAP)
        return self._ended

    def _look(self) -> bool:
        if not self._lock.acquire(blocking=False):
            return False  # another thread is at it
        try:
            # Before its first launch, the room's event and counters are those of the job before.
            if self._begun and not self._ended and self._queues.gpu.happened(self._room.event):
                self._come_to_end()
        except CudaError as error:
            self._end(error)
        except (NvmeError, DeadlineExceeded, ValueError) as error:
            self._end(error)
        finally:
            self._lock.release()
        return self._ended

    def _come_to_end(self) -> None:
        self._end_range()
        commands, moved, failed = self._room.counted()
        self._commands += commands
        self._moved += moved
        self._vain = 0 if moved else self._vain + 1
        lost: list[Failed] = []
        if failed:
            for each in self._queues.failures(self._room, failed):
                one = Failed(
                    *(self._opcode, int(each["lba"]), int(each["blocks"]), int(each["queue"]), int(each["cid"])),
                    *(int(each["status"]), _KINDS[int(each["fate"])]),
                )
                (self._failed if each["fate"] == _SETTLED else lost).append(one)
        if self._moved + len(self._failed) < self._pieces and self._may_repeat():
            self._queues.recover()
            self._launch_once()
            return
        if lost:
            self._queues.recover()
        self._end(self._outcome(lost))

    def _may_repeat(self) -> bool:
        return self._repeat and self._stopped_by is None and not self._failed and self._vain < _VAIN_LAUNCHES

    def _outcome(self, lost: list[Failed]) -> Exception | None:
        if self._stopped_by is not None:
            return self._stopped_by
        every = self._failed + lost
        if not every and self._moved == self._pieces:
            return None
        missing = self._pieces - self._moved - len(every)
        more = f"; {missing} more were not begun" if missing > 0 else ""
        return CommandError(f"{self._queues.name}: {describe_failures(every)}{more}", every)

    def _end_range(self) -> None:
        if nvtx_ranges.ranges is not None and self._range is not None:
            nvtx_ranges.ranges.end(self._range)
        self._range = None

    def _end(self, failure: Exception | None) -> None:
        self._end_range()
        self._seconds = time.perf_counter() - self._start
        self._failure = failure
        self._queues.job_ended(self, self._room)
        self._ended = True

    def cancel(self) -> None:
        """Begin no more commands."""
        self._stop(Cancelled("the transfer was cancelled"))

    def expire(self) -> None:
        """Begin no more commands, for the deadline has passed."""
        self._stop(DeadlineExceeded("the transfer was not complete by its deadline"))

    def _stop(self, error: Error) -> None:
        with self._lock:
            if not self._ended and self._stopped_by is None:
                self._stopped_by = error
                self._queues.stop_job(self._room)

    def failure(self) -> Exception | None:
        """Why it failed, or None."""
        return self._failure

    def report(self) -> Report:
        """What was done so far."""
        seconds = self._seconds if self._ended else time.perf_counter() - self._start
        moved = self._nbytes if self._moved == self._pieces else self._moved * self._nbytes // max(1, self._pieces)
        again = f", {self._launches} launches" if self._launches > 1 else ""
        reason = f"{self._commands} commands by {self._queues.how}{again}" if self._pieces else "nothing was moved"
        return Report("gpu-nvme", reason, seconds, direct_bytes=moved, bounced_bytes=moved)
