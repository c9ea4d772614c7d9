"""The I/O queues of a controller: made by admin commands, driven by native code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gpunvme import _native
from gpunvme.errors import CommandError
from gpunvme.nvme import spec
from gpunvme.nvme.dma import PAGE, DmaMemory, allocate_aligned

if TYPE_CHECKING:
    from gpunvme.nvme.doorbells import Doorbells
    from gpunvme.nvme.transport import Transport

    Command = Callable[..., spec.Cqe]


class IoQueuePair:
    """One I/O submission queue with the completion queue of the same number, and the memory of both."""

    def __init__(
        self,
        queue_id: int,
        depth: int,
        transport: Transport,
        command: Command,
        doorbells: Doorbells,
        page_bytes: int,
        max_bytes: int,
    ) -> None:
        self.queue_id = queue_id
        self._command = command
        self._memory: list[DmaMemory] = []
        slots = min(depth - 1, _native.MOST_SLOTS)
        # Data that begins inside a page touches one page more.
        list_pages = _native.prp_list_pages(max_bytes // page_bytes + 1, page_bytes)
        try:
            submissions = self._allocate(transport, depth * spec.Sqe.SIZE, page_bytes)
            completions = self._allocate(transport, depth * spec.Cqe.SIZE, page_bytes)
            lists = self._allocate(transport, slots * list_pages * page_bytes, page_bytes)
            self._create(depth, submissions, completions)
        except BaseException:
            self.free()
            raise
        self.native = _native.IoQueue(
            submissions.address,
            completions.address,
            depth,
            doorbells.submission(queue_id),
            doorbells.completion(queue_id),
            queue_id,
            lists.address,
            lists.page_iovas(0, slots * list_pages, page_bytes),
            page_bytes,
            list_pages,
        )

    def _allocate(self, transport: Transport, nbytes: int, page_bytes: int) -> DmaMemory:
        memory = allocate_aligned(transport, nbytes, page_bytes)
        self._memory.append(memory)
        return memory

    def _create(self, depth: int, submissions: DmaMemory, completions: DmaMemory) -> None:
        # The completion queue first: the submission queue names it (Base 2.0, section 5.4 and 5.5).
        size = (depth - 1) << 16 | self.queue_id
        self._command(spec.AdminOpcode.CREATE_IO_CQ, prp1=completions.iova(), cdw=(size, spec.CreateQueue.PC))
        try:
            queue = self.queue_id << 16 | spec.CreateQueue.PC
            self._command(spec.AdminOpcode.CREATE_IO_SQ, prp1=submissions.iova(), cdw=(size, queue))
        except BaseException:
            self._command(spec.AdminOpcode.DELETE_IO_CQ, cdw=(self.queue_id,))
            raise

    def delete(self) -> None:
        """Delete the submission queue, then the completion queue, then free their memory.

        In this order: the controller may still complete commands while it deletes the submission queue.
        """
        self.native.stop()
        self._command(spec.AdminOpcode.DELETE_IO_SQ, cdw=(self.queue_id,))
        self._command(spec.AdminOpcode.DELETE_IO_CQ, cdw=(self.queue_id,))
        self.free()

    def free(self) -> None:
        """Free its memory: only when the controller has forgotten the queues."""
        while self._memory:
            self._memory.pop().close()


def make_queues(count: int, make: Callable[[int], IoQueuePair]) -> list[IoQueuePair]:
    """Make queue pairs 1 to ``count``; fewer where the controller refuses more, but one at least."""
    pairs: list[IoQueuePair] = []
    for queue_id in range(1, count + 1):
        try:
            pairs.append(make(queue_id))
        except (CommandError, MemoryError):
            if not pairs:
                raise
            break
    return pairs


def queue_depth(wanted: int, most: int, contiguous: bool) -> int:
    """Entries of each I/O queue: what is wanted, what CAP.MQES allows, and what fits into memory as it is.

    Where IOVAs are not contiguous, a queue has one page of memory.
    """
    depth = min(wanted, most)
    return depth if contiguous else min(depth, PAGE // spec.Sqe.SIZE)
