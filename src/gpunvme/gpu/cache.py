"""`CachedArray`: an array on a drive, or in a file, that GPU kernels index; what they use stays in GPU memory."""

from __future__ import annotations

import ctypes
import operator
import os
import struct
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote_from_bytes

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import CommandError, CudaError, DeadlineExceeded, Failed, NvmeError, RangeError, SpanError
from gpunvme.gpu.arguments import gpu_span, host_or_gpu_integers, warp_shape
from gpunvme.gpu.compile import own_kernels
from gpunvme.gpu.memory import GpuMemory, aligned
from gpunvme.memory import address_of
from gpunvme.nvme import spec
from gpunvme.nvme.movement import describe_failures
from gpunvme.nvme.namespace import Namespace
from gpunvme.streams import stream_handle

if TYPE_CHECKING:
    from gpunvme.gpu.queues import GpuQueues

_KERNELS = ("layout", "set_up", "gather_found", "gather_missed", "pin", "unpin")
_ELEMENT_BYTES = (1, 2, 4, 8, 16)
_LEAST_LINE_BYTES, _MOST_LINE_BYTES = 4096, 65536
_LAYOUT_WORDS = 8
_COUNTERS = ("hits", "misses", "loads", "evictions", "failures")  # CacheCounters in page_cache.h
_THREADS = 128  # of a block, as the kernels are bounded
_MOST_BLOCKS = 4096
_CHUNK = 1 << 20  # indices that one launch gathers
_OWNER = "this array is cached on"
_QUIET_SECONDS = 5.0
_TIMEOUT, _STOPPED, _FULL = 1, 2, 3  # Fate in device.h
_SCHEMES = ("soft:", "vfio-user:", "pci:")


class CachedArray:
    """A read-only array over blocks of a namespace, with a cache in GPU memory. Made by `GpuQueues.cached_array`.

    A kernel takes the `handle` (or the object itself, for `Kernel.launch`) as ``const gpunvme::PageCache*`` and makes
    ``gpunvme::CachedArray<T>`` of it, which it indexes; see ``gpunvme/page_cache.h``. What is on the drive must not
    change meanwhile; `clear` forgets everything.

    A context manager; close it before its queues, which otherwise do it.

    Attributes
    ----------
    dtype, size, line_bytes
        Type of the elements, how many there are, and what is read at a time.
    capacity_bytes
        GPU memory for lines.
    """

    def __init__(
        self,
        queues: GpuQueues,
        dtype: Any,
        *,
        lba: int = 0,
        length: int | None = None,
        capacity_bytes: int = 256 << 20,
        line_bytes: int = _LEAST_LINE_BYTES,
    ) -> None:
        queues._set.check_usable()
        self.queues, self._gpu, self.device = queues, queues.gpu, queues.device
        self._namespace = namespace = queues.namespace
        self.dtype = _element_type(dtype)
        self._lba, self.line_bytes = operator.index(lba), _line_size(line_bytes, namespace.block_size)
        self.size = self._length(length)
        self.nbytes = self.size * self.dtype.itemsize
        self._lock = threading.Lock()
        self._closed = False
        self._owned = ExitStack()  # queues and controller, where `open` made them
        self._pins: dict[tuple[int, int], list[int]] = {}  # (line, lines): times, address of the flags
        program = own_kernels(self._gpu)
        self._kernels = {name: program.kernel("gpunvme_cache_" + name).handle for name in _KERNELS}
        self._keep = ExitStack()
        try:
            self._stream = self._gpu.stream()
            self._keep.callback(self._gpu.destroy, stream=self._stream)
            self._event = self._gpu.event()
            self._keep.callback(self._gpu.destroy, event=self._event)
            self._used = False  # the event was recorded
            self._layout()
            self._sets = self._count_sets(capacity_bytes)
            self.capacity_bytes = self._sets * self._ways * self.line_bytes
            self._allocate()
            self._set_up()
        except BaseException:
            self._free()
            raise
        queues._set.keep.callback(self._free)

    @classmethod
    def open(
        cls,
        source: Any,
        dtype: Any,
        device: Any = 0,
        *,
        lba: int = 0,
        length: int | None = None,
        capacity_bytes: int = 256 << 20,
        line_bytes: int = _LEAST_LINE_BYTES,
        threads: int = 4,
    ) -> Self:
        """Open a file, a controller or a namespace as an array.

        Parameters
        ----------
        source
            The name of a file, which a software controller in this process then serves, read-only; an NVMe URI; a
            `gpunvme.nvme.Namespace`; or `GpuQueues`. What is made for it is closed with the array.
        dtype, lba, length, capacity_bytes, line_bytes
            As for `GpuQueues.cached_array`.
        device
            The GPU.
        threads
            Of the software controller that serves a file.

        Raises
        ------
        FileError
            If the file cannot be opened, or its size is no multiple of 512 bytes.
        """
        from gpunvme.gpu.queues import GpuQueues

        with ExitStack() as made:
            _element_type(dtype)
            if isinstance(source, (str, os.PathLike)):
                from gpunvme import nvme

                text = os.fspath(source)
                is_uri = isinstance(text, str) and text.startswith(_SCHEMES)
                uri = text if is_uri else _uri_of_file(Path(os.fsdecode(text)), threads)
                source = made.enter_context(nvme.open(uri, queues=1)).namespace()
            if isinstance(source, Namespace):
                source = made.enter_context(source.gpu_queues(device, slot_bytes=line_bytes))
            if not isinstance(source, GpuQueues):
                raise TypeError(f"no file, URI, namespace or GpuQueues: {type(source).__name__}")
            array = cls(source, dtype, lba=lba, length=length, capacity_bytes=capacity_bytes, line_bytes=line_bytes)
            array._owned = made.pop_all()
            return array

    # --- making

    def _length(self, length: int | None) -> int:
        namespace, each = self._namespace, self.dtype.itemsize
        if not 0 <= self._lba < max(1, namespace.blocks):
            raise RangeError(f"lba is {self._lba}: {namespace.name} has {namespace.blocks} blocks")
        most = (namespace.blocks - self._lba) * namespace.block_size // each
        length = most if length is None else operator.index(length)
        if not 1 <= length <= most:
            raise RangeError(
                f"length is {length}: from block {self._lba} on, {namespace.name} holds {most} elements of {each} bytes"
            )
        return length

    def _layout(self) -> None:
        host, device = self._gpu.allocate_host(4096)
        try:
            self._gpu.launch(self._kernels["layout"], (1, 1, 1), (1, 1, 1), [ctypes.c_uint64(device)], self._stream)
            self._gpu.synchronize(self._stream)
            words = struct.unpack(f"<{_LAYOUT_WORDS}Q", ctypes.string_at(host, 8 * _LAYOUT_WORDS))
        finally:
            self._gpu.free_host(host)
        self._cache_bytes, self._ways, line_bits, self._control_bytes = map(int, words[:4])
        self._counter_bytes, self._stripes, self._error_bytes, self._error_set = words[4:]
        if self.nbytes > self.line_bytes << line_bits:
            most = self.line_bytes << line_bits
            raise RangeError(f"the array has {self.nbytes} bytes; with lines of {self.line_bytes}, {most} are the most")

    def _count_sets(self, capacity_bytes: int) -> int:
        each = self._ways * self.line_bytes
        sets: int = operator.index(capacity_bytes) // each
        if sets < 1:
            raise ValueError(
                f"capacity_bytes is {capacity_bytes}: a cache has {self._ways} lines of {self.line_bytes} bytes at "
                f"least, {each} bytes"
            )
        sets = min(sets, max(1, -(-self.nbytes // each)))
        # Odd, so that steps of powers of two come to all of them; but not at the price of what would just fit.
        return sets - 1 if sets % 2 == 0 and sets * each < self.nbytes else sets

    def _allocate(self) -> None:
        frames = self._sets * self._ways
        self._places: dict[str, tuple[int, int]] = {}  # address and size
        sizes = {"words": frames * 8, "controls": self._sets * self._control_bytes, "failures": frames * 8}
        for name, nbytes in {**sizes, "lines": frames * self.line_bytes, "missed": 4 * _CHUNK + 8}.items():
            address = self._gpu.allocate(nbytes)
            self._keep.callback(self._gpu.free, address)
            self._places[name] = address, nbytes
        # Small things that the host looks at.
        self._counters_at = aligned(self._cache_bytes)
        self._error_at = self._counters_at + self._stripes * self._counter_bytes
        self._setup_at = self._error_at + aligned(self._error_bytes)
        self._small = GpuMemory(self._gpu, self._setup_at + 256)
        self._keep.callback(self._small.close)
        self._indices = (0, 0, 0)  # page-locked: address, address for the GPU, bytes
        self._keep.callback(self._free_indices)

    def _free_indices(self) -> None:
        host, self._indices = self._indices[0], (0, 0, 0)
        if host:
            self._gpu.free_host(host)

    def _set_up(self) -> None:
        """Let the GPU write the cache as it is in the beginning: empty."""
        small, block = self._small, self._namespace.block_size
        for name in ("words", "controls", "failures"):
            self._gpu.fill(*self._places[name], self._stream)
        self._gpu.fill(small.address, small.nbytes, self._stream)
        words = [self.queues.handle, *(self._places[name][0] for name in ("words", "controls", "failures", "lines"))]
        words += [small.address + self._counters_at, small.address + self._error_at]
        words += [self._sets, self.line_bytes.bit_length() - 1, self.nbytes, self._lba, -(-self.nbytes // block)]
        words += [self.queues.count, self.line_bytes // block]
        setup = np.array(words, np.uint64).view(np.uint8)
        small.shadow[self._setup_at : self._setup_at + len(setup)] = setup
        where = small.address + self._setup_at
        self._gpu.to_gpu(where, small.host + self._setup_at, len(setup), self._stream)
        arguments = [ctypes.c_uint64(where), ctypes.c_uint64(small.address)]
        self._gpu.launch(self._kernels["set_up"], (1, 1, 1), (1, 1, 1), arguments, self._stream)
        self._gpu.synchronize(self._stream)

    # --- using

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError(f"the cached array of {self._namespace.name} is closed")
        self.queues._set.check_usable()

    @property
    def handle(self) -> int:
        """Device address of the ``gpunvme::PageCache``, for kernels of your own."""
        self._check_usable()
        return self._small.address

    @staticmethod
    def source() -> str:
        """What a kernel's source begins with to use the array; compile it by `gpunvme.gpu.compile`."""
        return "#include <gpunvme/page_cache.h>\n"

    def gather(self, indices: Any, out: Any, *, stream: Any = None, wait: bool = True) -> None:
        """Copy elements to GPU memory, packed in the order of ``indices``.

        Parameters
        ----------
        indices
            Which: integers on the host, or a one-dimensional array of 64-bit integers on the GPU.
        out
            Where to: contiguous memory of the GPU.
        stream
            Stream that it is ordered in; see `File.read_into`.
        wait
            Whether to wait for the end, and raise what went wrong. If not, keep ``indices`` and ``out`` until the
            stream has come to its end, and call `check` then.

        Raises
        ------
        RangeError
            If there is no such element.
        SpanError
            If ``out`` is on another device, too small, read-only or not contiguous.
        CommandError, NvmeError
            As `check`.
        """
        self._check_usable()
        places, count = self._index_array(indices)
        each, span = self.dtype.itemsize, gpu_span(out, self.device, _OWNER, writable=True)
        if span.nbytes < count * each or span.ptr % each:
            raise SpanError(
                f"{count} elements of {each} bytes need {count * each} bytes, aligned to {each}; the destination has "
                f"{span.nbytes} at {span.ptr:#x}"
            )
        queue = stream_handle(stream, out, self.device) or 0
        with self._lock, self.queues._set.gate:
            self.queues._set.wait_until_up()
            if isinstance(places, np.ndarray):
                places = self._upload(places)
            if self._used:
                self._gpu.wait_event(queue, self._event)  # they share the list of what was missed
            for first in range(0, count, _CHUNK):
                self._launch_gather(places + 8 * first, span.ptr + first * each, min(_CHUNK, count - first), queue)
            self._gpu.record(self._event, queue)
            self._used = True
        if wait:
            self._gpu.synchronize(queue)
            self.check()

    def _launch_gather(self, indices: int, out: int, count: int, stream: int) -> None:
        missed = self._places["missed"][0]
        slots = self.queues.depth - 1
        width, batch = warp_shape(slots)
        job = struct.pack("<5Q", self.handle, indices, out, count, self.dtype.itemsize)
        job += struct.pack("<4Q", missed + 8, missed, width, batch)
        self._gpu.fill(missed, 8, stream)
        self._launch("gather_found", job, min(-(-count // _THREADS), _MOST_BLOCKS), stream)
        # As many lanes with reads as there are slots: more would only wait for one.
        warps = min(-(-count // width), self.queues.count * -(-slots // width))
        self._launch("gather_missed", job, -(-warps * 32 // _THREADS), stream)

    def _launch(self, kernel: str, job: bytes, blocks: int, stream: int) -> None:
        packed = [ctypes.create_string_buffer(job, len(job))]
        self._gpu.launch(self._kernels[kernel], (blocks, 1, 1), (_THREADS, 1, 1), packed, stream)

    def _index_array(self, indices: Any) -> tuple[NDArray[np.int64] | int, int]:
        places, count = host_or_gpu_integers(indices, "indices", self.device, _OWNER)
        if isinstance(places, np.ndarray) and count and (places.min() < 0 or places.max() >= self.size):
            bad = int(places[(places < 0) | (places >= self.size)][0])
            raise RangeError(f"there is no element {bad}: the array has {self.size}")
        return places, count

    def _upload(self, indices: NDArray[np.int64]) -> int:
        """Page-locked memory with the indices; its address for the GPU."""
        host, device, nbytes = self._indices
        if self._used:
            while not self._gpu.happened(self._event):  # the last gather may still read them
                threading.Event().wait(0.0001)
        if nbytes < indices.nbytes:
            self._free_indices()
            host, device = self._gpu.allocate_host(indices.nbytes)
            self._indices = host, device, indices.nbytes
        ctypes.memmove(host, address_of(indices), indices.nbytes)
        return device

    # --- lines that stay

    def pin(self, first: int = 0, count: int | None = None) -> None:
        """Read elements, as far as they are not there, and keep them until `unpin`.

        Parameters
        ----------
        first, count
            Which: ``count`` elements from ``first`` on; the rest of the array if None.

        Raises
        ------
        RangeError
            If there are no such elements.
        ValueError
            If too little of the cache would be left for other lines.
        CommandError, NvmeError
            If they cannot be read; then none is pinned.
        """
        self._check_usable()
        line, lines = key = self._lines(first, count)
        with self._lock:
            if key in self._pins:
                self._pins[key][0] += 1
                return
            taken = np.zeros(self._sets, np.int64)
            for start, number in (*self._pins, key):
                taken += number // self._sets
                taken[(start + np.arange(number % self._sets)) % self._sets] += 1
            if taken.max() >= self._ways:
                raise ValueError(
                    f"{lines} lines cannot be pinned: each set of {self._ways} lines must keep one for others, and "
                    f"with those that are pinned some would not; the cache has {self._sets} sets"
                )
            flags = self._gpu.allocate(lines)
            try:
                self._gpu.fill(flags, lines, self._stream)
                self._run_pins("pin", line, lines, flags)
                try:
                    self.check()
                except NvmeError:
                    self._run_pins("unpin", line, lines, flags)
                    raise
            except BaseException:
                self._gpu.free(flags)
                raise
            self._pins[key] = [1, flags]

    def unpin(self, first: int = 0, count: int | None = None) -> None:
        """Undo one `pin` of the same elements.

        Raises
        ------
        ValueError
            If they are not pinned.
        """
        self._check_usable()
        line, lines = key = self._lines(first, count)
        with self._lock:
            if key not in self._pins:
                raise ValueError(f"elements {first} to {first + (count or self.size - first)} were not pinned together")
            self._pins[key][0] -= 1
            if self._pins[key][0] == 0:
                flags = self._pins.pop(key)[1]
                self._run_pins("unpin", line, lines, flags)
                self._gpu.free(flags)

    def _lines(self, first: int, count: int | None) -> tuple[int, int]:
        first = operator.index(first)
        count = self.size - first if count is None else operator.index(count)
        if first < 0 or count < 1 or first + count > self.size:
            raise RangeError(f"elements {first} to {first + count} are not in an array of {self.size}")
        each = self.dtype.itemsize
        start = first * each // self.line_bytes
        return start, -(-(first + count) * each // self.line_bytes) - start

    def _run_pins(self, kernel: str, line: int, lines: int, flags: int) -> None:
        with self.queues._set.gate:
            self.queues._set.wait_until_up()
            blocks = min(-(-lines // _THREADS), self.queues.count * 2)
            self._launch(kernel, struct.pack("<4Q", self.handle, flags, line, lines), blocks, self._stream)
        self._gpu.synchronize(self._stream)

    # --- looking after it

    def _look(self, at: int, nbytes: int) -> bytes:
        with self.queues._set.looking:
            self._gpu.to_host(self._small.host + at, self._small.address + at, nbytes, self._stream)
            self._gpu.synchronize(self._stream)
            return ctypes.string_at(self._small.host + at, nbytes)

    def stats(self) -> dict[str, int]:
        """Counters since it was made or cleared.

        ``hits``: accesses of threads to lines that were there, and ``misses``: that waited; both are complete when a
        kernel has ended. ``loads``: lines read; ``evictions``: lines given up for others; ``failures``: lines that
        could not be read.
        """
        self._check_usable()
        words = np.frombuffer(self._look(self._counters_at, self._stripes * self._counter_bytes), np.uint64)
        totals = words.reshape(self._stripes, -1).sum(0)
        return {name: int(total) for name, total in zip(_COUNTERS, totals, strict=False)}

    def check(self) -> None:
        """Raise the first failure that kernels had since the last call: of elements that nobody asked the outcome of.

        Raises
        ------
        RangeError
            If an index was not in the array.
        CommandError
            If a read failed, was never answered, or was lost in a reset; its ``failures`` has one entry.
        NvmeError
            If no frame was free for a line: threads held them all.
        """
        self._check_usable()
        state, each, index, word = struct.unpack("<IIQQ", self._look(self._error_at, 24))
        if state != self._error_set:
            return
        with self.queues._set.looking:
            self._gpu.fill(self._small.address + self._error_at, self._error_bytes, self._stream)
            self._gpu.synchronize(self._stream)
        if index >= self.nbytes // each:
            raise RangeError(f"a kernel asked for element {index}; the array has {self.nbytes // each} of {each} bytes")
        name, line = self._namespace.name, index * each // self.line_bytes
        blocks = self.line_bytes // self._namespace.block_size
        fate, status, cid, queue = word & 0xFF, word >> 16 & 0xFFFF, word >> 32 & 0xFFFF, word >> 48
        if fate == _FULL:
            raise NvmeError(
                f"{name}: element {index} could not be read: for as long as a command may take, all frames of its set, "
                "or all slots of a queue, were in use; let threads hold fewer lines, or make the cache larger"
            )
        kind = {_TIMEOUT: "timeout", _STOPPED: "lost"}.get(fate, "status")
        lba = self._lba + line * blocks
        failed = Failed(spec.NvmOpcode.READ, lba, blocks, queue, cid, status, kind)
        raise CommandError(f"{name}: element {index} could not be read: {describe_failures([failed])}", [failed])

    def clear(self) -> None:
        """Forget all lines and counters: what is on the drive has changed. No kernel may use the array meanwhile.

        Raises
        ------
        ValueError
            If lines are pinned.
        """
        self._check_usable()
        with self._lock:
            if self._pins:
                raise ValueError("lines are pinned; unpin them first")
            self._gpu.synchronize()
            self._set_up()

    # --- ending

    def close(self, timeout: float = _QUIET_SECONDS) -> None:
        """Free its memory, and close what `open` made for it. Does nothing the second time.

        Raises
        ------
        DeadlineExceeded
            If a kernel still runs after ``timeout`` seconds; the memory is then freed with the queues.
        """
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        try:
            if self.queues._set.process == os.getpid() and not self._is_quiet(timeout):
                raise DeadlineExceeded(
                    f"a kernel on {self.device} still runs {timeout:.0f} s after its cached array was to be closed; "
                    "the memory is freed with the queues"
                )
            self._free()
        finally:
            self._owned.close()

    def _is_quiet(self, timeout: float) -> bool:
        try:
            return self.queues._set._is_quiet(timeout)
        except CudaError:
            return True  # a kernel failed, and with it the whole context: nothing of it runs any more

    def _free(self) -> None:
        self._closed = True
        pins, self._pins = self._pins, {}
        keep = self._keep.pop_all()
        for _, flags in pins.values():
            keep.callback(self._gpu.free, flags)
        try:
            keep.close()
        except CudaError:
            pass  # the driver has taken everything

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        what = f"{self.size} {self.dtype} of {self._namespace.name!r} on {self.device}"
        state = "closed" if self._closed else f"{self.capacity_bytes} bytes in lines of {self.line_bytes}"
        return f"<gpunvme.gpu.CachedArray of {what}, {state}>"


def _element_type(dtype: Any) -> np.dtype[Any]:
    kind: np.dtype[Any] = np.dtype(dtype)
    if kind.hasobject or kind.itemsize not in _ELEMENT_BYTES:
        raise TypeError(
            f"elements of a cached array have 1, 2, 4, 8 or 16 bytes, so that none lies across two lines; {kind} has "
            f"{kind.itemsize}; use a type of that size for its parts"
        )
    return kind


def _line_size(line_bytes: int, block: int) -> int:
    size = operator.index(line_bytes)
    if not _LEAST_LINE_BYTES <= size <= _MOST_LINE_BYTES or size & (size - 1) or size % block:
        raise ValueError(
            f"line_bytes is {size}: a power of two from {_LEAST_LINE_BYTES} to {_MOST_LINE_BYTES}, and whole blocks of "
            f"{block} bytes"
        )
    return size


def _uri_of_file(path: Path, threads: int) -> str:
    size = path.stat().st_size if path.is_file() else 0  # what is wrong with it, the controller says
    block = 4096 if size % 4096 == 0 else 512
    return f"soft:{quote_from_bytes(os.fsencode(path))}?read_only=1&lba={block}&threads={threads}&queues=10"
