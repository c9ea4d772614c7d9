"""What a path is: a way that bytes travel between a file and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpunvme.memory import Device, Span
from gpunvme.transfer import Movement

# Every path that there is, in the order of tables.
NAMES = ("host", "cufile/nvidia-fs", "cufile/p2pdma", "cufile/compat", "p2pdma", "nvme", "gpu-nvme")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a path can carry a transfer, and why or why not."""

    path: str
    usable: bool
    reason: str


class Source(Protocol):
    """Where bytes are: an open file (`_native.SourceFile`), or a namespace (`paths.nvme.NamespaceSource`)."""

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""

    @property
    def is_block_device(self) -> bool:
        """Whether its size is fixed."""

    def size(self) -> int:
        """Bytes in it now."""

    def fileno(self) -> int:
        """File descriptor."""

    def reserve(self, offset: int, nbytes: int) -> None:
        """Make sure, as far as possible, that a range can be written."""


class Part(NamedTuple):
    """A range of a source, starting at ``offset``, and the memory of the same size that it goes to or comes from."""

    file: Source
    offset: int
    span: Span


@dataclass(frozen=True, slots=True)
class Order:
    """What holds for the whole of a transfer."""

    write: bool
    device: Device
    stream: int | None = None
    timeout: float | None = None
    background: bool = False  # it goes on without anybody waiting for it


class Sealable(Movement, Protocol):
    """A movement that has to be told when it is complete."""

    def seal(self) -> None:
        """Say that nothing more comes."""


class OpenMovement(Sealable, Protocol):
    """A movement that takes parts of sources until it is sealed; what was added may move already."""

    def add(self, parts: Sequence[Part]) -> None:
        """Add ranges to be moved."""

    def add_gather(self, file: Source, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads of ``nbytes`` each, packed in order into ``span``."""


class Path(Protocol):
    """One way that bytes travel."""

    name: str

    def verdict(self, file: Source, device: Device) -> Verdict:
        """Say whether it can carry bytes between this file and this device, and if not why."""

    def speed(self, file: Source, device: Device, *, gather: bool = False) -> float | None:
        """Bytes per second that it was seen to reach there in this process, by large ranges or gathers, or None."""

    def begin(self, order: Order) -> OpenMovement:
        """Carry: begin a transfer."""
