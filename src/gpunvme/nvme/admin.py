"""The admin queue: where a controller is asked who it is, and where the I/O queues are made.

This is a whole NVMe queue pair in plain Python, to be read first: the I/O queues do the same in C++. One page of
memory holds the submission queue (64 bytes an entry), one the completion queue (16 bytes an entry). A command is
written into the next free entry, and the tail doorbell tells the controller. The controller answers, in any order, by
an entry whose phase tag is the inverse of what stood there in the round before; the head doorbell gives the entry back.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque

from gpunvme.errors import CommandError, DeadlineExceeded, Failed
from gpunvme.nvme import spec, status
from gpunvme.nvme.dma import DmaMemory
from gpunvme.nvme.doorbells import Doorbells


class AdminQueue:
    """Admin submission and completion queue of a controller.

    Any thread may use it; one at a time looks for completions.

    Parameters
    ----------
    memory
        Two pages of the controller's page size: submission queue, then completion queue.
    depth
        Entries of each, at most a page of them.
    page_bytes
        The controller's page size.
    """

    def __init__(self, memory: DmaMemory, depth: int, page_bytes: int, doorbells: Doorbells) -> None:
        self.memory = memory
        self.depth = depth
        self._doorbells = doorbells
        memory.view()[:] = bytes(memory.nbytes)  # a phase tag of 1 that is left over would be taken for an answer
        self._submissions = memory.view(0, depth * spec.Sqe.SIZE)
        # Read by words of 8 bytes: one load brings phase tag, CID and status together, so none of them is older.
        self._completions = memory.view(page_bytes, depth * spec.Cqe.SIZE).cast("Q")
        self._tail = self._head = self._sq_head = 0
        self._phase = 1
        self._next_cid = 0
        self._waiting: set[int] = set()
        self._answers: dict[int, spec.Cqe] = {}
        self._abandoned: set[int] = set()  # never answered in time; their CIDs stay out of use until a reset
        self._lock = threading.RLock()
        self._events: set[int] = set()  # CIDs of Asynchronous Event Requests
        self.events: deque[int] = deque(maxlen=64)  # DW0 of those that were answered
        self.stray = 0  # completions of commands that nobody sent

    @property
    def abandoned(self) -> int:
        """How many commands were given up."""
        return len(self._abandoned)

    def submit(
        self,
        opcode: int,
        nsid: int = 0,
        prp1: int = 0,
        prp2: int = 0,
        cdw: tuple[int, ...] = (),
        *,
        event: bool = False,
    ) -> int:
        """Send a command; return its CID. ``cdw`` are command dwords 10 and up.

        Raises
        ------
        DeadlineExceeded
            If the queue stays full.
        """
        words = (*cdw, *(0,) * (6 - len(cdw)))
        give_up = time.monotonic() + 10
        while True:
            with self._lock:
                # Full when the tail would reach the head: one entry always stays empty (Base 2.0, section 3.3.1.5).
                if (self._tail + 1) % self.depth != self._sq_head:
                    cid = self._new_cid()
                    entry = spec.Sqe(opcode, 0, cid, nsid, 0, 0, 0, prp1, prp2, *words)
                    self._submissions[self._tail * entry.SIZE : (self._tail + 1) * entry.SIZE] = entry.pack()
                    self._tail = (self._tail + 1) % self.depth
                    (self._events if event else self._waiting).add(cid)
                    self._doorbells.ring_submission(0, self._tail)
                    return cid
                self.poll()
            if time.monotonic() > give_up:
                raise DeadlineExceeded("the controller has taken nothing from its admin queue for 10 s")
            time.sleep(0)

    def _new_cid(self) -> int:
        while True:
            self._next_cid = (self._next_cid + 1) % spec.CID_NONE
            cid = self._next_cid
            if not any(cid in taken for taken in (self._waiting, self._answers, self._abandoned, self._events)):
                return cid

    def poll(self) -> None:
        """Take what the controller has answered."""
        with self._lock:
            taken = False
            while True:
                word = self._completions[2 * self._head + 1]
                if word >> 48 & 1 != self._phase:
                    break
                # Only now the result: it was written before the word that was just read.
                cqe = spec.Cqe.unpack(struct.pack("<QQ", self._completions[2 * self._head], word))
                self._take(cqe)
                if cqe.sq_head < self.depth:
                    self._sq_head = cqe.sq_head
                self._head += 1
                if self._head == self.depth:
                    self._head, self._phase = 0, self._phase ^ 1
                taken = True
            if taken:
                self._doorbells.ring_completion(0, self._head)

    def _take(self, completion: spec.Cqe) -> None:
        cid = completion.cid
        if cid in self._waiting:
            self._waiting.remove(cid)
            self._answers[cid] = completion
        elif cid in self._events:
            self._events.remove(cid)
            if completion.status == 0:
                self.events.append(completion.dw0)
        elif cid in self._abandoned:
            self._abandoned.remove(cid)  # late, but now nothing of it is left in the controller
        else:
            self.stray += 1

    def requests_for_events(self) -> int:
        """How many Asynchronous Event Requests are with the controller."""
        return len(self._events)

    def answer(self, cid: int) -> spec.Cqe | None:
        """The answer to a command, once; None if there is none yet."""
        with self._lock:
            self.poll()
            return self._answers.pop(cid, None)

    def abandon(self, cid: int) -> None:
        """Give a command up. Its CID stays out of use until it is answered after all."""
        with self._lock:
            if cid in self._waiting:
                self._waiting.remove(cid)
                self._abandoned.add(cid)
            self._answers.pop(cid, None)


def command_error(what: str, opcode: int, completion: spec.Cqe) -> CommandError:
    """Make the error for an admin command that a controller refused."""
    failed = Failed(opcode, 0, 0, 0, completion.cid, completion.status, "status")
    return CommandError(f"{what}: {status.describe(completion.status)}", [failed])
