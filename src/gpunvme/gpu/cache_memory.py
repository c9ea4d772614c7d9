"""What a `CachedArray` keeps in GPU memory: lines, the words that say which they are, counters, and the first error."""

from __future__ import annotations

import ctypes
import operator
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import RangeError
from gpunvme.gpu.memory import GpuMemory, aligned

if TYPE_CHECKING:
    from gpunvme.gpu.queues import GpuQueues

_LAYOUT_WORDS = 8
CHUNK = 1 << 20  # indices that one launch gathers


class CacheMemory:
    """Memory of one cache, and the stream that it is looked after on.

    Parameters
    ----------
    queues
        Through which lines are read.
    kernels
        Handles of the cache's kernels, by name.
    nbytes, lba
        Of the array: its size, and the block that it begins with.
    line_bytes, capacity_bytes
        Of a line, and of all of them at most.

    Raises
    ------
    RangeError, ValueError
        If the array is too large for its lines, or the capacity too small.
    CudaError
        If there is not so much memory.

    Attributes
    ----------
    sets, ways
        How many sets of lines there are, and lines in each.
    address
        Of the ``gpunvme::PageCache``.
    missed
        Of the list of what a gather has not found: room for `CHUNK` numbers behind their count.
    """

    def __init__(
        self,
        queues: GpuQueues,
        kernels: dict[str, int],
        *,
        nbytes: int,
        lba: int,
        line_bytes: int,
        capacity_bytes: int,
    ) -> None:
        self._queues, self._gpu, self._kernels = queues, queues.gpu, kernels
        self._nbytes, self._lba, self._line_bytes = nbytes, lba, line_bytes
        self._keep = ExitStack()
        try:
            self.stream = self._gpu.stream()
            self._keep.callback(self._gpu.destroy, stream=self.stream)
            self._ask_layout()
            self.sets = self._count_sets(capacity_bytes)
            self._allocate()
            self.set_up()
        except BaseException:
            self.free()
            raise

    def _ask_layout(self) -> None:
        host, device = self._gpu.allocate_host(4096)
        try:
            self._gpu.launch(self._kernels["layout"], (1, 1, 1), (1, 1, 1), [ctypes.c_uint64(device)], self.stream)
            self._gpu.synchronize(self.stream)
            words = struct.unpack(f"<{_LAYOUT_WORDS}Q", ctypes.string_at(host, 8 * _LAYOUT_WORDS))
        finally:
            self._gpu.free_host(host)
        self._cache_bytes, self.ways, line_bits, self._control_bytes = map(int, words[:4])
        self._counter_bytes, self._stripes, self._error_bytes, self._error_set = words[4:]
        most = self._line_bytes << line_bits
        if self._nbytes > most:
            raise RangeError(
                f"the array has {self._nbytes} bytes; with lines of {self._line_bytes}, {most} are the most"
            )

    def _count_sets(self, capacity_bytes: int) -> int:
        each = self.ways * self._line_bytes
        sets: int = operator.index(capacity_bytes) // each
        if sets < 1:
            raise ValueError(
                f"capacity_bytes is {capacity_bytes}: a cache has {self.ways} lines of {self._line_bytes} bytes at "
                f"least, {each} bytes"
            )
        sets = min(sets, max(1, -(-self._nbytes // each)))
        # Odd, so that steps of powers of two come to all of them; but not at the price of what would just fit.
        return sets - 1 if sets % 2 == 0 and sets * each < self._nbytes else sets

    def _allocate(self) -> None:
        frames = self.sets * self.ways
        self._places: dict[str, tuple[int, int]] = {}  # address and size
        sizes = {"words": frames * 8, "controls": self.sets * self._control_bytes, "failures": frames * 8}
        for name, nbytes in {**sizes, "lines": frames * self._line_bytes, "missed": 4 * CHUNK + 8}.items():
            address = self._gpu.allocate(nbytes)
            self._keep.callback(self._gpu.free, address)
            self._places[name] = address, nbytes
        self.missed = self._places["missed"][0]
        # Small things that the host looks at.
        self._counters_at = aligned(self._cache_bytes)
        self._error_at = self._counters_at + self._stripes * self._counter_bytes
        self._setup_at = self._error_at + aligned(self._error_bytes)
        self._small = GpuMemory(self._gpu, self._setup_at + 256)
        self._keep.callback(self._small.close)
        self.address = self._small.address

    def set_up(self) -> None:
        """Let the GPU write the cache as it is in the beginning: empty."""
        small, queues, block = self._small, self._queues, self._queues.namespace.block_size
        for name in ("words", "controls", "failures"):
            self._gpu.fill(*self._places[name], self.stream)
        self._gpu.fill(small.address, small.nbytes, self.stream)
        words = [queues.handle, *(self._places[name][0] for name in ("words", "controls", "failures", "lines"))]
        words += [small.address + self._counters_at, small.address + self._error_at]
        words += [self.sets, self._line_bytes.bit_length() - 1, self._nbytes, self._lba, -(-self._nbytes // block)]
        words += [queues.count, self._line_bytes // block]
        setup = np.array(words, np.uint64).view(np.uint8)
        small.shadow[self._setup_at : self._setup_at + len(setup)] = setup
        where = small.address + self._setup_at
        self._gpu.to_gpu(where, small.host + self._setup_at, len(setup), self.stream)
        arguments = [ctypes.c_uint64(where), ctypes.c_uint64(small.address)]
        self._gpu.launch(self._kernels["set_up"], (1, 1, 1), (1, 1, 1), arguments, self.stream)
        self._gpu.synchronize(self.stream)

    def _look(self, at: int, nbytes: int) -> bytes:
        with self._queues._set.looking:
            self._gpu.to_host(self._small.host + at, self._small.address + at, nbytes, self.stream)
            self._gpu.synchronize(self.stream)
            return ctypes.string_at(self._small.host + at, nbytes)

    def counters(self) -> NDArray[np.uint64]:
        """CacheCounters in page_cache.h, added up."""
        words = np.frombuffer(self._look(self._counters_at, self._stripes * self._counter_bytes), np.uint64)
        total: NDArray[np.uint64] = words.reshape(self._stripes, -1).sum(0)
        return total

    def take_error(self) -> tuple[int, int, int] | None:
        """The first failure that nobody asked for, which is forgotten: bytes of an element, its index, the failure."""
        state, each, index, word = struct.unpack("<IIQQ", self._look(self._error_at, 24))
        if state != self._error_set:
            return None
        with self._queues._set.looking:
            self._gpu.fill(self._small.address + self._error_at, self._error_bytes, self.stream)
            self._gpu.synchronize(self.stream)
        return each, index, word

    def free(self) -> None:
        """Free everything: no kernel uses it any more. Does nothing the second time."""
        self._keep.close()
