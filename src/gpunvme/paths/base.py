"""What a path is: a way that bytes travel between a file and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native
from gpunvme.memory import Device, Span
from gpunvme.transfer import Movement


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a path can carry a transfer, and why or why not."""

    path: str
    usable: bool
    reason: str


class Part(NamedTuple):
    """A range of a file, starting at ``offset``, and the memory of the same size that it goes to or comes from."""

    file: _native.SourceFile
    offset: int
    span: Span


@dataclass(frozen=True, slots=True)
class Order:
    """What holds for the whole of a transfer."""

    write: bool
    device: Device
    stream: int | None = None
    timeout: float | None = None


class OpenMovement(Movement, Protocol):
    """A movement that takes parts until it is sealed; what was added moves already."""

    def add(self, parts: Sequence[Part]) -> None:
        """Add ranges to be moved."""

    def add_gather(self, file: _native.SourceFile, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads of ``nbytes`` each, packed in order into ``span``."""

    def seal(self) -> None:
        """Say that nothing more comes."""


class Path(Protocol):
    """One way that bytes travel."""

    name: str

    def verdict(self, file: _native.SourceFile, device: Device) -> Verdict:
        """Say whether it can carry bytes between this file and this device, and if not why."""

    def speed(self, file: _native.SourceFile, device: Device) -> float | None:
        """Bytes per second that it was seen to reach there in this process, or None."""

    def begin(self, order: Order) -> OpenMovement:
        """Carry: begin a transfer."""
