"""The memory of GPU queues: what the controller reaches, what the kernels reach, and both."""

from __future__ import annotations

import ctypes
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.shared_memory import SharedAllocator, SharedMemory
from gpunvme.nvme import spec
from gpunvme.nvme.queues import QueuePair

if TYPE_CHECKING:
    from gpunvme.nvme.controller import Controller

_ALIGN = 256
_STREAM_BYTES = 16 << 20  # of all buffers: what a CPU's cache holds
_STREAM_PIECE_BYTES = 128 << 10
_STREAM_BLOCKS = 64


class Buffers:
    """Equally large buffers in one stretch of memory, each with the PRPs that describe it.

    Parameters
    ----------
    shared
        Where they lie.
    page
        The controller's page size in bytes.
    count
        How many.
    nbytes
        Of each: a multiple of the controller's page, and few enough pages for a PRP list of one page.
    """

    def __init__(self, shared: SharedAllocator, page: int, count: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._lists: SharedMemory | None = None
        self._memory = shared.data(count * nbytes)
        self.gpu_address = self._memory.gpu_address
        each = nbytes // page
        # IOVAs of the pages of each buffer, and of its list: the pages from the second on.
        self.pages = self._memory.memory.page_iovas(0, count * each, page).reshape(count, each)
        self.lists = np.zeros(count, np.uint64)
        if each > 2:
            entries = np.zeros((count, page // 8), np.uint64)
            entries[:, : each - 1] = self.pages[:, 1:]
            try:
                self._lists = shared.data(count * page)
                self._lists.write(entries)
            except BaseException:
                self.close()
                raise
            self.lists = self._lists.memory.page_iovas(0, count, page)

    def close(self) -> None:
        """Free them: only when neither the controller nor a kernel uses them."""
        self._memory.close()
        if self._lists is not None:
            self._lists.close()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the host finds things in a queue's memory; the kernel `gpunvme_layout` says it."""

    handle_bytes: int
    memory_bytes: int
    stopped: int
    stuck: int
    counters: int
    slots: int
    slot_bytes: int
    state_mask: int
    quarantined: int
    cid_shift: int

    WORDS = 10

    @classmethod
    def ask(cls, gpu: Gpu, kernel: int, entries: int, slots: int, stream: int) -> Layout:
        """Ask the GPU."""
        host, device = gpu.allocate_host(4096)
        try:
            arguments = [ctypes.c_uint32(entries), ctypes.c_uint32(slots), ctypes.c_uint64(device)]
            gpu.launch(kernel, (1, 1, 1), (1, 1, 1), arguments, stream)
            gpu.synchronize(stream)
            return cls(*struct.unpack(f"<{cls.WORDS}Q", ctypes.string_at(host, 8 * cls.WORDS)))
        finally:
            gpu.free_host(host)


class GpuMemory:
    """Plain memory of the GPU with a page-locked shadow of the same size to copy from and to."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self._gpu = gpu
        self.nbytes = nbytes
        self.address = gpu.allocate(nbytes)
        try:
            self.host, _ = gpu.allocate_host(nbytes)
        except BaseException:
            gpu.free(self.address)
            raise
        self.shadow = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.host))

    def close(self) -> None:
        """Free both."""
        self._gpu.free(self.address)
        self._gpu.free_host(self.host)


def aligned(nbytes: int) -> int:
    """``nbytes``, rounded up so that what follows is aligned for whatever it is."""
    return -(-nbytes // _ALIGN) * _ALIGN


class QueueMemory:
    """Everything that a number of queue pairs are made of. Not created on the controller yet.

    Parameters
    ----------
    gpu, controller
        Who uses it.
    queue_ids
        Numbers of the queues.
    depth
        Entries of each SQ and CQ.
    slots
        Commands in flight on each at most.
    slot_bytes
        Of the buffer of each slot.
    layout
        Of a queue's state.
    shared
        Where queues and data lie.
    """

    def __init__(
        self,
        gpu: Gpu,
        controller: Controller,
        queue_ids: list[int],
        depth: int,
        slots: int,
        slot_bytes: int,
        layout: Layout,
        shared: SharedAllocator,
    ) -> None:
        self._gpu = gpu
        self._keep = ExitStack()
        self.pairs: list[QueuePair] = []
        self.entries: list[tuple[SharedMemory, SharedMemory]] = []
        self.data: list[Buffers] = []
        count, page = len(queue_ids), controller.page_bytes
        try:
            for queue_id in queue_ids:
                submissions = shared.queue(depth * spec.Sqe.SIZE)
                self._keep.callback(submissions.close)
                completions = shared.queue(depth * spec.Cqe.SIZE)
                self._keep.callback(completions.close)
                self.entries.append((submissions, completions))
                memory = submissions.memory, completions.memory
                transport, command = controller.transport, controller.command
                self.pairs.append(QueuePair(queue_id, depth, transport, command, page, memory))
                buffers = Buffers(shared, page, slots, slot_bytes)
                self._keep.callback(buffers.close)
                self.data.append(buffers)
            # Behind each other: every queue's state (looked at by the host), the handles, the addresses of pages.
            self.stride = aligned(layout.memory_bytes)
            self.states = GpuMemory(gpu, count * self.stride)
            self._keep.callback(self.states.close)
            pages = slots * (slot_bytes // page) * 8
            self._pages_at = aligned(count * layout.handle_bytes)
            self._lists_at = self._pages_at + count * aligned(pages)
            self._page_stride, self._list_stride = aligned(pages), aligned(slots * 8)
            self.handles = GpuMemory(gpu, self._lists_at + count * self._list_stride)
            self._keep.callback(self.handles.close)
        except BaseException:
            self.free()
            raise

    def upload(self, stream: int) -> None:
        """Bring the addresses of pages and lists to the GPU."""
        shadow = self.handles.shadow
        for number, buffers in enumerate(self.data):
            for at, array in (
                (self.pages_at(number), buffers.pages),
                (self.lists_at(number), buffers.lists),
            ):
                start = at - self.handles.address
                shadow[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._gpu.to_gpu(self.handles.address, self.handles.host, self.handles.nbytes, stream)
        self._gpu.synchronize(stream)

    def pages_at(self, number: int) -> int:
        """Where a queue's page addresses are on the GPU."""
        return self.handles.address + self._pages_at + number * self._page_stride

    def lists_at(self, number: int) -> int:
        """Where a queue's list addresses are on the GPU."""
        return self.handles.address + self._lists_at + number * self._list_stride

    def state_at(self, number: int) -> int:
        """Where a queue's state is on the GPU."""
        return self.states.address + number * self.stride

    def zero(self) -> None:
        """Zero the queues, before they are created."""
        for submissions, completions in self.entries:
            submissions.zero()
            completions.zero()

    def free(self) -> None:
        """Free everything: neither the controller nor a kernel uses it any more."""
        self._keep.close()


class StreamMemory:
    """The buffers that the stream kernel reads through, and the table that tells it of them.

    Parameters
    ----------
    gpu, controller
        Who uses it.
    block_bytes
        Of the namespace.
    stream
        To bring the table to the GPU.
    shared
        Where data lies.
    """

    stages = 4  # buffers of each block of threads

    def __init__(
        self, gpu: Gpu, controller: Controller, block_bytes: int, stream: int, shared: SharedAllocator
    ) -> None:
        page = controller.page_bytes
        self.piece_blocks = max(1, min(_STREAM_PIECE_BYTES, controller.max_bytes) // block_bytes)
        nbytes = -(-self.piece_blocks * block_bytes // page) * page
        self.blocks = max(1, min(_STREAM_BLOCKS, _STREAM_BYTES // (self.stages * nbytes)))
        count = self.blocks * self.stages
        self._buffers = buffers = Buffers(shared, page, count, nbytes)
        table = np.zeros((count, 4), np.uint64)  # StreamBuffer in kernels/stream.cu
        table[:, 0] = buffers.gpu_address + np.arange(count, dtype=np.uint64) * np.uint64(nbytes)
        table[:, 1] = buffers.pages[:, 0]
        table[:, 2] = buffers.pages[:, 1] if buffers.pages.shape[1] > 1 else 0
        table[:, 3] = buffers.lists
        try:
            self._table = GpuMemory(gpu, table.nbytes)
        except BaseException:
            buffers.close()
            raise
        self._table.shadow[:] = table.reshape(-1).view(np.uint8)
        gpu.to_gpu(self._table.address, self._table.host, table.nbytes, stream)
        gpu.synchronize(stream)
        self.table = self._table.address

    def close(self) -> None:
        """Free it: neither the controller nor a kernel uses it any more."""
        self._table.close()
        self._buffers.close()
