"""Files in a directory that the person names: the paths that need a file system, cuFile's among them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import gpunvme
from gpunvme.accept.job import MIB, Job, compare, contents
from gpunvme.accept.result import Figure, Result
from gpunvme.accept.steps.p2p import read_by_path

_SEED = 60
_NBYTES = 64 * MIB


@contextmanager
def _file(job: Job) -> Iterator[str]:
    """Make a file that the page cache does not hold; it is removed afterwards, even if this process is killed later."""
    with tempfile.NamedTemporaryFile(prefix=".gpunvme-accept-", dir=job.directory) as made:
        made.write(contents(_SEED, _NBYTES).tobytes())
        made.flush()
        os.fsync(made.fileno())
        os.posix_fadvise(made.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield made.name


def host(job: Job) -> Result:
    """Write a file by the host path, read it, compare; then the same to and from GPU memory, if that was asked for."""
    device = str(job.options.get("device", "cpu")).replace("gpu", job.device)
    wanted = contents(_SEED, _NBYTES)
    with _file(job) as name, gpunvme.open(name, "r+", path="host") as file:
        found = file.read(device=device)
        done = file.last_transfer
        compare(found.numpy(), wanted, f"what {device} was given")
        written = file.write_from(found, fsync=True)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        compare(file.read().numpy(), wanted, f"what {device} wrote")
    del done
    return Result(written.reason, (Figure("write", _NBYTES / written.seconds / 1e9, "GB/s"),))


def by_path(job: Job) -> Result:
    """Read a file into GPU memory by ``options["path"]``, and compare."""
    with _file(job) as name, gpunvme.open(name) as file:
        return read_by_path(file, str(job.options["path"]), job, 0, _NBYTES, _SEED)
