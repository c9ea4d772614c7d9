"""`CachedArray`: an array on a drive, or in a file, that GPU kernels index; what they use stays in GPU memory."""

from __future__ import annotations

import ctypes
import operator
import os
import struct
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote_from_bytes

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import CommandError, CudaError, DeadlineExceeded, Failed, NvmeError, RangeError, SpanError
from gpunvme.gpu.arguments import gpu_span, gpu_stream, host_or_gpu_integers
from gpunvme.gpu.cache_gathers import THREADS, CacheGathers
from gpunvme.gpu.cache_memory import CacheMemory
from gpunvme.gpu.compile import own_kernels
from gpunvme.gpu.pinned_lines import PinnedLines
from gpunvme.memory import Device
from gpunvme.nvme import spec
from gpunvme.nvme.movement import describe_failures
from gpunvme.nvme.namespace import Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpunvme.gpu.queues import GpuQueues

_KERNELS = ("layout", "set_up", "gather_found", "gather_missed", "pin", "unpin")
_ELEMENT_BYTES = (1, 2, 4, 8, 16)
_LEAST_LINE_BYTES, _MOST_LINE_BYTES = 4096, 65536
_COUNTERS = ("hits", "misses", "loads", "evictions", "failures")  # CacheCounters in page_cache.h
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
        self._lock = threading.RLock()  # who pins also checks
        self._closed = self._freed = False
        self._owned = ExitStack()  # queues and controller, where `open` made them
        queues._moves.while_quiet(lambda: self._make(capacity_bytes))  # it loads and allocates
        queues._set.keep.callback(self._free)

    def _make(self, capacity_bytes: int) -> None:
        queues = self.queues
        program = own_kernels(self._gpu)
        self._kernels = {name: program.kernel("gpunvme_cache_" + name).handle for name in _KERNELS}
        self._memory = memory = CacheMemory(
            queues,
            self._kernels,
            nbytes=self.nbytes,
            lba=self._lba,
            line_bytes=self.line_bytes,
            capacity_bytes=capacity_bytes,
        )
        self.capacity_bytes = memory.sets * memory.ways * self.line_bytes
        self._pins = PinnedLines(queues, memory, self._run_pins, self.check)
        try:
            self._gathers = CacheGathers(queues, memory, self.dtype.itemsize, self._launch)
        except BaseException:
            memory.free()
            raise

    @classmethod
    def open(
        cls,
        source: Any,
        dtype: Any,
        device: Any = None,
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
            The GPU; if None, that of the queues where they are given, else GPU 0.
        threads
            Of the software controller that serves a file.

        Raises
        ------
        FileError
            If the file cannot be opened, or its size is no multiple of 512 bytes.
        SpanError
            If ``source`` is queues of another GPU.
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
                source = made.enter_context(source.gpu_queues(0 if device is None else device, slot_bytes=line_bytes))
            if not isinstance(source, GpuQueues):
                raise TypeError(f"no file, URI, namespace or GpuQueues: {type(source).__name__}")
            if device is not None and Device.parse(device) != source.device:
                raise SpanError(f"the queues are driven by {source.device}, not by {Device.parse(device)}")
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

    # --- using

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError(f"the cached array of {self._namespace.name} is closed")
        self.queues._set.check_usable()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """For one thread at a time, while another one that closes it waits."""
        with self._lock:
            self._check_usable()
            yield

    @property
    def handle(self) -> int:
        """Device address of the ``gpunvme::PageCache``, for kernels of your own."""
        self._check_usable()
        return self._memory.address

    @staticmethod
    def source() -> str:
        """What a kernel's source begins with to use the array; compile it by `gpunvme.gpu.compile`."""
        return "#include <gpunvme/page_cache.h>\n"

    def gather(self, indices: Any, out: Any, *, stream: Any = None, wait: bool = True) -> None:
        """Copy elements to GPU memory, packed in the order of ``indices``.

        More indices on the host than ever before need memory, and wait until nothing runs on the queues.

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
        queue = gpu_stream(stream, out, self._gpu)
        with self._in_use():
            self._gathers.launch(places, count, span.ptr, queue)
        if wait:
            self._gpu.synchronize(queue)
            self.check()

    def _launch(self, kernel: str, job: bytes, blocks: int, stream: int) -> None:
        packed = [ctypes.create_string_buffer(job, len(job))]
        self._gpu.launch(self._kernels[kernel], (blocks, 1, 1), (THREADS, 1, 1), packed, stream)

    def _index_array(self, indices: Any) -> tuple[NDArray[np.int64] | int, int]:
        places, count = host_or_gpu_integers(indices, "indices", self.device, _OWNER)
        if isinstance(places, np.ndarray) and count and (places.min() < 0 or places.max() >= self.size):
            bad = int(places[(places < 0) | (places >= self.size)][0])
            raise RangeError(f"there is no element {bad}: the array has {self.size}")
        return places, count

    # --- lines that stay

    def pin(self, first: int = 0, count: int | None = None) -> None:
        """Read elements, as far as they are not there, and keep them until `unpin`.

        Waits until nothing runs on the queues.

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
        line, lines = self._lines(first, count)
        with self._in_use():
            self._pins.pin(line, lines)

    def unpin(self, first: int = 0, count: int | None = None) -> None:
        """Undo one `pin` of the same elements.

        Raises
        ------
        ValueError
            If they are not pinned.
        """
        line, lines = self._lines(first, count)
        with self._in_use():
            if (line, lines) not in self._pins:
                raise ValueError(f"elements {first} to {first + (count or self.size - first)} were not pinned together")
            self._pins.unpin(line, lines)

    def _lines(self, first: int, count: int | None) -> tuple[int, int]:
        first = operator.index(first)
        count = self.size - first if count is None else operator.index(count)
        if first < 0 or count < 1 or first + count > self.size:
            raise RangeError(f"elements {first} to {first + count} are not in an array of {self.size}")
        each = self.dtype.itemsize
        start = first * each // self.line_bytes
        return start, -(-(first + count) * each // self.line_bytes) - start

    def _run_pins(self, kernel: str, line: int, lines: int, flags: int) -> None:
        queues = self.queues._set
        with self.queues._moves.beside_jobs():
            with queues.gate:
                queues.wait_until_up()
                blocks = min(-(-lines // THREADS), self.queues.count * 2)
                argument = struct.pack("<4Q", self.handle, flags, line, lines)
                self._launch(kernel, argument, blocks, self._memory.stream)
            self._gpu.synchronize(self._memory.stream)

    # --- looking after it

    def stats(self) -> dict[str, int]:
        """Counters since it was made or cleared.

        ``hits``: accesses of threads to lines that were there, and ``misses``: that waited; both are complete when a
        kernel has ended. ``loads``: lines read; ``evictions``: lines given up for others; ``failures``: lines that
        could not be read.
        """
        with self._in_use():
            totals = self._memory.counters()
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
        with self._in_use():
            error = self._memory.take_error()
        if error is None:
            return
        each, index, word = error
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
        with self._in_use():
            if self._pins:
                raise ValueError("lines are pinned; unpin them first")
            self._gpu.synchronize()
            self._memory.set_up()

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
            with self._lock:
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
        if self._freed:
            return
        self._freed = True
        self._pins.free()
        self._gathers.free()
        self._memory.free()

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
