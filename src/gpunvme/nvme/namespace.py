"""`Namespace`: the blocks of one namespace, to and from memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpunvme.arguments import checked_span, gathered_span, offsets_array
from gpunvme.errors import NvmeError, RangeError, SpanError
from gpunvme.many import carry
from gpunvme.memory import CPU, Buffer, Device, Span, address_of, check_gpu_span, span_of
from gpunvme.nvme import spec
from gpunvme.nvme.guard import refuse_data
from gpunvme.nvme.identify import Oncs
from gpunvme.nvme.movement import NvmeMovement
from gpunvme.paths.base import Order
from gpunvme.streams import stream_handle
from gpunvme.transfer import Progress, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpunvme.gpu.queues import GpuQueues
    from gpunvme.nvme.controller import Controller

_PLAIN = Order(False, CPU)  # of commands that move nothing


class Namespace:
    """Blocks of one namespace. Made by `Controller.namespace`.

    Reads and writes are whole blocks; memory may have any alignment. Several threads may use one namespace.
    """

    def __init__(self, controller: Controller, nsid: int) -> None:
        self.controller = controller
        self.nsid = nsid
        active = controller.namespace_ids()
        if nsid not in active:
            ids = ", ".join(map(str, active)) or "none"
            raise NvmeError(f"{controller.transport.uri}: there is no active namespace {nsid}; there are: {ids}")
        self.info = info = controller.identify_namespace(nsid)
        self.name = f"{controller.transport.uri} namespace {nsid}"
        if info.metadata_interleaved or info.protected:
            raise NvmeError(f"{self.name}: its blocks carry metadata or protection information; reformat it without")
        self._blocks, self._block_size = info.nsze, info.lba_bytes
        self._checked_for: bool | None = None  # `check_writable` passed for a catalog's writer (True), or anybody else

    @property
    def block_size(self) -> int:
        """Bytes in a block."""
        return self._block_size

    @property
    def blocks(self) -> int:
        """Blocks in the namespace."""
        return self._blocks

    @property
    def size(self) -> int:
        """Bytes in the namespace."""
        return self._blocks * self._block_size

    def __repr__(self) -> str:
        return f"<gpunvme.nvme.Namespace {self.name!r}, {self._blocks} blocks of {self._block_size} bytes>"

    # --- reading

    def read_into(
        self,
        destination: Any,
        lba: int = 0,
        blocks: int | None = None,
        *,
        stream: Any = None,
        wait: bool = True,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Read blocks into memory.

        Parameters
        ----------
        destination
            A contiguous, writable tensor, array, buffer or `Span`, on the host or a GPU.
        lba
            First block.
        blocks
            How many; as many as the destination holds if None, which must then be a whole number.
        stream, wait, progress, timeout
            As for `File.read_into`.

        Raises
        ------
        RangeError
            If the namespace does not have these blocks.
        SpanError
            If the destination does not fit, is read-only or not contiguous.
        CommandError
            If commands failed; its ``failures`` lists every one.
        NvmeError, CudaError, DeadlineExceeded, Cancelled
            If it fails on the way; the destination's content is then undefined.
        """
        span = self._span(destination, lba, blocks, writable=True)
        return self._move(spec.NvmOpcode.READ, 0, lba, span, destination, stream, wait, progress, timeout)

    def read(self, lba: int = 0, blocks: int | None = None, device: Any = "cpu") -> Buffer:
        """Read blocks into new memory, which on the host is memory that the controller reaches without a copy.

        Raises the same errors as `read_into`.
        """
        lba = operator.index(lba)
        blocks = max(0, self._blocks - lba) if blocks is None else operator.index(blocks)
        self._check_range(lba, blocks)
        buffer = self._new_buffer(blocks * self._block_size, device)
        self.read_into(buffer, lba, blocks)
        return buffer

    def gather(
        self,
        lbas: Any,
        blocks: int = 1,
        out: Any = None,
        device: Any = None,
        *,
        stream: Any = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Read many short runs of blocks, packed in the order of ``lbas``.

        Parameters
        ----------
        lbas
            First block of each: a sequence of int, or a one-dimensional integer array or tensor on the host or a GPU.
        blocks
            Blocks of each.
        out
            Where to: memory of ``len(lbas) * blocks * block_size`` bytes at least. If None, a new `Buffer` of shape
            ``(len(lbas), blocks * block_size)`` on ``device``.
        device
            Where to, if ``out`` is None: the host unless given.
        stream, progress, timeout
            As for `File.read_into`.

        Returns
        -------
        ``out``, or the new `Buffer`.

        Raises
        ------
        RangeError
            If blocks are not in the namespace; says which.
        SpanError, TypeError, CommandError, NvmeError, CudaError, DeadlineExceeded, Cancelled
            As for `read_into`.
        """
        blocks = operator.index(blocks)
        if blocks < 1:
            raise RangeError(f"blocks is {blocks}: each read must have at least one")
        places = offsets_array(lbas)
        self._check_places(places, blocks)
        each = blocks * self._block_size
        total = len(places) * each
        if out is None:
            out = self._new_buffer(total, "cpu" if device is None else device, (len(places), each))
        span = gathered_span(out, device, total, f"{len(places)} reads of {blocks} blocks")

        def add(movement: NvmeMovement) -> None:
            movement.add_blocks(address_of(places), len(places), blocks, span)

        self._carry(
            spec.NvmOpcode.READ, 0, span.device, total, (span, places), out, stream, True, progress, timeout, add
        )
        return out

    def read_pieces(self, destinations: Sequence[Any], lba: int = 0, *, timeout: float | None = None) -> Transfer:
        """Read one run of blocks into many pieces of memory, one after another.

        Parameters
        ----------
        destinations
            Tensors, arrays, buffers or spans, all on one device; together a whole number of blocks.
        lba
            First block.
        timeout
            As for `File.read_into`.

        Raises the same errors as `read_into`.
        """
        return self._move_pieces(spec.NvmOpcode.READ, destinations, lba, timeout, writable=True)

    # --- writing

    def write_from(
        self,
        source: Any,
        lba: int = 0,
        blocks: int | None = None,
        *,
        fua: bool = False,
        stream: Any = None,
        wait: bool = True,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Write memory to blocks.

        Parameters
        ----------
        source
            A contiguous tensor, array, buffer or `Span`, on the host or a GPU. It must not change until the transfer
            is done.
        lba, blocks, stream, wait, progress, timeout
            As for `read_into`.
        fua
            Whether the blocks are on the medium when the transfer is done (Force Unit Access), past a volatile write
            cache. `flush` does the same for everything written before.

        Raises
        ------
        UnsafeDeviceError
            If the namespace holds a partition table, a file system or a catalog, and `Controller` was not told to
            overwrite it.
        RangeError, SpanError, CommandError, NvmeError, CudaError, DeadlineExceeded, Cancelled
            As for `read_into`. After an error each block has its old or its new content, or what the device makes of
            it where its atomic write unit is smaller than a command.
        """
        span = self._span(source, lba, blocks, writable=False)
        self.check_writable()
        flags = spec.Rw.FUA if fua else 0
        return self._move(spec.NvmOpcode.WRITE, flags, lba, span, source, stream, wait, progress, timeout)

    def write_pieces(
        self, sources: Sequence[Any], lba: int = 0, *, fua: bool = False, timeout: float | None = None
    ) -> Transfer:
        """Write many pieces of memory to one run of blocks; the inverse of `read_pieces`."""
        self.check_writable()
        flags = spec.Rw.FUA if fua else 0
        return self._move_pieces(spec.NvmOpcode.WRITE, sources, lba, timeout, writable=False, flags=flags)

    def write_zeroes(self, lba: int, blocks: int, *, deallocate: bool = False) -> None:
        """Make blocks zero without sending any; ``deallocate`` lets the device give their space back."""
        self._need(Oncs.WRITE_ZEROES, "Write Zeroes")
        self._check_range(lba, blocks)
        self.check_writable()
        flags = spec.Rw.DEAC if deallocate else 0
        self._blocks_only(spec.NvmOpcode.WRITE_ZEROES, flags, lba, blocks)

    def verify(self, lba: int, blocks: int) -> None:
        """Let the device read blocks and check them, sending nothing."""
        self._need(Oncs.VERIFY, "Verify")
        self._check_range(lba, blocks)
        self._blocks_only(spec.NvmOpcode.VERIFY, 0, lba, blocks)

    def compare(self, source: Any, lba: int = 0, blocks: int | None = None) -> None:
        """Let the device compare blocks with memory.

        Raises
        ------
        CommandError
            With the status Compare Failure where they differ.
        """
        self._need(Oncs.COMPARE, "Compare")
        span = self._span(source, lba, blocks, writable=False)
        self._move(spec.NvmOpcode.COMPARE, 0, lba, span, source, None, True, None, None)

    def flush(self) -> None:
        """Wait until everything that was written is on the medium."""
        movement = self._plain(spec.NvmOpcode.FLUSH)
        movement.add_plain(spec.NvmOpcode.FLUSH)
        self._finish(movement)

    def trim(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell the device that blocks are not needed any more; what they read as afterwards is the device's choice.

        Parameters
        ----------
        ranges
            ``(first block, blocks)`` each.
        """
        self._need(Oncs.DATASET_MANAGEMENT, "Dataset Management")
        wanted = [(operator.index(lba), operator.index(blocks)) for lba, blocks in ranges]
        for lba, blocks in wanted:
            self._check_range(lba, blocks)
        self.check_writable()
        # A range's length has 32 bits.
        most = 0xFFFFFFFF // 8 * 8
        cut = [(at, min(most, lba + n - at)) for lba, n in wanted for at in range(lba, lba + n, most)]
        movement = self._plain(spec.NvmOpcode.DATASET_MANAGEMENT)
        lists = []
        for first in range(0, len(cut), spec.DSM_RANGES_MOST):
            some = cut[first : first + spec.DSM_RANGES_MOST]
            data = np.frombuffer(spec.pack_dsm_ranges(some), np.uint8)
            lists.append(data)
            span = Span(address_of(data), len(data), CPU, False, data)
            movement.add_plain(spec.NvmOpcode.DATASET_MANAGEMENT, len(some) - 1, spec.Dsm.AD, span=span)
        self._finish(movement, lists)

    # --- by the GPU's own hand

    def gpu_queues(
        self,
        device: Any = 0,
        *,
        count: int | None = None,
        depth: int | None = None,
        placement: str = "auto",
        doorbell: str = "auto",
        slot_bytes: int | None = None,
        timeout: float | None = None,
    ) -> GpuQueues:
        """Make I/O queues that kernels of a GPU drive by themselves.

        Parameters
        ----------
        device
            The GPU.
        count
            Queues; if None, up to 8 of those that the controller has left.
        depth
            Entries of each queue, 2 to CAP.MQES + 1; if None, 256 or as many as there may be.
        placement
            ``"host"``: queues and data in host memory; ``"data"``: data in GPU memory; ``"full"``: queues too;
            ``"auto"``: the highest that works here, emulations aside. `GpuQueues.reasons` says why not higher.
        doorbell
            ``"direct"``: the GPU rings doorbells itself; ``"forward"``: a host thread does it for it; ``"auto"``:
            directly where that works.
        slot_bytes
            Largest command of a kernel in bytes; 4096 or a block, whichever is more, if None. Larger rows are several
            commands.
        timeout
            Seconds that a command may take; `Controller.timeout` if None.

        Raises
        ------
        CudaError
            If CUDA cannot be used, or kernels can neither be loaded nor compiled.
        PathError
            If a placement, or direct doorbells, were asked for and cannot be had; says why.
        NvmeError
            If the controller has not as many queues left, or does not make them.
        """
        from gpunvme.gpu.queues import GpuQueues

        return GpuQueues(
            self,
            device,
            count=count,
            depth=depth,
            placement=placement,
            doorbell=doorbell,
            slot_bytes=slot_bytes,
            timeout=timeout,
        )

    # --- how

    def _span(self, memory: Any, lba: int, blocks: int | None, *, writable: bool) -> Span:
        lba = operator.index(lba)
        nbytes = None if blocks is None else operator.index(blocks) * self._block_size
        if lba < 0:
            raise RangeError(f"LBA {lba} is negative")
        span = checked_span(memory, 0, nbytes, writable=writable)
        if span.nbytes % self._block_size:
            raise SpanError(
                f"{self.name} has blocks of {self._block_size} bytes; {span.nbytes} bytes are no whole number of them"
            )
        self._check_range(lba, span.nbytes // self._block_size)
        if span.device.is_gpu:
            check_gpu_span(span, memory)
        return span

    def _check_range(self, lba: int, blocks: int) -> None:
        if lba < 0 or blocks < 0 or lba + blocks > self._blocks:
            raise RangeError(f"{self.name} has {self._blocks} blocks; blocks {lba} to {lba + blocks} were asked for")

    def _check_places(self, places: Any, blocks: int) -> None:
        bad = np.flatnonzero((places < 0) | (places > self._blocks - blocks))
        if len(bad):
            first = int(bad[0])
            raise RangeError(
                f"{self.name} has {self._blocks} blocks; read number {first} asks for blocks {places[first]} to "
                f"{int(places[first]) + blocks} ({len(bad)} of {len(places)} reads are outside)"
            )

    def _need(self, support: Oncs, what: str) -> None:
        if not self.controller.info.oncs & support:
            raise NvmeError(f"{self.controller.transport.uri} has no {what} command (Identify Controller, ONCS)")

    def check_writable(self, *, catalog: bool = False) -> None:
        """Refuse to write over somebody's data; looked at once.

        Parameters
        ----------
        catalog
            Whether a catalog's writer asks: after it, somebody else is refused.

        Raises
        ------
        UnsafeDeviceError
            If the namespace holds a partition table, a file system or a catalog, and nobody said that they may go.
        """
        if self.info.write_protected:
            raise NvmeError(f"{self.name} is write-protected")
        if self._checked_for != catalog:
            refuse_data(self, catalog=catalog)
            self._checked_for = catalog

    def _new_buffer(self, nbytes: int, device: Any, shape: tuple[int, ...] | None = None) -> Buffer:
        where = Device.parse(device)
        if where.is_gpu or self.controller.transport.maps_any_memory:
            return Buffer.empty(nbytes, where, shape=shape)
        return self.controller.buffer(nbytes, shape)

    def _move(
        self,
        opcode: int,
        flags: int,
        lba: int,
        span: Span,
        memory: Any,
        stream: Any,
        wait: bool,
        progress: Progress | None,
        timeout: float | None,
    ) -> Transfer:
        def add(movement: NvmeMovement) -> None:
            movement.add_range(lba, span)

        return self._carry(opcode, flags, span.device, span.nbytes, span, memory, stream, wait, progress, timeout, add)

    def _move_pieces(
        self, opcode: int, memories: Sequence[Any], lba: int, timeout: float | None, *, writable: bool, flags: int = 0
    ) -> Transfer:
        spans = [span_of(memory, writable=writable) for memory in memories]
        total = sum(span.nbytes for span in spans)
        if total % self._block_size:
            raise SpanError(f"{self.name}: {total} bytes in all are no whole number of blocks of {self._block_size}")
        self._check_range(operator.index(lba), total // self._block_size)
        device = spans[0].device if spans else CPU
        for span, memory in zip(spans, memories, strict=True):
            if span.device != device:
                raise SpanError(f"all pieces must be on one device; got {device} and {span.device}")
            if device.is_gpu:
                check_gpu_span(span, memory)

        def add(movement: NvmeMovement) -> None:
            movement.add_pieces(lba, spans)

        first = memories[0] if spans else None
        return self._carry(opcode, flags, device, total, spans, first, None, True, None, timeout, add)

    def _carry(
        self,
        opcode: int,
        flags: int,
        device: Device,
        nbytes: int,
        keep: object,
        memory: Any,
        stream: Any,
        wait: bool,
        progress: Progress | None,
        timeout: float | None,
        add: Callable[[NvmeMovement], None],
    ) -> Transfer:
        order = Order(opcode == spec.NvmOpcode.WRITE, device, stream_handle(stream, memory, device), timeout, not wait)
        movement = NvmeMovement(self, opcode, flags, order)
        return carry(movement, order, nbytes, keep, wait, progress, lambda: add(movement))

    def _blocks_only(self, opcode: int, flags: int, lba: int, blocks: int) -> None:
        movement = self._plain(opcode)
        for at in range(lba, lba + blocks, spec.RW_BLOCKS_MOST):
            some = min(spec.RW_BLOCKS_MOST, lba + blocks - at)
            movement.add_plain(opcode, at & 0xFFFFFFFF, at >> 32, flags | (some - 1))
        self._finish(movement)

    def _plain(self, opcode: int) -> NvmeMovement:
        return NvmeMovement(self, opcode, 0, _PLAIN)

    def _finish(self, movement: NvmeMovement, keep: object = None) -> None:
        carry(movement, _PLAIN, 0, keep, True, None)
