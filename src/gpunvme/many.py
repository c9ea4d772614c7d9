"""Many ranges as one transfer: what checkpoints stand on, and how every transfer is set going."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gpunvme.arguments import checked_span
from gpunvme.errors import SpanError
from gpunvme.memory import CPU, Span, check_gpu_span
from gpunvme.p2pdma.mappings import mapping_of
from gpunvme.paths.base import OpenMovement, Order, Part, Sealable
from gpunvme.paths.choose import HOST
from gpunvme.streams import stream_handle
from gpunvme.transfer import Progress, Transfer, stop

if TYPE_CHECKING:
    from gpunvme.file import File

# Parts are handed to the engine in batches: large enough to be read as large ranges, small enough that the first
# ones move while the memory of the last ones is not even allocated.
_BATCH_BYTES = 128 << 20
_BATCH_PARTS = 4096


class OwnSpan(Span):
    """Memory that was allocated here for a read, so that nothing of it has to be checked: there may be thousands."""

    __slots__ = ()


def read_many(
    parts: Iterable[tuple[File, int, Any]],
    *,
    stream: Any = None,
    wait: bool = True,
    progress: Progress | None = None,
    total: int | None = None,
    timeout: float | None = None,
) -> Transfer:
    """Read many ranges of one or more files into many destinations, as one transfer.

    Parameters
    ----------
    parts
        ``(file, offset, destination)`` each; the destination's size says how much. Taken lazily while earlier parts
        are moving already, so a generator may allocate as it goes. All destinations are on one device. Parts that
        follow each other in a file are read as large ranges.
    stream, wait, progress, timeout
        As for `File.read_into`.
    total
        Bytes in all, for ``progress`` while parts are still being taken.

    Raises
    ------
    RangeError, SpanError
        For a bad part; what was started before it is stopped first.
    FileError, TruncatedError, CudaError, DeadlineExceeded, Cancelled
        As for `File.read_into`.
    """
    movement: OpenMovement | None = None
    order: Order | None = None
    batch: list[Part] = []
    keep = [batch]
    moving = queued = size = 0
    in_pci_memory = False
    same: File | None = None
    try:
        for file, start, destination in parts:
            offset = operator.index(start)
            own = type(destination) is OwnSpan
            span = destination if own else checked_span(destination, offset, None, writable=True)
            if file is not same:  # asking for the size is a system call
                same, size = file, file.size
            if offset + span.nbytes > size:
                raise file._out_of_range(offset, span.nbytes)
            if movement is None or order is None:
                order = Order(False, span.device, stream_handle(stream, destination, span.device), timeout, not wait)
                movement = file._path(span).begin(order)
                in_pci_memory = mapping_of(span) is not None
            elif span.device != order.device:
                raise SpanError(f"all destinations must be on one device; got {order.device} and {span.device}")
            elif (mapping_of(span) is not None) != in_pci_memory:
                raise SpanError("all destinations must be PCI memory (P2pMemory), or none of them")
            if not own and span.device.is_gpu:
                check_gpu_span(span, destination)
            batch.append(Part(file._file, offset, span))
            queued += span.nbytes
            if queued >= _BATCH_BYTES or len(batch) >= _BATCH_PARTS:
                movement.add(batch)
                moving, queued, batch = moving + queued, 0, []
                keep.append(batch)
                if progress is not None:
                    progress(movement.report().moved_bytes, moving if total is None else total)
        if movement is None or order is None:
            order = Order(False, CPU)
            movement = HOST.begin(order)
        movement.add(batch)
        moving += queued
    except BaseException:
        if movement is not None:
            stop(movement)
            # What does not come back in time stays alive with the transfer.
            Transfer(movement, moving, keep=keep)
        raise
    return carry(movement, order, moving, keep, wait, progress)


def write_parts(parts: Sequence[tuple[File, int, Any]]) -> Transfer:
    """Write many ranges of memory on one device to files, as one transfer.

    Neighbours in a file are packed and written together. Unlike `File.write_from`, files are not cut back when it
    fails; this is for files that are replaced as a whole.
    """
    batch: list[Part] = []
    device = CPU
    stream: int | None = None
    for number, (file, offset, source) in enumerate(parts):
        span = checked_span(source, offset, None, writable=False)
        if number == 0:
            device, stream = span.device, stream_handle(None, source, span.device)
        elif span.device != device:
            raise SpanError(f"all sources must be on one device; got {device} and {span.device}")
        if batch and (mapping_of(span) is None) != (mapping_of(batch[0].span) is None):
            raise SpanError("all sources must be PCI memory (P2pMemory), or none of them")
        if span.device.is_gpu:
            check_gpu_span(span, source)
        batch.append(Part(file._file, offset, span))
    order = Order(True, device, stream)
    movement = (parts[0][0]._path(batch[0].span, write=True) if parts else HOST).begin(order)
    nbytes = sum(part.span.nbytes for part in batch)
    return carry(movement, order, nbytes, (batch, parts), True, None, lambda: movement.add(batch))


def carry(
    movement: Sealable,
    order: Order,
    nbytes: int,
    keep: object,
    wait: bool,
    progress: Progress | None,
    add: Callable[[], None] | None = None,
    on_done: Callable[[bool], None] | None = None,
) -> Transfer:
    """Make the `Transfer` of a movement, add to it, seal it, and wait for it if asked to."""
    deadline = None if order.timeout is None else time.monotonic() + order.timeout
    # Before anything is added: from then on it keeps the memory alive, whatever is raised in between.
    transfer = Transfer(movement, nbytes, keep=keep, progress=progress, deadline=deadline, on_done=on_done)
    try:
        if add is not None:
            add()
        movement.seal()
    except BaseException:
        stop(movement)
        raise
    return transfer.wait() if wait else transfer
