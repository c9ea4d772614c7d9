"""What `GpuQueues` moves: arguments checked, kernels launched, and what their jobs need in the meantime."""

from __future__ import annotations

import ctypes
import operator
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import RangeError, SpanError
from gpunvme.gpu.arguments import gpu_span, gpu_stream, host_or_gpu_integers, warp_shape
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.jobs import MOST_RECORDS, KernelMovement, Room
from gpunvme.gpu.memory import StreamMemory
from gpunvme.gpu.placement import describe
from gpunvme.memory import Device, Span, address_of
from gpunvme.nvme import spec
from gpunvme.transfer import Transfer

if TYPE_CHECKING:
    from gpunvme.gpu.queue_set import QueueSet
    from gpunvme.nvme.namespace import Namespace

_ROW_THREADS, _STREAM_THREADS = 128, 256  # of a block, as the kernels are bounded
# Of the rooms that are there from the beginning: for so many jobs at once, one of them large.
_ROOM_PIECES = (1 << 17, 1 << 17, 1 << 17, 1 << 20)
# One piece of what `Moves.extents` reads: Extent in kernels/stream.cu.
EXTENT = np.dtype([("lba", "u8"), ("memory", "u8"), ("blocks", "u8")])
# So many of them fit into the largest of these rooms.
MOST_EXTENTS = max(_ROOM_PIECES) * 8 // EXTENT.itemsize
_LOOK_SECONDS = 0.002  # that one of several jobs is looked after
_OWNER = "these queues are driven by"


@dataclass(frozen=True, slots=True)
class _Work:
    """What a kernel is launched for."""

    kernel: str
    opcode: int
    memory: int
    nbytes: int
    pieces: int
    piece_blocks: int
    grid: int
    threads: int
    tail: bytes  # of the kernel's argument: what is its own
    table: NDArray[Any] | int  # LBAs of rows, or extents: the host's, or an address on the GPU
    stream: int


class Moves:
    """Launches of the package's kernels on one set of queues. Its memory goes with the set.

    Parameters
    ----------
    gpu, namespace
        Who moves, and what.
    queues
        The queues; made by this much, not by the controller yet.
    count
        How many.
    kernels
        Handles, by name.
    """

    def __init__(self, gpu: Gpu, namespace: Namespace, queues: QueueSet, count: int, kernels: dict[str, int]) -> None:
        self.gpu = gpu
        self.name = namespace.name
        self._namespace = namespace
        self._device = Device("cuda", gpu.index)
        self._set = queues
        self._count = count
        self._kernels = kernels
        self._slots, self._piece_blocks = queues.shape.slots, queues.shape.piece_blocks
        self._row_shape = warp_shape(self._slots)
        self._changed = threading.Condition()  # of what follows
        self._rooms: list[Room] = []  # by size
        self._out = 0  # rooms in use
        self._quiet = 0  # who waits for kernels to end
        self._last_stream_job = 0  # its event
        block_bytes, controller = namespace.block_size, namespace.controller
        self._stream_memory = StreamMemory(gpu, controller, block_bytes, queues.stream, queues.shared)
        queues.keep.callback(self._stream_memory.close)
        queues.keep.callback(self._free_rooms)
        for pieces in _ROOM_PIECES:
            self._rooms.append(Room(gpu, pieces))

    def stream(self, lba: int, nbytes: int, out: Any, stream: Any, wait: bool, timeout: float | None) -> Transfer:
        """As `GpuQueues.stream`."""
        lba, nbytes = operator.index(lba), operator.index(nbytes)
        size, memory = self._namespace.block_size, self._stream_memory
        if nbytes < 0 or nbytes % size:
            raise RangeError(f"{self.name} has blocks of {size} bytes; {nbytes} bytes are no whole number of them")
        blocks = nbytes // size
        self._namespace._check_range(lba, blocks)
        span = self._span(out, nbytes, writable=True)
        pieces = -(-blocks // memory.piece_blocks)
        work = _Work(
            kernel="stream",
            opcode=spec.NvmOpcode.READ,
            memory=span.ptr,
            nbytes=span.nbytes,
            pieces=pieces,
            piece_blocks=memory.piece_blocks,
            grid=max(1, min(memory.blocks, pieces)),
            threads=_STREAM_THREADS,
            tail=struct.pack("<5Q", memory.table, memory.stages, pieces, lba, blocks),
            table=0,
            stream=gpu_stream(stream, out, self.gpu),
        )
        return self._start(work, (span, out), wait, timeout)

    def extents(self, table: NDArray[np.void], stream: int) -> Transfer:
        """Read many runs of blocks to different places by one launch, which nobody waits for.

        Parameters
        ----------
        table
            `EXTENT`: runs of at most `extent_blocks`, in the namespace, to memory of this GPU that the caller keeps.
        stream
            Handle of the stream that it is ordered in.
        """
        memory = self._stream_memory
        work = _Work(
            kernel="stream",
            opcode=spec.NvmOpcode.READ,
            memory=0,
            nbytes=int(table["blocks"].sum()) * self._namespace.block_size,
            pieces=len(table),
            piece_blocks=memory.piece_blocks,
            grid=max(1, min(memory.blocks, len(table))),
            threads=_STREAM_THREADS,
            tail=struct.pack("<5Q", memory.table, memory.stages, len(table), 0, 0),
            table=table,
            stream=stream,
        )
        return self._start(work, None, False, None)

    @property
    def extent_blocks(self) -> int:
        """Blocks that one extent may have."""
        return self._stream_memory.piece_blocks

    def rows(
        self, kernel: str, lbas: Any, memory: Any, blocks: int | None, stream: Any, wait: bool, timeout: float | None
    ) -> Transfer:
        """As `GpuQueues.gather` and `GpuQueues.scatter`; ``kernel`` says which."""
        size = self._namespace.block_size
        places, rows = host_or_gpu_integers(lbas, "LBAs", self._device, _OWNER)
        span = self._span(memory, None, writable=kernel == "gather")
        if blocks is None:
            blocks = span.nbytes // (rows * size) if rows else 1
            if rows and (blocks == 0 or span.nbytes != rows * blocks * size):
                raise SpanError(
                    f"{span.nbytes} bytes are no whole number of blocks of {size} bytes for each of {rows} rows; say "
                    "how many with blocks="
                )
        blocks = operator.index(blocks)
        if blocks < 1:
            raise RangeError(f"blocks is {blocks}: each row must have at least one")
        total = rows * blocks * size
        if span.nbytes < total:
            raise SpanError(f"{rows} rows of {blocks} blocks are {total} bytes; the memory has {span.nbytes}")
        if isinstance(places, np.ndarray):
            self._namespace._check_places(places, blocks)
        row_pieces = -(-blocks // self._piece_blocks)
        pieces = rows * row_pieces
        # As many lanes with commands as there are slots: more would only wait for one.
        width, batch = self._row_shape
        warps = min(-(-pieces // width), self._count * -(-self._slots // width))
        work = _Work(
            kernel=kernel,
            opcode=spec.NvmOpcode.READ if kernel == "gather" else spec.NvmOpcode.WRITE,
            memory=span.ptr,
            nbytes=total,
            pieces=pieces,
            piece_blocks=self._piece_blocks,
            grid=max(1, -(-warps * 32 // _ROW_THREADS)),
            threads=_ROW_THREADS,
            tail=struct.pack("<5Q", rows, blocks, row_pieces, width, batch),
            table=places,
            stream=gpu_stream(stream, memory, self.gpu),
        )
        return self._start(work, (span, memory, lbas), wait, timeout)

    def _span(self, memory: Any, nbytes: int | None, *, writable: bool) -> Span:
        span = gpu_span(memory, self._device, _OWNER, writable=writable)
        if nbytes is None:
            return span
        if span.nbytes < nbytes:
            raise SpanError(f"the destination has {span.nbytes} bytes; {nbytes} were asked for")
        return span.part(0, nbytes)

    def _start(self, work: _Work, keep: object, wait: bool, timeout: float | None) -> Transfer:
        self._set.check_usable()
        table = work.table if isinstance(work.table, np.ndarray) else None
        room = self._take_room(max(work.pieces, 0 if table is None else -(-table.nbytes // 8)))
        movement = KernelMovement(
            self,
            room,
            lambda again: self._launch(work, room, again=again),
            work.kernel,
            work.opcode,
            work.pieces,
            work.nbytes,
            repeat=wait,
        )
        self._set.jobs.add(movement)
        try:
            if table is not None:
                ctypes.memmove(room.table[0], address_of(table), table.nbytes)
            movement.begin()
        except BaseException:
            self.job_ended(movement, room)
            raise
        deadline = None if timeout is None else time.monotonic() + timeout
        transfer = Transfer(movement, work.nbytes, keep=(self, keep), deadline=deadline)
        return transfer.wait() if wait else transfer

    def _launch(self, work: _Work, room: Room, *, again: bool) -> None:
        # Job in kernels/job.cuh, then what is the kernel's own.
        argument = struct.pack("<5Q", self._set.handle, room.state, room.records, room.pieces, work.memory)
        argument += struct.pack("<3Q", self._count, MOST_RECORDS, work.piece_blocks)
        argument += struct.pack("<Q", room.table[1] if isinstance(work.table, np.ndarray) else work.table)
        argument += work.tail
        packed = [ctypes.create_string_buffer(argument, len(argument))]
        with self._set.gate:
            self._set.wait_until_up()
            if work.kernel == "stream" and self._last_stream_job:
                self.gpu.wait_event(work.stream, self._last_stream_job)  # they share buffers
            with self._set.running.launching(room.event):
                room.begin(work.stream, again=again)
                kernel = self._kernels[work.kernel]
                self.gpu.launch(kernel, (work.grid, 1, 1), (work.threads, 1, 1), packed, work.stream)
                room.end(work.stream)
            if work.kernel == "stream":
                self._last_stream_job = room.event

    # --- what a job asks for

    @property
    def how(self) -> str:
        """How commands are moved, for reports."""
        queues = f"{self._count} queue" + ("s" if self._count != 1 else "")
        where = describe(self._set.placement, self._namespace.controller)
        return (
            f"kernels on {self._device} over {queues} of {self._namespace.controller.transport.uri}, {where}, "
            f"doorbells {self._set.doorbells.reason}"
        )

    def recover(self) -> None:
        """As `GpuQueues.recover`."""
        self._set.recover()

    def _take_room(self, pieces: int) -> Room:
        room = None
        while room is None:
            self._set.check_usable()
            with self._changed:
                # Whoever waits for quiet looks after what is in flight; nothing of this thread's is needed for it.
                self._changed.wait_for(lambda: self._quiet == 0)
                room = next((room for room in self._rooms if room.most_pieces >= pieces), None)
                if room is not None:
                    self._rooms.remove(room)
                    self._out += 1
            if room is None:
                self.while_quiet(lambda: self._add_room(pieces))
        try:
            with self._set.looking:
                room.set_stop(False, self._set.stream)
        except BaseException:
            self._give_room(room)
            raise
        return room

    def _add_room(self, pieces: int) -> None:
        if not any(room.most_pieces >= pieces for room in self._rooms):  # somebody else may have been faster
            self._rooms.append(Room(self.gpu, pieces))
            self._rooms.sort(key=lambda room: room.most_pieces)

    def _give_room(self, room: Room) -> None:
        with self._changed:
            self._out -= 1
            self._rooms.append(room)
            self._rooms.sort(key=lambda room: room.most_pieces)
            self._changed.notify_all()

    def while_quiet(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` while no kernel that is launched here runs, and begin no job meanwhile; what it returns.

        For what CUDA may put off until kernels have ended: allocating, above all. Jobs that are in flight are looked
        after until they have ended. Kernels of the caller's own are not known here.

        Raises
        ------
        ValueError, NvmeError, CudaError, DeadlineExceeded
            If the queues cannot be used any more.
        """
        with self._changed:
            self._quiet += 1
        try:
            while True:
                with self._changed:
                    if self._out == 0 and not self._set.running():
                        return make()
                self._set.check_usable()
                for job in list(self._set.jobs):
                    job.wait(_LOOK_SECONDS)
                with self._changed:
                    self._changed.wait(_LOOK_SECONDS)
        finally:
            with self._changed:
                self._quiet -= 1
                self._changed.notify_all()

    @contextmanager
    def beside_jobs(self, event: int = 0) -> Iterator[None]:
        """Launch here what uses the queues and is no job, when nobody waits for quiet; nothing is allocated meanwhile.

        Parameters
        ----------
        event
            Recorded behind it; without one, its end is awaited here.
        """
        with ExitStack() as launching:
            # Said before it is launched, and where `while_quiet` looks: that either waits for it, or is over.
            with self._changed:
                self._changed.wait_for(lambda: self._quiet == 0)
                launching.enter_context(self._set.running.launching(event))
            yield

    def begin_brief(self, launch: Callable[[], None], event: int) -> None:
        """Launch a kernel that waits for nothing, before ``event``, which the caller owns until `end_brief`."""
        with self._changed, self._set.running.launching(event):
            launch()

    def end_brief(self, event: int) -> None:
        """Say that the event has happened, and may be used for something else."""
        self._set.running.ended(event)

    def _free_rooms(self) -> None:
        with self._changed:
            rooms, self._rooms = self._rooms, []
        for room in rooms:
            self._set.running.ended(room.event)
            room.free()

    def failures(self, room: Room, count: int) -> NDArray[np.void]:
        """The records of a job's failures."""
        with self._set.looking:
            return room.failures(count, self._set.stream)

    def stop_job(self, room: Room) -> None:
        """Let a job begin nothing more."""
        with self._set.looking:
            room.set_stop(True, self._set.stream)

    def job_ended(self, movement: KernelMovement, room: Room) -> None:
        """A job is over: its room may be used again."""
        self._set.jobs.discard(movement)
        self._set.running.ended(room.event)
        self._give_room(room)
