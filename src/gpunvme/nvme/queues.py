"""The I/O queues of a controller: made by admin commands, driven by native code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from gpunvme import _native
from gpunvme.errors import CommandError
from gpunvme.nvme import spec
from gpunvme.nvme.dma import PAGE, DmaMemory, allocate_aligned

if TYPE_CHECKING:
    from gpunvme.nvme.doorbells import Doorbells
    from gpunvme.nvme.transport import Transport

    Command = Callable[..., spec.Cqe]


class QueuePair:
    """One I/O submission queue with the completion queue of the same number, and the memory of both.

    Who drives them is someone else's matter. ``memory`` is that of both, where it is not to be allocated here;
    ``vector`` is the interrupt vector that completions raise, None for no interrupts.
    """

    def __init__(
        self,
        queue_id: int,
        depth: int,
        transport: Transport,
        command: Command,
        page_bytes: int,
        memory: tuple[DmaMemory, DmaMemory] | None = None,
        vector: int | None = None,
    ) -> None:
        self.queue_id = queue_id
        self.depth = depth
        self.vector = vector
        self._command = command
        self._memory: list[DmaMemory] = []
        if memory is not None:
            self.submissions, self.completions = memory
            return
        try:
            self.submissions = self._allocate(transport, depth * spec.Sqe.SIZE, page_bytes)
            self.completions = self._allocate(transport, depth * spec.Cqe.SIZE, page_bytes)
        except BaseException:
            self.free()
            raise

    def _allocate(self, transport: Transport, nbytes: int, page_bytes: int) -> DmaMemory:
        memory = allocate_aligned(transport, nbytes, page_bytes)
        self._memory.append(memory)
        return memory

    def create(self) -> None:
        """Let the controller make them. Their memory is zeroed."""
        # The completion queue first: the submission queue names it (Base 2.0, section 5.4 and 5.5).
        size = (self.depth - 1) << 16 | self.queue_id
        completions = int(spec.CreateQueue.PC)
        if self.vector is not None:
            completions |= self.vector << 16 | spec.CreateQueue.IEN
        self._command(spec.AdminOpcode.CREATE_IO_CQ, prp1=self.completions.iova(), cdw=(size, completions))
        try:
            queue = self.queue_id << 16 | spec.CreateQueue.PC
            self._command(spec.AdminOpcode.CREATE_IO_SQ, prp1=self.submissions.iova(), cdw=(size, queue))
        except BaseException:
            self._command(spec.AdminOpcode.DELETE_IO_CQ, cdw=(self.queue_id,))
            raise

    def remove(self) -> None:
        """Delete the submission queue, then the completion queue.

        In this order: the controller may still complete commands while it deletes the submission queue.
        """
        self._command(spec.AdminOpcode.DELETE_IO_SQ, cdw=(self.queue_id,))
        self._command(spec.AdminOpcode.DELETE_IO_CQ, cdw=(self.queue_id,))

    def free(self) -> None:
        """Free the memory that was allocated here: only when the controller has forgotten the queues."""
        while self._memory:
            self._memory.pop().close()


class IoQueuePair(QueuePair):
    """A queue pair that native code of this process drives."""

    def __init__(
        self,
        queue_id: int,
        depth: int,
        transport: Transport,
        command: Command,
        doorbells: Doorbells,
        page_bytes: int,
        max_bytes: int,
        vector: int | None = None,
    ) -> None:
        super().__init__(queue_id, depth, transport, command, page_bytes, vector=vector)
        slots = min(depth - 1, _native.MOST_SLOTS)
        # Data that begins inside a page touches one page more.
        list_pages = _native.prp_list_pages(max_bytes // page_bytes + 1, page_bytes)
        try:
            lists = self._allocate(transport, slots * list_pages * page_bytes, page_bytes)
            self.create()
        except BaseException:
            self.free()
            raise
        self.native = _native.IoQueue(
            self.submissions.address,
            self.completions.address,
            depth,
            doorbells.submission(queue_id),
            doorbells.completion(queue_id),
            queue_id,
            lists.address,
            lists.page_iovas(0, slots * list_pages, page_bytes),
            page_bytes,
            list_pages,
        )

    def delete(self) -> None:
        """Stop, delete both queues, then free their memory."""
        self.native.stop()
        self.remove()
        self.free()


class Guest(Protocol):
    """Queues in a controller's care that are not driven by its own I/O loop. See `Controller.admit`."""

    def leave_queues(self) -> None:
        """Before a reset: return when nobody touches the queues any more."""

    def make_queues(self) -> None:
        """After a reset: make the queues anew."""

    def close(self) -> None:
        """Before the controller is closed: delete the queues."""

    def free(self) -> None:
        """Free memory: the controller is disabled, and can do no DMA any more."""


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
