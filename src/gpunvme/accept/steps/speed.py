"""How fast the drive is by our own driver, once and shortly, beside what the kernel's read of it."""

from __future__ import annotations

import time

import numpy as np

from gpunvme import nvme
from gpunvme.accept.job import Job, compare, contents
from gpunvme.accept.result import Figure, Result
from gpunvme.accept.steps.driver import area_of
from gpunvme.memory import Buffer

_SEED = 40
_PAGE = 4096
_ROWS = 16384
_ALONE = 256


def speed(job: Job) -> Result:
    """Write and read the area in order, read 4 KiB at random, at depth and one at a time; compare what was read."""
    data = contents(_SEED, job.area_nbytes)
    link = job.limit("link", "the link")
    with nvme.open(job.uri) as controller:
        namespace, first = controller.namespace(job.nsid), area_of(job)
        written = namespace.write_from(data, first)
        namespace.flush()
        found = Buffer.empty(job.area_nbytes)
        read = namespace.read_into(found, first)
        compare(found.numpy(), data, "what was read in order")
        many = _gather(job, namespace, data, _ROWS)
        said = read.reason
    with nvme.open(job.uri, queues=1, depth=2) as controller:
        one = _gather(job, controller.namespace(job.nsid), data, _ALONE)
    figures = (
        Figure("write", job.area_nbytes / written.seconds / 1e9, "GB/s", **link),
        Figure("read", job.area_nbytes / read.seconds / 1e9, "GB/s", **job.limit("kernel read", "the kernel's")),
        Figure("4 KiB", 1 / many, "IOPS", **job.limit("kernel IOPS", "the kernel's")),
        Figure("one at a time", one * 1e6, "µs"),
    )
    return Result(said, figures, {"left": _SEED})


def _gather(job: Job, namespace: nvme.Namespace, data: np.ndarray[tuple[int], np.dtype[np.uint8]], rows: int) -> float:
    """Read pages at random; return the seconds for one."""
    each = max(_PAGE, job.block_size)
    places = np.random.default_rng(rows).integers(0, job.area_nbytes // each, min(rows, job.area_nbytes // each))
    lbas, blocks = area_of(job) + places * (each // job.block_size), each // job.block_size
    out = Buffer.empty(len(places) * each)
    start = time.perf_counter()
    namespace.gather(lbas, blocks, out)
    seconds = time.perf_counter() - start
    compare(out.numpy(), data.reshape(-1, each)[places].reshape(-1), "what was read at random")
    return seconds / len(places)
