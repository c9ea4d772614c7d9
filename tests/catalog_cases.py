"""Catalogs for tests: targets of every kind, and a file that remembers what was written to it and in which order."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

import gpunvme
from gpunvme.memory import span_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECTOR = 512


def stored(catalog: gpunvme.Catalog) -> dict[int, tuple[str, bytes]]:
    """Everything in a catalog: name and bytes by number."""
    return {region.kind: (region.name, catalog.read_kind(region.kind).numpy().tobytes()) for region in catalog.regions}


def memory_file(image: bytes, name: str = "image") -> gpunvme.File:
    """An open file in memory."""
    fd = os.memfd_create("catalog-test", os.MFD_CLOEXEC)
    try:
        view = memoryview(image)
        at = 0
        while at < len(view):
            at += os.pwrite(fd, view[at:], at)
        return gpunvme.File(fd, "r+", name=name)
    finally:
        os.close(fd)


class Stopped(Exception):
    """What the writer meets instead of the write that it is killed at."""


class Recorder(gpunvme.File):
    """A file that keeps a log of writes and flushes, and can be told after how many of them its writer dies."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.log: list[tuple[int, bytes] | None] = []  # None: a flush
        self.left = -1

    def _count(self) -> None:
        if self.left == 0:
            raise Stopped
        self.left -= 1

    def write_from(self, source: Any, offset: int = 0, *arguments: Any, **options: Any) -> gpunvme.Transfer:
        self._count()
        span = span_of(source, writable=False)
        self.log.append((offset, bytes(np.ctypeslib.as_array(_pointer(span.ptr), (span.nbytes,)))))
        return super().write_from(source, offset, *arguments, **options)

    def flush(self) -> None:
        self._count()
        self.log.append(None)
        super().flush()


def _pointer(address: int) -> Any:
    import ctypes

    return ctypes.cast(address, ctypes.POINTER(ctypes.c_ubyte))


def recorder() -> Recorder:
    """A recorder over a file in memory."""
    fd = os.memfd_create("catalog-test", os.MFD_CLOEXEC)
    try:
        return Recorder(fd, "r+", name="recorded")
    finally:
        os.close(fd)


def applied(image: bytes, writes: Sequence[tuple[int, bytes]]) -> bytes:
    """An image after writes."""
    changed = bytearray(image)
    for offset, data in writes:
        if len(changed) < offset:
            changed += bytes(offset - len(changed))
        changed[offset : offset + len(data)] = data
    return bytes(changed)


def sectors(write: tuple[int, bytes]) -> Iterator[tuple[int, bytes]]:
    """A write as what a drive may have done of it: any of its sectors."""
    offset, data = write
    for at in range(0, len(data), SECTOR):
        yield offset + at, data[at : at + SECTOR]


def after_crashes(
    image: bytes, log: Sequence[tuple[int, bytes] | None], random: np.random.Generator, each: int = 3
) -> Iterator[bytes]:
    """What may be on the drive after a loss of power at any point of a log.

    What was written before a flush is there. Of what came after it, everything up to the point may be; and `each` times
    a random part of its sectors, in any order, the rest never having arrived.
    """
    durable, pending = image, []
    for entry in [*log, None]:
        yield applied(durable, pending)
        loose = [sector for write in pending for sector in sectors(write)]
        for _ in range(each if loose else 0):
            some = [loose[i] for i in random.permutation(len(loose))[: random.integers(0, len(loose) + 1)]]
            yield applied(durable, some)
        if entry is None:
            durable, pending = applied(durable, pending), []
        else:
            pending.append(entry)
    yield durable
