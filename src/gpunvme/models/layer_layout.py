"""One layer as a slot holds it: where in the slot each tensor is, and which ranges of files go where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from gpunvme import file as files
from gpunvme import many
from gpunvme.errors import CudaError, SpanError, TruncatedError
from gpunvme.memory import Buffer, Device
from gpunvme.models import frameworks
from gpunvme.models.header import TensorInfo
from gpunvme.models.index import Entry

# What starts a new range in GPU memory is aligned as coalesced loads want it; what follows its neighbour in the file
# follows it in the slot as well if that keeps what vector loads and matrix units want.
_GPU_START, _GPU_ALIGNMENT = 256, 16
# O_DIRECT reads straight into host memory whose address has the same remainder by the page size as the file offset.
_PAGE = 4096
_CPU_START = 64
# Reading a gap of this size costs less than another request.
_NEAR = 4096


class SlotMemory(Protocol):
    """What slots need of a framework; `frameworks.Framework` has it."""

    device: Device

    def dtype(self, info: TensorInfo, filename: str) -> Any:
        """Return the framework's dtype for a tensor."""

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """Return the shape of the tensor that holds ``info``."""

    def address(self, memory: Any) -> int:
        """Return where memory is."""

    def scratch(self, nbytes: int) -> Any:
        """Allocate page-aligned uint8 memory."""

    def view(self, memory: Any, at: int, nbytes: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """Return bytes of it as a tensor."""


class _GpuBytes:
    """GPU memory without a framework: tensors are `Buffer` objects of plain bytes."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def dtype(self, info: TensorInfo, filename: str) -> None:
        return None

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        return (info.nbytes,)

    def address(self, memory: Buffer) -> int:
        return memory.ptr

    def scratch(self, nbytes: int) -> Buffer:
        return Buffer.empty(nbytes, self.device)

    def view(self, memory: Buffer, at: int, nbytes: int, dtype: Any, shape: tuple[int, ...]) -> Buffer:
        return Buffer(memory.span.part(at, nbytes), shape)


def memory_for(framework: str | None, device: Device) -> SlotMemory:
    """Return where slots are made, for a caller's ``framework=``.

    Raises
    ------
    ValueError
        The framework is unknown.
    SpanError
        It has no tensors on that device.
    CudaError
        It cannot use that GPU.
    """
    if framework == "buffer" or (framework is None and device.is_gpu and not frameworks.has_torch()):
        if not device.is_gpu:
            raise SpanError('framework="buffer" is for GPU memory; use "np" for host memory')
        return _GpuBytes(device)
    return frameworks.choose(framework, device)


def allocate(memory: SlotMemory, nbytes: int, what: str) -> Any:
    """Allocate memory for a slot or a layer.

    Raises
    ------
    CudaError
        The GPU has no room left.
    """
    try:
        return memory.scratch(max(nbytes, _PAGE))
    except RuntimeError as error:  # torch's way of saying so
        if not memory.device.is_gpu:
            raise
        raise CudaError(f"cannot allocate {nbytes} bytes on {memory.device} for {what}: {error}") from error


class Run(NamedTuple):
    """A range of a file that lies in one piece in a slot, from byte ``at`` of it on."""

    file: files.File
    filename: str
    offset: int
    nbytes: int
    at: int


class Place(NamedTuple):
    """Where in a slot a tensor is, and what it is."""

    name: str
    at: int
    nbytes: int
    dtype: Any
    shape: tuple[int, ...]


class LayerLayout:
    """One layer.

    Parameters
    ----------
    index, name
        Its place among the layers, and its name.
    entries
        Its tensors in the order of the files' bytes.
    memory
        What tensors are made by.

    Attributes
    ----------
    nbytes
        Bytes of its tensors.
    slot_bytes
        What it takes in a slot, which is aligned to pages: more than `nbytes`, for alignment.
    runs
        What has to be read.
    """

    def __init__(self, index: int, name: str, entries: list[Entry], memory: SlotMemory) -> None:
        self.index = index
        self.name = name
        self.nbytes = sum(entry.info.nbytes for entry in entries)
        self.runs: list[Run] = []
        self._places: list[Place] = []
        self._memory = memory
        self._gpu = memory.device.is_gpu
        end = 0
        for entry in entries:
            dtype = memory.dtype(entry.info, entry.filename)
            at = self._place(entry, getattr(dtype, "itemsize", 1), end) if entry.info.nbytes else 0
            self._places.append(Place(entry.info.name, at, entry.info.nbytes, dtype, memory.shape(entry.info)))
            end = max(end, at + entry.info.nbytes)
        self.slot_bytes = -(-end // _PAGE) * _PAGE

    def _place(self, entry: Entry, itemsize: int, end: int) -> int:
        """Choose where a tensor goes, behind ``end``."""
        file, filename, info = entry
        if self.runs:
            last = self.runs[-1]
            gap = info.offset - last.offset - last.nbytes
            at = last.at + last.nbytes + gap
            if last.file is file and 0 <= gap <= _NEAR and at % (_GPU_ALIGNMENT if self._gpu else itemsize) == 0:
                self.runs[-1] = last._replace(nbytes=last.nbytes + gap + info.nbytes)
                return at
        if self._gpu:
            at = -(-end // _GPU_START) * _GPU_START
        elif info.offset % itemsize == 0:
            at = end + (info.offset - end) % _PAGE
        else:
            at = -(-end // _CPU_START) * _CPU_START
        self.runs.append(Run(file, filename, info.offset, info.nbytes, at))
        return at

    def tensors(self, memory: Any) -> dict[str, Any]:
        """Return its tensors as they are in this slot."""
        view = self._memory.view
        return {place.name: view(memory, place.at, place.nbytes, place.dtype, place.shape) for place in self._places}

    def parts(self, base: int, device: Device, owner: object) -> Iterator[tuple[files.File, int, many.OwnSpan]]:
        """Return what has to be read, and where to in memory of ours that begins at ``base``.

        Raises
        ------
        TruncatedError
            A file has become shorter since it was opened.
        """
        ends: dict[files.File, tuple[int, str]] = {}
        for run in self.runs:
            ends[run.file] = max(ends.get(run.file, (0, "")), (run.offset + run.nbytes, run.filename))
        for file, (end, filename) in ends.items():
            size = file.size
            if end > size:
                raise TruncatedError(0, f"the file has become shorter: {end} bytes are needed", filename, size)
        for run in self.runs:
            yield run.file, run.offset, many.OwnSpan(base + run.at, run.nbytes, device, True, owner)
