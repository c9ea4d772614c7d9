"""What `GpuQueues` moves: arguments checked, kernels launched, and what their jobs need in the meantime."""

from __future__ import annotations

import ctypes
import operator
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import RangeError, SpanError
from gpunvme.gpu.arguments import gpu_span, host_or_gpu_integers, warp_shape
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.jobs import MOST_RECORDS, KernelMovement, Room
from gpunvme.gpu.memory import StreamMemory
from gpunvme.gpu.placement import describe
from gpunvme.memory import Device, Span, address_of
from gpunvme.nvme import spec
from gpunvme.streams import stream_handle
from gpunvme.transfer import Transfer

if TYPE_CHECKING:
    from gpunvme.gpu.queue_set import QueueSet
    from gpunvme.nvme.namespace import Namespace

_ROW_THREADS, _STREAM_THREADS = 128, 256  # of a block, as the kernels are bounded
_ROOM_PIECES = 1 << 20
_OWNER = "these queues are driven by"


@dataclass(frozen=True, slots=True)
class _Work:
    """What a kernel is launched for."""

    kernel: str
    opcode: int
    span: Span
    pieces: int
    piece_blocks: int
    grid: int
    threads: int
    tail: bytes  # of the kernel's argument: what is its own
    lbas: NDArray[np.int64] | int | None  # of rows: the host's, or an address on the GPU
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
        self._lock = threading.Lock()
        self._rooms: list[Room] = []
        self._last_stream_job = 0  # its event
        block_bytes, controller = namespace.block_size, namespace.controller
        self._stream_memory = StreamMemory(gpu, controller, block_bytes, queues.stream, queues.shared)
        queues.keep.callback(self._stream_memory.close)
        queues.keep.callback(self._free_rooms)
        self.prepare(1)

    def prepare(self, jobs: int) -> None:
        """Make room for so many jobs at a time now, before kernels run; for more it is made when they begin."""
        with self._lock:
            while len(self._rooms) < jobs:
                self._rooms.append(Room(self.gpu, _ROOM_PIECES))

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
            span=span,
            pieces=pieces,
            piece_blocks=memory.piece_blocks,
            grid=max(1, min(memory.blocks, pieces)),
            threads=_STREAM_THREADS,
            tail=struct.pack("<4Q", memory.table, memory.stages, lba, blocks),
            lbas=None,
            stream=stream_handle(stream, out, self._device) or 0,
        )
        return self._start(work, (span, out), wait, timeout)

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
            span=span.part(0, total),
            pieces=pieces,
            piece_blocks=self._piece_blocks,
            grid=max(1, -(-warps * 32 // _ROW_THREADS)),
            threads=_ROW_THREADS,
            tail=struct.pack("<5Q", rows, blocks, row_pieces, width, batch),
            lbas=places,
            stream=stream_handle(stream, memory, self._device) or 0,
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
        room = self._take_room(work.pieces)
        movement = KernelMovement(
            self,
            room,
            lambda again: self._launch(work, room, again=again),
            work.kernel,
            work.opcode,
            work.pieces,
            work.span.nbytes,
            repeat=wait,
        )
        self._set.jobs.add(movement)
        try:
            if isinstance(work.lbas, np.ndarray):
                ctypes.memmove(room.lbas[0], address_of(work.lbas), work.lbas.nbytes)
            movement.begin()
        except BaseException:
            self.job_ended(movement, room)
            raise
        deadline = None if timeout is None else time.monotonic() + timeout
        transfer = Transfer(movement, work.span.nbytes, keep=(self, keep), deadline=deadline)
        return transfer.wait() if wait else transfer

    def _launch(self, work: _Work, room: Room, *, again: bool) -> None:
        # Job in kernels/job.cuh, then what is the kernel's own.
        argument = struct.pack("<5Q", self._set.handle, room.state, room.records, room.pieces, work.span.ptr)
        argument += struct.pack("<3Q", self._count, MOST_RECORDS, work.piece_blocks)
        if work.lbas is not None:
            argument += struct.pack("<Q", room.lbas[1] if isinstance(work.lbas, np.ndarray) else work.lbas)
        argument += work.tail
        packed = [ctypes.create_string_buffer(argument, len(argument))]
        with self._set.gate:
            self._set.wait_until_up()
            if work.kernel == "stream" and self._last_stream_job:
                self.gpu.wait_event(work.stream, self._last_stream_job)  # they share buffers
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
        with self._lock:
            room = next((room for room in self._rooms if room.most_pieces >= pieces), None)
            if room is not None:
                self._rooms.remove(room)
        room = room or Room(self.gpu, max(_ROOM_PIECES, pieces))
        with self._set.looking:
            room.set_stop(False, self._set.stream)
        return room

    def _free_rooms(self) -> None:
        with self._lock:
            rooms, self._rooms = self._rooms, []
        for room in rooms:
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
        with self._lock:
            self._rooms.append(room)
