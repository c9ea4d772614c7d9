"""Launches that gather elements of a `CachedArray`: what is there at once, then what has to be read."""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpunvme.gpu.arguments import warp_shape
from gpunvme.gpu.cache_memory import CHUNK, CacheMemory
from gpunvme.memory import address_of

if TYPE_CHECKING:
    from gpunvme.gpu.queues import GpuQueues

THREADS = 128  # of a block, as the kernels are bounded
_MOST_BLOCKS = 4096


class CacheGathers:
    """What gathers of one cache share. The caller sees to it that one thread at a time is here.

    Parameters
    ----------
    queues, memory
        Through which lines are read, and the cache.
    element_bytes
        Of an element.
    launch
        ``launch(kernel, job, blocks, stream)`` launches one of the cache's kernels.
    """

    def __init__(
        self, queues: GpuQueues, memory: CacheMemory, element_bytes: int, launch: Callable[[str, bytes, int, int], None]
    ) -> None:
        self._queues, self._gpu, self._memory = queues, queues.gpu, memory
        self._element_bytes, self._launch = element_bytes, launch
        self._event = self._gpu.event()
        self._used = False  # the event was recorded
        self._indices = (0, 0, 0)  # page-locked: address, address for the GPU, bytes

    def launch(self, indices: NDArray[np.int64] | int, count: int, out: int, stream: int) -> None:
        """Gather to an address, in the order of a stream; ``indices`` on the host, or an address on the GPU."""
        if isinstance(indices, np.ndarray):
            indices = self._upload(indices)
        with self._queues._moves.beside_jobs(self._event), self._queues._set.gate:
            self._queues._set.wait_until_up()
            if self._used:
                self._gpu.wait_event(stream, self._event)  # they share the list of what was missed
            for first in range(0, count, CHUNK):
                here = out + first * self._element_bytes
                self._launch_chunk(indices + 8 * first, here, min(CHUNK, count - first), stream)
            self._gpu.record(self._event, stream)
        self._used = True

    def _launch_chunk(self, indices: int, out: int, count: int, stream: int) -> None:
        memory, missed = self._memory, self._memory.missed
        slots = self._queues.depth - 1
        width, batch = warp_shape(slots)
        job = struct.pack("<5Q", memory.address, indices, out, count, self._element_bytes)
        job += struct.pack("<4Q", missed + 8, missed, width, batch)
        self._gpu.fill(missed, 8, stream)
        self._launch("gather_found", job, min(-(-count // THREADS), _MOST_BLOCKS), stream)
        # As many lanes with reads as there are slots: more would only wait for one.
        warps = min(-(-count // width), self._queues.count * -(-slots // width))
        self._launch("gather_missed", job, -(-warps * 32 // THREADS), stream)

    def _upload(self, indices: NDArray[np.int64]) -> int:
        """Page-locked memory with the indices; its address for the GPU."""
        if self._used:
            while not self._gpu.happened(self._event):  # the last gather may still read them
                time.sleep(0.0001)
        if self._indices[2] < indices.nbytes:
            self._queues._moves.while_quiet(lambda: self._make_room(indices.nbytes))
        host, device, _ = self._indices
        ctypes.memmove(host, address_of(indices), indices.nbytes)
        return device

    def _make_room(self, nbytes: int) -> None:
        self._free_indices()
        nbytes = 1 << (nbytes - 1).bit_length()  # not each time for sizes that vary a little
        self._indices = *self._gpu.allocate_host(nbytes), nbytes

    def _free_indices(self) -> None:
        host, self._indices = self._indices[0], (0, 0, 0)
        if host:
            self._gpu.free_host(host)

    def free(self) -> None:
        """Give everything back: nothing of it is used any more."""
        self._free_indices()
        self._queues._set.running.ended(self._event)
        self._gpu.destroy(event=self._event)
