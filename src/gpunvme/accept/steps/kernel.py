"""The drive by the kernel's own driver, as a block device: written, read, compared; and what other drivers left on it.

It is what the other steps are compared with: another program's word on what is on the drive, and its speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

import gpunvme
from gpunvme import _native
from gpunvme.accept.drive import first_data
from gpunvme.accept.job import MIB, Job, compare, contents
from gpunvme.accept.result import Figure, Result, Skipped
from gpunvme.accept.steps.custody import block_device
from gpunvme.catalog.target import Target, open_target
from gpunvme.errors import UnsafeDeviceError
from gpunvme.memory import Buffer

_SEED, _FAR_SEED = 11, 12
# Of the kernel's reads that others are compared with.
_DEPTH, _DEPTH_OF_SMALL, _READS = 16, 128, 16384
PAGE = 4096


@contextmanager
def claimed(job: Job) -> Iterator[Target]:
    """Open the block device so that nobody else can use it meanwhile."""
    target = open_target(block_device(job), "r+")
    try:
        yield target
    finally:
        target.close()


def write_and_read(job: Job) -> Result:
    """See once more that it is empty; write random bytes O_DIRECT, read them by the host path, compare."""
    with claimed(job) as target:
        _check_nobody_came(target)
        where = first_data(target.file.fileno(), [(job.area, job.area_nbytes), (job.far, MIB), (0, MIB)])
        if where is not None:
            raise UnsafeDeviceError(f"somebody wrote to it since it was looked at: there is data at byte {where}")
        wanted = contents(_SEED, job.area_nbytes)
        written = target.file.write_from(wanted, job.area)
        target.file.write_from(contents(_FAR_SEED, MIB), job.far)
        target.flush()
        found = Buffer.empty(job.area_nbytes)
        done = target.file.read_into(found, job.area)
        compare(found.numpy(), wanted, "what the kernel wrote")
        compare(target.file.read(job.far, MIB).numpy(), contents(_FAR_SEED, MIB), "near the end of the drive")
        raw, iops = _raw_speeds(job, target.file.fileno(), found)
    link = job.limit("link", "the link")
    figures = (
        Figure("write", job.area_nbytes / written.seconds / 1e9, "GB/s", **link),
        Figure("read", job.area_nbytes / done.seconds / 1e9, "GB/s", raw, "raw O_DIRECT"),
    )
    limits = {"kernel read": raw, "kernel IOPS": iops}
    return Result(f"by {done.path}: {done.reason}", figures, {"left": _SEED, "limits": limits})


def _check_nobody_came(target: Target) -> None:
    """Raise if somebody has made use of the drive meanwhile."""
    found = target.contents()
    if found:
        raise UnsafeDeviceError(f"somebody wrote to it since it was looked at: it holds {found}")


def _raw_speeds(job: Job, fd: int, memory: Buffer) -> tuple[float, float]:
    """Return the speed of reads of 1 MiB in GB/s, and of 4 KiB in IOPS: at depth, and with nothing but io_uring."""
    name = f"/proc/self/fd/{fd}"
    large = np.arange(job.area, job.area + job.area_nbytes, MIB, dtype=np.int64)
    seconds = float(_native.direct_read_random(name, memory.span.ptr, large, MIB, _DEPTH))
    pages = job.area_nbytes // PAGE
    small = job.area + PAGE * np.random.default_rng(1).integers(0, pages, min(pages, _READS), np.int64)
    small_seconds = float(_native.direct_read_random(name, memory.span.ptr, small, PAGE, _DEPTH_OF_SMALL))
    return job.area_nbytes / max(seconds, 1e-9) / 1e9, len(small) / max(small_seconds, 1e-9)


def read_to_gpu(job: Job) -> Result:
    """Read what the kernel wrote into GPU memory by the host path, and compare."""
    wanted = _left(job)
    with gpunvme.open(block_device(job), path="host") as file:
        found = Buffer.empty(job.area_nbytes, job.device)
        done = file.read_into(found, job.area)
        compare(found.numpy(), wanted, f"what {job.device} was given")
    speed = Figure("read", job.area_nbytes / done.seconds / 1e9, "GB/s", **job.limit("kernel read", "raw O_DIRECT"))
    return Result(f"by {done.path}: {done.reason}", (speed,), {"left": job.left})


def _left(job: Job) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    if job.left is None:
        raise Skipped("what is on the drive is not known: a step before it failed")
    return contents(job.left, job.area_nbytes)


def read_what_was_left(job: Job) -> Result:
    """Read what another driver wrote, and compare: what it was told is on the drive, is."""
    wanted = _left(job)
    with gpunvme.open(block_device(job), path="host") as file:
        compare(file.read(job.area, job.area_nbytes).numpy(), wanted, "what was written by a driver of ours")
    return Result(f"{job.area_nbytes >> 20} MiB are what was written", facts={"left": job.left})


def clear(job: Job) -> Result:
    """Write zeros over everything that was written, and read them: the drive is as empty as it was."""
    with claimed(job) as target:
        _check_nobody_came(target)
        zeros = np.zeros(MIB, np.uint8)
        places = [*range(job.area, job.area + job.area_nbytes, MIB), job.far]
        for offset in places:
            target.file.write_from(zeros, offset)
        target.flush()
        os.posix_fadvise(target.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        where = first_data(target.file.fileno(), [(offset, MIB) for offset in places])
    if where is not None:
        raise ValueError(f"byte {where} is not zero after zeros were written")
    return Result(f"{len(places)} MiB of zeros: it holds nothing again")
