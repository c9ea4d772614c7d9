"""`GpuQueues`: NVMe queues that GPU kernels drive by themselves."""

from __future__ import annotations

import ctypes
import operator
import os
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gpunvme.arguments import offsets_array
from gpunvme.errors import DeadlineExceeded, NvmeError, RangeError, SpanError
from gpunvme.gpu.cache import CachedArray
from gpunvme.gpu.compile import own_kernels
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.jobs import MOST_RECORDS, KernelMovement, Room
from gpunvme.gpu.memory import StreamMemory
from gpunvme.gpu.placement import choose
from gpunvme.gpu.queue_set import QUIET_SECONDS, QueueSet
from gpunvme.memory import Buffer, Device, Span, address_of, check_gpu_span, span_of
from gpunvme.nvme import spec
from gpunvme.streams import stream_handle
from gpunvme.transfer import Transfer

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace

_KERNELS = ("layout", "set_up", "reap", "gather", "scatter", "stream")
_MOST_QUEUES = 8  # that are made unless the caller says how many
_MOST_SLOTS = 1023  # of a queue: leaves CIDs some generations
_LEAST_SLOT_BYTES = 4096
_ROW_THREADS, _STREAM_THREADS = 128, 256  # of a block, as the kernels are bounded
_ROOM_PIECES = 1 << 20
# Lanes of a warp that have rows of their own, and how many of them send theirs together: measured. Few slots are used
# best by many warps, which copy at once.
_ROW_SHAPE, _SMALL_ROW_SHAPE, _SMALL = (16, 4), (4, 4), 128


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


class GpuQueues:
    """I/O queues of a controller that kernels of one GPU drive. Made by `Namespace.gpu_queues`; a context manager.

    Several threads may use it, and several kernels at once.

    Attributes
    ----------
    handle
        Device address of an array of `count` ``gpunvme::GpuQueue``, for kernels of your own (``gpunvme/device.h``,
        `gpunvme.gpu.compile`).
    count, depth, slot_bytes
        Queues, entries of each, and the largest command of a slot in bytes.
    placement, reasons
        Where queues and data are; for each placement why it is used or not.
    doorbell, doorbell_reason
        ``"direct"`` or ``"forward"``, and what that means here.
    """

    def __init__(
        self,
        namespace: Namespace,
        device: Any = 0,
        *,
        count: int | None = None,
        depth: int = 256,
        placement: str = "auto",
        doorbell: str = "auto",
        slot_bytes: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self.namespace = namespace
        self._controller = controller = namespace.controller
        self.device = Device.parse(device)
        if not self.device.is_gpu:
            raise SpanError(f"GPU queues are driven by a GPU, not by {self.device}")
        self._check_shape(count, depth, slot_bytes, timeout)
        self.placement, self.reasons = choose(controller.transport, placement)
        self.timeout = controller.timeout if timeout is None else timeout
        self.gpu = Gpu(self.device.index)
        self.name = namespace.name
        self._lock = threading.Lock()
        self._closed = False
        self._jobs: set[KernelMovement] = set()
        self._rooms: list[Room] = []
        self._last_stream_job = 0  # its event
        self.depth = depth
        self._slots = min(depth - 1, _MOST_SLOTS)
        self._row_shape = _ROW_SHAPE if self._slots >= _SMALL else _SMALL_ROW_SHAPE
        self.slot_bytes = self._slot_size(slot_bytes)
        self._piece_blocks = min(self.slot_bytes, controller.max_bytes) // namespace.block_size
        queue_ids = self._take_ids(count)
        self.count = len(queue_ids)
        try:
            # Allocate, map and load everything now: while a kernel runs, none of this may happen.
            program = own_kernels(self.gpu)
            self._kernels = {name: program.kernel("gpunvme_" + name).handle for name in _KERNELS}
            self._set = QueueSet(
                self.gpu,
                namespace,
                self._kernels,
                queue_ids,
                depth=depth,
                slots=self._slots,
                slot_bytes=self.slot_bytes,
                piece_blocks=self._piece_blocks,
                timeout=self.timeout,
                doorbell=doorbell,
                is_busy=lambda: bool(self._jobs),
            )
            try:
                self._stream_memory = StreamMemory(self.gpu, controller, namespace.block_size, self._set.stream)
                self._set.keep.callback(self._stream_memory.close)
                self._rooms.append(Room(self.gpu, _ROOM_PIECES))
                self._set.keep.callback(self._free_rooms)
                controller.admit(self)
            except BaseException:
                self._set.free()
                raise
        except BaseException:
            controller.give_queue_ids(queue_ids)
            raise
        self.handle = self._set.handle
        self.doorbell, self.doorbell_reason = self._set.doorbells.kind, self._set.doorbells.reason
        self._set.watch()
        try:
            self._verify()
        except BaseException:
            self.close()
            raise

    # --- making

    def _check_shape(self, count: int | None, depth: int, slot_bytes: int | None, timeout: float | None) -> None:
        most = self._controller.registers.cap.queue_entries
        if not 2 <= depth <= most:
            raise ValueError(f"depth is {depth}: a queue of this controller has 2 to {most} entries (CAP.MQES)")
        if count is not None and count < 1:
            raise ValueError(f"count is {count}: at least one queue")
        if slot_bytes is not None and slot_bytes < 1:
            raise ValueError(f"slot_bytes is {slot_bytes}: at least one block")
        if timeout is not None and timeout <= 0:
            raise ValueError("timeout must be more than 0 seconds")

    def _slot_size(self, wanted: int | None) -> int:
        """Bytes of a slot's buffer: whole pages, whole blocks, no more than a command may have."""
        controller = self._controller
        least = max(_LEAST_SLOT_BYTES, self.namespace.block_size, controller.page_bytes)
        size = max(least, min(wanted or least, controller.max_bytes))
        return -(-size // controller.page_bytes) * controller.page_bytes

    def _take_ids(self, count: int | None) -> list[int]:
        least = 1 if count is None else count
        taken = self._controller.take_queue_ids(_MOST_QUEUES if count is None else count)
        if len(taken) < least:
            self._controller.give_queue_ids(taken)
            raise NvmeError(
                f"{self._controller.transport.uri}: GPU queues need {least} of the controller's I/O queues, and "
                f"{len(taken)} are left; open it with fewer of its own, queues={len(self._controller.io_queues)} now"
            )
        return taken

    def _verify(self) -> None:
        """Read the first blocks by kernel and by the driver's own queues: both must bring the same."""
        blocks = min(8, self.namespace.blocks)
        if blocks == 0:
            return
        expected = self.namespace.read(0, blocks).numpy().tobytes()
        buffer = Buffer.empty(len(expected), self.device)
        for kernel in ("gather", "stream"):
            if kernel == "gather":
                self.gather(np.arange(blocks), buffer, stream=self._set.stream)
            else:
                self.stream(0, buffer.nbytes, buffer, stream=self._set.stream)
            if buffer.numpy().tobytes() != expected:
                raise NvmeError(
                    f"{self.name}: placement {self.placement!r} read other bytes than the driver's own queues do; this "
                    "GPU and this controller cannot share memory"
                )
        self.reasons[self.placement] = "used: what kernels read was compared with what the driver reads"

    # --- moving

    def gather(
        self,
        lbas: Any,
        out: Any,
        *,
        blocks: int | None = None,
        stream: Any = None,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Transfer:
        """Read many short runs of blocks, packed in the order of ``lbas``.

        Parameters
        ----------
        lbas
            First block of each: on the host as for `Namespace.gather`, or a one-dimensional array of 64-bit integers on
            the GPU, which the kernel reads in the stream's order. LBAs on the GPU that are outside of the namespace
            fail with the status LBA Out of Range, each for itself.
        out
            Where to: contiguous memory of the GPU.
        blocks
            Blocks of each; as many as ``out`` has room for if None, which must then be a whole number.
        stream
            Stream that the kernel is ordered in; see `File.read_into`. What the caller puts into it afterwards finds
            the data, unless the transfer fails.
        wait
            Whether to wait for the end. Only then are commands repeated whose completions were lost; otherwise
            `Transfer.wait` raises. The queues are recovered in both cases.
        timeout
            Seconds for all of it; None is for ever. Each command has the queues' `timeout` besides.

        Raises
        ------
        RangeError
            If blocks are not in the namespace; says which.
        SpanError
            If ``out`` is on another device, too small, read-only or not contiguous.
        CommandError
            If commands failed; its ``failures`` lists them, at most 4096.
        NvmeError, CudaError, DeadlineExceeded, Cancelled
            If it fails on the way.
        """
        return self._move_rows("gather", lbas, out, blocks, stream, wait, timeout)

    def scatter(
        self,
        lbas: Any,
        source: Any,
        *,
        blocks: int | None = None,
        stream: Any = None,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Transfer:
        """Write rows of GPU memory to many short runs of blocks: the inverse of `gather`.

        Where two rows name the same block, it has the content of either.

        Raises
        ------
        UnsafeDeviceError
            As `Namespace.write_from`; and the same errors as `gather`.
        """
        self.namespace.check_writable()
        return self._move_rows("scatter", lbas, source, blocks, stream, wait, timeout)

    def stream(
        self, lba: int, nbytes: int, out: Any, *, stream: Any = None, wait: bool = True, timeout: float | None = None
    ) -> Transfer:
        """Read one long run of blocks.

        Parameters
        ----------
        lba
            First block.
        nbytes
            Bytes; a whole number of blocks.
        out
            Where to: contiguous memory of the GPU, of ``nbytes`` bytes at least.
        stream, wait, timeout
            As for `gather`.

        Raises the same errors as `gather`.
        """
        lba, nbytes = operator.index(lba), operator.index(nbytes)
        size, memory = self.namespace.block_size, self._stream_memory
        if nbytes < 0 or nbytes % size:
            raise RangeError(f"{self.name} has blocks of {size} bytes; {nbytes} bytes are no whole number of them")
        blocks = nbytes // size
        self.namespace._check_range(lba, blocks)
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
            stream=stream_handle(stream, out, self.device) or 0,
        )
        return self._start(work, (span, out), wait, timeout)

    def _move_rows(
        self, kernel: str, lbas: Any, memory: Any, blocks: int | None, stream: Any, wait: bool, timeout: float | None
    ) -> Transfer:
        size = self.namespace.block_size
        places, rows = self._places(lbas)
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
            self.namespace._check_places(places, blocks)
        row_pieces = -(-blocks // self._piece_blocks)
        pieces = rows * row_pieces
        # As many lanes with commands as there are slots: more would only wait for one.
        width, batch = self._row_shape
        warps = min(-(-pieces // width), self.count * -(-self._slots // width))
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
            stream=stream_handle(stream, memory, self.device) or 0,
        )
        return self._start(work, (span, memory, lbas), wait, timeout)

    def _places(self, lbas: Any) -> tuple[NDArray[np.int64] | int, int]:
        """LBAs as an array of the host's, or their address on the GPU; and how many there are."""
        interface = getattr(lbas, "__cuda_array_interface__", None)
        if interface is None:
            places = offsets_array(lbas)
            return places, len(places)
        if interface["typestr"] not in {"<i8", "<u8"} or len(interface["shape"]) != 1:
            raise TypeError(
                f"LBAs on the GPU are one-dimensional arrays of int64, not {interface['typestr']} of shape "
                f"{interface['shape']}"
            )
        span = self._span(lbas, None, writable=False)
        return span.ptr, span.nbytes // 8

    def _span(self, memory: Any, nbytes: int | None, *, writable: bool) -> Span:
        span = span_of(memory, writable=writable)
        if span.device != self.device:
            raise SpanError(f"memory is on {span.device}; these queues are driven by {self.device}")
        check_gpu_span(span, memory)
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
            work.opcode,
            work.pieces,
            work.span.nbytes,
            repeat=wait,
        )
        with self._lock:
            self._jobs.add(movement)
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
        argument = struct.pack("<5Q", self.handle, room.state, room.records, room.pieces, work.span.ptr)
        argument += struct.pack("<3Q", self.count, MOST_RECORDS, work.piece_blocks)
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

    def cached_array(
        self,
        dtype: Any,
        *,
        lba: int = 0,
        length: int | None = None,
        capacity_bytes: int = 256 << 20,
        line_bytes: int = 4096,
    ) -> CachedArray:
        """Make an array of the blocks that kernels index, with a cache in GPU memory in front of it.

        Parameters
        ----------
        dtype
            NumPy type of the elements: of 1, 2, 4, 8 or 16 bytes.
        lba
            Block that the array begins with.
        length
            Elements; all that follow if None.
        capacity_bytes
            GPU memory for lines, at least eight of them.
        line_bytes
            What is read at a time, a power of two from 4096 to 65536. Make the queues with ``slot_bytes`` as large:
            otherwise a line is read by several commands, one after the other.

        Raises
        ------
        TypeError, ValueError, RangeError
            If elements, lines, capacity or range are not possible; says why.
        CudaError
            If there is not so much memory.
        """
        return CachedArray(self, dtype, lba=lba, length=length, capacity_bytes=capacity_bytes, line_bytes=line_bytes)

    # --- what a job asks for

    @property
    def how(self) -> str:
        """How commands are moved, for reports."""
        queues = f"{self.count} queue" + ("s" if self.count != 1 else "")
        return (
            f"kernels on {self.device} over {queues} of {self._controller.transport.uri}, data through page-locked "
            f"host memory, doorbells {self.doorbell_reason}"
        )

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
        with self._lock:
            self._jobs.discard(movement)
            self._rooms.append(room)

    # --- looking after the queues

    @property
    def recoveries(self) -> int:
        """How often commands were lost, or the controller had failed, and that was put right."""
        return self._set.recoveries

    def recover(self) -> None:
        """Look whether commands were lost or the controller has failed, and put that right. A thread does it too.

        For who launches kernels of their own and does not want to wait for that thread.

        Raises
        ------
        NvmeError, CudaError
            If the controller, or CUDA, is beyond recovery.
        """
        self._set.recover()

    def stats(self) -> list[dict[str, int]]:
        """Counters of each queue since it was made.

        ``completed`` commands; completions with ``unknown`` CIDs, ``late`` ones (of commands that were finished or
        given up before), ones with a ``bad_head``; commands that are ``stuck`` now: given up, and not answered yet.
        """
        return self._set.stats()

    def leave_queues(self) -> None:
        """The controller is about to be reset."""
        self._set.leave_queues()

    def make_queues(self) -> None:
        """The controller was reset."""
        self._set.make_queues()

    def free(self) -> None:
        """The controller was disabled."""
        self._set.free()

    # --- ending

    def close(self, timeout: float = QUIET_SECONDS) -> None:
        """Stop the queues, delete them, and free their memory. Does nothing the second time.

        Parameters
        ----------
        timeout
            Seconds that kernels may take to end.

        Raises
        ------
        DeadlineExceeded
            If a kernel does not end. The queues are then deleted on the controller, which does nothing more for them;
            their memory stays reserved until the process ends.
        """
        with self._lock:
            if self._closed or self._set.process != os.getpid():
                return
            self._closed = True
        quiet = self._set.stop(timeout)
        for job in list(self._jobs):
            job.wait(0)  # its kernel has ended: it takes what there is
        deleted = self._set.delete()
        if not quiet:
            self._set.abandon()
        if deleted:
            self._controller.dismiss(self)
            self._set.free()
        if not quiet:
            raise DeadlineExceeded(
                f"a kernel on {self.device} still runs {timeout:.0f} s after its queues were stopped; their memory "
                "stays reserved until the process ends"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.count} queues of {self.depth} entries, placement {self.placement}"
        return f"<gpunvme.gpu.GpuQueues of {self.name!r} on {self.device}, {state}>"
