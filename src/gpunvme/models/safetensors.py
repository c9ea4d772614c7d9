"""Checkpoints, safetensors or GGUF, loaded whole: one movement from any number of files into many tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gpunvme import file as files
from gpunvme import many
from gpunvme.models import frameworks
from gpunvme.models.frameworks import Framework
from gpunvme.models.index import Checkpoint, Entry, Source
from gpunvme.transfer import Transfer

# Two staging buffers take turns while dtype= converts. Each is a 64th of what is converted, within these bounds.
_STAGE_MIN = 16 << 20
_STAGE_MAX = 64 << 20

Progress = Callable[[int, int], object]


def load_file(
    source: Source,
    device: Any = "cpu",
    *,
    keys: Iterable[str] | None = None,
    filter: Callable[[str], bool] | None = None,
    dtype: Any = None,
    framework: str | None = None,
    progress: Progress | None = None,
    report: Callable[[Transfer], object] | None = None,
    path: str = "auto",
) -> dict[str, Any]:
    """Load the tensors of a checkpoint.

    Every tensor owns its memory; none is a view into a larger buffer, and the checkpoint exists once in memory.

    Parameters
    ----------
    source
        A ``*.safetensors`` or ``*.gguf`` file, a ``*.index.json``, a list of shards, or a directory: in it
        ``model.safetensors``, else the index, else every ``*.safetensors``, else every ``*.gguf``.
    device
        Where the tensors shall be: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, an int or a `torch.device`.
    keys
        Names of the tensors to load; None loads all.
    filter
        Called with each name (among ``keys``, if given); a tensor is loaded where it returns true.
    dtype
        Convert floating tensors (F64, F32, F16, BF16 and every F8) to this floating dtype, on the device: a torch
        or numpy dtype or its name. Integers, booleans, complex numbers and the packed F4 and F6 stay as they are.
        Values are rounded as the framework's own conversion does. Takes up to 128 MiB of device memory beside the
        tensors while it runs.
    framework
        ``"pt"`` for torch tensors, ``"np"`` for numpy arrays; None is torch where it is installed. numpy holds BF16
        and F8 where ``ml_dtypes`` is installed.
    progress
        Called with ``(done_bytes, total_bytes)`` while the tensors move.
    report
        Called with each finished `Transfer`: once, or with ``dtype`` once for each staged group; not at all where
        there are no bytes to move.
    path
        Name of the path that must carry them, as for `gpunvme.open`.

    Returns
    -------
    dict
        ``{name: tensor}`` in the order of the files' bytes. Of a GGUF file's quantised types (Q4_K and the like)
        tensors are the blocks as they are: uint8, the last dimension the bytes of a row; `GgufFile` says which type.

    Raises
    ------
    FormatError
        The checkpoint is not valid, holds no tensor of a name in ``keys``, or has a dtype that the framework lacks.
        Raised before any tensor moves.
    FileError
        A file is missing or cannot be read.
    SpanError
        ``framework="np"`` and a device other than the host.
    PathError, CudaError, Cancelled
        As for any movement.

    Examples
    --------
    >>> weights = gpunvme.load_file("model.safetensors", device="cuda:0")  # doctest: +SKIP
    >>> model.load_state_dict(weights, assign=True)  # doctest: +SKIP
    """
    adapter = frameworks.choose(framework, device)
    target = None if dtype is None else adapter.convertible(dtype)
    with _no_collection(), Checkpoint(source, path) as checkpoint:
        return load_entries(checkpoint.select(keys, filter), adapter, target, progress, report)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Hold the garbage collector off: thousands of small objects, none in a cycle, would set it off several times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_entries(
    entries: list[Entry],
    adapter: Framework,
    target: Any = None,
    progress: Progress | None = None,
    report: Callable[[Transfer], object] | None = None,
) -> dict[str, Any]:
    """Load tensors of open files, which are in the order of their offsets; `load_file` says the rest."""
    pairs = [(entry, adapter.dtype(entry.info, entry.filename)) for entry in entries]
    total = sum(entry.info.nbytes for entry in entries)
    tensors: dict[str, Any] = {}

    def allocated(entry: Entry, dtype: Any, nbytes: int) -> Any:
        info = entry.info
        tensors[info.name] = adapter.empty(adapter.shape(info), dtype, nbytes, info.offset)
        return tensors[info.name]

    def parts() -> Iterator[tuple[files.File, int, Any]]:
        # Consumed while earlier parts are already on their way, so allocation costs no time of its own.
        for entry, dtype in pairs:
            nbytes = entry.info.nbytes
            tensor = allocated(entry, dtype, nbytes)
            if nbytes:
                span = many.OwnSpan(adapter.address(tensor), nbytes, adapter.device, True, tensor)
                yield entry.file, entry.info.offset, span

    def converted(entry: Entry, dtype: Any) -> bool:
        return target is not None and entry.info.dtype.floating and dtype != target

    stage = 0 if target is None else sum(entry.info.nbytes for entry, dtype in pairs if converted(entry, dtype))
    if not stage:
        transfer = None
        if len(entries) == 1 and total:  # a tensor at a time, as `safe_open` reads: the shortest way counts
            file, offset, span = next(parts())
            transfer = file.read_into(span.owner, offset, progress=progress)
        elif total:
            transfer = many.read_many(parts(), progress=progress, total=total)
        else:
            tensors.update((entry.info.name, allocated(entry, dtype, 0)) for entry, dtype in pairs)
        if transfer is not None and report is not None:
            report(transfer)
        return tensors

    staged = _Staged(adapter, stage, total, progress, report)
    for entry, dtype in pairs:
        if converted(entry, dtype):
            elements = entry.info.nbytes // dtype.itemsize
            staged.convert(entry, dtype, allocated(entry, target, elements * target.itemsize))
        else:
            staged.read(entry, allocated(entry, dtype, entry.info.nbytes))
    staged.finish()
    return tensors


class _Staged:
    """Reads groups of pieces into two staging buffers in turn; while one fills, the other is converted."""

    def __init__(
        self,
        adapter: Framework,
        nbytes: int,
        total: int,
        progress: Progress | None,
        report: Callable[[Transfer], object] | None,
    ) -> None:
        size = min(max(nbytes // 64, _STAGE_MIN), _STAGE_MAX, -(-nbytes // 4096) * 4096 + 4096)
        self._adapter = adapter
        self._buffers = [adapter.scratch(size), adapter.scratch(size)]
        self._size = size
        self._used = 0
        self._parts: list[tuple[files.File, int, Any]] = []
        self._pieces: list[tuple[Any, int, Any, Any]] = []
        self._bytes = 0
        self._done = 0
        self._total = total
        self._progress = progress
        self._report = report
        self._flight: tuple[Transfer, list[tuple[Any, int, Any, Any]], int] | None = None

    def read(self, entry: Entry, tensor: Any) -> None:
        """Add a tensor that needs no conversion."""
        if entry.info.nbytes:
            self._parts.append((entry.file, entry.info.offset, tensor))
            self._bytes += entry.info.nbytes

    def convert(self, entry: Entry, dtype: Any, tensor: Any) -> None:
        """Add a tensor to be converted from ``dtype`` into ``tensor``, in pieces that fit."""
        done = 0
        while done < entry.info.nbytes:
            offset = entry.info.offset + done
            # Keep the remainder by the page size, for O_DIRECT, unless the file has the elements unaligned.
            skip = (offset - self._used) % 4096 if offset % dtype.itemsize == 0 else -self._used % dtype.itemsize
            room = (self._size - self._used - skip) // dtype.itemsize * dtype.itemsize
            if room <= 0:
                self._flush()
                continue
            first = self._used + skip
            nbytes = min(room, entry.info.nbytes - done)
            piece = self._buffers[0][first : first + nbytes]
            self._parts.append((entry.file, offset, piece))
            self._pieces.append((tensor, done // dtype.itemsize, piece, dtype))
            self._used = first + nbytes
            self._bytes += nbytes
            done += nbytes

    def finish(self) -> None:
        """Read and convert what is left."""
        self._flush()
        self._land()

    def _flush(self) -> None:
        """Start the group; convert the one before it meanwhile."""
        if self._parts:
            self._adapter.finish()  # what was converted out of this buffer has been read from it
            transfer = many.read_many(self._parts, wait=False, progress=self._count(), total=self._bytes)
            flight = (transfer, self._pieces, self._bytes)
        else:
            flight = None
        try:
            self._land()
        except BaseException:
            if flight is not None:
                flight[0].cancel()
            raise
        self._flight = flight
        self._buffers.reverse()
        self._parts, self._pieces, self._used, self._bytes = [], [], 0, 0

    def _land(self) -> None:
        if self._flight is None:
            return
        transfer, pieces, nbytes = self._flight
        self._flight = None
        transfer.wait()
        self._done += nbytes
        if self._report is not None:
            self._report(transfer)
        for tensor, first, piece, dtype in pieces:
            self._adapter.convert(tensor, first, piece, dtype)

    def _count(self) -> Progress | None:
        progress, total = self._progress, self._total
        if progress is None:
            return None
        return lambda done, _: progress(self._done + done, total)
