"""Who takes part: this library, what people use today, and the limit.

What people use today is measured at its best: in native code where a Python loop would be the slow part, into the
same destination, and on as many threads as there are CPUs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import gpunvme
from gpunvme import _native
from gpunvme.bench.contest import Contestant, Run, timed
from gpunvme.bench.destinations import Destination
from gpunvme.bench.samples import compare_gathered, compare_read

MIB = 1 << 20
Offsets = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sequential:
    """A file's start read into a destination: ``requests`` requests of ``block`` bytes, one after the other."""

    path: str
    to: Destination
    block: int
    requests: int

    @property
    def nbytes(self) -> int:
        """How many bytes move in one run."""
        return self.block * self.requests


@dataclass(frozen=True, slots=True)
class Random:
    """Blocks at random places of a file, gathered into a destination in the order of ``offsets``."""

    path: str
    to: Destination
    block: int
    offsets: Offsets

    @property
    def nbytes(self) -> int:
        """How many bytes move in one run."""
        return self.block * len(self.offsets)


def random_offsets(file_bytes: int, block: int, count: int, seed: int = 0) -> Offsets:
    """Choose blocks of a file at random, aligned to their size, each place as likely as any other.

    Parameters
    ----------
    file_bytes : int
        How much of the file takes part; at least one block.
    block : int
        Bytes per block.
    count : int
        How many.
    seed : int
        The same seed chooses the same blocks.

    Returns
    -------
    array of int64
        File offsets.
    """
    return np.random.default_rng(seed).integers(0, file_bytes // block, count, dtype=np.int64) * block


def threads() -> int:
    """Return how many threads the threaded baselines use: one per CPU, at most 16."""
    return min(len(os.sched_getaffinity(0)), 16)


class SampleCheck:
    """Compares samples of what arrived with the file.

    Parameters
    ----------
    work : Sequential or Random
        What is read.
    """

    def __init__(self, work: Sequential | Random) -> None:
        self._work = work

    def before(self) -> None:
        self._work.to.poison()

    def after(self) -> None:
        work = self._work
        if isinstance(work, Random):
            compare_gathered(work.path, work.offsets, work.block, work.to.fetch)
        else:
            compare_read(work.path, work.nbytes, work.to.fetch)


def _opened(path: str, action: Callable[[int], object]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        action(fd)
    finally:
        os.close(fd)


# ---- sequential


def ours_sequential(work: Sequential) -> Contestant:
    """`File.read_into`, as a user calls it."""

    def run() -> Run:
        parts = [(at, work.to.part(at, work.block)) for at in range(0, work.nbytes, work.block)]
        with gpunvme.open(work.path) as file:
            if len(parts) == 1:
                return timed(lambda: file.read_into(parts[0][1]), work.nbytes)
            return timed(lambda: [file.read_into(part, at) for at, part in parts][-1], work.nbytes)

    return Contestant("gpunvme", "ours", run)


def mmap_sequential(work: Sequential) -> Contestant:
    """The file mapped and copied: what ``numpy.memmap`` and safetensors do."""

    def copy(fd: int) -> None:
        if work.to.device == "cpu" and work.requests == 1:
            _native.mmap_copy(fd, work.to.window(0), None, work.nbytes, 1)
            return
        # A private mapping, which ctypes can take the address of; nothing is written to it.
        with mmap.mmap(fd, work.nbytes, access=mmap.ACCESS_COPY) as mapping:
            held = ctypes.c_char.from_buffer(mapping)
            try:
                for at in range(0, work.nbytes, work.block):
                    work.to.copy_from(ctypes.addressof(held) + at, at, work.block)
            finally:
                del held

    return Contestant(
        "mmap, then copy", "peer", lambda: timed(lambda: _opened(work.path, copy), work.nbytes), settings="1 thread"
    )


def pread_sequential(work: Sequential, count: int) -> Contestant:
    """``pread`` on one or many plain threads, then a copy where the destination is a GPU."""

    def read(fd: int) -> None:
        for at in range(0, work.nbytes, work.block):
            for offset in range(at, at + work.block, work.to.window_bytes):
                length = min(work.to.window_bytes, at + work.block - offset)
                _read_part(fd, work.to.window(offset), offset, length, count)
                work.to.arrived(offset, length)

    copied = "" if work.to.device == "cpu" else ", then copy from page-locked memory"
    return Contestant(
        f"pread × {count}{', then copy' if copied else ''}",
        "peer",
        lambda: timed(lambda: _opened(work.path, read), work.nbytes),
        settings=f"{count} threads{copied}" if count > 1 else f"1 thread{copied}",
    )


def host_view(address: int, nbytes: int) -> memoryview:
    """Return host memory at an address as something that Python reads into and writes from."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _read_part(fd: int, address: int, offset: int, nbytes: int, count: int) -> None:
    """Read a range of a file: one thread by plain calls, many in pieces of 1 MiB."""
    if count == 1:
        view, done = host_view(address, nbytes), 0
        while done < nbytes:
            got = os.preadv(fd, [view[done:]], offset + done)
            if got == 0:
                raise EOFError(f"the file ended at {offset + done}")
            done += got
        return
    if offset == 0:
        _native.pread_sequential(fd, address, nbytes, MIB, count)
        return
    piece = MIB if nbytes % MIB == 0 else nbytes
    offsets = np.arange(offset, offset + nbytes, piece, dtype=np.int64)
    _native.preadv_threads(fd, address, offsets, piece, min(count, len(offsets)))


def direct_sequential(path: str, host: Destination, nbytes: int, depth: int) -> Contestant:
    """The limit of a cold read: raw O_DIRECT at depth, into host memory and no further."""
    whole = nbytes // MIB * MIB

    def run() -> Run:
        return Run(float(_native.direct_read(path, host.window(0), whole, MIB, depth)), whole)

    return Contestant(f"raw O_DIRECT, depth {depth}", "limit", run, settings="1 MiB requests", lands=False)


def copy_ceiling(device: str, nbytes: int) -> Contestant:
    """The limit of every hot path to a GPU: the rate of a copy from page-locked memory."""
    ordinal = int(device.partition(":")[2] or 0)

    def run() -> Run:
        return Run(nbytes / float(_native.h2d_ceiling(ordinal, nbytes)), nbytes)

    return Contestant("page-locked memory to GPU", "limit", run, settings="one copy engine", lands=False)


# ---- random


def _gather(file: gpunvme.File, work: Random) -> Run:
    def gather() -> gpunvme.Transfer | None:
        file.gather(work.offsets, work.block, out=work.to.part(0, work.nbytes))
        return file.last_transfer

    return timed(gather, work.nbytes)


def ours_random(work: Random) -> Contestant:
    """`File.gather` on a file just opened."""

    def run() -> Run:
        with gpunvme.open(work.path) as file:
            return _gather(file, work)

    return Contestant("gpunvme", "ours", run)


def ours_random_again(work: Random, file: gpunvme.File) -> Contestant:
    """`File.gather` on a file that stays open, as a data loader does it: what the file learned is kept."""
    return Contestant("gpunvme, file kept open", "ours", lambda: _gather(file, work))


def _randomly(work: Random, name: str, settings: str, read: Callable[[int, int, Offsets], object]) -> Contestant:
    """Read blocks into the window, a window's worth at a time."""
    at_once = max(1, work.to.window_bytes // work.block)

    def all_of_it(fd: int) -> None:
        for first in range(0, len(work.offsets), at_once):
            some = work.offsets[first : first + at_once]
            read(fd, work.to.window(first * work.block), some)
            work.to.arrived(first * work.block, len(some) * work.block)

    then = "" if work.to.device == "cpu" else ", then copy"
    return Contestant(
        name + then, "peer", lambda: timed(lambda: _opened(work.path, all_of_it), work.nbytes), settings=settings
    )


def pread_random(work: Random, count: int) -> Contestant:
    """One ``pread`` a block on one or many plain threads."""
    return _randomly(
        work,
        f"pread × {count}",
        "1 thread" if count == 1 else f"{count} threads",
        lambda fd, address, some: _native.preadv_threads(fd, address, some, work.block, count),
    )


def mmap_random(work: Random, count: int) -> Contestant:
    """The file mapped and each block copied out: what indexing a ``numpy.memmap`` does."""
    return _randomly(
        work,
        f"mmap × {count}",
        "1 thread" if count == 1 else f"{count} threads",
        lambda fd, address, some: _native.mmap_copy(fd, address, some, work.block, count),
    )


def direct_random(path: str, host: Destination, offsets: Offsets, block: int, depth: int) -> Contestant:
    """The limit of a cold gather: raw O_DIRECT requests at depth, into host memory and no further."""
    nbytes = block * len(offsets)

    def run() -> Run:
        return Run(float(_native.direct_read_random(path, host.window(0), offsets, block, depth)), nbytes)

    return Contestant(f"raw O_DIRECT, depth {depth}", "limit", run, lands=False)


# ---- writing


def ours_write(path: str, source: Destination, nbytes: int) -> Contestant:
    """`File.write_from` with ``fsync=True``, as a user calls it."""

    def run() -> Run:
        with gpunvme.open(path, "w") as file:
            return timed(lambda: file.write_from(source.part(0, nbytes), fsync=True), nbytes)

    return Contestant("gpunvme", "ours", run, lands=False)


def pwrite_sequential(path: str, source: Destination, nbytes: int) -> Contestant:
    """The buffered way: copy to the host, ``pwrite``, ``fsync``."""

    def write() -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for offset in range(0, nbytes, source.window_bytes):
                length = min(source.window_bytes, nbytes - offset)
                held = host_view(source.fetch_to_window(offset, length), length)
                done = 0
                while done < length:
                    done += os.pwrite(fd, held[done:], offset + done)
            os.fsync(fd)
        finally:
            os.close(fd)

    return Contestant("pwrite, then fsync", "peer", lambda: timed(write, nbytes), settings="1 thread", lands=False)


def direct_write(path: str, host: Destination, nbytes: int, depth: int) -> Contestant:
    """The limit of a write: space reserved, raw O_DIRECT at depth from host memory, then ``fsync``."""
    whole = nbytes // MIB * MIB

    def write() -> None:
        _native.SourceFile.open(os.fsencode(path), "w").reserve(0, whole)  # writes that extend a file take turns
        _native.direct_write(path, host.window(0), whole, MIB, depth)
        _opened(path, os.fsync)

    return Contestant(
        f"raw O_DIRECT, depth {depth}", "limit", lambda: timed(write, whole), settings="1 MiB requests", lands=False
    )
